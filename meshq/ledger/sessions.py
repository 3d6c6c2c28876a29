"""Whose lease is over, and whether this peer may say so.

A peer holds one session for all its claims, carried by the failure detector: running tasks renew nothing. The session is over
when the peer left, when it has been dead for the grace, or when its ledger epoch changed (its disk was lost, nobody knows what
it ran). A restart of the agent does not end it. Grace is counted on the observer's own clock, from when it saw the peer die.

Two conditions keep an observer from mourning the living. One that sees fewer than half of the members that were alive within
the last ten minutes is probably itself cut off. And one that has stalled (was suspended, stopped, starved) knows nothing of
the present until another peer has answered a question asked after the stall.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf

from meshq.ids import PeerId
from meshq.ledger.effects import PeerView
from meshq.ledger.timing import LedgerConfig
from meshq.task import Telemetry


@dataclass(frozen=True, slots=True)
class LeaseEnd:
    """From when the lease of a claim is over, and why, for people."""

    at: float
    reason: str


class Sessions:
    def __init__(self, me: PeerId, config: LedgerConfig, now: float) -> None:
        self._me = me
        self._config = config
        self._views: Mapping[PeerId, PeerView] = {}
        self._alive: tuple[PeerId, ...] = ()
        self._noticed: dict[tuple[PeerId, int], float] = {}
        self._stalled_at: float | None = now
        self._slept_at = -inf
        self._began_at = now

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
        self._views = dict(sorted(views.items()))
        self._alive = tuple(peer for peer, view in self._views.items() if view.alive and peer != self._me)
        epochs = [(peer, view.telemetry.ledger_epoch) for peer, view in self._views.items()]
        self._noticed = {epoch: self._noticed.get(epoch, now) for epoch in epochs}
        came = tuple(peer for peer in self._alive if peer not in before)
        return came, tuple(peer for peer in before if peer not in self._alive)

    def told(self, telemetry: Telemetry) -> None:
        """This peer's own telemetry changed; gossip will say so too, later."""
        if self._me in self._views:
            self._views = {**self._views, self._me: replace(self._views[self._me], telemetry=telemetry)}

    # ---- stalls

    def stalled(self, now: float, seconds: float) -> bool:
        """Note that this process did nothing for so long; whether it must now re-validate."""
        if seconds > self._config.grace:
            self._slept_at = now
        if seconds > min(self._config.grace, self._config.stall_max):
            self._stalled_at = now
        return self.blocked(now)

    def heard(self, asked_at: float) -> None:
        """A live peer answered what was asked at that time."""
        if self._stalled_at is not None and asked_at >= self._stalled_at:
            self._stalled_at = None

    def blocked_until(self, now: float) -> float:
        """Until when this peer must not claim, start or mourn: not after `now` if it may.

        A stall must be answered by another peer; with nobody alive there is nobody to ask. A start is a stall of unknown
        length: an agent that knows of others and has not met them yet waits for them as long as the grace. Peers that gossip
        holds alive and that answer nothing (a firewall passes UDP only) don't block it for ever.
        """
        if self._stalled_at is None:
            return now
        if self._alive:
            return self._stalled_at + self._config.validation_max
        others = any(peer != self._me and not view.left for peer, view in self._views.items())
        return self._began_at + self._config.grace if others else now

    def blocked(self, now: float) -> bool:
        return self.blocked_until(now) > now

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
