"""Which addresses this machine has, and which a seed means."""

import asyncio
import ipaddress
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import psutil

from meshq.config import ADDRESSES_MAX, PORT_DEFAULT
from meshq.errors import Unreachable, UsageError
from meshq.gossip.member import Address

BRIDGES: Final = ("docker", "br-", "veth", "virbr", "cni", "flannel", "lxc", "podman")
ALL_HOSTS: Final = ("", "0.0.0.0", "::")

_BRACKETED = re.compile(r"\[([0-9A-Fa-f:.]+)\](?::(\d+))?")
_PLAIN = re.compile(r"([A-Za-z0-9._-]+)(?::(\d+))?")


@dataclass(frozen=True, slots=True)
class Interface:
    """A network interface that is up, with its numeric addresses, IPv4 first; link-local IPv6 is left out."""

    name: str
    hosts: tuple[str, ...]

    @property
    def loopback(self) -> bool:
        return all(ipaddress.ip_address(host).is_loopback for host in self.hosts)

    @property
    def bridge(self) -> bool:
        """Its address means another machine elsewhere, or nothing at all."""
        return self.name.startswith(BRIDGES)


def interfaces() -> list[Interface]:
    """Those of this machine that are up and have an address, in the order of their names."""
    stats: Mapping[str, object] = psutil.net_if_stats()
    found = []
    for name, addresses in sorted(psutil.net_if_addrs().items()):
        if not getattr(stats.get(name), "isup", False):
            continue
        hosts = [entry.address for entry in addresses if entry.family in (socket.AF_INET, socket.AF_INET6)]
        usable = tuple(sorted((host for host in hosts if _travels(host)), key=lambda host: ":" in host))
        if usable:
            found.append(Interface(name, usable))
    return found


def _travels(host: str) -> bool:
    """Link-local IPv6 needs a scope, which means something on one machine only."""
    return "%" not in host and not (":" in host and ipaddress.ip_address(host).is_link_local)


def own_addresses(port: int, bind: str = "", listing: Callable[[], Sequence[Interface]] = interfaces) -> tuple[Address, ...]:
    """Where others may reach this machine, the likeliest first: real interfaces before bridges, IPv4 before IPv6.

    Loopback counts only if there is nothing else, or if `bind` says so.
    """
    if bind not in ALL_HOSTS:
        return (Address(bind, port),)
    found = listing()
    choices = [interface for interface in found if not interface.loopback] or list(found)
    ranked = [(interface.bridge, ":" in host, host) for interface in choices for host in interface.hosts]
    ranked = [each for each in ranked if bind != "0.0.0.0" or not each[1]]
    ranked.sort(key=lambda each: each[:2])
    return tuple(Address(host, port) for _, _, host in ranked)[:ADDRESSES_MAX]


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
    """The numeric addresses of a seed. Unreachable if its name does not resolve, UsageError if it is no address."""
    host, port = parse_seed(text)
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise Unreachable(
            f"seed {text!r}: its name does not resolve: {reason}", "check the name, or give an IP address"
        ) from None
    hosts = dict.fromkeys(str(entry[4][0]) for entry in found)
    return [Address(each, port) for each in hosts if "%" not in each]
