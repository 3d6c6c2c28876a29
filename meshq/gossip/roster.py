"""The beliefs of one peer about all others, where to reach them, and for how long the gone are remembered.

It keeps the invariant that a belief about a peer only grows (`member.merge`). How a belief came about, and what follows from
it, is decided in `beliefs`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from meshq.config import ADDRESSES_MAX, MEMBERS_MAX
from meshq.gossip.member import Address, Liveness, Member
from meshq.gossip.wire import short_id
from meshq.ids import PeerId

NEVER: Final = math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownPeer:
    """A peer as the snapshot keeps it. `unseen_for`: seconds since it was last held alive; 0 if it is. `record`: its last
    telemetry, so that after a restart it is known what a machine that is off could run."""

    peer: PeerId
    name: str
    addresses: tuple[Address, ...]
    unseen_for: float
    record: bytes = b""


@dataclass(slots=True)
class _Entry:
    member: Member
    gone_since: float | None = None  # when it died or left; None while it is alive or suspect
    heard: Address | None = None  # where it sends from, in this run
    tries: int = 0  # of syncs, so that each of its addresses gets its turn


class Roster:
    """All known members, me included, in the order in which they became known."""

    def __init__(self, me: Member) -> None:
        self._me = me.peer
        self._entries: dict[PeerId, _Entry] = {me.peer: _Entry(me)}
        self._by_short: dict[bytes, PeerId] = {short_id(me.peer): me.peer}
        self._live: tuple[PeerId, ...] | None = None
        self._publishing: tuple[PeerId, ...] | None = None
        self._publishing_until = NEVER

    @property
    def me(self) -> Member:
        return self._entries[self._me].member

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, peer: PeerId) -> Member | None:
        entry = self._entries.get(peer)
        return None if entry is None else entry.member

    def members(self) -> tuple[Member, ...]:
        return tuple(entry.member for entry in self._entries.values())

    def live(self) -> tuple[PeerId, ...]:
        """The others that are alive or suspect."""
        if self._live is None:
            self._live = tuple(
                peer for peer, entry in self._entries.items() if peer != self._me and entry.member.liveness <= Liveness.SUSPECT
            )
        return self._live

    def dead(self) -> tuple[PeerId, ...]:
        """Those that failed; who left did so on purpose and is not missed."""
        return tuple(peer for peer, entry in self._entries.items() if entry.member.liveness is Liveness.DEAD)

    def put(self, member: Member, gone_since: float) -> None:
        """Adopt a belief that is greater than the one held. `gone_since` counts if it says dead or left."""
        entry = self._entries.get(member.peer)
        gone = gone_since if member.liveness >= Liveness.DEAD else None
        self._live = self._publishing = None
        if entry is None:
            self._entries[member.peer] = _Entry(member, gone)
            self._by_short[short_id(member.peer)] = member.peer
            return
        assert member.precedence > entry.member.precedence
        if (member.epoch, member.boot) != (entry.member.epoch, entry.member.boot):
            entry.heard = None  # a new run may be anywhere
        if entry.heard in entry.member.addresses and entry.heard not in member.addresses:
            entry.heard = None  # it says that it is there no more
        entry.member, entry.gone_since = member, gone

    def forget(self, peer: PeerId) -> None:
        assert peer != self._me
        self._live = self._publishing = None
        del self._entries[peer]
        self._by_short.pop(short_id(peer), None)

    def by_short(self, short: bytes) -> PeerId | None:
        return self._by_short.get(short)

    def publishing(self, now: float, gone_max: float) -> tuple[PeerId, ...]:
        """Whose telemetry is worth comparing: all but those that are gone for longer, who publish nothing."""
        if self._publishing is None or now >= self._publishing_until:
            fresh = {peer: entry.gone_since for peer, entry in self._entries.items()}
            self._publishing = tuple(peer for peer, since in fresh.items() if since is None or now - since < gone_max)
            ends = (since + gone_max for since in fresh.values() if since is not None and now - since < gone_max)
            self._publishing_until = min(ends, default=NEVER)
        return self._publishing

    def make_room(self, liveness: Liveness) -> tuple[bool, PeerId | None]:
        """May another member of this liveness be added, and who must be forgotten for it: the one gone for longest.

        The gone never push out anybody.
        """
        if len(self._entries) < MEMBERS_MAX:
            return True, None
        gone = [(entry.gone_since, peer) for peer, entry in self._entries.items() if entry.gone_since is not None]
        if liveness >= Liveness.DEAD or not gone:
            return False, None
        return True, min(gone)[1]

    def gone_for(self, now: float, peer: PeerId) -> float | None:
        """Seconds since the member died or left; None if it did not."""
        since = self._entries[peer].gone_since
        return None if since is None else max(0.0, now - since)

    def expired(self, now: float, dead_kept: float, left_kept: float) -> list[PeerId]:
        """Those that were gone for long enough to be forgotten."""
        kept = {Liveness.DEAD: dead_kept, Liveness.LEFT: left_kept}
        return [
            peer
            for peer, entry in self._entries.items()
            if entry.gone_since is not None and now - entry.gone_since >= kept[entry.member.liveness]
        ]

    def heard(self, peer: PeerId, epoch: int, source: Address, *, proven: bool) -> None:
        """An authenticated packet of the peer came from there.

        It may be a captured one that a stranger sends on from elsewhere. So a place that the peer does not claim for itself
        counts only if nothing better is known, or if the packet answers a question of mine (`proven`).
        """
        entry = self._entries.get(peer)
        if entry is None or entry.member.epoch != epoch:
            return
        if proven or entry.heard is None or source in entry.member.addresses:
            entry.heard = source

    def addresses(self, peer: PeerId) -> tuple[Address, ...]:
        """All that are worth trying, the one it was last heard from first."""
        entry = self._entries[peer]
        heard = () if entry.heard is None else (entry.heard,)
        return tuple(dict.fromkeys((*heard, *entry.member.addresses)))

    def reach(self, peer: PeerId, *, lost: bool = False) -> Sequence[Address]:
        """Where to send a packet: where the peer is heard from if it is well, else everywhere it may be. `lost`: what was sent
        there lately did not get there.

        The first address that a machine lists is often wrong (a docker bridge, a VPN, dead IPv6), so who was not heard yet
        is tried at all of them, and its answer settles it.
        """
        entry = self._entries[peer]
        if entry.heard is not None and entry.member.liveness is Liveness.ALIVE and not lost:
            return (entry.heard,)
        return self.addresses(peer)

    def next_address(self, peer: PeerId) -> Address | None:
        """Where to try a connection now: one address after the other, as long as nothing was heard from it."""
        entry = self._entries[peer]
        addresses = self.addresses(peer)
        if not addresses:
            return None
        if entry.heard is not None and entry.member.liveness is Liveness.ALIVE:
            return entry.heard
        entry.tries += 1
        return addresses[(entry.tries - 1) % len(addresses)]

    def known(self, now: float) -> tuple[KnownPeer, ...]:
        """The others that have not left, for the snapshot."""
        return tuple(
            KnownPeer(
                peer=peer,
                name=entry.member.name,
                addresses=self.addresses(peer)[:ADDRESSES_MAX],
                unseen_for=self.gone_for(now, peer) or 0.0,
            )
            for peer, entry in self._entries.items()
            if peer != self._me and entry.member.liveness is not Liveness.LEFT
        )

    def check(self) -> None:
        assert len(self._entries) <= MEMBERS_MAX
        for peer, entry in self._entries.items():
            assert entry.member.peer == peer
            assert (entry.gone_since is None) == (entry.member.liveness <= Liveness.SUSPECT)
        assert self._live is None or all(self._entries[peer].gone_since is None for peer in self._live)
