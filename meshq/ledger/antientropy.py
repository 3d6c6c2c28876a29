"""When to ask whom for the rows that pushes did not bring, and the steps of each sync.

While the notes of two peers are equal (a hash of what each has, carried by gossip) they have nothing to ask each other. A peer
whose note still differs after what was on its way must have arrived is asked; one or two random peers whose notes differ or are
unknown every 1 to 5 seconds, up to 15 after three syncs in a row that brought nothing; a peer that has just come alive, and
after a stall whoever is alive, at once; and every 10 minutes a random one, whether its rows hash to the same as mine.

A sync opens with the hashes of the vector's parts. The answer is the donor's vector where those differ. If the donor knows
writes that this peer does not, they are pulled page by page; and if it has purged what this peer may lack (R6), or a pull was
broken off with its rows kept, all rows are compared instead (`reconcile.py`). The rules of merging and adopting are those of
`replica.py`, the other side is `donor.py`; this module keeps the schedule, and the steps of one sync apart from another's.

Limits. SYNCS_MAX syncs under way, of which one brings rows at a time, unless it has not answered for SLOW_SECONDS: who comes
back after a week needs its rows once, not from everybody. No sync lasts longer than SYNC_SECONDS.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import TYPE_CHECKING

from meshq.ids import PeerId, TaskId
from meshq.ledger.buckets import NOTE_BYTES, bucket_of
from meshq.ledger.effects import (
    Answer,
    SendSync,
    SyncBusy,
    SyncCompare,
    SyncOffer,
    SyncOpen,
    SyncOver,
    SyncPage,
    SyncPull,
    SyncRanges,
)
from meshq.ledger.reconcile import Inquiry, Reconciliation
from meshq.ledger.replica import Replica, below, sound
from meshq.ledger.row import Vector, covers, merge_vectors
from meshq.ledger.timing import LedgerConfig

if TYPE_CHECKING:
    from random import Random

IDLE_AFTER = 3
NOTE_PATIENCE = 2.0  # for pushes that are on their way when a note arrives
NEWS_PATIENCE = (0.05, 0.3)  # a write that a note names was not pushed to me: a little apart, or all ask its writer at once
SYNCS_MAX = 3
SLOW_SECONDS = 2.0
SYNC_SECONDS = 150.0  # 100,000 rows take 15; a donor drops those that it serves for 120
VERIFY_SECONDS = (450.0, 750.0)
BUSY_SECONDS = (0.5, 2.0)
REFUSALS_MAX = 2  # in a row, until the others are left in peace for a while
PARTNERS_MANY = 100  # peers alive: with more of them two are asked at a time


@dataclass(frozen=True, slots=True)
class _Opening:
    """What was known here when the hashes were sent; `verify`: compare the rows even if nothing differs."""

    vector: Vector
    verify: bool


@dataclass(frozen=True, slots=True)
class _Pulling:
    offer: SyncOffer
    known: Vector  # all that the donor knew when it made the offer
    vector: Vector  # mine, of the actors of whom the donor knows more
    at: int


@dataclass(frozen=True, slots=True)
class _Comparing:
    offer: SyncOffer
    known: Vector
    ranges: Reconciliation
    finishing: bool = False  # all rows are here, the floors are asked for


@dataclass(slots=True)
class _Underway:
    """A sync that is under way with one peer."""

    began_at: float
    number: int  # of the question that waits for its answer
    asked_at: float
    step: _Opening | _Pulling | _Comparing
    complete: bool = True  # no row so far was refused
    empty: bool = True  # no row so far came


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What an answer meant for its sync: ask more; or, at the end, adopt this and forget these.

    `absent` are tasks that the donor does not have although it had seen their births: it has purged them (R4). They are told
    also of a comparison that was refused a row: maybe for want of the room that they take.
    """

    began_at: float
    more: tuple[SendSync, ...] = ()
    adopt: Vector | None = None
    floors: Vector = field(default_factory=dict)
    absent: tuple[TaskId, ...] = ()


class AntiEntropy:
    def __init__(self, config: LedgerConfig, rng: "Random", replica: Replica, now: float) -> None:
        self._config = config
        self._rng = rng
        self._replica = replica
        self._alive: Sequence[PeerId] = ()
        self._underway: dict[PeerId, _Underway] = {}
        self._wanted: dict[PeerId, bool] = {}  # whether to verify
        self._notes: dict[PeerId, bytes] = {}
        self._look_at: dict[PeerId, float] = {}  # at the note, whether it differs from mine
        self._busy_until: dict[PeerId, float] = {}
        self._number = 0
        self._refusals = 0  # in a row, because donors were busy
        self._held_until = inf  # no wanted sync begins before, since another one brings rows
        self.counters: Counter[str] = Counter()
        self._noops = 0
        self._thorough: PeerId | None = None  # whose rows shall be compared even while the vectors differ
        self._broken_off = False  # a pull, with its rows kept: the next one would bring them all again
        self._next_at = now + rng.uniform(config.sync_min, config.sync_max)
        self._verify_at = now + rng.uniform(*VERIFY_SECONDS)

    # ---- inputs

    def ask(self, peer: PeerId) -> None:
        """Sync with this peer as soon as few enough syncs are under way."""
        self._wanted.setdefault(peer, False)

    def compare(self, peer: PeerId) -> None:
        """Compare all rows with this peer's: it may have some that are ahead of its vector, of which no other sync tells.

        One such wish at a time: whoever else has as many has mostly the same.
        """
        if self._thorough not in self._wanted and self._thorough not in self._underway:
            self._thorough = peer
            self._wanted[peer] = True

    def peers_changed(self, alive: Sequence[PeerId]) -> None:
        for peer in [peer for peer in self._alive if peer not in alive]:
            self.forget(peer)
        self._alive = alive

    def heed(self, now: float, peer: PeerId, note: bytes) -> None:
        """What the peer has, by its own word."""
        self._notes[peer] = note[:NOTE_BYTES]
        news = self._replica.buckets.names_news(note, self._replica.vector)
        due = now + (self._rng.uniform(*NEWS_PATIENCE) if news else NOTE_PATIENCE)
        self._look_at[peer] = min(due, self._look_at.get(peer, inf))

    def begin(self, now: float) -> list[SendSync]:
        """Begin the syncs that are wanted."""
        sends = []
        self._held_until = inf
        for peer in tuple(self._wanted):
            if self._rows_come(now):
                self._held_until = max(sync.asked_at for sync in self._underway.values()) + SLOW_SECONDS
                break
            if len(self._underway) >= SYNCS_MAX:
                break
            if peer not in self._underway:
                opening = _Opening(self._replica.vector, self._wanted.pop(peer))
                question = SyncOpen(number=self._next_number(), buckets=self._replica.buckets.pack())
                self._underway[peer] = _Underway(now, question.number, now, opening)
                sends.append(SendSync(peer, question))
        return sends

    def handle_rows(self, peer: PeerId, number: int, tasks: Iterable[TaskId], *, accepted: bool) -> None:
        """Rows of this peer's answer, those of these tasks, have been merged, or one of them was refused."""
        sync = self._underway.get(peer)
        if sync is None or sync.number != number:
            self._broken_off = True  # they came too late, and would again
            return
        sync.complete, sync.empty = sync.complete and accepted, False
        if isinstance(sync.step, _Comparing):
            for task in tasks:
                sync.step.ranges.arrived.pop(task, None)

    def handle_answer(self, now: float, peer: PeerId, answer: Answer) -> Progress | None:
        """The answer's rows have been merged. None if no sync with this peer waits for such an answer."""
        sync = self._underway.get(peer)
        if sync is None or answer.number != sync.number:
            return None
        match answer, sync.step:
            case SyncOffer(), _Opening() as opening:
                return self._offered(now, peer, sync, answer, opening)
            case SyncPage(), _Pulling() as pulling:
                return self._paged(now, peer, sync, answer, pulling)
            case SyncRanges(), _Comparing() as comparing:
                return self._compared(now, peer, sync, answer, comparing)
            case SyncBusy(), _:
                self._busy(now, peer)
            case SyncOver(), _:
                self._end(peer)
                self.ask(peer)
            case _:
                return None
        return Progress(began_at=sync.began_at)

    def failed(self, peer: PeerId, number: int) -> bool:
        """The peer did not answer the question of this number; False if that is not the one that waits for its answer."""
        sync = self._underway.get(peer)
        if sync is None or sync.number != number:
            return False
        self._drop(peer)
        return True

    def forget(self, peer: PeerId) -> None:
        """The peer is not alive any more."""
        self._drop(peer)
        self._notes.pop(peer, None)
        self._busy_until.pop(peer, None)

    def drop_all(self) -> None:
        """What was asked so far counts no more."""
        for peer in tuple(self._underway):
            self._end(peer)

    def hurry(self, now: float) -> None:
        """Something could not be pushed: don't wait as long as after syncs that brought nothing."""
        self._noops = 0
        self._next_at = min(self._next_at, now + self._rng.uniform(self._config.sync_min, self._config.sync_max))

    # ---- time

    def deadline(self) -> float:
        looks = min(self._look_at.values(), default=inf)
        return min(
            [self._next_at, self._verify_at, self._held_until, looks, *(self._due(sync) for sync in self._underway.values())]
        )

    def handle_timeout(self, now: float) -> None:
        """Give up on syncs that take too long; choose peers for the next ones if it is time."""
        for peer in [peer for peer, due in self._look_at.items() if due <= now]:
            del self._look_at[peer]
            if peer in self._alive and self._differs(peer):
                self.ask(peer)
        for peer in [peer for peer, sync in self._underway.items() if sync.asked_at + self._config.sync_timeout <= now]:
            self._end(peer)
        for peer in [peer for peer, sync in self._underway.items() if sync.began_at + SYNC_SECONDS <= now]:
            self._end(peer)
        if self._verify_at <= now:
            self._verify_at = now + self._rng.uniform(*VERIFY_SECONDS)
            if self._alive:
                self._wanted[self._rng.choice(self._alive)] = True
        if self._next_at <= now:
            self._routine(now)

    def _routine(self, now: float) -> None:
        self._busy_until = {peer: until for peer, until in self._busy_until.items() if until > now}
        idle = self._noops >= IDLE_AFTER or not self._alive
        low, high = (self._config.sync_max, self._config.sync_idle) if idle else (self._config.sync_min, self._config.sync_max)
        self._next_at = now + self._rng.uniform(low, high)
        taken = {**self._busy_until, **self._underway}
        others = [peer for peer in self._alive if self._differs(peer) and peer not in taken]
        partners = 2 if len(self._alive) > PARTNERS_MANY else 1
        for peer in self._rng.sample(others, min(partners, len(others))):
            self.ask(peer)

    def _due(self, sync: _Underway) -> float:
        """When something is to be done about it."""
        return min(sync.asked_at + self._config.sync_timeout, sync.began_at + SYNC_SECONDS)

    # ---- inside: the steps of one sync

    def _offered(self, now: float, peer: PeerId, sync: _Underway, offer: SyncOffer, opening: _Opening) -> Progress:
        self._refusals = 0
        if not (sound(offer.vector) and sound(offer.floors) and sound(offer.yours)):
            return self._give_up(peer, sync)
        self._replica.detect_lost_database(offer.vector)
        self._replica.detect_lost_database(offer.yours)
        mine = self._replica.vector
        wanted = {actor: mine.get(actor, 0) for actor, seq in offer.vector.items() if seq > mine.get(actor, 0)}
        verify = opening.verify and (not offer.parts or peer == self._thorough)
        if not (wanted or verify):
            return self._completed(peer, sync, offer, offer.floors)
        if self._rows_come(now):
            self._end(peer)
            self._wanted[peer] = opening.verify
            return Progress(began_at=sync.began_at)
        differing = frozenset(offer.parts)
        same = {actor: seq for actor, seq in opening.vector.items() if bucket_of(actor) not in differing}
        known = {**same, **offer.vector}
        if verify or self._broken_off or below(mine, offer.vector, offer.floors):
            return self._compare(now, peer, sync, offer, known)
        sync.step = _Pulling(offer, known, wanted, at=0)
        return self._next(now, peer, sync, SyncPull(number=self._next_number(), run=offer.run, vector=wanted))

    def _paged(self, now: float, peer: PeerId, sync: _Underway, page: SyncPage, pulling: _Pulling) -> Progress:
        if page.below:
            return self._compare(now, peer, sync, pulling.offer, pulling.known)
        if not sound(page.floors) or (not page.last and page.at <= pulling.at):
            return self._give_up(peer, sync)
        if page.last:
            return self._completed(peer, sync, pulling.offer, merge_vectors(pulling.offer.floors, page.floors))
        sync.step = replace(pulling, at=page.at)
        question = SyncPull(number=self._next_number(), run=pulling.offer.run, vector=pulling.vector, at=page.at)
        return self._next(now, peer, sync, question)

    def _compare(self, now: float, peer: PeerId, sync: _Underway, offer: SyncOffer, known: Vector) -> Progress:
        self.counters["syncs_comparing_all_rows"] += 1
        sync.step = _Comparing(offer, known, Reconciliation(self._replica.fingerprints, self._replica.watch()))
        return self._next(now, peer, sync, self._comparison(offer, sync.step.ranges.ask()))

    def _compared(self, now: float, peer: PeerId, sync: _Underway, told: SyncRanges, comparing: _Comparing) -> Progress:
        ranges, offer = comparing.ranges, comparing.offer
        if not sound(told.floors) or not (comparing.finishing or ranges.heed(told)):
            return self._give_up(peer, sync)
        ask = ranges.ask()
        if ask is None and (comparing.finishing or told.equal):
            return self._completed(peer, sync, offer, told.floors, self._purged_there(comparing))
        sync.step = replace(comparing, finishing=ask is None)
        return self._next(now, peer, sync, self._comparison(offer, ask))

    def _comparison(self, offer: SyncOffer, ask: Inquiry | None) -> SyncCompare:
        """With nothing left to ask it asks for the floors."""
        ask = ask or Inquiry()
        return SyncCompare(
            number=self._next_number(), run=offer.run,
            root=ask.root, prefixes=ask.prefixes, wanted=ask.wanted, tasks=ask.tasks,
        )  # fmt: skip

    def _purged_there(self, comparing: _Comparing) -> tuple[TaskId, ...]:
        """What the donor does not have although it knew of its birth before it was asked."""
        rows = (self._replica.get(task) for task in comparing.ranges.absent)
        return tuple(row.task for row in rows if row is not None and covers(comparing.known, row.birth))

    def _completed(
        self, peer: PeerId, sync: _Underway, offer: SyncOffer, floors: Vector, absent: tuple[TaskId, ...] = ()
    ) -> Progress:
        """The last answer: everything is here, unless a row was refused on the way."""
        self._end(peer)
        self._broken_off = not (sync.complete or sync.empty)
        self._noops = self._noops + 1 if sync.empty and not absent else 0
        if not sync.complete:
            return Progress(began_at=sync.began_at, absent=absent)
        return Progress(began_at=sync.began_at, adopt=offer.vector, floors=floors, absent=absent)

    def _next(self, now: float, peer: PeerId, sync: _Underway, question: SyncPull | SyncCompare) -> Progress:
        sync.number, sync.asked_at = question.number, now
        return Progress(began_at=sync.began_at, more=(SendSync(peer, question),))

    def _busy(self, now: float, peer: PeerId) -> None:
        """Try another one at once, but not many of them in a row; this one again in a while."""
        self._end(peer)
        self._refusals += 1
        until = now + self._rng.uniform(*BUSY_SECONDS)
        self._busy_until[peer] = self._look_at[peer] = until
        others = [each for each in self._alive if each not in self._underway and self._busy_until.get(each, now) <= now]
        others = [each for each in others if self._differs(each)]
        if others and self._refusals <= REFUSALS_MAX:
            self.ask(self._rng.choice(others))

    def _give_up(self, peer: PeerId, sync: _Underway) -> Progress:
        self.counters["syncs_given_up_on_nonsense"] += 1
        self._end(peer)
        return Progress(began_at=sync.began_at)

    def _drop(self, peer: PeerId) -> None:
        self._end(peer)
        self._wanted.pop(peer, None)
        self._look_at.pop(peer, None)

    def _end(self, peer: PeerId) -> None:
        sync = self._underway.pop(peer, None)
        if sync is not None and isinstance(sync.step, _Pulling) and not sync.empty:
            self._broken_off = True
        if sync is not None and isinstance(sync.step, _Comparing):
            self._replica.unwatch(sync.step.ranges.arrived)

    def _next_number(self) -> int:
        self._number += 1
        return self._number

    def _rows_come(self, now: float) -> bool:
        """Whether a sync is bringing rows: then no other begins to."""
        bringing = (sync for sync in self._underway.values() if not isinstance(sync.step, _Opening))
        return any(now < sync.asked_at + SLOW_SECONDS for sync in bringing)

    def _differs(self, peer: PeerId) -> bool:
        """Whether the peer may have something else than this one."""
        return self._notes.get(peer) != self._replica.note
