"""Asking other peers: real mutual TLS between real ports, with wrong peers, wrong meshes, dead addresses and bad answers."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial

import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meshq.config import CONNECTIONS_PER_ADDRESS_MAX, KEEPALIVE_SECONDS
from meshq.errors import PeerError, Unreachable
from meshq.gossip.member import Address
from meshq.ids import PeerId
from meshq.trust.certificates import Credentials
from meshq.trust.identity import Identity
from meshq.trust.keys import MeshKey
from meshq.web import dialing
from meshq.web.gate import Gate, make_runner, peer_of_request
from meshq.web.peer_client import IDLE_SECONDS, PeerClient, Share

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
async def client(
    identity: Identity, *candidates: Address, key: MeshKey = MESH, on_refused: Callable[[PeerId], None] = lambda peer: None,
    on_tcp: Callable[[PeerId, bool], None] = lambda peer, answered: None,
) -> AsyncIterator[PeerClient]:  # fmt: skip
    credentials = Credentials(key, identity)
    contexts = credentials.client_context(), credentials.seed_context()
    made = PeerClient(lambda: contexts[0], lambda: contexts[1], lambda peer: candidates, on_refused, on_tcp)
    try:
        yield made
    finally:
        await made.close()


@contextmanager
def black_hole() -> Iterator[Address]:
    """An address that swallows whatever is sent there: its queue of connections is full."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, ExitStack() as fillers:
        for _ in range(8):
            filler = fillers.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield Address("127.0.0.1", listener.getsockname()[1])


@contextmanager
def mute() -> Iterator[Address]:
    """An address where every connection is taken, and nothing is ever said: an agent that is stopped."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield Address("127.0.0.1", listener.getsockname()[1])


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
            assert peers.address(server.peer) == right
            assert peers.counters["connections"] == 1
        assert asked == [], "not a byte of a request went to the wrong peer"

    asyncio.run(scenario())


def test_a_peer_is_found_behind_addresses_that_swallow_everything_are_mute_or_somebody_elses() -> None:
    async def scenario() -> None:
        server, stranger, me = new_identity(), new_identity(), new_identity()
        with black_hole() as hole, mute() as stopped:
            async with (
                serving(stranger) as wrong,
                serving(server) as right,
                client(me, hole, stopped, wrong, NOBODY, right) as peers,
            ):
                assert await peers.post(server.peer, "/echo", b"", answer_bytes_max=100)
                assert peers.address(server.peer) == right

    asyncio.run(scenario())


def test_the_message_names_each_address_and_what_is_wrong_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialing, "race", partial(dialing.race, delay=0.05, seconds=0.5))

    async def scenario() -> None:
        server = new_identity()
        with black_hole() as hole, mute() as stopped:
            async with serving(new_identity()) as wrong, client(new_identity(), NOBODY, wrong, hole, stopped) as peers:
                with pytest.raises(Unreachable) as caught:
                    await peers.post(server.peer, "/echo", b"", answer_bytes_max=100)
        assert caught.value.message == (
            f"the peer {server.peer[:8]} does not answer at {NOBODY}: Connection refused; "
            f"{wrong}: somebody else answers there, or another mesh; {hole}: no answer in time; {stopped}: no answer in time"
        )

    asyncio.run(scenario())


def test_one_connection_serves_one_request_after_the_other() -> None:
    async def scenario() -> None:
        server, me = new_identity(), new_identity()
        async with serving(server) as address, client(me, address) as peers:
            for share in (None, None, Share.GOSSIP, Share.GOSSIP):
                await peers.post(server.peer, "/echo", b"x", answer_bytes_max=100, share=share)
            assert peers.counters["connections"] == 2, "one of each kind"

    asyncio.run(scenario())


def test_a_peer_that_moved_is_found_at_its_new_address() -> None:
    async def scenario() -> None:
        server, me = new_identity(), new_identity()
        places: list[Address] = []
        credentials = Credentials(MESH, me)
        context = credentials.client_context()
        peers = PeerClient(lambda: context, lambda: context, lambda peer: places)
        async with serving(server) as before:
            places = [before]
            await peers.post(server.peer, "/echo", b"", answer_bytes_max=100)
        async with serving(server) as after:
            places = [before, after]
            assert await peers.post(server.peer, "/echo", b"", answer_bytes_max=100)
            assert peers.address(server.peer) == after
            places = [before]
            assert await peers.post(server.peer, "/echo", b"", answer_bytes_max=100, extra=[after])
        await peers.close()

    asyncio.run(scenario())


def test_a_request_whose_connection_broke_is_sent_once_more() -> None:
    async def scenario() -> None:
        server, me = new_identity(), new_identity()
        bodies: list[bytes] = []

        async def break_off(request: web.Request) -> web.Response:
            bodies.append(await request.read())
            if len(bodies) in (1, 3, 4):
                assert request.transport is not None
                request.transport.abort()
            return web.Response(body=b"yes")

        async with serving(server, break_off) as address, client(me, address) as peers:
            assert await peers.post(server.peer, "/echo", b"1", answer_bytes_max=100) == b"yes"
            with pytest.raises(Unreachable):
                await peers.post(server.peer, "/echo", b"2", answer_bytes_max=100)
            assert bodies == [b"1", b"1", b"2", b"2"]
            assert peers.counters["requests_repeated"] == 2

    asyncio.run(scenario())


def test_an_address_that_takes_requests_and_never_answers_is_left_for_another_one() -> None:
    """Such as a tunnel through which small packets fit and large ones don't."""

    async def scenario() -> None:
        server, me = new_identity(), new_identity()

        async def hang(request: web.Request) -> web.Response:
            await asyncio.Event().wait()
            return web.Response()

        async with serving(server, hang) as narrow, serving(server) as wide, client(me, narrow, wide) as peers:
            with pytest.raises(Unreachable, match="no answer in time"):
                await peers.post(server.peer, "/echo", b"", answer_bytes_max=100, seconds=0.3)
            assert await peers.post(server.peer, "/echo", b"", answer_bytes_max=100)
            assert peers.address(server.peer) == wide

    asyncio.run(scenario())


def test_a_peer_whose_agent_was_killed_is_reported_at_once_and_again_when_it_refuses_but_not_in_between() -> None:
    async def scenario() -> None:
        server, me = new_identity(), new_identity()
        gone = asyncio.Event()
        refused: list[PeerId] = []

        def note(peer: PeerId) -> None:
            refused.append(peer)
            gone.set()

        with socket.create_server(("127.0.0.1", 0)) as nobody:
            bridge = Address("127.0.0.1", nobody.getsockname()[1])
        context = Credentials(MESH, me).client_context()
        async with serving(server) as address:
            peers = PeerClient(lambda: context, lambda: context, lambda peer: [bridge, address], note)
            await peers.post(server.peer, "/echo", b"", answer_bytes_max=100)
            assert refused == [], "that nobody listens at one of its addresses says nothing of the peer"
        async with asyncio.timeout(10):
            await gone.wait()  # nobody asked: an idle connection ended
        assert refused == [server.peer]
        with pytest.raises(Unreachable, match="refused"):
            await peers.post(server.peer, "/echo", b"", answer_bytes_max=100)
        assert len(refused) == 1, "once a second is enough"
        peers._experience._hinted.clear()
        with pytest.raises(Unreachable, match="refused"):
            await peers.post(server.peer, "/echo", b"", answer_bytes_max=100)
        assert refused == [server.peer] * 2
        await peers.close()

    asyncio.run(scenario())


def test_connections_that_this_side_ends_are_no_sign_of_anything() -> None:
    async def scenario() -> None:
        server, me = new_identity(), new_identity()
        refused: list[PeerId] = []
        async with serving(server) as address, client(me, address, on_refused=refused.append) as peers:
            await peers.post(server.peer, "/echo", b"", answer_bytes_max=100)
            await peers.renew()
            await peers.post(server.peer, "/echo", b"", answer_bytes_max=100)
            assert peers.counters["connections"] == 2
            await peers.close()
        await asyncio.sleep(0)
        assert refused == []

    asyncio.run(scenario())


def test_after_a_change_of_keys_new_connections_have_the_new_ones_and_requests_under_way_end_well() -> None:
    async def scenario() -> None:
        server, before, after = new_identity(), new_identity(), new_identity()
        contexts = {me.peer: Credentials(MESH, me).client_context() for me in (before, after)}
        context = contexts[before.peer]
        asked, go = asyncio.Event(), asyncio.Event()

        async def slow(request: web.Request) -> web.Response:
            if await request.read() == b"slow":
                asked.set()
                await go.wait()
            return await echo(request)

        async with serving(server, slow) as address:
            peers = PeerClient(lambda: context, lambda: context, lambda peer: [address])
            await peers.post(server.peer, "/echo", b"", answer_bytes_max=100)
            under_way = asyncio.ensure_future(peers.post(server.peer, "/echo", b"slow", answer_bytes_max=100))
            await asked.wait()
            context = contexts[after.peer]
            await peers.renew()
            assert await peers.post(server.peer, "/echo", b"", answer_bytes_max=100) == after.peer[:8].encode()
            go.set()
            assert await under_way == before.peer[:8].encode() + b"slow"
            await peers.close()

    asyncio.run(scenario())


def test_what_goes_on_over_connections_of_before_ends_with_the_client() -> None:
    async def scenario() -> None:
        server, me = new_identity(), new_identity()

        async def for_ever(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse()
            await response.prepare(request)
            await response.write(b"x")
            await asyncio.Event().wait()
            return response

        async with serving(server, for_ever) as address, client(me, address) as peers:
            with pytest.raises(Unreachable, match="stopping"):
                async with peers.stream(server.peer, "/echo", quiet=None) as chunks:
                    assert await anext(chunks) == b"x"
                    await peers.renew()
                    await peers.renew()
                    await peers.close()
                    await anext(chunks)

    asyncio.run(scenario())


def test_nothing_that_a_peer_says_is_said_to_another() -> None:
    """Peers are names of one domain now; a cookie for all of it would go from one to the other."""

    async def scenario() -> None:
        server, me = new_identity(), new_identity()
        seen: list[str | None] = []

        async def set_cookie(request: web.Request) -> web.Response:
            seen.append(request.headers.get("Cookie"))
            return web.Response(headers={"Set-Cookie": "a=b; Domain=meshq.internal; Path=/; Secure"})

        async with serving(server, set_cookie) as address, client(me, address) as peers:
            for _ in range(2):
                await peers.post(server.peer, "/echo", b"", answer_bytes_max=100)
        assert seen == [None, None]

    asyncio.run(scenario())


def test_an_idle_connection_is_closed_by_this_side_first() -> None:
    assert 2 * IDLE_SECONDS + 1 < KEEPALIVE_SECONDS


def test_all_kinds_together_stay_below_what_the_other_sides_gate_takes_from_one_address() -> None:
    assert sum(Share) < CONNECTIONS_PER_ADDRESS_MAX


class Told:
    """What a client says of TCP to others, in the order in which it says it."""

    def __init__(self) -> None:
        self.answers: list[bool] = []

    def __call__(self, peer: PeerId, answered: bool) -> None:
        self.answers.append(answered)


def test_each_answer_is_told_be_it_a_refusal_and_each_request_that_got_none() -> None:
    async def serve(request: web.Request) -> web.Response:
        body = await request.read()
        if body == b"hang up":
            assert request.transport is not None
            request.transport.abort()
        elif body == b"hang":
            await asyncio.Event().wait()
        return web.Response(status=503 if body == b"refuse" else 200)

    async def scenario() -> None:
        server, told = new_identity(), Told()
        async with serving(server, serve) as address, client(new_identity(), address, on_tcp=told) as peers:
            await peers.post(server.peer, "/echo", b"", answer_bytes_max=100)
            with pytest.raises(PeerError, match="503"):
                await peers.post(server.peer, "/echo", b"refuse", answer_bytes_max=100)
            async with peers.stream(server.peer, "/echo"):
                pass
            await peers.post_seed(address, "/echo", b"", answer_bytes_max=100)
            assert told.answers == [True] * 4 and peers.failure(server.peer) == ""
            closed = "it closed the connection (another mesh key, or it is stopping)"
            for body, seconds, why in ((b"hang up", 15.0, closed), (b"hang", 0.3, "no answer in time")):
                told.answers.clear()
                with pytest.raises(Unreachable):
                    await peers.post(server.peer, "/echo", body, answer_bytes_max=100, seconds=seconds)
                assert (told.answers, peers.failure(server.peer)) == ([False], why)
                await peers.post(server.peer, "/echo", b"", answer_bytes_max=100)
                assert (told.answers, peers.failure(server.peer)) == ([False, True], "")

    asyncio.run(scenario())


def test_a_peer_that_is_found_nowhere_is_told_and_nothing_of_a_seed_or_by_a_client_that_stops(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dialing, "race", partial(dialing.race, delay=0.05, seconds=0.5))

    async def scenario() -> None:
        peer, told = new_identity().peer, Told()
        with black_hole() as hole:
            async with client(new_identity(), NOBODY, hole, on_tcp=told) as peers:
                with pytest.raises(Unreachable):
                    await peers.post_seed(NOBODY, "/echo", b"", answer_bytes_max=100)
                assert told.answers == [], "nobody knows who it would have been"
                with pytest.raises(Unreachable):
                    await peers.post(peer, "/echo", b"", answer_bytes_max=100)
                assert (told.answers, peers.failure(peer)) == ([False], "Connection refused; no answer in time")
                await peers.close()
                with pytest.raises(Unreachable):
                    await peers.post(peer, "/echo", b"", answer_bytes_max=100)
                assert told.answers == [False]

    asyncio.run(scenario())


def test_a_request_that_fails_after_a_later_one_was_answered_says_nothing_of_tcp() -> None:
    async def scenario() -> None:
        server, told = new_identity(), Told()
        asked, go = asyncio.Event(), asyncio.Event()

        async def serve(request: web.Request) -> web.Response:
            if await request.read() == b"hang up":
                asked.set()
                await go.wait()
                assert request.transport is not None
                request.transport.abort()
            return web.Response()

        async with serving(server, serve) as address, client(new_identity(), address, on_tcp=told) as peers:
            first = asyncio.ensure_future(peers.post(server.peer, "/echo", b"hang up", answer_bytes_max=100))
            await asked.wait()
            await peers.post(server.peer, "/echo", b"", answer_bytes_max=100)
            go.set()
            with pytest.raises(Unreachable, match="stopped answering"):
                await first
            assert (told.answers, peers.failure(server.peer)) == ([True], "")

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
        servers, me = (new_identity(), new_identity()), new_identity()
        async with client(me) as peers:
            for server in servers:  # one after the other at the same address, as a lease may make it
                async with serving(server) as address:
                    for _ in range(2):
                        who, answer = await peers.post_seed(address, "/echo", b"x", answer_bytes_max=100)
                        assert who == server.peer and answer == me.peer[:8].encode() + b"x"

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
