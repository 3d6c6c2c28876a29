"""One task's row: grow-only facts, three registers, and the vector of writes that made it.

A row is a product of small lattices, so `merge` is union and max, in any order, any number of times. Every fact is named
by its dot, the one write that made it. What a row *means* (its holder, its status) stands in `holder.py`, never here and
never stored.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from meshq.ids import ActorId, Dot, PeerId, TaskId, task_id
from meshq.task import Outcome, TaskSpec

Vector = Mapping[ActorId, int]
"""A version vector: for each actor the highest seq that is covered; 0 where it is absent."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """All that is known of one task. `facts` are sorted by dot; `vector` covers every write that touched the row."""

    birth: Dot
    spec: TaskSpec
    vector: Vector
    queue: TextRegister
    position: NumberRegister  # order inside the queue at equal priority: lower runs first
    priority: NumberRegister
    facts: tuple[tuple[Dot, Fact], ...] = ()

    @property
    def task(self) -> TaskId:
        return task_id(self.birth)


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
