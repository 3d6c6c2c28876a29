"""When to ask whom for the rows that pushes did not bring.

One random live peer every 1 to 5 seconds, up to 15 after three syncs in a row that brought nothing; a peer that has just come
alive at once; after a stall, whoever is alive, at once. At most one sync with a peer is under way. The rules of merging and
adopting are those of `replica.py`; this module only keeps the schedule and the pages of one sync apart from those of another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from meshq.ids import PeerId
from meshq.ledger.effects import SendSync, SyncPage, SyncRequest
from meshq.ledger.row import Vector
from meshq.ledger.timing import LedgerConfig

if TYPE_CHECKING:
    from random import Random

IDLE_AFTER = 3
SYNCS_MAX = 3  # under way at once: who comes back after a week needs its rows once, not from everybody


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
        self._noops = 0
        self._next_at = now + rng.uniform(config.sync_min, config.sync_max)

    def ask(self, peer: PeerId) -> None:
        """Sync with this peer as soon as few enough syncs are under way."""
        self._wanted[peer] = None

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

    def hurry(self, now: float) -> None:
        """Something could not be pushed: don't wait as long as after syncs that brought nothing."""
        self._noops = 0
        self._next_at = min(self._next_at, now + self._rng.uniform(self._config.sync_min, self._config.sync_max))

    def deadline(self) -> float:
        return min([self._next_at, *(sync.due for sync in self._underway.values())])

    def handle_timeout(self, now: float, alive: Sequence[PeerId]) -> None:
        """Give up on syncs that take too long; choose a peer for the next one if it is time."""
        for peer in [peer for peer, sync in self._underway.items() if sync.due <= now]:
            del self._underway[peer]
        if self._next_at > now:
            return
        idle = self._noops >= IDLE_AFTER or not alive
        low, high = (self._config.sync_max, self._config.sync_idle) if idle else (self._config.sync_min, self._config.sync_max)
        self._next_at = now + self._rng.uniform(low, high)
        if alive:
            self.ask(self._rng.choice(alive))
