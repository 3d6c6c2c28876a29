"""The rows in memory, by task, and by the writes that made them.

The index answers the question of every sync, "which rows have a write that you don't know?", without looking at all rows: for
each actor the (seq, task) of the last write to each row, in order of seq. An entry that a later write to the same row has
replaced stays until such entries are the larger part.

Nothing here knows a rule of merging or adopting: those are `replica.py`'s.
"""

from bisect import bisect_right, insort
from collections import Counter
from collections.abc import Iterable, Iterator, KeysView

from meshq import codec
from meshq.ids import ActorId, TaskId
from meshq.ledger.row import Row, Vector

COMPACT_MIN = 64  # entries of one actor: fewer are not worth the trouble


def row_bytes(row: Row) -> int:
    """The size of the row on the wire."""
    return len(codec.encode(row))


class RowTable:
    """Mutable. A row is replaced as a whole, and its vector never falls."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows = {row.task: row for row in rows}
        self._writes: dict[ActorId, list[tuple[int, TaskId]]] = {}
        self._stale: Counter[ActorId] = Counter()
        self._bytes: dict[TaskId, int] = {}  # of rows that were sent and have not changed since
        for task, row in self._rows.items():
            for actor, seq in row.vector.items():
                self._writes.setdefault(actor, []).append((seq, task))
        for writes in self._writes.values():
            writes.sort()

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, task: object) -> bool:
        return task in self._rows

    @property
    def actors(self) -> KeysView[ActorId]:
        """Whoever wrote in any row."""
        return self._writes.keys()

    def get(self, task: TaskId) -> Row | None:
        return self._rows.get(task)

    def rows(self) -> Iterator[Row]:
        return iter(self._rows.values())

    def size_of(self, task: TaskId) -> int:
        """Of the row on the wire, in bytes."""
        if task not in self._bytes:
            self._bytes[task] = row_bytes(self._rows[task])
        return self._bytes[task]

    def put(self, row: Row) -> None:
        """The row is new, or replaces one that it includes."""
        task = row.task
        before = self._rows[task].vector if task in self._rows else {}
        self._rows[task] = row
        self._bytes.pop(task, None)
        for actor, seq in row.vector.items():
            if seq > before.get(actor, 0):
                insort(self._writes.setdefault(actor, []), (seq, task))
                self._stale[actor] += actor in before
                self._compact(actor)

    def above(self, vector: Vector) -> Iterable[TaskId]:
        """The tasks with a write that the vector does not cover, in no order."""
        tasks: dict[TaskId, None] = {}
        for actor, writes in self._writes.items():
            known = vector.get(actor, 0)
            if writes[-1][0] > known:
                for _, task in writes[bisect_right(writes, known, key=lambda write: write[0]) :]:
                    tasks[task] = None
        return tasks

    def _compact(self, actor: ActorId) -> None:
        writes = self._writes[actor]
        if len(writes) > COMPACT_MIN and 2 * self._stale[actor] > len(writes):
            self._writes[actor] = [(seq, task) for seq, task in writes if self._rows[task].vector.get(actor) == seq]
            self._stale[actor] = 0
