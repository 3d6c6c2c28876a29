"""Waking those who wait for something about a task: one future a waiter, none kept afterwards."""

import asyncio
from typing import Final

from meshq.ids import TaskId

THE_MESH: Final = TaskId("")
"""Stands in the place of a task for what is no task's: peers, capacity, what runs here."""


class Changes:
    """`notify` wakes every `wait` on that task. What changed is for the waiter to look up."""

    def __init__(self) -> None:
        self._waiters: dict[TaskId, set[asyncio.Future[None]]] = {}

    def notify(self, task: TaskId) -> None:
        for waiter in self._waiters.pop(task, set()):
            if not waiter.done():
                waiter.set_result(None)

    async def wait(self, task: TaskId, seconds: float) -> None:
        """Return at the next change of the task, or after that time."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.setdefault(task, set()).add(waiter)
        try:
            await asyncio.wait_for(waiter, seconds)
        except TimeoutError:
            pass
        finally:
            waiting = self._waiters.get(task)
            if waiting is not None:
                waiting.discard(waiter)
                if not waiting:
                    del self._waiters[task]
