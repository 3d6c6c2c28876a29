"""The shell of the worker: carries out its effects with threads, files and processes, and tells it what came of them.

Blocking work is done in threads, waiting in loop tasks that are all tracked and end with `close`. The agent's callbacks are
called from the event loop, never from within a call of the agent, so that two cores never re-enter each other.

At start: `await start()` (which attempts are there?), the agent lets the ledger adopt them, then `adopt()`. Ending the shell
ends nothing that runs.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar, assert_never

from meshq import config, failpoints
from meshq.config import Home
from meshq.errors import MeshqError, StoreError
from meshq.exec import gpulock, outputs
from meshq.exec.attempts import Alive, Attempts, Found, Unstarted
from meshq.exec.effects import (
    AttemptEnded,
    BuildEnvironment,
    CapacityChanged,
    Collect,
    Discard,
    Effect,
    FetchSource,
    Ready,
    Signal,
    Slow,
    Spawn,
)
from meshq.exec.launch import launch_for
from meshq.exec.launcher import SpawnFailed, Zygote
from meshq.exec.preparation import PreparationFailed
from meshq.exec.probe import Probe, Sample
from meshq.exec.worker import Adopted, Attempt, Capacity, Exited, NeverStarted, StillRunning, Vanished, Worker, WorkerConfig
from meshq.ids import Fence, TaskId
from meshq.task import Claimed, Environment, Gpu, Outcome

log = logging.getLogger("meshq.exec")
T = TypeVar("T")

EXPIRE_SECONDS: Final = 3600.0
FIRST_SAMPLE_SECONDS: Final = 3.0
RETRY_SECONDS: Final = 1.0  # after an error of the system while an attempt was watched

FetchSourceInto = Callable[[Claimed, Path], Awaitable[None]]
"""Check the claim's source out into this empty folder. PreparationFailed if it can't be done."""

MakeEnvironment = Callable[[Environment], Awaitable[str]]
"""Have the environment ready; the answer is the absolute path of its interpreter. PreparationFailed if it can't be done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Callbacks:
    """What the agent wants to know; called on the event loop, one after the other."""

    on_ready: Callable[[Fence], None]
    on_slow: Callable[[Fence], None]
    on_ended: Callable[[Fence, Outcome], None]
    on_capacity: Callable[[], None]


class ExecShell:
    """Everything that this peer runs."""

    def __init__(
        self,
        *,
        home: Home,
        config: WorkerConfig,
        peer_name: Callable[[], str],
        source: FetchSourceInto,
        environment: MakeEnvironment,
        callbacks: Callbacks,
        gpus_allowed: frozenset[int] | None = None,
        environ: Mapping[str, str] = os.environ,
        limits: tuple[tuple[int, int], ...] = (),
        slot_for_each_gpu: bool = False,
        with_probe: bool = True,
    ) -> None:
        """`gpus_allowed`: the indices that may be given to tasks, None for all. `environ`: what tasks inherit; `limits`:
        (RLIMIT_…, value) that tasks get where they should not inherit the agent's. `slot_for_each_gpu`: as soon as the GPUs are
        known there are as many slots as may be given out of them, but one at least."""
        self._home = home
        self._peer_name = peer_name
        self._source = source
        self._environment = environment
        self._callbacks = callbacks
        self._gpus_allowed = gpus_allowed
        self._environ = dict(environ)
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._worker = Worker(config, self._loop.time())
        self._attempts = Attempts(home.attempts)
        self._zygote = Zygote()
        self._slot_for_each_gpu = slot_for_each_gpu
        self._probe = Probe(home.root, self._shims) if with_probe else None
        self._sample: Sample | None = None
        self._measured = asyncio.Event()
        self._found: list[Found] = []
        self._folders: dict[Fence, asyncio.Task[Path]] = {}
        self._preparing: dict[Fence, set[asyncio.Task[None]]] = {}
        self._keep_until: dict[Fence, float] = {}
        self._keeping: dict[Fence, asyncio.Task[None]] = {}
        self._keeper = ThreadPoolExecutor(max_workers=1, thread_name_prefix="exec-keep")  # never behind a long checkout
        self._tasks: set[asyncio.Task[Any]] = set()
        self._last_words: set[asyncio.Task[Any]] = set()  # those of `_tasks` that `close` waits for instead of ending them
        self._running: Mapping[Fence, TaskId] = {}  # read by the probe's thread; replaced, never changed
        self._timer: asyncio.TimerHandle | None = None

    # --- life -------------------------------------------------------------------------------------------------------

    async def start(self) -> tuple[Fence, ...]:
        """Find what an earlier run left behind. The fences of attempts that run or whose end is to be reported."""
        self._found = await asyncio.to_thread(self._attempts.scan)
        try:
            await self._zygote.start()
        except SpawnFailed as error:
            log.error("%s; it is tried again with the next task", error)
        self._track(self._expire())
        if self._probe is not None:
            self._probe.start(self._sampled)
            with contextlib.suppress(TimeoutError):  # a driver may hang: the machine is then unknown for longer
                await asyncio.wait_for(self._measured.wait(), FIRST_SAMPLE_SECONDS)
        return tuple(found.claimed.fence for found in self._found)

    def adopt(self) -> None:
        """Take these attempts on: watch those that run, report the ends of the others."""
        found, self._found = self._found, []
        for each in found:
            state, gpus = _adoptable(each)
            log.info("adopting attempt %s: %s", each.claimed.fence, state)
            if isinstance(state, StillRunning):
                self._track(self._watch(each.claimed.fence))
            self._carry_out(self._worker.adopt(self._loop.time(), each.claimed, state, gpus))

    async def close(self) -> None:
        """Stop watching and preparing. Shims and their tasks go on; the next start adopts them."""
        if self._timer is not None:
            self._timer.cancel()
        if self._probe is not None:
            self._probe.close()
        for task in self._tasks - self._last_words:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._keeper.shutdown(wait=False, cancel_futures=True)
        await self._zygote.close()

    # --- commands of the agent --------------------------------------------------------------------------------------

    def prepare(self, claimed: Claimed) -> None:
        self._carry_out(self._worker.prepare(self._loop.time(), claimed))

    def keep(self, fence: Fence, until: float) -> None:
        """The attempt, which is about to start or runs, may go on until then (CLOCK_BOOTTIME) and no longer."""
        if fence in self._worker.attempts():
            self._keep_until[fence] = until
            if fence not in self._keeping:
                self._keeping[fence] = self._track(self._keep(fence))

    def start_attempt(self, fence: Fence) -> None:
        self._carry_out(self._worker.start(self._loop.time(), fence))

    def stop(self, fence: Fence, reason: str) -> None:
        """`reason` is one of `worker.STOP_KINDS`: cancelled, superseded, released."""
        self._carry_out(self._worker.stop(self._loop.time(), fence, reason))

    def reported(self, fence: Fence) -> None:
        """The outcome is durable in the ledger."""
        self._last_words.add(self._track(asyncio.to_thread(self._attempts.mark_reported, fence)))

    # --- views ------------------------------------------------------------------------------------------------------

    def free(self) -> Capacity:
        return self._worker.free()

    def slots(self) -> int:
        """How many there are, given out or not."""
        return self._worker.slots

    def attempts(self) -> Mapping[Fence, Attempt]:
        return self._worker.attempts()

    def sample(self) -> Sample | None:
        """The latest look at the machine, its GPUs with the tasks that have them; None before the first one."""
        if self._sample is None:
            return None
        tasks = {gpu: each.claimed.task for each in self._worker.attempts().values() for gpu in each.gpus}
        gpus: tuple[Gpu, ...] = tuple(replace(gpu, task=tasks.get(gpu.index)) for gpu in self._sample.gpus)
        return replace(self._sample, gpus=gpus)

    # --- effects ----------------------------------------------------------------------------------------------------

    def _carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            self._carry_out_one(effect)
        self._running = {fence: each.claimed.task for fence, each in self._worker.attempts().items()}
        self._arm()

    def _carry_out_one(self, effect: Effect) -> None:
        match effect:
            case FetchSource(claimed):
                self._track_preparing(claimed.fence, self._fetch(claimed))
            case BuildEnvironment(claimed):
                self._track_preparing(claimed.fence, self._build(claimed))
            case Spawn(claimed):
                self._track(self._spawn(claimed.fence))
            case Signal(fence, reason):
                self._attempts.signal(fence, b"stop " + reason.encode())
            case Collect(fence):
                self._track(self._collect(fence))
            case Discard(fence):
                self._last_words.add(self._track(self._discard(fence)))
            case Ready() | Slow() | AttemptEnded() | CapacityChanged():
                self._tell(effect)
            case _:
                assert_never(effect)

    def _tell(self, effect: Ready | Slow | AttemptEnded | CapacityChanged) -> None:
        match effect:
            case Ready(fence):
                failpoints.reach("prepared")
                self._loop.call_soon(self._callbacks.on_ready, fence)
            case Slow(fence):
                self._loop.call_soon(self._callbacks.on_slow, fence)
            case AttemptEnded(fence, outcome):
                self._loop.call_soon(self._callbacks.on_ended, fence, _dated(outcome))
            case CapacityChanged():
                self._loop.call_soon(self._callbacks.on_capacity)
            case _:
                assert_never(effect)

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if (deadline := self._worker.deadline()) < float("inf"):
            self._timer = self._loop.call_at(deadline, self._timeout)

    def _timeout(self) -> None:
        self._carry_out(self._worker.handle_timeout(self._loop.time()))

    # --- preparing --------------------------------------------------------------------------------------------------

    async def _fetch(self, claimed: Claimed) -> None:
        with self._failure_is_told(claimed.fence):
            await self._folder(claimed)
            if claimed.spec.source.commit is not None:
                await self._source(claimed, self._attempts.work(claimed.fence))
            self._carry_out(self._worker.handle_source_ready(self._loop.time(), claimed.fence))

    async def _build(self, claimed: Claimed) -> None:
        """The environment, then `launch.json`, so that starting takes one request to the zygote."""
        with self._failure_is_told(claimed.fence):
            await self._folder(claimed)
            needs_python = claimed.spec.environment.needs_python
            python = await self._environment(claimed.spec.environment) if needs_python else ""
            attempt = self._worker.attempts().get(claimed.fence)
            if attempt is None:
                return  # stopped meanwhile
            await asyncio.to_thread(self._write_launch, claimed, python, attempt.gpus)
            self._carry_out(self._worker.handle_environment_ready(self._loop.time(), claimed.fence, python))

    async def _folder(self, claimed: Claimed) -> Path:
        """The attempt's folder, made by whoever asks first."""
        making = self._folders.get(claimed.fence)
        if making is None:
            making = self._folders[claimed.fence] = self._track(asyncio.to_thread(self._attempts.create, claimed))
        return await asyncio.shield(making)

    def _write_launch(self, claimed: Claimed, python: str, gpus: tuple[int, ...]) -> None:
        launch = launch_for(
            claimed,
            self._attempts,
            python=python,
            gpus=gpus,
            gpu_names=tuple(self._gpu_name(index) for index in gpus),
            limits=self._limits,
            home=self._home.root,
            peer_name=self._peer_name(),
            environ=self._environ,
        )
        self._attempts.write_launch(launch)

    def _gpu_name(self, index: int) -> str:
        """What all agents of this machine call the GPU: its UUID where NVML gives one."""
        gpus = self._sample.gpus if self._sample is not None else ()
        return next((gpu.uuid for gpu in gpus if gpu.index == index and gpu.uuid), f"index-{index}")

    @contextlib.contextmanager
    def _failure_is_told(self, fence: Fence) -> Iterator[None]:
        try:
            yield
        except PreparationFailed as error:
            self._fail(fence, error.reason, error.retryable, error.blameless)
        except (MeshqError, OSError) as error:
            self._fail(fence, str(error), True)
        except Exception as error:
            log.exception("preparing attempt %s met a bug", fence)
            self._fail(fence, f"preparing it failed with {type(error).__name__}: {error}", True)

    def _fail(self, fence: Fence, reason: str, retryable: bool, blameless: bool = False) -> None:
        effects = self._worker.handle_preparation_failed(self._loop.time(), fence, reason, retryable, blameless)
        self._carry_out(effects)

    # --- running ----------------------------------------------------------------------------------------------------

    async def _keep(self, fence: Fence) -> None:
        """Write the last of what was said: one after the other, so that no older one ever replaces a newer."""
        try:
            while (until := self._keep_until.pop(fence, None)) is not None:
                await self._loop.run_in_executor(self._keeper, self._attempts.keep, fence, until)
        except StoreError as error:
            log.warning("%s; if that goes on, its shim stops it", error)
        finally:
            del self._keeping[fence]

    async def _spawn(self, fence: Fence) -> None:
        if (keeping := self._keeping.get(fence)) is not None:
            await asyncio.wait([keeping])  # the shim looks at once
        try:
            await self._zygote.spawn(self._attempts.folder(fence))
        except SpawnFailed as error:
            # Only the folder knows whether a shim that nobody heard of got as far as the user's code.
            if isinstance(await asyncio.to_thread(self._attempts.inspect, fence), Unstarted):
                self._carry_out(self._worker.handle_spawn_failed(self._loop.time(), fence, str(error)))
                return
            log.warning("attempt %s: %s; its folder decides", fence, error)
        failpoints.reach("launched")
        self._carry_out(self._worker.handle_spawned(self._loop.time(), fence))
        await self._watch(fence)

    async def _watch(self, fence: Fence) -> None:
        while True:
            try:
                ended = await self._attempts.watch(fence)
                break
            except OSError as error:
                log.warning("watching attempt %s: %s; trying again", fence, error)
                await asyncio.sleep(RETRY_SECONDS)
        self._carry_out(self._worker.handle_exited(self._loop.time(), fence, ended))

    async def _collect(self, fence: Fence) -> None:
        try:
            listing = await asyncio.to_thread(outputs.list_outputs, self._attempts.outputs(fence))
        except OSError as error:
            log.warning("the outputs of attempt %s can't be listed: %s", fence, error)
            listing = outputs.Listing(files=(), skipped=0)
        if listing.skipped:
            log.warning("attempt %s: %d outputs are left out: links, special files, or too many", fence, listing.skipped)
        first = listing.files[: config.OUTPUT_FILES_IN_ROW_MAX]
        self._carry_out(self._worker.handle_collected(self._loop.time(), fence, first, len(listing.files)))

    async def _discard(self, fence: Fence) -> None:
        """End what still prepares the attempt, then clear its folder."""
        others = self._preparing.pop(fence, set()) - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        if (making := self._folders.pop(fence, None)) is not None:
            await asyncio.wait([making])
        await asyncio.to_thread(self._attempts.clear, fence)
        failpoints.reach("discarded")

    async def _expire(self) -> None:
        while True:
            if expired := await asyncio.to_thread(self._attempts.expire, time.time()):
                log.info("removed the logs and outputs of %d old attempts", len(expired))
            await asyncio.sleep(EXPIRE_SECONDS)

    # --- the machine ------------------------------------------------------------------------------------------------

    def _sampled(self, sample: Sample) -> None:
        """In the probe's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the agent is ending
            self._loop.call_soon_threadsafe(self._handle_sample, sample)

    def _handle_sample(self, sample: Sample) -> None:
        self._sample = sample
        self._measured.set()
        given = {each.claimed.task: each.gpus for each in self._worker.attempts().values()}
        mine = {index for indices in given.values() for index in indices}
        usable = tuple(
            each
            for each in sample.usable_gpus(given)
            if self._is_allowed(each.index) and (each.index in mine or gpulock.is_free(self._gpu_name(each.index)))
        )
        self._carry_out(self._worker.handle_gpus(self._loop.time(), usable))
        if self._slot_for_each_gpu:
            whole = sum(1 for gpu in sample.gpus if self._is_allowed(gpu.index) and not gpu.mig_mode)
            self._carry_out(self._worker.handle_slots(self._loop.time(), max(1, whole)))

    def _is_allowed(self, index: int) -> bool:
        return self._gpus_allowed is None or index in self._gpus_allowed

    def _shims(self) -> dict[int, TaskId]:
        """In the probe's thread: the shims of what runs, and the task of each."""
        pids = ((self._attempts.shim_pid(fence), task) for fence, task in self._running.items())
        return {pid: task for pid, task in pids if pid is not None}

    # --- loop tasks -------------------------------------------------------------------------------------------------

    def _track(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run it, hold it until its end, and log a failure that nobody else would see."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _track_preparing(self, fence: Fence, work: Coroutine[Any, Any, None]) -> None:
        self._preparing.setdefault(fence, set()).add(self._track(work))

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        self._last_words.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, MeshqError):
            log.error("a loop task of exec failed", exc_info=error)


def _adoptable(found: Found) -> tuple[Adopted, tuple[int, ...]]:
    """What was found in the folder, in the worker's words, and the GPUs that it holds."""
    match found.state:
        case Alive(gpus=gpus):
            return StillRunning(), gpus
        case Unstarted():
            return NeverStarted(), ()
        case Exited() | Vanished() as ended:
            return ended, ()
        case _:
            assert_never(found.state)


def _dated(outcome: Outcome) -> Outcome:
    """An end without user code has no time of its own."""
    return outcome if outcome.ended_at else replace(outcome, ended_at=time.time())
