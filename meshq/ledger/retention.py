"""Which tasks are over for so long, or are so many, that they are forgotten; and what forgetting one means.

Problem. Nobody wants to keep a million finished tasks, and no two machines show the same time.

Invariant. Whether and when a peer forgets a task never matters to what runs: the rules of `replica.py` (R4 to R7) hold for any
choice. Only tasks that are over are chosen, and none of which this peer still has a claim.

Algorithm. A task is old when it ended longer ago than the mesh keeps tasks, by the wall clock; beyond the number that the mesh
keeps, those that ended first are old. Wall clocks are wrong now and then, and what that costs is bounded to the list that
people see on that one machine:
  - an end in the future, by a clock that was ahead, counts from when this process first saw it;
  - a clock that jumps ahead while the process runs changes nothing: of all that it showed, relative to the monotonic clock, the
    earliest counts;
  - nothing is forgotten for its age in the first SEEN_SECONDS after this process saw it, which leaves time to set the clock
    after a start.

Limits. BATCH tasks in one input, so that nothing waits for long.
"""

from collections import deque
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from math import inf
from typing import Final

from meshq.ids import TaskId
from meshq.ledger.row import Cancel, Claim, Ended, Lost, Row
from meshq.ledger.settings import Retention

SEEN_SECONDS: Final = 3_600.0
BATCH: Final = 256
BATCH_PAUSE: Final = 0.2  # until the next batch
HELD_PAUSE: Final = 5.0  # until the next look at those that could not be forgotten yet
LOOK_AGAIN: Final = 600.0  # at what can't be forgotten yet


@dataclass(frozen=True, slots=True)
class _Over:
    ended: float  # by the wall clock of whoever ended it
    seen: float  # by this process's own


class Shelf:
    """The tasks that are over. Mutable."""

    def __init__(self, now: float) -> None:
        self._over: dict[TaskId, _Over] = {}
        self._oldest: list[tuple[float, TaskId]] = []  # a heap; entries of tasks that are not there any more are passed over
        self._held: deque[tuple[float, TaskId]] = deque()  # put back, and when they go into the heap again
        self._keep = Retention()
        self._wall_offset = inf
        self._look_at = now

    def __len__(self) -> int:
        return len(self._over)

    def set_wall_offset(self, offset: float) -> None:
        """The wall clock less the monotonic one."""
        if offset < self._wall_offset:
            first = self._wall_offset == inf
            self._wall_offset = offset
            if first:
                self._oldest = [(self._ended(over), task) for task, over in self._over.items()]
                heapify(self._oldest)

    def keep(self, now: float, retention: Retention) -> None:
        """How long the mesh keeps tasks."""
        if retention != self._keep:
            self._keep, self._look_at = retention, now

    def put(self, now: float, row: Row) -> None:
        """The task is over."""
        over = _Over(ended_at(row), now)
        if row.task not in self._over:
            self._over[row.task] = over
            heappush(self._oldest, (self._ended(over), row.task))
            if len(self._over) > self._keep.tasks:
                self._look_at = min(self._look_at, now + BATCH_PAUSE)  # not at once: the input that is under way looks no more

    def put_back(self, now: float, row: Row) -> None:
        """The task, which was told, can't be forgotten yet; it is told again later, not at once: that would never end, and
        those that never can be (their writer is gone, and a write before with it) would keep all others from being told."""
        self._over[row.task] = _Over(ended_at(row), now)
        self._held.append((now + HELD_PAUSE, row.task))
        self._look_at = min(self._look_at, now + HELD_PAUSE)

    def remove(self, task: TaskId) -> None:
        """It is forgotten, or after all not over."""
        self._over.pop(task, None)

    def deadline(self) -> float:
        return self._look_at if self._over else inf

    def take_old(self, now: float) -> list[TaskId]:
        """The tasks to be forgotten now, those that ended first before the others. Each is told once, unless put back."""
        if self._look_at > now:
            return []
        while self._held and self._held[0][0] <= now:
            _, task = self._held.popleft()
            if (over := self._over.get(task)) is not None:
                heappush(self._oldest, (self._ended(over), task))
        old: list[TaskId] = []
        self._look_at = min(now + LOOK_AGAIN, self._held[0][0] if self._held else inf)
        while self._oldest:
            _, task = self._oldest[0]
            over = self._over.get(task)
            if over is not None and len(self._over) <= self._keep.tasks and not self._is_old(now, over):
                break
            if len(old) == BATCH:
                self._look_at = now + BATCH_PAUSE
                break
            heappop(self._oldest)
            if over is not None:
                del self._over[task]
                old.append(task)
        return old

    def _is_old(self, now: float, over: _Over) -> bool:
        if self._wall_offset == inf or now - over.seen < SEEN_SECONDS:
            return False
        return now + self._wall_offset - self._ended(over) >= self._keep.seconds

    def _ended(self, over: _Over) -> float:
        """By the wall clock, but not in the future of when it was seen."""
        return min(over.ended, over.seen + self._wall_offset)


def ended_at(row: Row) -> float:
    """When the last thing happened to the task that is over, by the wall clocks of whoever wrote it down."""
    moments = [0.0]
    for _, fact in row.facts:
        match fact:
            case Ended():
                moments.append(fact.outcome.ended_at)
            case Cancel() | Claim() | Lost():
                moments.append(fact.at)
            case _:
                pass
    return max(moments)
