"""The gate, with real sockets and real TLS: what hostile and broken clients may cost, and that others still get through."""

import asyncio
import contextlib
import functools
import gzip
import http.client
import os
import resource
import socket
from asyncio import sslproto
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from meshq import control
from meshq.config import Home
from meshq.trust import cookie
from meshq.trust.certificates import Credentials, server_name
from meshq.trust.identity import Identity
from meshq.trust.keys import MeshKey
from meshq.web import gate
from meshq.web.gate import Gate, GateLimits, RequestLimiter, Source, address_source, make_runner, peer_of_request, read_capped
from tests.trust.test_certificates import CLIENT, KEY, SERVER, THIRD, context_with, leaf_of

BODY_BYTES_MAX = 100_000
DEFAULTS = GateLimits()
LIMIT_SECONDS = 30.0  # of waiting for any condition, on the slowest machine


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test that is a coroutine, and let none of its loop tasks outlive it."""

    @functools.wraps(test)
    def run(*args: object, **kwargs: object) -> None:
        async def with_check() -> None:
            async with asyncio.timeout(2 * LIMIT_SECONDS):
                await test(*args, **kwargs)
            await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})

        asyncio.run(with_check())

    return run


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_SECONDS):
        while not condition():  # noqa: ASYNC110  what is waited for sets no event: it is seen from outside
            await asyncio.sleep(0.005)


class Served:
    """A gate on 127.0.0.1 before a small application, which handlers of tests may extend."""

    def __init__(self, port: int, the_gate: Gate) -> None:
        self.port = port
        self.gate = the_gate
        self.url = f"https://127.0.0.1:{port}"

    def session(self, local: str = "127.0.0.2", key: MeshKey = KEY, peer: Identity = CLIENT) -> aiohttp.ClientSession:
        """A legitimate client, by default from another address than hostile ones."""
        connector = aiohttp.TCPConnector(local_addr=(local, 0), ssl=Credentials(key, peer).client_context())
        return aiohttp.ClientSession(connector=connector)

    async def ask(self, session: aiohttp.ClientSession, method: str, path: str, **options: Any) -> tuple[int, str]:
        name = server_name(SERVER.peer)
        async with session.request(method, self.url + path, server_hostname=name, **options) as response:
            return response.status, await response.text()

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection of which the test decides every byte, TLS done."""
        context = Credentials(KEY, CLIENT).client_context()
        return await asyncio.open_connection("127.0.0.1", self.port, ssl=context, server_hostname=server_name(SERVER.peer))


async def whoami(request: web.Request) -> web.Response:
    return web.Response(text=peer_of_request(request))


async def body_length(request: web.Request) -> web.Response:
    return web.Response(text=str(len(await read_capped(request, BODY_BYTES_MAX))))


@contextlib.asynccontextmanager
async def served(
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]] = whoami,
    source: Source = address_source, limiter: RequestLimiter | None = None, limits: GateLimits = DEFAULTS,
) -> AsyncIterator[Served]:  # fmt: skip
    app = web.Application(middlewares=[limiter.middleware] if limiter else [])
    app.add_routes([web.get("/", handler), web.post("/", body_length)])
    runner = make_runner(app)
    await runner.setup()
    assert runner.server is not None
    the_gate = Gate(runner.server, Credentials(KEY, SERVER).server_context(), source, limits)
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    the_gate.start(listener)
    try:
        yield Served(listener.getsockname()[1], the_gate)
    finally:
        await the_gate.close()
        await runner.cleanup()


@in_loop
async def test_a_member_gets_through_and_the_handler_knows_which_it_is() -> None:
    async with served() as server, server.session() as session:
        assert [await server.ask(session, "GET", "/") for _ in range(3)] == [(200, CLIENT.peer)] * 3
        assert server.gate.connections == 1  # all three over one
        assert server.gate.counters == {}


@in_loop
async def test_three_hundred_hostile_connections_keep_nobody_else_out() -> None:
    async with served() as server:
        hostile = [socket.create_connection(("127.0.0.1", server.port), 10) for _ in range(300)]
        try:
            async with server.session() as session:
                assert await server.ask(session, "GET", "/") == (200, CLIENT.peer)
                await until(lambda: server.gate.counters["too many connections from one source"] == 300 - 32)
                assert server.gate.connections == 32 + 1
                assert await server.ask(session, "GET", "/") == (200, CLIENT.peer)
        finally:
            for connection in hostile:
                connection.close()
        await until(lambda: server.gate.connections == 0)


@in_loop
async def test_the_buffer_of_each_tls_connection_is_as_large_as_it_was_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent makes it smaller, by an attribute that Python does not document."""
    monkeypatch.setattr(sslproto.SSLProtocol, "max_size", 16 * 1024)
    async with served() as server:
        _, writer = await server.connect()
        protocol: Any = writer.transport
        assert len(protocol._ssl_protocol._ssl_buffer) == 16 * 1024
        writer.transport.abort()


@in_loop
async def test_members_behind_one_address_have_a_share_each_and_strangers_there_another() -> None:
    limits = GateLimits(connections_per_source=3)
    async with served(limits=limits) as server:
        held = [await server.connect() for _ in range(3)]
        stranger = socket.create_connection(("127.0.0.1", server.port), 10)
        with contextlib.suppress(OSError):  # the fourth of this member is closed as soon as it has proved who it is
            held.append(await server.connect())
        await until(lambda: server.gate.counters["too many connections of one peer"] == 1)
        async with server.session("127.0.0.1", peer=THIRD) as session:
            assert await server.ask(session, "GET", "/") == (200, THIRD.peer)
            assert server.gate.connections == 3 + 1 + 1
        stranger.close()
        for _, writer in held:
            writer.transport.abort()
        await until(lambda: server.gate.connections == 0)


@in_loop
async def test_connections_in_total_have_a_limit_and_places_are_given_back() -> None:
    sources = iter(f"source {number}" for number in range(1000))
    async with served(source=lambda _: next(sources), limits=GateLimits(connections=3)) as server:
        held = [socket.create_connection(("127.0.0.1", server.port), 10) for _ in range(5)]
        await until(lambda: server.gate.counters["too many connections"] == 2)
        assert server.gate.connections == 3
        for connection in held:
            connection.close()
        await until(lambda: server.gate.connections == 0)
        async with server.session() as session:
            assert await server.ask(session, "GET", "/") == (200, CLIENT.peer)


@in_loop
async def test_handshakes_at_once_have_a_limit_that_finished_ones_do_not_count_to() -> None:
    async with served(limits=GateLimits(handshakes=2)) as server, server.session() as session, server.session() as other:
        assert await server.ask(session, "GET", "/") == (200, CLIENT.peer)
        assert await server.ask(other, "GET", "/") == (200, CLIENT.peer)
        held = [socket.create_connection(("127.0.0.1", server.port), 10) for _ in range(5)]
        await until(lambda: server.gate.counters["too many handshakes"] == 3)
        assert await server.ask(session, "GET", "/") == (200, CLIENT.peer)
        for connection in held:
            connection.close()


@in_loop
async def test_a_client_that_never_finishes_its_handshake_is_closed() -> None:
    async with served(limits=GateLimits(handshake_seconds=0.1)) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        assert await reader.read() == b""
        writer.close()
        await until(lambda: server.gate.connections == 0)
        assert server.gate.counters == {"handshake failed": 1}


@pytest.mark.parametrize(
    "sent", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: x\r\nA: b\r\n"], ids=["nothing", "half a line", "no end"]
)
@in_loop
async def test_a_client_that_never_finishes_its_first_headers_is_closed(sent: bytes) -> None:
    async with served(limits=GateLimits(first_request_seconds=0.1)) as server:
        reader, writer = await server.connect()
        writer.write(sent)
        assert await closed(reader)
        writer.close()
        await until(lambda: server.gate.connections == 0)
        assert server.gate.counters == {"no request in time": 1}


async def closed(reader: asyncio.StreamReader) -> bool:
    try:
        return await reader.read() == b""
    except ConnectionResetError:
        return True


@in_loop
async def test_the_end_of_the_first_headers_is_found_however_they_are_cut() -> None:
    request = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    for cut in range(1, len(request)):
        ours, theirs = socket.socketpair()
        watched = gate._Watched(asyncio.Protocol(), LIMIT_SECONDS, Counter())
        transport, _ = await asyncio.get_running_loop().connect_accepted_socket(lambda: watched, ours)  # noqa: B023  called now
        assert watched._deadline is not None
        watched.data_received(request[:cut])
        assert not watched._deadline.cancelled()
        watched.data_received(request[cut:])
        assert watched._deadline.cancelled()
        transport.close()
        theirs.close()
        await watched.lost


@in_loop
async def test_a_request_in_time_may_take_longer_than_the_limit_for_its_headers() -> None:
    async def slow(_: web.Request) -> web.Response:
        done = asyncio.Event()
        asyncio.get_running_loop().call_later(0.3, done.set)
        await done.wait()
        return web.Response(text="done")

    async with served(slow, limits=GateLimits(first_request_seconds=0.1)) as server:
        reader, writer = await server.connect()
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert (await reader.read()).endswith(b"done")
        writer.close()


@in_loop
async def test_a_member_of_another_mesh_and_plain_http_get_no_answer() -> None:
    async with served() as server:
        async with server.session(key=MeshKey(bytes(16))) as session:
            with pytest.raises(aiohttp.ClientConnectorCertificateError):
                await server.ask(session, "GET", "/")
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"HTTP" not in await reader.read()
        writer.close()
        await until(lambda: server.gate.counters["handshake failed"] == 2)


@in_loop
async def test_a_member_that_signs_itself_another_name_gets_no_answer() -> None:
    thief = context_with(leaf_of(THIRD, server_name(CLIENT.peer)), THIRD, server=False)
    async with served() as server:
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", server.port, ssl=thief, server_hostname=server_name(SERVER.peer)
        )
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await closed(reader)
        writer.close()
        await until(lambda: server.gate.counters["handshake failed"] == 1)


@in_loop
async def test_without_free_descriptors_the_gate_waits_says_so_once_and_recovers(caplog: pytest.LogCaptureFixture) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with served() as server:
        waiting = [await asyncio.to_thread(socket.create_connection, ("127.0.0.1", server.port), 10)]
        await until(lambda: server.gate.connections == 1)
        waiting.append(socket.socket())
        waiting[1].setblocking(False)
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest_descriptor() + 1, hard))
        fillers = take_all_descriptors()
        try:
            await asyncio.get_running_loop().sock_connect(waiting[1], ("127.0.0.1", server.port))
            await until(lambda: server.gate.counters["accept failed"] >= 2)
        finally:
            for filler in fillers:
                os.close(filler)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        await until(lambda: server.gate.connections == 2)
        for connection in waiting:
            connection.close()
    assert [record.getMessage() for record in caplog.records if "cannot accept" in record.getMessage()] == [
        "cannot accept connections: Too many open files; 1 are open"
    ]


def highest_descriptor() -> int:
    return max(int(name) for name in os.listdir("/proc/self/fd"))


def take_all_descriptors() -> list[int]:
    taken = []
    with contextlib.suppress(OSError):
        while True:
            taken.append(os.open(os.devnull, os.O_RDONLY))
    return taken


@in_loop
async def test_closing_ends_what_runs_and_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "SHUTDOWN_SECONDS", 0.1)
    entered, ended = asyncio.Event(), asyncio.Event()

    async def endless(_: web.Request) -> web.Response:
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        return web.Response()

    async with served(endless) as server, server.session() as session:
        asking = asyncio.ensure_future(server.ask(session, "GET", "/"))
        await entered.wait()
        silent = socket.create_connection(("127.0.0.1", server.port), 10)  # a handshake that never ends
        await until(lambda: server.gate.connections == 2)
        await server.gate.close()
        assert ended.is_set() and server.gate.connections == 0
        with pytest.raises(aiohttp.ClientError):
            await asking
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", server.port), 10)
        silent.close()


# --- bodies ---------------------------------------------------------------------------------------------------------


async def chunks(count: int) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield b"x" * 10_000


@in_loop
async def test_a_body_is_read_up_to_its_limit() -> None:
    async with served() as server, server.session() as session:
        assert await server.ask(session, "POST", "/", data=b"x" * BODY_BYTES_MAX) == (200, str(BODY_BYTES_MAX))
        assert await server.ask(session, "POST", "/", data=chunks(10)) == (200, str(BODY_BYTES_MAX))
        assert await server.ask(session, "POST", "/") == (200, "0")


@in_loop
async def test_a_body_over_the_limit_is_refused_whether_or_not_it_says_its_length() -> None:
    async with served() as server, server.session() as session:
        assert (await server.ask(session, "POST", "/", data=b"x" * (BODY_BYTES_MAX + 1)))[0] == 413
        assert (await server.ask(session, "POST", "/", data=chunks(11)))[0] == 413


@in_loop
async def test_a_body_that_says_it_is_too_long_is_refused_before_it_comes() -> None:
    async with served() as server:
        reader, writer = await server.connect()
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (BODY_BYTES_MAX + 1))
        assert (await reader.readline()).startswith(b"HTTP/1.1 413 ")
        writer.close()


@in_loop
async def test_a_compressed_body_is_never_expanded() -> None:
    async with served() as server, server.session() as session:
        bomb = gzip.compress(bytes(10_000_000))
        assert len(bomb) < BODY_BYTES_MAX
        for encoding in ("gzip", "deflate", "br"):
            answer = await server.ask(session, "POST", "/", data=bomb, headers={"Content-Encoding": encoding})
            assert answer == (415, "compressed bodies are not accepted")
        assert await server.ask(session, "POST", "/", data=bomb) == (200, str(len(bomb)))


@in_loop
async def test_a_body_that_stops_coming_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "BODY_QUIET_SECONDS", 0.1)
    async with served() as server:
        reader, writer = await server.connect()
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n12345")
        assert (await reader.readline()).startswith(b"HTTP/1.1 408 ")
        writer.close()


# --- requests at once -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("total", "per_who"), [(2, 10), (10, 2)], ids=["in total", "per peer"])
@in_loop
async def test_requests_at_once_have_a_limit(total: int, per_who: int) -> None:
    release = asyncio.Event()
    running: list[int] = []

    async def waits(_: web.Request) -> web.Response:
        running.append(1)
        await release.wait()
        return web.Response(text="done")

    limiter = RequestLimiter(total=total, per_who=per_who)
    async with served(waits, limiter=limiter) as server, server.session() as session:
        asking = [asyncio.ensure_future(server.ask(session, "GET", "/")) for _ in range(2)]
        await until(lambda: len(running) == 2)
        async with session.get(server.url, server_hostname=server_name(SERVER.peer)) as refused:
            assert refused.status == 503
            assert 1 <= int(refused.headers["Retry-After"]) <= 5
        release.set()
        assert await asyncio.gather(*asking) == [(200, "done")] * 2
        assert await server.ask(session, "GET", "/") == (200, "done")
    assert limiter.refused == 1
    assert limiter._running == {}


@in_loop
async def test_one_peer_at_its_limit_leaves_room_for_another() -> None:
    release, entered = asyncio.Event(), asyncio.Event()

    async def waits(request: web.Request) -> web.Response:
        if request.query_string == "wait":
            entered.set()
            await release.wait()
        return web.Response(text="done")

    limiter = RequestLimiter(who=lambda request: request.headers["X-Who"], per_who=1)
    async with served(waits, limiter=limiter) as server, server.session() as session:
        asking = asyncio.ensure_future(server.ask(session, "GET", "/?wait", headers={"X-Who": "a"}))
        await entered.wait()
        assert (await server.ask(session, "GET", "/", headers={"X-Who": "a"}))[0] == 503
        assert (await server.ask(session, "GET", "/", headers={"X-Who": "b"}))[0] == 200
        release.set()
        await asking


# --- sources and the control socket ---------------------------------------------------------------------------------


def test_one_user_may_hold_many_connections_to_the_control_socket_but_not_all() -> None:
    limits = gate.CONTROL_LIMITS
    assert DEFAULTS.connections_per_source < limits.connections_per_source < limits.connections


def source_of(family: int, host: str) -> str | None:
    class Connection(socket.socket):
        def getpeername(self) -> Any:
            return (host, 1)

    with Connection(family) as connection:
        return address_source(connection)


def test_one_machine_is_one_source() -> None:
    assert source_of(socket.AF_INET, "192.0.2.1") == "192.0.2.1"
    assert source_of(socket.AF_INET, "192.0.2.1") != source_of(socket.AF_INET, "192.0.2.2")
    assert source_of(socket.AF_INET6, "::ffff:192.0.2.1") == "192.0.2.1"
    assert source_of(socket.AF_INET6, "2001:db8::1") == source_of(socket.AF_INET6, "2001:db8::ffff:2")
    assert source_of(socket.AF_INET6, "2001:db8::1") != source_of(socket.AF_INET6, "2001:db8:0:1::1")
    assert source_of(socket.AF_INET6, "fe80::1%eth0") is not None


@in_loop
async def test_a_client_that_is_gone_before_it_can_be_named_harms_nothing() -> None:
    gone = iter([True, False])

    def source(connection: socket.socket) -> str | None:
        if next(gone):
            raise OSError("not connected")
        return address_source(connection)

    async with served(source=source) as server:
        socket.create_connection(("127.0.0.1", server.port), 10).close()
        await until(lambda: server.gate.counters["gone already"] == 1)
        async with server.session() as session:
            assert await server.ask(session, "GET", "/") == (200, CLIENT.peer)


@pytest.mark.parametrize("allowed", [True, False])
@in_loop
async def test_the_same_gate_serves_the_control_socket_without_tls(tmp_path: Path, allowed: bool) -> None:
    home = Home(tmp_path / "home")
    cookie.prepare_home(home)
    app = web.Application()
    app.add_routes([web.get("/", whoami), web.post("/", body_length)])
    runner = make_runner(app)
    await runner.setup()
    assert runner.server is not None
    source = gate.user_source(os.geteuid(), None) if allowed else lambda _: None
    the_gate = Gate(runner.server, None, source)
    the_gate.start(control.listen(home))
    try:
        if allowed:
            assert await asyncio.to_thread(ask_by_stdlib, home, "POST") == (200, b"5")
            assert await asyncio.to_thread(ask_by_stdlib, home, "GET") == (403, b"not over TLS")  # there is no peer to name
            assert the_gate.counters == {}
        else:
            with pytest.raises((ConnectionError, http.client.HTTPException)):
                await asyncio.to_thread(ask_by_stdlib, home, "POST")
            assert the_gate.counters == {"not allowed": 1}
    finally:
        await the_gate.close()
        await runner.cleanup()


def ask_by_stdlib(home: Home, method: str) -> tuple[int, bytes]:
    """As the command line does it."""
    connection = http.client.HTTPConnection("meshq")
    connection.sock = control.connect(home, LIMIT_SECONDS)
    try:
        connection.request(method, "/", b"12345" if method == "POST" else None)
        response = connection.getresponse()
        return response.status, response.read(100)
    finally:
        connection.close()
