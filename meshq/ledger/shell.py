"""The ledger core on the wire and on disk: one clock, one timer, one thread that commits.

Effects are carried out strictly in the order in which the core gave them out: a batch (the effects of one input) waits until
its `Persist` is committed, and no later batch overtakes it. When several batches have gathered, their commits become one
transaction: committing early is always allowed, sending early never. What goes over the network runs beside the queue and
comes back as an input.

If the disk refuses, nothing more is sent, started or answered; the commit is tried again until `COMMIT_PATIENCE` is over. Then
the agent must end (`run` raises the StoreError): what is in memory and not on disk must not be seen by anybody.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import isinf
from typing import assert_never

from meshq.errors import MeshqError, StoreError
from meshq.ids import Fence, PeerId, TaskId
from meshq.ledger.core import Ledger
from meshq.ledger.effects import (
    Effect,
    EpochMinted,
    PeerView,
    Persist,
    Prepare,
    Push,
    PushReply,
    RowChanged,
    SendPush,
    SendSync,
    Start,
    Stop,
    SyncPage,
    SyncRequest,
)
from meshq.ledger.store import Store
from meshq.task import Claimed, Outcome, TaskSpec, Telemetry

log = logging.getLogger("meshq.ledger")

COMMIT_PATIENCE = 30.0  # seconds; an agent that cannot commit for so long leaves (design section 6)
COMMIT_AGAIN = 1.0
GATHER_MAX = 256  # batches in one transaction: what waits for it should not wait long
LATE_IS_LOST = (MeshqError, OSError, TimeoutError)  # how a request over the network may fail


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """What the agent does for the ledger. The callbacks must return at once."""

    send_push: Callable[[PeerId, Push], Awaitable[PushReply]]
    send_sync: Callable[[PeerId, SyncRequest], Awaitable[SyncPage]]
    on_prepare: Callable[[Claimed], None]
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
        """Returns when the end is committed: exec may forget it then."""
        await self._feed(self._core.handle_ended(self._clock(), fence, outcome))

    async def push(self, peer: PeerId, push: Push) -> PushReply:
        """A push that came in; the reply, once it is committed."""
        reply, effects = self._core.handle_push(self._clock(), peer, push)
        await self._feed(effects)
        return reply

    async def sync(self, peer: PeerId, request: SyncRequest) -> SyncPage:
        """A sync request that came in. The page may hold writes of a batch before: they go out after their commit."""
        page = self._core.handle_sync_request(self._clock(), peer, request)
        await self.flush()
        return page

    async def flush(self) -> None:
        """Returns when the effects of all inputs so far are carried out, hence committed."""
        if self._outbox:
            await self._feed([])

    # ---- carrying out

    def _feed(self, effects: list[Effect]) -> "asyncio.Future[None]":
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
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
        loop, since = asyncio.get_running_loop(), self._clock()
        while True:
            try:
                await loop.run_in_executor(self._thread, self._commit_now, minted, persists)
                return True
            except StoreError as error:
                log.error("%s", error)
                if self._clock() - since > COMMIT_PATIENCE:
                    raise
            await asyncio.sleep(COMMIT_AGAIN)

    def _commit_now(self, minted: Sequence[int], persists: Sequence[Persist]) -> None:
        """In the commit thread."""
        if minted:
            self._store.mint(minted[-1])
        if persists:
            self._store.commit(persists[0] if len(persists) == 1 else merge_persists(persists))

    def _carry_out_one(self, effect: Effect) -> None:
        match effect:
            case Persist() | EpochMinted():
                pass  # committed before, with the others that had gathered
            case SendPush(peer, push):
                self._spawn(self._send_push(peer, push))
            case SendSync(peer, request):
                self._spawn(self._send_sync(peer, request))
            case Prepare(claimed):
                self._hooks.on_prepare(claimed)
            case Start(fence):
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

    async def _send_sync(self, peer: PeerId, request: SyncRequest) -> None:
        try:
            page = await self._hooks.send_sync(peer, request)
        except LATE_IS_LOST as error:
            log.debug("sync with %s: %s", peer, error)
            self._feed(self._core.handle_sync_failed(self._clock(), peer))
        else:
            self._feed(self._core.handle_sync_page(self._clock(), peer, page))

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
        self._thread.shutdown(wait=True)


def _refuse(done: "asyncio.Future[None]") -> None:
    done.set_exception(StoreError("the ledger has stopped before this was committed"))
    done.exception()  # nobody has to ask


def merge_persists(persists: Sequence[Persist]) -> Persist:
    """One transaction that leaves what these would leave, one after the other: the last of each row, vector entry and floor."""
    return Persist(
        rows=tuple({row.task: row for persist in persists for row in persist.rows}.values()),
        vector={actor: seq for persist in persists for actor, seq in persist.vector.items()},
        floors={actor: seq for persist in persists for actor, seq in persist.floors.items()},
        durable=any(persist.durable for persist in persists),
    )
