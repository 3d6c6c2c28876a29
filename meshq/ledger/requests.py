"""Which task was made of which request, so that one that is sent a second time makes no second task.

A client names each request by a random token, which the task's spec keeps. Whoever has the row knows what the request became:
the agent that it was sent to, also after a restart, and any other that has heard of it. On the two sides of a partition a
request can become two tasks; nothing but waiting could prevent that.

Limits. At least the latest KEPT requests: whoever tries again does so within minutes. The latest are those that came last, by
no clock: one that lags would make the requests of its machine the first to be forgotten. Only of what was here at the start,
and of what was over when it came, nothing tells the age but the time that the spec states.
"""

from typing import Final

from meshq.config import ARRAY_TASKS_MAX
from meshq.ids import TaskId
from meshq.ledger.replica import Replica
from meshq.ledger.row import Ended, Row

KEPT: Final = ARRAY_TASKS_MAX  # as many as one submit may hold


class Requests:
    """Mutable. Of a request that became two tasks, the one with the lower id, so that all say the same."""

    def __init__(self) -> None:
        self._tasks: dict[str, tuple[int, float, TaskId]] = {}  # as which it came (0: it is old), when it was submitted
        self._loading = True
        self._arrivals = 0

    def loaded(self) -> None:
        """All rows that were here at the start are put."""
        self._loading = False

    def put(self, row: Row) -> None:
        """There is a task that may be new."""
        request, task = row.spec.request, row.task
        if not request:
            return
        known = self._tasks.get(request)
        if known is None or task < known[2]:
            self._tasks[request] = (self._arrival(row), row.spec.submitted_at, task)
        if len(self._tasks) > 2 * KEPT:
            latest = sorted(self._tasks.items(), key=lambda item: item[1], reverse=True)[:KEPT]
            self._tasks = dict(latest)

    def find(self, request: str, replica: Replica) -> TaskId | None:
        """The task of this request, if it is remembered and was not purged since."""
        known = self._tasks.get(request) if request else None
        return known[2] if known is not None and replica.has(known[2]) else None

    def _arrival(self, row: Row) -> int:
        if self._loading or any(isinstance(fact, Ended) for _, fact in row.facts):
            return 0
        self._arrivals += 1
        return self._arrivals
