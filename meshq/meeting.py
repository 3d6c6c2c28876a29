"""How this peer meets the others: by memory, seeds and mDNS, for as long as it takes; and how it remembers them.

None of the three is trusted: they only say where to ask, and who answers must have the mesh key. What was learnt is on disk a
second later, since after a power cut the memory of the failed is what brings a mesh together again.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from meshq.errors import MeshqError, StoreError
from meshq.gossip import snapshot
from meshq.gossip.addresses import resolve_seed
from meshq.gossip.discovery import Discovery
from meshq.gossip.member import Address
from meshq.gossip.roster import KnownPeer
from meshq.gossip.transport import GossipShell
from meshq.peers import Peers
from meshq.settings import Settings

log = logging.getLogger("meshq.agent")

SEED_PAUSE_MAX: Final = 30.0
SAVE_SECONDS: Final = 60.0
SAVE_DELAY: Final = 1.0  # after a peer came or went: what was learnt must survive a SIGKILL


class Meeting:
    """One for an agent."""

    def __init__(
        self, *, settings: Settings, path: Path, gossip: GossipShell, peers: Peers, addresses: Callable[[], Sequence[Address]],
        clock: Callable[[], float], on_forgotten: Callable[[], None],
    ) -> None:  # fmt: skip
        """`path`: the snapshot. `on_forgotten`: peers that nobody has seen for a week are known no more."""
        self._settings = settings
        self._path = path
        self._gossip = gossip
        self._peers = peers
        self._addresses = addresses
        self._clock = clock
        self._on_forgotten = on_forgotten
        self._known: Sequence[KnownPeer] = ()
        self._discovery: Discovery | None = None
        self._members_changed = asyncio.Event()

    def recall(self) -> None:
        """Read who was known when the agent ran last. Blocking, and before anything is decided about others."""
        self._known = snapshot.load(self._path, time.time())
        self._peers.remember(self._clock(), self._known)

    async def begin(self, *, tag: str, port: int, loopback: bool) -> bool:
        """Ask everywhere once; whether there is anybody who might answer."""
        self._gossip.remember(self._known)
        await self._ask_seeds()
        if self._settings.mdns:
            self._discovery = Discovery(
                tag=tag, port=port, addresses=self._addresses, found=self._gossip.join,
                is_live=self._is_live, loopback=loopback,
            )  # fmt: skip
            await self._discovery.start()
        return bool(self._known or self._settings.seeds or self._settings.mdns)

    async def end(self) -> None:
        """Stop announcing; remember who is known now."""
        if self._discovery is not None:
            await self._discovery.stop()
        self._save(self._gossip.core.known_peers(self._clock()))

    @property
    def counters(self) -> Mapping[str, int]:
        return self._discovery.counters if self._discovery is not None else {}

    def handle_change(self) -> None:
        """A peer came, went or changed."""
        self._members_changed.set()

    async def ask_seeds_while_alone(self) -> None:
        """A seed may start later than this peer, its name may mean another address tomorrow, and a mesh that was split heals
        through its seeds: as long as nobody is there they are asked again, after 1, 2, 4 … 30 s."""
        pause = 1.0
        while True:
            await asyncio.sleep(pause)
            alone = not self._peers.others_alive()
            pause = min(SEED_PAUSE_MAX, 2 * pause) if alone else 1.0
            if alone:
                await self._ask_seeds()

    async def remember_changes(self) -> None:
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
        for seed in self._settings.seeds:
            try:
                self._gossip.join(await resolve_seed(seed))
            except MeshqError as error:
                log.warning("seed %s: %s", seed, error)

    def _is_live(self, address: Address) -> bool:
        core = self._gossip.core
        live = self._peers.others_alive()
        return address in core.me.addresses or any(address in core.addresses(peer) for peer in live)

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
