"""When to ask whom for the rows that pushes did not bring.

One random live peer every 1 to 5 seconds, up to 15 after three syncs in a row that brought nothing; a peer that has just
come alive at once; after a stall, whoever is alive, at once; and a peer whose note, a hash of its version vector that gossip
carries, still differs from mine after what was on its way must have arrived. At most one sync with a peer is under way. The
rules of merging and adopting are those of `replica.py`; this module only keeps the schedule and the pages of one sync apart
from those of another.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

from meshq.ids import PeerId
from meshq.ledger.effects import SendSync, SyncPage, SyncRequest
from meshq.ledger.row import Vector
from meshq.ledger.timing import LedgerConfig

if TYPE_CHECKING:
    from random import Random

IDLE_AFTER = 3
NOTE_BYTES = 16
NOTE_PATIENCE = 2.0  # for pushes that are on their way when a note arrives
SYNCS_MAX = 3  # under way at once: who comes back after a week needs its rows once, not from everybody


def note_of(vector: Vector) -> bytes:
    """What two peers have in common that have the same rows, as far as they know."""
    text = "\n".join(f"{actor} {seq}" for actor, seq in sorted(vector.items()))
    return hashlib.blake2b(text.encode(), digest_size=NOTE_BYTES).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Underway:
    """A sync that is under way with one peer."""

    began_at: float
    due: float
    request: SyncRequest
    complete: bool  # no row of the pages so far was refused
    empty: bool  # no page so far brought a row


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What a page meant for its sync."""

    more: tuple[SendSync, ...]
    adopt: bool  # it was the last page, and every row was taken over
    began_at: float


class AntiEntropy:
    def __init__(self, config: LedgerConfig, rng: "Random", now: float) -> None:
        self._config = config
        self._rng = rng
        self._underway: dict[PeerId, _Underway] = {}
        self._wanted: dict[PeerId, None] = {}
        self._noted: dict[PeerId, tuple[bytes, float]] = {}  # and when to look whether it differs from mine
        self._noops = 0
        self._next_at = now + rng.uniform(config.sync_min, config.sync_max)

    def ask(self, peer: PeerId) -> None:
        """Sync with this peer as soon as few enough syncs are under way."""
        self._wanted[peer] = None

    def heed(self, now: float, peer: PeerId, note: bytes) -> None:
        """What the peer has, by its own word."""
        self._noted[peer] = (note, now + NOTE_PATIENCE)

    def begin(self, now: float, vector: Vector) -> list[SendSync]:
        """Begin the syncs that are wanted."""
        sends = []
        for peer in tuple(self._wanted):
            if len(self._underway) >= SYNCS_MAX:
                break
            del self._wanted[peer]
            if peer not in self._underway:
                request = SyncRequest(vector=vector)
                due = now + self._config.sync_timeout
                self._underway[peer] = _Underway(began_at=now, due=due, request=request, complete=True, empty=True)
                sends.append(SendSync(peer, request))
        return sends

    def handle_page(self, now: float, peer: PeerId, page: SyncPage, *, accepted: bool) -> Progress | None:
        """None if no sync with this peer waits for such a page. `accepted`: all of its rows were taken over."""
        sync = self._underway.get(peer)
        if sync is None or page.requested != sync.request.vector:
            return None
        complete, empty = sync.complete and accepted, sync.empty and not page.rows
        if page.last or not page.rows:
            del self._underway[peer]
            self._noops = self._noops + 1 if empty else 0
            return Progress(more=(), adopt=page.last and complete, began_at=sync.began_at)
        request = SyncRequest(vector=page.requested, after=page.rows[-1].task, upto=page.upto)
        self._underway[peer] = _Underway(
            began_at=sync.began_at, due=now + self._config.sync_timeout, request=request, complete=complete, empty=empty
        )
        return Progress(more=(SendSync(peer, request),), adopt=False, began_at=sync.began_at)

    def failed(self, peer: PeerId) -> None:
        """The peer did not answer, or is not alive any more."""
        self._underway.pop(peer, None)
        self._wanted.pop(peer, None)
        self._noted.pop(peer, None)

    def hurry(self, now: float) -> None:
        """Something could not be pushed: don't wait as long as after syncs that brought nothing."""
        self._noops = 0
        self._next_at = min(self._next_at, now + self._rng.uniform(self._config.sync_min, self._config.sync_max))

    def deadline(self) -> float:
        looks = min((due for _, due in self._noted.values()), default=inf)
        return min([self._next_at, looks, *(sync.due for sync in self._underway.values())])

    def handle_timeout(self, now: float, alive: Sequence[PeerId], vector: Vector) -> None:
        """Give up on syncs that take too long; choose a peer for the next one if it is time."""
        for peer in [peer for peer, (_, due) in self._noted.items() if due <= now]:
            note, _ = self._noted.pop(peer)
            if peer in alive and note != note_of(vector):
                self.ask(peer)
        for peer in [peer for peer, sync in self._underway.items() if sync.due <= now]:
            del self._underway[peer]
        if self._next_at > now:
            return
        idle = self._noops >= IDLE_AFTER or not alive
        low, high = (self._config.sync_max, self._config.sync_idle) if idle else (self._config.sync_min, self._config.sync_max)
        self._next_at = now + self._rng.uniform(low, high)
        if alive:
            self.ask(self._rng.choice(alive))
