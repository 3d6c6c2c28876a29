"""The log of a task from its beginning to its end: through attempts, lost connections and peers that come back.

Problem. The attempt that is followed runs at a peer whose agent may be restarted at any time while the task goes on; its
machine may vanish; the task may run again elsewhere. A follower must get every byte once, and must be told where some are
missing for good.

Rule. Whether a connection breaks off says nothing about the attempt: only the row does. While the row holds it for live, ask
its runner again, from the offset that was reached. Once the row says that it is over, ask for what there is, at the runner
and at everybody else; if nobody has it, say that the log broke off and go on. An attempt that was given up as lost may come
back (`Back` in the ledger): then its log goes on where it stopped. The end is the task's: final, and nothing left to show.

Limits. PAUSE_SECONDS between two tries, GIVE_UP_SECONDS for an attempt that is over; nothing is polled while chunks can come.

Reading order: `first_attempt`, `next_attempt`, `Follower.pieces`, `Follower._attempt`.
"""

import re
import time
from collections.abc import AsyncIterator, Callable, Container
from dataclasses import dataclass
from typing import Final, Protocol

from meshq.errors import TaskFailed, Unreachable, UsageError
from meshq.exec.logs import Chunk
from meshq.ids import Fence, PeerId, TaskId, is_fence, split_fence
from meshq.ledger import holder
from meshq.ledger.holder import AttemptView
from meshq.ledger.row import Row
from meshq.pieces import Piece
from meshq.web import documents
from meshq.web.changes import Changes
from meshq.web.streams import while_checked

PAUSE_SECONDS: Final = 1.0  # a restarted agent is back in about two
GIVE_UP_SECONDS: Final = 5.0  # for a runner that is being restarted just when its attempt has ended
START_SECONDS: Final = 30.0  # between two looks at a task that waits; its changes wake earlier
LIVE: Final = ("claimed", "preparing", "running")

_POSITION = re.compile(r"(.{1,64}):([0-9]{1,18})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """How far a follower got: so many bytes of this attempt's log."""

    fence: Fence
    offset: int


def parse_position(text: str) -> Position:
    """`<fence>:<offset>`, else UsageError."""
    match = _POSITION.fullmatch(text)
    if match is None or not is_fence(match[1]):
        raise UsageError(f"from: {text[:80]!r} is no position in a log")
    return Position(fence=Fence(match[1]), offset=int(match[2]))


class Logs(Protocol):
    """Where the logs of attempts come from: `Transfers`."""

    def log(self, fence: Fence, runner: PeerId, *, offset: int = 0, tail: int | None, follow: bool) -> AsyncIterator[Chunk]: ...


def first_attempt(row: Row, number: int | None) -> AttemptView | None:
    """The started attempt that stands for the task, else the last one; with `number` of those that have it (two may have it
    after a partition)."""
    started = [view for view in _started(row) if number is None or view.number == number]
    decisive = documents.story(row).attempt
    return decisive if decisive in started else started[-1] if started else None


def next_attempt(row: Row, latest: Fence, unfinished: Container[Fence]) -> AttemptView | None:
    """The attempt to show when `latest` has been shown: the one that started after it, else one of the `unfinished` that is
    lost no more. None if there is none yet, or the result was shown: what else ran then was superseded."""
    if (result := holder.result(row)) is not None and split_fence(latest)[1] == result[0]:
        return None
    started = _started(row)
    fences = [view.fence for view in started]
    later = started[fences.index(latest) + 1 :] if latest in fences else []
    back = (view for view in started if view.fence in unfinished and view.status != "lost")
    return later[0] if later else next(back, None)


def _started(row: Row) -> list[AttemptView]:
    """Those that may have a log, in order."""
    return [view for view in holder.attempts(row) if view.started_at is not None]


class Follower:
    """Follows the log of one task for one reader. `row` gives its newest row, `names` the names of peers."""

    def __init__(self, *, row: Callable[[], Row], logs: Logs, names: Callable[[PeerId], str], changes: Changes) -> None:
        self._row = row
        self._logs = logs
        self._names = names
        self._changes = changes
        self._task: TaskId = row().task

    async def pieces(self, *, number: int | None, tail: int | None, start: Position | None) -> AsyncIterator[Piece]:
        """Every attempt that starts, or only that with `number`, until the task is final; from `start` on if given."""
        latest: Fence | None = None
        unfinished: dict[Fence, int] = {}
        if start is not None:
            unfinished[start.fence], tail = start.offset, None
        while True:
            row = self._row()
            if latest is not None:
                view = next_attempt(row, latest, unfinished)
            else:
                view = first_attempt(row, number) if start is None else _view(row, start.fence)
            if view is not None:
                offset = unfinished.pop(view.fence, 0)
                async for piece in self._attempt(view, offset, tail):
                    offset = piece.end
                    yield piece
                latest, tail = view.fence, None
                if number is not None:
                    return
                if self._is(latest, ("lost",)):
                    unfinished[latest] = offset
            elif holder.status(row).final:
                return
            else:
                await self._changes.wait(self._task, START_SECONDS)

    async def _attempt(self, view: AttemptView, offset: int, tail: int | None) -> AsyncIterator[Piece]:
        """The log of one attempt from there on, however often the way to it breaks."""

        def piece(at: int, data: bytes = b"", broke_off: bool = False) -> Piece:
            name = self._names(view.peer)
            return Piece(fence=view.fence, attempt=view.number, peer=name, offset=at, data=data, broke_off=broke_off)

        give_up_at: float | None = None
        while True:
            live = self._is(view.fence, LIVE)  # asked before reading: what was written before the end is not missed
            chunks = self._logs.log(view.fence, view.peer, offset=offset, tail=tail, follow=live)
            try:
                async for chunk in while_checked(chunks, lambda: self._check_live(view.fence)) if live else chunks:
                    offset, tail = chunk.end, None
                    give_up_at = None if chunk.data else give_up_at
                    yield piece(chunk.offset, chunk.data)
                return
            except (TaskFailed, Unreachable):
                if not live:
                    give_up_at = give_up_at or time.monotonic() + GIVE_UP_SECONDS
                    if time.monotonic() >= give_up_at:
                        break
            await self._changes.wait(self._task, PAUSE_SECONDS)
        yield piece(offset, broke_off=True)

    def _is(self, fence: Fence, statuses: Container[str]) -> bool:
        view = _view(self._row(), fence)
        return view is not None and view.status in statuses

    def _check_live(self, fence: Fence) -> None:
        """A source that is silent although the attempt is over: its machine was switched off, and no packet said so."""
        if not self._is(fence, LIVE):
            raise Unreachable(f"the attempt {fence} is over")


def _view(row: Row, fence: Fence) -> AttemptView | None:
    return next((view for view in holder.attempts(row) if view.fence == fence), None)
