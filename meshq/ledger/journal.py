"""What one input has changed so far, and what must follow from it: the rows, the writes, the effects in their order.

Every part of the ledger writes through here, so that one input ends in one commit, and in one push that carries all of it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from meshq.ids import Dot, TaskId
from meshq.ledger.effects import Effect
from meshq.ledger.replica import Replica
from meshq.ledger.row import Fact, Row, Seat


@dataclass(slots=True)
class Journal:
    """Mutable, and empty between two inputs but for the replica and the offset of the wall clock."""

    replica: Replica
    wall_offset: float = 0.0
    touched: dict[TaskId, None] = field(default_factory=dict)  # to be reviewed
    changed: dict[TaskId, None] = field(default_factory=dict)  # to be told to those who watch
    fresh: dict[Dot, TaskId] = field(default_factory=dict)  # own writes: to be committed durably and pushed
    after: list[Effect] = field(default_factory=list)  # what may be done once all this is committed
    durable: bool = False
    settings_dots: list[Dot] = field(default_factory=list)  # own writes to the settings, likewise

    @property
    def empty(self) -> bool:
        return not (self.touched or self.changed or self.fresh or self.after or self.settings_dots)

    def row(self, task: TaskId) -> Row:
        row = self.replica.get(task)
        assert row is not None, f"{task} is no task"
        return row

    def write(self, task: TaskId, fact: Fact) -> Dot:
        """Write a fact into the task's row."""
        dot = self.replica.add(task, fact)
        self.wrote(task, dot)
        return dot

    def wrote(self, task: TaskId, dot: Dot) -> None:
        self.fresh[dot] = task
        self.touched[task] = None

    def move(self, task: TaskId, seat: Seat) -> None:
        """Let the task wait elsewhere."""
        self.wrote(task, self.replica.move(task, seat))

    def change_settings(self, values: Mapping[str, str]) -> None:
        """One write that sets all of these."""
        self.settings_dots.append(self.replica.change_settings(values))

    def absorb(self, rows: Iterable[Row]) -> tuple[TaskId, ...]:
        """Merge what came from outside; the tasks whose rows were refused."""
        refused: list[TaskId] = []
        for row in rows:
            before = self.replica.get(row.task)
            task = self.replica.absorb(row)
            if task is None:
                refused.append(row.task)
                continue
            after = self.replica.get(task)  # None: it was purged here, and only the floors have changed
            if after is not None and after != before:  # not `is`: it may have been packed; nor by vectors: rows may contradict
                self.touched[task] = None
        return tuple(refused)

    def purge(self, task: TaskId) -> None:
        """Forget the task, and what this input has done about it."""
        self.replica.purge(task)
        self.touched.pop(task, None)
        self.changed[task] = None
        for dot in [dot for dot, of in self.fresh.items() if of == task]:
            del self.fresh[dot]

    def wall(self, now: float) -> float:
        """What the wall clock shows: for display only."""
        return now + self.wall_offset

    def clear(self) -> None:
        self.changed, self.fresh, self.after, self.durable, self.settings_dots = {}, {}, [], False, []
