"""What there is to list: how many tasks are in which queue and state, which are the newest, which has which name.

Everything here is a function of the rows, as the core tells of each that changed; so `status` and `tasks` need not unpack
100,000 rows to show twenty. Tasks are sorted by what they are asked for (queue, status, who submitted), in the order of their
submission. A task's entry is a tuple of plain values, as in `queues.py`.

Times of submission are wall clocks of different machines: this order is for people, and nothing is decided by it.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from heapq import merge
from itertools import islice

from meshq.ids import ObjectId, TaskId
from meshq.ledger.ordered import Ordered
from meshq.ledger.row import Row
from meshq.task import Status

_Entry = tuple[float, int, TaskId]
"""When it was submitted; the number of that write at its peer, which is the order among those of one moment; the task."""


_Label = tuple[str, Status, str]
"""A queue, a state, and a user."""


@dataclass(frozen=True, slots=True)
class _Drawer:
    """The tasks of one queue in one state that one user has submitted."""

    label: _Label
    entries: Ordered[_Entry]


class Catalog:
    """Mutable."""

    def __init__(self) -> None:
        self._drawers: dict[_Label, _Drawer] = {}  # none is empty
        self._drawer_of: dict[TaskId, _Drawer] = {}
        self._named: dict[str, TaskId | dict[TaskId, None]] = {}  # nearly every name is that of one task
        self._sources: Counter[ObjectId] = Counter()

    def __len__(self) -> int:
        return len(self._drawer_of)

    def put(self, row: Row, status: Status) -> None:
        """The row is new or has changed."""
        label = (row.queue.value, status, user_of(row))
        before = self._drawer_of.get(row.task)
        if before is not None and before.label == label:
            return
        if before is None:
            self._name(row)
        else:
            self._take_off(before, row)
        drawer = self._drawers.get(label)
        if drawer is None:
            drawer = self._drawers[label] = _Drawer(label, Ordered())
        drawer.entries.add(_entry(row))
        self._drawer_of[row.task] = drawer

    def remove(self, row: Row) -> None:
        """The row was purged."""
        self._take_off(self._drawer_of.pop(row.task), row)
        named = self._named[row.spec.name]
        if isinstance(named, dict):
            del named[row.task]
        if not isinstance(named, dict) or not named:
            del self._named[row.spec.name]
        if row.spec.source.commit is not None:
            self._sources -= Counter((row.spec.source.commit,))  # forgets what nothing is left of

    # ---- views

    def counts(self) -> Mapping[str, Mapping[Status, int]]:
        """How many tasks are in each queue, by status."""
        found: dict[str, dict[Status, int]] = {}
        for (queue, status, _), drawer in self._drawers.items():
            of_queue = found.setdefault(queue, {})
            of_queue[status] = of_queue.get(status, 0) + len(drawer.entries)
        return found

    def oldest_queued(self) -> Mapping[str, float]:
        """For each queue in which tasks wait, when the first of them was submitted."""
        found: dict[str, float] = {}
        for (queue, status, _), drawer in self._drawers.items():
            if status is Status.QUEUED:
                first = next(iter(drawer.entries))[0]
                found[queue] = min(first, found.get(queue, first))
        return found

    def newest(
        self, most: int, *, queue: str | None = None, status: Status | None = None, user: str | None = None
    ) -> tuple[TaskId, ...]:
        """The tasks of which all this is true, if it is given, those submitted last first."""
        drawers = (
            reversed(drawer.entries)
            for (its_queue, its_status, its_user), drawer in self._drawers.items()
            if queue in (None, its_queue) and status in (None, its_status) and user in (None, its_user)
        )
        return tuple(task for _, _, task in islice(merge(*drawers, reverse=True), most))

    def named(self, name: str) -> tuple[TaskId, ...]:
        """The tasks of this name, in the order of their ids."""
        named = self._named.get(name)
        return () if named is None else tuple(sorted(named)) if isinstance(named, dict) else (named,)

    def sources(self) -> Iterator[ObjectId]:
        """The commits that tasks have as their source."""
        return iter(self._sources)

    def check(self, rows: Iterable[tuple[Row, Status]]) -> None:
        """Assert that this is what one makes of these rows."""
        anew = Catalog()
        for row, status in rows:
            anew.put(row, status)
        assert self.counts() == anew.counts(), "tasks are counted wrongly"
        assert self.newest(len(self) + 1) == anew.newest(len(anew) + 1), "tasks are listed wrongly"
        labels, right = ({task: drawer.label for task, drawer in each._drawer_of.items()} for each in (self, anew))
        assert labels == right, "tasks are in wrong drawers"
        assert {name: self.named(name) for name in self._named} == {name: anew.named(name) for name in anew._named}
        assert self._sources == anew._sources, "sources are counted wrongly"

    # ---- inside

    def _take_off(self, drawer: _Drawer, row: Row) -> None:
        drawer.entries.remove(_entry(row))
        if not drawer.entries:
            del self._drawers[drawer.label]

    def _name(self, row: Row) -> None:
        name, others = row.spec.name, self._named.get(row.spec.name)
        if others is None:
            self._named[name] = row.task
        elif isinstance(others, dict):
            others[row.task] = None
        else:
            self._named[name] = {others: None, row.task: None}
        if row.spec.source.commit is not None:
            self._sources[row.spec.source.commit] += 1


def user_of(row: Row) -> str:
    return row.spec.submitted_by.split("@")[0]


def _entry(row: Row) -> _Entry:
    return (row.spec.submitted_at, row.birth.seq, row.task)
