"""Several ledger cores over a simulated network, with a fake worker, an honest failure detector, disks and power cuts.

Nothing of the ledger is faked: cores, effects, order of commits. What stands in for the rest of meshq: liveness comes from an
oracle that needs 3 s to see a death and 1 s to see a return; attempts take the time that the world says; a commit takes
about a millisecond, and what was not durable is lost when the power fails.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from meshq.ids import ActorId, Fence, PeerId, TaskId
from meshq.ledger.core import Ledger
from meshq.ledger.effects import (
    Answer,
    Effect,
    EpochMinted,
    Grant,
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
from meshq.ledger.holder import read
from meshq.ledger.row import Row, Vector
from meshq.ledger.settings import NOTHING_SET, Settings
from meshq.ledger.timing import LAN
from meshq.ledger.transfer import rows_of
from meshq.task import Claimed, EndKind, Outcome, TaskSpec, Telemetry
from tests.ledger.builders import peer, telemetry
from tests.simulator.world import Handle, Network, World

DEATH_SEEN_AFTER = 3.0
LOOK_EVERY = 0.5


@dataclass(slots=True)
class Disk:
    """What a restart finds: of the process, and of the power."""

    ledger_epoch: int = 1
    rows: dict[TaskId, Row] = field(default_factory=dict)
    vector: dict[str, int] = field(default_factory=dict)
    floors: dict[str, int] = field(default_factory=dict)
    settings: Settings = NOTHING_SET
    grants: dict[TaskId, Grant] = field(default_factory=dict)

    def copy(self) -> "Disk":
        return Disk(
            self.ledger_epoch, dict(self.rows), dict(self.vector), dict(self.floors), self.settings, dict(self.grants)
        )  # fmt: skip

    def commit(self, persist: Persist) -> None:
        self.rows |= {row.task: row for row in persist.rows}
        for task in persist.purged:
            self.rows.pop(task, None)
        self.vector |= persist.vector
        self.floors |= persist.floors
        self.settings = persist.settings or self.settings
        for task, grant in persist.grants.items():
            self.grants.pop(task, None)
            if grant is not None:
                self.grants[task] = grant


@dataclass(slots=True)
class Process:
    """User code under one claim; it outlives the agent, not the machine."""

    claimed: Claimed
    ends: Handle
    cut_off: Handle | None = None  # what ends it when its voters don't let it go on


class SimPeer:
    def __init__(self, mesh: "Mesh", name: str, slots: int) -> None:
        self.mesh, self.name, self.id, self.slots = mesh, name, peer(name), slots
        self.disk, self.safe_disk = Disk(), Disk()
        self.processes: dict[Fence, Process] = {}
        self.unreported: dict[Fence, Outcome] = {}
        self.core: Ledger | None = None
        self.run = 0
        self._heard: dict[PeerId, float] = {}
        self._views: dict[PeerId, PeerView] = {}

    # ---- lives

    def start(self) -> None:
        now, world = self.mesh.world.now, self.mesh.world
        self.run += 1
        self.outbox: deque[tuple[list[Effect], Callable[[], None] | None]] = deque()
        self.claimed: dict[Fence, Claimed] = {}
        self.timer: Handle | None = None
        rng = world.rng_for(f"{self.name}/{self.run}")
        disk = self.disk
        vector, floors = _by_actor(disk.vector), _by_actor(disk.floors)
        self.until: dict[Fence, float] = {}
        self.core = Ledger(
            self.id, disk.ledger_epoch, LAN, disk.rows.values(), vector, floors, rng, now, disk.settings, disk.grants
        )  # fmt: skip
        for other in self._views.values():
            self._views[other.peer] = replace(other, alive=other.peer == self.id, changed_at=now)
        if self._views:
            self.feed(self.core.handle_peers(now, self._views))  # whom it remembers
        self.feed(self.core.adopt(now, [*self.processes, *self.unreported]))
        for fence, outcome in list(self.unreported.items()):
            self.report(fence, outcome)
        self.look(self.run)

    def crash(self, *, power: bool) -> None:
        """The agent dies; with `power`, all that runs and all that was not durable dies with it."""
        self.core = None
        if self.timer is not None:
            self.timer.cancel()
        if power:
            self.disk = self.safe_disk.copy()
            for fence, process in self.processes.items():
                process.ends.cancel()
                self.mesh.note_end(process.claimed.task, fence)
            self.processes = {}

    # ---- the failure detector

    def look(self, run: int) -> None:
        if self.core is None or run != self.run:
            return
        now, before = self.mesh.world.now, dict(self._views)
        for other in self.mesh.peers.values():
            reached = other is self or self.mesh.hears(self, other)
            if reached:
                self._heard[other.id] = now
            alive = now - self._heard.get(other.id, -100.0) < DEATH_SEEN_AFTER
            old = before.get(other.id)
            if old is None and not alive:
                continue
            self._views[other.id] = PeerView(
                peer=other.id, name=other.name, alive=alive,
                changed_at=now if old is None or old.alive != alive else old.changed_at,
                telemetry=other.telemetry() if reached or old is None else old.telemetry,
            )  # fmt: skip
        if self._views != before:
            self.feed(self.core.handle_peers(now, self._views))
        self.mesh.world.call_later(LOOK_EVERY, self.look, run)

    def telemetry(self) -> Telemetry:
        taken = {claimed.task for claimed in self.claimed.values()} | {one.claimed.task for one in self.processes.values()}
        epoch = self.core.ledger_epoch if self.core is not None else self.disk.ledger_epoch
        return telemetry(
            slots_total=self.slots, slots_free=max(0, self.slots - len(taken)), running=tuple(sorted(taken)), ledger_epoch=epoch
        )

    # ---- effects, in order, each batch after its commit

    def feed(self, effects: list[Effect], then: Callable[[], None] | None = None) -> None:
        assert self.core is not None
        self.core.check()
        self.outbox.append((effects, then))
        if len(self.outbox) == 1:
            self.commit_next(self.run)
        if self.timer is not None:
            self.timer.cancel()
        deadline = self.core.deadline()
        self.timer = self.mesh.world.call_at(deadline, self.timeout, self.run) if deadline < float("inf") else None

    def timeout(self, run: int) -> None:
        if self.core is not None and run == self.run:
            now = self.mesh.world.now
            effects = self.core.handle_timeout(now)
            assert self.core.deadline() > now, "a deadline that has passed would make a busy loop"
            self.feed(effects)

    def commit_next(self, run: int) -> None:
        effects, _ = self.outbox[0]
        writes = any(isinstance(effect, Persist) for effect in effects)
        self.mesh.world.call_later(self.mesh.commit_seconds() if writes else 0.0, self.carry_out, run)

    def carry_out(self, run: int) -> None:
        if self.core is None or run != self.run:
            return
        effects, then = self.outbox[0]
        for effect in effects:
            self.carry_out_one(effect)
        if then is not None:
            then()
        self.outbox.popleft()
        if self.outbox:
            self.commit_next(run)

    def carry_out_one(self, effect: Effect) -> None:
        match effect:
            case SendPush() | SendSync() | SendGrants():
                self.post(effect)
            case EpochMinted(epoch):
                self.disk.ledger_epoch = self.safe_disk.ledger_epoch = epoch
            case Persist():
                self.disk.commit(effect)
                if effect.durable:
                    self.safe_disk = self.disk.copy()
            case Keep(fence, until):
                self.until[fence] = until
                self.watch(fence)
            case Prepare(claimed):
                self.claimed[claimed.fence] = claimed
                self.mesh.world.call_later(self.mesh.prepare_seconds(), self.prepared, claimed.fence, self.run)
                self.capacity_changed()
            case Start(fence):
                self.start_process(fence)
            case Stop(fence, reason):
                self.mesh.world.call_later(0.05, self.stopped, fence, reason, self.run)
            case RowChanged(task):
                self.mesh.trace(self, "changed", task)

    # ---- the network

    def post(self, effect: SendPush | SendSync | SendGrants) -> None:
        match effect:
            case SendPush(to, push):
                self.mesh.trace(self, "push", to, push.number)
                self.mesh.send(self, to, lambda other: other.on_push(self, push, self.run))
            case SendSync(to, question):
                self.mesh.trace(self, "sync", to, type(question).__name__)
                self.mesh.send(self, to, lambda other: other.on_sync(self, question, self.run))
            case SendGrants(to, request):
                self.mesh.trace(self, "grants", to, request.number)
                self.mesh.send(self, to, lambda other: other.on_grants(self, request, self.run))

    def on_push(self, sender: "SimPeer", push: Push, run: int) -> None:
        if self.core is None:
            return
        reply, effects = self.core.handle_push(self.mesh.world.now, sender.id, push)
        self.feed(effects, lambda: self.mesh.send(self, sender.id, lambda other: other.on_reply(self, reply, run)))

    def on_reply(self, sender: "SimPeer", reply: PushReply, run: int) -> None:
        if self.core is not None and run == self.run:
            self.feed(self.core.handle_push_reply(self.mesh.world.now, sender.id, reply))

    def on_sync(self, sender: "SimPeer", question: Question, run: int) -> None:
        if self.core is None:
            return
        answer = self.core.handle_sync_request(self.mesh.world.now, sender.id, question)
        self.feed([], lambda: self.mesh.send(self, sender.id, lambda other: other.on_answer(self, answer, run)))

    def on_answer(self, sender: "SimPeer", answer: Answer, run: int) -> None:
        if self.core is not None and run == self.run:
            now = self.mesh.world.now
            for rows in rows_of(answer):
                self.feed(self.core.handle_sync_rows(now, sender.id, answer.number, rows))
            self.feed(self.core.handle_sync_answer(now, sender.id, answer))

    def on_grants(self, sender: "SimPeer", request: GrantRequest, run: int) -> None:
        if self.core is None:
            return
        reply, effects = self.core.handle_grant_request(self.mesh.world.now, sender.id, request)
        self.feed(effects, lambda: self.mesh.send(self, sender.id, lambda other: other.on_granted(self, reply, run)))

    def on_granted(self, sender: "SimPeer", reply: GrantReply, run: int) -> None:
        if self.core is not None and run == self.run:
            self.feed(self.core.handle_grant_reply(self.mesh.world.now, sender.id, reply))

    # ---- the worker

    def capacity_changed(self) -> None:
        if self.core is not None:
            self.feed(self.core.handle_capacity(self.mesh.world.now, self.telemetry()))

    def prepared(self, fence: Fence, run: int) -> None:
        if self.core is None or run != self.run or fence not in self.claimed:
            return
        if self.mesh.world.rng.random() < self.mesh.release_chance:
            self.ended(fence, Outcome(kind=EndKind.RELEASED, reason="no wheel for this platform"))
        else:
            self.feed(self.core.handle_ready(self.mesh.world.now, fence))

    def start_process(self, fence: Fence) -> None:
        claimed = self.claimed.pop(fence)
        self.mesh.note_start(self, claimed)
        ends = self.mesh.world.call_later(self.mesh.run_seconds(), self.finished, fence)
        self.processes[fence] = Process(claimed, ends)
        self.watch(fence)

    def watch(self, fence: Fence) -> None:
        """What the shim does: end it at the last moment that its voters allow, with or without an agent."""
        process = self.processes.get(fence)
        if process is None or fence not in self.until:
            return
        if process.cut_off is not None:
            process.cut_off.cancel()
        process.cut_off = self.mesh.world.call_at(self.until[fence], self.cut_off, fence)

    def cut_off(self, fence: Fence) -> None:
        if fence in self.processes:
            self.ended(fence, Outcome(kind=EndKind.RELEASED, exit_code=143, blameless=True))

    def finished(self, fence: Fence) -> None:
        failed = self.mesh.world.rng.random() < self.mesh.failure_chance
        kind = EndKind.FAILED if failed else EndKind.SUCCEEDED
        self.ended(fence, Outcome(kind=kind, exit_code=1 if failed else 0))

    def stopped(self, fence: Fence, reason: str, run: int) -> None:
        if run == self.run and (fence in self.processes or fence in self.claimed):
            self.ended(fence, Outcome(kind=EndKind.CANCELLED, reason=reason))

    def ended(self, fence: Fence, outcome: Outcome) -> None:
        self.claimed.pop(fence, None)
        process = self.processes.pop(fence, None)
        if process is not None:
            process.ends.cancel()
            self.mesh.note_end(process.claimed.task, fence)
            self.unreported[fence] = outcome
        if self.core is not None:
            self.report(fence, outcome)
            self.capacity_changed()

    def report(self, fence: Fence, outcome: Outcome) -> None:
        assert self.core is not None
        self.mesh.trace(self, "ended", fence, outcome.kind)
        before = self.core.counters.get("ends_of_ended_claims", 0)
        effects = self.core.handle_ended(self.mesh.world.now, fence, outcome)
        ignored = self.core.counters.get("ends_of_ended_claims", 0) > before
        self.mesh.unheard += ignored and outcome.kind is EndKind.SUCCEEDED
        self.feed(effects, lambda: self.forget(fence, self.run))

    def forget(self, fence: Fence, run: int) -> None:
        """When its end is recorded, which may take until somebody has answered."""
        if self.core is None or run != self.run:
            return
        if self.core.holds_back(fence):
            self.mesh.world.call_later(LOOK_EVERY, self.forget, fence, run)
        else:
            self.unreported.pop(fence, None)


def _by_actor(entries: dict[str, int]) -> Vector:
    return {ActorId(actor): seq for actor, seq in entries.items()}


class Mesh:
    """The world, its peers, and what a watcher who sees everything would have noted."""

    def __init__(
        self,
        seed: int,
        count: int,
        *,
        slots: int = 2,
        loss: float = 0.0,
        reliable: bool = True,
        delay: tuple[float, float] = (0.0005, 0.003),
    ) -> None:
        self.world = World(seed)
        self.network = Network(self.world, loss=loss, duplication=0.0 if reliable else 0.05, delay=delay)
        self.reliable = reliable
        self.failure_chance = self.release_chance = 0.0
        self.rng = self.world.rng_for("mesh")
        self.started: dict[Fence, int] = {}
        self.live: dict[TaskId, dict[Fence, None]] = {}
        self.overlaps = 0
        self.starts = 0
        self.unheard = 0
        self.submitted: list[TaskId] = []
        self.peers = {peer(name): SimPeer(self, name, slots) for name in "abcdefgh"[:count]}
        for one in self.peers.values():
            one.start()

    def commit_seconds(self) -> float:
        return self.rng.uniform(0.0005, 0.003)

    def prepare_seconds(self) -> float:
        return self.rng.choice((0.01, 0.05, 0.5, 3.0))

    def run_seconds(self) -> float:
        return self.rng.uniform(0.1, 20.0)

    def hears(self, one: SimPeer, other: SimPeer) -> bool:
        both = self.network.connected(one.name, other.name) and self.network.connected(other.name, one.name)
        return both and other.core is not None

    def send(self, source: SimPeer, to: PeerId, deliver: Callable[[SimPeer], None]) -> None:
        """As a request or its answer would travel. What is lost is not reported: the core must notice by itself."""
        other = self.peers[to]
        self.network.send(source.name, other.name, deliver, other, reliable=self.reliable)

    def submit(self, at: SimPeer, spec: TaskSpec) -> None:
        if at.core is None:
            return
        tasks, effects = at.core.submit(self.world.now, [spec], hold=True)
        at.feed(effects, lambda: self.submitted.extend(tasks))

    def cancel(self, at: SimPeer, task: TaskId) -> None:
        row = at.core.row(task) if at.core is not None else None
        if at.core is not None and row is not None and not read(row).status.final:
            at.feed(at.core.cancel(self.world.now, task, "bob@b"))

    def note_start(self, at: SimPeer, claimed: Claimed) -> None:
        self.trace(at, "start", claimed.fence)
        self.starts += 1
        self.started[claimed.fence] = self.started.get(claimed.fence, 0) + 1
        assert self.started[claimed.fence] == 1, f"P2: {claimed.fence} started twice"
        live = self.live.setdefault(claimed.task, {})
        live[claimed.fence] = None
        self.overlaps += len(live) > 1

    def note_end(self, task: TaskId, fence: Fence) -> None:
        self.live.get(task, {}).pop(fence, None)

    def trace(self, at: SimPeer, *parts: object) -> None:
        self.world.trace(at.name, *parts)

    # ---- what must be true in the end

    def settled(self) -> bool:
        """Everybody is up, has the same rows, and nothing more is to be done."""
        cores = [one.core for one in self.peers.values()]
        first = cores[0]
        if first is None or any(core is None for core in cores):
            return False
        rows = {row.task: row for row in first.tasks()}
        for core in cores[1:]:
            assert core is not None
            if (core.vector, core.settings) != (first.vector, first.settings) or {
                row.task: row for row in core.tasks()
            } != rows:
                return False
        return all(read(row).status.final and not read(row).live for row in rows.values())
