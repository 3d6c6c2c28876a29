"""Filling packets with what waits to be told, and addressing them: where `Send`, `Stream` and `Answer` are made.

A packet goes by UDP to where its receiver is heard, to all its addresses if it was not heard yet, and over TCP if UDP is no
use for that receiver (`connectivity`). What answers a packet goes back the way that it came. Everything passes the `throttle`.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from meshq.gossip import wire
from meshq.gossip.beliefs import Beliefs
from meshq.gossip.connectivity import Connections
from meshq.gossip.effects import Answer, Effect, Send, Stream
from meshq.gossip.member import Address
from meshq.gossip.rumors import retransmit_limit
from meshq.gossip.throttle import Throttle
from meshq.gossip.wire import Coded, GossipOnly, Message, Packet, Record, Rumor, coded
from meshq.ids import PeerId

PACKET_RECORDS_MAX: Final = 24  # more don't fit one packet: the smallest takes some 70 bytes, and none is as small


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a packet came from. `source` is None over TCP, where `awaited` says that an answer to it is waited for."""

    peer: PeerId
    source: Address | None
    awaited: bool = False

    def later(self) -> "Origin":
        """For an answer that comes when nobody waits any more."""
        return Origin(self.peer, self.source)


class Packer:
    """Every packet takes along rumors from the queue, as far as they fit, and counts them as told."""

    def __init__(
        self, beliefs: Beliefs, connections: Connections, throttle: Throttle, multiplier: int, counters: Counter[str]
    ) -> None:
        self.note = b""  # what the ledger says, in every packet
        self._beliefs = beliefs
        self._connections = connections
        self._throttle = throttle
        self._multiplier = multiplier
        self._counters = counters

    def answer(
        self, now: float, origin: Origin, message: Message, *, urgent: Sequence[Rumor] = (), digest: Sequence[bytes] = ()
    ) -> list[Effect]:
        """To whom a packet came from, by the way that it came."""
        return self._back(now, origin, self._pack(message, urgent=urgent, digest=digest).data, vital=_is_vital(message))

    def answer_records(self, now: float, origin: Origin, records: Sequence[Record], packets_max: int) -> list[Effect]:
        """The first of `records`, in at most so many packets."""
        effects: list[Effect] = []
        waiting = [coded(record) for record in records[: packets_max * PACKET_RECORDS_MAX]]
        for _ in range(packets_max):
            if not waiting:
                break
            filled = self._pack(GossipOnly(), lead=waiting[0], records=waiting[1:])
            carried = {record.peer for record in filled.records}
            waiting = [each for each in waiting if each[0].peer not in carried]
            effects += self._back(now, origin, filled.data, vital=False)
        return effects

    def send(
        self, now: float, peer: PeerId, message: Message, *,
        urgent: Sequence[Rumor] = (), digest: Sequence[bytes] = (),
    ) -> list[Effect]:  # fmt: skip
        packet = self._pack(message, urgent=urgent, digest=digest).data
        return self._send_all(now, (peer,), [packet], vital=_is_vital(message))

    def send_both_ways(self, now: float, peer: PeerId, message: Message, *, urgent: Sequence[Rumor] = ()) -> list[Effect]:
        """The same packet by UDP and over TCP: a probe that must know which of them works."""
        packet = self._pack(message, urgent=urgent).data
        return [*self._datagrams(now, peer, packet, vital=True), *self._stream(now, peer, packet, vital=True)]

    def send_by_udp(self, now: float, peer: PeerId, message: Message, *, urgent: Sequence[Rumor] = ()) -> list[Effect]:
        """Whether or not UDP is known to be of use: a probe."""
        return self._datagrams(now, peer, self._pack(message, urgent=urgent).data, vital=True)

    def spread_record(self, now: float, peers: Iterable[PeerId], record: Record) -> list[Effect]:
        """One packet with this record to all of them."""
        return self._send_all(now, peers, [self._pack(GossipOnly(), lead=coded(record)).data], vital=False)

    def spread(self, now: float, peers: Iterable[PeerId], rumors: Sequence[Rumor]) -> list[Effect]:
        """All of `rumors` to all of them, packed once, in as many packets as it takes."""
        packets: list[bytes] = []
        waiting = list(rumors)
        while waiting:
            filled = self._pack(GossipOnly(), urgent=waiting)
            told = {rumor.member.peer for rumor in filled.rumors}
            waiting = [rumor for rumor in waiting if rumor.member.peer not in told]
            packets.append(filled.data)
        return self._send_all(now, peers, packets, vital=True)

    def _pack(
        self,
        message: Message,
        *,
        urgent: Sequence[Rumor] = (),
        digest: Sequence[bytes] = (),
        records: Sequence[Coded[Record]] = (),
        lead: Coded[Record] | None = None,
    ) -> wire.Filled:
        """The message with the urgent rumors, then as many of those that wait as fit. `lead`: see `wire.fill`."""
        me, queue = self._beliefs.roster.me, self._beliefs.queue
        rumors: list[Coded[Rumor]] = [coded(rumor) for rumor in urgent]
        if len(queue):
            subjects = {rumor.member.peer for rumor in urgent}
            rumors += [each for each in queue.next() if each[0].member.peer not in subjects]
        packet = Packet(me.peer, me.epoch, message, note=self.note)
        filled = wire.fill(packet, rumors=rumors, digest=digest, records=records, lead=lead)
        if filled.rumors and len(queue):
            queue.told(filled.rumors, retransmit_limit(self._multiplier, self._beliefs.size))
        return filled

    def _send_all(self, now: float, peers: Iterable[PeerId], packets: Sequence[bytes], *, vital: bool) -> list[Effect]:
        effects: list[Effect] = []
        for peer in peers:
            way = self._stream if self._connections.by_tcp(peer) else self._datagrams
            for packet in packets:
                effects += way(now, peer, packet, vital=vital)
        return effects

    def _datagrams(self, now: float, peer: PeerId, packet: bytes, *, vital: bool) -> list[Effect]:
        """Wherever the peer may be."""
        effects: list[Effect] = []
        for address in self._beliefs.roster.reach(peer, lost=self._connections.by_tcp(peer)):
            if self._admits(now, address, packet, vital=vital):
                effects.append(Send(address, packet))
        return effects

    def _stream(self, now: float, peer: PeerId, packet: bytes, *, vital: bool) -> list[Effect]:
        return [Stream(peer, packet)] if self._admits(now, peer, packet, vital=vital) else []

    def _back(self, now: float, origin: Origin, packet: bytes, *, vital: bool) -> list[Effect]:
        if origin.source is None:
            return [Answer(packet)] if origin.awaited else self._stream(now, origin.peer, packet, vital=vital)
        return [Send(origin.source, packet)] if self._admits(now, origin.source, packet, vital=vital) else []

    def _admits(self, now: float, target: Address | str, packet: bytes, *, vital: bool) -> bool:
        if self._throttle.admits(now, target, len(packet), vital=vital):
            return True
        self._counters["packets_throttled"] += 1
        return False


def _is_vital(message: Message) -> bool:
    """Does the failure detector wait for it?"""
    return not isinstance(message, GossipOnly)
