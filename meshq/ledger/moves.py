"""Where a task waits after it was moved. Pure: from the queue as this peer sees it to new seats for as few tasks as possible.

Problem. People move tasks at several peers at once, also in a mesh that is cut in two. Afterwards all must see one order, in
which every task has a place, and each move must have done what its author saw it do, as far as no other one contradicts.

Algorithm. A task's place is a seat (queue, position, priority) in the registers of its row; the order of a queue is that of
(priority, position, birth), which is total whatever seats there are. To move a task is to give it a seat between two
others: the priority of the one that it shall stand beside, and a position in the middle between its neighbours of that
priority. Concurrent moves of different tasks touch different rows and both count; of those of one task one wins as a whole
(`row.moved`). A move that meets a start changes nothing but what the row says of a past wait.

Where two neighbours have no position between them, the fewest tasks around the gap that have room together are spread out
evenly. That is rare, for submits stand POSITION_STEP apart: twenty moves into the same gap, or submits on both sides of a
partition, which may have taken the same positions. A move of such a neighbour at another peer in the same moment may lose
against its new number, and must then be repeated.

Limits. RENUMBERED_MAX tasks are renumbered for one move; positions stay within REGISTER_MAX.

Rejected: fractions or strings as positions, which never need renumbering but grow without end under moves to the same place.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, takewhile
from typing import Final, assert_never

from meshq.errors import TaskFailed
from meshq.ids import TaskId
from meshq.ledger.queues import Queues
from meshq.ledger.row import REGISTER_MAX, Row, Seat

POSITION_STEP: Final = 2**20  # room to move a task between two others twenty times over
RENUMBERED_MAX: Final = 256


@dataclass(frozen=True, slots=True)
class First:
    """Before all that wait in its queue."""


@dataclass(frozen=True, slots=True)
class Last:
    """Behind all that wait in its queue."""


@dataclass(frozen=True, slots=True)
class Up:
    """Before the one that it stands behind."""


@dataclass(frozen=True, slots=True)
class Down:
    """Behind the one that it stands before."""


@dataclass(frozen=True, slots=True)
class Before:
    """Directly before another task of its queue."""

    other: TaskId


@dataclass(frozen=True, slots=True)
class To:
    """Into this queue, behind all that wait there."""

    queue: str


Place = First | Last | Up | Down | Before | To


def new_seats(
    row: Row, place: Place, queues: Queues, row_of: Callable[[TaskId], Row], next_position: Callable[[str], int]
) -> dict[TaskId, Seat]:
    """The seats to be given for this move of a waiting task; none if it is there already. TaskFailed if there is no room."""
    task, queue = row.task, row.queue.value
    match place:
        case To(elsewhere):
            seat = Seat(queue=elsewhere, position=next_position(elsewhere), priority=row.priority.value)
            return {task: seat}
        case First():
            other, before = next(queues.in_order(queue, lambda needs: True)), True
        case Last():
            other, before = next(queues.in_reverse(queue)), False
        case Up():
            other, before = next(queues.ahead_of(task), task), True
        case Down():
            other, before = next(queues.behind(task), task), False
        case Before(another):
            other, before = another, True
        case _:
            assert_never(place)
    if other == task or (before and next(queues.ahead_of(other), None) == task):
        return {}
    nearest = iter((other,))
    ahead, behind = queues.ahead_of(other), queues.behind(other)
    ahead, behind = (ahead, chain(nearest, behind)) if before else (chain(nearest, ahead), behind)
    priority = row_of(other).priority.value

    def neighbours(tasks: Iterable[TaskId]) -> list[Row]:
        rows = (row_of(each) for each in tasks if each != task)
        return list(islice(takewhile(lambda each: each.priority.value == priority, rows), RENUMBERED_MAX + 1))

    return _seat_between(row, neighbours(ahead), neighbours(behind), queue, priority)


def _seat_between(row: Row, ahead: Sequence[Row], behind: Sequence[Row], queue: str, priority: int) -> dict[TaskId, Seat]:
    """A seat between rows of one priority, the nearest first on both sides, and new ones for as many of them as it takes."""
    for count in range(min(RENUMBERED_MAX, len(ahead) + len(behind)) + 1):
        for of_ahead in range(max(0, count - len(behind)), min(count, len(ahead)) + 1):
            of_behind = count - of_ahead
            low, high = _bounds(ahead[of_ahead:], behind[of_behind:], count)
            if high - low > count + 1:
                rows = [*reversed(ahead[:of_ahead]), row, *behind[:of_behind]]
                return {
                    each.task: Seat(queue=queue, position=position, priority=priority)
                    for each, position in zip(rows, _spread(low, high, len(rows)), strict=True)
                }
    raise TaskFailed(
        f"moving {row.spec.name!r} ({row.task}): more than {RENUMBERED_MAX} tasks stand at the same position there",
        "move it --first or --last",
    )


def _bounds(ahead: Sequence[Row], behind: Sequence[Row], count: int) -> tuple[int, int]:
    """Between which positions `count` tasks and one more may stand; a step apart where nobody limits them."""
    room = POSITION_STEP * (count + 2)
    if ahead:
        low = ahead[0].position.value
        return low, behind[0].position.value if behind else min(REGISTER_MAX + 1, low + room)
    high = behind[0].position.value if behind else room
    return max(-REGISTER_MAX - 1, high - room), high


def _spread(low: int, high: int, count: int) -> Iterator[int]:
    """So many positions between the two, at equal distances."""
    return (low + (high - low) * (place + 1) // (count + 1) for place in range(count))
