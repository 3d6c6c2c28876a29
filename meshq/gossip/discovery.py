"""Finding the others on a local network by mDNS: an address hint and nothing more.

Every peer announces the service `_meshq._udp` under a name that is random at each start, with a tag of its mesh: a keyed hash,
so that outsiders learn neither the mesh nor its members. Whoever is found is only tried; the mesh key is what lets anybody in.
The name is the member's `boot`, which its gossip tells the other members: so a peer knows which of those in sight it has met.
An address would not do for that: every docker host has 172.17.0.1.

What others got wrong: each address is tried once and never again (serf), a machine whose network comes up after the agent never
searches there, a bridge for containers is searched instead of the network (localsend, exo), and two networks that are joined
later never hear of each other, as everybody asked and answered before (zeroconf's browser asks four times). So addresses that
were seen are tried again with growing pauses for as long as they are in sight and not members, every interface is searched, by
both families, anew whenever they change, and each peer repeats its announcement now and then.

zeroconf is imported where it is used: it takes longer to load than all the rest of gossip.
"""

import asyncio
import contextlib
import ipaddress
import logging
import random
import socket
import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from meshq.config import ADDRESSES_MAX
from meshq.gossip import netlink
from meshq.gossip.addresses import Interface, interfaces, own_addresses, resolve_seed, search_hosts
from meshq.gossip.member import Address

if TYPE_CHECKING:
    from zeroconf import IPVersion, ServiceStateChange, Zeroconf
    from zeroconf.asyncio import AsyncServiceInfo

__all__ = ["Discovery", "SeenMesh", "look_around", "own_addresses", "resolve_seed"]

log = logging.getLogger("meshq.gossip")

GROUP_V4: Final = socket.inet_aton("224.0.0.251")
GROUP_V6: Final = socket.inet_pton(socket.AF_INET6, "ff02::fb")
SERVICE: Final = "_meshq._udp.local."
FORMAT: Final = "1"
RETRY_MIN: Final = 1.0
RETRY_MAX: Final = 60.0
TRIES_AT_ONCE: Final = 4  # one good try makes all the others known, so a newcomer must not try a whole lab at once
TRIES_PAUSE: Final = 0.5
ANNOUNCE_ALONE: Final = 10.0  # between announcements of one that has met nobody
ANNOUNCE_SECONDS: Final = 60.0  # of the others; where there are more of them, each is rarer: one a second in all
REOPEN_MIN: Final = 2.0  # after mDNS did not work on the interfaces that there are
REOPEN_MAX: Final = 60.0
LOOKUP_MS: Final = 3_000
SEEN_MAX: Final = 1_024  # services in sight; more is an attack or a mistake
OTHERS_MAX: Final = 64  # services of other meshes that are remembered: a person wants to see one of them
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
    others: tuple[str, ...] = ()  # tags of other keys that the mesh accepts: who has one of them alone may come, too


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

        self.hosts = tuple(hosts)
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

        others = " ".join(announcement.others)[:TEXT_BYTES_MAX]
        texts = {"v": FORMAT, "m": announcement.tag, "i": announcement.id, "n": announcement.name, "o": others}
        self._info = AsyncServiceInfo(
            SERVICE,
            f"{instance}.{SERVICE}",
            port=port,
            addresses=[ipaddress.ip_address(address.host).packed for address in announcement.addresses],
            properties={key: value for key, value in texts.items() if value},
            server=f"{instance}.local.",
        )
        await (await self._zeroconf.async_register_service(self._info, cooperating_responders=True))

    def repeat(self) -> None:
        """Announce once more, for those whose network was joined to this one meanwhile."""
        if self._info is not None:
            zeroconf = self._zeroconf.zeroconf
            zeroconf.async_send(zeroconf.generate_service_broadcast(self._info, None))

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

        instance = name.removesuffix(f".{SERVICE}")
        if state_change is ServiceStateChange.Removed:
            self._lost(instance)
        elif len(self._lookups) < SEEN_MAX:
            lookup = asyncio.get_running_loop().create_task(self._look_up(zeroconf, instance), name="gossip mDNS lookup")
            self._lookups.add(lookup)
            lookup.add_done_callback(self._lookups.discard)

    async def _look_up(self, zeroconf: "Zeroconf", instance: str) -> None:
        from zeroconf import DNSQuestionType
        from zeroconf.asyncio import AsyncServiceInfo

        info = AsyncServiceInfo(SERVICE, f"{instance}.{SERVICE}")
        try:
            known = await info.async_request(zeroconf, LOOKUP_MS, DNSQuestionType.QM)
            announcement = _read(info) if known else None
        except Exception as error:  # zeroconf raises what it likes for what strangers send
            log.debug("mDNS answer of %s: %s", instance, error)
            return
        if announcement is not None:
            self._found(instance, announcement)


def _read(info: "AsyncServiceInfo") -> Announcement | None:
    """What a stranger announces, if it makes sense."""
    texts = {_text(key): _text(value) for key, value in info.properties.items() if value is not None}
    if texts.get("v") != FORMAT or not texts.get("m") or not info.port:
        return None
    hosts = list(dict.fromkeys(host for host in info.parsed_addresses() if _is_place(host)))[:ADDRESSES_MAX]
    addresses = tuple(Address(host, info.port) for host in hosts)
    others = tuple(texts.get("o", "").split())
    return Announcement(texts["m"], addresses, texts.get("i", ""), texts.get("n", ""), others) if addresses else None


def _is_place(host: str) -> bool:
    """Can a machine be reached there? Link-local IPv4 serves two laptops on a cable; link-local IPv6 would need a scope."""
    address = ipaddress.ip_address(host)
    return not (address.is_multicast or address.is_unspecified or (address.version == 6 and address.is_link_local))


def _text(raw: bytes) -> str:
    text = raw[:TEXT_BYTES_MAX].decode("ascii", "replace")
    return "".join(letter if letter.isprintable() and letter.isascii() else "?" for letter in text)


def _version(hosts: Sequence[str]) -> "IPVersion":
    from zeroconf import IPVersion

    families = {":" in host for host in hosts}
    if len(families) == 2:
        return IPVersion.All
    return IPVersion.V6Only if True in families else IPVersion.V4Only


class Discovery:
    """Announces this peer and finds others of the same mesh. `start` and `stop` inside a running event loop.

    `found` is called with the addresses of one other peer, again and again while it is no live member (`is_live`, by the name
    under which it announces itself). A machine without any network is no error: the search begins when it has one, which
    `networks_changed` tells.
    """

    def __init__(
        self,
        *,
        tags: Callable[[], Sequence[str]],
        instance: str,
        port: int,
        addresses: Callable[[], Sequence[Address]],
        found: Callable[[list[Address]], None],
        is_live: Callable[[str], bool],
        members: Callable[[], int],
        id: str = "",
        name: str = "",
        bind: str = "",
        listing: Callable[[], Sequence[Interface]] = interfaces,
    ) -> None:
        """`addresses` and `tags` are asked for whenever they may have changed: an announcement with any of the tags is of our
        mesh, and ours bears the first. `members`: how many others are alive. `id` and `name` of
        the mesh are announced if given."""
        self.counters: dict[str, int] = {
            "seen": 0, "own": 0, "foreign": 0, "tried": 0, "failed": 0, "refused": 0, "opened": 0,
        }  # fmt: skip
        self.problem = ""  # why mDNS does not work now; empty if it does, or if there is no network
        self._tags = tags
        self._id = id
        self._name = name
        self._instance = instance
        self._port = port
        self._addresses = addresses
        self._report = found
        self._is_live = is_live
        self._members = members
        self._bind = bind
        self._listing = listing
        self._seen: dict[str, _Seen] = {}
        self._others: dict[str, Announcement] = {}
        self._net: _Net | None = None
        # Where to search, what to announce:
        self._wanted: tuple[tuple[str, ...], tuple[Address, ...], tuple[str, ...]] = ((), (), ())
        self._look = False  # at the interfaces, at the next turn of the loop
        self._lost_membership = False
        self._reopen_at: float | None = None
        self._reopen_pause = REOPEN_MIN
        self._announce_at = 0.0
        self._loop_task: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()

    @property
    def hosts(self) -> tuple[str, ...]:
        """The addresses from whose networks it searches now."""
        return () if self._net is None else self._net.hosts

    @property
    def other_meshes(self) -> list[SeenMesh]:
        """Those that are announced now, and whose key this peer does not have."""
        return _meshes(self._others)

    async def start(self) -> None:
        """Begin; announcing takes a second more in the background."""
        self._look = True
        self._loop_task = asyncio.get_running_loop().create_task(self._loop(), name="gossip discovery")

    async def stop(self) -> None:
        """Withdraw the announcement and end the search."""
        if self._loop_task is not None:
            self._loop_task.cancel()
            await asyncio.gather(self._loop_task, return_exceptions=True)
            self._loop_task = None
        await self._close()

    def networks_changed(self, gone: Collection[str] = ()) -> None:
        """Look at the interfaces. An address that is `gone` took its membership in the multicast group with it, even if it is
        back by now."""
        self._lost_membership = self._lost_membership or any(host in self.hosts for host in gone)
        self._look = True
        self._wake.set()

    async def _loop(self) -> None:
        while True:
            try:
                await self._turn()
            except Exception:
                self.counters["failed"] += 1
                log.exception("bug: the search by mDNS; it goes on")
                await asyncio.sleep(REOPEN_MIN)

    async def _turn(self) -> None:
        """Do what is due, then wait for what comes first."""
        loop = asyncio.get_running_loop()
        again = self._reopen_at is not None and loop.time() >= self._reopen_at
        if self._look or again:
            self._look = False
            self._reopen_at = None if again else self._reopen_at
            await self._open_where_possible(again)
        if self._net is not None and loop.time() >= self._announce_at:
            self._announce_at = loop.time() + self._announce_pause()
            self._net.repeat()
        self._try_due(loop.time())
        due = [seen.next_at for seen in self._seen.values()]
        if self._net is not None:
            due.append(self._announce_at)
        if self._reopen_at is not None:
            due.append(self._reopen_at)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), max(0.01, min(due) - loop.time()) if due else None)
        self._wake.clear()

    def _announce_pause(self) -> float:
        others = self._members()
        return random.uniform(0.75, 1.25) * (max(ANNOUNCE_SECONDS, others) if others else ANNOUNCE_ALONE)

    def _try_due(self, now: float) -> None:
        tries = 0
        for instance, seen in list(self._seen.items()):
            if seen.next_at > now:
                continue
            if self._is_live(instance):
                seen.next_at, seen.pause = now + RETRY_MAX, RETRY_MIN
            elif tries == TRIES_AT_ONCE:
                seen.next_at = now + TRIES_PAUSE
            else:
                seen.next_at, seen.pause = now + seen.pause, min(RETRY_MAX, seen.pause * 2)
                tries += 1
                self.counters["tried"] += 1
                self._report(list(seen.addresses))

    async def _open_where_possible(self, again: bool) -> None:
        """Search on the interfaces that there are now; anew if they changed, or `again` where it did not work before."""
        listed = await asyncio.to_thread(self._listing)
        wanted = search_hosts(listed, self._bind), tuple(self._addresses()), tuple(self._tags())
        if wanted == self._wanted and not self._lost_membership:
            if not again:
                return
            missing = [host for host in wanted[0] if host not in self.hosts]
            if self._net is not None and len(_troubles(missing)) == len(missing):
                self._try_again_later()
                return
        self._wanted, self._lost_membership = wanted, False
        await self._close()
        problem = await self._open() if wanted[0] else ""
        self._announce_at = asyncio.get_running_loop().time() + self._announce_pause()
        if problem:
            self.counters["failed"] += 1
            level = logging.WARNING if problem != self.problem else logging.DEBUG
            log.log(level, "%s; whoever is there finds this peer by --seed only", problem)
            self._try_again_later()
        else:
            self._reopen_at, self._reopen_pause = None, REOPEN_MIN
        self.problem = problem

    async def _open(self) -> str:
        """What does not work, if anything: no multicast, a port in use, an address that just went. The mesh works without."""
        hosts, addresses, (tag, *others) = self._wanted
        announced = Announcement(tag, addresses, self._id, self._name, tuple(others))
        troubles = _troubles(hosts)
        working = [host for host in hosts if host not in troubles]
        try:
            if working:
                self.counters["opened"] += 1
                self._net = _Net(working, self._handle_found, self._handle_lost)
                await self._net.announce(self._instance, self._port, announced)
        except Exception as error:  # zeroconf's own checks raise other things than OSError
            await self._close()
            troubles = dict.fromkeys(hosts, str(error))
        if not troubles:
            return ""
        return f"mDNS does not work on {', '.join(troubles)}: {', '.join(dict.fromkeys(troubles.values()))}"

    def _try_again_later(self) -> None:
        """By and by: most problems go away by themselves."""
        self._reopen_at = asyncio.get_running_loop().time() + self._reopen_pause
        self._reopen_pause = min(REOPEN_MAX, 2 * self._reopen_pause)

    async def _close(self) -> None:
        net, self._net = self._net, None
        self._seen.clear()
        self._others.clear()
        if net is not None:
            self._closing = asyncio.get_running_loop().create_task(net.close(), name="gossip mDNS close")
        if self._closing is not None:
            await asyncio.shield(self._closing)  # being stopped meanwhile must not leave its sockets open

    def _handle_found(self, instance: str, announcement: Announcement) -> None:
        if instance == self._instance:
            self.counters["own"] += 1
            return
        if set(self._tags()).isdisjoint((announcement.tag, *announcement.others)):
            self.counters["foreign"] += 1
            if instance in self._others or len(self._others) < OTHERS_MAX:
                self._others[instance] = announcement
            return
        self._others.pop(instance, None)
        if instance not in self._seen and len(self._seen) >= SEEN_MAX:
            self.counters["refused"] += 1
            return
        self.counters["seen"] += 1
        known = self._seen.get(instance)
        if known is None or known.addresses != list(announcement.addresses):
            self._seen[instance] = _Seen(list(announcement.addresses), 0.0)
            self._wake.set()

    def _handle_lost(self, instance: str) -> None:
        self._seen.pop(instance, None)
        self._others.pop(instance, None)


def _troubles(hosts: Sequence[str]) -> dict[str, str]:
    """Why mDNS cannot work on some of these interfaces: zeroconf gives up all of them for one, or says nothing."""
    return {host: trouble for host in hosts if (trouble := _trouble(host))}


def _trouble(host: str) -> str:
    """Why the group cannot be joined from this address; empty if it can."""
    v6 = ":" in host
    try:
        with socket.socket(socket.AF_INET6 if v6 else socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((host, 0))
            if v6:
                [index] = [link.index for link in netlink.links() if host in (each.host for each in link.addresses)]
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, GROUP_V6 + struct.pack("=I", index))
            else:
                probe.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, GROUP_V4 + socket.inet_aton(host))
    except (OSError, ValueError) as error:  # ValueError: it just went
        return getattr(error, "strerror", None) or str(error)
    return ""


def _meshes(announced: Mapping[str, Announcement]) -> list[SeenMesh]:
    """Of what is announced by many, one for each mesh, by tag."""
    meshes: dict[str, SeenMesh] = {}
    for each in announced.values():
        known = meshes.get(each.tag, SeenMesh(tag=each.tag, addresses=()))
        meshes[each.tag] = SeenMesh(
            tag=each.tag,
            addresses=tuple(dict.fromkeys((*known.addresses, *each.addresses))),
            id=each.id or known.id,
            name=each.name or known.name,
        )
    return sorted(meshes.values(), key=lambda mesh: mesh.tag)


async def look_around(
    seconds: float, *, bind: str = "", listing: Callable[[], Sequence[Interface]] = interfaces
) -> list[SeenMesh]:
    """Which meshes are in sight: what is announced within so many seconds. Announces nothing itself."""
    announced: dict[str, Announcement] = {}
    wanted = search_hosts(await asyncio.to_thread(listing), bind)
    troubles = _troubles(wanted)
    hosts = [host for host in wanted if host not in troubles]
    if not hosts:
        return []
    try:
        net = _Net(hosts, announced.__setitem__, lambda instance: None)
    except Exception as error:
        log.warning("mDNS does not work on %s: %s", ", ".join(hosts), error)
        return []
    try:
        await asyncio.sleep(seconds)
    finally:
        await net.close()
    return _meshes(announced)
