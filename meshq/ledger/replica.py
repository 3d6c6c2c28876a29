"""The rows of all tasks, as this peer has them, and how replicas become equal.

Problem. Every peer writes at any time, messages are lost, doubled and reordered, and peers are away for weeks. In the end all
must hold the same rows, without an operation log, without tombstones, without a peer that must be asked.

Invariant. The vector is truthful: whatever dots it covers, their effects are in the rows (or their task was purged below the
floors). An (actor, seq) never names two different writes.

Algorithm (design section 5; rules by the names used there).
  R1 A write takes the next seq of this peer's actor, and changes the row, the row's vector and this peer's vector together.
  R2 A pushed row always merges. The vector advances only by pushed dots that follow what it covers without a gap.
  R3 A sync sends, from one state of the donor, all rows above the receiver's vector; the receiver adopts the donor's vector
     only after the last page, and not at all if it had to refuse a row on the way (`donor.py`, `antientropy.py`).
  R4 A row that is absent while the vector covers its birth was purged: such a row is dropped when it comes, and the floors rise
     to its vector, so that nobody takes over this peer's vector without having seen what was dropped.
  R5 Only rows are purged of which all writes are covered. The floors rise to the row's vector, and nothing else remains of it:
     no tombstones, so peers that never return cost nothing.
  R6 A peer that has not seen all that the donor's floors cover may have unfinished what the donor has purged. All rows are
     compared: it takes the donor's, forgets of its own those that the donor does not have though it has seen their births, and
     adopts vector and floors. An old copy of a purged row that a late push brings meanwhile is asked for, too.
     A floor counts only as far as its owner's vector goes, for no more is adopted from there; so a floor that a liar has raised
     beyond all writes costs comparisons, and loses nothing.
  R7 Floors are merged after each completed sync, as far as it told them (all of them in R6).
  Of a database that was lost, the others know later writes than its owner: then the owner takes a new ledger epoch, hence a
  new actor, and its old writes come back like a stranger's. What others say drives it so far and no further (`_mint`).

Limits. Rows, bytes of a row, facts of a row, actors; what exceeds them is refused and counted, and a sync that brought it is
not adopted. What never happens in a sound mesh is counted as a bug: a seen write that its row lacks, two rows of the same
writes that differ. Both are mended by the merge.

Reading order: `create` and `add`, `absorb` and `cover`, `adopt`, `purge`, `take_changes`.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from meshq.config import SYNC_BYTES_MAX, TASKS_LIVE_MAX
from meshq.errors import StoreError
from meshq.ids import (
    ACTOR_PEER_CHARS,
    LEDGER_EPOCH_MAX,
    ActorId,
    Dot,
    PeerId,
    TaskId,
    actor_id,
    actor_ledger_epoch,
    actor_peer_prefix,
    is_actor_id,
    task_id,
)
from meshq.ledger.buckets import Buckets
from meshq.ledger.effects import Contents, Grant
from meshq.ledger.reconcile import Fingerprints
from meshq.ledger.row import (
    REGISTER_MAX,
    Cancel,
    Claim,
    Ended,
    Fact,
    NumberRegister,
    Row,
    Seat,
    TextRegister,
    Vector,
    covers,
    merge,
    merge_vectors,
    moved,
)
from meshq.ledger.settings import NOTHING_SET, Settings, broken, changed, check_change, merge_settings
from meshq.ledger.table import RowTable, row_bytes
from meshq.task import Isolation, TaskSpec

if TYPE_CHECKING:
    from random import Random

ROWS_MAX = 2 * TASKS_LIVE_MAX  # waiting and running ones, and as many that have ended
ROW_BYTES_MAX = SYNC_BYTES_MAX  # a page must hold any row
ROW_BYTES_FULL = 3 * 2**17  # nobody adds attempts beyond. Two sides of a cut may each have filled a row: it must still be taken
FACTS_MAX = 8_192
FACTS_FULL = 3_072  # as ROW_BYTES_FULL: 100 retries and their losses, each with its five facts and some concurrent claims
CLAIMS_OF_ATTEMPT_MAX = 512  # so many machines must each be cut off from all others to claim the same attempt of a task
VOTERS_MAX = 5  # two may be gone; more would only cost messages
EPOCH_STEP_MAX = 2**20  # a new ledger epoch is so much above the last: of two copies of a home both take one
EPOCH_AHEAD_MAX = 256 * EPOCH_STEP_MAX  # a home that was restored, or lost but for its key, has missed fewer new epochs
EPOCHS_SHARE = 3  # in one life of a process nobody is believed that says more than a third of what is left was used up
EPOCH_STEPS_MIN = 4_096  # so many steps, at least, are left to go in what is left
ACTORS_MAX = 16_384  # a peer that lost its database a thousand times over is one of the mesh's smaller problems


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What is in memory and not yet on disk."""

    rows: tuple[Row, ...]
    vector: Mapping[str, int]
    floors: Mapping[str, int]
    minted: int | None  # the new ledger epoch, if one was taken
    settings: Settings | None = None  # if they have changed
    purged: tuple[TaskId, ...] = ()


class Replica:
    """All rows, this peer's vector and its floors."""

    def __init__(
        self, me: PeerId, ledger_epoch: int, rows: Iterable[Row], vector: Vector, floors: Vector,
        settings: Settings = NOTHING_SET, rng: "Random | None" = None,
    ) -> None:  # fmt: skip
        """`rng` draws new ledger epochs; without it they are counted, which is right only where no disk is ever copied."""
        self._me = me
        self._rng = rng
        self._actor = actor_id(me, ledger_epoch)
        self._epoch_most = ledger_epoch + min(EPOCH_AHEAD_MAX, (LEDGER_EPOCH_MAX - ledger_epoch) // EPOCHS_SHARE)
        self._table = RowTable(rows)
        self._vector = dict(vector)
        self._floors = dict(floors)
        self._settings = settings
        self._dirty_settings = False
        self.buckets = Buckets(self._vector)
        self._purged: dict[TaskId, None] = {}
        self._watching: list[dict[TaskId, None]] = []
        self._dirty_rows: dict[TaskId, None] = {}
        self._dirty_vector: dict[ActorId, None] = {}
        self._dirty_floors: dict[ActorId, None] = {}
        self._minted: int | None = None
        self.trusted = True  # False: the next write takes a new ledger epoch (`authorship.py`)
        self.counters: Counter[str] = Counter()
        self.detect_lost_database(self._table.highest())
        self.detect_lost_database(settings.vector)

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
    def settings(self) -> Settings:
        return self._settings

    @property
    def note(self) -> bytes:
        """A hash of what this peer has seen: peers with equal notes have nothing to ask each other."""
        return self.buckets.note()

    @property
    def fingerprints(self) -> Fingerprints:
        return self._table.fingerprints

    def has(self, task: TaskId) -> bool:
        return task in self._table

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

    def starting_with(self, prefix: str) -> Iterator[TaskId]:
        """The tasks whose ids begin so, in order."""
        return self._table.starting_with(prefix)

    # ---- R1: writes of this peer

    @property
    def actor(self) -> ActorId:
        """As whom this peer writes now."""
        return self._actor

    def settle_author(self) -> None:
        """From here on `actor` is the one that writes."""
        if not self.trusted:
            self._mint(self._vector)

    @property
    def next_task(self) -> TaskId:
        """What `create` will call the task, if it is the next write."""
        return task_id(Dot(self._actor, self._vector.get(self._actor, 0) + 1))

    def create(self, spec: TaskSpec, position: int, voters: tuple[ActorId, ...] = ()) -> tuple[Dot, Row]:
        """The row of a new task."""
        birth = self._next_dot()
        row = Row(
            birth=birth,
            spec=spec,
            vector={birth.actor: birth.seq},
            queue=TextRegister(1, birth.actor, spec.queue),
            position=NumberRegister(1, birth.actor, position),
            priority=NumberRegister(1, birth.actor, spec.priority),
            voters=voters,
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

    def move(self, task: TaskId, seat: Seat) -> Dot:
        """Let the task wait elsewhere."""
        dot = self._next_dot()
        self._keep(moved(self._row(task), dot, seat))
        return dot

    def change_settings(self, values: Mapping[str, str]) -> Dot:
        """One write that sets all of these. UsageError or TaskFailed as `check_change`; then nothing was changed."""
        check_change(self._settings, values)
        dot = self._next_dot()
        self._settings = changed(self._settings, dot, values)
        self._dirty_settings = True
        return dot

    # ---- R2: rows of others

    def absorb(self, row: Row) -> TaskId | None:
        """Merge a row that came from another peer; its task if that changed anything or nothing had to change, else None.

        None: the row was refused, nothing was changed, and a counter says why. The row of a purged task changes the floors.
        """
        if broken := self._broken(row):
            self.counters[f"rows_refused_{broken}"] += 1
            return None
        task = row.task
        mine = self._table.get(task)
        if mine is not None and includes(mine.vector, row.vector) and not self._contradict(mine, row):
            return task
        if mine is None and len(self._table) >= ROWS_MAX and not self.is_forgotten(row):
            self.counters["rows_refused_too_many"] += 1
            return None
        self.detect_lost_database(row.vector)
        if self.is_forgotten(row):
            self.counters["rows_of_purged_tasks_dropped"] += 1
            self._raise_floors(row.vector)
            return task
        if mine is not None and self._should_know(mine, row.vector):
            self.counters["bug_covered_writes_were_missing"] += 1
        for arrived in self._watching if mine is None else ():
            arrived[task] = None
        self._keep(row if mine is None else merge(mine, row))
        return task

    def absorb_settings(self, settings: Settings) -> bool:
        """Merge the settings of another peer. False: they were refused, nothing was changed, and a counter says why."""
        if why := broken(settings):
            self.counters[f"settings_refused_{why}"] += 1
            return False
        if includes(self._settings.vector, settings.vector):
            return True
        self.detect_lost_database(settings.vector)
        self._settings = merge_settings(self._settings, settings)
        self._dirty_settings = True
        return True

    def cover(self, dots: Iterable[Dot], rows: Iterable[Row], settings: Settings | None = None) -> None:
        """Advance the vector by the dots that were pushed with these rows and settings, as far as there is no gap."""
        brought: dict[ActorId, int] = {}
        for vector in (*(row.vector for row in rows), *((settings.vector,) if settings is not None else ())):
            for actor, seq in vector.items():
                brought[actor] = max(seq, brought.get(actor, 0))
        for dot in sorted(dots):
            if dot.seq > brought.get(dot.actor, 0):
                self.counters["dots_refused_without_rows"] += 1
            elif self._vector.get(dot.actor, 0) == dot.seq - 1 and is_actor_id(dot.actor) and dot.actor != self._actor:
                self._see(dot.actor, dot.seq)

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

    # ---- R3, R6, R7: syncs

    def above(self, vector: Vector) -> Iterable[TaskId]:
        """The tasks whose rows have a write that the vector does not cover."""
        return self._table.above(vector)

    def packed(self, task: TaskId) -> bytes:
        """The row as it stands on the wire."""
        return self._table.packed(task)

    def size_of(self, task: TaskId) -> int:
        """Of the row on the wire, in bytes."""
        return self._table.size_of(task)

    def beyond_vector(self, peer: PeerId) -> Vector:
        """The last writes of the peer, of each of its actors, that are in a row here while some before them are not."""
        mine, found = self._vector, self._table.highest_of(peer[:ACTOR_PEER_CHARS])
        return {actor: seq for actor, seq in found.items() if seq > mine.get(actor, 0)}

    def tasks_after(self, task: str, count: int) -> list[TaskId]:
        """The next tasks in the order of their ids."""
        return self._table.tasks_after(task, count)

    def write_again(self, tasks: Iterable[TaskId]) -> int:
        """The disk has lost the rows of these tasks, as far as there are any; how many that are."""
        mine = [task for task in tasks if task in self._table]
        self._dirty_rows |= dict.fromkeys(mine)
        return len(mine)

    def contents(self, grants: Mapping[TaskId, Grant]) -> Contents:
        """All that there is, for a new database."""
        return Contents(
            ledger_epoch=self.ledger_epoch,
            packed={task: self._table.packed(task) for task in self._table.tasks()},
            vector={str(actor): seq for actor, seq in self._vector.items()},
            floors={str(actor): seq for actor, seq in self._floors.items()},
            settings=self._settings,
            grants=grants,
        )

    def below_floors(self, vector: Vector) -> bool:
        """Whether a peer that has seen so much of these actors may lack what was purged here."""
        return below(vector, self._vector, {actor: self._floors.get(actor, 0) for actor in vector})

    def watch(self) -> dict[TaskId, None]:
        """From now on the tasks whose rows come from elsewhere and were not here, until `unwatch`."""
        self._watching.append({})
        return self._watching[-1]

    def unwatch(self, arrived: dict[TaskId, None]) -> None:
        self._watching = [each for each in self._watching if each is not arrived]

    def adopt(self, upto: Vector, floors: Vector) -> bool:
        """Take over the donor's vector and floors, now that all rows of the sync are here. False: refused, and counted."""
        if not (sound(upto) and sound(floors) and len({*self._vector, *upto, *self._floors, *floors}) <= ACTORS_MAX):
            self.counters["vectors_refused"] += 1
            return False
        self.detect_lost_database(upto)
        self.detect_lost_database(floors)
        for actor, seq in sorted(upto.items()):
            if actor != self._actor and seq > self._vector.get(actor, 0):
                self._see(actor, seq)
        self._raise_floors(floors)
        return True

    # ---- R4, R5: what is over is forgotten

    def is_forgotten(self, row: Row) -> bool:
        """R4: the row is absent though this peer has seen its birth, so it was purged."""
        return row.task not in self._table and covers(self._vector, row.birth)

    def may_purge(self, task: TaskId) -> bool:
        """R5: whether this peer has seen all writes of the row, its birth above all: else it would be taken for a new one."""
        return task in self._table and includes(self._vector, self._row(task).vector)

    def purge(self, task: TaskId) -> None:
        """R5: forget the row, and remember only that whoever has not seen its last writes may lack something here."""
        self._raise_floors(self._row(task).vector)
        self._table.remove(task)
        self._dirty_rows.pop(task, None)
        self._purged[task] = None

    # ---- for the shell

    def take_changes(self) -> Changes | None:
        """What must be committed since the last call; None if there is nothing."""
        dirty = (self._dirty_rows, self._dirty_vector, self._dirty_floors, self._dirty_settings, self._purged, self._minted)
        if not any(dirty):
            return None
        changes = Changes(
            rows=tuple(self._row(task) for task in self._dirty_rows),
            vector={actor: self._vector[actor] for actor in self._dirty_vector},
            floors={actor: self._floors[actor] for actor in self._dirty_floors},
            minted=self._minted,
            settings=self._settings if self._dirty_settings else None,
            purged=tuple(self._purged),
        )
        self._dirty_settings, self._purged = False, {}
        self._dirty_rows, self._dirty_vector, self._dirty_floors, self._minted = {}, {}, {}, None
        return changes

    def check(self) -> None:
        """Assert that no row knows more of this peer's writes than this peer."""
        mine = self._vector.get(self._actor, 0)
        assert self._settings.vector.get(self._actor, 0) <= mine, "the settings have writes of the future"
        for row in self._table.rows():
            assert row.vector.get(self._actor, 0) <= mine, f"{row.task} has writes of the future"
            assert covers(row.vector, row.birth), f"{row.task} does not cover its birth"

    # ---- inside

    def _next_dot(self) -> Dot:
        self.settle_author()
        seq = self._vector.get(self._actor, 0) + 1
        self._see(self._actor, seq)
        return Dot(self._actor, seq)

    def _see(self, actor: ActorId, seq: int) -> None:
        """The vector's entry is this one now."""
        self.buckets.change(actor, self._vector.get(actor, 0), seq)
        self._vector[actor] = seq
        self._dirty_vector[actor] = None

    def _raise_floors(self, vector: Vector) -> None:
        for actor, seq in sorted(vector.items()):
            if seq > self._floors.get(actor, 0):
                self._floors[actor] = seq
                self._dirty_floors[actor] = None

    def _contradict(self, mine: Row, theirs: Row) -> bool:
        """Whether two rows made by the same writes are not the same, which no order of messages can bring about."""
        if mine.vector != theirs.vector or mine == theirs:
            return False
        self.counters["bug_rows_contradict"] += 1
        return True

    def _should_know(self, mine: Row, theirs: Vector) -> bool:
        """Whether their row has a write that this peer has seen by its vector, and that is missing in its row (I2)."""
        return any(self._vector.get(actor, 0) >= seq > mine.vector.get(actor, 0) for actor, seq in theirs.items())

    def _row(self, task: TaskId) -> Row:
        row = self._table.get(task)
        assert row is not None
        return row

    def _keep(self, row: Row) -> None:
        self._table.put(row)
        self._dirty_rows[row.task] = None

    def detect_lost_database(self, vector: Vector) -> None:
        """Take a new ledger epoch if somebody has seen writes of mine that I know nothing of."""
        if vector.get(self._actor, 0) > self._vector.get(self._actor, 0):
            self._mint(vector)

    def _mint(self, vector: Vector) -> None:
        """Take a new ledger epoch, above all that anybody knows of, by a step that no copy of this disk will take, too.

        Anybody can say that I have been what I never was: what is too far off is not believed, but not refused either, for a
        sync that brings it must come to its end. And the more epochs are used up the shorter are the steps, so that no number
        of such lies that ACTORS_MAX allows for uses them up.
        StoreError if there is none left; nothing was changed.
        """
        mine, most = self._me[:ACTOR_PEER_CHARS], max(self._epoch_most, self.ledger_epoch)
        everywhere = ((self._actor,), vector, self._vector, self._table.actors, self._settings.vector)
        said = [actor for seen in everywhere for actor in seen if actor.startswith(mine) and is_actor_id(actor)]
        highest = max(epoch for epoch in map(actor_ledger_epoch, said) if epoch <= most)
        step_max = min(EPOCH_STEP_MAX, 1 + (LEDGER_EPOCH_MAX - highest) // EPOCH_STEPS_MIN)
        step = 1 + (self._rng.randrange(step_max) if self._rng is not None else 0)
        if highest >= LEDGER_EPOCH_MAX:
            raise StoreError("writing to the ledger: all ledger epochs of this peer are used up", "give it a new key")
        self._minted = min(highest + step, LEDGER_EPOCH_MAX)
        self._actor = actor_id(self._me, self._minted)
        self.trusted = True
        self.counters["ledger_epochs_minted"] += 1

    def _broken(self, row: Row) -> str:
        """Why the row can't be taken over, in one word; empty if it can."""
        if len(row.facts) > FACTS_MAX or len(row.vector) > ACTORS_MAX or row_bytes(row) > ROW_BYTES_MAX:
            return "too_large"
        if not all(0 < seq <= REGISTER_MAX for seq in row.vector.values()):
            return "malformed"  # as a floor it would make this peer's offers nonsense to all others (`sound`)
        if new := [actor for actor in row.vector if actor not in self._table.actors]:
            if not all(is_actor_id(actor) for actor in new):
                return "malformed"
            if len({*self._table.actors, *self._floors, *new}) > ACTORS_MAX:
                return "too_many_actors"
        if _has_too_many_claims(row):
            return "too_many_claims"
        return "" if _well_formed(row) else "malformed"


def fullness(row: Row) -> float:
    """From 1 on the row gets no new claims and losses: else it would become one that all others refuse, and no sync with a
    peer that has it would ever be complete. What remains up to the limits is for ends, and for a merge of two such rows."""
    return max(len(row.facts) / FACTS_FULL, row_bytes(row) / ROW_BYTES_FULL)


def _has_too_many_claims(row: Row) -> bool:
    """Whether judging them would take too long, or the row has no room left for their ends."""
    claims = {dot: fact.attempt for dot, fact in row.facts if isinstance(fact, Claim)}
    ended = {fact.claim for _, fact in row.facts if isinstance(fact, Ended)}
    crowded = max(Counter(claims.values()).values(), default=0) > CLAIMS_OF_ATTEMPT_MAX
    return crowded or len(row.facts) + sum(1 for dot in claims if dot not in ended) > FACTS_MAX


def _well_formed(row: Row) -> bool:
    """Whether the facts are in order, covered by the vector, and speak of claims that the row has."""
    registers = (row.queue.revision, row.position.revision, row.priority.revision, row.position.value, row.priority.value)
    if any(abs(number) > REGISTER_MAX for number in registers):
        return False
    if len(row.voters) > VOTERS_MAX or not all(map(is_actor_id, row.voters)):
        return False
    if (row.spec.isolation == Isolation.STOP.value) != bool(row.voters):
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


def below(mine: Vector, theirs: Vector, floors: Vector) -> bool:
    """Whether a peer that has seen `theirs` and has purged up to `floors` may have purged what I have not seen (R6).

    A floor may be above what its owner has seen (R4). It lacks those writes like me, and does not offer them.
    """
    return any(min(floor, theirs.get(actor, 0)) > mine.get(actor, 0) for actor, floor in floors.items())


def sound(vector: Vector) -> bool:
    """Whether a vector that another peer sent can be one."""
    return len(vector) <= ACTORS_MAX and all(is_actor_id(actor) and 0 < seq <= REGISTER_MAX for actor, seq in vector.items())
