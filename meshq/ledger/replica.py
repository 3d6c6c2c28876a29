"""The rows of all tasks, as this peer has them, and how replicas become equal.

Problem. Every peer writes at any time, messages are lost, doubled and reordered, and peers are away for weeks. In the end all
must hold the same rows, without an operation log, without tombstones, without a peer that must be asked.

Invariant. The vector is truthful: whatever dots it covers, their effects are in the rows (or their task was purged below the
floors). An (actor, seq) never names two different writes.

Algorithm (design section 5; rules by the names used there).
  R1 A write takes the next seq of this peer's actor, and changes the row, the row's vector and this peer's vector together.
  R2 A pushed row always merges. The vector advances only by pushed dots that follow what it covers without a gap.
  R3 A sync sends, from one state of the donor, all rows above the receiver's vector; the receiver adopts the donor's vector
     only after the last page, and not at all if it had to refuse a row on the way. The donor keeps nothing between pages:
     what was above the receiver's vector at the first page still is at the last, since rows only grow.
  R7 Floors are merged after each completed sync.
  Of a database that was lost, the others know later writes than its owner: then the owner takes a new ledger epoch, hence a
  new actor, and its old writes come back like a stranger's.

Limits. Rows, bytes of a row, facts of a row, actors; what exceeds them is refused and counted, and a sync that brought it is
not adopted. R4 to R6 (purging) are not here: nothing is purged.

Reading order: `create` and `add`, `absorb` and `cover`, `page` and `adopt`, `take_changes`.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from heapq import nsmallest
from itertools import pairwise

from meshq.config import SYNC_BYTES_MAX, SYNC_ROWS_MAX, TASKS_LIVE_MAX
from meshq.ids import (
    ACTOR_PEER_CHARS,
    ActorId,
    Dot,
    PeerId,
    TaskId,
    actor_id,
    actor_ledger_epoch,
    actor_peer_prefix,
    is_actor_id,
)
from meshq.ledger.effects import SyncPage, SyncRequest
from meshq.ledger.row import (
    Cancel,
    Claim,
    Fact,
    NumberRegister,
    Row,
    TextRegister,
    Vector,
    covers,
    merge,
    merge_vectors,
)
from meshq.ledger.table import RowTable, row_bytes
from meshq.task import TaskSpec

ROWS_MAX = 2 * TASKS_LIVE_MAX  # waiting and running ones, and as many that have ended
ROW_BYTES_MAX = SYNC_BYTES_MAX // 2  # a page must hold any row
FACTS_MAX = 4_096  # 100 retries and their losses, each with its five facts and some concurrent claims
REGISTER_MAX = 2**53  # what is counted up from there still fits every encoding
ACTORS_MAX = 16_384  # a peer that lost its database a thousand times over is one of the mesh's smaller problems


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What is in memory and not yet on disk."""

    rows: tuple[Row, ...]
    vector: Mapping[str, int]
    floors: Mapping[str, int]
    minted: int | None  # the new ledger epoch, if one was taken


class Replica:
    """All rows, this peer's vector and its floors."""

    def __init__(self, me: PeerId, ledger_epoch: int, rows: Iterable[Row], vector: Vector, floors: Vector) -> None:
        self._me = me
        self._actor = actor_id(me, ledger_epoch)
        self._table = RowTable(rows)
        self._vector = dict(vector)
        self._floors = dict(floors)
        self._dirty_rows: dict[TaskId, None] = {}
        self._dirty_vector: dict[ActorId, None] = {}
        self._dirty_floors: dict[ActorId, None] = {}
        self._minted: int | None = None
        self.counters: Counter[str] = Counter()
        for row in self._table.rows():
            self._detect_lost_database(row.vector)

    # ---- views

    @property
    def ledger_epoch(self) -> int:
        return actor_ledger_epoch(self._actor)

    @property
    def vector(self) -> Vector:
        return dict(self._vector)

    @property
    def floors(self) -> Vector:
        return dict(self._floors)

    @property
    def room(self) -> int:
        """How many more rows there may be."""
        return ROWS_MAX - len(self._table)

    def __len__(self) -> int:
        return len(self._table)

    def get(self, task: TaskId) -> Row | None:
        return self._table.get(task)

    def rows(self) -> Iterator[Row]:
        return self._table.rows()

    # ---- R1: writes of this peer

    def create(self, spec: TaskSpec, position: int) -> tuple[Dot, Row]:
        """The row of a new task."""
        birth = self._next_dot()
        row = Row(
            birth=birth,
            spec=spec,
            vector={birth.actor: birth.seq},
            queue=TextRegister(1, birth.actor, spec.queue),
            position=NumberRegister(1, birth.actor, position),
            priority=NumberRegister(1, birth.actor, spec.priority),
        )
        self._keep(row)
        return birth, row

    def add(self, task: TaskId, fact: Fact) -> Dot:
        """Write a fact into the task's row."""
        row = self._row(task)
        dot = self._next_dot()
        facts = tuple(sorted((*row.facts, (dot, fact)), key=lambda item: item[0]))
        self._keep(replace(row, facts=facts, vector=merge_vectors(row.vector, {dot.actor: dot.seq})))
        return dot

    # ---- R2: rows of others

    def absorb(self, row: Row) -> TaskId | None:
        """Merge a row that came from another peer; its task if that changed anything or nothing had to change, else None.

        None: the row was refused, nothing was changed, and a counter says why.
        """
        if broken := self._broken(row):
            self.counters[f"rows_refused_{broken}"] += 1
            return None
        task = row.task
        mine = self._table.get(task)
        if mine is not None and includes(mine.vector, row.vector):
            return task
        if mine is None and len(self._table) >= ROWS_MAX:
            self.counters["rows_refused_too_many"] += 1
            return None
        self._detect_lost_database(row.vector)
        self._keep(row if mine is None else merge(mine, row))
        return task

    def cover(self, dots: Iterable[Dot]) -> None:
        """Advance the vector by the dots that were pushed with their rows, as far as there is no gap."""
        for dot in sorted(dots):
            if self._vector.get(dot.actor, 0) == dot.seq - 1 and is_actor_id(dot.actor) and dot.actor != self._actor:
                self._vector[dot.actor] = dot.seq
                self._dirty_vector[dot.actor] = None

    def better(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Of the pushed rows those of which this peer knows more than the push, as many as one reply may hold."""
        room = SYNC_BYTES_MAX
        for row in rows:
            mine = self._table.get(row.task)
            if mine is not None and not includes(row.vector, mine.vector):
                room -= row_bytes(mine)
                if room < 0:
                    return
                yield mine

    # ---- R3, R7: syncs

    def page(self, request: SyncRequest) -> SyncPage:
        """The next rows that the receiver lacks. Nothing is remembered of the request."""
        upto = self.vector if request.upto is None else request.upto
        if request.upto is not None and not includes(self._vector, upto):
            # This peer restarted between two pages and had to give up a damaged row: the receiver must not adopt.
            return SyncPage(rows=(), upto={}, floors={}, last=True, requested=request.vector)
        rows: list[Row] = []
        size, last = 0, True
        for task in self._above(request.vector, request.after):
            size += self._table.size_of(task)
            if rows and (len(rows) == SYNC_ROWS_MAX or size > SYNC_BYTES_MAX):
                last = False
                break
            rows.append(self._row(task))
        return SyncPage(rows=tuple(rows), upto=upto, floors=self.floors, last=last, requested=request.vector)

    def adopt(self, upto: Vector, floors: Vector) -> None:
        """Take over the donor's vector and floors, now that all rows of the sync are here."""
        self._detect_lost_database(upto)
        for actor, seq in sorted(upto.items()):
            if actor != self._actor and seq > self._vector.get(actor, 0):
                self._vector[actor] = seq
                self._dirty_vector[actor] = None
        for actor, seq in sorted(floors.items()):
            if seq > self._floors.get(actor, 0):
                self._floors[actor] = seq
                self._dirty_floors[actor] = None

    # ---- for the shell

    def take_changes(self) -> Changes | None:
        """What must be committed since the last call; None if there is nothing."""
        if not (self._dirty_rows or self._dirty_vector or self._dirty_floors or self._minted):
            return None
        changes = Changes(
            rows=tuple(self._row(task) for task in self._dirty_rows),
            vector={actor: self._vector[actor] for actor in self._dirty_vector},
            floors={actor: self._floors[actor] for actor in self._dirty_floors},
            minted=self._minted,
        )
        self._dirty_rows, self._dirty_vector, self._dirty_floors, self._minted = {}, {}, {}, None
        return changes

    def check(self) -> None:
        """Assert that no row knows more of this peer's writes than this peer."""
        mine = self._vector.get(self._actor, 0)
        for row in self._table.rows():
            assert row.vector.get(self._actor, 0) <= mine, f"{row.task} has writes of the future"
            assert covers(row.vector, row.birth), f"{row.task} does not cover its birth"

    # ---- inside

    def _next_dot(self) -> Dot:
        seq = self._vector.get(self._actor, 0) + 1
        self._vector[self._actor] = seq
        self._dirty_vector[self._actor] = None
        return Dot(self._actor, seq)

    def _row(self, task: TaskId) -> Row:
        row = self._table.get(task)
        assert row is not None
        return row

    def _keep(self, row: Row) -> None:
        self._table.put(row)
        self._dirty_rows[row.task] = None

    def _above(self, vector: Vector, after: TaskId | None) -> list[TaskId]:
        """The first tasks, in order, after the given one, with a write that the vector does not cover: one more than fit."""
        return nsmallest(SYNC_ROWS_MAX + 1, (task for task in self._table.above(vector) if after is None or task > after))

    def _detect_lost_database(self, vector: Vector) -> None:
        """Take a new ledger epoch if somebody has seen writes of mine that I know nothing of."""
        if vector.get(self._actor, 0) <= self._vector.get(self._actor, 0):
            return
        mine = self._me[:ACTOR_PEER_CHARS]
        known = [actor for seen in (vector, self._vector, self._table.actors) for actor in seen if actor.startswith(mine)]
        self._minted = 1 + max(actor_ledger_epoch(actor) for actor in known)
        self._actor = actor_id(self._me, self._minted)
        self.counters["ledger_epochs_minted"] += 1

    def _broken(self, row: Row) -> str:
        """Why the row can't be taken over, in one word; empty if it can."""
        if len(row.facts) > FACTS_MAX or len(row.vector) > ACTORS_MAX or row_bytes(row) > ROW_BYTES_MAX:
            return "too_large"
        if new := [actor for actor in row.vector if actor not in self._table.actors]:
            if not all(is_actor_id(actor) for actor in new):
                return "malformed"
            if len(self._table.actors) + len(new) > ACTORS_MAX:
                return "too_many_actors"
        return "" if _well_formed(row) else "malformed"


def _well_formed(row: Row) -> bool:
    """Whether the facts are in order, covered by the vector, and speak of claims that the row has."""
    registers = (row.queue.revision, row.position.revision, row.priority.revision, row.position.value, row.priority.value)
    if any(abs(number) > REGISTER_MAX for number in registers):
        return False
    dots = [dot for dot, _ in row.facts]
    if any(first >= second for first, second in pairwise(dots)):
        return False
    if not all(dot.seq > 0 and covers(row.vector, dot) for dot in (row.birth, *dots)):
        return False
    claims = {dot: fact for dot, fact in row.facts if isinstance(fact, Claim)}
    if not all(
        actor_peer_prefix(dot.actor) == claim.peer[:ACTOR_PEER_CHARS] and claim.attempt > 0 for dot, claim in claims.items()
    ):
        return False
    return all(fact.claim in claims for _, fact in row.facts if not isinstance(fact, Claim | Cancel))


def includes(larger: Vector, smaller: Vector) -> bool:
    """Whether everything that the second covers is covered by the first."""
    return all(larger.get(actor, 0) >= seq for actor, seq in smaller.items())
