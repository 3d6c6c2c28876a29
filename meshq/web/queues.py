"""What a person may ask of queues: to list, create, delete, pause, resume and clear them, and to move tasks in them.

A queue is there when a live machine serves it, when tasks are in it, or when somebody created or paused it; `list` shows
exactly the queues that every other step knows. What is said of a queue is one of the mesh's settings (`ledger/settings.py`),
so it holds at every peer, also at one that is off now.
"""

from collections.abc import Callable, Mapping
from itertools import islice
from typing import Final

from meshq import config
from meshq.errors import TaskFailed, UsageError
from meshq.ledger.moves import Before, Down, First, Last, Place, To, Up
from meshq.ledger.row import Row
from meshq.ledger.settings import DELETED, created, paused, short
from meshq.ledger.shell import LedgerShell
from meshq.peers import Peers, is_alive
from meshq.trust.hardening import user_name
from meshq.web.documents import Document

SHOWN_MAX: Final = 50  # waiting tasks of one queue
CLEARED_AT_ONCE: Final = 500  # one commit and one push to each peer; other inputs get their turn between two of them
_SIMPLE: Final[Mapping[str, Place]] = {"first": First(), "last": Last(), "up": Up(), "down": Down()}


class QueueSteps:
    """One for an agent. `documents` are those of all queues; `shown` makes one element of `tasks`."""

    def __init__(
        self, *, peers: Peers, ledger: LedgerShell, documents: Callable[[], list[Document]],
        resolve: Callable[[str], Row], shown: Callable[[Row], Document],
    ) -> None:  # fmt: skip
        self._peers = peers
        self._ledger = ledger
        self._documents = documents
        self._resolve = resolve
        self._shown = shown

    def all(self) -> list[Document]:
        return self._documents()

    def show(self, queue: str) -> Document:
        """One queue, who serves it, and the tasks that are next in it."""
        document = self._find(queue)
        core = self._ledger.core
        rows = [row for task in islice(core.waiting_in(queue), SHOWN_MAX) if (row := core.row(task)) is not None]
        return document | {"served_by": self._served_by(queue), "waiting": [self._shown(row) for row in rows]}

    async def create(self, uid: int, queue: str) -> Document:
        """TaskFailed if somebody created it before. It is there from now on, also while nobody serves it."""
        config.check_name(queue, "creating a queue")
        if by := self._ledger.core.settings.value(created(queue)):
            raise TaskFailed(f"creating the queue {queue!r}: it is there, {by} created it")
        await self._ledger.change_settings({created(queue): self._who(uid)})
        return self._find(queue)

    async def delete(self, queue: str) -> Document:
        """Forget that it was created or paused. TaskFailed while tasks are in it or a live machine serves it."""
        document = self._find(queue)
        if inside := document["queued"] + document["running"]:
            raise TaskFailed(
                f"deleting the queue {queue!r}: {inside} tasks wait or run in it",
                f"`meshq queue clear {queue}` cancels what waits, `meshq queue move TASK --to OTHER` keeps a task",
            )
        if serving := self._served_by(queue):
            raise TaskFailed(
                f"deleting the queue {queue!r}: {', '.join(serving)} would still serve it",
                "restart the agent there with `meshq join --queue` and the queues that it shall serve",
            )
        await self._ledger.change_settings({created(queue): DELETED, paused(queue): DELETED})
        return {"name": queue, "deleted": True}

    async def pause(self, uid: int, queue: str) -> Document:
        """Nothing of it is claimed any more; what runs goes on. Of two pauses the first one's author stays."""
        if not self._find(queue)["paused"]:
            await self._ledger.change_settings({paused(queue): self._who(uid)})
        return self._find(queue)

    async def resume(self, queue: str) -> Document:
        document = self._find(queue)
        if document["paused"]:
            await self._ledger.change_settings({paused(queue): DELETED})
        return document | {"paused": False, "paused_by": None}  # it need not be there any more, if nothing else is in it

    async def clear(self, uid: int, queue: str) -> Document:
        """Cancel the tasks that wait in it now; what is claimed or runs goes on."""
        self._find(queue)
        left = sum(1 for _ in self._ledger.core.waiting_in(queue))
        cancelled = 0
        while left > cancelled:
            done = await self._ledger.clear(queue, self._who(uid), min(CLEARED_AT_ONCE, left - cancelled))
            if not done:
                break
            cancelled += done
        return {"name": queue, "cancelled": cancelled}

    async def move(self, reference: str, place: str, target: str) -> Document:
        """Let a waiting task wait elsewhere. `target`: the task of "before", the queue of "to"."""
        row = self._resolve(reference)
        await self._ledger.move(row.task, self._place(place, target))
        return self._shown(self._resolve(row.task))

    def _place(self, place: str, target: str) -> Place:
        if place in _SIMPLE:
            return _SIMPLE[place]
        if place == "before":
            return Before(self._resolve(target).task)
        if place == "to":
            self._find(target)
            return To(target)
        raise UsageError(f"a move to {place[:20]!r}: there is no such place", f"choose {', '.join(_SIMPLE)}, before or to")

    def _find(self, queue: str) -> Document:
        found = next((document for document in self._documents() if document["name"] == queue), None)
        if found is None:
            raise UsageError(
                f"there is no queue {queue[: config.NAME_CHARS_MAX]!r}",
                "`meshq queue list` shows what there is, `meshq queue create` makes one",
            )
        return found

    def _served_by(self, queue: str) -> list[str]:
        alive = [member.peer for member in self._peers.members() if is_alive(member)]
        return sorted(self._peers.name(peer) for peer in alive if queue in self._peers.telemetry(peer).queues)

    def _who(self, uid: int) -> str:
        return short(f"{user_name(uid)}@{self._peers.name(self._peers.me)}")
