"""One agent in the simulated world: the real cores of gossip, ledger and exec, wired as `meshq/agent.py` wires them.

Where the agent has a thread, a socket or a process, this shell has a call in the world: a commit takes a while and gathers what
came meanwhile, a request to another peer is answered, refused or times out, a fetch needs somebody who has the source. All
calls of an agent go through `later`, which drops them when the agent has died and holds them back while it is stopped.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isinf
from random import Random
from typing import TYPE_CHECKING, assert_never

from meshq import record
from meshq.agent import TELEMETRY_SECONDS
from meshq.gossip import effects as gossip_effects
from meshq.gossip.member import Liveness, Member
from meshq.gossip.transport import STALL_SECONDS
from meshq.ids import Epoch, PeerId, TaskId
from meshq.ledger import effects as ledger_effects
from meshq.ledger.core import Ledger
from meshq.ledger.effects import EpochMinted, GrantReply, GrantRequest, Persist, Push, PushReply, Question
from meshq.ledger.replica import EPOCH_STEP_MAX
from meshq.ledger.shell import merge_persists
from meshq.ledger.transfer import rows_of
from meshq.meeting import SAVE_DELAY, SAVE_SECONDS
from meshq.peers import Peers
from meshq.seeds import PAUSE_MAX
from meshq.task import EndKind, Gpu, Telemetry
from tests.simulator.exec_shell import CPUS, GPU_BYTES, MEMORY_BYTES, ExecShell
from tests.simulator.gossip_peer import GossipPeer
from tests.simulator.liar import Liar
from tests.simulator.machine import Machine
from tests.simulator.requests import Request, Serve
from tests.simulator.world import Handle

if TYPE_CHECKING:
    from tests.simulator.simulation import Simulation

LEAVE_SECONDS = 1.0
END_SECONDS = 20.0
COMMIT_SECONDS_MAX = 0.1
CHECK_EVERY = 16  # inputs of the ledger, or thrice as many as it has rows: its check looks at each
OUTBOX_MAX = 5_000  # a machine that slept hears at once what has piled up
SEEDS_MAX = 20  # addresses that are asked at a time


@dataclass(slots=True)
class Batch:
    """The effects of one input of the ledger, and what is to be called when they are carried out."""

    effects: list[ledger_effects.Effect]
    then: Callable[[], None] | None


class MeshPeer:
    """A machine and the agent on it, which may run or not."""

    def __init__(self, mesh: "Simulation", name: str, slots: int, gpus: int, original: "MeshPeer | None" = None) -> None:
        """`original`: it is a copy of that one."""
        self.mesh = mesh
        self.world = mesh.world
        self.name = name
        self.slots = slots
        self.gpus = gpus
        self.machine = Machine(mesh.world, mesh.watcher, name, mesh.plan.run_seconds, mesh.clock_for(name))
        clock = self.machine.clock
        self.gossip: GossipPeer = (
            mesh.gossip.add(name, self._gossip_effect, clock)
            if original is None
            else mesh.gossip.copy(original.gossip, name, self._gossip_effect, clock)
        )
        self.id: PeerId = self.gossip.id
        self.gone = False  # for good: its machine never comes back, or it left
        self.ill = False  # for ever, in the calm of a liveness run
        self.running = False
        self.liar: Liar | None = None
        self.ledger: Ledger | None = None
        self.rng = Random()
        self.stopped_until = 0.0
        self.run = 0  # tells calls of an earlier run apart
        self._held_back: list[Callable[[], object]] = []
        self._trap: tuple[int, Callable[[], None]] | None = None

    def copied_to(self, name: str) -> "MeshPeer":
        """Another machine with a copy of the disk of this one as it is now, and so with its identity. Its agent is not started.

        Nothing of what runs here runs there. The store of its agent sees that the database is a copy.
        """
        mesh = self.mesh
        clone = MeshPeer(mesh, name, self.slots, self.gpus, self)
        disk = clone.machine.disk = self.machine.disk.copy()
        disk.sources = dict(disk.sources)
        disk.ledger_epoch += 1 + mesh.world.rng_for(name).randrange(EPOCH_STEP_MAX)
        mesh.clones[clone.gossip.address] = clone
        mesh.watcher.copies[name] = self.name
        return clone

    @property
    def problem(self) -> str:
        """As `Membership.problem` has it."""
        swim = self.gossip.swim
        return "another agent runs with the identity of this one" if swim is not None and swim.silent else ""

    @property
    def core(self) -> Ledger:
        assert self.ledger is not None, f"{self.name} does not run"
        return self.ledger

    @property
    def now(self) -> float:
        """What the clock of its machine shows: the only one that the cores ever see."""
        return self.machine.clock.now

    @property
    def awake(self) -> bool:
        return self.running and self.world.now >= self.stopped_until

    # ---- life

    def start(self) -> None:
        """As `Agent.run`: find what an earlier run left, adopt it, then open the doors and look for others."""
        assert not self.running and self.machine.powered
        self.running, self.doors_open, self.draining = True, False, False
        self.run += 1
        self.stopped_until = self.gossip.paused_until = 0.0
        self.rng = self.world.rng_for(f"{self.name}/agent/{self.run}")
        self._outbox: deque[Batch] = deque()
        self._committing: list[Batch] = []
        self._timers: dict[str, Handle] = {}
        self._saves_soon = False
        self._views_due, self._views_changed_at, self._unchecked = False, self.now, 0
        self._unproven_since: float | None = self.now  # its beliefs may be of the past until somebody answers
        now, disk = self.now, self.machine.disk
        rng = self.world.rng_for(f"{self.name}/ledger/{self.run}")
        timing = self.mesh.timing
        self.mesh.watcher.begins(self.name, disk.rows)
        self.ledger = Ledger(
            self.id,
            disk.ledger_epoch,
            timing,
            disk.rows.values(),
            disk.vector,
            disk.floors,
            rng,
            now,
            disk.settings,
            disk.grants,
            new_actor=disk.new_actor,
        )
        disk.new_actor = False
        self.ledger.set_wall_offset(now, self.machine.wall)
        self.exec = ExecShell(self)
        found = self.exec.start()
        self.peers = Peers(self._next_member(), self._telemetry(), now)
        self.peers.remember(now, disk.known_peers)
        self._tell_views()
        for claimed, state in found.values():
            self.exec.adopt(claimed, state)
        self.feed(self.ledger.adopt(now, list(found)), self._open_doors)

    def _next_member(self) -> Member:
        """What gossip will start as."""
        return Member(
            peer=self.id, epoch=Epoch(self.gossip.epoch + 1), incarnation=0, liveness=Liveness.ALIVE,
            name=self.name, addresses=(self.gossip.address,),
        )  # fmt: skip

    def kill(self) -> None:
        """SIGKILL of the agent: a commit that was under way is on the disk, or it is not."""
        assert self.running
        pending = [effect for batch in self._committing for effect in batch.effects]
        if pending and self.rng.random() < 0.5:
            self._commit_now(pending)
        self.exec.die()
        self.running, self.ledger = False, None
        self.disarm()
        self._held_back.clear()
        for timer in self._timers.values():
            timer.cancel()
        if self.gossip.swim is not None:
            self.gossip.crash()
        self.mesh.watcher.forget(self.name)

    def stop_for(self, seconds: float) -> None:
        """SIGSTOP, and SIGCONT later. The watch of the agent notices before or after what has piled up."""
        watch_first = self.rng.random() < 0.5
        self.stopped_until = self.world.now + seconds
        if watch_first:
            self.world.call_later(seconds, self._noticed_stall, self.run, seconds)
        self.gossip.pause(seconds)
        self.world.call_later(seconds, self._go_on, self.run)
        if not watch_first:
            self.world.call_later(seconds, self._noticed_stall, self.run, seconds)

    def leave(self) -> None:
        """As `Agent.leave`, without waiting for what runs."""
        self.draining = True
        self.capacity_changed()
        self.feed(self.core.leave(self.now), lambda: self._leave_when_idle(self.now + END_SECONDS))

    def _leave_when_idle(self, limit: float) -> None:
        if self.exec.worker.attempts() and self.now < limit:
            self.later(0.2, self._leave_when_idle, limit)
            return
        self.gossip.perform(self.gossip.core.leave(self.now))
        self.later(LEAVE_SECONDS, self._left)

    def _left(self) -> None:
        self.mesh.watcher.note(self.name, "has left")
        self.kill()

    def set_trap(self, effects: int, spring: Callable[[], None]) -> None:
        """Call `spring`, which kills, between two effects: after so many more of ledger and exec are carried out."""
        assert self._trap is None
        self._trap = (effects, spring)

    @property
    def trapped(self) -> bool:
        return self._trap is not None

    def disarm(self) -> None:
        self._trap = None

    def sprung(self) -> bool:
        """One more effect is to be carried out; True if the agent has died before it."""
        if self._trap is not None:
            left, spring = self._trap
            self._trap = (left - 1, spring)
            if left <= 0 and self.awake:
                self._trap = None
                spring()
        return not self.running

    def _open_doors(self) -> None:
        """Be there for others, and look for them."""
        self.doors_open = True
        self.gossip.start()
        self.mesh.watcher.is_now(self.id, self.gossip.core.me)
        self.gossip.perform(self.gossip.core.remember(self.now, self.machine.disk.known_peers))
        self._join_seeds(1.0)
        self.capacity_changed()
        self.later(TELEMETRY_SECONDS, self._publish_periodically)
        self.timer("snapshot", self.now + SAVE_SECONDS, self._save_known_peers)

    def _join_seeds(self, pause: float) -> None:
        """What mDNS or the seeds say: everybody's address, whoever answers there; again while there is nobody."""
        if alone := not self.peers.others_alive():
            addresses = [other.gossip.address for other in self.mesh.peers.values() if other is not self]
            if len(addresses) > SEEDS_MAX:
                addresses = self.rng.sample(addresses, SEEDS_MAX)
            self.gossip.perform(self.gossip.core.join(self.now, addresses))
        self.later(pause, self._join_seeds, min(PAUSE_MAX, 2 * pause) if alone else 1.0)

    def _save_soon(self) -> None:
        """A moment after the first of several changes: in a mesh that never rests, too."""
        if not self._saves_soon:
            self._saves_soon = True
            self.timer("snapshot", self.now + SAVE_DELAY, self._save_known_peers)

    def _save_known_peers(self) -> None:
        self._saves_soon = False
        self.machine.disk.known_peers = self.gossip.core.known_peers(self.now)
        self.timer("snapshot", self.now + SAVE_SECONDS, self._save_known_peers)

    def _publish_periodically(self) -> None:
        self.later(TELEMETRY_SECONDS, self._publish_periodically)
        self.capacity_changed()

    # ---- time

    def later(self, delay: float, call: Callable[..., None], *args: object) -> Handle:
        """After so many seconds of this machine's clock."""
        return self.at(self.now + delay, call, *args)

    def at(self, shows: float, call: Callable[..., None], *args: object) -> Handle:
        """When this machine's clock shows that."""
        run = self.run

        def due() -> None:
            if run != self.run or not self.running:
                return
            self.when_awake(lambda: call(*args))

        return self.world.call_at(self.machine.clock.when(shows), due)

    def when_awake(self, call: Callable[[], object]) -> None:
        """Now, or when the agent goes on; never if it does not run."""
        if self.running and not self.awake:
            self._held_back.append(call)
        elif self.running:
            call()

    def _go_on(self, run: int) -> None:
        if run != self.run or not self.running or not self.awake:
            return
        waiting, self._held_back = self._held_back, []
        for call in waiting:
            self.when_awake(call)

    def _noticed_stall(self, run: int, seconds: float) -> None:
        if run != self.run or not self.running or self.gossip.swim is None:
            return
        self.gossip.perform(self.gossip.core.handle_stall(self.now, seconds))
        if seconds > STALL_SECONDS:
            if seconds > min(self.mesh.timing.grace, self.mesh.timing.stall_max):
                self._unproven_since = self.now
            self.feed(self.core.handle_stall(self.now, seconds))

    def timer(self, name: str, deadline: float, call: Callable[[], None]) -> None:
        if name in self._timers:
            self._timers[name].cancel()
        if not isinf(deadline):
            self._timers[name] = self.at(deadline, call)

    # ---- gossip

    def _gossip_effect(self, effect: gossip_effects.Effect) -> None:
        watcher = self.mesh.watcher
        match effect:
            case gossip_effects.MemberChanged(_, after):
                if after.peer == self.id:
                    watcher.is_now(self.id, after)
                watcher.believes(self.name, after)
                self.peers.handle_member(self.now, after)
                self._save_soon()
                self._views_changed()
            case gossip_effects.RecordChanged(peer, record):
                self.peers.handle_record(peer, record)
                self._views_changed()
            case gossip_effects.Refuted():
                watcher.counts["refutations"] += 1
                watcher.is_now(self.id, self.gossip.core.me)
            case gossip_effects.NoteHeard(peer, note):
                self.feed(self.core.handle_note(self.now, peer, note))
            case gossip_effects.Send() | gossip_effects.Stream() | gossip_effects.Answer() | gossip_effects.Sync():
                if self.gossip.swim is not None:
                    watcher.is_now(self.id, self.gossip.swim.me)
            case gossip_effects.ProbeFailed() | gossip_effects.TransportChanged():
                pass
            case gossip_effects.Cloned(other, newer):
                self._saw_clone(other, newer)
            case _:
                assert_never(effect)

    def _saw_clone(self, other: Member, newer: bool) -> None:
        """As `Membership`: the newer one says that it has a problem, and so claims nothing."""
        assert self.mesh.clones, f"{self.name} saw a clone of itself: {other}"
        which = "newer" if newer else "older"
        self.mesh.watcher.counts[f"clones seen by the {which}"] += 1
        self.mesh.watcher.note(self.name, f"sees a clone of itself, and is the {which}")
        if newer:
            self.later(0.0, self.capacity_changed)

    def in_minority(self) -> bool:
        """Whether this peer has seen for a while that most of the others are not there: it is probably cut off."""
        others = [view for peer, view in self.peers.views().items() if peer != self.id and not view.left]
        alive = sum(1 for view in others if view.alive)
        absent = sum(1 for view in others if not view.alive and view.changed_at + self.mesh.timing.quorum_window > self.now)
        return alive + 1 < absent and self.now - self._views_changed_at > COMMIT_SECONDS_MAX

    def _views_changed(self) -> None:
        self._views_changed_at = self.now
        if not self._views_due:
            self._views_due = True
            self.later(0.0, self._tell_views)

    def _tell_views(self) -> None:
        self._views_due = False
        self.feed(self.core.handle_peers(self.now, self.peers.views()))

    def capacity_changed(self) -> None:
        if not self.doors_open:
            return  # the start publishes when gossip runs
        telemetry = self._telemetry()
        self.peers.handle_own_telemetry(telemetry)
        self.feed(self.core.handle_capacity(self.now, telemetry))
        self.gossip.publish(record.pack(telemetry))

    def _telemetry(self) -> Telemetry:
        free = self.exec.worker.free()
        attempts = self.exec.worker.attempts()
        owner = {gpu: each.claimed.task for each in attempts.values() for gpu in each.gpus}
        return Telemetry(
            queues=("default", "gpu") if self.gpus else ("default",), draining=self.draining,
            slots_total=self.slots, slots_free=free.slots, cpus=CPUS, cpus_free=free.cpus,
            memory_bytes=MEMORY_BYTES, memory_free_bytes=free.memory_bytes, gpus_free=len(free.gpus), problem=self.problem,
            gpus=tuple(_gpu(index, owner.get(index)) for index in range(self.gpus)),
            ledger_epoch=self.core.ledger_epoch, running=tuple(each.claimed.task for each in attempts.values()),
        )  # fmt: skip

    # ---- the ledger's shell (as `meshq/ledger/shell.py`)

    def feed(self, effects: list[ledger_effects.Effect], then: Callable[[], None] | None = None) -> None:
        self._unchecked += 1
        if self._unchecked >= max(CHECK_EVERY, 3 * len(self.machine.disk.rows)):
            self._unchecked = 0
            self.core.check()
        self._check_proven(effects)
        for effect in effects:
            if isinstance(effect, Persist) and effect.purged:
                self.mesh.watcher.forgets(self.name, effect.purged)
        if effects or then is not None:
            self._outbox.append(Batch(effects, then))
            if len(self._outbox) > OUTBOX_MAX:
                self.mesh.watcher.fail(f"I12: {len(self._outbox)} inputs of {self.name} wait for their commits")
        if self._outbox and not self._committing:
            self._commit()
        self.timer("ledger", self.core.deadline(), self._ledger_timeout)

    def _check_proven(self, effects: Sequence[ledger_effects.Effect]) -> None:
        """After a stall or a start nobody claims or starts before another peer has answered, if any is alive."""
        if self._unproven_since is None or self._views_due or not self.peers.others_alive():
            return
        if self.now - self._unproven_since >= self.mesh.timing.validation_max:
            return
        for effect in effects:
            if isinstance(effect, ledger_effects.Prepare | ledger_effects.Start):
                self.mesh.watcher.fail(f"{self.name} claims or starts on beliefs of {self._unproven_since:.3f}: {effect}")

    def _ledger_timeout(self) -> None:
        effects = self.core.handle_timeout(self.now)
        if self.core.deadline() <= self.now:
            self.mesh.watcher.fail(f"a deadline of {self.name} stays in the past: its shell would loop")
        self.feed(effects)

    def _commit(self) -> None:
        self._committing = list(self._outbox)
        writes = any(isinstance(effect, Persist | EpochMinted) for batch in self._committing for effect in batch.effects)
        seconds = self.rng.choice((0.001, 0.003, 0.02)) * self.rng.uniform(0.5, 1.5) if writes else 0.0
        assert seconds < COMMIT_SECONDS_MAX
        self.later(seconds, self._carry_out)

    def _commit_now(self, effects: Sequence[ledger_effects.Effect]) -> None:
        for effect in effects:
            if isinstance(effect, EpochMinted):
                self.machine.disk.ledger_epoch = effect.ledger_epoch
        persists = [effect for effect in effects if isinstance(effect, Persist)]
        if persists:
            merged = merge_persists(persists)
            self.machine.disk.commit(merged)
            lost_before = self.mesh.watcher.counts["lost"]
            for persist in persists:  # each one: what is written and forgotten in one transaction was written
                self.mesh.watcher.committed(self.name, persist.rows, persist.purged)
            if self.mesh.watcher.counts["lost"] > lost_before and self.in_minority():
                self.mesh.watcher.fail(f"{self.name} holds others lost although it is cut off itself")

    def _carry_out(self) -> None:
        batches = self._committing
        self._commit_now([effect for batch in batches for effect in batch.effects])
        if self.gossip.swim is not None:
            self.gossip.core.note(self.core.note)
        for batch in batches:
            for effect in batch.effects:
                if self.sprung():
                    return
                self._carry_out_one(effect)
                if not self.running:
                    return
            self._outbox.popleft()
            if batch.then is not None:
                batch.then()
                if not self.running:
                    return
        self._committing = []
        if self._outbox:
            self._commit()

    def _carry_out_one(self, effect: ledger_effects.Effect) -> None:
        match effect:
            case Persist() | EpochMinted():
                pass
            case ledger_effects.SendPush(peer, push):
                self._send_push(peer, push)
            case ledger_effects.SendSync(peer, question):
                self._send_sync(peer, question)
            case ledger_effects.SendGrants(peer, request):
                self._send_grants(peer, request)
            case ledger_effects.RowChanged(task):
                self.mesh.watcher.row_changed(self.name, task, self.core.row(task))
            case ledger_effects.Prepare() | ledger_effects.Start() | ledger_effects.Stop() | ledger_effects.Keep():
                self._tell_exec(effect)
            case _:
                assert_never(effect)

    def _tell_exec(
        self, effect: ledger_effects.Prepare | ledger_effects.Start | ledger_effects.Stop | ledger_effects.Keep
    ) -> None:
        now, worker = self.now, self.exec.worker
        match effect:
            case ledger_effects.Prepare(claimed):
                self.exec.perform(worker.prepare(now, claimed))
            case ledger_effects.Start(fence):
                self.mesh.watcher.told_to_start(self.name, fence, self.machine.disk.rows)
                if (attempt := worker.attempts().get(fence)) is not None:
                    self.mesh.users.starting(self, attempt.claimed.task)
                self.exec.perform(worker.start(now, fence))
            case ledger_effects.Stop(fence, reason):
                self.exec.perform(worker.stop(now, fence, EndKind.RELEASED.value if reason == "leaving" else reason))
            case ledger_effects.Keep(fence, until):
                self.machine.keep(fence, self.machine.clock.when(until))
            case _:
                assert_never(effect)

    # ---- requests to other peers (as `meshq/web/peer_client.py` and `peer_api.py`)

    def ask(self, peer: PeerId, serve: Serve, answered: Callable[[object], None], failed: Callable[[], None]) -> None:
        """`serve` runs at the other peer. One of the two callbacks is called, once."""
        Request(self, self.mesh.reached(self, peer), serve, answered, failed).send()

    def heard_of(self, asked_at: float) -> None:
        """Another peer answered what was asked then."""
        if self._unproven_since is not None and asked_at >= self._unproven_since:
            self._unproven_since = None

    def _send_push(self, peer: PeerId, push: Push) -> None:
        def answered(reply: object) -> None:
            assert isinstance(reply, PushReply)
            self.feed(self.core.handle_push_reply(self.now, peer, reply))

        self.world.trace(self.name, "push", peer, push.number, len(push.rows))
        self.mesh.watcher.check_push(self.name, push.rows)
        self.ask(
            peer,
            lambda target, answer: target.serve_push(self.id, push, answer),
            answered,
            lambda: self.feed(self.core.handle_push_failed(self.now, peer, push.number)),
        )

    def serve_push(self, peer: PeerId, push: Push, answer: Callable[[object], None]) -> None:
        reply, effects = self.core.handle_push(self.now, peer, push)
        self.feed(effects, lambda: answer(reply))

    def _send_sync(self, peer: PeerId, question: Question) -> None:
        def answered(answer: object) -> None:
            assert isinstance(answer, ledger_effects.Answer)
            for rows in rows_of(answer):
                self.feed(self.core.handle_sync_rows(self.now, peer, answer.number, rows))
            self.feed(self.core.handle_sync_answer(self.now, peer, answer))

        self.world.trace(self.name, "ledger sync", peer, question)
        self.ask(
            peer,
            lambda target, answer: target.serve_sync(self.id, question, answer),
            answered,
            lambda: self.feed(self.core.handle_sync_failed(self.now, peer, question.number)),
        )

    def serve_sync(self, peer: PeerId, question: Question, answer: Callable[[object], None]) -> None:
        told = self.core.handle_sync_request(self.now, peer, question)
        told = told if self.liar is None else self.liar.twist(peer, told)
        if self._outbox:
            self.feed([], lambda: answer(told))
        else:
            answer(told)

    def _send_grants(self, peer: PeerId, request: GrantRequest) -> None:
        def answered(reply: object) -> None:
            assert isinstance(reply, GrantReply)
            self.feed(self.core.handle_grant_reply(self.now, peer, reply))

        self.world.trace(self.name, "ask for grants", peer, request.number, len(request.asks))
        self.ask(
            peer,
            lambda target, answer: target.serve_grants(self.id, request, answer),
            answered,
            lambda: self.feed(self.core.handle_grants_failed(self.now, peer, request.number)),
        )

    def serve_grants(self, peer: PeerId, request: GrantRequest, answer: Callable[[object], None]) -> None:
        reply, effects = self.core.handle_grant_request(self.now, peer, request)
        self.feed(effects, lambda: answer(reply))

    # ---- commands

    def wall_jumped(self) -> None:
        """The agent looks at the wall clock now and then."""
        self.core.set_wall_offset(self.now, self.machine.wall)

    def cancel(self, task: TaskId) -> None:
        self.feed(self.core.cancel(self.now, task, f"user@{self.name}"))

    def state(self) -> object:
        """All that an input which is refused must leave as it was."""
        core = self.core
        rows = core._replica.fingerprints.root()
        members = () if self.gossip.swim is None else self.gossip.swim.members()
        return core.vector, core.ledger_epoch, core.settings, core._replica.floors, rows, members

    def idle(self) -> bool:
        """Nothing is under way here."""
        return self.awake and not self._outbox and not self.exec.worker.attempts()


def _gpu(index: int, task: TaskId | None) -> Gpu:
    return Gpu(index=index, uuid=f"GPU-{index}", name="sim", memory_bytes=GPU_BYTES, task=task)
