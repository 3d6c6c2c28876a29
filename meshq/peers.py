"""What gossip says of the peers, told in the words of the ledger and of the people: names and views.

Pure: the agent feeds it gossip's effects and reads views out of it. It holds the one rule for names: a peer whose name is
also that of a peer with a smaller id takes the next free suffix, so that names are unique once views are equal.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from meshq import codec, config
from meshq.errors import MalformedData
from meshq.gossip.member import Liveness, Member
from meshq.gossip.roster import KnownPeer
from meshq.ids import PeerId
from meshq.ledger.effects import PeerView
from meshq.task import Telemetry


def is_alive(member: Member) -> bool:
    """Suspicion is no verdict: a suspect counts as alive until it is held dead."""
    return member.liveness in (Liveness.ALIVE, Liveness.SUSPECT)


def free_name(wanted: str, me: PeerId, members: Iterable[Member]) -> str:
    """`wanted`, or with the first suffix that no peer with a smaller id has."""
    taken = {member.name for member in members if member.peer < me}
    if wanted not in taken:
        return wanted
    return next(name for number in range(2, len(taken) + 3) if (name := f"{wanted}-{number}") not in taken)


@dataclass(slots=True)
class _Entry:
    member: Member
    changed_at: float
    telemetry: Telemetry


class Peers:
    """All peers that were ever heard of, this one included."""

    def __init__(self, me: Member, telemetry: Telemetry, now: float) -> None:
        self.me = me.peer
        self.undecodable_records = 0
        self._entries: dict[PeerId, _Entry] = {me.peer: _Entry(me, now, telemetry)}
        self._remembered: dict[PeerId, PeerView] = {}

    def remember(self, now: float, known: Iterable[KnownPeer]) -> None:
        """Peers of an earlier run that have not shown up yet. They count when this peer asks whether it is cut off, so that an
        agent that was restarted and has met nobody does not take the whole lab for dead."""
        for each in known:
            if each.peer not in self._entries:
                self._remembered[each.peer] = PeerView(peer=each.peer, name=each.name, alive=False, changed_at=now)

    def handle_member(self, now: float, member: Member) -> None:
        """Take over a new belief; note when the peer came to life or died on this peer's clock."""
        self._remembered.pop(member.peer, None)
        entry = self._entries.get(member.peer)
        if entry is None:
            self._entries[member.peer] = _Entry(member, now, Telemetry())
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
        try:
            telemetry: Telemetry = codec.decode(Telemetry, record, bytes_max=config.RECORD_BYTES_MAX)
        except MalformedData:
            self.undecodable_records += 1
            return
        if entry is not None and peer != self.me:
            entry.telemetry = telemetry

    def handle_own_telemetry(self, telemetry: Telemetry) -> None:
        self._entries[self.me].telemetry = telemetry

    def members(self) -> list[Member]:
        return [entry.member for entry in self._entries.values()]

    def telemetry(self, peer: PeerId) -> Telemetry:
        """What the peer said last; defaults if it has said nothing yet."""
        entry = self._entries.get(peer)
        return entry.telemetry if entry is not None else Telemetry()

    def member(self, peer: PeerId) -> Member | None:
        entry = self._entries.get(peer)
        return entry.member if entry is not None else None

    def others_alive(self) -> list[PeerId]:
        """In the order of their ids."""
        return sorted(peer for peer, entry in self._entries.items() if peer != self.me and is_alive(entry.member))

    def name(self, peer: PeerId) -> str:
        """The peer's name, or the head of its id if it is not known."""
        if (entry := self._entries.get(peer)) is not None:
            return entry.member.name
        return self._remembered[peer].name if peer in self._remembered else peer[:8]

    def views(self) -> dict[PeerId, PeerView]:
        """For `Ledger.handle_peers`: every peer, this one included."""
        views = self._remembered | {peer: self._view(entry) for peer, entry in self._entries.items()}
        return {peer: views[peer] for peer in sorted(views)}

    def _view(self, entry: _Entry) -> PeerView:
        member = entry.member
        return PeerView(
            peer=member.peer,
            name=member.name,
            alive=is_alive(member),
            left=member.liveness is Liveness.LEFT,
            changed_at=entry.changed_at,
            telemetry=entry.telemetry,
        )
