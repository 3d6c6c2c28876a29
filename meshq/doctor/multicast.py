"""A multicast probe: does what is sent to the mDNS group on an interface come back, and is anybody else heard there?

The probe is an mDNS question, sent from port 5353 as the mDNS of this agent would send it, so it meets the same firewall rules
(also those for what comes in: a looped packet passes them). Half of the question nobody can answer: a random name, by which the
probe is known again. The other half asks which services there are, which printers and other machines answer.

The socket is bound to the group, not to all addresses: so it takes no unicast packet away from other programs on port 5353.
"""

import asyncio
import contextlib
import secrets
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from meshq.doctor.facts import Probe

GROUP_V4: Final = "224.0.0.251"
GROUP_V6: Final = "ff02::fb"
PORT: Final = 5353
LISTEN_SECONDS: Final = 0.7  # answers to shared questions come after 20 to 120 ms (RFC 6762 section 6), on Wi-Fi later
INTERFACES_MAX: Final = 8
HEARD_MAX: Final = 256
PACKETS_MAX: Final = 512  # in one probe: a flood must not hold up the agent
PACKET_BYTES: Final = 9_000  # the largest of mDNS (RFC 6762 section 17)

_IP_MULTICAST_ALL: Final = 49  # Linux; off: only the interface that was joined is heard
_TYPE_PTR: Final = 12
_CLASS_IN: Final = 1


@dataclass(slots=True)
class _Heard:
    """What came in while a probe listened: the senders of the probe itself, and all others."""

    mine: set[str] = field(default_factory=set)
    others: set[str] = field(default_factory=set)


async def probe_all(chosen: Sequence[tuple[str, str]], own: frozenset[str], port: int = PORT) -> tuple[Probe, ...]:
    """One probe for each (interface, its address), all at the same time. `own`: all addresses of this machine."""
    return tuple(await asyncio.gather(*(_probe(name, host, own, port) for name, host in chosen[:INTERFACES_MAX])))


async def _probe(interface: str, host: str, own: frozenset[str], port: int) -> Probe:
    mark, heard = secrets.token_hex(8), _Heard()
    try:
        with _joined(interface, host, port) as (sock, group):
            await asyncio.get_running_loop().sock_sendto(sock, question(mark), group)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LISTEN_SECONDS):
                    await _listen(sock, mark.encode(), heard)
    except OSError as error:
        return Probe(interface=interface, host=host, problem=(error.strerror or str(error)).lower())
    others = heard.others - heard.mine - own
    return Probe(interface=interface, host=host, came_back=bool(heard.mine), heard=len(others))


async def _listen(sock: socket.socket, mark: bytes, heard: _Heard) -> None:
    loop = asyncio.get_running_loop()
    for _ in range(PACKETS_MAX):
        data, source = await loop.sock_recvfrom(sock, PACKET_BYTES)
        sender = str(source[0]).partition("%")[0]
        if mark in data:
            heard.mine.add(sender)
        elif len(heard.others) < HEARD_MAX:
            heard.others.add(sender)
        await asyncio.sleep(0)  # what waits in a socket is read without yielding


@contextlib.contextmanager
def _joined(interface: str, host: str, port: int) -> Iterator[tuple[socket.socket, Any]]:
    """A socket that hears the group on this interface, and the group's address as `sendto` wants it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        yield sock, _join_v6(sock, interface, port) if family == socket.AF_INET6 else _join_v4(sock, host, port)


def _join_v4(sock: socket.socket, host: str, port: int) -> tuple[str, int]:
    here = socket.inet_aton(host)
    sock.bind((GROUP_V4, port))
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_IP, _IP_MULTICAST_ALL, 0)
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton(GROUP_V4) + here)
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, here)
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 255)
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)
    return GROUP_V4, port


def _join_v6(sock: socket.socket, interface: str, port: int) -> tuple[str, int, int, int]:
    index = socket.if_nametoindex(interface)
    group = (GROUP_V6, port, 0, index)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    sock.bind(group)
    member = socket.inet_pton(socket.AF_INET6, GROUP_V6) + struct.pack("=I", index)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, member)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_LOOP, 1)
    return group


def question(mark: str) -> bytes:
    """An mDNS query with two questions: a name that is nobody's, and which services there are."""
    names = ((mark, "_meshq", "_udp", "local"), ("_services", "_dns-sd", "_udp", "local"))
    asked = b"".join(_name(labels) + struct.pack(">HH", _TYPE_PTR, _CLASS_IN) for labels in names)
    return struct.pack(">6H", 0, 0, len(names), 0, 0, 0) + asked


def _name(labels: Sequence[str]) -> bytes:
    return b"".join(bytes([len(label)]) + label.encode("ascii") for label in labels) + b"\0"
