"""The routes of the peer port, and gossip's over real mutual TLS."""

import asyncio
import itertools
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any, cast

import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meshq import codec, config
from meshq.errors import MeshqError, PeerError, Unreachable
from meshq.gossip import streams
from meshq.gossip.effects import Effect, Sync
from meshq.gossip.member import Address, Liveness, Member
from meshq.gossip.profile import PROFILES
from meshq.gossip.swim import Swim
from meshq.gossip.transport import GossipShell, open_socket
from meshq.gossip.wire import PACKET_PLAIN_BYTES_MAX, Ack, GossipOnly, Message, Packet, Ping, read_packet
from meshq.ids import Epoch, PeerId
from meshq.trust.certificates import Credentials
from meshq.trust.identity import Identity
from meshq.trust.keys import MeshKey
from meshq.web.gate import Gate, RequestLimiter, make_runner
from meshq.web.peer_api import PeerApi
from meshq.web.peer_client import PeerClient, Share

MESH = MeshKey(b"m" * 16)
NOTHING: Any = cast(Any, None)


class NoKeys:
    """Stands for the exchange of keys, which has tests of its own."""

    async def handle_request(self, request: web.Request) -> web.Response:
        raise web.HTTPNotFound


NO_KEYS: Any = NoKeys()
LIMIT = 20.0


@dataclass
class Peer:
    """An agent, as far as gossip over TCP goes. Its UDP packets go nowhere: its socket is bound and nobody reads it."""

    gossip: GossipShell
    client: PeerClient
    api: PeerApi
    gate: Gate
    heard: list[Effect] = field(default_factory=list)

    @property
    def id(self) -> PeerId:
        return self.gossip.core.me.peer

    def packet(self, message: Message | None = None) -> bytes:
        return codec.encode(Packet(self.id, self.gossip.core.me.epoch, message or GossipOnly()))

    async def stream(self, peer: PeerId, packet: bytes) -> tuple[bytes, ...]:
        """As the agent does it."""
        answer = await self.client.post(
            peer, streams.PATH, packet, answer_bytes_max=streams.ANSWER_BYTES_MAX,
            seconds=streams.STREAM_SECONDS, share=Share.GOSSIP,
        )  # fmt: skip
        return streams.read_answer(answer)

    async def sync(self, sync: Sync) -> tuple[PeerId, bytes]:
        """As the agent does it."""
        path, limit = "/gossip/sync", config.SYNC_BYTES_MAX
        if sync.peer is None:
            return await self.client.post_seed(sync.address, path, sync.request, answer_bytes_max=limit)
        answer = await self.client.post(
            sync.peer, path, sync.request, answer_bytes_max=limit, extra=(sync.address,), share=Share.GOSSIP
        )
        return sync.peer, answer


@asynccontextmanager
async def agent(name: str) -> AsyncIterator[Peer]:
    identity = Identity(Ed25519PrivateKey.generate())
    credentials = Credentials(MESH, identity)
    context, seed_context = credentials.client_context(), credentials.seed_context()
    listener, udp = socket.create_server(("127.0.0.1", 0)), open_socket("127.0.0.1", 0)
    address = Address("127.0.0.1", listener.getsockname()[1])
    clock = asyncio.get_running_loop().time
    me = Member(
        peer=identity.peer, epoch=Epoch(1), incarnation=0, liveness=Liveness.ALIVE, name=name, addresses=(address,), boot=1
    )
    core = Swim(me, PROFILES["fast"], Random(name), clock())
    client = PeerClient(
        lambda: context, lambda: seed_context, core.addresses, lambda peer: made.gossip.refused(peer),
        lambda peer, answered: made.gossip.asked_by_tcp(peer, answered),
    )  # fmt: skip
    gossip = GossipShell(
        core, udp, seal=lambda plain: plain, open=lambda sealed: None, clock=clock,
        sync=lambda sync: made.sync(sync), stream=lambda peer, packet: made.stream(peer, packet),
        on_effect=lambda effect: made.heard.append(effect),
    )  # fmt: skip
    api = PeerApi(gossip=gossip, ledger=NOTHING, objects=NOTHING, files=NOTHING, transfers=NOTHING, keys=NO_KEYS)
    runner = make_runner(api.application(RequestLimiter()))
    await runner.setup()
    assert runner.server is not None
    gate = Gate(runner.server, credentials.server_context())
    made = Peer(gossip, client, api, gate)
    gate.start(listener)
    gossip.start()
    try:
        yield made
    finally:
        await gate.close()
        await runner.cleanup()
        await gossip.stop()
        await client.close()


def with_agents(story: Callable[..., Coroutine[Any, Any, None]], *names: str) -> None:
    async def run() -> None:
        async with AsyncExitStack() as agents:
            await story(*[await agents.enter_async_context(agent(name)) for name in names])

    asyncio.run(run())


async def until(predicate: Callable[[], bool], what: str) -> None:
    """Wait for a condition, with a limit."""
    deadline = time.monotonic() + LIMIT
    while not predicate():
        assert time.monotonic() < deadline, f"never: {what}"
        await asyncio.sleep(0.01)


def test_a_ping_over_tcp_is_answered_in_the_same_request() -> None:
    async def story(a: Peer, b: Peer) -> None:
        a.gossip.join(b.gossip.core.me.addresses)
        await until(lambda: b.gossip.core.member(a.id) is not None and a.gossip.core.member(b.id) is not None, "they meet")
        answers = await a.stream(b.id, a.packet(Ping(7, b.id)))
        assert [read_packet(packet).message for packet in answers] == [Ack(7)]
        assert await a.stream(b.id, a.packet()) == ()

    with_agents(story, "a", "b")


def test_two_peers_whom_udp_does_not_connect_stay_alive_for_each_other_over_tcp() -> None:
    async def story(a: Peer, b: Peer) -> None:
        a.gossip.join(b.gossip.core.me.addresses)
        await until(lambda: all(each.gossip.stats()["streams"] > 8 for each in (a, b)), "probes over TCP")
        for here, there in ((a, b), (b, a)):
            seen = here.gossip.core.member(there.id)
            assert seen is not None and seen.liveness is Liveness.ALIVE
            connectivity = here.gossip.core.connectivity(asyncio.get_running_loop().time(), there.id)
            assert connectivity is not None and connectivity.tcp and not connectivity.udp
            assert here.client.counters["connections"] <= 4, "connections are kept and used again"

    with_agents(story, "a", "b")


def test_whatever_is_asked_of_a_peer_shows_whether_tcp_gets_there() -> None:
    async def story(a: Peer, b: Peer) -> None:
        a.gossip.join(b.gossip.core.me.addresses)
        await until(lambda: a.gossip.core.member(b.id) is not None, "they meet")

        def tcp() -> bool | None:
            link = a.gossip.core.connectivity(asyncio.get_running_loop().time(), b.id)
            assert link is not None
            return link.tcp

        a.gossip.asked_by_tcp(b.id, False)
        with pytest.raises(PeerError, match="404"):
            await a.client.post(b.id, "/ledger/invented", b"", answer_bytes_max=100)
        assert tcp(), "who refuses a request has got it"
        await b.gate.close()
        with pytest.raises(Unreachable):
            await a.client.post(b.id, "/ledger/push", b"", answer_bytes_max=100)
        assert tcp() is False

    with_agents(story, "a", "b")


def test_a_packet_that_is_none_or_too_long_or_in_anothers_name_is_refused_and_counted() -> None:
    async def story(a: Peer, b: Peer, c: Peer) -> None:
        a.gossip.join(b.gossip.core.me.addresses)
        await until(lambda: a.gossip.core.member(b.id) is not None, "they meet")
        before = b.gossip.core.members()
        for rubbish in (b"", b"rubbish", c.packet()):
            with pytest.raises(PeerError, match="400"):
                await a.stream(b.id, rubbish)
        with pytest.raises(PeerError, match="413"):
            await a.stream(b.id, bytes(PACKET_PLAIN_BYTES_MAX + 1))
        assert b.gossip.core.members() == before
        assert sum(b.api.counters.values()) == 4
        assert b.api.counters["refused gossip: 413 Request Entity Too Large"] == 1

    with_agents(story, "a", "b", "c")


def test_a_member_that_floods_over_tcp_is_refused_while_others_are_served() -> None:
    async def story(a: Peer, b: Peer, c: Peer) -> None:
        for each in (a, c):
            each.gossip.join(b.gossip.core.me.addresses)
            await until(lambda each=each: each.gossip.core.member(b.id) is not None, "they meet")  # type: ignore[misc]  # bound now
        request = codec.encode(())
        for path, most in ((streams.PATH, 1_000), ("/gossip/sync", 10)):
            refused = 0
            for _ in itertools.takewhile(lambda _: refused == 0, range(20 * most)):  # noqa: B023 read as it grows; a slow machine refills
                try:
                    await a.client.post(b.id, path, request, answer_bytes_max=2**20)
                except PeerError as error:
                    refused += "slow down" in error.message
            assert refused, path
        assert b.gossip.stats()["flooded"] == 2
        assert await c.stream(b.id, c.packet(Ping(1, b.id)))

    with_agents(story, "a", "b", "c")


def test_paths_that_somebody_invents_do_not_become_counters() -> None:
    async def story(a: Peer, b: Peer) -> None:
        a.gossip.join(b.gossip.core.me.addresses)
        await until(lambda: a.gossip.core.member(b.id) is not None, "they meet")
        for number in range(20):
            with pytest.raises(PeerError, match="404"):
                await a.client.post(b.id, f"/invented{number}/x", b"", answer_bytes_max=100)
        assert b.api.counters == {"refused nothing that there is: 404 Not Found": 20}

    with_agents(story, "a", "b")


def test_a_peer_that_is_stopped_is_suspected_at_once_by_who_had_a_connection_to_it() -> None:
    async def story(a: Peer) -> None:
        async with agent("b") as b:
            a.gossip.join(b.gossip.core.me.addresses)
            await until(lambda: a.gossip.core.member(b.id) is not None, "they meet")
            await a.stream(b.id, a.packet())
        await until(lambda: a.client.counters["peers_refused"] > 0, "the end of the connection is noticed")
        assert a.gossip.stats()["core_hints"] > 0
        with pytest.raises(Unreachable):
            await a.stream(b.id, a.packet())

    with_agents(story, "a")


def test_an_answer_that_is_none_or_too_large_is_no_answer() -> None:
    longest = streams.write_answer([bytes(PACKET_PLAIN_BYTES_MAX)] * streams.ANSWERS_MAX)
    assert len(longest) <= streams.ANSWER_BYTES_MAX
    assert streams.read_answer(longest) == (bytes(PACKET_PLAIN_BYTES_MAX),) * streams.ANSWERS_MAX
    for bad in (b"", b"\x91\x91\xc4\x00" + bytes(2**14), codec.encode(((b"",) * 9,)), codec.encode(((bytes(1_153),),))):
        with pytest.raises(MeshqError):
            streams.read_answer(bad)


def test_an_output_may_have_any_name_that_a_file_can_have() -> None:
    """Only the routes are asked."""
    api = PeerApi(gossip=NOTHING, ledger=NOTHING, objects=NOTHING, files=NOTHING, transfers=NOTHING, keys=NO_KEYS)
    resources = api.application(RequestLimiter()).router.resources()
    patterns = [resource.get_info().get("pattern") for resource in resources]
    for name in ("plain", "in/a folder", "two\nlines"):
        assert any(pattern is not None and pattern.fullmatch(f"/attempts/1.x/outputs/{name}") for pattern in patterns), name
