"""A whole mesh, from its first start through its faults to the calm after them.

`Simulation(plan).run()` does it all: agents start, users submit and cancel, things break as planned; then all faults end, who
is not gone for good comes back, and within a limit everything must be equal and done. It raises `Violation` with the story,
or returns a `Report`.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import assert_never
from unittest.mock import patch

from meshq.gossip.swim import PROFILES
from meshq.ids import ObjectId, PeerId, TaskId
from meshq.ledger import replica, timing
from meshq.ledger.holder import read
from meshq.task import Needs, Source, TaskSpec
from tests.simulator.desk import Submitting
from tests.simulator.gossip_peer import Mesh
from tests.simulator.invariants import Watcher, final_checks
from tests.simulator.mesh_peer import MeshPeer
from tests.simulator.plan import Fault, FaultKind, Plan, Submission, Weather
from tests.simulator.world import Network, World

TIMINGS = {"lan": timing.LAN, "fast": timing.FAST}
CALM_LIMIT = 400.0  # seconds after the last fault; `docs` and the report say how long it takes in fact
AGREEMENT_LIMITS = {"lan": 24.0 + 3 * 30.0, "fast": 2.25 + 3 * 10.0}  # L1: the longest suspicion and three push/pulls
DUPLICATES_LIMIT = 5.0 + 5.0 + 10.0  # L5: 5 s, a round of anti-entropy, and a task that ignores SIGTERM
LOOK_EVERY = 1.0
POSTPONE = 0.5
TRAP_SECONDS = 5.0  # then it strikes without waiting for effects
CLAIMS_PER_START_MAX = 1.1  # in fair weather; the facts' performance oracle


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a run was."""

    plan: Plan
    trace_hash: str
    happened: Counter[str]
    tasks: int
    claims: int
    calm_seconds: float  # from the end of the faults until everything was equal and done
    calls: int

    @property
    def claims_per_task(self) -> float:
        return self.claims / max(1, self.tasks)


class Simulation:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.world = World(plan.seed)
        self.timing = TIMINGS[plan.profile]
        self.network = Network(self.world, delay=plan.delay)
        self.gossip = Mesh(self.world, self.network, PROFILES[plan.profile])
        self.watcher = Watcher(self.world, one_live_attempt=plan.weather is not Weather.STORMY)
        self.rng = self.world.rng_for("simulation")
        made = [MeshPeer(self, f"p{i}", slots, gpus) for i, (slots, gpus) in enumerate(zip(plan.slots, plan.gpus, strict=True))]
        self.peers: dict[PeerId, MeshPeer] = {peer.id: peer for peer in made}
        self.tasks: list[TaskId] = []
        self.happened: Counter[str] = Counter()
        self._faulty = True
        self._cuts = 0
        self._calm_at: float | None = None
        self._agreed_after: float | None = None
        self._hit_at: dict[PeerId, float] = {}
        self._cancel_after: dict[str, float] = {s.name: s.cancelled_after for s in plan.submissions if s.cancelled_after}
        self._cancel_at_start = [s.name for s in plan.submissions if s.cancelled_at_start]
        for peer in made:
            self.watcher.call(peer.id, peer.name)

    def run(self) -> Report:
        with patch.object(replica, "SYNC_ROWS_MAX", self.plan.page_rows):  # or a sync of so few tasks were one page
            return self._run()

    def _run(self) -> Report:
        for peer in self.peers.values():
            self.world.call_later(self.rng.uniform(0.0, 0.5), peer.start)
        for submission in self.plan.submissions:
            self.world.call_at(submission.at, self.submit, submission)
        for fault in self.plan.faults:
            self.world.call_at(fault.at, self._break, fault)
        self.world.call_at(2.0, self._spoil_network)
        self._advance(lambda: self.world.now >= self.plan.seconds and self._all_broken(), self.plan.seconds + 120.0)
        self._calm_down()
        self._calm_at = self.world.now
        if not self._advance(self.settled, self._calm_at + CALM_LIMIT):
            self.watcher.fail(f"P5: not equal and done {CALM_LIMIT:g} s after the faults: {self._why_unsettled()}")
        return self._report(self.world.now - self._calm_at)

    def _advance(self, done: Callable[[], bool], limit: float) -> bool:
        while not done():
            if self.world.now >= limit:
                return False
            self.world.run_until(self.world.now + LOOK_EVERY)
            self._look()
        return True

    def _look(self) -> None:
        """What is too dear to be checked after every call."""
        for peer in self.running():
            self.watcher.check_vector(peer.name, peer.core)
            if peer.awake and peer.doors_open:
                self.watcher.check_running(peer.name, peer.core, peer.machine.running())
        if self._calm_at is None:
            return
        calm_for = self.world.now - self._calm_at
        if self._agreed_after is None and self.gossip.converged() and not self._absent():
            self._agreed_after = calm_for
        if self._agreed_after is None and calm_for > AGREEMENT_LIMITS[self.plan.profile]:
            self.watcher.fail(f"L1: the memberships differ {calm_for:g} s after the faults")
        if self._agreed_after is not None and calm_for > self._agreed_after + DUPLICATES_LIMIT:
            self.watcher.check_no_duplicates()

    def running(self) -> list[MeshPeer]:
        return [peer for peer in self.peers.values() if peer.running]

    # ---- users

    def submit(self, submission: Submission) -> None:
        able = [peer for peer in self.running() if peer.awake and peer.doors_open and not peer.draining]
        if not able:
            self.world.call_later(POSTPONE, self.submit, submission)
            return
        peer = self.rng.choice(able)
        commit = None if submission.source is None else ObjectId(f"{submission.source:040x}")
        spec = TaskSpec(
            name=submission.name,
            argv=("train.py",),
            submitted_by=f"user@{peer.name}",
            submitted_at=0.0,
            submitted_peer=peer.id,
            queue="gpu" if submission.gpus else "default",
            priority=submission.priority,
            needs=Needs(gpus=submission.gpus),
            source=Source(commit=commit),
            retries=submission.retries,
            time_limit=submission.time_limit,
            lease=submission.lease,
        )
        Submitting(peer, spec).begin()

    def answered(self, peer: MeshPeer, task: TaskId, *, stored_elsewhere: bool) -> None:
        """The user has the task's id."""
        self.tasks.append(task)
        self.happened["submitted"] += 1
        kept = self.watcher.acknowledged if stored_elsewhere else self.watcher.stored_here_only
        kept[task] = peer.name
        self.watcher.note(peer.name, "answers its user" + ("" if stored_elsewhere else ": on this machine only"), task)
        row = peer.core.row(task)
        if row is not None and row.spec.name in self._cancel_after:
            self.world.call_later(self._cancel_after[row.spec.name], self._cancel, task)

    def starting(self, peer: MeshPeer, task: TaskId) -> None:
        """The peer has been told to start user code of this task."""
        row = peer.core.row(task)
        if row is not None and row.spec.name in self._cancel_at_start:
            self._cancel_at_start.remove(row.spec.name)
            self.world.call_later(self.rng.uniform(0.0, 0.03), self._cancel, task)

    def _cancel(self, task: TaskId) -> None:
        knowing = [peer for peer in self.running() if peer.awake and peer.core.row(task) is not None]
        if knowing:
            peer = self.rng.choice(knowing)
            row = peer.core.row(task)
            if row is not None and not read(row).status.final:
                self.watcher.note(peer.name, "is told to cancel", task)
                self.happened["cancelled"] += 1
                peer.cancel(task)

    # ---- faults

    def _spoil_network(self) -> None:
        self.network.loss, self.network.duplication = self.plan.loss, self.plan.duplication

    def _all_broken(self) -> bool:
        """All has happened that was planned, and nobody is cut off any more."""
        return not self._cuts and sum(self.happened[kind] for kind in FaultKind) == len(self.plan.faults)

    def _break(self, fault: Fault) -> None:
        """Let it happen now, or as soon as it can hit anybody."""
        if not self._strike(fault):
            self.world.call_later(POSTPONE, self._break, fault)

    def _strike(self, fault: Fault) -> bool:
        if fault.kind in (FaultKind.PARTITION, FaultKind.DEAF, FaultKind.SLOW):
            able = [peer.name for peer in self.running() if peer.awake and peer.doors_open]
            if len(able) > 1:
                self._strike_network(fault, self.rng.sample(able, 2))
                self.happened[fault.kind] += 1
            return len(able) > 1
        victims = [
            peer
            for peer in self.running()
            if peer.awake and peer.doors_open and not peer.draining and self._rested(peer) and not peer.trapped
        ]
        if not victims or (fault.kind in (FaultKind.GONE, FaultKind.LEAVE) and len(self.running()) < 3):
            return False
        busy = [peer for peer in victims if any(folder.ends for folder in peer.machine.folders.values())]
        victim = self.rng.choice(busy or victims)
        if fault.effects is None:
            self._strike_peer(fault, victim)
        else:
            self._set_trap(fault, fault.effects, victim)
        return True

    def _set_trap(self, fault: Fault, effects: int, victim: MeshPeer) -> None:
        sprung: list[bool] = []

        def spring() -> None:
            sprung.append(True)
            self._strike_peer(fault, victim)

        def strike_anyway() -> None:  # too little happened there, or it died of something else
            if not sprung:
                victim.disarm()
                self._break(replace(fault, effects=None))

        self._hit_at[victim.id] = self.world.now + TRAP_SECONDS
        victim.set_trap(effects, spring)
        self.world.call_later(TRAP_SECONDS, strike_anyway)

    def _rested(self, peer: MeshPeer) -> bool:
        """In gentle weather nobody is hit again before the mesh can have noticed that it is back."""
        return self.plan.weather is Weather.STORMY or self.world.now - self._hit_at.get(peer.id, -100.0) > 15.0

    def _strike_network(self, fault: Fault, ends: list[str]) -> None:
        """`ends`: two that run, between which the cut goes."""
        names = [peer.name for peer in self.peers.values() if peer.name not in ends]
        self.rng.shuffle(names)
        names = [ends[0], *names, ends[1]]
        self._cuts += fault.kind is not FaultKind.SLOW
        match fault.kind:
            case FaultKind.PARTITION:
                at = self.rng.randint(1, len(names) - 1)
                self.watcher.note("net", f"is split into {' '.join(names[:at])} and {' '.join(names[at:])}")
                self.network.partition([names[:at], names[at:]])
                self.world.call_later(fault.seconds, self._heal)
            case FaultKind.DEAF:
                self.watcher.note("net", f"carries nothing from {ends[0]} to {ends[1]}")
                self.network.cut(ends[0], ends[1])
                self.world.call_later(fault.seconds, self._heal)
            case _:
                self.watcher.note("net", "gets slow")
                self.network.delay = (0.0005, 0.5)
                self.world.call_later(fault.seconds, self._speed_up)

    def _heal(self) -> None:
        """Everything is healed at once, when the last of several cuts is over."""
        self._cuts -= 1
        if not self._cuts:
            self.watcher.note("net", "is whole again")
            self.network.heal()

    def _speed_up(self) -> None:
        self.network.delay = self.plan.delay

    def _strike_peer(self, fault: Fault, peer: MeshPeer) -> None:
        self._hit_at[peer.id] = self.world.now + fault.seconds
        self.happened[fault.kind] += 1
        self.watcher.note(peer.name, f"is hit: {fault.kind} for {fault.seconds:.2f} s")
        match fault.kind:
            case FaultKind.KILL:
                peer.kill()
            case FaultKind.KILL_ALL:
                peer.kill()
                self.happened["tasks killed"] += peer.machine.kill_tasks()
            case FaultKind.POWER | FaultKind.GONE:
                peer.kill()
                self.happened["commits lost"] += peer.machine.lose_power(self.rng)
                peer.gone = fault.kind is FaultKind.GONE
            case FaultKind.LEAVE:
                peer.gone = self.rng.random() < 0.5
                peer.leave()
            case FaultKind.STOP:
                peer.stop_for(fault.seconds)
                return
            case FaultKind.PARTITION | FaultKind.DEAF | FaultKind.SLOW:
                raise AssertionError("of the network")
            case _:
                assert_never(fault.kind)
        if not peer.gone:
            self.world.call_later(fault.seconds, self._restart, peer)

    def _restart(self, peer: MeshPeer) -> None:
        if peer.gone or not self._faulty:
            return
        if peer.running and peer.draining:  # it has not finished leaving
            self.world.call_later(POSTPONE, self._restart, peer)
        elif not peer.running:
            self._start(peer)

    def _start(self, peer: MeshPeer) -> None:
        self.watcher.note(peer.name, "starts")
        self.happened["restarts"] += 1
        peer.machine.powered = True
        peer.start()

    def _calm_down(self) -> None:
        """No more faults; who is not gone for good comes back."""
        self.watcher.note("net", "and everybody calm down")
        self._faulty = False
        self.network.loss = self.network.duplication = 0.0
        self.network.delay = self.plan.delay
        self.network.heal()
        for peer in self.peers.values():
            if not peer.running and not peer.gone:
                self._start(peer)
            elif peer.running and peer.draining and not peer.gone:
                self.world.call_later(POSTPONE, self._come_back, peer)

    def _come_back(self, peer: MeshPeer) -> None:
        if peer.running:
            self.world.call_later(POSTPONE, self._come_back, peer)
        else:
            self._start(peer)

    # ---- the end

    def settled(self) -> bool:
        return not self._why_unsettled()

    def _why_unsettled(self) -> str:
        """Empty if all is equal and done; else the first thing that is not."""
        if absent := self._absent():
            return f"{absent} come or go"
        if busy := [peer.name for peer in self.running() if not peer.idle()]:
            return f"{busy} are busy"
        if not self.gossip.converged():
            return "the memberships differ"
        if self.watcher.live():
            return f"user code runs: {self.watcher.live()}"
        first, *others = (peer.core for peer in self.running())
        rows = {row.task: row for row in first.tasks()}
        for row in rows.values():
            if not self._is_done(row.task):
                return f"{row.task} ({row.spec.name}) is {read(row).status}: {first.waiting_reason(self.world.now, row.task)}"
        if any(core.vector != first.vector or {row.task: row for row in core.tasks()} != rows for core in others):
            return "the ledgers differ"
        return ""

    def _absent(self) -> list[str]:
        """Who should run and does not, or the other way round."""
        return [peer.name for peer in self.peers.values() if peer.running == peer.gone]

    def _is_done(self, task: TaskId) -> bool:
        rows = [row for peer in self.running() if (row := peer.core.row(task)) is not None]
        commit = rows[0].spec.source.commit
        could = any(peer.gpus >= rows[0].spec.needs.gpus for peer in self.running()) and (
            commit is None or commit in self._sources()
        )
        return all(not read(row).live and (read(row).status.final or not could) for row in rows)

    def _sources(self) -> set[ObjectId]:
        """What can be fetched from somebody. A task whose only source went with its machine waits, and says why."""
        return {commit for peer in self.running() for commit in peer.machine.disk.sources}

    def _report(self, calm_seconds: float) -> Report:
        alive = {peer.name: peer.core for peer in self.running()}
        final_checks(self.watcher, alive, [peer.peers.telemetry(peer.id) for peer in self.running()], self._sources())
        self._check_faults()
        claims = self.watcher.counts["claim"]
        report = Report(
            plan=self.plan, trace_hash=self.world.trace_hash(), happened=self.happened + self.watcher.counts,
            tasks=len({task for task, _ in self.watcher.facts.values()}), claims=claims, calm_seconds=calm_seconds,
            calls=self.world.calls,
        )  # fmt: skip
        if self.plan.weather is Weather.FAIR and claims > CLAIMS_PER_START_MAX * report.happened["starts"] + 1:
            self.watcher.fail(f"{claims} claims for {report.happened['starts']} starts, and nothing was broken")
        return report

    def _check_faults(self) -> None:
        """A run in which nothing broke proves nothing."""
        planned = Counter(fault.kind.value for fault in self.plan.faults)
        assert all(self.happened[kind] == count for kind, count in planned.items()), f"planned {planned}, had {self.happened}"
        traffic = self.network.traffic
        self.happened["dropped"], self.happened["doubled"], self.happened["cut"] = (
            traffic.dropped,
            traffic.duplicated,
            traffic.cut,
        )
        assert traffic.dropped > 0 or self.plan.loss == 0
        assert traffic.duplicated > 0 or self.plan.duplication == 0
        assert traffic.cut > 0 or not self.happened[FaultKind.PARTITION]
        assert self.happened["submitted"] + self.happened["cut"] > 0
