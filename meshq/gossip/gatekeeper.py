"""What one source may cost: who sends rubbish is soon not even opened, and who sends too much is not listened to for the rest.

Problem. To open a packet costs ten times as much as to drop it, and to handle it five times as much again. A stranger on the
network may send what it likes, and so may a member with a fault. Neither may keep this peer from its work, or silence others.

Rules. A stranger has a ration of packets that don't open, by host, so that changing the port does not help. Who has sent a good
packet is known by host and port, and always heard: a stranger on the same machine cannot silence it. What opens counts by host
and port again, and by host; an honest peer sends a twentieth of that limit at most (`throttle`). Beyond a higher limit a known
source is not even opened: its address can be forged, so that limit is where forging begins to silence it, but whoever can send
that much can as well fill the socket.

Limits. Everything is kept for the sources heard last, so many and no more. Hosts count by their whole IPv6 address, not by
prefix: a lab may well share one.
"""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Final

from meshq.config import UNAUTHENTICATED_PER_SECOND, UNAUTHENTICATED_SOURCES_MAX
from meshq.gossip.allowance import Allowance

SOURCES_MAX: Final = UNAUTHENTICATED_SOURCES_MAX
GOOD_PER_SECOND: Final = 1_000.0  # packets from one port; 20 times what a peer sends to one address (`throttle`)
GOOD_PER_SECOND_AND_HOST: Final = 4_000.0  # a machine with several users has several agents
ANY_PER_SECOND: Final = 5_000.0  # packets from one known port, good or not: they cost 10 us each to find out
BURST_SECONDS: Final = 2.0  # what a second's stall of ours leaves in the socket is no flood

Source = tuple[str, int]


class Rations:
    """An allowance for each of the keys that were seen last."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._kept: OrderedDict[Hashable, Allowance] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def left(self, now: float, key: Hashable) -> bool:
        """Is there anything left? Takes and keeps nothing."""
        allowance = self._kept.get(key)
        return allowance is None or allowance.left(now)

    def take(self, now: float, key: Hashable) -> bool:
        """One, if there is one left."""
        allowance = self._kept.get(key)
        if allowance is None:
            allowance = self._kept[key] = Allowance(self._rate, self._burst, now)
            if len(self._kept) > SOURCES_MAX:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(key)
        return allowance.take(now)


class Gatekeeper:
    """Asked before a packet is opened (`refuses`), and told what came of it."""

    def __init__(self) -> None:
        self._bad = Rations(UNAUTHENTICATED_PER_SECOND, UNAUTHENTICATED_PER_SECOND)
        self._good = Rations(GOOD_PER_SECOND, GOOD_PER_SECOND * BURST_SECONDS)
        self._good_of_host = Rations(GOOD_PER_SECOND_AND_HOST, GOOD_PER_SECOND_AND_HOST * BURST_SECONDS)
        self._any: OrderedDict[Source, Allowance] = OrderedDict()  # of known sources

    def refuses(self, now: float, source: Source) -> str | None:
        """Why a packet from there is not even opened: the name of a counter."""
        known = self._any.get(source)
        if known is not None:
            return None if known.take(now) else "flooded"
        return None if self._bad.left(now, source[0]) else "throttled"

    def failed(self, now: float, source: Source) -> None:
        """A packet from there did not open."""
        self._bad.take(now, source[0])

    def proved(self, now: float, source: Source) -> bool:
        """A packet from there was good; may it be handled, too?"""
        if source not in self._any:
            self._any[source] = Allowance(ANY_PER_SECOND, ANY_PER_SECOND * BURST_SECONDS, now)
            if len(self._any) > SOURCES_MAX:
                self._any.popitem(last=False)
        self._any.move_to_end(source)
        return self._good.take(now, source) and self._good_of_host.take(now, source[0])
