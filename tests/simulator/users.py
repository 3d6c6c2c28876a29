"""What people do in a simulated mesh: submit and cancel, move tasks, pause and clear queues, say how much shall be kept."""

from typing import TYPE_CHECKING, assert_never

from meshq.errors import MeshqError
from meshq.ids import ObjectId, TaskId
from meshq.ledger.holder import read
from meshq.ledger.moves import Before, Down, First, Last, Place, To, Up
from meshq.ledger.settings import DELETED, paused
from meshq.task import Needs, Source, TaskSpec
from tests.simulator.desk import Submitting
from tests.simulator.mesh_peer import MeshPeer
from tests.simulator.plan import Action, ActionKind, Submission

if TYPE_CHECKING:
    from tests.simulator.simulation import Simulation

POSTPONE = 0.5
RESUME_EVERY = 5.0
CLEARED_MAX = 3  # tasks at a time: a run must keep some
QUEUES = ("default", "gpu")


class Users:
    """Everybody who sits at one of the machines."""

    def __init__(self, mesh: "Simulation") -> None:
        self._mesh = mesh
        self._world = mesh.world
        self._rng = mesh.rng
        submissions = mesh.plan.submissions
        self._cancel_after = {each.name: each.cancelled_after for each in submissions if each.cancelled_after}
        self._cancel_at_start = [each.name for each in submissions if each.cancelled_at_start]
        self._paused: dict[str, int] = {}

    def plan(self) -> None:
        """Let everything happen in its time."""
        for submission in self._mesh.plan.submissions:
            self._world.call_at(submission.at, self.submit, submission)
        for action in self._mesh.plan.actions:
            self._world.call_at(action.at, self._act, action)

    # ---- submitting

    def submit(self, submission: Submission) -> None:
        able = [peer for peer in self._at_work() if not peer.draining]
        if not able:
            self._world.call_later(POSTPONE, self.submit, submission)
            return
        peer = self._rng.choice(able)
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
            isolation=submission.isolation,
        )
        Submitting(peer, spec).begin()

    def answered(self, peer: MeshPeer, task: TaskId, *, stored_elsewhere: bool) -> None:
        """The user has the task's id."""
        self._mesh.tasks.append(task)
        self._mesh.happened["submitted"] += 1
        watcher = self._mesh.watcher
        kept = watcher.acknowledged if stored_elsewhere else watcher.stored_here_only
        kept[task] = peer.name
        watcher.note(peer.name, "answers its user" + ("" if stored_elsewhere else ": on this machine only"), task)
        row = peer.core.row(task)
        if row is not None and row.spec.name in self._cancel_after:
            self._world.call_later(self._cancel_after[row.spec.name], self._cancel, task)

    def starting(self, peer: MeshPeer, task: TaskId) -> None:
        """The peer has been told to start user code of this task."""
        row = peer.core.row(task)
        if row is not None and row.spec.name in self._cancel_at_start:
            self._cancel_at_start.remove(row.spec.name)
            self._world.call_later(self._rng.uniform(0.0, 0.03), self._cancel, task)

    def _cancel(self, task: TaskId) -> None:
        knowing = [peer for peer in self._mesh.running() if peer.awake and peer.core.row(task) is not None]
        if knowing:
            peer = self._rng.choice(knowing)
            row = peer.core.row(task)
            if row is not None and not read(row).status.final:
                self._mesh.watcher.note(peer.name, "is told to cancel", task)
                self._mesh.happened["cancelled"] += 1
                peer.cancel(task)

    # ---- everything else

    def _at_work(self) -> list[MeshPeer]:
        return [peer for peer in self._mesh.running() if peer.awake and peer.doors_open]

    def _act(self, action: Action) -> None:
        """At once, or as soon as there is a machine to do it at."""
        able = self._at_work()
        if not able:
            self._world.call_later(POSTPONE, self._act, action)
            return
        peer = self._rng.choice(able)
        try:
            self._act_at(peer, action)
        except MeshqError as error:  # refused with a reason, as by a peer that has seen the task start meanwhile
            self._mesh.happened[f"{action.kind} refused"] += 1
            self._mesh.watcher.note(peer.name, f"refuses: {error}")
        else:
            self._mesh.happened[action.kind] += 1

    def _act_at(self, peer: MeshPeer, action: Action) -> None:
        queue = QUEUES[action.number % len(QUEUES)]
        match action.kind:
            case ActionKind.MOVE | ActionKind.MOVE_TO:
                self._move(peer, action)
            case ActionKind.PAUSE:
                self._paused[queue] = self._paused.get(queue, 0) + 1
                self._world.call_later(action.seconds, self._resume, queue)
                self._set(peer, paused(queue), f"user@{peer.name}")
            case ActionKind.CLEAR:
                cleared, effects = peer.core.clear(peer.now, queue, f"user@{peer.name}", CLEARED_MAX)
                self._mesh.happened["tasks cleared"] += cleared
                peer.feed(effects)
            case ActionKind.KEEP:
                self._set(peer, "retention/tasks", str(action.number))
            case _:
                assert_never(action.kind)

    def _set(self, peer: MeshPeer, name: str, value: str) -> None:
        self._mesh.watcher.note(peer.name, f"is told to set {name} to {value!r}")
        peer.feed(peer.core.change_settings(peer.now, {name: value}))

    def _resume(self, queue: str) -> None:
        """Whoever paused it last, with whatever machine there is; a pause without its end would keep tasks for ever."""
        able = self._at_work()
        if not able:
            self._world.call_later(POSTPONE, self._resume, queue)
            return
        self._paused[queue] -= 1
        if not self._paused[queue]:
            self._set(self._rng.choice(able), paused(queue), DELETED)

    def resume_all(self) -> None:
        """From the calm on somebody resumes what is paused: a pause may have met a resume that knew nothing of it, and won."""
        able = [peer for peer in self._mesh.well() if peer.awake and peer.doors_open and not peer.draining]
        for queue in QUEUES:
            if able and able[0].core.settings.value(paused(queue)):
                self._mesh.happened["resumed in the end"] += 1
                self._set(able[0], paused(queue), DELETED)
        self._world.call_later(RESUME_EVERY, self.resume_all)

    def _move(self, peer: MeshPeer, action: Action) -> None:
        waiting = [task for queue in QUEUES for task in peer.core.waiting_in(queue)]
        if not waiting:
            self._mesh.happened["nothing to move"] += 1
            return
        task = waiting[action.number % len(waiting)]
        place = self._place(peer, task, action, waiting)
        self._mesh.watcher.note(peer.name, f"is told to move it: {place}", task)
        peer.feed(peer.core.move(peer.now, task, place))

    def _place(self, peer: MeshPeer, task: TaskId, action: Action, waiting: list[TaskId]) -> Place:
        row = peer.core.row(task)
        assert row is not None
        if action.kind is ActionKind.MOVE_TO:
            return To("gpu" if row.queue.value == "default" else "default")
        other = waiting[(action.number // 7) % len(waiting)]
        return self._rng.choice((First(), Last(), Up(), Down(), Before(other)))
