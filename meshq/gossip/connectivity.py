"""By which ways other peers are reached: what probes and requests have shown about UDP and TCP to each of them.

A firewall that lets TCP through and UDP not is common, and without this a peer behind one would be suspected and refuted in
turns for ever (hashicorp/memberlist#37). Every probe that a peer answers over TCP while its UDP ack is missing counts; after a
few in a row the peer is served by TCP. Probes still try UDP each time, and the first ack that comes that way ends it.

A peer that is behind such a firewall itself cannot wait until it has probed everybody so often: if the last probes all went
that way, whoever they were of, it takes UDP to be blocked for all of whom it knows nothing better.
"""

import math
from dataclasses import dataclass
from typing import Final

from meshq.gossip.member import Address
from meshq.ids import PeerId

MISSES_MAX: Final = 5  # in a row; with 30 % of all packets lost one probe in four misses, and so five in a row 1 of 800 times
RTT_GAIN: Final = 0.125  # of a new measurement in the smoothed round trip (RFC 6298)
SILENT_SECONDS: Final = 30.0  # three refreshes of telemetry, each of which goes straight to everybody


@dataclass(frozen=True, slots=True, kw_only=True)
class Connectivity:
    """How one peer is reached, for people. `udp`, `tcp`: did what I sent last get there and back (None: not known)?

    `address`: where its packets are sent now. `rtt`, in seconds, smoothed: of probes by UDP, else by TCP. `heard_seconds`:
    since anything of it came here.
    """

    udp: bool | None
    tcp: bool | None
    address: Address | None
    rtt: float | None
    heard_seconds: float | None

    @property
    def silent(self) -> bool:
        """Has nothing of the peer come here for so long that what worked before may not work any more?"""
        return self.heard_seconds is not None and self.heard_seconds > SILENT_SECONDS


@dataclass(slots=True)
class Path:
    """What is known of the ways to one peer in its present run."""

    udp: bool | None = None
    tcp: bool | None = None
    missed: int = 0  # probes in a row that were answered over TCP alone
    rtt: float | None = None
    heard_at: float | None = None
    helper: PeerId | None = None  # who reached it for me last


class Connections:
    """One path for each peer that was heard of by its packets or probes; `forget` keeps it no larger than the roster."""

    def __init__(self) -> None:
        self._paths: dict[PeerId, Path] = {}
        self._missed = 0  # probes in a row, of anybody, that were answered over TCP alone

    def get(self, peer: PeerId) -> Path:
        """The path to a peer; an empty one if nothing is known."""
        return self._paths.get(peer) or Path()

    def heard_at(self, peer: PeerId) -> float:
        """When anything came from the peer last; never, if nothing did."""
        at = self.get(peer).heard_at
        return -math.inf if at is None else at

    def peers(self) -> tuple[PeerId, ...]:
        return tuple(self._paths)

    def heard(self, now: float, peer: PeerId) -> None:
        """Any packet of the peer, by whichever way."""
        self._path(peer).heard_at = now

    def acked(self, peer: PeerId, seconds: float | None) -> bool:
        """A direct ack by UDP, after so long if that is known; true if the peer was served by TCP until now."""
        path = self._path(peer)
        changed = path.udp is False
        if seconds is not None:
            known = path.rtt if path.udp is True else None
            path.rtt = seconds if known is None else known + RTT_GAIN * (seconds - known)
        path.udp, path.missed, self._missed = True, 0, 0
        return changed

    def asked_by_tcp(self, peer: PeerId, answered: bool) -> None:
        """A request of mine over TCP was answered, or could not be sent or got no answer."""
        self._path(peer).tcp = answered

    def acked_by_tcp(self, peer: PeerId, seconds: float) -> None:
        path = self._path(peer)
        path.tcp = True
        if path.udp is not True:
            path.rtt = seconds

    def missed(self, peer: PeerId) -> bool:
        """A probe ended that was answered over TCP, but not by UDP; true if the peer is served by TCP from now on."""
        path = self._path(peer)
        path.missed += 1
        self._missed += 1
        if path.udp is False or (path.missed < MISSES_MAX and not self._blocked(path)):
            return False
        path.udp = False
        return True

    def streamed(self, peer: PeerId) -> bool:
        """The peer serves me by TCP, so UDP did not work for it, and will hardly work for me; true if that is news."""
        path = self._path(peer)
        if path.udp is not None:
            return False
        path.udp = False
        return True

    def by_tcp(self, peer: PeerId) -> bool:
        """Is UDP no use for this peer, as far as is known?"""
        path = self._paths.get(peer)
        if path is None:
            return self._missed >= MISSES_MAX
        return path.udp is False or self._blocked(path)

    def renew(self, peer: PeerId) -> None:
        """A new run of the peer may be reached in other ways; when it was heard last is still true."""
        if (path := self._paths.get(peer)) is not None:
            self._paths[peer] = Path(heard_at=path.heard_at)

    def helped(self, peer: PeerId, helper: PeerId) -> None:
        """The helper got an ack from the peer, a member."""
        self._path(peer).helper = helper

    def forget(self, peer: PeerId) -> None:
        self._paths.pop(peer, None)

    def _blocked(self, path: Path) -> bool:
        return path.udp is None and self._missed >= MISSES_MAX

    def _path(self, peer: PeerId) -> Path:
        return self._paths.setdefault(peer, Path())
