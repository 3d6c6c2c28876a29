"""The rows in memory: packed, by task, by the writes that made them, and in the order of their ids.

Problem. A peer holds 100,000 rows or twice as many, nearly all of which wait or are over: nobody looks at them for hours. As
objects each takes 3 kB and Python's garbage collector visits them all, again and again, for as long as a second.

Algorithm. A row is held as its bytes on the wire, which are also what is hashed and stored; so it is packed once, when it
changes. The rows that were used last stay unpacked besides, ROWS_OPEN_MAX of them. So `get` may give another object for the
same row at another time: rows are the same if their vectors are (`row.vector` names every write that made it).

The index of writes answers the question of every sync, "which rows have a write that you don't know?", without looking at all
rows. An actor's writes are numbered without gaps, and for each there is at most one row of which it is that actor's last
write; so the index is an array, in blocks of which only those exist that hold anything.

Nothing here knows a rule of merging or adopting: those are `replica.py`'s.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, KeysView, Mapping, Sequence
from itertools import islice
from operator import eq
from typing import Final, overload

from meshq import codec
from meshq.ids import ActorId, TaskId
from meshq.ledger.reconcile import Fingerprints, hash_row
from meshq.ledger.row import Row, Vector

ROWS_OPEN_MAX: Final = 1_024  # two pages of a sync, or a large submit: 3 MB
BLOCK: Final = 64  # writes of one actor: an array that holds a single one takes 600 bytes
ID_CHARS: Final = 2  # ids with the same beginning are kept together: a thousand lists of a hundred
PACKED_BYTES_MAX: Final = 2**31  # of what this process has packed itself


def row_bytes(row: Row) -> int:
    """The size of the row on the wire."""
    return len(row.wire)


class RowTable:
    """Mutable. A row is replaced as a whole, and its vector never falls."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._packed: dict[TaskId, bytes] = {}
        self._open: dict[TaskId, Row] = {}  # the one used last is the last
        self._writes: dict[ActorId, _Writes] = {}
        self._ids = _Ids()
        self.fingerprints = Fingerprints(self.hash_of)
        for row in rows:
            self.put(row)

    def __len__(self) -> int:
        return len(self._packed)

    def __contains__(self, task: object) -> bool:
        return task in self._packed

    @property
    def actors(self) -> KeysView[ActorId]:
        """Whoever wrote in any row."""
        return self._writes.keys()

    def get(self, task: TaskId) -> Row | None:
        row = self._open.pop(task, None)
        if row is None:
            data = self._packed.get(task)
            if data is None:
                return None
            row = _unpacked(data)
        self._keep_open(task, row)
        return row

    def rows(self) -> Iterator[Row]:
        """All that there are now. Those that are packed are not kept unpacked."""
        for task in tuple(self._packed):
            row = self._open.get(task)
            if row is not None:
                yield row
            elif task in self._packed:
                yield _unpacked(self._packed[task])

    def tasks(self) -> KeysView[TaskId]:
        return self._packed.keys()

    def put(self, row: Row) -> None:
        """The row is new, or replaces one that it includes."""
        task, data = row.task, row.wire
        before = self.get(task)
        if before is None:
            self._ids.add(task)
            self.fingerprints.add(task, hash_row(data))
            for actor, seq in row.vector.items():
                self._of(actor).put(seq, task)
        else:
            self.fingerprints.replace(task, self.hash_of(task), hash_row(data))
            for actor, seq in row.vector.items():
                known = before.vector.get(actor, 0)
                if seq > known:
                    writes = self._of(actor)
                    if known:
                        writes.remove(known, task)
                    writes.put(seq, task)
        self._packed[task] = data
        self._open.pop(task, None)
        self._keep_open(task, row)

    def remove(self, task: TaskId) -> None:
        """The row was purged."""
        row = self.get(task)
        assert row is not None, f"{task} is no task"
        self.fingerprints.remove(task, self.hash_of(task))
        self._ids.remove(task)
        for actor, seq in row.vector.items():
            self._writes[actor].remove(seq, task)
        del self._packed[task], self._open[task]

    def packed(self, task: TaskId) -> bytes:
        """The row as it stands on the wire."""
        return self._packed[task]

    def size_of(self, task: TaskId) -> int:
        """Of the row on the wire, in bytes."""
        return len(self._packed[task])

    def hash_of(self, task: TaskId) -> bytes:
        """Of the row as it stands on the wire: two peers with equal rows have equal hashes."""
        return hash_row(self._packed[task])

    def above(self, vector: Vector) -> Mapping[TaskId, None]:
        """The tasks with a write that the vector does not cover, in no order."""
        tasks: dict[TaskId, None] = {}
        for actor, writes in self._writes.items():
            tasks.update(dict.fromkeys(writes.above(vector.get(actor, 0))))
        return tasks

    def highest(self) -> Vector:
        """Of each actor the last write that is in any row, or was in one that was purged."""
        return {actor: writes.highest for actor, writes in self._writes.items()}

    def highest_of(self, peer: str) -> Vector:
        """As `highest`, of the actors of one peer."""
        return {actor: writes.highest for actor, writes in self._writes.items() if actor.startswith(peer)}

    def tasks_after(self, task: str, count: int) -> list[TaskId]:
        """The next tasks in the order of their ids."""
        return list(islice((each for each in self._ids.since(task) if each != task), count))

    def starting_with(self, prefix: str) -> Iterator[TaskId]:
        """The tasks whose ids begin so, in order."""
        for task in self._ids.since(prefix):
            if not task.startswith(prefix):
                return
            yield task

    def _of(self, actor: ActorId) -> "_Writes":
        if actor not in self._writes:
            self._writes[actor] = _Writes()
        return self._writes[actor]

    def _keep_open(self, task: TaskId, row: Row) -> None:
        self._open[task] = row
        if len(self._open) > ROWS_OPEN_MAX:
            del self._open[next(iter(self._open))]


class PackedRows(Sequence[Row]):
    """Rows on their way from the disk into a table: unpacked one by one, when somebody looks at them."""

    def __init__(self, packed: Iterable[bytes]) -> None:
        """Each must be what `Row.wire` would make."""
        self._packed = tuple(packed)

    def __len__(self) -> int:
        return len(self._packed)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> "PackedRows": ...
    def __getitem__(self, index: int | slice) -> "Row | PackedRows":
        return PackedRows(self._packed[index]) if isinstance(index, slice) else _unpacked(self._packed[index])

    def __eq__(self, other: object) -> bool:
        """As a tuple of rows."""
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))


def _unpacked(data: bytes) -> Row:
    row = codec.decode(Row, data, bytes_max=PACKED_BYTES_MAX)
    row.remember_wire(data)
    return row


class _Writes:
    """Of one actor: by its seq, the task of which that is its last write. Mutable."""

    def __init__(self) -> None:
        self._blocks: dict[int, list[TaskId | None]] = {}
        self._doubled: dict[int, list[TaskId]] = {}  # by seqs that a cloned database has used twice: the other tasks
        self.highest = 0  # that ever was here

    def put(self, seq: int, task: TaskId) -> None:
        number, place = divmod(seq, BLOCK)
        block = self._blocks.get(number)
        if block is None:
            block = self._blocks[number] = [None] * BLOCK
        if block[place] is None:
            block[place] = task
        else:
            self._doubled.setdefault(seq, []).append(task)
        self.highest = max(self.highest, seq)

    def remove(self, seq: int, task: TaskId) -> None:
        number, place = divmod(seq, BLOCK)
        block, others = self._blocks[number], self._doubled.pop(seq, [])
        left = [other for other in (block[place], *others) if other != task]
        block[place] = left[0] if left else None
        if left[1:]:
            self._doubled[seq] = [other for other in left[1:] if other is not None]
        if not any(block):
            del self._blocks[number]

    def above(self, known: int) -> Iterator[TaskId]:
        if self.highest <= known:
            return
        number, place = divmod(known + 1, BLOCK)
        for each in sorted(self._blocks):
            if each >= number:
                block = self._blocks[each]
                yield from filter(None, block[place:] if each == number else block)
        for seq, tasks in self._doubled.items():
            if seq > known:
                yield from tasks


class _Ids:
    """Task ids in order. Mutable."""

    def __init__(self) -> None:
        self._lists: dict[str, list[TaskId]] = {}

    def add(self, task: TaskId) -> None:
        insort(self._lists.setdefault(task[:ID_CHARS], []), task)

    def remove(self, task: TaskId) -> None:
        head = task[:ID_CHARS]
        ids = self._lists[head]
        del ids[bisect_left(ids, task)]
        if not ids:
            del self._lists[head]

    def since(self, text: str) -> Iterator[TaskId]:
        """Those that come with or after this text, in order."""
        head = text[:ID_CHARS]
        for each in sorted(self._lists):
            if each >= head:
                ids = self._lists[each]
                yield from ids if each > head else ids[bisect_left(ids, text) :]
