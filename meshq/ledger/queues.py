"""The tasks that wait, in running order: by queue, then priority (high first), position, birth.

Inside a queue the tasks are kept apart by what they need, so that a peer which cannot run the first 50,000 tasks of a queue
(they want GPUs, it has none) finds the one that it can run without looking at them.

A task's entry is a plain tuple of plain values: Python's garbage collector looks at such a tuple once and never again, and
100,000 of them take 25 MB.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from heapq import merge
from sys import intern

from meshq.ids import ActorId, TaskId
from meshq.ledger.ordered import Ordered
from meshq.ledger.row import Row
from meshq.task import Needs

Shape = tuple[int, int, int, int, tuple[tuple[str, str], ...]]
"""A task's needs, as a key."""

_Entry = tuple[int, int, ActorId, int, TaskId, float, int]
"""Its place in running order, in one level; the task; since when it waits here; the number of its bucket."""


@dataclass(slots=True)
class _Bucket:
    """The waiting tasks of one queue with the same needs."""

    number: int
    queue: str
    needs: Needs
    waiting: Ordered[_Entry]


class Queues:
    """Mutable, but without any rule of its own: who waits is decided by the row's status."""

    def __init__(self) -> None:
        self._queues: dict[str, dict[Shape, _Bucket]] = {}
        self._buckets: dict[int, _Bucket] = {}
        self._entries: dict[TaskId, _Entry] = {}
        self._next_number = 0

    def __contains__(self, task: object) -> bool:
        return task in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, task: TaskId, row: Row, now: float = 0.0) -> bool:
        """Let the task wait where its registers say. Whether that is news."""
        before = self._entries.get(task)
        since = before[5] if before is not None and self.queue_of(task) == row.queue.value else now
        actor = ActorId(intern(row.birth.actor))  # of rows that were unpacked each has its own
        place = (-row.priority.value, row.position.value, actor, row.birth.seq, task, since)
        if before is not None and before[:6] == place and self.queue_of(task) == row.queue.value:
            return False
        self.remove(task)
        bucket = self._bucket(row.queue.value, row.spec.needs)
        entry = (*place, bucket.number)
        bucket.waiting.add(entry)
        self._entries[task] = entry
        return True

    def remove(self, task: TaskId) -> None:
        entry = self._entries.pop(task, None)
        if entry is None:
            return
        bucket = self._buckets[entry[6]]
        bucket.waiting.remove(entry)
        if not bucket.waiting:
            del self._buckets[bucket.number]
            del self._queues[bucket.queue][shape(bucket.needs)]
        if not self._queues[bucket.queue]:
            del self._queues[bucket.queue]

    def since(self, task: TaskId) -> float:
        """When it came into its queue, as this peer saw it."""
        return self._entries[task][5]

    def queue_of(self, task: TaskId) -> str:
        return self._buckets[self._entries[task][6]].queue

    def needs_of(self, task: TaskId) -> Needs:
        return self._buckets[self._entries[task][6]].needs

    def position(self, task: TaskId) -> int | None:
        """From 1, among all that wait in the same queue."""
        entry = self._entries.get(task)
        if entry is None:
            return None
        return 1 + sum(waiting.rank(entry) for waiting in self._waiting(self.queue_of(task)))

    def in_order(self, queue: str, wanted: Callable[[Needs], bool]) -> Iterator[TaskId]:
        """The waiting tasks of the queue whose needs are wanted, in running order."""
        buckets = [bucket.waiting for bucket in self._queues.get(queue, {}).values() if wanted(bucket.needs)]
        return (entry[4] for entry in merge(*buckets))

    def in_reverse(self, queue: str) -> Iterator[TaskId]:
        """All that wait in the queue, the last in running order first."""
        return (entry[4] for entry in merge(*map(reversed, self._waiting(queue)), reverse=True))

    def ahead_of(self, task: TaskId) -> Iterator[TaskId]:
        """Those that wait before it in its queue, the nearest first."""
        entry = self._entries[task]
        parts = [waiting.before(entry) for waiting in self._waiting(self.queue_of(task))]
        return (other[4] for other in merge(*parts, reverse=True))

    def behind(self, task: TaskId) -> Iterator[TaskId]:
        """Those that wait behind it in its queue, the nearest first."""
        entry = self._entries[task]
        parts = [waiting.since(entry) for waiting in self._waiting(self.queue_of(task))]
        return (other[4] for other in merge(*parts) if other is not entry)

    def _waiting(self, queue: str) -> list[Ordered[_Entry]]:
        return [bucket.waiting for bucket in self._queues.get(queue, {}).values()]

    def _bucket(self, queue: str, needs: Needs) -> _Bucket:
        buckets = self._queues.setdefault(queue, {})
        key = shape(needs)
        bucket = buckets.get(key)
        if bucket is None:
            self._next_number += 1
            bucket = buckets[key] = self._buckets[self._next_number] = _Bucket(self._next_number, queue, needs, Ordered())
        return bucket


def shape(needs: Needs) -> Shape:
    return (needs.cpus, needs.memory_bytes, needs.gpus, needs.gpu_memory_bytes, tuple(sorted(needs.labels.items())))
