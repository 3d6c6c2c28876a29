"""The shell of one agent's worker in the simulated world, as `meshq/exec/shell.py` is in the real one.

Fetching a source needs somebody who has it, building takes a while and fails at times, and processes belong to the machine.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, assert_never

from meshq.exec import effects as exec_effects
from meshq.exec.worker import Aborting, Adopted, Device, Exited, Starting, StillRunning, Vanished, Worker, WorkerConfig
from meshq.ids import Fence, ObjectId, PeerId
from meshq.task import Claimed, Outcome

if TYPE_CHECKING:
    from tests.simulator.mesh_peer import MeshPeer

HELD_BACK_LOOK = 0.1
GIB = 2**30
CPUS = 8
MEMORY_BYTES = 16 * GIB
GPU_BYTES = 8 * GIB


class ExecShell:
    """Everything that this run of the agent does for attempts."""

    def __init__(self, peer: "MeshPeer") -> None:
        self._peer = peer
        self._machine = peer.machine
        self._rng = peer.rng
        self.worker = Worker(WorkerConfig(slots=peer.slots, cpus=CPUS, memory_bytes=MEMORY_BYTES), peer.now)

    @property
    def now(self) -> float:
        return self._peer.now

    def start(self) -> Mapping[Fence, tuple[Claimed, Adopted]]:
        """Take note of the GPUs; what an earlier run left behind."""
        gpus = tuple(Device(index=index, memory_bytes=GPU_BYTES) for index in range(self._peer.gpus))
        self.perform(self.worker.handle_gpus(self.now, gpus))
        return self._machine.scan()

    def adopt(self, claimed: Claimed, state: Adopted) -> None:
        gpus: tuple[int, ...] = ()
        if isinstance(state, StillRunning):
            self._watch(claimed.fence)
            self._peer.mesh.watcher.counts["adopted"] += 1
            gpus = self._machine.folders[claimed.fence].gpus
        self.perform(self.worker.adopt(self.now, claimed, state, gpus))

    def die(self) -> None:
        """The agent is killed, and its zygote with it; some requests have been read already."""
        for fence, attempt in self.worker.attempts().items():
            if isinstance(attempt, Starting | Aborting) and self._rng.random() < 0.5:
                self._peer.world.call_later(self._rng.uniform(0.0, 0.1), self._machine.spawn, fence)
        self._machine.forget_watches()

    def perform(self, effects: Sequence[exec_effects.Effect]) -> None:
        """Carry out what the core asks for, then arm its timer."""
        self.worker.check()
        for effect in effects:
            if self._peer.sprung():
                return
            self._perform_one(effect)
        self._peer.timer("worker", self.worker.deadline(), self._time_out)

    def _time_out(self) -> None:
        self.perform(self.worker.handle_timeout(self.now))

    def _perform_one(self, effect: exec_effects.Effect) -> None:
        later, core = self._peer.later, self._peer.core
        match effect:
            case exec_effects.FetchSource() | exec_effects.BuildEnvironment() | exec_effects.Spawn() | exec_effects.Collect():
                self._begin(effect)
            case exec_effects.Signal(fence, reason):
                self._machine.signal(fence, reason)
            case exec_effects.Discard():
                pass
            case exec_effects.Ready(fence):
                later(0.0, lambda: self._peer.feed(core.handle_ready(self.now, fence)))
            case exec_effects.Slow(fence):
                later(0.0, lambda: self._peer.feed(core.handle_slow(self.now, fence)))
            case exec_effects.AttemptEnded(fence, outcome):
                later(0.0, self._report, fence, outcome)
            case exec_effects.CapacityChanged():
                later(0.0, self._peer.capacity_changed)
            case _:
                assert_never(effect)

    def _begin(
        self,
        effect: exec_effects.FetchSource | exec_effects.BuildEnvironment | exec_effects.Spawn | exec_effects.Collect,
    ) -> None:
        """What takes a while."""
        later, uniform = self._peer.later, self._rng.uniform
        match effect:
            case exec_effects.FetchSource(claimed):
                self._machine.create(claimed)
                later(uniform(0.002, 0.02), self._fetch, claimed)
            case exec_effects.BuildEnvironment(claimed):
                seconds = self._rng.choice((0.02, 0.1, uniform(0.1, self._peer.mesh.plan.build_seconds)))
                later(seconds, self._built, claimed.fence)
            case exec_effects.Spawn(claimed, _, gpus):
                self._machine.folders[claimed.fence].gpus = gpus
                later(uniform(0.001, 0.02), self._spawn, claimed.fence)
            case exec_effects.Collect(fence):
                later(uniform(0.001, 0.05), self._collected, fence)
            case _:
                assert_never(effect)

    def _report(self, fence: Fence, outcome: Outcome) -> None:
        def reported() -> None:
            if self._peer.core.holds_back(fence):  # its end is not recorded yet
                self._peer.later(HELD_BACK_LOOK, reported)
            elif fence in self._machine.folders:
                self._machine.folders[fence].reported = True

        self._peer.feed(self._peer.core.handle_ended(self.now, fence, outcome), reported)

    def _fetch(self, claimed: Claimed) -> None:
        """From here, or else from whoever has the source, the submitter first."""
        commit, first = claimed.spec.source.commit, claimed.spec.submitted_peer
        if commit is None or commit in self._machine.disk.sources:
            self.perform(self.worker.handle_source_ready(self.now, claimed.fence))
            return
        self._fetch_from(claimed, commit, sorted(self._peer.peers.others_alive(), key=lambda other: other != first))

    def _fetch_from(self, claimed: Claimed, commit: ObjectId, left: Sequence[PeerId]) -> None:
        if not left:
            self._peer.mesh.watcher.counts["sources_missed"] += 1
            reason = "no peer has the source"
            self.perform(self.worker.handle_preparation_failed(self.now, claimed.fence, reason, True, True))
            return

        def answered(has_it: object) -> None:
            if has_it:
                self._machine.disk.sources[commit] = None
                self._fetch(claimed)
            else:
                self._fetch_from(claimed, commit, left[1:])

        self._peer.ask(
            left[0],
            lambda target, answer: answer(commit in target.machine.disk.sources),
            answered,
            lambda: self._fetch_from(claimed, commit, left[1:]),
        )

    def _built(self, fence: Fence) -> None:
        now, luck = self.now, self._rng.random()
        if luck < self._peer.mesh.plan.release_chance:
            self.perform(self.worker.handle_preparation_failed(now, fence, "no wheel for this platform", True))
        elif luck < 1.5 * self._peer.mesh.plan.release_chance:
            self.perform(self.worker.handle_preparation_failed(now, fence, "the requirements can't be solved", False))
        else:
            self.perform(self.worker.handle_environment_ready(now, fence, "/python"))

    def _spawn(self, fence: Fence) -> None:
        self._machine.spawn(fence)
        if not self._machine.folders[fence].started:
            self.perform(self.worker.handle_spawn_failed(self.now, fence, "another agent decided otherwise"))
            return
        self.perform(self.worker.handle_spawned(self.now, fence))
        self._watch(fence)

    def _watch(self, fence: Fence) -> None:
        run = self._peer.run

        def over() -> None:
            if run == self._peer.run:
                self._peer.when_awake(lambda: self._peer.later(self._rng.uniform(0.0, 0.01), self._exited, fence))

        self._machine.watch(fence, over)

    def _exited(self, fence: Fence) -> None:
        state = self._machine.inspect(fence)
        assert isinstance(state, Exited | Vanished), "it was watched to its end"
        self.perform(self.worker.handle_exited(self.now, fence, state))

    def _collected(self, fence: Fence) -> None:
        self.perform(self.worker.handle_collected(self.now, fence, (), 0))
