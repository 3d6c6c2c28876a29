"""What must come about once the faults have ended, and within which time (the rules L1 to L6 of `invariants.py`).

All rules are about the peers that are well. In a liveness run others stay ill for ever, and whatever these do or believe, the
well ones must agree, run everything, and hold lost what those have that are gone.
"""

from math import log2
from typing import TYPE_CHECKING, Final

from meshq.gossip.member import Liveness as Held
from meshq.gossip.member import Member
from meshq.ids import ActorId, PeerId
from tests.simulator.mesh_peer import MeshPeer

if TYPE_CHECKING:
    from tests.simulator.simulation import Simulation

LONGEST_SUSPICION: Final = {"lan": 24.0, "fast": 2.25}
PUSH_PULL: Final = {"lan": 30.0, "fast": 10.0}
DETECTION_MAX: Final = {
    "lan": 9.0 + 24.0,
    "fast": 2.0 + 2.25,
}  # until its turn comes (SWIM section 4.3), and the longest suspicion
DUPLICATES_LIMIT: Final = 5.0 + 5.0 + 10.0  # L5: 5 s, a round of anti-entropy, and a task that ignores SIGTERM
ROUNDS: Final = 3
CHECK_EQUAL_EVERY: Final = 5.0


class Liveness:
    """Looked at every second. Everything before the calm is forgiven."""

    def __init__(self, mesh: "Simulation") -> None:
        self._mesh = mesh
        self._calm_at: float | None = None
        self._agreed_at: float | None = None
        self._known: dict[ActorId, int] = {}  # all writes that somebody well knew when the memberships agreed
        self._equal_at = 0.0

    def calm(self) -> None:
        """The faults have ended."""
        self._calm_at = self._mesh.world.now

    def agree(self) -> bool:
        """Does each peer that is well hold all of them alive, as what they are, and nobody alive who is gone?"""
        well = self._mesh.well()
        if any(peer.gossip.swim is None for peer in well):  # it begins in this very moment
            return False
        expected = {peer.id: peer.gossip.core.me for peer in well}
        gone = {peer.id for peer in self._mesh.peers.values() if peer.gone}
        return all(_agrees(peer, expected, gone) for peer in well)

    def look(self) -> None:
        """What can be judged now."""
        mesh, now = self._mesh, self._mesh.world.now
        if now - self._equal_at >= CHECK_EQUAL_EVERY:
            self._equal_at = now
            mesh.watcher.check_equal({peer.name: peer.machine.disk for peer in mesh.peers.values()})
        if self._calm_at is None:
            return
        calm_for, profile = now - self._calm_at, mesh.plan.profile
        if self._agreed_at is None and not mesh.absent() and self.agree():
            self._agreed_at = now
            for peer in mesh.well():
                for actor, seq in peer.core.vector.items():
                    self._known[actor] = max(seq, self._known.get(actor, 0))
        if self._agreed_at is None:
            if calm_for > LONGEST_SUSPICION[profile] * self._patience + 3 * PUSH_PULL[profile]:
                mesh.watcher.fail(f"L1: the memberships differ {calm_for:g} s after the faults: {self._why_disagreed()}")
            return
        self._look_at_ledgers(now - self._agreed_at)

    @property
    def _patience(self) -> float:
        """Ill machines keep probing the others as slowly as they can, and being suspected by them."""
        return 2.0 if self._mesh.plan.ill else 1.0

    def _look_at_ledgers(self, agreed_for: float) -> None:
        mesh = self._mesh
        well = mesh.well()
        rounds = ROUNDS * max(1.0, log2(len(mesh.peers)))
        if agreed_for > rounds * mesh.timing.sync_idle:
            for peer in well:
                vector = peer.core.vector
                late = [actor for actor, seq in self._known.items() if vector.get(actor, 0) < seq]
                if late:
                    mesh.watcher.fail(f"L2: {peer.name} lacks writes of {late} for {agreed_for:g} s")
        if agreed_for > DUPLICATES_LIMIT * self._patience:
            names = [peer.name for peer in mesh.peers.values() if not peer.ill]
            mesh.watcher.check_no_duplicates(names)
        grace = mesh.timing.grace + 3.0 + len(mesh.peers) * mesh.timing.lost_slot
        if agreed_for > (DETECTION_MAX[mesh.plan.profile] + grace) * self._patience:
            self._look_for_the_dead(well)

    def _look_for_the_dead(self, well: list[MeshPeer]) -> None:
        """L4: no live claim of a machine that is gone for good."""
        died = self._mesh.watcher.died
        if not died:
            return
        for row in well[0].core.tasks():
            for claim in self._mesh.watcher.read(row).live.values():
                if claim.peer in died and row.spec.lease is None and row.task not in self._mesh.watcher.forged:
                    name = self._mesh.peers[claim.peer].name
                    self._mesh.watcher.fail(f"L4: {name} is gone and still has a live claim", row.task)

    def _why_disagreed(self) -> str:
        well = self._mesh.well()
        expected = {peer.id: peer.gossip.core.me for peer in well}
        gone = {peer.id for peer in self._mesh.peers.values() if peer.gone}
        odd = [peer for peer in well if not _agrees(peer, expected, gone)]
        return "; ".join(f"{peer.name} does not agree" for peer in odd)


def _agrees(peer: MeshPeer, expected: dict[PeerId, Member], gone: set[PeerId]) -> bool:
    held = {member.peer: member for member in peer.gossip.core.members() if member.liveness <= Held.SUSPECT}
    return all(held.get(each) == member for each, member in expected.items()) and not any(each in held for each in gone)
