"""What gossip says of the peers, told in the words of the ledger and of the people: names and views.

Pure: the agent feeds it gossip's effects and reads views out of it.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from meshq.errors import MalformedData
from meshq.gossip.member import Liveness, Member
from meshq.gossip.roster import KnownPeer
from meshq.ids import Epoch, PeerId
from meshq.ledger.effects import PeerView
from meshq.record import unpack
from meshq.task import Telemetry


def is_alive(member: Member) -> bool:
    """Suspicion is no verdict: a suspect counts as alive until it is held dead."""
    return member.liveness in (Liveness.ALIVE, Liveness.SUSPECT)


@dataclass(slots=True)
class _Entry:
    member: Member
    changed_at: float
    telemetry: Telemetry | None  # None: it has said nothing yet


class Peers:
    """All peers that were ever heard of, this one included."""

    def __init__(self, me: Member, telemetry: Telemetry, now: float) -> None:
        self.me = me.peer
        self.undecodable_records = 0
        self._entries: dict[PeerId, _Entry] = {me.peer: _Entry(me, now, telemetry)}
        self._remembered: dict[PeerId, _Entry] = {}

    def remember(self, now: float, known: Iterable[KnownPeer]) -> None:
        """Peers of an earlier run that have not shown up yet: dead since now, as far as anybody here knows.

        They count when this peer asks whether it is cut off, so that an agent that was restarted and has met nobody does not
        take the whole lab for dead; and what they had counts for what could ever run a task.
        """
        for each in known:
            if each.peer not in self._entries:
                gone = Member(
                    peer=each.peer,
                    epoch=Epoch(0),
                    incarnation=0,
                    liveness=Liveness.DEAD,
                    name=each.name,
                    addresses=each.addresses,
                )
                self._remembered[each.peer] = _Entry(gone, now, self._decode(each.record))

    def handle_member(self, now: float, member: Member) -> None:
        """Take over a new belief; note when the peer came to life or died on this peer's clock."""
        remembered = self._remembered.pop(member.peer, None)
        entry = self._entries.get(member.peer)
        if entry is None:
            told = remembered.telemetry if remembered is not None else None
            self._entries[member.peer] = _Entry(member, now, told)
            return
        if is_alive(entry.member) != is_alive(member):
            entry.changed_at = now
        entry.member = member

    def forget_all_but(self, known: Collection[PeerId]) -> bool:
        """Forget who is not among these; whether there was anybody."""
        gone = [peer for peer in (*self._entries, *self._remembered) if peer not in known and peer != self.me]
        for peer in gone:
            self._entries.pop(peer, None)
            self._remembered.pop(peer, None)
        return bool(gone)

    def handle_record(self, peer: PeerId, record: bytes) -> None:
        """Take over newer telemetry. A record that does not decode is counted and dropped."""
        entry = self._entries.get(peer)
        if entry is not None and peer != self.me and (telemetry := self._decode(record)) is not None:
            entry.telemetry = telemetry

    def _decode(self, record: bytes) -> Telemetry | None:
        if not record:
            return None
        try:
            return unpack(record)
        except MalformedData:
            self.undecodable_records += 1
            return None

    def handle_own_telemetry(self, telemetry: Telemetry) -> None:
        self._entries[self.me].telemetry = telemetry

    def members(self) -> list[Member]:
        """All that gossip told of, this peer included."""
        return [entry.member for entry in self._entries.values()]

    def remembered(self) -> list[Member]:
        """Those of an earlier run that have not shown up yet, as dead."""
        return [entry.member for entry in self._remembered.values()]

    def telemetry(self, peer: PeerId) -> Telemetry:
        """What the peer said last; defaults if it has said nothing yet."""
        entry = self._entries.get(peer) or self._remembered.get(peer)
        return (entry.telemetry if entry is not None else None) or Telemetry()

    def member(self, peer: PeerId) -> Member | None:
        entry = self._entries.get(peer)
        return entry.member if entry is not None else None

    def others_alive(self) -> list[PeerId]:
        """In the order of their ids."""
        return sorted(peer for peer, entry in self._entries.items() if peer != self.me and is_alive(entry.member))

    def newcomers(self, since: float) -> list[PeerId]:
        """Who came to life since then and has not said yet what it has."""
        return [
            peer
            for peer, entry in self._entries.items()
            if entry.telemetry is None and entry.changed_at >= since and is_alive(entry.member)
        ]

    def name(self, peer: PeerId) -> str:
        """The peer's name, or the head of its id if it is not known."""
        if (entry := self._entries.get(peer)) is not None:
            return entry.member.name
        return self._remembered[peer].member.name if peer in self._remembered else peer[:8]

    def views(self) -> dict[PeerId, PeerView]:
        """For `Ledger.handle_peers`: every peer, this one included."""
        entries = self._remembered | self._entries
        return {peer: self._view(entries[peer]) for peer in sorted(entries)}

    def _view(self, entry: _Entry) -> PeerView:
        member = entry.member
        return PeerView(
            peer=member.peer,
            name=member.name,
            alive=is_alive(member),
            left=member.liveness is Liveness.LEFT,
            changed_at=entry.changed_at,
            told=entry.telemetry is not None,
            telemetry=entry.telemetry or Telemetry(),
        )
