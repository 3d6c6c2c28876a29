"""The ledger core on the wire and on disk: one clock, one timer, one thread that commits.

Effects are carried out strictly in the order in which the core gave them out: a batch (the effects of one input) waits until
its `Persist` is committed, and no later batch overtakes it. When several batches have gathered, their commits become one
transaction: committing early is always allowed, sending early never. What goes over the network runs beside the queue and
comes back as an input.

If the disk refuses, nothing more is sent, started or answered; the commit is tried again until `COMMIT_PATIENCE` is over. Then
the agent must end (`run` raises the StoreError): what is in memory and not on disk must not be seen by anybody.

If what is on the disk is damaged, it is written again from memory, a row or the whole file. A commit meets with damage, or the
scrub does: a slow walk over all rows on disk, so that it is found while this peer still knows what was written.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import isinf
from typing import TypeVar, assert_never

from meshq import failpoints
from meshq.errors import MeshqError, StoreError
from meshq.ids import Fence, PeerId, TaskId
from meshq.ledger.core import Ledger
from meshq.ledger.database import StoreDamaged
from meshq.ledger.effects import (
    Answer,
    Effect,
    EpochMinted,
    GrantReply,
    GrantRequest,
    Keep,
    PeerView,
    Persist,
    Prepare,
    Push,
    PushReply,
    Question,
    RowChanged,
    SendGrants,
    SendPush,
    SendSync,
    Start,
    Stop,
)
from meshq.ledger.moves import Place
from meshq.ledger.store import Store
from meshq.ledger.transfer import packed_rows, rows_of
from meshq.task import Claimed, Outcome, TaskSpec, Telemetry

log = logging.getLogger("meshq.ledger")
T = TypeVar("T")

COMMIT_PATIENCE = 30.0  # seconds; an agent that cannot commit for so long leaves (design section 6)
COMMIT_AGAIN = 1.0
SCRUB_ROWS = 200  # looked at in one step: 2 ms of the commit thread
SCRUB_SECONDS = 1.0  # between two steps: 100,000 rows take 8 minutes
SCRUB_PAUSE = 600.0  # between two walks; at a start all is read anyway
SYNC_BYTES_PER_SECOND = 20e6  # of rows that are pulled: others use the network, too
GATHER_MAX = 256  # batches in one transaction: what waits for it should not wait long
LATE_IS_LOST = (MeshqError, OSError, TimeoutError)  # how a request over the network may fail


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """What the agent does for the ledger. The callbacks must return at once."""

    send_push: Callable[[PeerId, Push], Awaitable[PushReply]]
    send_sync: Callable[[PeerId, Question], Awaitable[Answer]]
    send_grants: Callable[[PeerId, GrantRequest], Awaitable[GrantReply]]
    on_prepare: Callable[[Claimed], None]
    on_keep: Callable[[Fence, float], None]
    on_start: Callable[[Fence], None]
    on_stop: Callable[[Fence, str], None]
    on_change: Callable[[TaskId], None]
    on_note: Callable[[bytes], None]  # what this peer has is another now: for gossip


@dataclass(frozen=True, slots=True)
class _Batch:
    """The effects of one input; `done` when all of them are carried out."""

    effects: list[Effect]
    done: "asyncio.Future[None]"


class LedgerShell:
    """Inputs may be called from the event loop's thread only, once `run` has begun.

    Inputs that return an awaitable are carried out when it is done; nobody needs to wait for it, unless what follows depends
    on the commit.
    """

    def __init__(self, core: Ledger, store: Store, hooks: Hooks, clock: Callable[[], float]) -> None:
        self._core = core
        self._store = store
        self._hooks = hooks
        self._clock = clock
        self._outbox: deque[_Batch] = deque()
        self._wake = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ledger-commit")
        self._group: asyncio.TaskGroup | None = None
        self._closed = False
        self._turns: list[asyncio.Future[None]] = []  # of those who wait for the next input

    @property
    def core(self) -> Ledger:
        """For views only; inputs go through this shell."""
        return self._core

    async def run(self) -> None:
        """Carry out effects until cancelled. StoreError if the disk has refused for too long."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                self._arm()
                group.create_task(self._carry_out(), name="ledger")
                group.create_task(self._scrub(), name="ledger-scrub")
        except BaseExceptionGroup as group:  # not `except*`: Python 3.11.2 wraps what is raised in there
            refused, rest = group.split(StoreError)
            if refused is None or rest is not None:
                raise
            raise refused.exceptions[0] from None
        finally:
            self._close()

    # ---- commands

    async def submit(self, specs: Sequence[TaskSpec], hold: bool) -> tuple[TaskId, ...]:
        """New tasks, committed here. Raises as `Ledger.submit`, or StoreError."""
        tasks, effects = self._core.submit(self._clock(), specs, hold)
        await self._feed(effects)
        return tasks

    async def cancel(self, task: TaskId, by: str) -> None:
        await self._feed(self._core.cancel(self._clock(), task, by))

    async def move(self, task: TaskId, place: Place) -> None:
        await self._feed(self._core.move(self._clock(), task, place))

    async def change_settings(self, values: Mapping[str, str]) -> None:
        await self._feed(self._core.change_settings(self._clock(), values))

    async def clear(self, queue: str, by: str, most: int) -> int:
        """Cancel what waits in the queue, at most so many tasks; how many that were."""
        count, effects = self._core.clear(self._clock(), queue, by, most)
        await self._feed(effects)
        return count

    async def adopt(self, fences: Sequence[Fence]) -> None:
        await self._feed(self._core.adopt(self._clock(), fences))

    async def leave(self) -> None:
        await self._feed(self._core.leave(self._clock()))

    # ---- inputs

    def peers(self, views: Mapping[PeerId, PeerView]) -> None:
        self._feed(self._core.handle_peers(self._clock(), views))

    def capacity(self, telemetry: Telemetry) -> None:
        self._feed(self._core.handle_capacity(self._clock(), telemetry))

    def stalled(self, seconds: float) -> None:
        self._feed(self._core.handle_stall(self._clock(), seconds))

    def slow(self, fence: Fence) -> None:
        self._feed(self._core.handle_slow(self._clock(), fence))

    def ready(self, fence: Fence) -> None:
        self._feed(self._core.handle_ready(self._clock(), fence))

    def note(self, peer: PeerId, note: bytes) -> None:
        self._feed(self._core.handle_note(self._clock(), peer, note))

    async def ended(self, fence: Fence, outcome: Outcome) -> None:
        """Returns when the end is committed: exec may forget it then. An end may be held back until this peer has proven its
        session, which any input may do."""
        await self._feed(self._core.handle_ended(self._clock(), fence, outcome))
        while self._core.holds_back(fence):
            await self._next_input()
        await self.flush()

    async def push(self, peer: PeerId, push: Push) -> PushReply:
        """A push that came in; the reply, once it is committed."""
        failpoints.reach("offered")
        reply, effects = self._core.handle_push(self._clock(), peer, push)
        await self._feed(effects)
        failpoints.reach("merged")
        return reply

    async def sync(self, peer: PeerId, question: Question) -> Answer:
        """A question that came in. The answer may hold writes of a batch before: they go out after their commit."""
        answer = self._core.handle_sync_request(self._clock(), peer, question)
        await self.flush()
        return answer

    async def grant(self, peer: PeerId, request: GrantRequest) -> GrantReply:
        """A request for votes that came in; the reply, once they are committed. PeerError if it breaks the rules."""
        reply, effects = self._core.handle_grant_request(self._clock(), peer, request)
        await self._feed(effects)
        return reply

    async def flush(self) -> None:
        """Returns when the effects of all inputs so far are carried out, hence committed."""
        if self._outbox:
            await self._feed([])

    # ---- carrying out

    async def _next_input(self) -> None:
        """Returns after the next input. StoreError if there will be none."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._turns.append(turn)
        if self._closed:
            _refuse(turn)
        await turn

    def _feed(self, effects: list[Effect]) -> "asyncio.Future[None]":
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        turns, self._turns = self._turns, []
        for turn in turns:
            if not turn.done():
                turn.set_result(None)
        if self._closed:
            _refuse(done)
        elif effects or self._outbox:
            self._outbox.append(_Batch(effects, done))
            self._wake.set()
        else:
            done.set_result(None)
        self._arm()
        return done

    async def _carry_out(self) -> None:
        while True:
            if not self._outbox:
                self._wake.clear()
                await self._wake.wait()
            batches = [self._outbox[place] for place in range(min(len(self._outbox), GATHER_MAX))]
            if await self._commit(batches):
                self._hooks.on_note(self._core.note)
            for batch in batches:
                for effect in batch.effects:
                    self._carry_out_one(effect)
                self._outbox.popleft()  # only now: who asks whether all is committed must see it until then
                if not batch.done.done():
                    batch.done.set_result(None)

    async def _commit(self, batches: Sequence[_Batch]) -> bool:
        """Commit what the batches want to have stored, in one transaction; again and again while the disk refuses.

        False if there was nothing.
        """
        minted = [effect.ledger_epoch for batch in batches for effect in batch.effects if isinstance(effect, EpochMinted)]
        persists = [effect for batch in batches for effect in batch.effects if isinstance(effect, Persist)]
        if not (minted or persists):
            return False
        since = self._clock()
        while True:
            try:
                await self._in_thread(self._commit_now, minted, persists)
                return True
            except StoreError as error:
                log.error("%s", error)
                if self._clock() - since > COMMIT_PATIENCE:
                    raise
                if isinstance(error, StoreDamaged) and await self._write_anew():
                    return True  # the file holds these changes and later ones, which must not be undone in part
            await asyncio.sleep(COMMIT_AGAIN)

    async def _write_anew(self) -> bool:
        """Replace the damaged database by what is in memory. All that was fed so far is committed hereby: never too early."""
        try:
            await self._in_thread(self._store.replace, self._core.contents())
        except StoreError as error:
            log.error("%s", error)
            return False
        log.warning("the ledger on disk was damaged; the file was set aside and written again from memory")
        return True

    async def _scrub(self) -> None:
        """Look at every row on disk, over and over."""
        last = ""
        while True:
            await asyncio.sleep(SCRUB_SECONDS if last else SCRUB_PAUSE)
            tasks = self._core.tasks_after(last, SCRUB_ROWS)
            await self.flush()  # what is in memory is on disk then
            await self._scrub_some(tasks)
            last = tasks[-1] if tasks else ""

    async def _scrub_some(self, tasks: Sequence[TaskId]) -> None:
        """These rows; after the last ones what else is in the file."""
        wrong: tuple[TaskId, ...] = ()
        try:
            if tasks:
                wrong = await self._in_thread(self._store.check, tasks)
            else:
                await self._in_thread(self._store.check_seals)
        except StoreDamaged as error:
            log.error("%s", error)
            await self._write_anew()
        except StoreError as error:
            log.warning("looking for damage: %s", error)
        if wrong:
            log.warning("%d rows of the ledger were damaged on disk, and are written again: %s", len(wrong), ", ".join(wrong))
            self._feed(self._core.handle_damage(self._clock(), wrong))

    async def _in_thread(self, work: Callable[..., T], *arguments: object) -> T:
        """Nothing else touches the store: commits, and what looks at it, come one after the other."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    def _commit_now(self, minted: Sequence[int], persists: Sequence[Persist]) -> None:
        """In the commit thread."""
        failpoints.reach("storing")
        if minted:
            self._store.mint(minted[-1])
        if persists:
            self._store.commit(persists[0] if len(persists) == 1 else merge_persists(persists))
        failpoints.reach("stored")
        if any(persist.purged for persist in persists):
            failpoints.reach("purged")

    def _carry_out_one(self, effect: Effect) -> None:
        match effect:
            case Persist() | EpochMinted():
                pass  # committed before, with the others that had gathered
            case SendPush(peer, push):
                self._spawn(self._send_push(peer, push))
            case SendSync(peer, question):
                self._spawn(self._send_sync(peer, question))
            case SendGrants(peer, grants):
                self._spawn(self._send_grants(peer, grants))
            case Keep(fence, until):
                self._hooks.on_keep(fence, until)
            case Prepare(claimed):
                failpoints.reach("claimed")
                self._hooks.on_prepare(claimed)
            case Start(fence):
                failpoints.reach("starting")
                self._hooks.on_start(fence)
            case Stop(fence, reason):
                self._hooks.on_stop(fence, reason)
            case RowChanged(task):
                self._hooks.on_change(task)
            case _:
                assert_never(effect)

    async def _send_push(self, peer: PeerId, push: Push) -> None:
        try:
            reply = await self._hooks.send_push(peer, push)
        except LATE_IS_LOST as error:
            log.debug("push %d to %s: %s", push.number, peer, error)
            self._feed(self._core.handle_push_failed(self._clock(), peer, push.number))
        else:
            self._feed(self._core.handle_push_reply(self._clock(), peer, reply))

    async def _send_sync(self, peer: PeerId, question: Question) -> None:
        try:
            answer = await self._hooks.send_sync(peer, question)
            parts = await asyncio.to_thread(rows_of, answer)
        except LATE_IS_LOST as error:
            log.debug("sync with %s: %s", peer, error)
            self._feed(self._core.handle_sync_failed(self._clock(), peer, question.number))
            return
        began = self._clock()
        for part in parts:
            self._feed(self._core.handle_sync_rows(self._clock(), peer, answer.number, part))
            await asyncio.sleep(0)  # let others have the loop
        size = sum(map(len, packed_rows(answer)))
        if (pause := began + size / SYNC_BYTES_PER_SECOND - self._clock()) > 0:
            await asyncio.sleep(pause)
        self._feed(self._core.handle_sync_answer(self._clock(), peer, answer))

    async def _send_grants(self, peer: PeerId, request: GrantRequest) -> None:
        try:
            reply = await self._hooks.send_grants(peer, request)
        except LATE_IS_LOST as error:
            log.debug("grants from %s: %s", peer, error)
            self._feed(self._core.handle_grants_failed(self._clock(), peer, request.number))
        else:
            self._feed(self._core.handle_grant_reply(self._clock(), peer, reply))

    def _spawn(self, work: Awaitable[None]) -> None:
        assert self._group is not None, "effects are carried out inside `run`"

        async def send() -> None:
            await work

        self._group.create_task(send(), name="ledger-send")

    def _arm(self) -> None:
        """Have the timer go off at the core's deadline."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline = self._core.deadline()
        if self._group is not None and not isinf(deadline):
            delay = max(0.0, deadline - self._clock())
            self._timer = asyncio.get_running_loop().call_later(delay, self._handle_timeout)

    def _handle_timeout(self) -> None:
        self._feed(self._core.handle_timeout(self._clock()))

    def _close(self) -> None:
        """Whoever still waits for a commit learns that it will not come."""
        self._group, self._closed = None, True
        if self._timer is not None:
            self._timer.cancel()
        for batch in self._outbox:
            if not batch.done.done():
                _refuse(batch.done)
        self._outbox.clear()
        for turn in self._turns:
            if not turn.done():
                _refuse(turn)
        self._thread.shutdown(wait=True)


def _refuse(done: "asyncio.Future[None]") -> None:
    done.set_exception(StoreError("the ledger has stopped before this was committed"))
    done.exception()  # nobody has to ask


def merge_persists(persists: Sequence[Persist]) -> Persist:
    """One transaction that leaves what these would leave, one after the other: the last of each row, vector entry and floor."""
    gone = {task: None for persist in persists for task in persist.purged}  # for good: no row of them is written afterwards
    rows = {row.task: row for persist in persists for row in persist.rows if row.task not in gone}
    return Persist(
        rows=tuple(rows.values()),
        vector={actor: seq for persist in persists for actor, seq in persist.vector.items()},
        floors={actor: seq for persist in persists for actor, seq in persist.floors.items()},
        durable=any(persist.durable for persist in persists),
        purged=tuple(gone),
        settings=next((each.settings for each in reversed(persists) if each.settings is not None), None),
        grants={task: grant for persist in persists for task, grant in persist.grants.items()},
    )
