"""Whose lease is over, and whether this peer may say so.

A peer holds one session for all its claims, carried by the failure detector: running tasks renew nothing. The session is over
when the peer left, when it has been dead for the grace, or when its ledger epoch changed (its disk was lost, nobody knows what
it ran). A restart of the agent does not end it. Grace is counted on the observer's own clock, from when it saw the peer die.

Two conditions keep an observer from mourning the living. One that sees fewer than half of the members that were alive within
the last ten minutes is probably itself cut off. And one that has stalled (was suspended, stopped, starved) knows nothing of
the present until another peer has answered a question asked after the stall.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf

from meshq.ids import ACTOR_PEER_CHARS, ActorId, PeerId, actor_id, actor_ledger_epoch, actor_peer_prefix
from meshq.ledger.effects import PeerView
from meshq.ledger.timing import LedgerConfig
from meshq.task import Telemetry


@dataclass(frozen=True, slots=True)
class LeaseEnd:
    """From when the lease of a claim is over, and why, for people."""

    at: float
    reason: str


def majority(voters: int) -> int:
    """How many of so many voters no two of which can stand against each other."""
    return voters // 2 + 1


def judged(views: Mapping[PeerId, PeerView]) -> Mapping[PeerId, PeerView]:
    """The same, but that a peer flaps is held against it only as long as most of the live don't.

    Damping keeps tasks from the odd one out. When a switch fails again and again everybody flaps; with all of them damped, for
    an hour at worst, no queue would move, though nothing is wrong any more (P5).
    """
    alive = [view for view in views.values() if view.alive]
    if 2 * sum(view.telemetry.damped for view in alive) <= len(alive):
        return views
    return {peer: _excused(view) if view.telemetry.damped else view for peer, view in views.items()}


def _excused(view: PeerView) -> PeerView:
    return replace(view, telemetry=replace(view.telemetry, problem="", damped=False))


class Sessions:
    def __init__(self, me: PeerId, config: LedgerConfig, now: float) -> None:
        self._me = me
        self._config = config
        self._told: Mapping[PeerId, PeerView] = {}  # as gossip has them
        self._views: Mapping[PeerId, PeerView] = {}  # `judged`
        self._alive: tuple[PeerId, ...] = ()
        self._by_prefix: Mapping[str, PeerId] = {}
        self._noticed: dict[tuple[PeerId, int], float] = {}
        self._stalled_at: float | None = now
        self._joined = False  # a first sync with a live peer is complete
        self._joining_since: float | None = None  # when the first live peer was met
        self._progress_at = now  # of the first sync
        self._slept_at = -inf
        self._began_at = now
        self._met: set[PeerId] = {me}  # whoever was alive at some time since the start
        self._unmet = False

    @property
    def views(self) -> Mapping[PeerId, PeerView]:
        return self._views

    @property
    def alive(self) -> tuple[PeerId, ...]:
        """All live peers but this one, in order."""
        return self._alive

    def replace(self, now: float, views: Mapping[PeerId, PeerView]) -> tuple[tuple[PeerId, ...], tuple[PeerId, ...]]:
        """Take over all beliefs; the peers that have become alive, and those that are alive no more."""
        before = self._alive
        self._told = dict(sorted(views.items()))
        self._views = judged(self._told)
        self._alive = tuple(peer for peer, view in self._views.items() if view.alive and peer != self._me)
        self._met.update(self._alive)
        self._unmet = any(not view.left and peer not in self._met for peer, view in self._views.items())
        self._by_prefix = {peer[:ACTOR_PEER_CHARS]: peer for peer in self._views}
        epochs = [(peer, view.telemetry.ledger_epoch) for peer, view in self._views.items()]
        self._noticed = {epoch: self._noticed.get(epoch, now) for epoch in epochs}
        if self._alive and self._joining_since is None:
            self._joining_since = self._progress_at = now
        came = tuple(peer for peer in self._alive if peer not in before)
        return came, tuple(peer for peer in before if peer not in self._alive)

    def told(self, telemetry: Telemetry) -> None:
        """This peer's own telemetry changed; gossip will say so too, later."""
        if self._me in self._told:
            self._told = {**self._told, self._me: replace(self._told[self._me], telemetry=telemetry)}
            self._views = judged(self._told)

    # ---- stalls

    def stalled(self, now: float, seconds: float) -> bool:
        """Note that this process did nothing for so long; whether it must now re-validate."""
        if seconds > self._config.grace:
            self._slept_at = now
        if seconds > min(self._config.grace, self._config.stall_max):
            self._stalled_at = now
        return self.blocked(now)

    def heard(self, asked_at: float) -> None:
        """A live peer answered what was asked at that time. Before the first sync that proves nothing."""
        if self._joined and self._stalled_at is not None and asked_at >= self._stalled_at:
            self._stalled_at = None

    def progressed(self, now: float) -> None:
        """A sync has brought rows."""
        self._progress_at = now

    def synced(self, began_at: float) -> None:
        """A sync that began at that time is complete: this peer knows what the other one knew then."""
        self._joined = True
        self.heard(began_at)

    def blocked_until(self, now: float) -> float:
        """Until when this peer must not claim, start or mourn: not after `now` if it may.

        A stall must be answered by another peer; with nobody alive there is nobody to ask. A start is a stall of unknown
        length, and is over when a first sync is complete, however long that takes while rows come (`join_max`): who has not
        heard of the ends would run again what has run. An agent that knows of others and has not met them yet waits for them as
        long as the grace. Peers that gossip
        holds alive and that answer nothing (a firewall passes UDP only) don't block it for ever.
        """
        if self._stalled_at is None:
            return now
        if self._alive and self._joining_since is not None and not self._joined:
            patience = max(self._stalled_at, self._progress_at) + self._config.validation_max
            return min(patience, max(self._stalled_at, self._joining_since) + self._config.join_max)
        if self._alive:
            return self._stalled_at + self._config.validation_max
        others = any(peer != self._me and not view.left for peer, view in self._views.items())
        return self._began_at + self._config.grace if others else now

    def blocked(self, now: float) -> bool:
        return self.blocked_until(now) > now

    def all_met_at(self) -> float:
        """From when this peer may take all that it knew for met: -inf if it has met them, and left ones don't count.

        When a whole lab is restarted, those who come back first may know nothing of a claim whose peer, and everybody who had
        heard of it, is still on the way. Their leases last: so nothing is started before they are there, or the grace is over.
        """
        return self._began_at + self._config.grace if self._unmet else -inf

    def slept_since(self, moment: float) -> bool:
        """Whether this peer stalled for longer than the grace after that moment."""
        return self._slept_at > moment

    # ---- leases

    def minority_until(self, now: float) -> float | None:
        """None if this peer may speak for the mesh; else when the next absent member stops being counted."""
        absent = [
            view.changed_at
            for peer, view in self._views.items()
            if peer != self._me and not view.alive and not view.left and view.changed_at + self._config.quorum_window > now
        ]
        alive = len(self._alive) + 1
        return min(absent) + self._config.quorum_window if alive < len(absent) else None

    def lease_end(self, peer: PeerId, spoke_in: int, lease: float | None) -> LeaseEnd | None:
        """When the lease of a claim of this peer ends or ended; None while the peer holds it.

        `spoke_in`: the latest ledger epoch in which the peer wrote of that claim.
        """
        grace = self._config.grace if lease is None else lease
        view = self._views.get(peer)
        if view is None:  # forgotten by the membership, or never known to this run of the agent
            return LeaseEnd(self._began_at + grace, "its peer is unknown")
        if view.left:
            return LeaseEnd(view.changed_at, f"{view.name} left the mesh")
        epoch = view.telemetry.ledger_epoch
        if epoch > spoke_in:
            return LeaseEnd(self._noticed[peer, epoch], f"{view.name} lost its ledger")
        if view.alive:
            return None
        return LeaseEnd(view.changed_at + grace, f"{view.name} was not seen for {grace:g} s")

    # ---- voters (`grants.py`)

    def electable(self) -> dict[PeerId, ActorId]:
        """The other peers that can be drawn as voters now, each with the actor as which it would vote."""
        told = {peer: self._views[peer].telemetry.ledger_epoch for peer in self._alive}
        return {peer: actor_id(peer, ledger_epoch) for peer, ledger_epoch in told.items() if ledger_epoch > 0}

    def voter(self, voter: ActorId) -> PeerId | None:
        """The peer, this one included, that may still be reached; None if it is unknown or has left."""
        prefix = actor_peer_prefix(voter)
        peer = self._me if prefix == self._me[:ACTOR_PEER_CHARS] else self._by_prefix.get(prefix)
        return peer if peer is None or peer == self._me or not self._views[peer].left else None

    def can_vote(self, voter: ActorId) -> bool:
        """Whether this voter is alive and, as far as it has said, has the database that it had."""
        peer = self.voter(voter)
        view = self._views.get(peer) if peer is not None else None
        if peer is None or view is None or not (view.alive or peer == self._me):
            return False
        return view.telemetry.ledger_epoch in (0, actor_ledger_epoch(voter))

    def has_majority(self, voters: Sequence[ActorId]) -> bool:
        """Whether so many of the voters can vote that a claim may succeed; always if there are none."""
        return not voters or sum(map(self.can_vote, voters)) >= majority(len(voters))

    def gone(self, voters: Sequence[ActorId]) -> dict[str, str]:
        """By name, those that will never vote again as far as this peer knows, each with why."""
        found = {}
        for voter in voters:
            peer = self.voter(voter)
            if peer is None:
                found[self.name(voter)] = "has left"
            elif peer in self._views and self._views[peer].telemetry.ledger_epoch > actor_ledger_epoch(voter):
                found[self.name(voter)] = "has lost its ledger"
        return found

    def absent(self, voters: Sequence[ActorId]) -> str:
        """The names of those that cannot vote now."""
        return ", ".join(self.name(voter) for voter in voters if not self.can_vote(voter))

    def name(self, voter: ActorId) -> str:
        """Its peer's, or the head of its id if there is no such peer any more."""
        peer = self._by_prefix.get(actor_peer_prefix(voter))
        return voter[:8] if peer is None else self._views[peer].name
