"""A whole mesh, from its first start through its faults to the calm after them.

`Simulation(plan).run()` does it all: agents start, users submit and cancel, things break as planned; then all faults end, who
is not gone for good comes back, and within a limit everything must be equal and done. In a liveness run some machines stay ill
for ever, and all this is asked of the others. It raises `Violation` with the story, or returns a `Report`.
"""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from unittest.mock import patch

from meshq.gossip.member import Address
from meshq.gossip.swim import PROFILES
from meshq.ids import ActorId, ObjectId, PeerId, TaskId, actor_id
from meshq.ledger import donor, timing
from meshq.ledger.holder import read
from meshq.ledger.placement import could_ever
from meshq.ledger.row import Row
from meshq.ledger.sessions import majority
from tests.simulator.faults import Faults
from tests.simulator.gossip_peer import Mesh
from tests.simulator.invariants import CLAIMS_PER_TASK_MAX, Watcher, final_checks
from tests.simulator.liveness import Liveness
from tests.simulator.mesh_peer import MeshPeer
from tests.simulator.plan import FaultKind, Plan, Weather
from tests.simulator.users import Users
from tests.simulator.world import RECORDED_MAX, Clock, Network, World

TIMINGS = {"lan": timing.LAN, "fast": timing.FAST}
CALM_LIMIT = 400.0  # seconds after the last fault; the report says how long it takes in fact
ILL_CALM_LIMIT = 900.0  # among ill machines: what one of them claims and drops again is tried elsewhere with growing pauses
FAULTS_LIMIT = 600.0
LOOK_EVERY = 1.0
GOSSIP_CHECK_EVERY = 16  # inputs of a peer
CLAIMS_PER_START_MAX = 1.1  # in fair weather; the facts' performance oracle
CLAIMS_AMONG_ACTIONS_MAX = 1.4  # where users pause queues, move and clear tasks, peers see different queues for a moment


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
    look_every = LOOK_EVERY
    calm_limit = CALM_LIMIT

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.world = World(plan.seed)
        self.timing = TIMINGS[plan.profile]
        self.network = Network(self.world, delay=plan.delay)
        self.gossip = Mesh(self.world, self.network, PROFILES[plan.profile], check_every=GOSSIP_CHECK_EVERY)
        self.watcher = Watcher(
            self.world,
            one_live_attempt=plan.weather is not Weather.STORMY,
            claims_max=CLAIMS_PER_TASK_MAX * max(15, len(plan.submissions)),
        )
        self.rng = self.world.rng_for("simulation")
        made = [MeshPeer(self, f"p{i}", slots, gpus) for i, (slots, gpus) in enumerate(zip(plan.slots, plan.gpus, strict=True))]
        self.peers: dict[PeerId, MeshPeer] = {peer.id: peer for peer in made}
        self.clones: dict[Address, MeshPeer] = {}  # copies of machines, by where they are
        self.tasks: list[TaskId] = []
        self.happened: Counter[str] = Counter()
        self.users = Users(self)
        self.faults = Faults(self)
        self.liveness = Liveness(self)
        self._calm_at: float | None = None
        if plan.replays:
            self.network.recorded = deque(maxlen=RECORDED_MAX)
        for peer in made:
            self.watcher.call(peer.id, peer.name)

    def reached(self, asker: MeshPeer, peer: PeerId) -> MeshPeer:
        """Who answers to the asker in the name of this peer."""
        found = self.gossip.reached(asker.gossip, peer) if self.clones else None
        return self.peers[peer] if found is None else self.clones.get(found.address, self.peers[peer])

    def clock_for(self, name: str) -> Clock:
        """Of the machine of this name, `p` and its number (and what else, for a copy): no two began at the same time."""
        rates = self.plan.rates
        if not rates:
            return Clock(self.world)
        number = int("".join(filter(str.isdigit, name.partition("-")[0])))
        return Clock(self.world, rate=rates[number], shows=self.world.rng_for(f"{name}/clock").uniform(0.0, 1e6))

    def run(self) -> Report:
        with patch.object(donor, "SYNC_ROWS_MAX", self.plan.page_rows):  # or a sync of so few tasks were one page
            return self._run()

    def _run(self) -> Report:
        for peer in self.peers.values():
            self.world.call_later(self.rng.uniform(0.0, 0.5), peer.start)
        self.users.plan()
        self.faults.plan()
        limit = max(self.plan.seconds, *(fault.at + fault.seconds for fault in self.plan.faults), 0.0) + FAULTS_LIMIT
        self._advance(lambda: self.world.now >= self.plan.seconds and self.faults.all_broken(), limit)
        self.faults.calm_down()
        self._calm_at = self.world.now
        self.liveness.calm()
        if self.plan.actions:
            self.users.resume_all()
        limit = ILL_CALM_LIMIT if self.plan.ill else self.calm_limit
        if not self._advance(self.settled, self._calm_at + limit):
            self.watcher.fail(f"P5: not equal and done {limit:g} s after the faults: {self._why_unsettled()}")
        return self._report(self.world.now - self._calm_at)

    def _advance(self, done: Callable[[], bool], limit: float) -> bool:
        while not done():
            if self.world.now >= limit:
                return False
            self.world.run_until(self.world.now + self.look_every)
            self._look()
        return True

    def _look(self) -> None:
        """What is too dear to be checked after every call."""
        for peer in self.running():
            self.watcher.check_vector(peer.name, peer.core)
            if peer.awake and peer.doors_open:
                self.watcher.check_running(peer.name, peer.core, peer.machine.running())
        self.liveness.look()

    def running(self) -> list[MeshPeer]:
        """Copies of machines are not among them: nobody sits at one."""
        return [peer for peer in self.peers.values() if peer.running]

    def well(self) -> list[MeshPeer]:
        """Who runs and is not ill for ever."""
        return [peer for peer in self.peers.values() if peer.running and not peer.ill]

    # ---- the end

    def settled(self) -> bool:
        return not self._why_unsettled()

    def _why_unsettled(self) -> str:
        """Empty if all is equal and done among those that are well; else the first thing that is not."""
        if absent := self.absent():
            return f"{absent} come or go"
        if left := [clone.name for clone in self.clones.values() if clone.running]:
            return f"{left} still run"
        well = self.well()
        if busy := [peer.name for peer in well if not peer.idle()]:
            return f"{busy} are busy"
        if not self.liveness.agree():
            return "the memberships differ"
        places = {peer.name for peer in self.peers.values() if not peer.ill}
        if running := {task: where for task, where in self.watcher.live().items() if places & set(where.values())}:
            return f"user code runs: {running}"
        return self._why_unequal() or self._why_undone()

    def _why_unequal(self) -> str:
        first, *others = (peer.core for peer in self.well())
        vector, watcher = first.vector, self.watcher
        if any(core.vector != vector for core in others):
            return "the ledgers differ"
        if not watcher.settings_forged and any(core.settings != first.settings for core in others):
            return "the settings differ"
        rows = [row for row in first.tasks() if row.task not in watcher.forged]
        if any(other.row(row.task) not in (None, row) for other in others for row in rows):
            return "some have rows that are ahead of their vectors"
        return ""

    def _why_undone(self) -> str:
        first = self.well()[0]
        for row in first.core.tasks():
            if row.task not in self.watcher.forged and not self._is_done(row):
                why = first.core.waiting_reason(first.now, row.task)
                return f"{row.task} ({row.spec.name}) is {read(row).status}: {why}"
        return ""

    def absent(self) -> list[str]:
        """Who should run and does not, or the other way round."""
        return [peer.name for peer in self.peers.values() if peer.running == peer.gone]

    def _is_done(self, row: Row) -> bool:
        """Whether it is over, or nobody who is well could run it."""
        reading = self.watcher.read(row)
        if reading.live or reading.status.final:
            return not reading.live
        well, commit = self.well(), row.spec.source.commit
        could = any(could_ever(row.spec.needs, row.queue.value, peer.peers.telemetry(peer.id)) for peer in well)
        return not (could and (commit is None or commit in self._sources()) and _have_majority(row.voters, well))

    def _sources(self) -> set[ObjectId]:
        """What can be fetched from somebody. A task whose only source went with its machine waits, and says why."""
        return {commit for peer in self.well() for commit in peer.machine.disk.sources}

    def _report(self, calm_seconds: float) -> Report:
        well = self.well()
        elsewhere = {task for peer in self.peers.values() if peer.ill for task in peer.machine.disk.rows}
        startable = {row.task for row in well[0].core.tasks() if _have_majority(row.voters, well)}
        final_checks(
            self.watcher, {peer.name: peer.core for peer in well}, [peer.peers.telemetry(peer.id) for peer in well],
            self._sources(), elsewhere, startable,
        )  # fmt: skip
        self._check_faults()
        claims = self.watcher.counts["claim"]
        report = Report(
            plan=self.plan, trace_hash=self.world.trace_hash(), happened=self.happened + self.watcher.counts,
            tasks=len({task for task, _ in self.watcher.facts.values()}), claims=claims, calm_seconds=calm_seconds,
            calls=self.world.calls,
        )  # fmt: skip
        most = CLAIMS_AMONG_ACTIONS_MAX if self.plan.actions else CLAIMS_PER_START_MAX
        starts, cancelled = report.happened["starts"], self.watcher.never_begun()
        if self.plan.fair and claims > most * (starts + cancelled) + 1:
            self.watcher.fail(f"{claims} claims for {starts} starts and {cancelled} cancelled before, and nothing was broken")
        return report

    def _check_faults(self) -> None:
        """A run in which nothing broke proves nothing."""
        plan, happened, traffic = self.plan, self.happened, self.network.traffic
        planned = Counter(fault.kind.value for fault in plan.faults)
        assert all(happened[kind] == count for kind, count in planned.items()), f"planned {planned}, had {happened}"
        happened["dropped"], happened["doubled"], happened["cut"] = traffic.dropped, traffic.duplicated, traffic.cut
        happened["flipped"], happened["replayed"] = traffic.flipped, traffic.replayed
        assert traffic.dropped > 0 or plan.loss == 0
        assert traffic.duplicated > 0 or plan.duplication == 0
        assert traffic.flipped > 0 or plan.flips == 0
        assert traffic.cut > 0 or not happened[FaultKind.PARTITION] + happened[FaultKind.BRIDGE]
        for action in plan.actions:
            assert happened[action.kind] + happened[f"{action.kind} refused"] > 0
        for _, illness in plan.ill:
            assert happened[f"ill {illness}"] > 0
        assert happened["clones stopped"] == happened[FaultKind.CLONE]
        assert happened["submitted"] + happened["cut"] > 0


def _have_majority(voters: Sequence[ActorId], well: Sequence[MeshPeer]) -> bool:
    """Whether a task with these voters, if any, can start."""
    present = {actor_id(peer.id, peer.core.ledger_epoch) for peer in well}
    return not voters or sum(voter in present for voter in voters) >= majority(len(voters))
