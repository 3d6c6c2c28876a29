"""The tasks that wait, in running order: by queue, then priority (high first), position, birth.

Inside a queue the tasks are kept apart by what they need, so that a peer which cannot run the first 50,000 tasks of a queue
(they want GPUs, it has none) finds the one that it can run without looking at them.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from heapq import merge

from meshq.ids import Dot, TaskId
from meshq.ledger.row import Row
from meshq.task import Needs

Order = tuple[int, int, Dot]
Shape = tuple[int, int, int, int, tuple[tuple[str, str], ...]]
"""A task's needs, as a key."""


@dataclass(slots=True)
class _Bucket:
    needs: Needs
    waiting: list[tuple[Order, TaskId]]


@dataclass(frozen=True, slots=True)
class _Place:
    queue: str
    shape: Shape
    order: Order


class Queues:
    """Mutable, but without any rule of its own: who waits is decided by the row's status."""

    def __init__(self) -> None:
        self._queues: dict[str, dict[Shape, _Bucket]] = {}
        self._places: dict[TaskId, _Place] = {}

    def __contains__(self, task: object) -> bool:
        return task in self._places

    def __len__(self) -> int:
        return len(self._places)

    def put(self, task: TaskId, row: Row) -> bool:
        """Let the task wait where its registers say. Whether that is news."""
        place = _Place(row.queue.value, shape(row.spec.needs), running_order(row))
        if self._places.get(task) == place:
            return False
        self.remove(task)
        buckets = self._queues.setdefault(place.queue, {})
        insort(buckets.setdefault(place.shape, _Bucket(row.spec.needs, [])).waiting, (place.order, task))
        self._places[task] = place
        return True

    def remove(self, task: TaskId) -> None:
        place = self._places.pop(task, None)
        if place is None:
            return
        buckets = self._queues[place.queue]
        waiting = buckets[place.shape].waiting
        del waiting[bisect_left(waiting, (place.order, task))]
        if not waiting:
            del buckets[place.shape]
        if not buckets:
            del self._queues[place.queue]

    def position(self, task: TaskId) -> int | None:
        """From 1, among all that wait in the same queue."""
        place = self._places.get(task)
        if place is None:
            return None
        return 1 + sum(bisect_left(bucket.waiting, (place.order, task)) for bucket in self._queues[place.queue].values())

    def in_order(self, queue: str, wanted: Callable[[Needs], bool]) -> Iterator[TaskId]:
        """The waiting tasks of the queue whose needs are wanted, in running order."""
        buckets = [bucket.waiting for bucket in self._queues.get(queue, {}).values() if wanted(bucket.needs)]
        for _, task in merge(*buckets):
            yield task


def shape(needs: Needs) -> Shape:
    return (needs.cpus, needs.memory_bytes, needs.gpus, needs.gpu_memory_bytes, tuple(sorted(needs.labels.items())))


def running_order(row: Row) -> Order:
    return (-row.priority.value, row.position.value, row.birth)
