"""How this peer meets the others: by memory, seeds and mDNS, for as long as it takes; and how it remembers them.

None of the three is trusted: they only say where to ask, and who answers must have the mesh key. What was learnt is on disk a
second later, since after a power cut the memory of the failed is what brings a mesh together again.

It also follows this machine's own networks: an address that comes or goes is told to gossip and mDNS within a second, and a
network that comes back is used at once to call those that were lost with it. And when none of all this finds anybody, it says
what a person can do.
"""

import asyncio
import ipaddress
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Final

from meshq.errors import MeshqError, StoreError
from meshq.gossip import snapshot
from meshq.gossip.addresses import resolve_seed, told_addresses
from meshq.gossip.discovery import Discovery
from meshq.gossip.member import Address, Liveness
from meshq.gossip.netlink import Changes
from meshq.gossip.roster import KnownPeer
from meshq.gossip.transport import GossipShell
from meshq.peers import Peers
from meshq.seeds import Seeds
from meshq.settings import Settings

log = logging.getLogger("meshq.agent")

SEED_SECONDS: Final = 1.0  # between looks whether a seed should be asked
SAVE_SECONDS: Final = 60.0
SAVE_DELAY: Final = 1.0  # after a peer came or went: what was learnt must survive a SIGKILL
NETWORKS_SECONDS: Final = 15.0  # between looks at the interfaces, in case the kernel's news got lost
RECALL_MAX: Final = 8  # lost peers that are tried at once when a network comes back
RECALL_SECONDS: Final = 2.0  # between two such calls: a container that starts is a change of the networks, too
ALONE_SECONDS: Final = 10.0  # after which a person is told how to join other machines
ALONE_WATCH_SECONDS: Final = 1.0
OTHERS_MAX: Final = 3  # places of other meshes that are named


class Meeting:
    """One for an agent."""

    def __init__(
        self, *, settings: Settings, path: Path, gossip: GossipShell, peers: Peers, addresses: Callable[[], Sequence[Address]],
        clock: Callable[[], float], rng: Random, strangers: Callable[[], Collection[str]], on_forgotten: Callable[[], None],
    ) -> None:  # fmt: skip
        """`path`: the snapshot. `strangers`: the addresses, without port, that were called and answered with another mesh key.
        `on_forgotten`: peers that nobody has seen for a week are known no more."""
        self._settings = settings
        self._path = path
        self._gossip = gossip
        self._peers = peers
        self._addresses = addresses
        self._clock = clock
        self._rng = rng
        self._strangers = strangers
        self._on_forgotten = on_forgotten
        self._known: Sequence[KnownPeer] = ()
        self._discovery: Discovery | None = None
        self._members_changed = asyncio.Event()
        self._port = 0
        self._seeds = Seeds(settings.seeds, rng, clock())
        self._seed_problems: dict[str, str] = {}
        self._seed_addresses: dict[str, Sequence[Address]] = {}
        self._called_at = -RECALL_SECONDS
        self._alone_since: float | None = None

    def recall(self) -> None:
        """Read who was known when the agent ran last. Blocking, and before anything is decided about others."""
        self._known = snapshot.load(self._path, time.time())
        self._peers.remember(self._clock(), self._known)

    async def begin(self, *, tags: Callable[[], Sequence[str]], port: int) -> bool:
        """Ask everywhere once; whether there is anybody who might answer."""
        self._port = port
        self._gossip.remember(self._known)
        await self._ask_seeds()
        if self._settings.mdns:
            self._discovery = Discovery(
                tags=tags, instance=f"{self._gossip.core.me.boot:016x}", port=port, addresses=self._addresses,
                found=self._gossip.join, is_live=self._is_live, members=lambda: len(self._peers.others_alive()),
                bind=self._settings.bind or "",
            )  # fmt: skip
            await self._discovery.start()
        return bool(self._known or self._settings.seeds or self._settings.mdns)

    async def end(self) -> None:
        """Stop announcing; remember who is known now."""
        if self._discovery is not None:
            await self._discovery.stop()
        self._save(self._gossip.core.known_peers(self._clock()))

    def announce_anew(self) -> None:
        """The mesh has changed its keys, and so the tags by which its members know each other."""
        if self._discovery is not None:
            self._discovery.networks_changed()

    async def run(self) -> None:
        """Go on for as long as the agent lives."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._ask_again(), name="seeds")
            group.create_task(self._follow_networks(), name="networks")
            group.create_task(self._watch_for_others(), name="alone")
            group.create_task(self._remember_changes(), name="snapshot")

    @property
    def counters(self) -> Mapping[str, int]:
        return self._discovery.counters if self._discovery is not None else {}

    @property
    def searched(self) -> tuple[str, ...]:
        """The own addresses from whose networks mDNS searches now."""
        return self._discovery.hosts if self._discovery is not None else ()

    @property
    def mdns_problem(self) -> str:
        """Why mDNS does not work; empty if it does, or if it is not wanted, or if there is no network."""
        return self._discovery.problem if self._discovery is not None else ""

    @property
    def advice(self) -> str:
        """What a person can do about this peer being alone; empty if it is not, or not for long."""
        alone = self._alone_since
        if alone is None or self._clock() - alone < ALONE_SECONDS:
            return ""
        own = told_addresses(self._port, self._settings.bind or "")
        return advice_for_one_alone(self._settings, own, len(self._missed()), self.other_meshes)

    @property
    def other_meshes(self) -> tuple[str, ...]:
        """Where somebody has another mesh key: seeds that answer with it, then what mDNS sees."""
        strangers = self._strangers()
        seeds = [seed for seed, places in self._seed_addresses.items() if any(each.host in strangers for each in places)]
        own = told_addresses(self._port, self._settings.bind or "")
        seen = self._discovery.other_meshes if self._discovery is not None else ()
        return tuple(dict.fromkeys((*seeds, *(str(nearest(mesh.addresses, own)) for mesh in seen))))[:OTHERS_MAX]

    def handle_change(self) -> None:
        """A peer came, went or changed."""
        self._members_changed.set()

    async def _ask_again(self) -> None:
        while True:
            await asyncio.sleep(SEED_SECONDS)
            await self._ask_seeds()

    async def _follow_networks(self) -> None:
        """Tell gossip and mDNS of every change, when the kernel tells of it."""
        changes = Changes()
        gone: frozenset[str] | None = None
        try:
            while True:
                try:
                    self._readdress()
                except OSError as error:  # out of descriptors: the next look will do
                    log.warning("cannot look at this machine's networks: %s", error)
                if self._discovery is not None:
                    self._discovery.networks_changed(gone or ())
                if gone is not None:
                    self._call_the_missed()
                gone = await changes.wait(NETWORKS_SECONDS)
        finally:
            changes.close()

    def _readdress(self) -> None:
        """Without any address nobody can be told anyway, and most come back with the one they had."""
        addresses = tuple(self._addresses())
        if addresses and addresses != self._gossip.core.me.addresses:
            log.info("this machine's addresses are %s now", ", ".join(map(str, addresses)))
            self._gossip.readdress(addresses)

    def _call_the_missed(self) -> None:
        """A cable that is plugged in again brings back all that went with it: one of them is enough to hear of the others."""
        now = self._clock()
        if now - self._called_at < RECALL_SECONDS:
            return
        self._called_at = now
        missed = self._missed()
        chosen = self._rng.sample(missed, min(len(missed), RECALL_MAX))
        if addresses := [each[0] for each in chosen if each]:
            self._gossip.join(addresses)

    def _missed(self) -> list[tuple[Address, ...]]:
        """Where those were that are known, have not left, and are not alive."""
        core = self._gossip.core
        dead = [core.addresses(member.peer) for member in core.members() if member.liveness is Liveness.DEAD]
        return [*dead, *(member.addresses for member in self._peers.remembered())]

    async def _watch_for_others(self) -> None:
        """Say once what to do when nobody was there for a while; again only after somebody was."""
        told = False
        while True:
            if self._peers.others_alive():
                self._alone_since, told = None, False
            elif self._alone_since is None:
                self._alone_since = self._clock()
            elif not told and (advice := self.advice):
                told = True
                log.warning("%s", advice)
            await asyncio.sleep(ALONE_WATCH_SECONDS)

    async def _remember_changes(self) -> None:
        """Keep the snapshot as new as the beliefs; forget whom gossip has forgotten."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(SAVE_SECONDS):
                    await self._members_changed.wait()
            await asyncio.sleep(SAVE_DELAY)
            self._members_changed.clear()
            known = self._gossip.core.known_peers(self._clock())  # the core belongs to this thread, the disk to another
            self._forget(known)
            await asyncio.to_thread(self._save, known)

    async def _ask_seeds(self) -> None:
        """Those whose turn it is. Their names are resolved each time. A problem is told once, until it is another one."""
        for seed in self._seeds.due(self._clock(), len(self._peers.others_alive()), len(self._missed())):
            try:
                addresses = await resolve_seed(seed)
            except MeshqError as error:
                if self._seed_problems.get(seed) != str(error):
                    log.warning("%s", error)
                self._seed_problems[seed] = str(error)
                continue
            self._seed_problems.pop(seed, None)
            self._seed_addresses[seed] = addresses
            members = {address for peer in self._peers.others_alive() for address in self._gossip.core.addresses(peer)}
            self._gossip.join([address for address in addresses if address not in members])

    def _is_live(self, instance: str) -> bool:
        """Is who announces itself under this name a live member, or this peer?"""
        members = self._gossip.core.members()
        return any(f"{each.boot:016x}" == instance for each in members if each.liveness <= Liveness.SUSPECT)

    def _forget(self, known: Sequence[KnownPeer]) -> None:
        """No task waits any more for whom gossip has forgotten (a week after its death), no list shows it."""
        kept = {member.peer for member in self._gossip.core.members()} | {each.peer for each in known}
        if self._peers.forget_all_but(kept):
            self._on_forgotten()

    def _save(self, known: Sequence[KnownPeer]) -> None:
        try:
            snapshot.save(self._path, known, time.time())
        except StoreError as error:
            log.warning("%s", error)


def advice_for_one_alone(settings: Settings, addresses: Sequence[Address], missed: int, others: Sequence[str] = ()) -> str:
    """The exact commands that join this peer from another machine, and that move this one over to the mesh that was seen at
    `others`. Empty if nobody else can join, because `--bind` says loopback, and there is no other mesh."""
    silent = [seed for seed in settings.seeds if seed not in others]
    tried = [f"the seeds {', '.join(silent)} do not answer"] if silent else []
    tried += [f"none of the {missed} peers known before is there"] if missed else []
    tried += [] if settings.mdns else ["mDNS is off"]
    why = f" ({'; '.join(tried)})" if tried else ""
    if not addresses and not others:
        return "" if settings.bind else f"no other peer is in sight{why}: this machine has no network; check cable or Wi-Fi"
    return " ".join((f"no other peer is in sight{why}.", *_way_over(others, missed), *_way_here(settings, addresses)))


def _way_over(others: Sequence[str], missed: int) -> list[str]:
    if not others:
        return []
    renewed = ["If it is this mesh with a new key: meshq key install --key-file KEY; meshq key use ID."] if missed else []
    return [
        f"A mesh is in sight at {', '.join(others)}, but its key is another than this machine's. To move over, save what "
        "`meshq key` prints there into a file KEY here, and run here (what this machine has of its mesh is put aside): "
        f"meshq leave; meshq join --new --key-file KEY --seed {others[0]}.",
        *renewed,
    ]


def _way_here(settings: Settings, addresses: Sequence[Address]) -> list[str]:
    if not addresses:
        return []
    profile = "" if settings.profile == "lan" else f" --profile {settings.profile}"
    also = f"; this machine is also {', '.join(map(str, addresses[1:3]))}" if addresses[1:] else ""
    return [
        "To add a machine, save what `meshq key` prints here into a file KEY there, "
        f"and run there: meshq join --key-file KEY --seed {addresses[0]}{profile}{also}"
    ]


def nearest(addresses: Sequence[Address], own: Sequence[Address]) -> Address:
    """Of the addresses of another machine the one that is most like one of this machine's: it announces its bridges for
    containers and its tunnels, too."""
    return max(addresses, key=lambda address: max((_likeness(address.host, mine.host) for mine in own), default=0.0))


def _likeness(one: str, other: str) -> float:
    """How much of their beginnings is equal, from 0 to 1."""
    mine, theirs = ipaddress.ip_address(one), ipaddress.ip_address(other)
    if mine.version != theirs.version:
        return 0.0
    return 1 - (int(mine) ^ int(theirs)).bit_length() / mine.max_prefixlen
