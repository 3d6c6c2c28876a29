"""What the kernel says of this machine's networks: which interfaces and addresses there are, and that one came or went.

The mesh must know what an interface is (the cable to the others, a tunnel, a bridge for containers), whether an IPv6 address
may be used yet, and that an address changed, at once: a laptop that roams or a renewed lease must not look like a death. The
C library's list of addresses has none of the three, and asking it again and again is late. The routing socket tells all of it,
to every user. A question costs it a tenth of a millisecond, as psutil's does, and waiting costs nothing.

Reading: rtnetlink(7), netlink(7); the numbers are the kernel's (linux/rtnetlink.h, linux/if_link.h, linux/if_addr.h).
"""

import asyncio
import logging
import socket
import struct
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

log = logging.getLogger("meshq.gossip")

ANSWER_SECONDS: Final = 2.0  # the kernel answers at once; this only keeps a bug from holding up a thread for ever
MESSAGES_BYTES_MAX: Final = 64 * 1024  # the kernel fills at most 32 KiB at a time
SETTLE_SECONDS: Final = 0.3  # one event is followed by others: link up, address, a second address
POLL_SECONDS: Final = 5.0  # where the kernel tells nothing by itself (some sandboxes)

_ERROR, _DONE = 2, 3
_NEW_LINK, _GET_LINK, _NEW_ADDRESS, _OLD_ADDRESS, _GET_ADDRESS = 16, 18, 20, 21, 22
_REQUEST_DUMP = 0x301
_EXTENSIONS, _SKIP_STATISTICS = 29, 8
_NAME, _MASTER, _LINK_INFO, _INFO_KIND = 3, 10, 18, 1
_ADDRESS, _LOCAL, _FLAGS = 1, 2, 8
_UP, _LOOPBACK, _POINT_TO_POINT, _MULTICAST, _LOWER_UP = 0x1, 0x8, 0x10, 0x1000, 0x10000
_TEMPORARY, _DUPLICATE, _DEPRECATED, _TENTATIVE = 0x01, 0x08, 0x20, 0x40
_GROUPS = 0x1 | 0x10 | 0x100  # links, IPv4 addresses, IPv6 addresses


@dataclass(frozen=True, slots=True)
class LinkAddress:
    """One address of an interface. `usable`: it may be bound and sent from; `temporary`: a privacy address of IPv6."""

    host: str
    usable: bool = True
    temporary: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One interface as the kernel describes it. `kind` is empty for hardware; `carrier`: something is at the other end."""

    index: int
    name: str
    kind: str = ""
    master: int = 0  # the bridge or bond that it is plugged into
    up: bool = True
    carrier: bool = True
    loopback: bool = False
    point_to_point: bool = False
    multicast: bool = True
    addresses: tuple[LinkAddress, ...] = ()


def links() -> list[Link]:
    """All interfaces of this machine, in the order of their numbers. OSError if the kernel does not answer."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as kernel:
        kernel.settimeout(ANSWER_SECONDS)
        found = [_read_link(body) for kind, body in _dump(kernel, _GET_LINK) if kind == _NEW_LINK]
        addresses: defaultdict[int, list[LinkAddress]] = defaultdict(list)
        for kind, body in _dump(kernel, _GET_ADDRESS):
            if kind == _NEW_ADDRESS:
                index, address = _read_address(body)
                addresses[index].append(address)
    found.sort(key=lambda link: link.index)
    return [replace(link, addresses=tuple(addresses[link.index])) for link in found]


class Changes:
    """Wakes whoever waits when an interface or an address came, went or changed."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        try:
            self._socket = _subscribe()
        except OSError as error:
            log.info("the kernel does not tell of changed addresses (%s): they are looked at every %g s", error, POLL_SECONDS)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()

    async def wait(self, seconds: float) -> frozenset[str] | None:
        """Wait until something changed, and until it has settled: the addresses that went meanwhile. None if nothing changed
        for so many seconds, or for fewer where the kernel does not tell.

        An address that went and came back is among them: whoever had joined a multicast group by it has lost that.
        """
        if self._socket is None:
            await asyncio.sleep(min(seconds, POLL_SECONDS))
            return None
        try:
            async with asyncio.timeout(seconds):
                gone = set(_went(await self._receive(self._socket)))
        except TimeoutError:
            return None
        await asyncio.sleep(SETTLE_SECONDS)
        while data := _receive_nowait(self._socket):
            gone.update(_went(data))
        return frozenset(gone)

    async def _receive(self, kernel: socket.socket) -> bytes:
        try:
            return await asyncio.get_running_loop().sock_recv(kernel, MESSAGES_BYTES_MAX)
        except OSError as error:  # more happened than the socket holds: what it was does not matter
            log.debug("the kernel's news of addresses: %s", error)
            return b""


def _subscribe() -> socket.socket:
    made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
    try:
        made.setblocking(False)
        made.bind((0, _GROUPS))
    except OSError:
        made.close()
        raise
    return made


def _receive_nowait(kernel: socket.socket) -> bytes:
    try:
        return kernel.recv(MESSAGES_BYTES_MAX)
    except OSError:
        return b""


def _went(data: bytes) -> list[str]:
    return [_read_address(body)[1].host for kind, body in _messages(data) if kind == _OLD_ADDRESS]


def _dump(kernel: socket.socket, question: int) -> Iterator[tuple[int, bytes]]:
    body = struct.pack("=BxHiII", socket.AF_UNSPEC, 0, 0, 0, 0) + struct.pack("=HHI", 8, _EXTENSIONS, _SKIP_STATISTICS)
    kernel.send(struct.pack("=IHHII", 16 + len(body), question, _REQUEST_DUMP, 1, 0) + body)
    while True:
        for kind, message in _messages(kernel.recv(MESSAGES_BYTES_MAX)):
            if kind == _DONE:
                return
            if kind == _ERROR:
                raise OSError(-struct.unpack_from("=i", message)[0], "the kernel does not list its interfaces")
            yield kind, message


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    start = 0
    while start + 16 <= len(data):
        length, kind = struct.unpack_from("=IH", data, start)
        if length < 16 or start + length > len(data):
            return
        yield kind, data[start + 16 : start + length]
        start += (length + 3) & ~3


def _attributes(data: bytes) -> Mapping[int, bytes]:
    found: dict[int, bytes] = {}
    start = 0
    while start + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, start)
        if length < 4 or start + length > len(data):
            break
        found[kind & 0x3FFF] = data[start + 4 : start + length]
        start += (length + 3) & ~3
    return found


def _read_link(body: bytes) -> Link:
    index, flags = struct.unpack_from("=iI", body, 4)
    attributes = _attributes(body[16:])
    kind = _attributes(attributes.get(_LINK_INFO, b"")).get(_INFO_KIND, b"")
    return Link(
        index=index,
        name=_text(attributes.get(_NAME, b"")),
        kind=_text(kind),
        master=int.from_bytes(attributes.get(_MASTER, b""), sys.byteorder),
        up=bool(flags & _UP),
        carrier=bool(flags & _LOWER_UP),
        loopback=bool(flags & _LOOPBACK),
        point_to_point=bool(flags & _POINT_TO_POINT),
        multicast=bool(flags & _MULTICAST),
    )


def _read_address(body: bytes) -> tuple[int, LinkAddress]:
    """The number of the interface, and the address: of a point-to-point link this machine's own end."""
    family, _, low_flags, _, index = struct.unpack_from("=BBBBI", body)
    attributes = _attributes(body[8:])
    packed = attributes.get(_LOCAL) or attributes.get(_ADDRESS, b"")
    flags = struct.unpack("=I", attributes[_FLAGS])[0] if _FLAGS in attributes else low_flags
    host = socket.inet_ntop(family, packed) if family in (socket.AF_INET, socket.AF_INET6) and packed else ""
    usable = family == socket.AF_INET or not flags & (_DUPLICATE | _DEPRECATED | _TENTATIVE)
    temporary = family == socket.AF_INET6 and bool(flags & _TEMPORARY)
    return index, LinkAddress(host, bool(host) and usable, temporary)


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode("utf-8", "replace")
