"""Submitting in the simulated world, as `meshq/web/desk.py` does it: the source first, then the task, then the answer."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from meshq.ids import ObjectId, PeerId, TaskId
from meshq.ledger.rendezvous import claimants
from meshq.task import TaskSpec
from meshq.web.submitting import ACK_SECONDS, COPIES_USUAL

if TYPE_CHECKING:
    from tests.simulator.mesh_peer import MeshPeer

LOOK_EVERY = 0.05


class Submitting:
    """One submit at one peer. It ends with an answer to the user, unless the agent dies."""

    def __init__(self, peer: "MeshPeer", spec: TaskSpec) -> None:
        self._peer = peer
        self._spec = spec
        self._having: list[PeerId] = []

    def begin(self) -> None:
        """Bring the source to some other peers, if there is one."""
        others, commit = self._peer.peers.others_alive(), self._spec.source.commit
        if commit is None:
            self._store(others)
            return
        self._peer.machine.disk.sources[commit] = None
        self._send_source(commit, claimants(TaskId(commit), 1, others)[:COPIES_USUAL])

    def _send_source(self, commit: ObjectId, targets: Sequence[PeerId]) -> None:
        left = len(targets)

        def one_done(having: Sequence[PeerId]) -> None:
            nonlocal left
            left -= 1
            self._having.extend(having)
            if not left:
                self._store(self._having)

        def send_to(target: PeerId) -> None:
            self._peer.ask(target, _take_source(commit), lambda _: one_done([target]), lambda: one_done([]))

        for target in targets:
            send_to(target)
        if not targets:
            self._store([])

    def _store(self, having: Sequence[PeerId]) -> None:
        tasks, effects = self._peer.core.submit(self._peer.now, [self._spec], hold=True)
        limit = self._peer.now + ACK_SECONDS
        self._peer.feed(effects, lambda: self._wait_for_copies(tasks[0], having, limit))

    def _wait_for_copies(self, task: TaskId, having: Sequence[PeerId], limit: float) -> None:
        peer = self._peer
        if any(other in peer.core.stored_on(task) for other in having):
            peer.mesh.users.answered(peer, task, stored_elsewhere=True)
        elif not having or peer.now >= limit:
            peer.mesh.users.answered(peer, task, stored_elsewhere=False)
        else:
            peer.later(LOOK_EVERY, self._wait_for_copies, task, having, limit)


def _take_source(commit: ObjectId) -> Callable[["MeshPeer", Callable[[object], None]], None]:
    def serve(other: "MeshPeer", answer: Callable[[object], None]) -> None:
        other.machine.disk.sources[commit] = None
        answer(None)

    return serve
