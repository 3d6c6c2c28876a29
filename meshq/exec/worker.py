"""The worker: which attempts this peer prepares and runs, and what it has left to give.

Problem. The ledger hands over claims, later says start or stop. Fetching a source and building an environment take from
milliseconds to minutes and fail; a stop may come at any moment, also while the shim is being started; the agent may die and
find its attempts again. Two attempts must never get one GPU, and each attempt must be reported exactly once.

Invariant. An attempt is in exactly one state, and the state carries just the data that is meaningful in it. What an attempt was
given (a slot, cores, memory, single GPUs) is its own from `prepare` (or `adopt`) to its `AttemptEnded`, after which the
attempt is forgotten: whatever arrives for it then finds nothing and changes nothing.

Algorithm. States, and what leads from one to the next:

    Preparing --source and environment ready--> Prepared --start--> Starting --spawned--> Running
    Preparing --failed--> end                                       Starting --spawn failed--> end
    Preparing, Prepared --stop--> end         Starting --stop--> Aborting --spawned--> Stopping      Running --stop--> Stopping
    Starting, Running, Aborting, Stopping --exited--> Collecting --collected--> end

How an exit becomes an outcome is one function (`outcome_of`). GPUs are handed out singly, the lowest index first, among those
that the probe called usable: there, and free of other people's processes.

Limits. Capacity is what the peer was told to give, never what the machine happens to have free now. A claim that does not
fit (it was made on older knowledge) ends at once as released. Memory and cores are promises between tasks; nothing enforces
them here. An adopted attempt is counted even where it exceeds the capacity.

Reading. Design sections 6 and 7; `effects.py` for what the shell does; `attempts.py` for what it finds after a restart.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, assert_never

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
from meshq.ids import Fence
from meshq.task import Claimed, EndKind, Needs, Outcome, OutputFile

SLOW_SECONDS: Final = 1.0  # preparing for longer than this is told to people

ISOLATED: Final = "isolated"  # what the shim calls a stop for want of grants (`shim.ISOLATED`)

STOP_KINDS: Final[Mapping[str, EndKind]] = {
    kind.value: kind for kind in (EndKind.CANCELLED, EndKind.SUPERSEDED, EndKind.RELEASED)
}
"""The reasons to stop an attempt, each named as the end that it leads to. Released: this peer is leaving."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A GPU that may be given out."""

    index: int
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """What this peer gives to tasks. GPUs come by `handle_gpus`."""

    slots: int
    cpus: int
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What is left of it. Never negative."""

    slots: int
    cpus: int
    memory_bytes: int
    gpus: tuple[int, ...]  # indices, ascending


@dataclass(frozen=True, slots=True, kw_only=True)
class Exited:
    """How the task ended, as the shim recorded it. Wall-clock seconds."""

    exit_code: int  # 0-255; signal n is 128+n
    signal: int = 0  # that killed it; 0: none
    stopped: str = ""  # what the shim was told to stop for, before the task ended; empty: nothing
    timed_out: bool = False
    out_of_memory: bool = False  # the kernel killed something for want of memory meanwhile, and this task by SIGKILL
    started_at: float
    ended_at: float


@dataclass(frozen=True, slots=True)
class Vanished:
    """The shim is gone without a word: it was killed, or the machine went down."""


Exit = Exited | Vanished


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparing:
    """Source and environment are being made ready."""

    claimed: Claimed
    gpus: tuple[int, ...]
    slow_at: float  # inf: said so already
    source_ready: bool = False
    python: str | None = None  # None: the environment is not ready


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Waits for the ledger's word."""

    claimed: Claimed
    gpus: tuple[int, ...]
    python: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Starting:
    """The shim is being started; user code may run already."""

    claimed: Claimed
    gpus: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Aborting:
    """It was to stop while the shim was being started."""

    claimed: Claimed
    gpus: tuple[int, ...]
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """User code runs."""

    claimed: Claimed
    gpus: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopping:
    """User code runs and was told to end."""

    claimed: Claimed
    gpus: tuple[int, ...]
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Collecting:
    """User code has ended; its outputs are being listed."""

    claimed: Claimed
    gpus: tuple[int, ...]
    outcome: Outcome  # without outputs


Attempt = Preparing | Prepared | Starting | Aborting | Running | Stopping | Collecting


@dataclass(frozen=True, slots=True)
class StillRunning:
    """What `adopt` may find: its shim runs."""


@dataclass(frozen=True, slots=True)
class NeverStarted:
    """What `adopt` may find: it was prepared at most, and can't start any more."""


Adopted = StillRunning | NeverStarted | Exited | Vanished


class Worker:
    """The attempts of one peer. All inputs about an attempt that is over change nothing and return []."""

    def __init__(self, config: WorkerConfig, now: float) -> None:
        assert config.slots >= 0 and config.cpus >= 0 and config.memory_bytes >= 0
        self.slots = config.slots
        self._config = config
        self._now = now
        self._usable: tuple[Device, ...] = ()
        self._attempts: dict[Fence, Attempt] = {}

    # --- commands of the ledger -------------------------------------------------------------------------------------

    def prepare(self, now: float, claimed: Claimed) -> list[Effect]:
        """Take the claim on. It ends at once as released if it does not fit."""
        self._clock(now)
        assert claimed.fence not in self._attempts
        gpus = self._choose_gpus(claimed.spec.needs)
        if gpus is None or not self._fits(claimed.spec.needs):
            lacking = _released("this peer has no room for it any more")
            return [AttemptEnded(claimed.fence, lacking)]
        self._attempts[claimed.fence] = Preparing(claimed=claimed, gpus=gpus, slow_at=now + SLOW_SECONDS)
        return [FetchSource(claimed), BuildEnvironment(claimed), CapacityChanged()]

    def start(self, now: float, fence: Fence) -> list[Effect]:
        """The claim holds and `started` is durable: run it. It must be ready, or over."""
        self._clock(now)
        attempt = self._attempts.get(fence)
        if attempt is None:
            return []
        assert isinstance(attempt, Prepared), attempt
        self._attempts[fence] = Starting(claimed=attempt.claimed, gpus=attempt.gpus)
        return [Spawn(attempt.claimed, attempt.python, attempt.gpus)]

    def stop(self, now: float, fence: Fence, reason: str) -> list[Effect]:
        """End it, for one of `STOP_KINDS`."""
        self._clock(now)
        assert reason in STOP_KINDS, reason
        match attempt := self._attempts.get(fence):
            case None | Aborting() | Stopping() | Collecting():
                return []
            case Preparing() | Prepared():
                return self._end(fence, Outcome(kind=STOP_KINDS[reason], reason=reason))
            case Starting():
                self._attempts[fence] = Aborting(claimed=attempt.claimed, gpus=attempt.gpus, reason=reason)
                return []
            case Running():
                self._attempts[fence] = Stopping(claimed=attempt.claimed, gpus=attempt.gpus, reason=reason)
                return [Signal(fence, reason)]
            case _:
                assert_never(attempt)

    def adopt(self, now: float, claimed: Claimed, state: Adopted, gpus: tuple[int, ...]) -> list[Effect]:
        """Take on an attempt that an earlier run of the agent left behind."""
        self._clock(now)
        fence = claimed.fence
        assert fence not in self._attempts
        self._attempts[fence] = Running(claimed=claimed, gpus=gpus)
        match state:
            case StillRunning():
                return [CapacityChanged()]
            case Exited() | Vanished():
                return self.handle_exited(now, fence, state)
            case NeverStarted():
                return self._end(fence, _released("the agent ended before it was started"))
            case _:
                assert_never(state)

    # --- what the shell reports -------------------------------------------------------------------------------------

    def handle_source_ready(self, now: float, fence: Fence) -> list[Effect]:
        self._clock(now)
        attempt = self._attempts.get(fence)
        return self._advance(replace(attempt, source_ready=True)) if isinstance(attempt, Preparing) else []

    def handle_environment_ready(self, now: float, fence: Fence, python: str) -> list[Effect]:
        """`python` is the environment's interpreter, empty for a plain command."""
        self._clock(now)
        attempt = self._attempts.get(fence)
        return self._advance(replace(attempt, python=python)) if isinstance(attempt, Preparing) else []

    def handle_preparation_failed(
        self, now: float, fence: Fence, reason: str, retryable: bool, blameless: bool = False
    ) -> list[Effect]:
        """`retryable`: another peer may do better. Otherwise the task itself is at fault. `blameless`: it surely is not."""
        self._clock(now)
        if not isinstance(self._attempts.get(fence), Preparing):
            return []
        kind = EndKind.RELEASED if retryable else EndKind.FAILED
        return self._end(fence, Outcome(kind=kind, reason=reason, blameless=blameless))

    def handle_spawned(self, now: float, fence: Fence) -> list[Effect]:
        self._clock(now)
        match attempt := self._attempts.get(fence):
            case Starting():
                self._attempts[fence] = Running(claimed=attempt.claimed, gpus=attempt.gpus)
                return []
            case Aborting():
                self._attempts[fence] = Stopping(claimed=attempt.claimed, gpus=attempt.gpus, reason=attempt.reason)
                return [Signal(fence, attempt.reason)]
            case _:
                return []  # it has ended already: the exit of a short task may be seen first

    def handle_spawn_failed(self, now: float, fence: Fence, reason: str) -> list[Effect]:
        """No user code ran, and none will."""
        self._clock(now)
        match attempt := self._attempts.get(fence):
            case Starting():
                return self._end(fence, Outcome(kind=EndKind.RELEASED, reason=reason))
            case Aborting():
                return self._end(fence, Outcome(kind=STOP_KINDS[attempt.reason], reason=attempt.reason))
            case _:
                return []

    def handle_exited(self, now: float, fence: Fence, exit: Exit) -> list[Effect]:
        """The shim is gone, and nothing of the attempt runs any more."""
        self._clock(now)
        match attempt := self._attempts.get(fence):
            case Starting() | Running():
                outcome = outcome_of(attempt.claimed, exit, "")
            case Aborting() | Stopping():
                outcome = outcome_of(attempt.claimed, exit, attempt.reason)
            case _:
                return []
        self._attempts[fence] = Collecting(claimed=attempt.claimed, gpus=attempt.gpus, outcome=outcome)
        return [Collect(fence)]

    def handle_collected(self, now: float, fence: Fence, outputs: tuple[OutputFile, ...], total: int) -> list[Effect]:
        """`outputs`: the first of them, `total`: how many there are."""
        self._clock(now)
        attempt = self._attempts.get(fence)
        if not isinstance(attempt, Collecting):
            return []
        return self._end(fence, replace(attempt.outcome, outputs=outputs, outputs_total=total))

    def handle_gpus(self, now: float, usable: tuple[Device, ...]) -> list[Effect]:
        """The GPUs that are there and that nobody else uses. Those given to tasks of ours stay theirs in any case."""
        self._clock(now)
        before = self.free()
        self._usable = tuple(sorted(usable, key=lambda device: device.index))
        return [CapacityChanged()] if self.free() != before else []

    def handle_slots(self, now: float, slots: int) -> list[Effect]:
        """This many from now on: GPUs that were not there at the start bring slots of their own."""
        self._clock(now)
        assert slots >= 0
        before, self.slots = self.slots, slots
        return [CapacityChanged()] if slots != before else []

    # --- time -------------------------------------------------------------------------------------------------------

    def deadline(self) -> float:
        return min((each.slow_at for each in self._attempts.values() if isinstance(each, Preparing)), default=math.inf)

    def handle_timeout(self, now: float) -> list[Effect]:
        self._clock(now)
        effects: list[Effect] = []
        for fence, attempt in self._attempts.items():
            if isinstance(attempt, Preparing) and attempt.slow_at <= now:
                self._attempts[fence] = replace(attempt, slow_at=math.inf)
                effects.append(Slow(fence))
        return effects

    # --- views ------------------------------------------------------------------------------------------------------

    def free(self) -> Capacity:
        """What a new attempt could get."""
        needs = [attempt.claimed.spec.needs for attempt in self._attempts.values()]
        given = {gpu for attempt in self._attempts.values() for gpu in attempt.gpus}
        return Capacity(
            slots=max(0, self.slots - len(needs)),
            cpus=max(0, self._config.cpus - sum(each.cpus for each in needs)),
            memory_bytes=max(0, self._config.memory_bytes - sum(each.memory_bytes for each in needs)),
            gpus=tuple(device.index for device in self._usable if device.index not in given),
        )

    def attempts(self) -> Mapping[Fence, Attempt]:
        """A copy, in the order in which they were taken on."""
        return dict(self._attempts)

    def check(self) -> None:
        """Assert the invariants."""
        given = [gpu for attempt in self._attempts.values() for gpu in attempt.gpus]
        assert len(given) == len(set(given)), f"a GPU was given twice: {given}"
        for fence, attempt in self._attempts.items():
            assert attempt.claimed.fence == fence
            if isinstance(attempt, Preparing):
                assert not (attempt.source_ready and attempt.python is not None), "ready but not said so"
            if isinstance(attempt, Aborting | Stopping):
                assert attempt.reason in STOP_KINDS

    # --- inner workings ---------------------------------------------------------------------------------------------

    def _clock(self, now: float) -> None:
        assert now >= self._now, "time ran backwards"
        self._now = now

    def _advance(self, attempt: Preparing) -> list[Effect]:
        fence = attempt.claimed.fence
        if not attempt.source_ready or attempt.python is None:
            self._attempts[fence] = attempt
            return []
        self._attempts[fence] = Prepared(claimed=attempt.claimed, gpus=attempt.gpus, python=attempt.python)
        return [Ready(fence)]

    def _end(self, fence: Fence, outcome: Outcome) -> list[Effect]:
        del self._attempts[fence]
        return [Discard(fence), AttemptEnded(fence, outcome), CapacityChanged()]

    def _fits(self, needs: Needs) -> bool:
        free = self.free()
        return free.slots >= 1 and free.cpus >= needs.cpus and free.memory_bytes >= needs.memory_bytes

    def _choose_gpus(self, needs: Needs) -> tuple[int, ...] | None:
        """The lowest free indices with enough memory each, or None if there are too few."""
        free = self.free().gpus
        fitting = [
            device.index
            for device in self._usable
            if device.index in free and device.memory_bytes >= needs.gpu_memory_bytes
        ]  # fmt: skip
        return tuple(fitting[: needs.gpus]) if len(fitting) >= needs.gpus else None


def _released(reason: str) -> Outcome:
    """An end that is neither the task's fault nor that of what it needs."""
    return Outcome(kind=EndKind.RELEASED, reason=reason, blameless=True)


def outcome_of(claimed: Claimed, exit: Exit, stopping: str) -> Outcome:
    """What the end of the process means. `stopping`: what this run of the agent stopped it for, if it did.

    A task that succeeded before a cancel reached it has succeeded: a success is never lost (P4). After `superseded` it adds
    nothing, since another success is known or another claim holds.
    """
    match exit:
        case Vanished():
            kind = STOP_KINDS.get(stopping, EndKind.LOST)
            return Outcome(kind=kind, reason=stopping or "the process that supervised it was killed, or the machine went down")
        case Exited():
            kind, reason = _verdict(claimed, exit, stopping)
            return Outcome(
                kind=kind,
                exit_code=exit.exit_code,
                reason=reason,
                started_at=exit.started_at,
                ended_at=exit.ended_at,
                timed_out=kind is EndKind.FAILED and exit.timed_out,
                blameless=kind is EndKind.RELEASED and exit.stopped == ISOLATED,
            )
        case _:
            assert_never(exit)


def _verdict(claimed: Claimed, exit: Exited, stopping: str) -> tuple[EndKind, str]:
    asked = stopping or exit.stopped
    by_itself = not exit.stopped
    if asked in STOP_KINDS and not (asked != EndKind.SUPERSEDED and by_itself and exit.exit_code == 0):
        return STOP_KINDS[asked], asked
    if exit.stopped == ISOLATED:
        return EndKind.RELEASED, "stopped: its machine was cut off from the majority of its voters"
    if exit.stopped:
        return EndKind.LOST, "its shim was told to end from outside the mesh"  # SIGTERM, as a shutdown sends
    if exit.timed_out:
        limit = claimed.spec.time_limit
        return EndKind.FAILED, f"time limit of {limit:g} s" if limit is not None else "time limit"
    if exit.exit_code == 0:
        return EndKind.SUCCEEDED, ""
    if exit.out_of_memory:
        return EndKind.FAILED, f"killed by signal {exit.signal}: the machine ran out of memory"
    if exit.signal:
        return EndKind.FAILED, f"killed by signal {exit.signal}"
    return EndKind.FAILED, f"exit code {exit.exit_code}"
