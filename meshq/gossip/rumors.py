"""What this peer still has to tell: one rumor a subject, each told a limited number of times.

A newer belief about a member replaces the older one, which nobody needs any more, and nothing is told of a member that was
forgotten. So there are never more rumors than members, and nothing has to be pruned (elsewhere a queue that was pruned by a
timer grew to 160,000 for 20,000 members: hashicorp/consul#9927). Those that were told least go first, among them the newest.

News does not wait for doubts. With 20 % loss a thousand peers suspect ten of each other a second, and the suspicions,
confirmations and refutations, which are told anew each time, fill every packet: a leave then took 6 s to reach the last peer.
So news (somebody came, left, died or changed) and doubts take turns in each packet, whatever waits. And news is told oftener:
who misses a doubt does not care a moment later, who misses news has to wait for a push/pull.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from meshq.gossip.wire import Coded, Rumor, coded
from meshq.ids import PeerId

PACKET_RUMORS_MAX: Final = 24  # more don't fit one packet: the smallest takes some 90 bytes
NEWS_TOLD: Final = 1.5  # times as often as doubts: with 20 % loss a leave among 100 missed somebody in 1 of 90 runs else


def retransmit_limit(multiplier: int, members: int) -> int:
    """How often each peer passes on one rumor, so that all but nobody misses it. (SWIM section 4.1)

    Told r times at random by each of N, somebody misses it with p = N e^-r: 0.003 for 9 members, 0.0001 for 999. memberlist's
    multiplier x ceil(log10(N + 1)) is a third less just below each power of ten: p = 0.03 for 99 members, 0.16 for 9.
    """
    return math.ceil(multiplier * (1 + math.log10(members + 1)))


@dataclass(slots=True)
class _Entry:
    coded: Coded[Rumor]
    sequence: int
    news: bool
    told: int = 0

    @property
    def order(self) -> tuple[int, int]:
        return (self.told, -self.sequence)


class RumorQueue:
    """At most one rumor a subject, each of which is a known member."""

    def __init__(self) -> None:
        self._entries: dict[PeerId, _Entry] = {}
        self._sequence = 0

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, rumor: Rumor, *, news: bool) -> None:
        """Tell this from now on instead of whatever was told about the same member. `news`: it is more than a doubt."""
        self._sequence += 1
        self._entries[rumor.member.peer] = _Entry(coded(rumor), self._sequence, news)

    def next(self) -> list[Coded[Rumor]]:
        """What the next packet should tell, first things first."""
        if len(self._entries) == 1:
            return [entry.coded for entry in self._entries.values()]
        news, doubts = self._first(True), self._first(False)
        shared = min(len(news), len(doubts))
        turns = [each for pair in zip(news, doubts, strict=False) for each in pair]
        return (turns + news[shared:] + doubts[shared:])[:PACKET_RUMORS_MAX]

    def _first(self, news: bool) -> list[Coded[Rumor]]:
        entries = (entry for entry in self._entries.values() if entry.news is news)
        return [entry.coded for entry in heapq.nsmallest(PACKET_RUMORS_MAX, entries, lambda each: each.order)]

    def told(self, rumors: Sequence[Rumor], limit: int) -> None:
        """These went into a packet; those that were told `limit` times are done, news after some more."""
        for rumor in rumors:
            entry = self._entries.get(rumor.member.peer)
            if entry is None or entry.coded[0] is not rumor:
                continue
            entry.told += 1
            if entry.told >= (limit * NEWS_TOLD if entry.news else limit):
                del self._entries[rumor.member.peer]

    def discard(self, peer: PeerId) -> None:
        """The member was forgotten: say no more about it."""
        self._entries.pop(peer, None)

    def subjects(self) -> tuple[PeerId, ...]:
        return tuple(self._entries)

    def check(self) -> None:
        assert all(peer == entry.coded[0].member.peer for peer, entry in self._entries.items())
