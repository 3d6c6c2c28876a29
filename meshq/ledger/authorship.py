"""Whether this peer may go on writing as the actor that its database names.

Problem. A disk that is set back as a whole (a snapshot, a backup, a clone, a log whose end was lost) shows no sign of it: the
next write would take an (actor, seq) that the other peers know as another write, and replicas would never be equal again.

Invariant. An (actor, seq) never names two different writes.

Algorithm. Whoever has seen a write of mine that I don't know proves that the disk is an older one; then a new actor is taken
(`Replica.detect_lost_database`). So the first syncs after a start are also the question. Writes go to all live peers at once,
and whoever was away catches up within seconds; so the few that are asked when they come alive know what any of them knows.
Until those that are alive have answered, the actor is not trusted: a write before that takes a new one, which costs an entry in
every vector, for ever, and must be no habit. So claims, starts and ends wait for the answers; a submit does not.

Limits. A peer that was away all these times, and alone knows of a later write, is not heard. Against that stands what
`store.py` sees by itself: a copied file has another inode. A peer that knows nobody asks nobody.
"""

from math import inf
from typing import Final

from meshq.ids import PeerId
from meshq.ledger.replica import Replica
from meshq.ledger.sessions import Sessions

PATIENCE: Final = 2.0  # seconds: who has not answered by then, while others have, holds up nothing


class Authorship:
    """Mutable. Once confirmed, it stays so until the process ends: nobody else writes to its disk."""

    def __init__(self, me: PeerId, replica: Replica, sessions: Sessions) -> None:
        self._me = me
        self._replica = replica
        self._sessions = sessions
        self._last_sync: float | None = None  # when one began that is complete, and that does not count yet
        self._writes_in = replica.ledger_epoch
        self._open: dict[PeerId, float] = {}  # who was asked, and until when the answer is awaited
        self._answers = 0
        self._confirmed = False

    def asked(self, now: float, peer: PeerId) -> None:
        self._open[peer] = now + PATIENCE

    def answered(self, peer: PeerId) -> None:
        """The peer has said whether it knows more of me than I do, and I have drawn the consequence."""
        self._open.pop(peer, None)
        self._answers += 1

    def failed(self, peer: PeerId) -> None:
        """The peer does not answer."""
        self._open.pop(peer, None)

    def synced(self, began_at: float) -> None:
        """A sync is complete. It counts for the session of this peer once the author is settled."""
        self._last_sync = began_at

    def deadline(self) -> float:
        """When somebody is waited for no longer."""
        return inf if self._confirmed or not self._answers else max(self._open.values(), default=inf)

    def weigh(self, now: float) -> None:
        """May this peer go on as who it was before this start?"""
        views, alive = self._sessions.views, self._sessions.alive
        if not self._confirmed:
            awaited = any(self._open.get(peer, now) > now for peer in alive)
            self._confirmed = self._answers > 0 and not awaited
        others = any(peer != self._me and not view.left for peer, view in views.items())
        self._replica.trusted = self._confirmed or not others
        if self._confirmed and self._last_sync is not None:
            self._sessions.synced(self._last_sync)
            self._last_sync = None

    def changed(self) -> bool:
        """Whether another actor writes since the last call. Nobody can know anything of it: it needs no answers."""
        before, self._writes_in = self._writes_in, self._replica.ledger_epoch
        self._confirmed = self._confirmed or before != self._writes_in
        return before != self._writes_in
