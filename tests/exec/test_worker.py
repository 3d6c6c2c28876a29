"""The worker core: each input in each state, on whole lists of effects, and what must hold whatever comes in whatever order."""

import math
from collections.abc import Iterator

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

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
from meshq.exec.worker import (
    STOP_KINDS,
    Capacity,
    Device,
    Exited,
    NeverStarted,
    StillRunning,
    Vanished,
    Worker,
    WorkerConfig,
)
from meshq.ids import Fence
from meshq.task import Claimed, EndKind, Needs, Outcome, OutputFile
from tests.exec.bench import claimed, fence_of

CLAIM = claimed(1)
FENCE = CLAIM.fence
GIB = 2**30


@pytest.fixture
def worker() -> Iterator[Worker]:
    core = Worker(WorkerConfig(slots=2, cpus=4, memory_bytes=8 * GIB), 0.0)
    core.handle_gpus(0.0, (gpu(0), gpu(1), gpu(2, gib=80)))
    yield core
    core.check()


def gpu(index: int, gib: int = 24) -> Device:
    return Device(index=index, memory_bytes=gib * GIB)


def exited(code: int = 0, **fields: object) -> Exited:
    return Exited(exit_code=code, started_at=100.0, ended_at=110.0, **fields)  # type: ignore[arg-type]  # a test's builder


def prepared(core: Worker, claim: Claimed = CLAIM) -> None:
    core.prepare(0.0, claim)
    core.handle_source_ready(0.0, claim.fence)
    core.handle_environment_ready(0.0, claim.fence, "/env/bin/python")


def running(core: Worker, claim: Claimed = CLAIM) -> None:
    prepared(core, claim)
    core.start(0.0, claim.fence)
    core.handle_spawned(0.0, claim.fence)


def ended(outcome: Outcome) -> list[Effect]:
    return [Discard(FENCE), AttemptEnded(FENCE, outcome), CapacityChanged()]


def test_a_claim_is_prepared_on_both_ways_at_once_and_takes_what_it_needs(worker: Worker) -> None:
    claim = claimed(1, needs=Needs(cpus=3, memory_bytes=GIB, gpus=1))
    assert worker.prepare(0.0, claim) == [FetchSource(claim), BuildEnvironment(claim), CapacityChanged()]
    assert worker.free() == Capacity(slots=1, cpus=1, memory_bytes=7 * GIB, gpus=(1, 2))


@pytest.mark.parametrize("source_first", [True, False])
def test_it_is_ready_when_source_and_environment_are(worker: Worker, source_first: bool) -> None:
    worker.prepare(0.0, CLAIM)
    if source_first:
        assert worker.handle_source_ready(1.0, FENCE) == []
        assert worker.handle_environment_ready(1.0, FENCE, "/env/bin/python") == [Ready(FENCE)]
    else:
        assert worker.handle_environment_ready(1.0, FENCE, "/env/bin/python") == []
        assert worker.handle_source_ready(1.0, FENCE) == [Ready(FENCE)]


def test_start_spawns_with_the_interpreter_and_the_gpus_that_it_was_given(worker: Worker) -> None:
    claim = claimed(1, needs=Needs(gpus=2))
    prepared(worker, claim)
    assert worker.start(1.0, FENCE) == [Spawn(claim, "/env/bin/python", (0, 1))]


@pytest.mark.parametrize(
    "needs",
    [Needs(cpus=5), Needs(memory_bytes=9 * GIB), Needs(gpus=4), Needs(gpus=2, gpu_memory_bytes=40 * GIB)],
    ids=["cores", "memory", "gpus", "gpu memory"],
)
def test_a_claim_that_does_not_fit_is_released_at_once(worker: Worker, needs: Needs) -> None:
    outcome = Outcome(kind=EndKind.RELEASED, reason="this peer has no room for it any more", blameless=True)
    assert worker.prepare(0.0, claimed(1, needs=needs)) == [AttemptEnded(FENCE, outcome)]
    assert worker.attempts() == {}


def test_slots_are_held_until_the_end(worker: Worker) -> None:
    worker.prepare(0.0, claimed(1))
    running(worker, claimed(2))
    [refused] = worker.prepare(0.0, claimed(3))
    assert isinstance(refused, AttemptEnded)
    worker.handle_exited(1.0, fence_of(2), exited())
    assert worker.free().slots == 0, "its outputs are still being collected"
    worker.handle_collected(1.0, fence_of(2), (), 0)
    assert worker.free().slots == 1


def test_a_gpu_with_too_little_memory_is_passed_over(worker: Worker) -> None:
    claim = claimed(1, needs=Needs(gpus=1, gpu_memory_bytes=40 * GIB))
    prepared(worker, claim)
    assert worker.start(0.0, FENCE) == [Spawn(claim, "/env/bin/python", (2,))]


def test_a_gpu_that_somebody_else_uses_is_not_given_out_and_returns_when_it_is_free(worker: Worker) -> None:
    assert worker.handle_gpus(1.0, (gpu(1),)) == [CapacityChanged()]
    assert worker.free().gpus == (1,)
    assert worker.handle_gpus(2.0, (gpu(1),)) == []
    assert worker.handle_gpus(3.0, (gpu(1), gpu(0))) == [CapacityChanged()]
    assert worker.free().gpus == (0, 1)


def test_a_success_is_reported_with_its_outputs(worker: Worker) -> None:
    running(worker)
    assert worker.handle_exited(1.0, FENCE, exited()) == [Collect(FENCE)]
    files = (OutputFile(path="model", bytes=3, sha256="00"),)
    outcome = Outcome(
        kind=EndKind.SUCCEEDED, exit_code=0, started_at=100.0, ended_at=110.0, outputs=files, outputs_total=1
    )  # fmt: skip
    assert worker.handle_collected(2.0, FENCE, files, 1) == ended(outcome)


@pytest.mark.parametrize(
    ("exit", "kind", "reason", "code"),
    [
        (exited(3), EndKind.FAILED, "exit code 3", 3),
        (exited(139, signal=11), EndKind.FAILED, "killed by signal 11", 139),
        (exited(137, signal=9, out_of_memory=True), EndKind.FAILED, "killed by signal 9: the machine ran out of memory", 137),
        (exited(143, signal=15, timed_out=True), EndKind.FAILED, "time limit of 90 s", 143),
        (exited(0, timed_out=True), EndKind.FAILED, "time limit of 90 s", 0),
        (exited(143, signal=15, stopped="cancelled"), EndKind.CANCELLED, "cancelled", 143),
        (exited(0, stopped="cancelled"), EndKind.CANCELLED, "cancelled", 0),
        (exited(0, stopped="superseded"), EndKind.SUPERSEDED, "superseded", 0),
        (exited(143, stopped="terminated"), EndKind.LOST, "its shim was told to end from outside the mesh", 143),
        (Vanished(), EndKind.LOST, "the process that supervised it was killed, or the machine went down", None),
    ],
)
def test_each_way_to_end_has_its_outcome(
    worker: Worker, exit: Exited | Vanished, kind: EndKind, reason: str, code: int | None
) -> None:
    running(worker, claimed(1, time_limit=90.0))
    worker.handle_exited(1.0, FENCE, exit)
    [_, over, _] = worker.handle_collected(1.0, FENCE, (), 0)
    assert isinstance(over, AttemptEnded)
    assert (over.outcome.kind, over.outcome.reason, over.outcome.exit_code) == (kind, reason, code)
    assert over.outcome.timed_out == (isinstance(exit, Exited) and exit.timed_out)


@pytest.mark.parametrize(
    ("reason", "exit", "kind"),
    [
        ("cancelled", exited(143, signal=15, stopped="cancelled"), EndKind.CANCELLED),
        ("cancelled", exited(0, stopped="cancelled"), EndKind.CANCELLED),
        ("cancelled", exited(1), EndKind.CANCELLED),
        ("cancelled", exited(0), EndKind.SUCCEEDED),
        ("released", exited(143, signal=15, stopped="released"), EndKind.RELEASED),
        ("released", exited(0), EndKind.SUCCEEDED),
        ("superseded", exited(0), EndKind.SUPERSEDED),
        ("superseded", Vanished(), EndKind.SUPERSEDED),
    ],
)
def test_a_stop_gives_its_kind_unless_the_task_had_succeeded_before(
    worker: Worker, reason: str, exit: Exited | Vanished, kind: EndKind
) -> None:
    running(worker)
    assert worker.stop(1.0, FENCE, reason) == [Signal(FENCE, reason)]
    assert worker.handle_exited(2.0, FENCE, exit) == [Collect(FENCE)]
    [_, over, _] = worker.handle_collected(2.0, FENCE, (), 0)
    assert isinstance(over, AttemptEnded)
    assert over.outcome.kind == kind


def test_a_second_stop_changes_nothing(worker: Worker) -> None:
    running(worker)
    worker.stop(1.0, FENCE, "superseded")
    assert worker.stop(2.0, FENCE, "cancelled") == []


@pytest.mark.parametrize("ready", [True, False])
@pytest.mark.parametrize("reason", sorted(STOP_KINDS))
def test_what_does_not_run_yet_ends_at_once_when_it_is_stopped(worker: Worker, ready: bool, reason: str) -> None:
    if ready:
        prepared(worker)
    else:
        worker.prepare(0.0, CLAIM)
    assert worker.stop(1.0, FENCE, reason) == ended(Outcome(kind=STOP_KINDS[reason], reason=reason))
    assert worker.handle_source_ready(2.0, FENCE) == []
    assert worker.handle_environment_ready(2.0, FENCE, "") == []
    assert worker.handle_preparation_failed(2.0, FENCE, "late", True) == []
    assert worker.start(2.0, FENCE) == []
    assert worker.stop(2.0, FENCE, reason) == []
    assert worker.free().slots == 2


def test_a_stop_while_the_shim_is_being_started_is_sent_as_soon_as_there_is_one(worker: Worker) -> None:
    prepared(worker)
    worker.start(1.0, FENCE)
    assert worker.stop(1.0, FENCE, "cancelled") == []
    assert worker.handle_spawned(2.0, FENCE) == [Signal(FENCE, "cancelled")]


@pytest.mark.parametrize(
    ("stopped", "outcome"),
    [
        (False, Outcome(kind=EndKind.RELEASED, reason="no more processes")),
        (True, Outcome(kind=EndKind.CANCELLED, reason="cancelled")),
    ],
)
def test_a_shim_that_can_not_be_started_releases_the_claim(worker: Worker, stopped: bool, outcome: Outcome) -> None:
    prepared(worker)
    worker.start(1.0, FENCE)
    if stopped:
        worker.stop(1.0, FENCE, "cancelled")
    assert worker.handle_spawn_failed(2.0, FENCE, "no more processes") == ended(outcome)


def test_an_exit_that_is_seen_before_the_spawn_is_the_end_all_the_same(worker: Worker) -> None:
    prepared(worker)
    worker.start(1.0, FENCE)
    assert worker.handle_exited(2.0, FENCE, exited()) == [Collect(FENCE)]
    assert worker.handle_spawned(2.0, FENCE) == []
    assert worker.handle_exited(2.0, FENCE, exited(1)) == []
    assert worker.stop(2.0, FENCE, "cancelled") == []


@pytest.mark.parametrize(("retryable", "kind"), [(True, EndKind.RELEASED), (False, EndKind.FAILED)])
def test_a_failed_preparation_is_released_or_if_nobody_could_do_it_failed(
    worker: Worker, retryable: bool, kind: EndKind
) -> None:
    worker.prepare(0.0, CLAIM)
    assert worker.handle_preparation_failed(1.0, FENCE, "no index", retryable) == ended(Outcome(kind=kind, reason="no index"))


def test_a_slow_preparation_is_told_once(worker: Worker) -> None:
    assert worker.deadline() == math.inf
    worker.prepare(5.0, CLAIM)
    assert worker.deadline() == 6.0
    assert worker.handle_timeout(5.9) == []
    assert worker.handle_timeout(6.0) == [Slow(FENCE)]
    assert worker.deadline() == math.inf
    assert worker.handle_timeout(7.0) == []


def test_an_adopted_attempt_that_runs_keeps_its_gpus_from_others(worker: Worker) -> None:
    assert worker.adopt(0.0, claimed(1, needs=Needs(gpus=1)), StillRunning(), (0,)) == [CapacityChanged()]
    assert worker.free().gpus == (1, 2)
    assert worker.stop(1.0, FENCE, "superseded") == [Signal(FENCE, "superseded")]


@pytest.mark.parametrize("state", [exited(3), Vanished()])
def test_an_adopted_attempt_that_ended_meanwhile_is_collected(worker: Worker, state: Exited | Vanished) -> None:
    assert worker.adopt(0.0, CLAIM, state, ()) == [Collect(FENCE)]


def test_an_adopted_attempt_that_never_started_is_released(worker: Worker) -> None:
    outcome = Outcome(kind=EndKind.RELEASED, reason="the agent ended before it was started", blameless=True)
    assert worker.adopt(0.0, CLAIM, NeverStarted(), ()) == ended(outcome)


def test_adopting_more_than_there_are_slots_leaves_none_but_never_less(worker: Worker) -> None:
    for number in range(1, 5):
        worker.adopt(0.0, claimed(number, needs=Needs(cpus=3)), StillRunning(), ())
    assert worker.free() == Capacity(slots=0, cpus=0, memory_bytes=8 * GIB, gpus=(0, 1, 2))


def test_time_never_runs_backwards(worker: Worker) -> None:
    worker.handle_timeout(5.0)
    with pytest.raises(AssertionError):
        worker.handle_timeout(4.0)


class AnyOrder(RuleBasedStateMachine):
    """Inputs in any order, as races between the shell's loop tasks make them."""

    def __init__(self) -> None:
        super().__init__()
        self.core = Worker(WorkerConfig(slots=3, cpus=8, memory_bytes=GIB), 0.0)
        self.number = 0
        self.ends: dict[Fence, int] = {}
        self.spawned: set[Fence] = set()
        self.ready: set[Fence] = set()

    def take(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case AttemptEnded(fence):
                    self.ends[fence] = self.ends.get(fence, 0) + 1
                case Spawn(claim):
                    assert claim.fence not in self.spawned, "started twice"
                    self.spawned.add(claim.fence)
                case Ready(fence):
                    self.ready.add(fence)
                case _:
                    assert not isinstance(effect, Signal) or effect.fence in self.spawned

    def fence(self, pick: int) -> Fence:
        return fence_of(max(1, self.number - pick))

    @rule(gpus=st.integers(0, 2), cpus=st.integers(0, 4))
    def prepare(self, gpus: int, cpus: int) -> None:
        self.number += 1
        self.take(self.core.prepare(0.0, claimed(self.number, needs=Needs(gpus=gpus, cpus=cpus))))

    @rule(usable=st.sets(st.integers(0, 3)))
    def handle_gpus(self, usable: set[int]) -> None:
        self.take(self.core.handle_gpus(0.0, tuple(gpu(index) for index in sorted(usable))))

    @rule(pick=st.integers(0, 4), what=st.integers(0, 6))
    def progress(self, pick: int, what: int) -> None:
        fence = self.fence(pick)
        if what == 2 and fence not in self.ready:
            return  # the ledger starts only what is ready
        inputs = (
            lambda: self.core.handle_source_ready(0.0, fence),
            lambda: self.core.handle_environment_ready(0.0, fence, ""),
            lambda: self.core.start(0.0, fence) if fence not in self.spawned else [],
            lambda: self.core.handle_spawned(0.0, fence),
            lambda: self.core.handle_exited(0.0, fence, exited()),
            lambda: self.core.handle_collected(0.0, fence, (), 0),
            lambda: self.core.handle_spawn_failed(0.0, fence, "no"),
        )
        self.take(inputs[what]())

    @rule(pick=st.integers(0, 4), reason=st.sampled_from(sorted(STOP_KINDS)))
    def stop(self, pick: int, reason: str) -> None:
        self.take(self.core.stop(0.0, self.fence(pick), reason))

    @invariant()
    def each_attempt_is_there_or_ended_once(self) -> None:
        self.core.check()
        here = self.core.attempts()
        for number in range(1, self.number + 1):
            fence = fence_of(number)
            assert self.ends.get(fence, 0) == (0 if fence in here else 1)
        assert self.core.free().slots == 3 - len(here)


TestAnyOrder = AnyOrder.TestCase


def test_slots_follow_what_the_machine_has(worker: Worker) -> None:
    before = worker.free().slots
    assert worker.handle_slots(1.0, worker.slots) == []
    assert worker.handle_slots(2.0, worker.slots + 2) == [CapacityChanged()]
    assert worker.free().slots == before + 2
    assert worker.handle_slots(3.0, 0) == [CapacityChanged()]
    assert worker.free().slots == 0, "what runs goes on"
