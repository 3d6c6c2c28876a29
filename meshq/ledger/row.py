"""One task's row: grow-only facts, three registers, and the vector of writes that made it.

A row is a product of small lattices, so `merge` is union and max, in any order, any number of times. Every fact is named
by its dot, the one write that made it. What a row *means* (its holder, its status) stands in `holder.py`, never here and
never stored.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Final

from meshq import codec
from meshq.ids import ActorId, Dot, PeerId, TaskId, task_id
from meshq.task import Outcome, TaskSpec

Vector = Mapping[ActorId, int]
"""A version vector: for each actor the highest seq that is covered; 0 where it is absent."""

REGISTER_MAX: Final = 2**53  # of a register's number or revision: what is counted up from there still fits every encoding


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """`peer` bids for attempt `attempt`, having seen of this row what `seen` covers."""

    TAG: ClassVar[int] = 1
    attempt: int
    peer: PeerId
    seen: Vector
    at: float = 0.0  # wall clock, for display only; so are all `at` below


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparing:
    """The claim's peer is fetching the source or building the environment, and it takes a while. For display only."""

    TAG: ClassVar[int] = 2
    claim: Dot
    at: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """Written before user code runs under this claim; at most one for each claim."""

    TAG: ClassVar[int] = 3
    claim: Dot
    at: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """Written by the claim's own peer."""

    TAG: ClassVar[int] = 4
    claim: Dot
    outcome: Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """Written by another peer, which saw the lease of the claim's peer end."""

    TAG: ClassVar[int] = 5
    claim: Dot
    reason: str = ""
    at: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Back:
    """Written by the claim's own peer, which still runs it and has seen what `seen` covers, a `Lost` among it."""

    TAG: ClassVar[int] = 6
    claim: Dot
    seen: Vector
    at: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """Somebody cancelled the task."""

    TAG: ClassVar[int] = 7
    by: str
    at: float = 0.0


Fact = Claim | Preparing | Started | Ended | Lost | Back | Cancel


@dataclass(frozen=True, slots=True, order=True)
class TextRegister:
    """The last write wins: the greatest (revision, actor, value), where revision is 1 + the highest in the row."""

    revision: int
    actor: ActorId
    value: str


@dataclass(frozen=True, slots=True, order=True)
class NumberRegister:
    """As `TextRegister`, for numbers."""

    revision: int
    actor: ActorId
    value: int


class _Memory:
    """What is worked out of a row once and kept with it. It is no part of its value."""

    __slots__ = ("_task", "_wire")
    _task: TaskId
    _wire: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(_Memory):
    """All that is known of one task. `facts` are sorted by dot; `vector` covers every write that touched the row."""

    birth: Dot
    spec: TaskSpec
    vector: Vector
    queue: TextRegister
    position: NumberRegister  # order inside the queue at equal priority: lower runs first
    priority: NumberRegister
    facts: tuple[tuple[Dot, Fact], ...] = ()
    voters: tuple[ActorId, ...] = ()  # whose grants a start needs (`grants.py`); written at the birth, never again

    @property
    def task(self) -> TaskId:
        try:
            return self._task
        except AttributeError:
            object.__setattr__(self, "_task", task_id(self.birth))
            return self._task

    @property
    def wire(self) -> bytes:
        """The row as it stands on the wire and on disk. Equal rows have equal bytes."""
        try:
            return self._wire
        except AttributeError:
            return self.remember_wire(codec.encode(self))

    def remember_wire(self, data: bytes) -> bytes:
        """These are the bytes that `wire` would make."""
        object.__setattr__(self, "_wire", data)
        return data


def merge(mine: Row, theirs: Row) -> Row:
    """The lattice join of two rows of the same task."""
    assert mine.birth == theirs.birth
    if mine == theirs:
        return mine
    return Row(
        birth=mine.birth,
        spec=mine.spec,
        vector=merge_vectors(mine.vector, theirs.vector),
        queue=max(mine.queue, theirs.queue),
        position=max(mine.position, theirs.position),
        priority=max(mine.priority, theirs.priority),
        facts=tuple(sorted((dict(mine.facts) | dict(theirs.facts)).items(), key=lambda item: item[0])),
        voters=max(mine.voters, theirs.voters),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """Where a task waits: what its three registers say. Every move writes all three, so that no two moves are ever mixed."""

    queue: str
    position: int
    priority: int


def moved(row: Row, dot: Dot, seat: Seat) -> Row:
    """The row after the write `dot`, which gives it this seat.

    The three registers get one revision, above all three. They differ in nothing but their values ever since the birth, so of
    concurrent moves the same one wins in each of them.
    """
    highest = max(row.queue.revision, row.position.revision, row.priority.revision)
    revision = min(REGISTER_MAX, highest + 1)
    return replace(
        row,
        vector=merge_vectors(row.vector, {dot.actor: dot.seq}),
        queue=TextRegister(revision, dot.actor, seat.queue),
        position=NumberRegister(revision, dot.actor, seat.position),
        priority=NumberRegister(revision, dot.actor, seat.priority),
    )


def merge_vectors(mine: Vector, theirs: Vector) -> Vector:
    """The pointwise maximum."""
    joined = dict(mine)
    for actor, seq in theirs.items():
        joined[actor] = max(joined.get(actor, 0), seq)
    return joined


def covers(vector: Vector, dot: Dot) -> bool:
    """Whether this write is among those that the vector has seen."""
    return vector.get(dot.actor, 0) >= dot.seq
