"""The failure detector: one probe at a time, and the probes that others ask for.

A probe starts with a ping. Without an ack in time it pings once more, over TCP too, and asks helpers to ping. Any ack before
the end of the interval will do; without one the member is suspected. Helpers that tried in vain say so (nack): so they heard
me, and if they did not, it is I who is slow, which my local health remembers (Lifeguard). A suspect is told that it is one
by the very ping that finds it, and can refute at once (Lifeguard's buddy).

A ping is for one peer alone, and says for whom: the address may meanwhile belong to somebody else. Helpers ping only members
whom they know, where they know them to be, so no stranger can be made a target.

Reading: Das, Gupta, Motivala: SWIM, 2002, sections 3 and 4.3; Dadgar et al.: Lifeguard, arXiv:1707.00788, section 4.
"""

import math
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from meshq.gossip.beliefs import Beliefs
from meshq.gossip.connectivity import Connections
from meshq.gossip.effects import Effect, ProbeFailed, TransportChanged
from meshq.gossip.member import Liveness
from meshq.gossip.packer import Origin, Packer
from meshq.gossip.probing import Probe, ProbeOrder, Relay, Relays, RoundTrips
from meshq.gossip.profile import SwimConfig
from meshq.gossip.wire import Ack, Nack, Packet, Ping, PingRequest, Rumor
from meshq.ids import PeerId

if TYPE_CHECKING:
    from random import Random

NEVER: Final = math.inf
PROBES_KEPT: Final = 4  # whose late acks still say something about the network
HINT_PAUSES: Final = 5  # probe intervals between two hints about one peer that are followed
HEARD_PAUSES: Final = 30  # probe intervals: who was not heard for so long is no help, if there are others


class Detector:
    """What it finds out goes to `beliefs`, what it must send through `packer`."""

    def __init__(
        self,
        beliefs: Beliefs,
        connections: Connections,
        packer: Packer,
        config: SwimConfig,
        rng: "Random",
        counters: Counter[str],
    ) -> None:
        self._beliefs = beliefs
        self._roster = beliefs.roster
        self._connections = connections
        self._packer = packer
        self._config = config
        self._rng = rng
        self._counters = counters
        self._order = ProbeOrder(rng)
        self._trips = RoundTrips()
        self._relays = Relays()
        self._probe: Probe | None = None
        self._sent: dict[int, Probe] = {}  # the last ones, the newest at the end
        self._number = rng.getrandbits(31)  # of the last ping: an ack for an earlier run of me must not count
        self._hinted: dict[PeerId, float] = {}

    def deadline(self) -> float:
        return min(NEVER if self._probe is None else self._probe.deadline, self._relays.deadline())

    def insert(self, peer: PeerId) -> None:
        """A member that is alive, or is so again."""
        self._order.insert(peer)

    def forget(self, peer: PeerId) -> None:
        self._order.forget(peer)

    def start(self, now: float) -> list[Effect]:
        """Begin with the next member, if there is one."""
        effects = self._judge_transport()
        peer = self._order.next(self._roster.live())
        if peer is None:
            return effects
        wait = self._trips.ack_timeout(self._config.ack_timeout_min, self._config.ack_timeout)
        interval = self._config.probe_interval * (1 + self._beliefs.health)
        probe = Probe(self._next_number(), peer, now, now + wait, now + interval)
        self._probe = self._sent[probe.number] = probe
        if len(self._sent) > PROBES_KEPT:
            del self._sent[next(iter(self._sent))]
        ping, doubts = Ping(probe.number, peer), self._doubts(now, peer)
        send = self._packer.send_both_ways if self._connections.by_tcp(peer) else self._packer.send_by_udp
        return [*effects, *send(now, peer, ping, urgent=doubts)]

    def advance(self, now: float) -> list[Effect]:
        """All that is due: nacks to those who asked for help; helpers for my probe, or its end."""
        effects: list[Effect] = []
        for relay in self._relays.expired(now):
            effects += self._packer.answer(now, relay.asker, Nack(relay.number))
        probe = self._probe
        if probe is None or now < probe.deadline:
            return effects
        member = self._roster.get(probe.peer)
        if member is None or member.liveness > Liveness.SUSPECT:
            self.abandon()
            return effects
        if now < probe.fails_at:
            return effects + self._ask_for_help(now, probe)
        self._probe = None
        self._counters["probes_failed"] += 1
        self._beliefs.feel(probe.asked - probe.nacks if probe.asked else +1)
        return [*effects, ProbeFailed(probe.peer), *self._beliefs.suspect(now, probe.peer)]

    def abandon(self) -> None:
        """The probe says nothing any more."""
        if self._probe is not None:
            self._counters["probes_abandoned"] += 1
        self._probe = None

    def hint(self, now: float, peer: PeerId) -> bool:
        """Something speaks against the peer; is it to be probed at once? Never a proof, and not followed too often."""
        member = self._roster.get(peer)
        pause = HINT_PAUSES * self._config.probe_interval
        if member is None or member.liveness > Liveness.SUSPECT or now - self._hinted.get(peer, -NEVER) < pause:
            return False
        if self._probe is not None and self._probe.peer == peer:
            return False
        self._hinted = {each: at for each, at in self._hinted.items() if now - at < pause} | {peer: now}
        self._order.promote(peer)
        return self._probe is None

    def expects(self, packet: Packet) -> bool:
        """Is this the ack of one of my own pings by the peer that it was for?"""
        message = packet.message
        sent = self._sent.get(message.number) if isinstance(message, Ack) else None
        return sent is not None and sent.peer == packet.sender

    def handle_ping(self, now: float, ping: Ping, packet: Packet, origin: Origin) -> list[Effect]:
        """The ack corrects whatever the ping said that is less than what I know."""
        if ping.target != self._roster.me.peer:
            self._counters["pings_for_another"] += 1
            return []
        corrections = {peer: self._beliefs.rumor(now, peer) for peer in self._outdated(packet.rumors)}
        sender = self._roster.get(packet.sender)
        if sender is not None and (sender.liveness is not Liveness.ALIVE or sender.epoch > packet.epoch):
            corrections[packet.sender] = self._beliefs.rumor(now, packet.sender)
        return self._packer.answer(now, origin, Ack(ping.number), urgent=list(corrections.values()))

    def handle_ack(self, now: float, ack: Ack, packet: Packet, origin: Origin) -> list[Effect]:
        relay = self._relays.acked(ack.number)
        if relay is not None:
            return self._packer.answer(now, relay.asker, Ack(relay.number))
        sent = self._sent.get(ack.number)
        if sent is None:
            self._counters["acks_late"] += 1
            return []
        direct = packet.sender == sent.peer and self._roster.get(sent.peer) is not None
        effects = self._note_way(now, sent, origin) if direct else []
        if packet.sender != sent.peer and self._roster.get(sent.peer) is not None:
            self._connections.helped(sent.peer, packet.sender)
        if sent is self._probe:
            self._probe = None
            self._beliefs.feel(-1)
        elif not sent.acked:
            self._counters["acks_late"] += 1
        sent.acked = True
        return effects

    def handle_nack(self, nack: Nack) -> None:
        probe = self._probe
        if probe is not None and nack.number == probe.number:
            probe.nacks = min(probe.asked, probe.nacks + 1)

    def handle_ping_request(self, now: float, request: PingRequest, origin: Origin) -> list[Effect]:
        """Ping a member for somebody else: only one that I know, and only where I know it to be."""
        if request.target == self._roster.me.peer:
            return self._packer.answer(now, origin, Ack(request.number))
        if self._roster.get(request.target) is None:
            self._counters["ping_requests_unknown"] += 1
            return self._packer.answer(now, origin, Nack(request.number))
        number = self._next_number()
        patience = self._config.relay_timeout_share * self._config.ack_timeout
        if not self._relays.add(number, Relay(origin.later(), request.number, now + patience)):
            self._counters["relays_refused"] += 1
            return []
        ping, doubts = Ping(number, request.target), self._doubts(now, request.target)
        return self._packer.send(now, request.target, ping, urgent=doubts)

    def check(self) -> None:
        assert self._probe is None or self._probe.deadline < NEVER
        assert len(self._sent) <= PROBES_KEPT

    def _ask_for_help(self, now: float, probe: Probe) -> list[Effect]:
        probe.indirect = True
        helpers = self._helpers(now, probe.peer)
        probe.asked = len(helpers)
        ping, doubts = Ping(probe.number, probe.peer), self._doubts(now, probe.peer)
        effects = self._packer.send_both_ways(now, probe.peer, ping, urgent=doubts)
        for helper in helpers:
            effects += self._packer.send(now, helper, PingRequest(probe.number, probe.peer))
        return effects

    def _helpers(self, now: float, target: PeerId) -> list[PeerId]:
        """Random ones of those that were heard lately; and whoever reached the target for me last, which between two sides
        of a network may be the only one that can."""
        live, wanted = self._roster.live(), self._config.indirect_probes
        others = [peer for peer in live if peer != target]
        since = now - HEARD_PAUSES * self._config.probe_interval
        heard = [peer for peer in others if self._connections.heard_at(peer) >= since]
        if len(heard) >= wanted:
            others = heard
        helpers = self._rng.sample(others, min(len(others), wanted))
        proven = self._connections.get(target).helper
        if proven in live and proven not in helpers and helpers:
            helpers[-1] = proven
        return helpers

    def _note_way(self, now: float, probe: Probe, origin: Origin) -> list[Effect]:
        """The probed peer itself has answered: what does that say about UDP and TCP?"""
        if origin.source is None:
            probe.acked_by_tcp = True
            self._connections.acked_by_tcp(probe.peer, now - (probe.indirect_at if probe.indirect else probe.sent_at))
            return []
        probe.acked_by_udp = True
        if not probe.indirect:
            self._trips.add(now - probe.sent_at)
        changed = self._connections.acked(probe.peer, None if probe.indirect else now - probe.sent_at)
        return [TransportChanged(probe.peer, True)] if changed else []

    def _judge_transport(self) -> list[Effect]:
        """The last probe is over: was it answered over TCP alone?"""
        last = next(reversed(self._sent.values()), None)
        if last is None or last.judged or last.acked_by_udp or not last.acked_by_tcp or self._roster.get(last.peer) is None:
            return []
        last.judged = True
        return [TransportChanged(last.peer, False)] if self._connections.missed(last.peer) else []

    def _outdated(self, rumors: Iterable[Rumor]) -> list[PeerId]:
        members = [(rumor.member, self._roster.get(rumor.member.peer)) for rumor in rumors]
        return [mine.peer for theirs, mine in members if mine is not None and mine.precedence > theirs.precedence]

    def _doubts(self, now: float, peer: PeerId) -> list[Rumor]:
        """What the peer must hear of itself: that I hold it suspect, dead, left."""
        member = self._roster.get(peer)
        return [] if member is None or member.liveness is Liveness.ALIVE else [self._beliefs.rumor(now, peer)]

    def _next_number(self) -> int:
        self._number = (self._number + 1) % 2**32
        return self._number
