"""Answering the syncs of others: what a peer lacks that asks for it.

A peer is first told where the vectors differ (`SyncOpen`); it then pulls the rows above its own (`SyncPull`, R3), page by page,
or, if this peer has purged what it may lack, compares all rows (`SyncCompare`, R6).

What makes a pull whole is that its list of rows is made once, after the vector that the asker will adopt was told, and that a
row which is purged before its page is sent makes the asker compare, unless it had every write of that row: the floors are
looked at for each page. Nothing else is remembered of an asker, and nothing at all in a comparison.

Limits. INBOUND_MAX peers at a time pull or compare, for at most SERVE_SECONDS at a stretch; others are told to come later, at
once. So a slow peer holds one of the places for that long, and two slow ones hold up none but those who insist on this donor.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, assert_never

from meshq.config import SYNC_BYTES_MAX, SYNC_ROWS_MAX
from meshq.errors import MalformedData
from meshq.ids import PeerId, TaskId
from meshq.ledger import reconcile
from meshq.ledger.buckets import BUCKETS_BYTES, differing, part
from meshq.ledger.effects import (
    Answer,
    Question,
    SyncBusy,
    SyncCompare,
    SyncOffer,
    SyncOpen,
    SyncOver,
    SyncPage,
    SyncPull,
    SyncRanges,
)
from meshq.ledger.replica import Replica
from meshq.ledger.row import Vector

INBOUND_MAX: Final = 2  # peers served at once (corrosion has 3, and answers the rest as bluntly)
ANSWER_ROW_BYTES_MAX: Final = SYNC_BYTES_MAX // 4  # of several rows: over 0.25 Mbit/s they take less than `sync_timeout`
SERVE_IDLE_SECONDS: Final = 10.0  # without a next question: the asker is gone, or content
SERVE_SECONDS: Final = 120.0  # 100,000 rows take 15


@dataclass(slots=True)
class _Place:
    """Held by a peer that is served."""

    since: float
    asked_at: float


@dataclass(frozen=True, slots=True)
class _Pull:
    """What a peer pulls: the tasks whose rows have a write above its vector, as of the first page."""

    vector: Vector
    tasks: tuple[TaskId, ...]


class Donor:
    def __init__(self, replica: Replica, run: int) -> None:
        """`run` tells the life of this process from an earlier one, which may have known more."""
        self._replica = replica
        self._run = run
        self._places: dict[PeerId, _Place] = {}
        self._pulls: dict[PeerId, _Pull] = {}
        self.counters: Counter[str] = Counter()

    def answer(self, now: float, peer: PeerId, question: Question) -> Answer:
        """MalformedData if it is no sensible question; nothing was changed."""
        match question:
            case SyncOpen():
                return self._offer(peer, question)
            case SyncPull() | SyncCompare():
                if question.run != self._run:
                    return SyncOver(number=question.number)
                if isinstance(question, SyncCompare):
                    _check(question)
                if not self._admit(now, peer):
                    self.counters["syncs_refused_busy"] += 1
                    return SyncBusy(number=question.number)
                return self._page(peer, question) if isinstance(question, SyncPull) else self._compare(peer, question)
            case _:
                assert_never(question)

    def forget(self, peer: PeerId) -> None:
        """It is content, or not alive any more."""
        self._places.pop(peer, None)
        self._pulls.pop(peer, None)

    # ---- inside

    def _admit(self, now: float, peer: PeerId) -> bool:
        for other, place in list(self._places.items()):
            if place.asked_at + SERVE_IDLE_SECONDS <= now or place.since + SERVE_SECONDS <= now:
                del self._places[other]
                if other != peer:
                    self._pulls.pop(other, None)
        if peer not in self._places and len(self._places) >= INBOUND_MAX:
            return False
        self._places.setdefault(peer, _Place(now, now)).asked_at = now
        return True

    def _offer(self, peer: PeerId, question: SyncOpen) -> SyncOffer:
        if len(question.buckets) != BUCKETS_BYTES:
            raise MalformedData("a sync opens with the wrong number of hashes")
        replica = self._replica
        where = differing(question.buckets, replica.buckets.pack())
        vector = part(replica.vector, where)
        settings = replica.settings if any(actor in vector for actor in replica.settings.vector) else None
        floors = part(replica.floors, where)
        return SyncOffer(
            number=question.number, run=self._run, parts=tuple(sorted(where)), vector=vector, floors=floors, settings=settings,
            yours=replica.beyond_vector(peer),
        )  # fmt: skip

    def _page(self, peer: PeerId, question: SyncPull) -> SyncPage | SyncOver:
        pull = self._pulls.get(peer)
        if question.at == 0:
            above = self._replica.above({**self._replica.vector, **question.vector})
            pull = self._pulls[peer] = _Pull(question.vector, tuple(above))
        if pull is None or pull.vector != question.vector or not 0 <= question.at <= len(pull.tasks):
            self.forget(peer)
            return SyncOver(number=question.number)
        if self._replica.below_floors(question.vector):
            self._pulls.pop(peer)
            return SyncPage(number=question.number, below=True)
        answer = _Message()
        at = question.at
        while at < len(pull.tasks) and answer.has_room_for(self._replica, pull.tasks[at]):
            answer.add(self._replica, pull.tasks[at])
            at += 1
        if at < len(pull.tasks):
            return SyncPage(number=question.number, rows=answer.rows(), at=at, last=False)
        self.forget(peer)
        floors = _only(self._replica.floors, question.vector)
        return SyncPage(number=question.number, rows=answer.rows(), at=at, floors=floors)

    def _compare(self, peer: PeerId, question: SyncCompare) -> SyncRanges:
        prints = self._replica.fingerprints
        equal = question.root == prints.root()
        if equal or not (question.prefixes or question.wanted or question.tasks):
            self.forget(peer)
            return SyncRanges(number=question.number, equal=equal, floors=self._replica.floors)
        answer = _Message()
        absent = []
        tasks_served = 0
        for task in question.tasks:
            if not answer.has_room_for(self._replica, task):
                break
            tasks_served += 1
            if not answer.add(self._replica, task):
                absent.append(task)
        wants_served, stale = self._serve_wants(question.wanted, answer)
        ranges = []
        for prefix in question.prefixes:
            if prints.is_leaf(prefix):
                ranges.append((True, b"".join(prints.shorts(prefix))))
            else:
                ranges.append((False, b"".join(each.to_bytes(reconcile.PRINT_BYTES) for each in prints.parts(prefix))))
        return SyncRanges(
            number=question.number, ranges=tuple(ranges), rows=answer.rows(), wants_served=wants_served,
            tasks_served=tasks_served, stale=tuple(stale), absent=tuple(absent),
        )  # fmt: skip

    def _serve_wants(self, wanted: Iterable[tuple[str, bytes]], answer: "_Message") -> tuple[int, dict[str, None]]:
        """How many of the wanted rows were looked for, and in which ranges one was not found."""
        shorts: dict[str, dict[bytes, TaskId]] = {}
        stale: dict[str, None] = {}
        served = 0
        for prefix, short in wanted:
            if prefix not in shorts:  # one that has grown is to be asked for by its parts: to hash it may take a second
                prints = self._replica.fingerprints
                shorts[prefix] = prints.shorts(prefix) if prints.is_leaf(prefix) else {}
            task = shorts[prefix].get(short)
            if task is None:
                stale[prefix] = None
            elif not answer.has_room_for(self._replica, task):
                break
            else:
                answer.add(self._replica, task)
            served += 1
        return served, stale


class _Message:
    """The rows of one answer. The first always fits."""

    def __init__(self) -> None:
        self._rows: dict[TaskId, bytes] = {}
        self._bytes = 0

    def has_room_for(self, replica: Replica, task: TaskId) -> bool:
        if not self._rows or task in self._rows or not replica.has(task):
            return True
        return len(self._rows) < SYNC_ROWS_MAX and self._bytes + replica.size_of(task) <= ANSWER_ROW_BYTES_MAX

    def add(self, replica: Replica, task: TaskId) -> bool:
        """False if there is no such row (any more)."""
        if not replica.has(task):
            return False
        if task not in self._rows:
            self._rows[task] = replica.packed(task)
            self._bytes += len(self._rows[task])
        return True

    def rows(self) -> tuple[bytes, ...]:
        return tuple(self._rows.values())


def _check(question: SyncCompare) -> None:
    """MalformedData if it asks for more than it may, or for what is no range."""
    many = len(question.prefixes) > reconcile.RANGES_MAX or max(len(question.wanted), len(question.tasks)) > reconcile.ROWS_MAX
    prefixes = (*question.prefixes, *(prefix for prefix, _ in question.wanted))
    if many or not all(map(reconcile.is_prefix, prefixes)):
        raise MalformedData("a comparison asks for too much, or for what is no range of ids")


def _only(floors: Vector, actors: Vector) -> Vector:
    return {actor: seq for actor, seq in floors.items() if actor in actors}
