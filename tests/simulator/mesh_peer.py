"""One agent in the simulated world: the real cores of gossip, ledger and exec, wired as `meshq/agent.py` wires them.

Where the agent has a thread, a socket or a process, this shell has a call in the world: a commit takes a while and gathers what
came meanwhile, a request to another peer is answered, refused or times out, a fetch needs somebody who has the source. All
calls of an agent go through `_later`, which drops them when the agent has died and holds them back while it is stopped.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, isinf
from random import Random
from typing import TYPE_CHECKING, assert_never

from meshq import codec
from meshq.agent import SNAPSHOT_SECONDS, STALL_SECONDS, TELEMETRY_SECONDS
from meshq.exec import effects as exec_effects
from meshq.exec.worker import Adopted, Device, StillRunning, Worker, WorkerConfig
from meshq.gossip import effects as gossip_effects
from meshq.gossip.member import Liveness
from meshq.ids import Fence, ObjectId, PeerId, TaskId
from meshq.ledger import effects as ledger_effects
from meshq.ledger.core import Ledger
from meshq.ledger.effects import EpochMinted, Persist, Push, PushReply, SyncPage, SyncRequest
from meshq.ledger.rendezvous import claimants
from meshq.ledger.shell import merge_persists
from meshq.peers import Peers, is_alive
from meshq.task import Claimed, EndKind, Gpu, Outcome, TaskSpec, Telemetry
from meshq.web.desk import ACK_SECONDS, COPIES_WANTED
from meshq.web.peer_client import CONNECT_SECONDS, REQUEST_SECONDS
from tests.simulator.gossip_peer import GossipPeer
from tests.simulator.machine import WALL, Machine
from tests.simulator.world import Handle

if TYPE_CHECKING:
    from tests.simulator.simulation import Simulation

GIB = 2**30
SEED_SECONDS = 30.0  # between tries of the seeds, as long as there is nobody
LEAVE_SECONDS = 1.0
END_SECONDS = 20.0
COMMIT_SECONDS_MAX = 0.1
CHECK_EVERY = 16  # inputs of the ledger: its check looks at every row


@dataclass(slots=True)
class Batch:
    """The effects of one input of the ledger, and what is to be called when they are carried out."""

    effects: list[ledger_effects.Effect]
    then: Callable[[], None] | None


class MeshPeer:
    """A machine and the agent on it, which may run or not."""

    def __init__(self, mesh: "Simulation", name: str, slots: int, gpus: int) -> None:
        self.mesh = mesh
        self.world = mesh.world
        self.name = name
        self.slots = slots
        self.gpus = gpus
        self.machine = Machine(mesh.world, mesh.watcher, name, mesh.plan.run_seconds)
        self.gossip: GossipPeer = mesh.gossip.add(name, self._gossip_effect)
        self.id: PeerId = self.gossip.id
        self.gone = False  # for good: its machine never comes back, or it left
        self.running = False
        self.ledger: Ledger | None = None
        self.rng = Random()
        self.stopped_until = 0.0
        self._run = 0  # tells calls of an earlier run apart
        self._held_back: list[Callable[[], None]] = []
        self._trap: tuple[int, Callable[[], None]] | None = None

    @property
    def core(self) -> Ledger:
        assert self.ledger is not None, f"{self.name} does not run"
        return self.ledger

    @property
    def awake(self) -> bool:
        return self.running and self.world.now >= self.stopped_until

    # ---- life

    def start(self) -> None:
        """As `Agent.run`: find what an earlier run left, adopt it, then open the doors and look for others."""
        assert not self.running and self.machine.powered
        self.running, self.doors_open, self.draining = True, False, False
        self._run += 1
        self.stopped_until = self.gossip.paused_until = 0.0
        self.rng = self.world.rng_for(f"{self.name}/agent/{self._run}")
        self._outbox: deque[Batch] = deque()
        self._committing: list[Batch] = []
        self._timers: dict[str, Handle] = {}
        self._views_due, self._views_changed_at, self._inputs = False, self.world.now, 0
        self._unproven_since: float | None = self.world.now  # its beliefs may be of the past until somebody answers
        now, disk = self.world.now, self.machine.disk
        rng = self.world.rng_for(f"{self.name}/ledger/{self._run}")
        timing = self.mesh.timing
        self.ledger = Ledger(self.id, disk.ledger_epoch, timing, disk.rows.values(), disk.vector, disk.floors, rng, now)
        self.ledger.set_wall_offset(now, WALL + now)
        self.worker = Worker(WorkerConfig(slots=self.slots, cpus=8, memory_bytes=16 * GIB), now)
        found = self.machine.scan()
        self._exec(self.worker.handle_gpus(now, tuple(Device(index=i, memory_bytes=8 * GIB) for i in range(self.gpus))))
        self._feed(self.ledger.adopt(now, list(found)), lambda: self._adopted(list(found.values())))

    def kill(self) -> None:
        """SIGKILL of the agent: a commit that was under way is on the disk, or it is not."""
        assert self.running
        pending = [effect for batch in self._committing for effect in batch.effects]
        if pending and self.rng.random() < 0.5:
            self._commit_now(pending)
        for fence in [f for f, a in self.worker.attempts().items() if type(a).__name__ in ("Starting", "Aborting")]:
            if self.rng.random() < 0.5:  # its zygote had read the request already
                self.world.call_later(self.rng.uniform(0.0, 0.1), self._spawn_if_powered, fence)
        self.running, self.ledger = False, None
        self.disarm()
        self._held_back.clear()
        self.machine.forget_watches()
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
            self.world.call_later(seconds, self._noticed_stall, self._run, seconds)
        self.gossip.pause(seconds)
        self.world.call_later(seconds, self._go_on, self._run)
        if not watch_first:
            self.world.call_later(seconds, self._noticed_stall, self._run, seconds)

    def leave(self) -> None:
        """As `Agent.leave`, without waiting for what runs."""
        self.draining = True
        self._capacity_changed()
        self._feed(self.core.leave(self.world.now), lambda: self._leave_when_idle(self.world.now + END_SECONDS))

    def _leave_when_idle(self, limit: float) -> None:
        if self.worker.attempts() and self.world.now < limit:
            self._later(0.2, self._leave_when_idle, limit)
            return
        self.gossip.perform(self.gossip.core.leave(self.world.now))
        self._later(LEAVE_SECONDS, self._left)

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

    def _sprung(self) -> bool:
        """One more effect is to be carried out; True if the agent has died before it."""
        if self._trap is not None:
            left, spring = self._trap
            self._trap = (left - 1, spring)
            if left <= 0 and self.awake:
                self._trap = None
                spring()
        return not self.running

    def _adopted(self, found: Sequence[tuple[Claimed, Adopted]]) -> None:
        for claimed, state in found:
            if isinstance(state, StillRunning):
                self._watch(claimed.fence)
                self.mesh.watcher.counts["adopted"] += 1
            gpus = self.machine.folders[claimed.fence].gpus if isinstance(state, StillRunning) else ()
            self._exec(self.worker.adopt(self.world.now, claimed, state, gpus))
        self.doors_open = True
        self.gossip.start()
        self.peers = Peers(self.gossip.core.me, self._telemetry(), self.world.now)
        self.mesh.watcher.is_now(self.id, self.gossip.core.me)
        self.gossip.perform(self.gossip.core.remember(self.world.now, self.machine.disk.known_peers))
        self._join_seeds()
        self._capacity_changed()
        self._later(TELEMETRY_SECONDS, self._publish_periodically)
        self._later(SNAPSHOT_SECONDS, self._save_known_peers)

    def _join_seeds(self) -> None:
        """What mDNS or the seeds say: everybody's address, whoever answers there."""
        if not self.peers.others_alive():
            addresses = [other.gossip.address for other in self.mesh.peers.values() if other is not self]
            self.gossip.perform(self.gossip.core.join(self.world.now, addresses))
        self._later(SEED_SECONDS, self._join_seeds)

    def _save_known_peers(self) -> None:
        self.machine.disk.known_peers = self.gossip.core.known_peers(self.world.now)
        self._later(SNAPSHOT_SECONDS, self._save_known_peers)

    def _publish_periodically(self) -> None:
        self._later(TELEMETRY_SECONDS, self._publish_periodically)
        self._capacity_changed()

    # ---- time

    def _later(self, delay: float, call: Callable[..., None], *args: object) -> Handle:
        run = self._run

        def due() -> None:
            if run != self._run or not self.running:
                return
            self.when_awake(lambda: call(*args))

        return self.world.call_later(delay, due)

    def when_awake(self, call: Callable[[], None]) -> None:
        """Now, or when the agent goes on; never if it does not run."""
        if self.running and not self.awake:
            self._held_back.append(call)
        elif self.running:
            call()

    def _go_on(self, run: int) -> None:
        if run != self._run or not self.running or not self.awake:
            return
        waiting, self._held_back = self._held_back, []
        for call in waiting:
            self.when_awake(call)

    def _noticed_stall(self, run: int, seconds: float) -> None:
        if run != self._run or not self.running or self.gossip.swim is None:
            return
        self.gossip.perform(self.gossip.core.handle_stall(self.world.now, seconds))
        if seconds > STALL_SECONDS:
            if seconds > min(self.mesh.timing.grace, self.mesh.timing.stall_max):
                self._unproven_since = self.world.now
            self._feed(self.core.handle_stall(self.world.now, seconds))

    def _timer(self, name: str, deadline: float, call: Callable[[], None]) -> None:
        if name in self._timers:
            self._timers[name].cancel()
        if not isinf(deadline):
            self._timers[name] = self._later(max(0.0, deadline - self.world.now), call)

    # ---- gossip

    def _gossip_effect(self, effect: gossip_effects.Effect) -> None:
        watcher = self.mesh.watcher
        match effect:
            case gossip_effects.MemberChanged(_, after):
                if after.peer == self.id:
                    watcher.is_now(self.id, after)
                watcher.believes(self.name, after)
                self.peers.handle_member(self.world.now, after)
                self._views_changed()
            case gossip_effects.RecordChanged(peer, record):
                self.peers.handle_record(peer, record)
                self._views_changed()
            case gossip_effects.Refuted():
                watcher.counts["refutations"] += 1
                watcher.is_now(self.id, self.gossip.core.me)
            case gossip_effects.Send() | gossip_effects.Sync():
                if self.gossip.swim is not None:
                    watcher.is_now(self.id, self.gossip.swim.me)
            case gossip_effects.ProbeFailed():
                pass
            case _:
                assert_never(effect)

    def in_minority(self) -> bool:
        """Whether this peer has seen for a while that most of the others are not there: it is probably cut off."""
        others = [member for member in self.peers.members() if member.peer != self.id and member.liveness is not Liveness.LEFT]
        alive = sum(1 for member in others if is_alive(member))
        return alive + 1 < len(others) - alive and self.world.now - self._views_changed_at > COMMIT_SECONDS_MAX

    def _views_changed(self) -> None:
        self._views_changed_at = self.world.now
        if not self._views_due:
            self._views_due = True
            self._later(0.0, self._tell_views)

    def _tell_views(self) -> None:
        self._views_due = False
        self._feed(self.core.handle_peers(self.world.now, self.peers.views()))

    def _capacity_changed(self) -> None:
        if not self.doors_open:
            return  # the start publishes when gossip runs
        telemetry = self._telemetry()
        self.peers.handle_own_telemetry(telemetry)
        self._feed(self.core.handle_capacity(self.world.now, telemetry))
        self.gossip.publish(codec.encode(telemetry))

    def _telemetry(self) -> Telemetry:
        free = self.worker.free()
        attempts = self.worker.attempts()
        owner = {gpu: each.claimed.task for each in attempts.values() for gpu in each.gpus}
        return Telemetry(
            queues=("default", "gpu") if self.gpus else ("default",), draining=self.draining,
            slots_total=self.slots, slots_free=free.slots, cpus=8, cpus_free=free.cpus,
            memory_bytes=16 * GIB, memory_free_bytes=free.memory_bytes, gpus_free=len(free.gpus),
            gpus=tuple(Gpu(index=i, uuid=f"GPU-{i}", name="sim", memory_bytes=8 * GIB, task=owner.get(i)) for i in range(self.gpus)),
            ledger_epoch=self.core.ledger_epoch, running=tuple(each.claimed.task for each in attempts.values()),
        )  # fmt: skip

    # ---- the ledger's shell (as `meshq/ledger/shell.py`)

    def _feed(self, effects: list[ledger_effects.Effect], then: Callable[[], None] | None = None) -> None:
        self._inputs += 1
        if self._inputs % CHECK_EVERY == 0:
            self.core.check()
        self._check_proven(effects)
        if effects or then is not None:
            self._outbox.append(Batch(effects, then))
        if self._outbox and not self._committing:
            self._commit()
        self._timer("ledger", self.core.deadline(), self._ledger_timeout)

    def _check_proven(self, effects: Sequence[ledger_effects.Effect]) -> None:
        """After a stall or a start nobody claims or starts before another peer has answered, if any is alive."""
        if self._unproven_since is None or not self.doors_open or not self.peers.others_alive() or self._views_due:
            return
        for effect in effects:
            if isinstance(effect, ledger_effects.Prepare | ledger_effects.Start):
                self.mesh.watcher.fail(f"{self.name} claims or starts on beliefs of {self._unproven_since:.3f}: {effect}")

    def _ledger_timeout(self) -> None:
        effects = self.core.handle_timeout(self.world.now)
        if self.core.deadline() <= self.world.now:
            self.mesh.watcher.fail(f"a deadline of {self.name} stays in the past: its shell would loop")
        self._feed(effects)

    def _commit(self) -> None:
        self._committing = list(self._outbox)
        writes = any(isinstance(effect, Persist | EpochMinted) for batch in self._committing for effect in batch.effects)
        seconds = self.rng.choice((0.001, 0.003, 0.02)) * self.rng.uniform(0.5, 1.5) if writes else 0.0
        assert seconds < COMMIT_SECONDS_MAX
        self._later(seconds, self._carry_out)

    def _commit_now(self, effects: Sequence[ledger_effects.Effect]) -> None:
        for effect in effects:
            if isinstance(effect, EpochMinted):
                self.machine.disk.ledger_epoch = effect.ledger_epoch
        persists = [effect for effect in effects if isinstance(effect, Persist)]
        if persists:
            merged = merge_persists(persists)
            self.machine.disk.commit(merged)
            lost_before = self.mesh.watcher.counts["lost"]
            self.mesh.watcher.committed(self.name, merged.rows)
            if self.mesh.watcher.counts["lost"] > lost_before and self.in_minority():
                self.mesh.watcher.fail(f"{self.name} holds others lost although it is cut off itself")

    def _carry_out(self) -> None:
        batches = self._committing
        self._commit_now([effect for batch in batches for effect in batch.effects])
        for batch in batches:
            for effect in batch.effects:
                if self._sprung():
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
        now = self.world.now
        match effect:
            case Persist() | EpochMinted():
                pass
            case ledger_effects.SendPush(peer, push):
                self._send_push(peer, push)
            case ledger_effects.SendSync(peer, request):
                self._send_sync(peer, request)
            case ledger_effects.Prepare(claimed):
                self._exec(self.worker.prepare(now, claimed))
            case ledger_effects.Start(fence):
                self.mesh.watcher.told_to_start(self.name, fence, self.machine.disk.rows)
                self._exec(self.worker.start(now, fence))
            case ledger_effects.Stop(fence, reason):
                self._exec(self.worker.stop(now, fence, EndKind.RELEASED.value if reason == "leaving" else reason))
            case ledger_effects.RowChanged(task):
                row = self.core.row(task)
                assert row is not None
                self.mesh.watcher.row_changed(self.name, row)
            case _:
                assert_never(effect)

    # ---- requests to other peers (as `meshq/web/peer_client.py` and `peer_api.py`)

    def ask(
        self, peer: PeerId, serve: Callable[["MeshPeer", Callable[[object], None]], None],
        answered: Callable[[object], None], failed: Callable[[], None],
    ) -> None:  # fmt: skip
        """`serve` runs at the other peer and answers when it likes. One of the two callbacks is called, once."""
        target, network, reliable = self.mesh.peers[peer], self.mesh.network, self.mesh.plan.reliable
        limit = self.rng.choice((CONNECT_SECONDS, REQUEST_SECONDS))
        timeout = self._later(limit, lambda: settle(failed))
        pending, run, asked_at = [True], self._run, self.world.now

        def settle(call: Callable[[], None]) -> None:
            if pending:
                pending.clear()
                timeout.cancel()
                call()

        def returned(call: Callable[[], None]) -> None:
            if run == self._run:
                self.when_awake(lambda: settle(call))

        def back(call: Callable[[], None]) -> None:
            network.send(target.name, self.name, returned, call, reliable=reliable)

        def succeeded(answer: object) -> None:
            if self._unproven_since is not None and asked_at >= self._unproven_since:
                self._unproven_since = None
            answered(answer)

        def arrive() -> None:
            if target.running and target.doors_open:
                target.when_awake(lambda: serve(target, lambda answer: back(lambda: succeeded(answer))))
            elif target.machine.powered:
                back(failed)  # refused

        def send() -> None:
            network.send(self.name, target.name, arrive, reliable=reliable)

        self.world.call_later(self._retransmissions() if reliable else 0.0, send)

    def _retransmissions(self) -> float:
        """How long TCP's first repeats take; the network itself adds one more where it loses something."""
        return 0.4 if self.rng.random() < self.mesh.network.loss**2 else 0.0

    def _send_push(self, peer: PeerId, push: Push) -> None:
        def answered(reply: object) -> None:
            assert isinstance(reply, PushReply)
            self._feed(self.core.handle_push_reply(self.world.now, peer, reply))

        self.world.trace(self.name, "push", peer, push.number, len(push.rows))
        self.ask(
            peer,
            lambda target, answer: target.serve_push(self.id, push, answer),
            answered,
            lambda: self._feed(self.core.handle_push_failed(self.world.now, peer, push.number)),
        )

    def serve_push(self, peer: PeerId, push: Push, answer: Callable[[object], None]) -> None:
        reply, effects = self.core.handle_push(self.world.now, peer, push)
        self._feed(effects, lambda: answer(reply))

    def _send_sync(self, peer: PeerId, request: SyncRequest) -> None:
        def answered(page: object) -> None:
            assert isinstance(page, SyncPage)
            self._feed(self.core.handle_sync_page(self.world.now, peer, page))

        self.world.trace(self.name, "ledger sync", peer, sorted(request.vector.items()))
        self.ask(
            peer,
            lambda target, answer: target.serve_sync(self.id, request, answer),
            answered,
            lambda: self._feed(self.core.handle_sync_failed(self.world.now, peer)),
        )

    def serve_sync(self, peer: PeerId, request: SyncRequest, answer: Callable[[object], None]) -> None:
        page = self.core.handle_sync_request(self.world.now, peer, request)
        if self._outbox:
            self._feed([], lambda: answer(page))
        else:
            answer(page)

    # ---- users (as `meshq/web/desk.py`)

    def submit(self, spec: TaskSpec) -> None:
        """Store source and task here and elsewhere, then tell the user where they are."""
        commit = spec.source.commit
        if commit is None:
            self._store(spec, self.peers.others_alive())
            return
        self.machine.disk.sources[commit] = None
        targets = claimants(TaskId(commit), 1, self.peers.others_alive())[:COPIES_WANTED]
        having: list[PeerId] = []
        waiting = dict.fromkeys(targets)

        def one_done(peer: PeerId, has_it: bool) -> None:
            del waiting[peer]
            having.extend([peer] if has_it else [])
            if not waiting:
                self._store(spec, having)

        for target in targets:
            self.ask(
                target,
                lambda other, answer: other.serve_source(commit, answer),
                lambda _, peer=target: one_done(peer, True),  # type: ignore[misc]  # a default binds the loop's value
                lambda peer=target: one_done(peer, False),  # type: ignore[misc]  # a default binds the loop's value
            )
        if not targets:
            self._store(spec, [])

    def serve_source(self, commit: ObjectId, answer: Callable[[object], None]) -> None:
        self.machine.disk.sources[commit] = None
        answer(None)

    def _store(self, spec: TaskSpec, having: Sequence[PeerId]) -> None:
        tasks, effects = self.core.submit(self.world.now, [spec], hold=True)
        limit = self.world.now + ACK_SECONDS
        self._feed(effects, lambda: self._wait_for_copies(tasks[0], having, limit))

    def _wait_for_copies(self, task: TaskId, having: Sequence[PeerId], limit: float) -> None:
        if any(peer in self.core.stored_on(task) for peer in having):
            self.mesh.answered(self, task, stored_elsewhere=True)
        elif not having or self.world.now >= limit:
            self.mesh.answered(self, task, stored_elsewhere=False)
        else:
            self._later(0.05, self._wait_for_copies, task, having, limit)

    def cancel(self, task: TaskId) -> None:
        self._feed(self.core.cancel(self.world.now, task, f"user@{self.name}"))

    # ---- exec's shell (as `meshq/exec/shell.py`)

    def _exec(self, effects: Sequence[exec_effects.Effect]) -> None:
        self.worker.check()
        for effect in effects:
            if self._sprung():
                return
            self._exec_one(effect)
        self._timer("worker", self.worker.deadline(), lambda: self._exec(self.worker.handle_timeout(self.world.now)))

    def _exec_one(self, effect: exec_effects.Effect) -> None:
        match effect:
            case exec_effects.FetchSource(claimed):
                self.machine.create(claimed)
                self._later(self.rng.uniform(0.002, 0.02), self._fetch, claimed)
            case exec_effects.BuildEnvironment(claimed):
                seconds = self.rng.choice((0.02, 0.1, self.rng.uniform(0.1, self.mesh.plan.build_seconds)))
                self._later(seconds, self._built, claimed.fence)
            case exec_effects.Spawn(claimed, _, gpus):
                self.machine.folders[claimed.fence].gpus = gpus
                self._later(self.rng.uniform(0.001, 0.02), self._spawn, claimed.fence)
            case exec_effects.Signal(fence, reason):
                self.machine.signal(fence, reason)
            case exec_effects.Collect(fence):
                seconds = self.rng.uniform(0.001, 0.05)
                self._later(seconds, lambda: self._exec(self.worker.handle_collected(self.world.now, fence, (), 0)))
            case exec_effects.Discard():
                pass
            case exec_effects.Ready(fence):
                self._later(0.0, lambda: self._feed(self.core.handle_ready(self.world.now, fence)))
            case exec_effects.Slow(fence):
                self._later(0.0, lambda: self._feed(self.core.handle_slow(self.world.now, fence)))
            case exec_effects.AttemptEnded(fence, outcome):
                self._later(0.0, self._report, fence, outcome)
            case exec_effects.CapacityChanged():
                self._later(0.0, self._capacity_changed)
            case _:
                assert_never(effect)

    def _report(self, fence: Fence, outcome: Outcome) -> None:
        def reported() -> None:
            if fence in self.machine.folders:
                self.machine.folders[fence].reported = True

        self._feed(self.core.handle_ended(self.world.now, fence, outcome), reported)

    def _fetch(self, claimed: Claimed) -> None:
        """From here, or else from whoever has the source, the submitter first."""
        commit, first = claimed.spec.source.commit, claimed.spec.submitted_peer
        if commit is None or commit in self.machine.disk.sources:
            self._exec(self.worker.handle_source_ready(self.world.now, claimed.fence))
            return
        self._fetch_from(claimed, commit, sorted(self.peers.others_alive(), key=lambda other: other != first))

    def _fetch_from(self, claimed: Claimed, commit: ObjectId, left: Sequence[PeerId]) -> None:
        if not left:
            self.mesh.watcher.counts["sources_missed"] += 1
            reason = "no peer has the source"
            self._exec(self.worker.handle_preparation_failed(self.world.now, claimed.fence, reason, True))
            return

        def answered(has_it: object) -> None:
            if has_it:
                self.machine.disk.sources[commit] = None
                self._fetch(claimed)
            else:
                self._fetch_from(claimed, commit, left[1:])

        self.ask(
            left[0],
            lambda target, answer: answer(commit in target.machine.disk.sources),
            answered,
            lambda: self._fetch_from(claimed, commit, left[1:]),
        )

    def _built(self, fence: Fence) -> None:
        now, luck = self.world.now, self.rng.random()
        if luck < self.mesh.plan.release_chance:
            self._exec(self.worker.handle_preparation_failed(now, fence, "no wheel for this platform", True))
        elif luck < 1.5 * self.mesh.plan.release_chance:
            self._exec(self.worker.handle_preparation_failed(now, fence, "the requirements can't be solved", False))
        else:
            self._exec(self.worker.handle_environment_ready(now, fence, "/python"))

    def _spawn(self, fence: Fence) -> None:
        self._spawn_if_powered(fence)
        if not self.machine.folders[fence].started:
            self._exec(self.worker.handle_spawn_failed(self.world.now, fence, "another agent decided otherwise"))
            return
        self._exec(self.worker.handle_spawned(self.world.now, fence))
        self._watch(fence)

    def _spawn_if_powered(self, fence: Fence) -> None:
        if self.machine.powered:
            self.machine.spawn(fence)

    def _watch(self, fence: Fence) -> None:
        run = self._run

        def over() -> None:
            if run == self._run and self.running:
                self.when_awake(lambda: self._later(self.rng.uniform(0.0, 0.01), self._exited, fence))

        self.machine.watch(fence, over)

    def _exited(self, fence: Fence) -> None:
        state = self.machine.inspect(fence)
        assert not isinstance(state, StillRunning), "it was watched to its end"
        self._exec(self.worker.handle_exited(self.world.now, fence, state))  # type: ignore[arg-type]  # it was started

    # ---- for the end

    def idle(self) -> bool:
        """Nothing is under way here."""
        return self.awake and not self._outbox and not self.worker.attempts()

    def deadline(self) -> float:
        return self.core.deadline() if self.ledger is not None else inf
