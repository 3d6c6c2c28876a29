"""Peers from the snapshot of an earlier run that did not show up yet.

They are no members: nothing is believed about them. They are only places to try, so that a mesh in which every machine was
switched off comes together again (a snapshot of the living alone leaves such agents isolated: hashicorp/serf#333).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from meshq.config import MEMBERS_MAX
from meshq.gossip.member import Address
from meshq.gossip.roster import KnownPeer
from meshq.ids import PeerId


@dataclass(slots=True)
class _Entry:
    known: KnownPeer
    since: float  # when it was handed over; its `unseen_for` counts from then
    tries: int = 0


class Remembered:
    """At most MEMBERS_MAX peers, each until it is unseen for `kept` seconds."""

    def __init__(self, kept: float) -> None:
        self._kept = kept
        self._entries: dict[PeerId, _Entry] = {}

    def add(self, now: float, known: KnownPeer) -> bool:
        """False, and nothing is kept, for one without an address, that is too old, or too many."""
        if not known.addresses or known.unseen_for >= self._kept or len(self._entries) >= MEMBERS_MAX:
            return False
        self._entries[known.peer] = _Entry(known, now)
        return True

    def peers(self) -> Sequence[PeerId]:
        return tuple(self._entries)

    def next_address(self, peer: PeerId) -> Address:
        """One of its addresses after the other."""
        entry = self._entries[peer]
        entry.tries += 1
        return entry.known.addresses[(entry.tries - 1) % len(entry.known.addresses)]

    def discard(self, peer: PeerId) -> None:
        """It showed up."""
        self._entries.pop(peer, None)

    def forget_expired(self, now: float) -> None:
        for peer in [peer for peer, entry in self._entries.items() if self._unseen_for(now, entry) >= self._kept]:
            del self._entries[peer]

    def known(self, now: float) -> tuple[KnownPeer, ...]:
        """For the next snapshot."""
        return tuple(replace(entry.known, unseen_for=self._unseen_for(now, entry)) for entry in self._entries.values())

    def _unseen_for(self, now: float, entry: _Entry) -> float:
        return entry.known.unseen_for + max(0.0, now - entry.since)
