"""Whom to probe next, and the probes that are under way: mine, and those that I make for others.

The order is a shuffled round-robin with new members inserted at random places, so that the time until a dead member is probed
is bounded and not only expected (SWIM section 4.3). One probe of mine runs at a time.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from meshq.gossip.packer import Origin
from meshq.ids import PeerId

if TYPE_CHECKING:
    from random import Random

RELAYS_MAX: Final = 256  # probes for others at a time; each lasts under a second
RTTS_KEPT: Final = 64
RTTS_NEEDED: Final = 16  # fewer say nothing about the slowest of a hundred


class ProbeOrder:
    """Shuffled round-robin over peers. Those that are no longer worth probing are skipped when their turn comes."""

    def __init__(self, rng: "Random") -> None:
        self._rng = rng
        self._order: list[PeerId] = []
        self._next = 0
        self._first: dict[PeerId, None] = {}

    def insert(self, peer: PeerId) -> None:
        """A new member, at a random place of this round or, if that has passed, of the next."""
        if peer not in self._order:
            place = self._rng.randint(0, len(self._order))
            self._order.insert(place, peer)
            if place < self._next:
                self._next += 1

    def forget(self, peer: PeerId) -> None:
        if peer in self._order:
            place = self._order.index(peer)
            del self._order[place]
            self._next -= place < self._next

    def promote(self, peer: PeerId) -> None:
        """Next, whatever the order says."""
        self._first[peer] = None

    def next(self, live: Sequence[PeerId]) -> PeerId | None:
        """The next of `live` in the order; None if nobody is live."""
        alive = dict.fromkeys(live)
        while self._first:
            peer = next(iter(self._first))
            del self._first[peer]
            if peer in alive:
                return peer
        for _ in range(2 * len(self._order) + 1):
            if self._next >= len(self._order):
                self._order = [peer for peer in self._order if peer in alive]
                self._rng.shuffle(self._order)
                self._next = 0
            if not self._order:
                return None
            peer = self._order[self._next]
            self._next += 1
            if peer in alive:
                return peer
        return None


@dataclass(slots=True)
class Probe:
    """My probe of `peer`. `asked` are the helpers, `nacks` those of them that said they tried in vain."""

    number: int
    peer: PeerId
    sent_at: float
    indirect_at: float
    fails_at: float
    asked: int = 0
    nacks: int = 0
    indirect: bool = False
    acked: bool = False
    acked_by_udp: bool = False  # by the peer itself
    acked_by_tcp: bool = False
    judged: bool = False  # what it says about UDP is noted

    @property
    def deadline(self) -> float:
        return self.fails_at if self.indirect else self.indirect_at


@dataclass(frozen=True, slots=True)
class Relay:
    """A ping that I sent for somebody else, who knows it by `number`."""

    asker: Origin
    number: int
    nack_at: float


@dataclass(slots=True)
class RoundTrips:
    """The last round trips of direct probes, over all members."""

    _kept: deque[float] = field(default_factory=lambda: deque(maxlen=RTTS_KEPT))

    def add(self, seconds: float) -> None:
        self._kept.append(seconds)

    def ack_timeout(self, shortest: float, longest: float) -> float:
        """Three times the 99th percentile, within the limits; the longest while too little is known."""
        if len(self._kept) < RTTS_NEEDED:
            return longest
        slow = sorted(self._kept)[int(0.99 * len(self._kept))]
        return min(longest, max(shortest, 3 * slow))


class Relays:
    """Probes that I make for others, by my own number. Bounded; they end by an ack or by a nack in time."""

    def __init__(self) -> None:
        self._relays: dict[int, Relay] = {}

    def add(self, number: int, relay: Relay) -> bool:
        """False, and nothing is kept, if there are too many."""
        if len(self._relays) >= RELAYS_MAX:
            return False
        self._relays[number] = relay
        return True

    def acked(self, number: int) -> Relay | None:
        return self._relays.pop(number, None)

    def expired(self, now: float) -> list[Relay]:
        """Those to be nacked now; they are over."""
        due = [number for number, relay in self._relays.items() if relay.nack_at <= now]
        return [self._relays.pop(number) for number in due]

    def deadline(self) -> float:
        return min((relay.nack_at for relay in self._relays.values()), default=float("inf"))
