"""Keys between two peers with real ports: the route of the exchange, and what becomes of connections when a key is removed."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from meshq.errors import PeerError, Unreachable
from meshq.gossip.member import Address, Liveness, Member
from meshq.ids import Epoch, PeerId
from meshq.peers import Peers
from meshq.task import Telemetry
from meshq.trust import keyring, ring_file
from meshq.trust.keyholder import KeyHolder
from meshq.trust.keyring import RING_BYTES_MAX, Keyring, ring_of
from meshq.web.gate import Gate, Handler, make_runner
from meshq.web.key_exchange import RING_PATH, KeyExchange
from meshq.web.peer_client import PeerClient
from tests.trust.test_certificates import member as identity_of
from tests.trust.test_keyholder import in_loop, install, remove, use
from tests.trust.test_keyring import K0, K1


class Peer:
    """Keys, a port and a client; it believes nothing."""

    def __init__(self, folder: Path, number: int, ring: Keyring) -> None:
        identity = identity_of(number)
        path = folder / f"{number}.key"
        ring_file.save(path, ring)
        self.id = identity.peer
        self.holder = KeyHolder(path, identity)
        self.where: dict[PeerId, Address] = {}
        self.client = PeerClient(
            lambda: self.holder.client_context, lambda: self.holder.seed_context, lambda peer: [self.where[peer]]
        )
        me = Member(
            peer=self.id, epoch=Epoch(1), incarnation=0, liveness=Liveness.ALIVE, name=f"peer-{number}", addresses=()
        )  # fmt: skip
        self.exchange = KeyExchange(holder=self.holder, peers=Peers(me, Telemetry(), 0.0), ask=self._ask)

    async def _ask(self, peer: PeerId, body: bytes) -> bytes:
        return await self.client.post(peer, RING_PATH, body, answer_bytes_max=RING_BYTES_MAX)

    async def slow(self, request: web.Request) -> web.StreamResponse:
        """Answers its head, and nothing more until the connection ends."""
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"x")
        await asyncio.sleep(60)
        return response

    @asynccontextmanager
    async def serving(self) -> AsyncIterator["Peer"]:
        app = web.Application(client_max_size=RING_BYTES_MAX)
        app.add_routes([web.post(RING_PATH, self.exchange.handle_request), web.get("/slow", self.slow)])
        app.middlewares.append(_answer_peer_errors)
        runner = make_runner(app)
        await runner.setup()
        assert runner.server is not None
        self.gate = Gate(runner.server, self.holder.server_context)
        listener = socket.create_server(("127.0.0.1", 0))
        self.address = Address("127.0.0.1", listener.getsockname()[1])
        self.gate.start(listener)
        try:
            yield self
        finally:
            await self.client.close()
            await self.gate.close()
            await runner.cleanup()


@web.middleware
async def _answer_peer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except PeerError as error:
        return web.Response(status=400, text=error.message)


@asynccontextmanager
async def two(folder: Path, first: Keyring, second: Keyring) -> AsyncIterator[tuple[Peer, Peer]]:
    async with Peer(folder, 1, first).serving() as ada, Peer(folder, 2, second).serving() as bob:
        ada.where[bob.id], bob.where[ada.id] = bob.address, ada.address
        yield ada, bob


@in_loop
async def test_a_peer_with_the_old_key_alone_fetches_the_new_one_if_it_is_meant_to_have_it(tmp_path: Path) -> None:
    """It names its key, is answered with that one, and proves nothing but who it is."""
    meant = keyring.install(ring_of(K0), identity_of(1).peer, K1, [identity_of(2).peer], (), K1)[0]
    async with two(tmp_path, keyring.use(meant, identity_of(1).peer, K1.id), ring_of(K0)) as (ada, bob):
        await bob.exchange.exchange(ada.id)
        assert bob.holder.ids == (K1.id, K0.id)
        assert bob.holder.digest != ring_of(K0).digest
        await ada.exchange.exchange(bob.id)
        assert ada.holder.digest == bob.holder.digest


@in_loop
async def test_a_peer_with_the_old_key_alone_gets_nothing_if_nobody_meant_it_to(tmp_path: Path) -> None:
    other = keyring.install(ring_of(K0), identity_of(1).peer, K1, [identity_of(3).peer], (), K1)[0]
    async with two(tmp_path, other, ring_of(K0)) as (ada, bob):
        answer = await bob.exchange.exchange(ada.id)
        assert ([each.id for each in answer.keys], answer.held) == ([K0.id], (K0.id, K1.id))
        await ada.exchange.exchange(bob.id)
        assert bob.holder.ids == (K0.id,)


@in_loop
async def test_a_newcomer_proves_the_later_key_by_its_certificate_and_is_told_all_about_that(tmp_path: Path) -> None:
    mesh = keyring.use(install(K1)(ring_of(K0)), identity_of(1).peer, K1.id)
    async with two(tmp_path, mesh, ring_of(K1)) as (ada, bob):
        await bob.exchange.exchange(ada.id)
        assert (bob.holder.ids, bob.holder.mesh_id) == ((K1.id,), K0.mesh_id)
        assert bob.holder.ring.keys[0] == ada.holder.ring.get(K1.id)


@in_loop
async def test_garbage_at_the_route_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    async with two(tmp_path, ring_of(K0), ring_of(K0)) as (ada, bob):
        for body in (b"", b"\xc1", b"x" * 1000):
            with pytest.raises(PeerError, match="400"):
                await bob.client.post(ada.id, RING_PATH, body, answer_bytes_max=1000)
        with pytest.raises((PeerError, Unreachable)):
            await bob.client.post(ada.id, RING_PATH, bytes(RING_BYTES_MAX + 1), answer_bytes_max=1000)
        assert ada.holder.ring == ring_of(K0)


@in_loop
async def test_when_a_key_is_removed_its_connections_end_on_both_sides_and_all_others_stay(tmp_path: Path) -> None:
    mesh = keyring.use(install(K1)(ring_of(K0)), identity_of(1).peer, K1.id)
    async with (
        two(tmp_path, mesh, ring_of(K0)) as (ada, eve),
        Peer(tmp_path, 3, ring_of(K1)).serving() as friend,
    ):
        friend.where[ada.id], ada.where[friend.id] = ada.address, friend.address
        async with (
            _held(eve, ada) as to_ada,
            _held(ada, eve) as to_eve,
            _held(friend, ada) as from_friend,
            _held(ada, friend) as own,
        ):
            assert ada.gate.drop(ada.holder.admits) + ada.client.drop(ada.holder.admits) == 0
            await ada.holder.change(remove(K0))
            assert (ada.gate.drop(ada.holder.admits), ada.client.drop(ada.holder.admits)) == (1, 1)
            assert ada.gate.counters["key removed"] == 1
            cut, _ = await asyncio.wait((to_ada, to_eve, from_friend, own), timeout=1.0)
            assert cut == {to_ada, to_eve}
            assert all(isinstance(each.exception(), aiohttp.ClientError | StopAsyncIteration) for each in cut)


@asynccontextmanager
async def _held(caller: Peer, called: Peer) -> AsyncIterator["asyncio.Future[bytes]"]:
    """A stream that is under way: its first byte has come, and the second is waited for."""
    async with caller.client.stream(called.id, "/slow") as chunks:
        assert await anext(chunks) == b"x"
        second = asyncio.ensure_future(anext(chunks))
        try:
            yield second
        finally:
            second.cancel()
            await asyncio.gather(second, return_exceptions=True)


@in_loop
async def test_a_change_of_keys_in_the_middle_of_a_request_does_not_lose_its_answer(tmp_path: Path) -> None:
    """The removal comes by a connection of the very key that it removes."""
    both = install(K1)(ring_of(K0))
    async with two(tmp_path, both, both) as (ada, bob):
        await ada.exchange.exchange(bob.id)
        for step in (use(K1), remove(K0)):
            await ada.holder.change(step)
            answer = await ada.exchange.exchange(bob.id)
            assert answer.held == bob.holder.ids
        assert bob.holder.ids == (K1.id,)
        await ada.client.renew()
        assert (await ada.exchange.exchange(bob.id)).held == (K1.id,)
