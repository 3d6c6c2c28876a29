"""Asking other peers: real mutual TLS between real ports, with wrong peers, wrong meshes and answers that are too long."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meshq.errors import PeerError, Unreachable
from meshq.gossip.member import Address
from meshq.trust.certificates import Credentials
from meshq.trust.identity import Identity
from meshq.trust.keys import MeshKey
from meshq.web.gate import Gate, make_runner, peer_of_request
from meshq.web.peer_client import PeerClient

MESH, OTHER_MESH = MeshKey(b"m" * 16), MeshKey(b"o" * 16)
NOBODY = Address("127.0.0.1", 1)


def new_identity() -> Identity:
    return Identity(Ed25519PrivateKey.generate())


async def echo(request: web.Request) -> web.Response:
    return web.Response(body=peer_of_request(request)[:8].encode() + await request.read())


@asynccontextmanager
async def serving(
    identity: Identity, handler: Callable[[web.Request], Awaitable[web.StreamResponse]] = echo, key: MeshKey = MESH
) -> AsyncIterator[Address]:
    app = web.Application()
    app.router.add_route("*", "/echo", handler)
    runner = make_runner(app)
    await runner.setup()
    assert runner.server is not None
    gate = Gate(runner.server, Credentials(key, identity).server_context())
    listener = socket.create_server(("127.0.0.1", 0))
    address = Address("127.0.0.1", listener.getsockname()[1])
    gate.start(listener)
    try:
        yield address
    finally:
        await gate.close()
        await runner.cleanup()


@asynccontextmanager
async def client(identity: Identity, *candidates: Address, key: MeshKey = MESH) -> AsyncIterator[PeerClient]:
    credentials = Credentials(key, identity)
    made = PeerClient(credentials.client_context(), credentials.seed_context(), lambda peer: candidates)
    try:
        yield made
    finally:
        await made.close()


def test_each_side_knows_who_the_other_one_is() -> None:
    async def scenario() -> bytes:
        server, me = new_identity(), new_identity()
        async with serving(server) as address, client(me, address) as peers:
            answer = await peers.post(server.peer, "/echo", b" hello", answer_bytes_max=100)
            assert answer == me.peer[:8].encode() + b" hello"
            return answer

    asyncio.run(scenario())


def test_dead_and_foreign_addresses_are_passed_over_and_the_good_one_is_remembered() -> None:
    async def scenario() -> None:
        server, stranger, me = new_identity(), new_identity(), new_identity()
        asked: list[str] = []

        async def note(request: web.Request) -> web.Response:
            asked.append(request.path)
            return web.Response()

        async with serving(stranger, note) as wrong, serving(server) as right, client(me, NOBODY, wrong, right) as peers:
            for _ in range(2):
                await peers.post(server.peer, "/echo", b"", answer_bytes_max=100)
            assert peers._candidates(server.peer)[0] == right
        assert asked == [], "not a byte of a request went to the wrong peer"

    asyncio.run(scenario())


def test_nobody_and_another_mesh_are_unreachable_and_the_message_says_why() -> None:
    async def scenario() -> None:
        server = new_identity()
        async with serving(server, key=OTHER_MESH) as foreign, client(new_identity(), NOBODY, foreign) as peers:
            with pytest.raises(Unreachable, match="somebody else answers there, or another mesh"):
                await peers.post(server.peer, "/echo", b"", answer_bytes_max=100)
            with pytest.raises(Unreachable, match="does not answer"):
                await peers.post_seed(NOBODY, "/echo", b"", answer_bytes_max=100)

    asyncio.run(scenario())


def test_a_seed_of_the_mesh_is_asked_without_knowing_who_it_is() -> None:
    async def scenario() -> None:
        async with serving(new_identity()) as address, client(new_identity()) as peers:
            assert await peers.post_seed(address, "/echo", b"x", answer_bytes_max=100)

    asyncio.run(scenario())


def test_an_answer_that_is_too_long_or_refuses_is_the_peers_error() -> None:
    async def long(request: web.Request) -> web.Response:
        return web.Response(body=b"x" * 101)

    async def refuse(request: web.Request) -> web.Response:
        return web.Response(status=400, text="no")

    async def scenario() -> None:
        server = new_identity()
        async with serving(server, long) as address, client(new_identity(), address) as peers:
            with pytest.raises(PeerError, match="longer than 100"):
                await peers.post(server.peer, "/echo", b"", answer_bytes_max=100)
        async with serving(server, refuse) as address, client(new_identity(), address) as peers:
            with pytest.raises(PeerError, match="400 no"):
                await peers.post(server.peer, "/echo", b"", answer_bytes_max=100)

    asyncio.run(scenario())


def test_a_stream_gives_what_comes_when_it_comes_and_says_when_it_breaks_off() -> None:
    async def scenario() -> None:
        server = new_identity()
        go = asyncio.Event()

        async def drip(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse()
            await response.prepare(request)
            await response.write(b"one")
            await go.wait()
            assert request.transport is not None
            request.transport.abort()
            return response

        async with serving(server, drip) as address, client(new_identity(), address) as peers:
            with pytest.raises(Unreachable, match="stopped answering"):
                async with peers.stream(server.peer, "/echo") as chunks:
                    assert await anext(chunks) == b"one"
                    go.set()
                    await anext(chunks)

    asyncio.run(scenario())


def test_a_redirect_leads_nowhere() -> None:
    """A member could send our request, and the next with its body, wherever it likes."""

    async def scenario() -> None:
        server, me = new_identity(), new_identity()

        async def lead_away(request: web.Request) -> web.Response:
            raise web.HTTPTemporaryRedirect("http://127.0.0.1:1/elsewhere")

        async with serving(server, lead_away) as address, client(me, address) as peers:
            with pytest.raises(PeerError, match="307"):
                await peers.post(server.peer, "/echo", b"x", answer_bytes_max=100)
            with pytest.raises(PeerError, match="307"):
                await peers.post_seed(address, "/echo", b"x", answer_bytes_max=100)

    asyncio.run(scenario())


def test_a_member_that_speaks_no_http_breaks_the_rules_and_nothing_else() -> None:
    async def scenario() -> None:
        server, me = new_identity(), new_identity()

        async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"\x00\x01 what\r\n\r\n")
            await writer.drain()
            writer.close()

        context = Credentials(MESH, server).server_context()
        babbling = await asyncio.start_server(babble, "127.0.0.1", 0, ssl=context)
        address = Address("127.0.0.1", babbling.sockets[0].getsockname()[1])
        async with babbling, client(me, address) as peers:
            with pytest.raises(PeerError):
                await peers.post(server.peer, "/echo", b"x", answer_bytes_max=100)
            with pytest.raises(PeerError):
                await peers.post_seed(address, "/echo", b"x", answer_bytes_max=100)

    asyncio.run(scenario())


def test_a_client_that_was_closed_says_so_and_raises_nothing_else() -> None:
    async def scenario() -> None:
        server, me = new_identity(), new_identity()
        async with serving(server) as address, client(me, address) as peers:
            await peers.post(server.peer, "/echo", b"", answer_bytes_max=100)
            await peers.close()
            with pytest.raises(Unreachable):
                await peers.post(server.peer, "/echo", b"", answer_bytes_max=100)

    asyncio.run(scenario())
