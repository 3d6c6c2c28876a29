"""Filling packets with what waits to be told, and addressing them: the one place of the core where `Send` is made."""

from collections.abc import Iterable, Sequence

from meshq.gossip import wire
from meshq.gossip.beliefs import Beliefs
from meshq.gossip.effects import Effect, Send
from meshq.gossip.member import Address
from meshq.gossip.rumors import retransmit_limit
from meshq.gossip.wire import DigestEntry, GossipOnly, Message, Packet, Record, Rumor
from meshq.ids import PeerId


class Packer:
    """Every packet takes along rumors from the queue, as far as they fit, and counts them as told."""

    def __init__(self, beliefs: Beliefs, retransmit_multiplier: int) -> None:
        self._beliefs = beliefs
        self._multiplier = retransmit_multiplier

    def pack(
        self,
        message: Message,
        *,
        urgent: Sequence[Rumor] = (),
        digest: Sequence[DigestEntry] = (),
        records: Sequence[Record] = (),
        lead: Record | None = None,
    ) -> wire.Filled:
        """The message with the urgent rumors, then as many of those that wait as fit. `lead`: see `wire.fill`."""
        me, queue = self._beliefs.roster.me, self._beliefs.queue
        subjects = [rumor.member.peer for rumor in urgent]
        rumors = [*urgent, *(rumor for rumor in queue.next() if rumor.member.peer not in subjects)]
        packet = Packet(me.peer, me.epoch, message)
        filled = wire.fill(packet, rumors=rumors, digest=digest, records=records, lead=lead)
        queue.told(filled.rumors, retransmit_limit(self._multiplier, self._beliefs.size))
        return filled

    def send(
        self, address: Address, message: Message, *, urgent: Sequence[Rumor] = (), digest: Sequence[DigestEntry] = ()
    ) -> Send:
        return Send(address, self.pack(message, urgent=urgent, digest=digest).data)

    def send_to(
        self, peer: PeerId, message: Message, *, urgent: Sequence[Rumor] = (), digest: Sequence[DigestEntry] = ()
    ) -> list[Effect]:
        """The same packet wherever the peer may be."""
        return list(self.send_all((peer,), [self.pack(message, urgent=urgent, digest=digest).data]))

    def send_all(self, peers: Iterable[PeerId], packets: Sequence[bytes]) -> list[Send]:
        """The same packets to all of them: a change is packed once and told to everybody."""
        roster = self._beliefs.roster
        return [Send(address, data) for peer in peers for address in roster.reach(peer) for data in packets]

    def batches(self, rumors: Sequence[Rumor]) -> list[bytes]:
        """As many packets as it takes to tell all of `rumors`."""
        packets: list[bytes] = []
        waiting = list(rumors)
        while waiting:
            filled = self.pack(GossipOnly(), urgent=waiting)
            told = [rumor.member.peer for rumor in filled.rumors]
            waiting = [rumor for rumor in waiting if rumor.member.peer not in told]
            packets.append(filled.data)
        return packets

    def record_batches(self, records: Sequence[Record], packets_max: int) -> list[bytes]:
        """The first of `records`, in at most so many packets."""
        packets: list[bytes] = []
        waiting = list(records)
        while waiting and len(packets) < packets_max:
            filled = self.pack(GossipOnly(), lead=waiting[0], records=waiting[1:])
            carried = [record.peer for record in filled.records]
            waiting = [record for record in waiting if record.peer not in carried]
            packets.append(filled.data)
        return packets
