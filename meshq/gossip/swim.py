"""Who is alive, and what their hardware does: the core of gossip.

Problem. Up to a thousand peers must agree within seconds on who takes part, without any of them being special, over a network
that loses, delays and doubles packets, and on machines that starve their agent of CPU because a task wants all of it.

Invariant. What `beliefs` promises: everybody's belief about a peer grows to the same greatest one, and only the peer itself can
outbid an accusation. Every packet fits one datagram. Every queue and table is bounded. Bad data changes nothing.

Algorithm. Each interval one member is probed (`probing`): a ping; without an ack in time another ping, and helpers are asked to
ping; without any ack by the end of the interval it is suspected, and told so by every ping that it gets. An unrefuted suspicion
becomes a death (`suspicion`, `beliefs`). Local health scales the interval: who misses acks that others get, or stalls, probes
more slowly, as it is the likely cause itself. Rumors ride on all packets, are gossiped while there are any, and in meshes of up
to 64 each change is told to everybody at once by whoever made it. Push/pull of everything with a random member, each half
minute and soon after a member appeared, repairs what rumors missed; with dead members, it heals partitions of any length.
Telemetry goes straight to everybody when it is published, and the rest is found by digests (`telemetry`).

Time. `deadline` says when `handle_timeout` wants to be called. Being called more than a second late means that this peer was
deaf in between: it distrusts its suspicions instead of burying members whose packets wait in its socket.

Limits. Full membership, so a few hundred peers in comfort, a thousand at most. A member that hears but is not heard (one-way
loss) is suspected and refuted in turns for as long as that lasts: SWIM cannot settle it (Suresh et al.: Rapid, ATC 2018).

Reading: Das, Gupta, Motivala: SWIM, 2002; Dadgar et al.: Lifeguard, arXiv:1707.00788; hashicorp/memberlist for the numbers.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from typing import TYPE_CHECKING, Final, assert_never

from meshq.config import RECORD_BYTES_MAX
from meshq.errors import PeerError
from meshq.gossip import wire
from meshq.gossip.beliefs import Beliefs
from meshq.gossip.effects import Effect, MemberChanged, ProbeFailed, RecordChanged, Send, Sync
from meshq.gossip.member import Address, Liveness, Member
from meshq.gossip.packer import Packer
from meshq.gossip.probing import Probe, ProbeOrder, Relay, Relays, RoundTrips
from meshq.gossip.profile import PROFILES, SwimConfig
from meshq.gossip.remembered import Remembered
from meshq.gossip.roster import KnownPeer
from meshq.gossip.telemetry import RecordTable
from meshq.gossip.wire import Ack, GossipOnly, Nack, Packet, Ping, PingRequest, Record, Rumor
from meshq.ids import PeerId

if TYPE_CHECKING:
    from random import Random

__all__ = ["PROFILES", "KnownPeer", "Swim", "SwimConfig"]

NEVER: Final = math.inf
FORGET_INTERVAL: Final = 60.0
REPLY_PACKETS_MAX: Final = 3  # of records in answer to one digest: the next digest asks again
REJOINS_AT_ONCE: Final = 8  # remembered peers that are tried at the start; the others by and by
SYNC_SCALES_ABOVE: Final = 32  # members; beyond, push/pull gets rarer with their logarithm (memberlist)

COUNTERS: Final = (
    "packets_in", "packets_out", "packets_own", "pings_for_another", "ping_requests_unknown", "relays_refused",
    "acks_late", "probes_failed", "probes_abandoned", "refutations", "refutations_refused", "members_refused",
    "rumors_dropped", "rumors_expired", "records_unknown", "records_stale", "senders_unknown", "syncs_failed", "stalls",
)  # fmt: skip


class Routine(StrEnum):
    """What is done again and again, in the order in which it is done when several are due."""

    PROBE = "probe"
    GOSSIP = "gossip"
    DIGEST = "digest"
    SYNC = "sync"
    RECONNECT = "reconnect"
    FORGET = "forget"


class Swim:
    """One peer's part in gossip. Commands and inputs return what the shell must do, in order."""

    def __init__(self, me: Member, config: SwimConfig, rng: "Random", now: float) -> None:
        self._config = config
        self._rng = rng
        self._counters: Counter[str] = Counter(dict.fromkeys(COUNTERS, 0))
        self._beliefs = Beliefs(me, config, now, self._counters)
        self._roster = self._beliefs.roster
        self._records = RecordTable(me.peer)
        self._order = ProbeOrder(rng)
        self._trips = RoundTrips()
        self._relays = Relays()
        self._probe: Probe | None = None
        self._number = rng.getrandbits(31)  # of the last ping: an ack for an earlier run of me must not count
        self._packer = Packer(self._beliefs, config.retransmit_multiplier)
        self._remembered = Remembered(config.dead_kept)
        self._reconnected_at = now
        self._met_at = -NEVER
        self._stalled_at = -NEVER
        self._due = {
            Routine.PROBE: now + rng.uniform(0, config.probe_interval),
            Routine.GOSSIP: NEVER,
            Routine.DIGEST: now + rng.uniform(0, config.digest_interval),
            Routine.SYNC: now + rng.uniform(0.5, 1.0) * config.sync_interval,
            Routine.RECONNECT: now + rng.uniform(0.5, 1.0) * config.reconnect_interval,
            Routine.FORGET: now + FORGET_INTERVAL,
        }

    # Inputs

    def handle_packet(self, now: float, data: bytes, source: Address) -> list[Effect]:
        """An opened packet from `source`. MalformedData: state unchanged."""
        packet = wire.read_packet(data)
        self._counters["packets_in"] += 1
        if packet.sender == self._roster.me.peer:
            self._counters["packets_own"] += 1
            return []
        effects: list[Effect] = []
        for rumor in packet.rumors:
            effects += self._beliefs.hear(now, rumor)
        self._roster.heard(packet.sender, packet.epoch, source, proven=self._answers_me(packet))
        effects += self._take_records(now, packet.records)
        effects += self._compare_digest(now, packet.digest, source)
        effects += self._handle_message(now, packet, source)
        effects += self._meet_sender(now, packet, source)
        return self._settle(now, effects)

    def handle_timeout(self, now: float) -> list[Effect]:
        """All that is due by `now`, in order."""
        effects: list[Effect] = []
        if now - self.deadline() > self._config.stall:
            effects += self.handle_stall(now, now - self.deadline())
        effects += self._advance_probe(now)
        effects += self._beliefs.bury(now)
        for relay in self._relays.expired(now):
            effects.append(self._packer.send(relay.asker, Nack(relay.number)))
        for routine in Routine:
            if self._due[routine] <= now:
                effects += self._run(now, routine)
        return self._settle(now, effects)

    def deadline(self) -> float:
        """When `handle_timeout` wants to be called."""
        probe = NEVER if self._probe is None else self._probe.deadline
        return min(probe, self._beliefs.deadline(), self._relays.deadline(), *self._due.values())

    def handle_sync_request(self, now: float, data: bytes) -> tuple[bytes, list[Effect]]:
        """Push/pull by another peer: the reply, and what follows. MalformedData: state unchanged."""
        request = wire.read_sync_request(data)
        effects = self._take_sync(now, request)
        reply = wire.fill_sync(wire.SyncReply, self._roster.me, self._all_rumors(now), self._all_records(now))
        return reply, self._settle(now, effects)

    def handle_sync_reply(self, now: float, data: bytes) -> list[Effect]:
        """The answer to a `Sync`. MalformedData: state unchanged."""
        return self._settle(now, self._take_sync(now, wire.read_sync_reply(data)))

    def handle_sync_failed(self, now: float, address: Address) -> list[Effect]:
        """A `Sync` got no answer. The next try takes the next address; a refused connection is no proof of death."""
        self._counters["syncs_failed"] += 1
        return []

    def handle_stall(self, now: float, seconds: float) -> list[Effect]:
        """The event loop was held up for so long. It makes my own probes suspect, and, if long, my suspicions.

        The shell's watch and a late timer may both report the same stall: it counts once.
        """
        if seconds <= self._config.lag or now - self._stalled_at < self._config.lag:
            return []
        self._stalled_at = now
        self._counters["stalls"] += 1
        self._beliefs.feel(+1)
        if seconds > self._config.stall:
            self._beliefs.feel(+1)
            self._beliefs.distrust(now)
            self._abandon_probe()
        return []

    # Commands

    def join(self, now: float, seeds: Sequence[Address]) -> list[Effect]:
        """Push/pull with whoever answers there."""
        request = self._sync_request(now)
        return [Sync(None, seed, request) for seed in dict.fromkeys(seeds) if seed not in self._roster.me.addresses]

    def remember(self, now: float, known: Sequence[KnownPeer]) -> list[Effect]:
        """Peers of an earlier run: some are tried now, all of them are tried again until they show up or are too old."""
        request = self._sync_request(now)
        effects: list[Effect] = []
        for each in sorted(known, key=lambda each: (each.unseen_for, each.peer)):
            if self._roster.get(each.peer) is not None or not self._remembered.add(now, each):
                continue
            if len(effects) < REJOINS_AT_ONCE:
                effects.append(Sync(each.peer, self._remembered.next_address(each.peer), request))
        return effects

    def leave(self, now: float) -> list[Effect]:
        """Say that I go. The shell keeps calling for about a second, so that the rumor is passed on under loss."""
        self._abandon_probe()
        return self._introduce(now, self._roster.me.name, self._roster.me.addresses, Liveness.LEFT)

    def rename(self, now: float, name: str) -> list[Effect]:
        return self._introduce(now, name, self._roster.me.addresses, Liveness.ALIVE)

    def readdress(self, now: float, addresses: Sequence[Address]) -> list[Effect]:
        return self._introduce(now, self._roster.me.name, tuple(addresses), Liveness.ALIVE)

    def publish(self, now: float, record: bytes) -> list[Effect]:
        """Tell everybody my new telemetry: at most RECORD_BYTES_MAX bytes."""
        assert len(record) <= RECORD_BYTES_MAX
        mine = self._records.publish(now, self._roster.me.epoch, record)
        live = self._roster.live()
        if self._beliefs.left or not live:
            return []
        if len(live) > self._config.direct_members_max:
            live = tuple(self._rng.sample(live, self._config.gossip_fanout))
        return self._settle(now, list(self._packer.send_all(live, [self._packer.pack(GossipOnly(), lead=mine).data])))

    def _introduce(self, now: float, name: str, addresses: tuple[Address, ...], liveness: Liveness) -> list[Effect]:
        return self._settle(now, self._beliefs.introduce(now, name=name, addresses=addresses, liveness=liveness))

    # Views

    @property
    def me(self) -> Member:
        return self._roster.me

    @property
    def health(self) -> int:
        """0 is well; each point makes my probes slower."""
        return self._beliefs.health

    @property
    def counters(self) -> Mapping[str, int]:
        """How often what happened, above all what was dropped or refused."""
        return self._counters | {"rumors_dropped": self._beliefs.queue.dropped}

    def members(self) -> tuple[Member, ...]:
        """All that are known, me included."""
        return self._roster.members()

    def member(self, peer: PeerId) -> Member | None:
        return self._roster.get(peer)

    def addresses(self, peer: PeerId) -> tuple[Address, ...]:
        """Where a known member may be reached, the address it was last heard from first."""
        return () if self._roster.get(peer) is None else self._roster.addresses(peer)

    def record(self, peer: PeerId) -> bytes | None:
        """What the peer last published, as far as that got here."""
        held = self._records.get(peer)
        return None if held is None else held.data

    def record_age(self, now: float, peer: PeerId) -> float | None:
        """Seconds since the peer published it."""
        held = self._records.get(peer)
        return None if held is None else max(0.0, now - held.published_at)

    def known_peers(self, now: float) -> tuple[KnownPeer, ...]:
        """For the snapshot: everybody who is alive or failed, and who is still only remembered."""
        known = (replace(each, record=self.record(each.peer) or b"") for each in self._roster.known(now))
        return (*known, *self._remembered.known(now))

    def check(self) -> None:
        """Assert every invariant."""
        self._beliefs.check()
        assert all(self._roster.get(peer) is not None for peer in self._records.peers())
        assert self._probe is None or self._probe.deadline < NEVER
        assert not [peer for peer in self._remembered.peers() if self._roster.get(peer) is not None]

    # Routines

    def _run(self, now: float, routine: Routine) -> list[Effect]:
        match routine:
            case Routine.PROBE:
                return self._start_probe(now)
            case Routine.GOSSIP:
                return self._gossip(now)
            case Routine.DIGEST:
                return self._exchange_digest(now)
            case Routine.SYNC:
                return self._sync_with_somebody(now)
            case Routine.RECONNECT:
                return self._reconnect(now)
            case Routine.FORGET:
                return self._forget(now)
            case _:
                assert_never(routine)

    def _forget(self, now: float) -> list[Effect]:
        self._due[Routine.FORGET] = now + FORGET_INTERVAL
        self._beliefs.forget_expired(now)
        self._remembered.forget_expired(now)
        return []

    # Probes

    def _start_probe(self, now: float) -> list[Effect]:
        interval = self._config.probe_interval * (1 + self._beliefs.health)
        self._due[Routine.PROBE] = now + interval
        peer = None if self._beliefs.left else self._order.next(self._roster.live())
        if peer is None:
            return []
        wait = self._trips.ack_timeout(self._config.ack_timeout_min, self._config.ack_timeout)
        self._probe = Probe(self._next_number(), peer, now, now + wait, now + interval)
        return self._ping(now, peer, self._probe.number)

    def _advance_probe(self, now: float) -> list[Effect]:
        """Turn to helpers when the ack is late; give up at the end of the interval."""
        probe = self._probe
        if probe is None or now < probe.deadline:
            return []
        member = self._roster.get(probe.peer)
        if member is None or member.liveness > Liveness.SUSPECT:
            self._abandon_probe()
            return []
        if now < probe.fails_at:
            return self._probe_indirectly(now, probe)
        self._probe = None
        self._counters["probes_failed"] += 1
        self._beliefs.feel(probe.asked - probe.nacks if probe.asked else +1)
        return [ProbeFailed(probe.peer), *self._beliefs.accuse(now, probe.peer)]

    def _probe_indirectly(self, now: float, probe: Probe) -> list[Effect]:
        probe.indirect = True
        others = [peer for peer in self._roster.live() if peer != probe.peer]
        helpers = self._rng.sample(others, min(len(others), self._config.indirect_probes))
        probe.asked = len(helpers)
        effects = self._ping(now, probe.peer, probe.number)
        for helper in helpers:
            effects += self._packer.send_to(helper, PingRequest(probe.number, probe.peer))
        return effects

    def _ping(self, now: float, peer: PeerId, number: int) -> list[Effect]:
        """A suspect is always told that it is one: the ping that finds it lets it refute (Lifeguard's buddy)."""
        return self._packer.send_to(peer, Ping(number, peer), urgent=self._doubts(now, peer))

    def _abandon_probe(self) -> None:
        if self._probe is not None:
            self._counters["probes_abandoned"] += 1
        self._probe = None

    def _handle_message(self, now: float, packet: Packet, source: Address) -> list[Effect]:
        message = packet.message
        match message:
            case Ping():
                return self._handle_ping(now, message, packet, source)
            case Ack():
                return self._handle_ack(now, message, packet)
            case PingRequest():
                return self._handle_ping_request(now, message, source)
            case Nack():
                if self._probe is not None and message.number == self._probe.number:
                    self._probe.nacks = min(self._probe.asked, self._probe.nacks + 1)
                return []
            case GossipOnly():
                return []
            case _:
                assert_never(message)

    def _handle_ping(self, now: float, ping: Ping, packet: Packet, source: Address) -> list[Effect]:
        """The ack corrects whatever the ping said that is less than what I know."""
        if ping.target != self._roster.me.peer:
            self._counters["pings_for_another"] += 1
            return []
        corrections = {peer: self._beliefs.rumor(now, peer) for peer in self._outdated(packet.rumors)}
        sender = self._roster.get(packet.sender)
        if sender is not None and (sender.liveness is not Liveness.ALIVE or sender.epoch > packet.epoch):
            corrections[packet.sender] = self._beliefs.rumor(now, packet.sender)
        return [self._packer.send(source, Ack(ping.number), urgent=list(corrections.values()))]

    def _outdated(self, rumors: Iterable[Rumor]) -> list[PeerId]:
        members = [(rumor.member, self._roster.get(rumor.member.peer)) for rumor in rumors]
        return [mine.peer for theirs, mine in members if mine is not None and mine.precedence > theirs.precedence]

    def _answers_me(self, packet: Packet) -> bool:
        """Is this the ack of the one that I probe now?"""
        probe, message = self._probe, packet.message
        return probe is not None and packet.sender == probe.peer and isinstance(message, Ack) and message.number == probe.number

    def _handle_ack(self, now: float, ack: Ack, packet: Packet) -> list[Effect]:
        relay = self._relays.acked(ack.number)
        if relay is not None:
            return [self._packer.send(relay.asker, Ack(relay.number))]
        probe = self._probe
        if probe is None or ack.number != probe.number:
            self._counters["acks_late"] += 1
            return []
        if packet.sender == probe.peer and not probe.indirect:
            self._trips.add(now - probe.sent_at)
        self._probe = None
        self._beliefs.feel(-1)
        return []

    def _handle_ping_request(self, now: float, request: PingRequest, source: Address) -> list[Effect]:
        """Ping a member for somebody else: only one that I know, and only where I know it to be."""
        if request.target == self._roster.me.peer:
            return [self._packer.send(source, Ack(request.number))]
        if self._roster.get(request.target) is None:
            self._counters["ping_requests_unknown"] += 1
            return [self._packer.send(source, Nack(request.number))]
        number = self._next_number()
        patience = self._config.relay_timeout_share * self._config.ack_timeout
        if not self._relays.add(number, Relay(source, request.number, now + patience)):
            self._counters["relays_refused"] += 1
            return []
        return self._ping(now, request.target, number)

    def _next_number(self) -> int:
        self._number = (self._number + 1) % 2**32
        return self._number

    # Rumors

    def _doubts(self, now: float, peer: PeerId) -> list[Rumor]:
        """What the peer must hear of itself: that I hold it suspect, dead, left."""
        member = self._roster.get(peer)
        return [] if member is None or member.liveness is Liveness.ALIVE else [self._beliefs.rumor(now, peer)]

    def _gossip(self, now: float) -> list[Effect]:
        live = self._roster.live()
        if not live or not len(self._beliefs.queue):
            self._due[Routine.GOSSIP] = NEVER
            return []
        self._due[Routine.GOSSIP] = now + self._config.gossip_interval
        effects: list[Effect] = []
        for peer in self._rng.sample(live, min(len(live), self._config.gossip_fanout)):
            if len(self._beliefs.queue):
                effects += self._packer.send_to(peer, GossipOnly())
        return effects

    def _settle(self, now: float, effects: list[Effect]) -> list[Effect]:
        """What follows from the changes that an input made; ends every input."""
        for effect in effects:
            if isinstance(effect, MemberChanged) and effect.after.peer != self._roster.me.peer:
                self._note_change(now, effect)
        for peer in self._beliefs.take_forgotten():
            self._records.forget(peer)
        effects += self._tell_directly(now)
        if self._due[Routine.GOSSIP] == NEVER and len(self._beliefs.queue) and self._roster.live():
            small = len(self._roster.live()) <= self._config.direct_members_max
            self._due[Routine.GOSSIP] = now + (self._config.gossip_interval if small else 0.0)
        self._counters["packets_out"] += sum(1 for effect in effects if isinstance(effect, Send))
        return effects

    def _note_change(self, now: float, change: MemberChanged) -> None:
        member = change.after
        self._remembered.discard(member.peer)
        if member.liveness > Liveness.SUSPECT:
            return
        self._order.insert(member.peer)
        if change.before is None and len(self._roster.live()) <= self._config.direct_members_max:
            soon = now + self._config.first_sync_delay * self._rng.uniform(0.75, 1.25)
            self._due[Routine.SYNC] = min(self._due[Routine.SYNC], soon)

    def _tell_directly(self, now: float) -> list[Send]:
        """Each change once to everybody at once, and to whom it declares dead: that one may want to object."""
        urgent = self._beliefs.take_urgent(now)
        live = self._roster.live()
        if not urgent or len(live) > self._config.direct_members_max:
            return []
        accused = [rumor.member.peer for rumor in urgent if rumor.member.liveness is Liveness.DEAD]
        return self._packer.send_all((*live, *accused), self._packer.batches(urgent))

    # Push/pull

    def _sync_request(self, now: float) -> bytes:
        return wire.fill_sync(wire.SyncRequest, self._roster.me, self._all_rumors(now), self._all_records(now))

    def _sync_with(self, now: float, peer: PeerId) -> list[Effect]:
        address = self._roster.next_address(peer)
        return [] if address is None else [Sync(peer, address, self._sync_request(now))]

    def _sync_with_somebody(self, now: float) -> list[Effect]:
        members = self._beliefs.size
        scale = 1 if members <= SYNC_SCALES_ABOVE else math.ceil(math.log2(members) - math.log2(SYNC_SCALES_ABOVE)) + 1
        self._due[Routine.SYNC] = now + self._config.sync_interval * scale * self._rng.uniform(0.9, 1.1)
        live = self._roster.live()
        return [] if self._beliefs.left or not live else self._sync_with(now, self._rng.choice(live))

    def _reconnect(self, now: float) -> list[Effect]:
        """Try somebody who failed: the larger their share, the oftener, so that a healed partition is noticed soon."""
        self._due[Routine.RECONNECT] = now + self._config.reconnect_interval
        failed = (*self._roster.dead(), *self._remembered.peers())
        if self._beliefs.left or not failed:
            return []
        likely = self._rng.random() < len(failed) / max(1, len(self._roster.live()))
        if not likely and now - self._reconnected_at < self._config.reconnect_at_least:
            return []
        self._reconnected_at = now
        peer = self._rng.choice(failed)
        if self._roster.get(peer) is None:
            return [Sync(peer, self._remembered.next_address(peer), self._sync_request(now))]
        return self._sync_with(now, peer)

    def _meet_sender(self, now: float, packet: Packet, source: Address) -> list[Effect]:
        """Somebody talks to me whom I don't know, or not in this run: ask that one, seldom."""
        member = self._roster.get(packet.sender)
        if self._beliefs.left or (member is not None and member.epoch >= packet.epoch):
            return []
        self._counters["senders_unknown"] += 1
        if now - self._met_at < self._config.meet_interval:
            return []
        self._met_at = now
        return [Sync(packet.sender, source, self._sync_request(now))]

    def _take_sync(self, now: float, message: wire.SyncRequest | wire.SyncReply) -> list[Effect]:
        effects: list[Effect] = []
        if message.sender.peer == self._roster.me.peer:
            raise PeerError("push/pull with another run of this very peer")
        effects += self._beliefs.hear(now, Rumor(message.sender), urgent=True)
        for rumor in message.rumors:
            effects += self._beliefs.hear(now, rumor, synced=True)
        return effects + self._take_records(now, message.records)

    def _all_rumors(self, now: float) -> list[Rumor]:
        others = [member for member in self._roster.members() if member.peer != self._roster.me.peer]
        others.sort(key=lambda member: member.liveness)
        return [self._beliefs.rumor(now, member.peer) for member in others]

    def _all_records(self, now: float) -> list[Record]:
        return self._records.records(now, self._digestible(now))

    # Telemetry

    def _digestible(self, now: float) -> list[PeerId]:
        """Whose records are worth comparing: the dead publish nothing."""
        members = self._roster.members()
        gone = {member.peer: self._roster.gone_for(now, member.peer) for member in members}
        return [peer for peer, seconds in gone.items() if seconds is None or seconds < self._config.digest_dead_after]

    def _exchange_digest(self, now: float) -> list[Effect]:
        self._due[Routine.DIGEST] = now + self._config.digest_interval
        live = self._roster.live()
        if self._beliefs.left or not live:
            return []
        digest = self._records.digest(self._rng, self._digestible(now))
        return self._packer.send_to(self._rng.choice(live), GossipOnly(), digest=digest)

    def _compare_digest(self, now: float, digest: bytes, source: Address) -> list[Effect]:
        if not digest:
            return []
        records, older = self._records.compare(now, wire.unpack_digest(digest), self._digestible(now))
        effects: list[Effect] = [self._packer.send(source, GossipOnly(), digest=older)] if older else []
        return [*effects, *(Send(source, data) for data in self._packer.record_batches(records, REPLY_PACKETS_MAX))]

    def _take_records(self, now: float, records: Iterable[Record]) -> list[Effect]:
        effects: list[Effect] = []
        for record in records:
            if self._roster.get(record.peer) is None:
                self._counters["records_unknown"] += 1
            elif self._records.offer(now, record):
                effects.append(RecordChanged(record.peer, record.data))
            else:
                self._counters["records_stale"] += 1
        return effects
