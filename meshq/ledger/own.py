"""The claims of this peer that have not ended, as states that carry their data."""

from dataclasses import dataclass, field

from meshq.ids import Dot, Fence, PeerId, TaskId, fence
from meshq.task import EndKind, Needs


@dataclass(frozen=True, slots=True)
class Waiting:
    """Claimed; source and environment are prepared (`ready`: they are there), and acks come in."""

    ready: bool
    pushed_at: float  # to whom came last
    since: float  # it has waited without a break for the acks of those who came


@dataclass(frozen=True, slots=True)
class Running:
    """`Started` is written: user code may run since then."""

    since: float


@dataclass(frozen=True, slots=True)
class Stopping:
    """exec was told to end it; whatever it reports but a success is recorded as `kind`."""

    kind: EndKind
    reason: str


@dataclass(slots=True)
class OwnClaim:
    """One claim. Mutable: the core moves it from state to state and collects its acks."""

    task: TaskId
    dot: Dot
    attempt: int
    needs: Needs  # of the task
    state: Waiting | Running | Stopping
    acked: dict[PeerId, None] = field(default_factory=dict)

    @property
    def fence(self) -> Fence:
        return fence(self.attempt, self.dot)


class OwnClaims:
    """By fence and by task."""

    def __init__(self) -> None:
        self._by_fence: dict[Fence, OwnClaim] = {}
        self._by_task: dict[TaskId, list[OwnClaim]] = {}

    def __len__(self) -> int:
        return len(self._by_fence)

    def __contains__(self, token: object) -> bool:
        return token in self._by_fence

    def add(self, claim: OwnClaim) -> None:
        self._by_fence[claim.fence] = claim
        self._by_task.setdefault(claim.task, []).append(claim)

    def remove(self, claim: OwnClaim) -> None:
        del self._by_fence[claim.fence]
        self._by_task[claim.task].remove(claim)
        if not self._by_task[claim.task]:
            del self._by_task[claim.task]

    def get(self, token: Fence) -> OwnClaim | None:
        return self._by_fence.get(token)

    def of(self, task: TaskId) -> tuple[OwnClaim, ...]:
        return tuple(self._by_task.get(task, ()))

    def all(self) -> tuple[OwnClaim, ...]:
        return tuple(self._by_fence.values())

    def acknowledged(self, peer: PeerId, task: TaskId, dots: frozenset[Dot]) -> None:
        """The peer has merged and committed these writes to the task's row."""
        for claim in self.of(task):
            if claim.dot in dots:
                claim.acked[peer] = None
