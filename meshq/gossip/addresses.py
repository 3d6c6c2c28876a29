"""Which addresses this machine has, which of them mean it to others, and which a seed means.

Lab machines have addresses that mislead: every docker host has 172.17.0.1, a tunnel leads to some, a bridge without a cable to
nobody. None is left out for its name, for in some lab it is the only way; they are ranked, so that a good one is never behind
them. Who answers at an address is found out by its key, so a wrong one costs a try and nothing else.
"""

import asyncio
import ipaddress
import re
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from meshq.config import ADDRESSES_MAX, PORT_DEFAULT
from meshq.errors import Unreachable, UsageError
from meshq.gossip import netlink
from meshq.gossip.member import Address
from meshq.gossip.netlink import Link, LinkAddress

ALL_HOSTS: Final = ("", "0.0.0.0", "::")
SEED_ADDRESSES_MAX: Final = 16  # of one name: a record for a whole lab, but not for the world
BIND_HINT: Final = "give another address of this machine, 0.0.0.0 or ::"
RESOLVE_SECONDS: Final = 5.0  # a name server that does not answer must not hold up the start

INNER_NAMES: Final = ("vboxnet", "vmnet", "veth")  # what the kernel cannot tell from a network card, or from a container's own
INNER_KINDS: Final = ("dummy", "ifb", "vxlan", "nlmon", "vcan")
TUNNEL_KINDS: Final = ("tun", "wireguard", "ppp", "ipip", "sit", "gre", "gretap", "ip6tnl", "ip6gre", "vti", "vti6", "xfrm")
CONTAINER_PORTS: Final = ("veth", "tun", "dummy", "vxlan")  # what plugs containers and virtual machines into a bridge

_BRACKETED = re.compile(r"\[([0-9A-Fa-f:.]+)\](?::(\d+))?")
_PLAIN = re.compile(r"([A-Za-z0-9._-]+)(?::(\d+))?")


class Reach(IntEnum):
    """Whom an interface leads to; the smaller, the likelier its address means this machine to others."""

    NETWORK = 0  # a cable, Wi-Fi, a bridge that one of them is plugged into
    TUNNEL = 1  # those in the same VPN
    INNER = 2  # containers and virtual machines here; the same address elsewhere means another machine


@dataclass(frozen=True, slots=True)
class Interface:
    """A network interface that is up, with its numeric addresses, IPv4 first; link-local IPv6 is left out: it needs a scope."""

    name: str
    hosts: tuple[str, ...]
    reach: Reach = Reach.NETWORK
    carrier: bool = True
    multicast: bool = True

    @property
    def loopback(self) -> bool:
        return all(_is_loopback(host) for host in self.hosts)


def interfaces() -> list[Interface]:
    """Those of this machine that are up and have an address, in the order of their names."""
    return describe(netlink.links())


def describe(links: Sequence[Link]) -> list[Interface]:
    """What the kernel's list means. A tunnel or bridge for containers with nobody at the other end leads nowhere and is left
    out; so are addresses that the kernel does not let use, and privacy addresses beside a lasting one."""
    found = []
    for link in sorted(links, key=lambda link: link.name):
        ports = [other for other in links if other.master == link.index] if link.kind == "bridge" else []
        carrier = link.carrier and (link.kind != "bridge" or any(port.carrier for port in ports))
        reach = _reach(link, ports)
        if link.up and (carrier or reach is Reach.NETWORK):
            hosts = _hosts(link.addresses)
            own = tuple(host for host in hosts if _is_loopback(host))
            others = tuple(host for host in hosts if host not in own)  # routers keep an address for themselves on `lo`
            found += [Interface(link.name, each, reach, carrier, link.multicast) for each in (own, others) if each]
    return found


def _hosts(addresses: Sequence[LinkAddress]) -> tuple[str, ...]:
    usable = [each for each in addresses if each.usable and not (":" in each.host and _is_link_local(each.host))]
    lasting = [each for each in usable if not each.temporary]
    kept = lasting if any(":" in each.host for each in lasting) else usable
    return tuple(dict.fromkeys(each.host for each in sorted(kept, key=lambda each: ":" in each.host)))


def _is_link_local(host: str) -> bool:
    return ipaddress.ip_address(host).is_link_local


def _is_loopback(host: str) -> bool:
    return ipaddress.ip_address(host).is_loopback


def _reach(link: Link, ports: Sequence[Link]) -> Reach:
    if link.kind == "bridge":
        return Reach.NETWORK if any(port.kind not in CONTAINER_PORTS for port in ports) else Reach.INNER
    if link.kind in TUNNEL_KINDS or (link.point_to_point and not link.loopback):
        return Reach.TUNNEL
    if link.kind in INNER_KINDS or link.name.startswith(INNER_NAMES):
        return Reach.INNER
    return Reach.NETWORK


def normal_bind(text: str) -> str:
    """The address to listen on, in the one form that compares; empty for all of them. UsageError for what can be none."""
    try:
        address = ipaddress.ip_address(text) if text else None
    except ValueError:
        raise UsageError(f"--bind: {text!r} is no IP address", "give one of this machine's, 0.0.0.0 or ::") from None
    if address is None:
        return ""
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if address.is_multicast or (address.version == 6 and address.is_link_local):
        means = (
            "multicast: it means many machines" if address.is_multicast else "link-local: it means this one on one cable only"
        )
        raise UsageError(f"--bind: {text} is {means}", BIND_HINT)
    return str(address)


def own_addresses(port: int, bind: str = "", listing: Callable[[], Sequence[Interface]] = interfaces) -> tuple[Address, ...]:
    """Where others may reach this machine, the likeliest first: networks before tunnels before the bridges for containers, what
    is plugged in before what is not, addresses that somebody gave before those that a machine gave itself (169.254), IPv4
    before IPv6. Of each family that there is at least one is among them.

    Loopback counts only if there is nothing else, or if `bind` says so.
    """
    bind = normal_bind(bind)
    if bind not in ALL_HOSTS:
        return (Address(bind, port),)
    hosts = list(_ranked(listing(), bind))
    best = hosts[:ADDRESSES_MAX]
    for v6 in (True, False):
        first = next((host for host in hosts if (":" in host) is v6), None)
        if first is not None and first not in best:
            best[-1] = first
    return tuple(Address(host, port) for host in best)


def told_addresses(port: int, bind: str = "", listing: Callable[[], Sequence[Interface]] = interfaces) -> tuple[Address, ...]:
    """Those of `own_addresses` that a person may type on another machine, where loopback and this machine's bridges for
    containers mean something else."""
    bind = normal_bind(bind)
    if bind not in ALL_HOSTS:
        return () if _is_loopback(bind) else (Address(bind, port),)
    ranked = _ranked(listing(), bind)
    useful = [host for host, reach in ranked.items() if reach is not Reach.INNER and not _is_loopback(host)]
    return tuple(Address(host, port) for host in useful[:ADDRESSES_MAX])


def _ranked(found: Sequence[Interface], bind: str) -> Mapping[str, Reach]:
    """In the order of preference, with whom the interface leads to."""
    choices = [interface for interface in found if not interface.loopback] or list(found)
    pairs = [(interface, host) for interface in choices for host in interface.hosts if bind != "0.0.0.0" or ":" not in host]
    pairs.sort(key=lambda pair: _rank(*pair))
    ranked: dict[str, Reach] = {}
    for interface, host in pairs:
        ranked.setdefault(host, interface.reach)
    return ranked


def _rank(interface: Interface, host: str) -> tuple[object, ...]:
    inner = interface.reach is Reach.INNER
    return inner, not interface.carrier, interface.reach, _is_link_local(host), ":" in host


def search_hosts(found: Sequence[Interface], bind: str = "") -> tuple[str, ...]:
    """The addresses from whose networks mDNS searches, and to which it announces: one of each family for each interface that
    leads anywhere, loopback if there is no other. Both families, for a neighbour may have only one of them, and which one it
    is cannot be told from here. With `bind`, that address alone.
    """
    bind = normal_bind(bind)
    if bind not in ALL_HOSTS:
        if _is_loopback(bind):
            return (bind,)
        return tuple(bind for interface in found if interface.carrier and bind in interface.hosts)[:1]
    useful = [interface for interface in found if not interface.loopback and interface.carrier and interface.multicast]
    chosen = useful or [interface for interface in found if interface.loopback]
    v4 = [host for interface in chosen for host in _first(interface, v6=False)]
    v6 = [host for interface in chosen for host in _first(interface, v6=True)] if bind != "0.0.0.0" else []
    loopback = bool(v4) and not useful  # there mDNS over IPv4 reaches everybody
    return tuple(v4) if loopback else (*v4, *v6)


def _first(interface: Interface, *, v6: bool) -> list[str]:
    return [host for host in interface.hosts if (":" in host) is v6][:1]


def parse_seed(text: str) -> tuple[str, int]:
    """Host and port of `host`, `host:port`, `v6` or `[v6]:port`. UsageError for anything else."""
    match = _BRACKETED.fullmatch(text) or _PLAIN.fullmatch(text)
    if match is None and text.count(":") >= 2 and _is_numeric(text):
        return text, PORT_DEFAULT
    port = PORT_DEFAULT if match is None or match[2] is None else int(match[2])
    if match is None or not 0 < port < 65_536 or (text.startswith("[") and not _is_numeric(match[1])):
        raise UsageError(f"seed {text!r} is no address", "write HOST:PORT, such as lab3.example.org:7733 or [fd00::3]:7733")
    return match[1], port


def _is_numeric(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


async def resolve_seed(text: str) -> list[Address]:
    """The numeric addresses of a seed, asked for anew each time. Unreachable if its name does not resolve, UsageError if it is
    no address."""
    host, port = parse_seed(text)
    try:
        async with asyncio.timeout(RESOLVE_SECONDS):
            hosts = await _look_up(host)
    except (OSError, UnicodeError) as error:  # TimeoutError is an OSError
        reason = getattr(error, "strerror", None) or str(error) or "no name server answers"
        raise Unreachable(
            f"seed {text!r}: its name does not resolve: {reason}", "check the name, or give an IP address"
        ) from None
    return [Address(each, port) for each in hosts if "%" not in each][:SEED_ADDRESSES_MAX]


async def _look_up(name: str) -> list[str]:
    """In a thread that nobody waits for at the end: a name server that is gone holds one for half a minute, and the loop's own
    threads are few and write the ledger."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[list[str]] = loop.create_future()

    def give(hosts: list[str], error: Exception | None) -> None:
        if answer.done():
            return
        if error is None:
            answer.set_result(hosts)
        else:
            answer.set_exception(error)

    def ask() -> None:
        hosts: list[str] = []
        failure: Exception | None = None
        try:
            hosts = list(dict.fromkeys(str(entry[4][0]) for entry in socket.getaddrinfo(name, None, type=socket.SOCK_DGRAM)))
        except (OSError, UnicodeError) as error:
            failure = error
        with suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(give, hosts, failure)

    threading.Thread(target=ask, name=f"meshq resolves {name}", daemon=True).start()
    return await answer
