"""Meeting the others: whom to ask and when, following this machine's addresses, and what to tell a person who is alone."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import pytest

from meshq import meeting as module
from meshq import seeds
from meshq.errors import Unreachable
from meshq.gossip import snapshot
from meshq.gossip.discovery import Announcement, Discovery
from meshq.gossip.effects import Effect, MemberChanged, Sync
from meshq.gossip.member import Address, Liveness, Member
from meshq.gossip.roster import KnownPeer
from meshq.gossip.swim import PROFILES, Swim
from meshq.gossip.transport import GossipShell, open_socket
from meshq.gossip.wire import Rumor
from meshq.ids import PeerId
from meshq.meeting import Meeting, advice_for_one_alone, nearest
from meshq.peers import Peers
from meshq.settings import Settings
from meshq.task import Telemetry
from tests.gossip.builders import DEAD, member, packet, peer

LIMIT = 20.0
HOME = (Address("127.0.0.1", 7_733),)


class WatchedPeers(Peers):
    """Counts how often the meeting has looked who is there, so that a test can wait until it has done nothing often enough."""

    looks = 0

    def others_alive(self) -> list[PeerId]:
        self.looks += 1
        return super().others_alive()


class Alone:
    """One peer with everything but others. Whom it wants to sync with is noted; nobody answers."""

    def __init__(self, settings: Settings, path: Path) -> None:
        self.asked: list[Address] = []
        self.strangers: list[str] = []
        self.now: Callable[[], float] = time.monotonic
        self.addresses: tuple[Address, ...] = HOME
        self.address_looks = 0
        me = member("a", addresses=HOME)
        core = Swim(me, PROFILES["lan"], Random(0), self.now())
        self.peers = WatchedPeers(me, Telemetry(), self.now())
        self.gossip = GossipShell(
            core, open_socket("127.0.0.1", 0), seal=lambda plain: plain, open=lambda sealed: sealed, sync=self._sync,
            stream=self._stream, on_effect=self._effect, clock=lambda: self.now(),
        )  # fmt: skip
        self.meeting = Meeting(
            settings=settings, path=path, gossip=self.gossip, peers=self.peers, addresses=self._look_at_addresses,
            clock=lambda: self.now(), rng=Random(0), strangers=lambda: self.strangers, on_forgotten=lambda: None,
        )  # fmt: skip

    def _look_at_addresses(self) -> tuple[Address, ...]:
        self.address_looks += 1
        return self.addresses

    async def _sync(self, sync: Sync) -> tuple[PeerId, bytes]:
        self.asked.append(sync.address)
        raise Unreachable("nobody there")

    async def _stream(self, to: PeerId, packet: bytes) -> tuple[bytes, ...]:
        raise Unreachable("nobody there")

    def _effect(self, effect: Effect) -> None:
        if isinstance(effect, MemberChanged):
            self.peers.handle_member(self.now(), effect.after)
            self.meeting.handle_change()

    def hear_of(self, *members: Member) -> None:
        rumors = tuple(Rumor(each) for each in members)
        self.gossip.perform(self.gossip.core.handle_packet(self.now(), packet("z", rumors=rumors), Address("10.0.0.99", 1)))


def story(settings: Settings, path: Path, told: Callable[[Alone], Awaitable[None]], *, run: bool = True) -> Alone:
    """Run it beside everything that the meeting does by itself."""

    async def go() -> Alone:
        async with _running(settings, path, run) as one:
            await told(one)
        return one

    return asyncio.run(go())


@asynccontextmanager
async def _running(settings: Settings, path: Path, run: bool) -> AsyncIterator[Alone]:
    one = Alone(settings, path)
    one.gossip.start()
    one.meeting.recall()
    await one.meeting.begin(tags=lambda: ("t",), port=7_733)
    loops = asyncio.get_running_loop().create_task(one.meeting.run()) if run else None
    try:
        yield one
    finally:
        if loops is not None:
            loops.cancel()
            await asyncio.gather(loops, return_exceptions=True)
        await one.meeting.end()
        await one.gossip.stop()


async def until(predicate: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LIMIT
    while not predicate():
        assert time.monotonic() < deadline, f"never: {what}"
        await asyncio.sleep(0.01)


async def looked(one: Alone) -> None:
    """Each of the loops has come round a few times more."""
    before = one.peers.looks
    await until(lambda: one.peers.looks >= before + 20, "it has looked again and again")


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses that a test can wait for."""
    monkeypatch.setattr(seeds, "PAUSE_MIN", 0.02)
    monkeypatch.setattr(seeds, "PAUSE_MAX", 0.05)
    monkeypatch.setattr(module, "SEED_SECONDS", 0.01)
    monkeypatch.setattr(module, "ALONE_WATCH_SECONDS", 0.01)
    monkeypatch.setattr(module, "NETWORKS_SECONDS", 0.02)


SEEDS = ("127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3")


def test_all_seeds_are_asked_as_long_as_nobody_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)

    async def told(one: Alone) -> None:
        await until(lambda: len(one.asked) >= 9, "three rounds")
        assert set(one.asked[:9]) == {Address("127.0.0.1", port) for port in (1, 2, 3)}

    story(Settings(mdns=False, seeds=SEEDS), tmp_path / "peers", told)


def test_seeds_are_asked_now_and_then_however_well_the_mesh_is_but_for_those_that_are_members(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sides that have forgotten each other are both well."""
    quick(monkeypatch)
    monkeypatch.setattr(seeds, "REST", 0.05)

    async def told(one: Alone) -> None:
        one.hear_of(member("z", addresses=(Address("127.0.0.1", 2), Address("10.0.0.9", 1))), member("y"))
        assert len(one.peers.others_alive()) == 2
        await looked(one)  # and what was asked while it was alone has been asked
        one.asked.clear()
        await until(lambda: len(one.asked) >= 8, "it goes on asking")
        assert {address for address in one.asked if address.host == "127.0.0.1"} == {
            Address("127.0.0.1", 1), Address("127.0.0.1", 3),
        }  # fmt: skip

    story(Settings(mdns=False, seeds=SEEDS), tmp_path / "peers", told)


def test_a_seed_that_does_not_resolve_is_complained_of_once_and_asked_for_anew_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    quick(monkeypatch)
    asked: list[str] = []

    async def resolve(seed: str) -> list[Address]:
        asked.append(seed)
        if len(asked) <= 4:
            raise Unreachable(f"seed '{seed}': its name does not resolve: no such name", "check the name")
        return [Address("127.0.0.1", len(asked))]

    monkeypatch.setattr(module, "resolve_seed", resolve)

    async def told(one: Alone) -> None:
        await until(lambda: len(one.asked) >= 2, "it resolves at last, and means another address each time")
        assert one.asked[:2] == [Address("127.0.0.1", 5), Address("127.0.0.1", 6)]

    story(Settings(mdns=False, seeds=("lab3:7",)), tmp_path / "peers", told)
    assert len([record for record in caplog.records if "does not resolve" in record.getMessage()]) == 1


def test_a_changed_address_is_told_to_gossip_and_a_machine_without_any_keeps_its_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch)
    new = (Address("127.0.0.7", 7_733),)

    async def told(one: Alone) -> None:
        one.addresses = new
        await until(lambda: one.gossip.core.me.addresses == new, "gossip knows")
        incarnation = one.gossip.core.me.incarnation
        one.addresses = ()
        before = one.address_looks
        await until(lambda: one.address_looks >= before + 3, "it has looked again")
        assert (one.gossip.core.me.addresses, one.gossip.core.me.incarnation) == (new, incarnation)

    story(Settings(mdns=False), tmp_path / "peers", told)


def test_a_network_that_comes_back_is_used_at_once_to_call_those_who_are_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def told(one: Alone) -> None:
        called: list[Address] = []
        one.hear_of(member("b", DEAD), member("c"))
        monkeypatch.setattr(one.gossip, "join", called.extend)
        one.meeting._call_the_missed()
        one.meeting._call_the_missed()
        assert sorted(called) == [Address("10.0.0.9", 1), *member("b").addresses], "once, and nobody who is alive"

    path = tmp_path / "peers"
    gone = KnownPeer(peer=peer("q"), name="q", addresses=(Address("10.0.0.9", 1),), unseen_for=60)
    snapshot.save(path, [gone], time.time())
    story(Settings(mdns=False), path, told, run=False)


def test_who_is_alone_for_long_is_told_once_and_again_only_after_somebody_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    quick(monkeypatch)
    monkeypatch.setattr(module, "ALONE_SECONDS", 0.1)
    monkeypatch.setattr(module, "told_addresses", lambda port, bind: (Address("192.168.1.5", port),))

    def said() -> int:
        return len([record for record in caplog.records if "no other peer is in sight" in record.getMessage()])

    async def told(one: Alone) -> None:
        assert one.meeting.advice == ""
        await until(lambda: said() == 1, "it says so")
        assert "--seed 192.168.1.5:7733" in one.meeting.advice
        await looked(one)
        assert said() == 1
        one.hear_of(member("z"))
        await until(lambda: one.meeting.advice == "", "it is alone no more")
        await looked(one)
        one.peers.handle_member(one.now(), member("z", Liveness.LEFT))
        await until(lambda: said() == 2, "it is alone again, and says so again")

    with caplog.at_level(logging.WARNING):
        story(Settings(mdns=False), tmp_path / "peers", told)


def test_the_advice_is_a_command_that_can_be_typed_on_the_other_machine() -> None:
    v4, v6 = Address("192.168.1.5", 7_733), Address("fd00::5", 7_733)
    assert advice_for_one_alone(Settings(), (v4,), 0) == (
        "no other peer is in sight. To add a machine, save what `meshq key` prints here into a file KEY there, "
        "and run there: meshq join --key-file KEY --seed 192.168.1.5:7733"
    )
    assert advice_for_one_alone(Settings(profile="wan"), (v6, v4), 0).endswith(
        "meshq join --key-file KEY --seed [fd00::5]:7733 --profile wan; this machine is also 192.168.1.5:7733"
    )


def test_the_advice_beside_another_mesh_is_how_to_move_over_to_it() -> None:
    here = (Address("192.168.1.5", 7_733),)
    text = advice_for_one_alone(Settings(seeds=("lab1:7733",)), here, 0, ("lab1:7733", "192.168.1.9:7733"))
    assert text == (
        "no other peer is in sight. A mesh is in sight at lab1:7733, 192.168.1.9:7733, but its key is another than this "
        "machine's. To move over, save what `meshq key` prints there into a file KEY here, and run here (what this machine has "
        "of its mesh is put aside): meshq leave; meshq join --new --key-file KEY --seed lab1:7733. To add a machine, save what "
        "`meshq key` prints here into a file KEY there, and run there: meshq join --key-file KEY --seed 192.168.1.5:7733"
    )
    renewed = "If it is this mesh with a new key: meshq key install --key-file KEY; meshq key use ID."
    assert renewed in advice_for_one_alone(Settings(), here, 2, ("192.168.1.9:7733",))
    assert "To add a machine" not in advice_for_one_alone(Settings(bind="127.0.0.1"), (), 0, ("127.0.0.1:9",))


def test_of_another_mesh_the_address_is_named_that_this_machine_can_reach() -> None:
    own = (Address("192.168.1.5", 7_733), Address("fd00:1::5", 7_733))
    docker, lan, v6 = Address("172.17.0.1", 9), Address("192.168.1.9", 9), Address("fd00:1::4e2f:91ff:fe03:17", 9)
    assert nearest((docker, v6, lan), own) == lan
    assert nearest((docker, v6), own) == v6
    assert nearest((docker, lan), ()) == docker, "nothing is known"


def test_a_seed_that_answers_with_another_key_and_what_mdns_sees_are_other_meshes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "told_addresses", lambda port, bind: (Address("192.168.1.5", port),))

    async def told(one: Alone) -> None:
        one.meeting._discovery = discovery = Discovery(
            tags=lambda: ("ours",), instance="me", port=1, addresses=tuple, found=one.asked.extend,
            is_live=lambda instance: False, members=lambda: 0,
        )  # fmt: skip
        assert not one.meeting.other_meshes
        discovery._handle_found("x", Announcement("theirs", (Address("172.17.0.1", 9), Address("192.168.1.9", 9))))
        assert list(one.meeting.other_meshes) == ["192.168.1.9:9"]
        one.strangers.append("127.0.0.2")
        assert list(one.meeting.other_meshes) == ["127.0.0.2:1", "192.168.1.9:9"]
        one.now = lambda: time.monotonic() + 60
        one.meeting._alone_since = time.monotonic()
        assert "127.0.0.2:1, 192.168.1.9:9, but its key is another" in one.meeting.advice

    story(Settings(mdns=False, seeds=("127.0.0.1:1", "127.0.0.2:1")), tmp_path / "peers", told, run=False)


def test_the_advice_says_what_was_tried() -> None:
    settings = Settings(mdns=False, seeds=("lab1:7733", "lab2:7733"))
    text = advice_for_one_alone(settings, (Address("192.168.1.5", 7_733),), 3)
    assert "(the seeds lab1:7733, lab2:7733 do not answer; none of the 3 peers known before is there; mDNS is off)" in text


def test_without_an_address_that_others_can_use_there_is_no_command() -> None:
    assert "this machine has no network" in advice_for_one_alone(Settings(), (), 0)
    assert advice_for_one_alone(Settings(bind="127.0.0.1"), (), 0) == "", "it was asked to stay by itself"
