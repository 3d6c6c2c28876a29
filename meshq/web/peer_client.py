"""Asking other peers: HTTPS with mutual TLS, the identity checked against the key and never against the address.

A peer advertises several candidate addresses, some of which lead nowhere, or to somebody else (every host's docker bridge
has the same address). A new connection goes to whichever of them proves first, in its handshake, to be the peer
(`dialing`); the address that did so is remembered and has a start of 250 ms the next time. Not a byte of a request goes to
anybody else. URLs and the pools of connections know peers by their names (`certificates.server_name`), not by their
addresses: a peer that moved is asked through the connection that there is, or a new one to where it is now. Answers are
read up to a limit, never decompressed.

A request whose connection broke before an answer came is sent once more, over a new connection: the other side may have been
restarted meanwhile, or have shown only now which of several keys it knows (`trust.contexts`). So any request may arrive twice,
and none may mind that.
"""

import asyncio
import errno
import socket
import ssl
import weakref
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final, TypeVar

import aiohttp
from aiohttp.client_proto import ResponseHandler

from meshq.config import MEMBERS_MAX
from meshq.errors import PeerError, Unreachable
from meshq.gossip.member import Address
from meshq.ids import PeerId
from meshq.trust.certificates import peer_of, server_name
from meshq.web import dialing

WAIT_SECONDS: Final = dialing.CONNECT_SECONDS + 1.0  # for a connection, be it a new one or one that others still use
REQUEST_SECONDS: Final = 15.0
SHUTDOWN_SECONDS: Final = 1.0  # for the other side's last word of TLS, in which nothing is said

# Of a connection that may be used again. aiohttp looks at them so seldom that one may become twice as old, which is still
# before the other side closes it (config.KEEPALIVE_SECONDS): when that side ends one, it means something (`_Connection`).
IDLE_SECONDS: Final = 36.0

# A machine that went away without a word takes what is sent to it for 15 minutes (Linux: 15 retransmissions). So a
# connection on which nothing is acknowledged for so long is given up, one that is idle is asked after 10 s whether it still
# is one.
DEAD_MS: Final = 10_000
KEEPALIVE_SECONDS: Final = 10
KEEPALIVE_PAUSE_SECONDS: Final = 5

STREAM_QUIET_SECONDS: Final = 60.0  # between two chunks of what lies on a disk; a followed log may be silent for hours
PEERS_KEPT_MAX: Final = 2 * MEMBERS_MAX  # whose last good address is remembered
HINT_SECONDS: Final = 1.0  # between two hints that a peer may be gone: each makes the core probe it

Chunks = AsyncIterator[bytes]


class Share(IntEnum):
    """Connections to one peer, each kind apart so that bulk and followers never hold up the ledger, and nothing gossip.
    Together they stay below the CONNECTIONS_PER_ADDRESS_MAX of the other side's gate."""

    GOSSIP = 3  # a packet that wants an answer at once, one that does not, a push/pull
    BULK = 6  # what is given more than REQUEST_SECONDS: sources, copies
    REQUESTS = 8
    STREAMS = 12


Kept = TypeVar("Kept")

_UNREACHABLE = (aiohttp.ClientConnectionError, asyncio.TimeoutError)
_NO_WAY = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH)  # it is not the peer that ended the connection

ONCE: Final = {"Connection": "close"}  # of a connection to a seed, so that it is known who is at the other end of each

COUNTERS: Final = ("connections", "connections_failed", "requests_repeated", "peers_refused")


@dataclass(slots=True)
class _Target:
    """Who is wanted (None: any member, to be told here who it was), where that one may be, and since when it is."""

    peer: PeerId | None
    candidates: tuple[Address, ...]
    began: float = 0.0
    answered: PeerId | None = None


_target: ContextVar[_Target] = ContextVar("_target")
"""Of the request under way, for `_Connector`: aiohttp hands it the URL, and nothing else of ours."""


@dataclass(frozen=True, slots=True)
class _Question:
    """A request, as often as it has to be sent."""

    method: str
    url: str
    body: bytes
    context: ssl.SSLContext
    limits: aiohttp.ClientTimeout
    headers: Mapping[str, str] = field(default_factory=dict)

    async def send(self, session: aiohttp.ClientSession, target: _Target) -> aiohttp.ClientResponse:
        """Unreachable if no candidate leads to the peer; an error of aiohttp if the connection breaks."""
        before = _target.set(target)
        try:
            return await session.request(
                self.method, self.url, data=self.body or None, headers=self.headers, ssl=self.context,
                timeout=self.limits, allow_redirects=False,
            )  # fmt: skip
        finally:
            _target.reset(before)


class PeerClient:
    """One for an agent. `addresses` gives a peer's candidates in the order of preference.

    `context` and `seed_context` are asked at each request: keys may change while the agent runs. `on_refused` hears, at
    most once a second of each peer, that it ended connections or refuses them: it may be gone. `on_tcp` hears of every request
    whether the peer answered it, be it with a refusal.
    """

    def __init__(
        self,
        context: Callable[[], ssl.SSLContext],
        seed_context: Callable[[], ssl.SSLContext],
        addresses: Callable[[PeerId], Sequence[Address]],
        on_refused: Callable[[PeerId], None] = lambda peer: None,
        on_tcp: Callable[[PeerId, bool], None] = lambda peer, answered: None,
    ) -> None:
        self._context = context
        self._seed_context = seed_context
        self._addresses = addresses
        self._experience = _Experience(on_refused, on_tcp)
        self._pools: dict[Share, _Pool] = {}
        self._retired: list[_Pool] = []  # of which some may still be in use
        self._closed = False

    @property
    def counters(self) -> Mapping[str, int]:
        """How often connecting did and did not work, and what followed from that."""
        return self._experience.counters

    def address(self, peer: PeerId) -> Address | None:
        """Where the peer's last connection was made to, if it is known to work."""
        return self._experience.good.get(peer)

    def failure(self, peer: PeerId) -> str:
        """Why the last request to the peer got no answer, in words; empty if it was answered, or there was none."""
        return self._experience.failures.get(peer, "")

    async def renew(self) -> None:
        """From now on new connections only, with the contexts of now: after a change of keys, or of this machine's addresses.

        Idle connections end now, those in use when their request is over.
        """
        pools, self._pools = list(self._pools.values()), {}
        self._retired = [pool for pool in (*self._retired, *pools) if not pool.session.closed]
        await asyncio.gather(*(pool.retire() for pool in pools))

    def drop(self, admits: Callable[[ssl.SSLObject], bool]) -> int:
        """Close the connections to those who would not be spoken to now, whatever is under way on them; how many."""
        unwanted = [each for each in self._experience.open if (tls := each.tls) is not None and not admits(tls)]
        for each in unwanted:
            each.cut()
        return len(unwanted)

    async def close(self) -> None:
        """End what is under way; all later requests are Unreachable."""
        self._closed = True
        self._experience.on_refused, self._experience.on_tcp = lambda peer: None, lambda peer, answered: None
        await asyncio.gather(*(pool.session.close() for pool in (*self._pools.values(), *self._retired)))

    async def post(
        self, peer: PeerId, path: str, body: bytes, *, answer_bytes_max: int,
        seconds: float = REQUEST_SECONDS, extra: Sequence[Address] = (), share: Share | None = None,
    ) -> bytes:  # fmt: skip
        """The answer's body. Unreachable if no address answers, PeerError if the peer refuses or breaks the rules.

        `extra` addresses are tried after those that are known.
        """
        limits = aiohttp.ClientTimeout(total=seconds, connect=WAIT_SECONDS)
        share = share or (Share.BULK if seconds > REQUEST_SECONDS else Share.REQUESTS)
        async with self._request("POST", peer, path, body, limits, share, extra) as response:
            return await _read_capped(response, answer_bytes_max)

    async def post_seed(self, address: Address, path: str, body: bytes, *, answer_bytes_max: int) -> tuple[PeerId, bytes]:
        """As `post`, to an address of which only the mesh is known, not the peer; and who it was that answered."""
        limits = aiohttp.ClientTimeout(total=REQUEST_SECONDS, connect=WAIT_SECONDS)
        target = _Target(None, (address,))
        question = _Question("POST", f"https://{address}{path}", body, self._seed_context(), limits, ONCE)
        try:
            async with self._using(Share.GOSSIP) as session, await self._ask(session, question, lambda: target) as response:
                assert target.answered is not None, "its connection was made for it alone"
                self._experience.answered(target.answered)
                await _check_status(response)
                answer = await _read_capped(response, answer_bytes_max)
        except (aiohttp.ClientPayloadError, *_UNREACHABLE) as error:
            raise Unreachable(f"{address} does not answer: {_why(error)}") from None
        except aiohttp.ClientError as error:
            raise PeerError(f"{address} answered {path} with something else than HTTP: {_why(error)}") from None
        return target.answered, answer

    @asynccontextmanager
    async def stream(self, peer: PeerId, path: str, *, quiet: float | None = STREAM_QUIET_SECONDS) -> AsyncIterator[Chunks]:
        """The body of a GET in chunks, as they come, however long that takes; Unreachable if none comes for `quiet` seconds."""
        limits = aiohttp.ClientTimeout(total=None, connect=WAIT_SECONDS, sock_read=quiet)
        async with self._request("GET", peer, path, b"", limits, Share.STREAMS) as response:
            yield response.content.iter_any()

    @asynccontextmanager
    async def _request(
        self, method: str, peer: PeerId, path: str, body: bytes, limits: aiohttp.ClientTimeout, share: Share,
        extra: Sequence[Address] = (),
    ) -> AsyncIterator[aiohttp.ClientResponse]:  # fmt: skip
        question = _Question(method, f"https://{server_name(peer)}{path}", body, self._context(), limits)
        known = (*self._addresses(peer), *extra)
        began = asyncio.get_running_loop().time()

        def target() -> _Target:
            return _Target(peer, self._experience.sort(peer, known), began)

        try:
            async with self._using(share) as session, await self._ask(session, question, target) as response:
                self._experience.answered(peer)
                await _check_status(response)
                yield response
        except (aiohttp.ClientPayloadError, *_UNREACHABLE) as error:
            self._experience.broke(peer, error)
            if not isinstance(error, aiohttp.ConnectionTimeoutError):  # it only waited until others are done
                self._experience.failed(peer, began, _why(error))
            raise Unreachable(f"the peer {peer[:8]} stopped answering {path}: {_why(error)}") from None
        except aiohttp.ClientError as error:
            raise PeerError(f"the peer {peer[:8]} answered {path} with something else than HTTP: {_why(error)}") from None
        except RuntimeError:
            if not self._closed:
                raise
            raise Unreachable("this peer is stopping") from None  # what aiohttp makes of a body that is cut off here

    async def _ask(
        self, session: aiohttp.ClientSession, question: _Question, target: Callable[[], _Target]
    ) -> aiohttp.ClientResponse:
        aim = target()
        try:
            return await question.send(session, aim)
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
            if session.closed:
                raise
            if aim.peer is not None:
                self._experience.broke(aim.peer, error)
                if getattr(error, "errno", None) in _NO_WAY:
                    self._experience.failed(aim.peer, aim.began, _why(error))
        self._experience.counters["requests_repeated"] += 1
        return await question.send(session, target())

    @asynccontextmanager
    async def _using(self, share: Share) -> AsyncIterator[aiohttp.ClientSession]:
        if self._closed:
            raise Unreachable("this peer is stopping")
        pool = self._pools.get(share)
        if pool is None:
            connector = _Connector(self._experience, share)
            session = aiohttp.ClientSession(connector=connector, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar())
            pool = self._pools[share] = _Pool(session)
        async with pool.in_use():
            yield pool.session


class _Experience:
    """What connections taught about the addresses of peers, and who may be gone."""

    def __init__(self, on_refused: Callable[[PeerId], None], on_tcp: Callable[[PeerId, bool], None]) -> None:
        self.on_refused = on_refused
        self.on_tcp = on_tcp
        self.counters: Counter[str] = Counter(dict.fromkeys(COUNTERS, 0))
        self.good: OrderedDict[PeerId, Address] = OrderedDict()  # where the last connection was made to
        self._bad: OrderedDict[PeerId, Address] = OrderedDict()  # where one led that was of no use
        self._hinted: OrderedDict[PeerId, float] = OrderedDict()
        self._answered: OrderedDict[PeerId, float] = OrderedDict()  # when a request was answered last
        self.failures: OrderedDict[PeerId, str] = OrderedDict()  # why the last one was not
        self.open: weakref.WeakSet[_Connection] = weakref.WeakSet()

    def sort(self, peer: PeerId, candidates: Sequence[Address]) -> tuple[Address, ...]:
        """The one that worked last comes first, the one that let a request down comes last."""
        good, bad = self.good.get(peer), self._bad.get(peer)
        return tuple(sorted(dict.fromkeys(candidates), key=lambda address: (address == bad) - (address == good)))

    def met(self, peer: PeerId, address: Address) -> None:
        """The peer was found there."""
        _keep(self.good, peer, address)
        if self._bad.get(peer) == address:
            del self._bad[peer]

    def missed(self, peer: PeerId, began: float, failure: dialing.NobodyAnswers) -> None:
        """It was found nowhere for a request that began then."""
        self.good.pop(peer, None)
        self.failed(peer, began, "; ".join(dict.fromkeys(why for _, why in failure.failures)) or "no address of it is known")
        if failure.refused:
            self.lost(peer)

    def answered(self, peer: PeerId) -> None:
        """TCP gets to the peer and back."""
        _keep(self._answered, peer, asyncio.get_running_loop().time())
        self.failures.pop(peer, None)
        self.on_tcp(peer, True)

    def failed(self, peer: PeerId, began: float, why: str) -> None:
        """What began then got no answer. If something else was answered meanwhile, TCP works nevertheless."""
        if self._answered.get(peer, float("-inf")) <= began:
            _keep(self.failures, peer, why)
            self.on_tcp(peer, False)

    def broke(self, peer: PeerId, error: BaseException) -> None:
        """A connection to the peer did not last until the answer, or none came: another address may be better."""
        ended = isinstance(error, aiohttp.ServerDisconnectedError | aiohttp.ClientOSError)
        if ended and getattr(error, "errno", None) not in _NO_WAY:
            self.lost(peer)
        elif (address := self.good.pop(peer, None)) is not None and not isinstance(error, aiohttp.ConnectionTimeoutError):
            _keep(self._bad, peer, address)

    def lost(self, peer: PeerId) -> None:
        """The peer ended a connection, or refuses them."""
        now = asyncio.get_running_loop().time()
        if now - self._hinted.get(peer, float("-inf")) < HINT_SECONDS:
            return
        _keep(self._hinted, peer, now)
        self.counters["peers_refused"] += 1
        self.on_refused(peer)


class _Pool:
    """The connections of one kind: an aiohttp session, and who uses it."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self.session = session
        self._users = 0
        self._retired = False

    @asynccontextmanager
    async def in_use(self) -> AsyncIterator[None]:
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            await self._close_if_useless()

    async def retire(self) -> None:
        """No more requests will come."""
        self._retired = True
        await self._close_if_useless()

    async def _close_if_useless(self) -> None:
        if self._retired and not self._users:
            await self.session.close()


class _Connector(aiohttp.BaseConnector):
    """aiohttp's pool of connections, with our way to make one."""

    def __init__(self, experience: _Experience, share: Share) -> None:
        super().__init__(limit=0, limit_per_host=share, keepalive_timeout=IDLE_SECONDS)
        self._experience = experience

    async def _create_connection(
        self,
        req: aiohttp.ClientRequest,
        traces: list[Any],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 aiohttp's signature
    ) -> ResponseHandler:
        """What aiohttp asks its connectors for (`UnixConnector` is the shortest example)."""
        target = _target.get()
        try:
            address, connection = await dialing.race(
                target.candidates, lambda each: self._dial(each, req), ResponseHandler.abort
            )
        except dialing.NobodyAnswers as failure:
            self._experience.counters["connections_failed"] += 1
            if target.peer is None:
                raise Unreachable(f"the seed does not answer at {failure}") from None
            self._experience.missed(target.peer, target.began, failure)
            raise Unreachable(f"the peer {target.peer[:8]} does not answer at {failure}") from None
        self._experience.counters["connections"] += 1
        self._experience.open.add(connection)
        target.answered = connection.peer
        if target.peer is not None:
            self._experience.met(target.peer, address)
            connection.watch(self._experience.lost)
        return connection

    async def _dial(self, address: Address, req: aiohttp.ClientRequest) -> "_Connection":
        loop = asyncio.get_running_loop()
        assert isinstance(req.ssl, ssl.SSLContext)
        transport, connection = await loop.create_connection(
            lambda: _Connection(loop), address.host, address.port,
            ssl=req.ssl, server_hostname=req.url.raw_host, ssl_shutdown_timeout=SHUTDOWN_SECONDS,
        )  # fmt: skip
        _notice_the_dead(transport.get_extra_info("socket"))
        connection.peer = peer_of(transport.get_extra_info("ssl_object"))
        return connection


class _Connection(ResponseHandler):
    """aiohttp's end of a connection, which also tells when the other side ended it, above all while nobody uses it."""

    peer: PeerId
    _lost: Callable[[PeerId], None] | None = None

    def watch(self, lost: Callable[[PeerId], None]) -> None:
        self._lost = lost

    @property
    def tls(self) -> ssl.SSLObject | None:
        return None if self.transport is None else self.transport.get_extra_info("ssl_object")

    def cut(self) -> None:
        """End it at once, and tell who waits for something on it: after aiohttp's own `abort` that one would wait for ever."""
        self._lost = None
        if self.transport is not None:
            self.transport.abort()

    def connection_lost(self, exc: BaseException | None) -> None:
        ended_here = self.transport is None  # `close` and `abort` let go of it first
        super().connection_lost(exc)
        if self._lost is not None and not ended_here:
            self._lost(self.peer)


def _notice_the_dead(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_PAUSE_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_MS)


def _keep(kept: OrderedDict[PeerId, Kept], peer: PeerId, value: Kept) -> None:
    """Remember it; whoever was remembered longest ago makes room."""
    kept[peer] = value
    kept.move_to_end(peer)
    if len(kept) > PEERS_KEPT_MAX:
        kept.popitem(last=False)


def _why(error: BaseException) -> str:
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "it closed the connection (another mesh key, or it is stopping)"
    return dialing.why(error)


async def _check_status(response: aiohttp.ClientResponse) -> None:
    if response.status != 200:
        text = (await _read_capped(response, 4_096)).decode("utf-8", "replace")
        raise PeerError(f"{response.method} {response.url.path}: {response.status} {text}")


async def _read_capped(response: aiohttp.ClientResponse, bytes_max: int) -> bytes:
    chunks: list[bytes] = []
    size = 0
    async for chunk in response.content.iter_any():
        size += len(chunk)
        if size > bytes_max:
            raise PeerError(f"the answer to {response.url.path} is longer than {bytes_max} bytes")
        chunks.append(chunk)
    return b"".join(chunks)
