"""The gate in front of aiohttp: what a stranger may cost, on the peer port and on the control socket.

Problem: the server of asyncio accepts whatever comes. A few hundred idle connections from one laptop take every file
descriptor of the agent; a client that never finishes its handshake or its headers is kept for a minute, or for ever.

So the gate accepts by itself, and hands a connection to aiohttp only within limits: connections for each source and in
total, handshakes in progress, seconds for the handshake, seconds until the first request's headers are there. What is over
a limit is closed at once and counted. A connection is counted before its loop task exists: accepting does not yield while
connections wait, so tasks that count themselves come too late (measured: 223 of 300 got through a limit of 32).

Later in a connection's life aiohttp's keep-alive closes idle ones (`make_runner`), `RequestLimiter` bounds what runs at
once, and handlers read bodies with `read_capped`.
"""

import asyncio
import errno
import ipaddress
import logging
import random
import socket
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from aiohttp import web

from meshq import config
from meshq.trust.certificates import peer_of
from meshq.trust.hardening import may_connect, peer_credentials

log = logging.getLogger("meshq.web")

SHUTDOWN_SECONDS: Final = 1.0  # for requests in progress when the agent stops
BODY_QUIET_SECONDS: Final = 30.0  # a body of which nothing comes for so long is given up
LINGER_SECONDS: Final = 2.0  # for a client to read why its body was refused
BACKOFF_SECONDS: Final = 0.25  # after the kernel refused an accept for want of descriptors or memory
COMPLAINT_SECONDS: Final = 60.0  # between two log lines about that
HEAD_END: Final = b"\r\n\r\n"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Source = Callable[[socket.socket], str | None]
"""Who connects, as the unit of `connections_per_source`; None: nobody who may. OSError: it is gone already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GateLimits:
    """The defaults are those of the peer port, `CONTROL_LIMITS` those of the control socket."""

    connections: int = config.CONNECTIONS_MAX
    connections_per_source: int = config.CONNECTIONS_PER_ADDRESS_MAX
    handshakes: int = config.HANDSHAKES_MAX
    handshake_seconds: float = config.HANDSHAKE_SECONDS
    first_request_seconds: float = config.FIRST_REQUEST_SECONDS


CONTROL_LIMITS: Final = GateLimits(
    connections_per_source=config.CONNECTIONS_MAX // 2
)  # a person may wait for 200 tasks at once


def address_source(connection: socket.socket) -> str | None:
    """The IP address; of IPv6 the /64, which is what one machine can choose from."""
    address = ipaddress.ip_address(str(connection.getpeername()[0]).partition("%")[0])
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return address.packed[:8].hex()


def user_source(own_uid: int, group: int | None) -> Source:
    """For the control socket: the user, if it may connect at all."""

    def source(connection: socket.socket) -> str | None:
        _, uid, _ = peer_credentials(connection)
        return f"uid {uid}" if may_connect(uid, own_uid, group) else None

    return source


class Gate:
    """Accepts connections for one aiohttp server, from any number of listening sockets.

    With a TLS `context` it is the gate of the peer port, without one that of the control socket; `limits` go by that.
    """

    def __init__(
        self, server: web.Server, context: ssl.SSLContext | None,
        source: Source = address_source, limits: GateLimits | None = None,
    ) -> None:  # fmt: skip
        self._server = server
        self._context = context
        self._source = source
        self._limits = limits or (CONTROL_LIMITS if context is None else GateLimits())
        self._by_source: Counter[str] = Counter()
        self._handshakes = 0
        self._accepting: list[asyncio.Task[None]] = []
        self._connections: set[asyncio.Task[None]] = set()
        self._watched: set[_Watched] = set()
        self._complained_at = float("-inf")
        self.counters: Counter[str] = Counter()
        self.accepted = 0  # connections, with their handshakes finished

    def start(self, listener: socket.socket) -> None:
        """Accept from this listening socket until `close`, which closes it."""
        listener.setblocking(False)
        loop_task = asyncio.create_task(self._accept(listener), name=f"accept {listener.getsockname()}")
        loop_task.add_done_callback(_report_bug)
        self._accepting.append(loop_task)

    async def close(self) -> None:
        """Stop accepting, let requests in progress end for a moment, close every connection."""
        for loop_task in self._accepting:
            loop_task.cancel()
        await asyncio.gather(*self._accepting, return_exceptions=True)
        self._server.pre_shutdown()
        await self._server.shutdown(SHUTDOWN_SECONDS)
        for loop_task in self._connections:
            loop_task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await asyncio.sleep(0)  # an aborted transport closes its socket in the next round of the loop

    def drop(self, admits: Callable[[ssl.SSLObject], bool]) -> int:
        """Close the connections whose TLS is of nobody who would be let in now; how many. Without TLS nothing changes."""
        unwanted = [each for each in self._watched if (tls := each.tls) is not None and not admits(tls)]
        for each in unwanted:
            each.abort()
        self.counters["key removed"] += len(unwanted)
        return len(unwanted)

    @property
    def connections(self) -> int:
        """How many are open now, handshakes included."""
        return len(self._connections)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with listener:
            while True:
                try:
                    connection, _ = await loop.sock_accept(listener)
                except OSError as error:
                    await self._back_off(error)
                    continue
                if (source := self._admit(connection)) is None:
                    connection.close()
                else:
                    loop_task = asyncio.create_task(self._serve(connection, source))
                    self._connections.add(loop_task)
                    loop_task.add_done_callback(self._connections.discard)
                    loop_task.add_done_callback(_report_bug)
                await asyncio.sleep(0)  # sock_accept does not yield while connections wait: let others run, too

    async def _back_off(self, error: OSError) -> None:
        """Without this a lack of descriptors is a busy loop that also fills the log (measured: 8 MB in 10 s)."""
        if error.errno == errno.ECONNABORTED:
            return  # that one is gone; the next may be well
        self.counters["accept failed"] += 1
        now = asyncio.get_running_loop().time()
        if now - self._complained_at >= COMPLAINT_SECONDS:
            self._complained_at = now
            log.warning("cannot accept connections: %s; %d are open", error.strerror, self.connections)
        await asyncio.sleep(BACKOFF_SECONDS)

    def _admit(self, connection: socket.socket) -> str | None:
        """The source to which the connection now counts; None if a limit refuses it."""
        try:
            source = self._source(connection)
        except OSError:
            return self._refuse("gone already")
        if source is None:
            return self._refuse("not allowed")
        if self.connections >= self._limits.connections:
            return self._refuse("too many connections")
        if self._by_source[source] >= self._limits.connections_per_source:
            return self._refuse("too many connections from one source")
        if self._context is not None and self._handshakes >= self._limits.handshakes:
            return self._refuse("too many handshakes")
        self._by_source[source] += 1
        self._handshakes += 1
        return source

    def _refuse(self, reason: str) -> str | None:
        self.counters[reason] += 1
        return None

    async def _serve(self, connection: socket.socket, source: str) -> None:
        """One connection from its handshake to its end."""
        watched = _Watched(self._server(), self._limits.first_request_seconds, self.counters)
        try:
            try:
                await self._handshake(connection, watched)
            finally:
                self._handshakes -= 1
            source = self._count_as_member(source, watched.tls)
            self._watched.add(watched)
            self.accepted += 1
            await watched.lost
        except OSError as error:  # includes ssl.SSLError and TimeoutError
            self.counters["handshake failed"] += 1
            log.debug("no handshake with %s: %s", source, error)
        finally:
            self._watched.discard(watched)
            watched.abort()
            self._forget_one(source)

    def _count_as_member(self, source: str, tls: ssl.SSLObject | None) -> str:
        """Who has proved to be a peer has a share of its own: ten agents may have one address, or share one IPv6 network."""
        if tls is None:
            return source
        peer = peer_of(tls)
        if self._by_source[peer] >= self._limits.connections_per_source:
            self._refuse("too many connections of one peer")
            raise ConnectionRefusedError("too many connections")
        self._by_source[peer] += 1
        self._forget_one(source)
        return peer

    def _forget_one(self, source: str) -> None:
        self._by_source[source] -= 1
        if not self._by_source[source]:
            del self._by_source[source]

    async def _handshake(self, connection: socket.socket, watched: "_Watched") -> None:
        loop = asyncio.get_running_loop()
        seconds = None if self._context is None else self._limits.handshake_seconds
        await loop.connect_accepted_socket(
            lambda: watched, connection,
            ssl=self._context, ssl_handshake_timeout=seconds, ssl_shutdown_timeout=seconds,
        )  # fmt: skip


def _report_bug(loop_task: asyncio.Task[None]) -> None:
    """Neither kind of loop task raises: if one did, that must not go unseen."""
    if not loop_task.cancelled() and (error := loop_task.exception()) is not None:
        log.critical("the gate failed in %s", loop_task.get_name(), exc_info=error)


class _Watched(asyncio.Protocol):
    """Stands between transport and aiohttp's handler to see two things: the first request's headers, and the end."""

    def __init__(self, handler: asyncio.Protocol, first_request_seconds: float, counters: Counter[str]) -> None:
        loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[None] = loop.create_future()
        self._handler = handler
        self._counters = counters
        self._transport: asyncio.Transport | None = None
        self._head: bytes | None = b""  # the last bytes of the first request's headers; None once they are complete
        self._seconds = first_request_seconds
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._deadline = asyncio.get_running_loop().call_later(self._seconds, self._too_slow)
        self._handler.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        if self._head is not None:
            head = self._head + data
            self._head = None if HEAD_END in head else head[-len(HEAD_END) + 1 :]
            if self._head is None and self._deadline is not None:
                self._deadline.cancel()
        self._handler.data_received(data)

    def eof_received(self) -> bool | None:
        return self._handler.eof_received()

    def pause_writing(self) -> None:
        self._handler.pause_writing()

    def resume_writing(self) -> None:
        self._handler.resume_writing()

    def connection_lost(self, error: Exception | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        if not self.lost.done():
            self.lost.set_result(None)
        self._handler.connection_lost(error)

    @property
    def tls(self) -> ssl.SSLObject | None:
        """Of the connection, once its handshake is over."""
        return None if self._transport is None else self._transport.get_extra_info("ssl_object")

    def abort(self) -> None:
        if self._transport is not None and not self.lost.done():
            with suppress(AttributeError):  # Python 3.11.2: a transport that was closed twice has let go of its TLS
                self._transport.abort()

    def _too_slow(self) -> None:
        self._counters["no request in time"] += 1
        self.abort()


def make_runner(app: web.Application) -> web.AppRunner:
    """The application with the settings that belong behind a gate. After `setup`, its `server` goes into a `Gate`."""
    return web.AppRunner(
        app, access_log=None, keepalive_timeout=config.KEEPALIVE_SECONDS, auto_decompress=False,
        lingering_time=LINGER_SECONDS, shutdown_timeout=SHUTDOWN_SECONDS,
    )  # fmt: skip


async def read_capped(request: web.Request, bytes_max: int) -> bytes:
    """The body as it was sent. 413 if it is longer, 415 if it is compressed, 408 if it stops coming."""
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise web.HTTPUnsupportedMediaType(text="compressed bodies are not accepted")  # a small one may be gigabytes
    if (length := request.content_length) is not None and length > bytes_max:
        raise web.HTTPRequestEntityTooLarge(bytes_max, length)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_QUIET_SECONDS) as quiet:
            while chunk := await request.content.readany():
                body += chunk
                if len(body) > bytes_max:
                    raise web.HTTPRequestEntityTooLarge(bytes_max, len(body))
                quiet.reschedule(asyncio.get_running_loop().time() + BODY_QUIET_SECONDS)
    except TimeoutError:
        raise web.HTTPRequestTimeout(text="the body stopped coming") from None
    return bytes(body)


def peer_of_request(request: web.Request) -> str:
    """The peer that asks: what its certificate proved in the handshake. PeerError if there was no TLS."""
    connection = None if request.transport is None else request.transport.get_extra_info("ssl_object")
    if connection is None:
        raise web.HTTPForbidden(text="not over TLS")
    return peer_of(connection)


class RequestLimiter:
    """How many requests run at once, for each `who` and in total; more get 503 and a time to come back. One for each server.

    Put `middleware` first in the application.
    """

    def __init__(
        self, who: Callable[[web.Request], str] = peer_of_request,
        total: int = config.REQUESTS_MAX, per_who: int = config.REQUESTS_PER_PEER_MAX,
    ) -> None:  # fmt: skip
        self._who = who
        self._total = total
        self._per_who = per_who
        self._running: Counter[str] = Counter()
        self.refused = 0

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        who = self._who(request)
        if self._running.total() >= self._total or self._running[who] >= self._per_who:
            self.refused += 1
            seconds = random.randint(1, 5)  # spread, so that those who were refused together don't return together
            return web.Response(status=503, headers={"Retry-After": str(seconds)}, text="too many requests at once")
        self._running[who] += 1
        try:
            return await handler(request)
        finally:
            self._running[who] -= 1
            if not self._running[who]:
                del self._running[who]
