"""Asking other peers: HTTPS with mutual TLS, the identity checked against the key and never against the address.

A peer advertises several candidate addresses, some of which lead nowhere, or to somebody else (every host's docker bridge
has the same address). They are tried in order, the one that worked last first; a wrong identity is found out in the
handshake, before a byte of the request is sent. Answers are read up to a limit, never decompressed.
"""

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final

import aiohttp

from meshq.errors import PeerError, Unreachable
from meshq.gossip.member import Address
from meshq.ids import PeerId
from meshq.trust.certificates import server_name

log = logging.getLogger("meshq.web")

CONNECT_SECONDS: Final = 2.0
REQUEST_SECONDS: Final = 15.0
IDLE_SECONDS: Final = 60.0  # of a connection that may be used again; the other side closes after 75

# Connections to one address, each kind apart so that bulk and followers never hold up the ledger. Together they stay below the
# CONNECTIONS_PER_ADDRESS_MAX of the other side's gate.
REQUESTS_PER_ADDRESS: Final = 8
BULK_PER_ADDRESS: Final = 6  # what is given more than REQUEST_SECONDS: sources, copies
STREAMS_PER_ADDRESS: Final = 12

STREAM_QUIET_SECONDS: Final = 60.0  # between two chunks of what lies on a disk; a followed log may be silent for hours

Chunks = AsyncIterator[bytes]

_UNREACHABLE = (aiohttp.ClientConnectionError, asyncio.TimeoutError, OSError, ssl.SSLError)


class PeerClient:
    """One for an agent. `addresses` gives a peer's candidates in the order of preference."""

    def __init__(
        self, context: ssl.SSLContext, seed_context: ssl.SSLContext, addresses: Callable[[PeerId], Sequence[Address]]
    ) -> None:
        self._context = context
        self._seed_context = seed_context
        self._addresses = addresses
        self._last_good: dict[PeerId, Address] = {}
        self._sessions: dict[int, aiohttp.ClientSession] = {}  # by how many connections they may have to one address

    async def close(self) -> None:
        for session in self._sessions.values():
            await session.close()

    async def post(
        self, peer: PeerId, path: str, body: bytes, *, answer_bytes_max: int,
        seconds: float = REQUEST_SECONDS, extra: Sequence[Address] = (),
    ) -> bytes:  # fmt: skip
        """The answer's body. Unreachable if no address answers, PeerError if the peer refuses or breaks the rules.

        `extra` addresses are tried after those that are known.
        """
        limits = aiohttp.ClientTimeout(total=seconds, connect=CONNECT_SECONDS)
        share = BULK_PER_ADDRESS if seconds > REQUEST_SECONDS else REQUESTS_PER_ADDRESS
        async with self._request("POST", peer, path, body, limits, share, extra) as response:
            return await _read_capped(response, answer_bytes_max)

    async def post_seed(self, address: Address, path: str, body: bytes, *, answer_bytes_max: int) -> bytes:
        """As `post`, to an address of which only the mesh is known, not the peer."""
        url = _url(address, path)
        timeout = aiohttp.ClientTimeout(total=REQUEST_SECONDS, connect=CONNECT_SECONDS)
        try:
            session = self._open_session(REQUESTS_PER_ADDRESS)
            async with session.post(url, data=body, ssl=self._seed_context, timeout=timeout, allow_redirects=False) as response:
                await _check_status(response)
                return await _read_capped(response, answer_bytes_max)
        except (aiohttp.ClientPayloadError, *_UNREACHABLE) as error:
            raise Unreachable(f"{address} does not answer: {_why(error)}") from None
        except aiohttp.ClientError as error:
            raise PeerError(f"{address} answered with something else than HTTP: {_why(error)}") from None

    @asynccontextmanager
    async def stream(self, peer: PeerId, path: str, *, quiet: float | None = STREAM_QUIET_SECONDS) -> AsyncIterator[Chunks]:
        """The body of a GET in chunks, as they come, however long that takes; Unreachable if none comes for `quiet` seconds."""
        limits = aiohttp.ClientTimeout(total=None, connect=CONNECT_SECONDS, sock_read=quiet)
        async with self._request("GET", peer, path, b"", limits, STREAMS_PER_ADDRESS) as response:
            yield response.content.iter_any()

    @asynccontextmanager
    async def _request(
        self, method: str, peer: PeerId, path: str, body: bytes, limits: aiohttp.ClientTimeout, share: int,
        extra: Sequence[Address] = (),
    ) -> AsyncIterator[aiohttp.ClientResponse]:  # fmt: skip
        try:
            async with await self._connect(method, peer, path, body, limits, share, extra) as response:
                await _check_status(response)
                yield response
        except (aiohttp.ClientPayloadError, *_UNREACHABLE) as error:
            raise Unreachable(f"the peer {peer[:8]} stopped answering {path}: {_why(error)}") from None
        except aiohttp.ClientError as error:
            raise PeerError(f"the peer {peer[:8]} answered {path} with something else than HTTP: {_why(error)}") from None

    async def _connect(
        self, method: str, peer: PeerId, path: str, body: bytes, limits: aiohttp.ClientTimeout, share: int,
        extra: Sequence[Address],
    ) -> aiohttp.ClientResponse:  # fmt: skip
        tried: list[str] = []
        for address in dict.fromkeys([*self._candidates(peer), *extra]):
            try:
                response = await self._open_session(share).request(
                    method, _url(address, path), data=body if body else None,
                    ssl=self._context, server_hostname=server_name(peer), timeout=limits, allow_redirects=False,
                )  # fmt: skip
            except _UNREACHABLE as error:
                tried.append(f"{address}: {_why(error)}")
                self._last_good.pop(peer, None)
                continue
            self._last_good[peer] = address
            return response
        raise Unreachable(f"the peer {peer[:8]} does not answer at {'; '.join(tried) or 'any address: none is known'}")

    def _candidates(self, peer: PeerId) -> list[Address]:
        candidates = list(self._addresses(peer))
        if (good := self._last_good.get(peer)) in candidates:
            candidates.remove(good)
            candidates.insert(0, good)
        return candidates

    def _open_session(self, share: int) -> aiohttp.ClientSession:
        session = self._sessions.get(share)
        if session is None:
            connector = aiohttp.TCPConnector(limit=0, limit_per_host=share, keepalive_timeout=IDLE_SECONDS)
            session = self._sessions[share] = aiohttp.ClientSession(connector=connector, auto_decompress=False)
        if session.closed:
            raise Unreachable("this peer is stopping")
        return session


def _url(address: Address, path: str) -> str:
    return f"https://{address}{path}"


def _why(error: BaseException) -> str:
    if isinstance(error, aiohttp.ClientConnectorCertificateError | ssl.SSLCertVerificationError):
        return "somebody else answers there, or another mesh"
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "it closed the connection (another mesh key, or it is stopping)"
    if isinstance(error, asyncio.TimeoutError):
        return "no answer in time"
    return str(error) or type(error).__name__


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
