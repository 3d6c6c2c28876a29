"""Finding the others on a local network by mDNS: an address hint and nothing more.

Every peer announces the service `_meshq._udp` under a name that is random at each start, with a tag of its mesh: a keyed hash,
so that outsiders learn neither the mesh nor its members. Whoever is found is only tried; the mesh key is what lets anybody in.

What others got wrong: each address is tried once and never again (serf), a machine whose network comes up after the agent never
searches there, and a bridge for containers is searched instead of the network (localsend, exo). So addresses that were seen are
tried again with growing pauses for as long as they are in sight and not members, and the interfaces are looked at again.

zeroconf is imported where it is used: it takes longer to load than all the rest of gossip.
"""

import asyncio
import contextlib
import ipaddress
import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from meshq.gossip.addresses import Interface, interfaces, own_addresses, resolve_seed
from meshq.gossip.member import Address

if TYPE_CHECKING:
    from zeroconf import IPVersion, ServiceStateChange, Zeroconf
    from zeroconf.asyncio import AsyncServiceInfo

__all__ = ["Discovery", "SeenMesh", "look_around", "own_addresses", "resolve_seed"]

log = logging.getLogger("meshq.gossip")

SERVICE: Final = "_meshq._udp.local."
FORMAT: Final = "1"
RETRY_MIN: Final = 1.0
RETRY_MAX: Final = 60.0
INTERFACES_INTERVAL: Final = 15.0
LOOKUP_MS: Final = 3_000
SEEN_MAX: Final = 1_024  # services in sight; more is an attack or a mistake
TEXT_BYTES_MAX: Final = 64  # of one value in a TXT record


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenMesh:
    """A mesh that somebody on this network announces. `id` and `name` are empty if it does not say."""

    tag: str
    addresses: tuple[Address, ...]
    id: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class Announcement:
    """What one peer announces, or what was read of it."""

    tag: str
    addresses: tuple[Address, ...]
    id: str = ""
    name: str = ""


@dataclass(slots=True)
class _Seen:
    addresses: list[Address]
    next_at: float
    pause: float = RETRY_MIN


class _Net:
    """zeroconf on the chosen interfaces: announcing, and telling who comes and goes."""

    def __init__(self, hosts: Sequence[str], found: Callable[[str, Announcement], None], lost: Callable[[str], None]) -> None:
        from zeroconf import DNSQuestionType
        from zeroconf.asyncio import AsyncServiceBrowser, AsyncZeroconf

        self._zeroconf = AsyncZeroconf(interfaces=list(hosts), ip_version=_version(hosts))
        self._found = found
        self._lost = lost
        self._lookups: set[asyncio.Task[None]] = set()
        self._info: AsyncServiceInfo | None = None
        # Questions ask for answers by multicast: one by unicast reaches only one of the programs that share port 5353 here
        # (another agent, avahi), and not always the one that asked.
        self._browser = AsyncServiceBrowser(
            self._zeroconf.zeroconf, [SERVICE], handlers=[self._handle_change], question_type=DNSQuestionType.QM
        )

    async def announce(self, instance: str, port: int, announcement: Announcement) -> None:
        from zeroconf.asyncio import AsyncServiceInfo

        texts = {"v": FORMAT, "m": announcement.tag, "i": announcement.id, "n": announcement.name}
        self._info = AsyncServiceInfo(
            SERVICE,
            f"{instance}.{SERVICE}",
            port=port,
            addresses=[ipaddress.ip_address(address.host).packed for address in announcement.addresses],
            properties={key: value for key, value in texts.items() if value},
            server=f"{instance}.local.",
        )
        await (await self._zeroconf.async_register_service(self._info, cooperating_responders=True))

    async def close(self) -> None:
        lookups = list(self._lookups)
        for lookup in lookups:
            lookup.cancel()
        await asyncio.gather(*lookups, return_exceptions=True)
        with contextlib.suppress(OSError):
            await self._browser.async_cancel()
            if self._info is not None:
                await (await self._zeroconf.async_unregister_service(self._info))
        await self._zeroconf.async_close()

    def _handle_change(self, zeroconf: "Zeroconf", service_type: str, name: str, state_change: "ServiceStateChange") -> None:
        from zeroconf import ServiceStateChange

        if state_change is ServiceStateChange.Removed:
            self._lost(name)
        elif len(self._lookups) < SEEN_MAX:
            lookup = asyncio.get_running_loop().create_task(self._look_up(zeroconf, name), name="gossip mDNS lookup")
            self._lookups.add(lookup)
            lookup.add_done_callback(self._lookups.discard)

    async def _look_up(self, zeroconf: "Zeroconf", name: str) -> None:
        from zeroconf import DNSQuestionType
        from zeroconf.asyncio import AsyncServiceInfo

        info = AsyncServiceInfo(SERVICE, name)
        try:
            known = await info.async_request(zeroconf, LOOKUP_MS, DNSQuestionType.QM)
        except Exception as error:  # zeroconf raises what it likes for what strangers send
            log.debug("mDNS answer of %s: %s", name, error)
            return
        announcement = _read(info) if known else None
        if announcement is not None:
            self._found(name, announcement)


def _read(info: "AsyncServiceInfo") -> Announcement | None:
    """What a stranger announces, if it makes sense."""
    texts = {_text(key): _text(value) for key, value in info.properties.items() if value is not None}
    if texts.get("v") != FORMAT or not texts.get("m") or not info.port:
        return None
    hosts = [host for host in info.parsed_addresses() if not ipaddress.ip_address(host).is_link_local]
    addresses = tuple(Address(host, info.port) for host in dict.fromkeys(hosts))
    return Announcement(texts["m"], addresses, texts.get("i", ""), texts.get("n", "")) if addresses else None


def _text(raw: bytes) -> str:
    text = raw[:TEXT_BYTES_MAX].decode("ascii", "replace")
    return "".join(letter if letter.isprintable() and letter.isascii() else "?" for letter in text)


def _version(hosts: Sequence[str]) -> "IPVersion":
    from zeroconf import IPVersion

    return IPVersion.V6Only if all(":" in host for host in hosts) else IPVersion.V4Only


def search_hosts(found: Sequence[Interface], loopback: bool) -> tuple[str, ...]:
    """The addresses whose networks are searched: one for each interface that is not loopback, else (or if told so) loopback.

    mDNS over IPv4 reaches the same machines as over IPv6 wherever there is IPv4, so that is used if there is any.
    """
    chosen = [interface for interface in found if interface.loopback == loopback] or list(found)
    v4 = tuple(host for interface in chosen for host in interface.hosts if ":" not in host)
    return v4 or tuple(host for interface in chosen for host in interface.hosts)


class Discovery:
    """Announces this peer and finds others of the same mesh. `start` and `stop` inside a running event loop.

    `found` is called with the addresses of one other peer, again and again while none of them belongs to a live member
    (`is_live`). A machine without any network is no error: the search begins when it has one.
    """

    def __init__(
        self,
        *,
        tag: str,
        port: int,
        addresses: Callable[[], Sequence[Address]],
        found: Callable[[list[Address]], None],
        is_live: Callable[[Address], bool],
        id: str = "",
        name: str = "",
        loopback: bool = False,
        listing: Callable[[], Sequence[Interface]] = interfaces,
    ) -> None:
        """`addresses` are asked for whenever the interfaces changed. `id` and `name` of the mesh are announced if given."""
        self.counters: dict[str, int] = {"seen": 0, "foreign": 0, "tried": 0, "failed": 0, "refused": 0}
        self._announced = Announcement(tag, (), id, name)
        self._port = port
        self._addresses = addresses
        self._report = found
        self._is_live = is_live
        self._loopback = loopback
        self._listing = listing
        self._instance = secrets.token_hex(8)
        self._seen: dict[str, _Seen] = {}
        self._net: _Net | None = None
        self._hosts: tuple[str, ...] = ()
        self._complained: tuple[str, ...] = ()
        self._loop_task: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()

    async def start(self) -> None:
        """Begin; announcing takes a second more in the background."""
        self._loop_task = asyncio.get_running_loop().create_task(self._loop(), name="gossip discovery")

    async def stop(self) -> None:
        """Withdraw the announcement and end the search."""
        if self._loop_task is not None:
            self._loop_task.cancel()
            await asyncio.gather(self._loop_task, return_exceptions=True)
            self._loop_task = None
        await self._close()

    async def _loop(self) -> None:
        """Try again those that are due; look for changed interfaces now and then."""
        loop = asyncio.get_running_loop()
        await self._open_where_possible()
        look_at = loop.time() + INTERFACES_INTERVAL
        while True:
            due = min([look_at, *(seen.next_at for seen in self._seen.values())])
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), max(0.01, due - loop.time()))
            self._wake.clear()
            if loop.time() >= look_at:
                look_at = loop.time() + INTERFACES_INTERVAL
                await self._open_where_possible()
            self._try_due(loop.time())

    def _try_due(self, now: float) -> None:
        for seen in list(self._seen.values()):
            if seen.next_at > now:
                continue
            if any(self._is_live(address) for address in seen.addresses):
                seen.next_at, seen.pause = now + RETRY_MAX, RETRY_MIN
                continue
            seen.next_at, seen.pause = now + seen.pause, min(RETRY_MAX, seen.pause * 2)
            self.counters["tried"] += 1
            self._report(list(seen.addresses))

    async def _open_where_possible(self) -> None:
        """Search on the interfaces that there are now; anew if they changed."""
        listed = await asyncio.to_thread(self._listing)
        hosts = search_hosts(listed, self._loopback)
        if hosts == self._hosts and self._net is not None:
            return
        await self._close()
        if not hosts:
            return
        announced = Announcement(self._announced.tag, tuple(self._addresses()), self._announced.id, self._announced.name)
        try:
            self._net = _Net(hosts, self._handle_found, self._handle_lost)
            self._hosts = hosts
            await self._net.announce(self._instance, self._port, announced)
        except Exception as error:  # no multicast here, a port in use: the mesh works without mDNS
            self.counters["failed"] += 1
            level = logging.WARNING if hosts != self._complained else logging.DEBUG
            self._complained = hosts
            log.log(level, "mDNS does not work on %s: %s; others find this peer by --seed only", ", ".join(hosts), error)
            await self._close()

    async def _close(self) -> None:
        net, self._net, self._hosts = self._net, None, ()
        self._seen.clear()
        if net is not None:
            self._closing = asyncio.get_running_loop().create_task(net.close(), name="gossip mDNS close")
        if self._closing is not None:
            await asyncio.shield(self._closing)  # being stopped meanwhile must not leave its sockets open

    def _handle_found(self, name: str, announcement: Announcement) -> None:
        if name == f"{self._instance}.{SERVICE}":
            return
        if announcement.tag != self._announced.tag:
            self.counters["foreign"] += 1
            return
        if name not in self._seen and len(self._seen) >= SEEN_MAX:
            self.counters["refused"] += 1
            return
        self.counters["seen"] += 1
        known = self._seen.get(name)
        if known is None or known.addresses != list(announcement.addresses):
            self._seen[name] = _Seen(list(announcement.addresses), 0.0)
            self._wake.set()

    def _handle_lost(self, name: str) -> None:
        self._seen.pop(name, None)


@dataclass(slots=True)
class _Around:
    """Meshes in sight by tag."""

    meshes: dict[str, SeenMesh] = field(default_factory=dict)

    def add(self, _: str, announcement: Announcement) -> None:
        known = self.meshes.get(announcement.tag)
        addresses = (*(known.addresses if known else ()), *announcement.addresses)
        self.meshes[announcement.tag] = SeenMesh(
            tag=announcement.tag,
            addresses=tuple(dict.fromkeys(addresses)),
            id=announcement.id or (known.id if known else ""),
            name=announcement.name or (known.name if known else ""),
        )


async def look_around(
    seconds: float, *, loopback: bool = False, listing: Callable[[], Sequence[Interface]] = interfaces
) -> list[SeenMesh]:
    """Which meshes are in sight: what is announced within so many seconds. Announces nothing itself."""
    around = _Around()
    hosts = search_hosts(await asyncio.to_thread(listing), loopback)
    if not hosts:
        return []
    try:
        net = _Net(hosts, around.add, lambda name: None)
    except OSError as error:
        log.warning("mDNS does not work on %s: %s", ", ".join(hosts), error)
        return []
    try:
        await asyncio.sleep(seconds)
    finally:
        await net.close()
    return sorted(around.meshes.values(), key=lambda mesh: mesh.tag)
