"""The name of this peer: taken with a look at who is known, told, kept over restarts, given up by leaving."""

import asyncio
import json
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from meshq import membership as module
from meshq.config import Home
from meshq.gossip import snapshot, transport
from meshq.gossip.member import Address
from meshq.gossip.roster import KnownPeer
from meshq.gossip.transport import open_socket
from meshq.gossip.wire import Rumor
from meshq.machine import load_name
from meshq.membership import Hooks, Membership
from meshq.names import STEPS, HeldName
from meshq.settings import Settings
from meshq.task import Telemetry
from meshq.web.peer_client import PeerClient
from tests.gossip.builders import member, packet, peer

LIMIT = 20.0
ME = peer("m")


def nothing(*_: Any) -> None:
    """Nobody wants to know."""


def nobody() -> PeerClient:
    raise AssertionError("nobody is called")


def track(work: Coroutine[Any, Any, Any], name: str) -> None:
    work.close()


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


Start = Callable[..., Membership]


@pytest.fixture
def start(home: Home) -> Iterator[Start]:
    """Another run in this home. It has read whom it knew, and speaks to nobody yet."""
    with ExitStack() as sockets:

        def begin(wanted: str = "lab") -> Membership:
            made = Membership(
                home=home, settings=Settings(name=wanted, mdns=False, bind="127.0.0.1"), me=ME,
                udp=sockets.enter_context(open_socket("127.0.0.1", 0)), port=7_733, telemetry=Telemetry(),
                seal=lambda plain: plain, open=lambda sealed: sealed, client=nobody,
                hooks=Hooks(on_views=nothing, on_note=nothing, on_stall=nothing, on_capacity=nothing, track=track),
                clock=time.monotonic,
            )  # fmt: skip
            made.recall()
            return made

        yield begin


def known(home: Home, *names: str) -> None:
    """These two, or one, were there in the last run."""
    where = (Address("10.0.0.9", 1),)
    gone = [
        KnownPeer(peer=peer(who), name=name, addresses=where, unseen_for=60.0) for who, name in zip("ab", names, strict=False)
    ]
    snapshot.save(home.known_peers, gone, time.time())


def hear_of(one: Membership, who: str, name: str, named: int) -> None:
    told = Rumor(replace(member(who), name=name, named=named))
    one.gossip.perform(one.core.handle_packet(time.monotonic(), packet(who, rumors=(told,)), Address("10.0.0.9", 1)))
    one.tell_views()


def run(story: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(story())


async def keep_until(one: Membership, home: Home, held: HeldName) -> None:
    """Let it keep its name until this is on disk."""
    keeping = asyncio.get_running_loop().create_task(one.keep_name())
    deadline = time.monotonic() + LIMIT
    while load_name(home.name, ME, held.wanted) != held:
        assert time.monotonic() < deadline and not keeping.done(), "it is never on disk"
        await asyncio.sleep(0.01)
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)


def test_who_starts_anew_takes_no_name_of_those_who_were_known(home: Home, start: Start) -> None:
    async def story() -> None:
        known(home, "lab", "lab-2")
        assert start().core.me.name == "lab-3"
        assert start("gpu").core.me.name == "gpu"

    run(story)


def test_a_newcomer_gives_way_and_has_its_suffix_after_a_restart_too(home: Home, start: Start) -> None:
    async def story() -> None:
        one = start()
        hear_of(one, "a", "lab", 2)
        assert (one.core.me.name, one.core.me.named) == ("lab-2", 0)
        await keep_until(one, home, HeldName(peer=ME, wanted="lab", name="lab-2", named=1))
        known(home, "lab")
        assert start().core.me.name == "lab-2"
        assert start("gpu").core.me.name == "gpu", "another one is wanted now"

    run(story)


def test_who_has_its_name_for_longer_keeps_it_and_says_so_after_a_restart_too(
    home: Home, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STEPS", (0.01, 0.01, 1_000.0))

    async def story() -> None:
        await keep_until(start(), home, HeldName(peer=ME, wanted="lab", name="lab", named=2))
        one = start()
        assert one.core.me.named == 2
        hear_of(one, "a", "lab", 1)
        assert one.core.me.name == "lab"

    run(story)


def test_who_left_comes_back_as_a_newcomer(home: Home, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "LEAVE_SECONDS", 0.0)

    async def story() -> None:
        one = start()
        await keep_until(one, home, HeldName(peer=ME, wanted="lab", name="lab", named=1))
        await one.leave()
        assert load_name(home.name, ME, "lab") is None

    run(story)


HELD = {"peer": ME, "wanted": "lab", "name": "lab-2", "named": 1}


def test_the_name_of_a_copied_home_is_none_of_the_copy(home: Home) -> None:
    home.name.write_text(json.dumps(HELD))
    assert load_name(home.name, ME, "lab") == HeldName(peer=ME, wanted="lab", name="lab-2", named=1)
    assert load_name(home.name, peer("a"), "lab") is None


@pytest.mark.parametrize("what", [{"name": "a b"}, {"name": 7}, {"named": -1}, {"named": len(STEPS) + 1}])
def test_a_name_that_is_none_is_passed_over(home: Home, what: dict[str, object]) -> None:
    home.name.write_text(json.dumps(HELD | what))
    assert load_name(home.name, ME, "lab") is None


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\xff"])
def test_a_damaged_name_is_passed_over(home: Home, data: bytes) -> None:
    home.name.write_bytes(data)
    assert load_name(home.name, ME, "lab") is None


def test_who_has_left_has_no_more_to_say_of_its_name(home: Home, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    stored: list[HeldName] = []
    monkeypatch.setattr(module, "store_name", lambda path, held: stored.append(held))

    async def story() -> None:
        one = start()
        one.gossip.perform(one.core.leave(time.monotonic()))
        keeping = asyncio.get_running_loop().create_task(one.keep_name())
        for _ in range(50):
            await asyncio.to_thread(str)
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)

    run(story)
    assert stored == [HeldName(peer=ME, wanted="lab", name="lab")]
