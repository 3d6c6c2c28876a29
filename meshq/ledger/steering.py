"""What people may say of tasks and queues once they are there: cancel, move, clear, and the settings of the mesh.

Each changes rows or settings through the journal, or raises and changes nothing; the core does what follows from it.
"""

from collections.abc import Mapping
from itertools import islice

from meshq.errors import TaskFailed, UsageError
from meshq.ids import TaskId
from meshq.ledger.board import Board
from meshq.ledger.journal import Journal
from meshq.ledger.moves import Before, Place, To
from meshq.ledger.retention import Shelf
from meshq.ledger.row import Cancel, Row
from meshq.ledger.settings import DELETED, Settings, queues_with, retention


class Steering:
    def __init__(self, journal: Journal, board: Board, shelf: Shelf) -> None:
        self._journal = journal
        self._board = board
        self._shelf = shelf

    def cancel(self, now: float, task: TaskId, by: str) -> None:
        """Again does nothing. TaskFailed if the task has ended otherwise, UsageError if there is none."""
        row = self._known(task, "cancelling")
        reading = self._board.reading(row)
        if reading.cancel is not None:
            return
        if reading.status.final:
            raise TaskFailed(f"cancelling {row.spec.name!r} ({task}): it has {reading.status.value} already")
        self._journal.write(task, Cancel(by=by, at=self._journal.wall(now)))

    def clear(self, now: float, queue: str, by: str, most: int) -> int:
        """Cancel the tasks that wait in the queue, at most so many; how many that were."""
        tasks = tuple(islice(self._board.waiting_in(queue), most))
        for task in tasks:
            self._journal.write(task, Cancel(by=by, at=self._journal.wall(now)))
        return len(tasks)

    def move(self, task: TaskId, place: Place) -> None:
        """Let a waiting task wait elsewhere. UsageError if there is none, TaskFailed if it does not wait (any more)."""
        row = self._waiting(task, "moving")
        if place == To(row.queue.value):
            raise TaskFailed(
                f"moving {row.spec.name!r} ({task}): it is in the queue {row.queue.value} already",
                "`--last` puts it behind all that wait there",
            )
        if isinstance(place, Before):
            queue = self._waiting(place.other, "moving something before").queue.value
            if queue != row.queue.value:
                raise TaskFailed(
                    f"moving {row.spec.name!r} ({task}) before {place.other}: they wait in different queues",
                    f"move it --to {queue} first",
                )
        for moved, seat in self._board.new_seats(row, place, self._journal.row).items():
            self._journal.move(moved, seat)

    def change_settings(self, now: float, values: Mapping[str, str]) -> None:
        """Set these names to these values, all in one write. UsageError or TaskFailed as `settings.check_change`."""
        self._journal.change_settings(values)
        self.heed_settings(now)

    def absorb_settings(self, now: float, settings: Settings | None) -> bool:
        """Merge what another peer says the settings are, if it says anything. False: refused."""
        if settings is None:
            return True
        accepted = self._journal.replica.absorb_settings(settings)
        self.heed_settings(now)
        return accepted

    def heed_settings(self, now: float) -> None:
        """Act from now on as the settings say."""
        settings = self._journal.replica.settings
        self._shelf.keep(now, retention(settings))
        self._board.pause(now, {queue: by for queue, by in queues_with(settings, "paused").items() if by != DELETED})

    def _known(self, task: TaskId, doing: str) -> Row:
        row = self._journal.replica.get(task)
        if row is None:
            raise UsageError(f"{doing} {task}: there is no such task", "`meshq tasks` lists what there is")
        return row

    def _waiting(self, task: TaskId, doing: str) -> Row:
        row = self._known(task, doing)
        if not self._board.waits(task):
            state = self._board.reading(row).status.value
            raise TaskFailed(f"{doing} {row.spec.name!r} ({task}): it does not wait any more, it is {state}")
        return row
