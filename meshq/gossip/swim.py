"""Who is alive, and what their hardware does: the core of gossip.

Problem. Up to a thousand peers must agree within seconds on who takes part, without any of them being special, over a network
that loses, delays and doubles packets, and on machines that starve their agent of CPU because a task wants all of it.

Invariant. What `beliefs` promises: everybody's belief about a peer grows to the same greatest one, and only the peer itself can
outbid what is said of it. Every packet fits one datagram. Every queue and table is bounded. Bad data changes nothing.

Algorithm. Each interval one member is probed, and suspected if it does not answer in any way (`detector`). An unrefuted
suspicion that others confirm becomes a death (`suspicion`, `beliefs`). Local health scales the interval: who misses acks
that others get, or stalls, probes more slowly, as it is the likely cause itself. Rumors ride on all packets (`packer`), are
gossiped while there are any, and in meshes of up to 64 each change is told to everybody at once by whoever made it.
Push/pull with a random member, each half minute and soon after a member appeared, repairs what rumors missed (`pushpull`);
with dead members, it heals partitions of any length. Telemetry goes straight to everybody when it is published, in larger
meshes over a few seconds; what got lost is found by digests (`telemetry`). (To find most of it by digests costs as many
bytes, and is seconds later.) Who cannot be reached by UDP is served over TCP (`connectivity`).

Time. `deadline` says when `handle_timeout` wants to be called. Being called more than a second late means that this peer was
deaf in between: it distrusts its suspicions instead of burying members whose packets wait in its socket.

Limits. Full membership, so a few hundred peers in comfort, a thousand at most. A member that hears but is not heard (one-way
loss) is suspected and refuted in turns for as long as that lasts: SWIM cannot settle it (Suresh et al.: Rapid, ATC 2018), but
such a member knows that it flaps, and takes no new tasks (`flaps`).

Reading: Das, Gupta, Motivala: SWIM, 2002; Dadgar et al.: Lifeguard, arXiv:1707.00788; hashicorp/memberlist for the numbers.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from typing import TYPE_CHECKING, Final, assert_never

from meshq.config import RECORD_BYTES_MAX
from meshq.errors import PeerError
from meshq.gossip import wire
from meshq.gossip.beliefs import Beliefs
from meshq.gossip.connectivity import Connections, Connectivity
from meshq.gossip.detector import Detector
from meshq.gossip.effects import Answer, Effect, MemberChanged, NoteHeard, Send, Stream, Sync, TransportChanged
from meshq.gossip.member import Address, Liveness, Member
from meshq.gossip.packer import Origin, Packer
from meshq.gossip.profile import PROFILES, SwimConfig
from meshq.gossip.pushpull import PushPull
from meshq.gossip.remembered import Remembered
from meshq.gossip.roster import KnownPeer
from meshq.gossip.telemetry import RecordTable
from meshq.gossip.throttle import Throttle
from meshq.gossip.wire import Ack, GossipOnly, Nack, Packet, Ping, PingRequest
from meshq.ids import PeerId

if TYPE_CHECKING:
    from random import Random

__all__ = ["PROFILES", "Connectivity", "KnownPeer", "Swim", "SwimConfig"]

NEVER: Final = math.inf
FORGET_INTERVAL: Final = 60.0
REPLY_PACKETS_MAX: Final = 3  # of records in answer to one digest: the next digest asks again
SPREADING_MIN: Final = 1.0  # seconds in which a new record may still be on its way to everybody
REJOINS_AT_ONCE: Final = 8  # remembered peers that are tried at the start; the others by and by
SYNC_SCALES_ABOVE: Final = 32  # members; beyond, push/pull gets rarer with their logarithm (memberlist)

COUNTERS: Final = (
    "packets_in", "packets_out", "packets_own", "packets_ignored", "packets_misattributed", "packets_throttled",
    "pings_for_another", "ping_requests_unknown", "relays_refused", "acks_late", "probes_failed", "probes_abandoned", "hints",
    "suspicions_withheld", "deaths_unconfirmed", "refutations", "refutations_refused", "members_refused", "rumors_expired",
    "records_unknown", "records_stale", "senders_unknown", "syncs_own", "syncs_failed", "views_differed", "streams_failed",
    "stalls",
)  # fmt: skip


class Routine(StrEnum):
    """What is done again and again, in the order in which it is done when several are due."""

    PROBE = "probe"
    GOSSIP = "gossip"
    PUBLISH = "publish"
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
        self._connections = Connections()
        self._packer = Packer(
            self._beliefs, self._connections, Throttle(now), config.retransmit_multiplier, self._counters
        )  # fmt: skip
        self._detector = Detector(self._beliefs, self._connections, self._packer, config, rng, self._counters)
        self._pushpull = PushPull(self._beliefs, self._records, config, self._counters)
        self._remembered = Remembered(config.dead_kept)
        self._notes: dict[PeerId, bytes] = {}
        self._untold: list[PeerId] = []  # who is still to be told my newest record
        self._reconnected_at = now
        self._met_at = -NEVER
        self._stalled_at = -NEVER
        self._stalled_for = 0.0
        self._due = {
            Routine.PROBE: now + rng.uniform(0, config.probe_interval),
            Routine.GOSSIP: NEVER,
            Routine.PUBLISH: NEVER,
            Routine.DIGEST: now + rng.uniform(0, config.digest_interval),
            Routine.SYNC: now + rng.uniform(0.5, 1.0) * config.sync_interval,
            Routine.RECONNECT: now + rng.uniform(0.5, 1.0) * config.reconnect_interval,
            Routine.FORGET: now + FORGET_INTERVAL,
        }

    # Inputs

    def handle_packet(self, now: float, data: bytes, source: Address) -> list[Effect]:
        """An opened packet that came by UDP from `source`. MalformedData: state unchanged."""
        packet = wire.read_packet(data)
        return self._handle(now, packet, Origin(packet.sender, source))

    def handle_stream_packet(self, now: float, peer: PeerId, data: bytes) -> list[Effect]:
        """A packet of `peer` that came in a request over TCP; `Answer`s go back in its answer. PeerError: state unchanged."""
        packet = self._streamed(peer, data)
        effects: list[Effect] = []
        if isinstance(packet.message, GossipOnly) and self._roster.get(peer) is not None and self._connections.streamed(peer):
            effects.append(TransportChanged(peer, False))
        return effects + self._handle(now, packet, Origin(peer, None, awaited=True))

    def handle_stream_answer(self, now: float, peer: PeerId, data: bytes) -> list[Effect]:
        """A packet in the answer to a `Stream`. PeerError: state unchanged."""
        return self._handle(now, self._streamed(peer, data), Origin(peer, None))

    def handle_stream_failed(self, now: float, peer: PeerId) -> list[Effect]:
        """A `Stream` got no answer."""
        self._counters["streams_failed"] += 1
        return []

    def handle_refused(self, now: float, peer: PeerId) -> list[Effect]:
        """A connection to the peer was refused or reset: no proof of anything, but a reason to probe it at once."""
        if self._beliefs.quiet or not self._detector.hint(now, peer):
            return []
        self._counters["hints"] += 1
        self._due[Routine.PROBE] = now
        return self.handle_timeout(now)

    def handle_timeout(self, now: float) -> list[Effect]:
        """All that is due by `now`, in order."""
        effects: list[Effect] = []
        late = now - min(self._due.values())  # a suspicion that was just shortened may have been over for long
        if late > self._config.stall:
            effects += self.handle_stall(now, late)
        effects += self._detector.advance(now)
        effects += self._beliefs.bury(now, self._connections.heard_at)
        for routine in Routine:
            if self._due[routine] <= now:
                effects += self._run(now, routine)
        return self._settle(now, effects)

    def deadline(self) -> float:
        """When `handle_timeout` wants to be called."""
        return min(self._detector.deadline(), self._beliefs.deadline(), *self._due.values())

    def handle_sync_request(self, now: float, peer: PeerId, data: bytes) -> tuple[bytes, list[Effect]]:
        """Push/pull by `peer`, as its certificate says: the reply, and what follows. PeerError: state unchanged."""
        reply, effects = self._pushpull.handle_request(now, peer, data)
        return reply, self._settle(now, effects)

    def handle_sync_reply(self, now: float, peer: PeerId, data: bytes) -> list[Effect]:
        """The answer to a `Sync`, by this peer, as its certificate says. PeerError: state unchanged."""
        return self._settle(now, self._pushpull.handle_reply(now, peer, data))

    def handle_sync_failed(self, now: float, peer: PeerId | None) -> list[Effect]:
        """A `Sync` with this peer (None: a seed) got no answer: no proof of death. The next try takes the next address."""
        self._counters["syncs_failed"] += 1
        return []

    def handle_tcp(self, peer: PeerId, answered: bool) -> None:
        """A request of whatever kind to the peer was answered, or got nowhere: told to people, and nothing follows from it."""
        if self._roster.get(peer) is not None and peer != self._roster.me.peer:
            self._connections.asked_by_tcp(peer, answered)

    def handle_stall(self, now: float, seconds: float) -> list[Effect]:
        """The event loop was held up for so long. It makes my own probes suspect, and, if long, my suspicions.

        The shell's watch and a late timer may both report the same stall: it counts once, as the longer of them.
        """
        known = self._stalled_for if now - self._stalled_at < self._config.lag else 0.0
        if seconds <= self._config.lag or (known and not known <= self._config.stall < seconds):
            return []
        self._stalled_at, self._stalled_for = now, seconds
        self._counters["stalls"] += 1
        self._beliefs.feel(+1)
        if seconds > self._config.stall:
            self._beliefs.feel(+1)
            self._beliefs.distrust(now)
            self._detector.abandon()
            self._records.handle_stall(now, seconds)
        return []

    # Commands

    def join(self, now: float, seeds: Sequence[Address]) -> list[Effect]:
        """Push/pull with whoever answers there."""
        if self._beliefs.silent:
            return []  # it would make the older of the two clones take itself for the newer after its next start
        request = self._pushpull.everything(now)
        return [Sync(None, seed, request) for seed in dict.fromkeys(seeds) if seed not in self._roster.me.addresses]

    def remember(self, now: float, known: Sequence[KnownPeer]) -> list[Effect]:
        """Peers of an earlier run: some are tried now, all of them are tried again until they show up or are too old."""
        request = self._pushpull.everything(now)
        effects: list[Effect] = []
        for each in sorted(known, key=lambda each: (each.unseen_for, each.peer)):
            if self._roster.get(each.peer) is not None or not self._remembered.add(now, each):
                continue
            if len(effects) < REJOINS_AT_ONCE:
                effects.append(Sync(each.peer, self._remembered.next_address(each.peer), request))
        return effects

    def leave(self, now: float) -> list[Effect]:
        """Say that I go. The shell keeps calling for about a second, so that the rumor is passed on under loss."""
        self._detector.abandon()
        return self._introduce(now, replace(self._roster.me, liveness=Liveness.LEFT))

    def rename(self, now: float, name: str, named: int = 0) -> list[Effect]:
        """`named`: the step of `names.STEPS` on which I have it."""
        return self._introduce(now, replace(self._roster.me, name=name, named=named))

    def readdress(self, now: float, addresses: Sequence[Address]) -> list[Effect]:
        return self._introduce(now, replace(self._roster.me, addresses=tuple(addresses)))

    def note(self, note: bytes) -> None:
        """What the ledger says from now on in every packet: at most `wire.NOTE_BYTES_MAX` bytes."""
        self._packer.note = note

    def publish(self, now: float, record: bytes) -> list[Effect]:
        """Tell everybody my new telemetry: at most RECORD_BYTES_MAX bytes."""
        assert len(record) <= RECORD_BYTES_MAX
        mine = self._records.publish(now, self._roster.me.epoch, record)
        live = self._roster.live()
        if self._beliefs.quiet or not live:
            return []
        if len(live) > self._config.direct_members_max:
            self._untold = self._rng.sample(live, len(live))
            self._due[Routine.PUBLISH] = now
            return []
        return self._settle(now, self._packer.spread_record(now, live, mine))

    def _introduce(self, now: float, said: Member) -> list[Effect]:
        return self._settle(now, self._beliefs.introduce(now, said))

    # Views

    @property
    def me(self) -> Member:
        return self._roster.me

    @property
    def health(self) -> int:
        """0 is well; each point makes my probes slower."""
        return self._beliefs.health

    @property
    def clone(self) -> Member | None:
        """Another run with this identity, alive at the same time as this. The older of the two forgets it by and by."""
        return self._beliefs.clone

    @property
    def silent(self) -> bool:
        """Am I the newer of two clones, and so take no part any more?"""
        return self._beliefs.silent

    @property
    def counters(self) -> Mapping[str, int]:
        """How often what happened, above all what was dropped or refused."""
        return dict(self._counters)

    def damped(self, now: float) -> float:
        """For so many seconds this peer should claim no new task, because it flaps; 0 if it does not."""
        return self._beliefs.flaps.left(now)

    def members(self) -> tuple[Member, ...]:
        """All that are known, me included."""
        return self._roster.members()

    def member(self, peer: PeerId) -> Member | None:
        return self._roster.get(peer)

    def addresses(self, peer: PeerId) -> tuple[Address, ...]:
        """Where a known member may be reached, the address it was last heard from first."""
        return () if self._roster.get(peer) is None else self._roster.addresses(peer)

    def connectivity(self, now: float, peer: PeerId) -> Connectivity | None:
        """How the peer is reached; None for one that is not known."""
        if self._roster.get(peer) is None:
            return None
        path = self._connections.get(peer)
        return Connectivity(
            udp=path.udp,
            tcp=path.tcp,
            address=next(iter(self._roster.addresses(peer)), None),
            rtt=path.rtt,
            heard_seconds=None if path.heard_at is None else max(0.0, now - path.heard_at),
        )

    def record(self, peer: PeerId) -> bytes | None:
        """What the peer last published, as far as that got here."""
        held = self._records.get(peer)
        return None if held is None else held.data

    def record_age(self, now: float, peer: PeerId) -> float | None:
        """Seconds since the peer published it."""
        held = self._records.get(peer)
        return None if held is None else max(0.0, now - held.published_at)

    def read_late(self, peer: PeerId) -> bool:
        """Is `record_age` too little by nobody knows what, because I stood still while the record waited to be read?"""
        held = self._records.get(peer)
        return held is not None and held.late

    def known_peers(self, now: float) -> tuple[KnownPeer, ...]:
        """For the snapshot: everybody who is alive or failed, and who is still only remembered."""
        known = (replace(each, record=self.record(each.peer) or b"") for each in self._roster.known(now))
        return (*known, *self._remembered.known(now))

    def check(self) -> None:
        """Assert every invariant."""
        self._beliefs.check()
        self._detector.check()
        for table in (self._records.peers(), self._connections.peers(), self._notes):
            assert all(self._roster.get(peer) is not None for peer in table)
        assert not [peer for peer in self._remembered.peers() if self._roster.get(peer) is not None]

    # A packet

    def _streamed(self, peer: PeerId, data: bytes) -> Packet:
        packet = wire.read_packet(data)
        if packet.sender != peer:
            self._counters["packets_misattributed"] += 1
            raise PeerError("a packet over TCP names another sender than its certificate")
        return packet

    def _handle(self, now: float, packet: Packet, origin: Origin) -> list[Effect]:
        self._counters["packets_in"] += 1
        if packet.sender == self._roster.me.peer:
            self._counters["packets_own"] += 1
            return []
        if self._beliefs.silent:
            self._counters["packets_ignored"] += 1
            return []
        effects: list[Effect] = []
        for rumor in packet.rumors:
            effects += self._beliefs.hear(now, rumor)
        known = self._roster.get(packet.sender)
        if known is not None and known.epoch == packet.epoch:
            effects += self._hear_from(now, packet, origin)
        effects += self._pushpull.take_records(now, packet.records)
        effects += self._compare_digest(now, packet.digest, origin)
        effects += self._handle_message(now, packet, origin)
        effects += self._meet_sender(now, packet, origin)
        return self._settle(now, effects)

    def _hear_from(self, now: float, packet: Packet, origin: Origin) -> list[Effect]:
        """The packet is of the present run of a known member."""
        self._connections.heard(now, packet.sender)
        if origin.source is not None:
            self._roster.heard(packet.sender, packet.epoch, origin.source, proven=self._detector.expects(packet))
        if not packet.note or self._notes.get(packet.sender) == packet.note:
            return []
        self._notes[packet.sender] = packet.note
        return [NoteHeard(packet.sender, packet.note)]

    def _handle_message(self, now: float, packet: Packet, origin: Origin) -> list[Effect]:
        message = packet.message
        match message:
            case Ping():
                return self._detector.handle_ping(now, message, packet, origin)
            case Ack():
                return self._detector.handle_ack(now, message, packet, origin)
            case PingRequest():
                return self._detector.handle_ping_request(now, message, origin)
            case Nack():
                self._detector.handle_nack(message)
                return []
            case GossipOnly():
                return []
            case _:
                assert_never(message)

    def _meet_sender(self, now: float, packet: Packet, origin: Origin) -> list[Effect]:
        """Somebody talks to me whom I don't know, or not in this run: ask that one, seldom."""
        member = self._roster.get(packet.sender)
        if self._beliefs.quiet or origin.source is None or (member is not None and member.epoch >= packet.epoch):
            return []
        self._counters["senders_unknown"] += 1
        if now - self._met_at < self._config.meet_interval:
            return []
        self._met_at = now
        return [Sync(packet.sender, origin.source, self._pushpull.everything(now))]

    def _compare_digest(self, now: float, digest: bytes, origin: Origin) -> list[Effect]:
        if not digest:
            return []
        told_a_second = self._config.publish_batch / self._config.publish_interval
        spreading = SPREADING_MIN + self._beliefs.size / told_a_second
        records, older = self._records.compare(now, wire.split_digest(digest), self._roster.by_short, spreading)
        effects = self._packer.answer(now, origin, GossipOnly(), digest=older) if older else []
        return effects + self._packer.answer_records(now, origin, records, REPLY_PACKETS_MAX)

    # Routines

    def _run(self, now: float, routine: Routine) -> list[Effect]:
        match routine:
            case Routine.PROBE:
                self._due[routine] = now + self._config.probe_interval * (1 + self._beliefs.health)
                return [] if self._beliefs.quiet else self._detector.start(now)
            case Routine.GOSSIP:
                return self._gossip(now)
            case Routine.PUBLISH:
                return self._publish_on(now)
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

    def _gossip(self, now: float) -> list[Effect]:
        live = self._roster.live()
        if self._beliefs.silent or not live or not len(self._beliefs.queue):
            self._due[Routine.GOSSIP] = NEVER
            return []
        self._due[Routine.GOSSIP] = now + self._config.gossip_interval
        effects: list[Effect] = []
        for peer in self._rng.sample(live, min(len(live), self._config.gossip_fanout)):
            if len(self._beliefs.queue):
                effects += self._packer.send(now, peer, GossipOnly())
        return effects

    def _publish_on(self, now: float) -> list[Effect]:
        """The next few hear of my newest record."""
        batch = [peer for peer in self._untold[: self._config.publish_batch] if self._roster.get(peer) is not None]
        del self._untold[: self._config.publish_batch]
        self._due[Routine.PUBLISH] = now + self._config.publish_interval if self._untold else NEVER
        mine = self._records.records(now, (self._roster.me.peer,))
        return [] if self._beliefs.quiet or not mine else self._packer.spread_record(now, batch, mine[0])

    def _exchange_digest(self, now: float) -> list[Effect]:
        self._due[Routine.DIGEST] = now + self._config.digest_interval * self._rng.uniform(0.9, 1.1)
        live = self._roster.live()
        if self._beliefs.quiet or not live:
            return []
        digest = self._records.digest(self._rng, self._roster.publishing(now, self._config.digest_dead_after))
        return self._packer.send(now, self._rng.choice(live), GossipOnly(), digest=digest)

    def _sync_with_somebody(self, now: float) -> list[Effect]:
        members = self._beliefs.size
        scale = 1 if members <= SYNC_SCALES_ABOVE else math.ceil(math.log2(members) - math.log2(SYNC_SCALES_ABOVE)) + 1
        self._due[Routine.SYNC] = now + self._config.sync_interval * scale * self._rng.uniform(0.9, 1.1)
        live = self._roster.live()
        return [] if self._beliefs.quiet or not live else self._pushpull.ask(now, self._rng.choice(live))

    def _reconnect(self, now: float) -> list[Effect]:
        """Try somebody who failed: the larger their share, the oftener, so that a healed partition is noticed soon."""
        self._due[Routine.RECONNECT] = now + self._config.reconnect_interval
        failed = (*self._roster.dead(), *self._remembered.peers())
        if self._beliefs.quiet or not failed:
            return []
        likely = self._rng.random() < len(failed) / max(1, len(self._roster.live()))
        if not likely and now - self._reconnected_at < self._config.reconnect_at_least:
            return []
        self._reconnected_at = now
        peer = self._rng.choice(failed)
        if self._roster.get(peer) is None:
            return [Sync(peer, self._remembered.next_address(peer), self._pushpull.everything(now))]
        return self._pushpull.tell(now, peer)

    def _forget(self, now: float) -> list[Effect]:
        self._due[Routine.FORGET] = now + FORGET_INTERVAL
        self._beliefs.forget_expired(now)
        self._remembered.forget_expired(now)
        return []

    # What follows from changes

    def _settle(self, now: float, effects: list[Effect]) -> list[Effect]:
        """What follows from the changes that an input made; ends every input."""
        for effect in effects:
            if isinstance(effect, MemberChanged) and effect.after.peer != self._roster.me.peer:
                self._note_change(now, effect)
        for peer in self._beliefs.take_forgotten():
            self._records.forget(peer)
            self._connections.forget(peer)
            self._detector.forget(peer)
            self._notes.pop(peer, None)
        effects += self._tell_directly(now)
        waits = len(self._beliefs.queue) and self._roster.live() and not self._beliefs.silent
        if self._due[Routine.GOSSIP] == NEVER and waits:
            small = len(self._roster.live()) <= self._config.direct_members_max
            self._due[Routine.GOSSIP] = now + (self._config.gossip_interval if small else 0.0)
        self._counters["packets_out"] += sum(1 for effect in effects if isinstance(effect, Send | Stream | Answer))
        return effects

    def _note_change(self, now: float, change: MemberChanged) -> None:
        member = change.after
        self._remembered.discard(member.peer)
        if change.before is not None and change.before.epoch != member.epoch:
            self._connections.renew(member.peer)
        if member.liveness > Liveness.SUSPECT:
            return
        self._detector.insert(member.peer)
        if change.before is None and len(self._roster.live()) <= self._config.direct_members_max:
            soon = now + self._config.first_sync_delay * self._rng.uniform(0.75, 1.25)
            self._due[Routine.SYNC] = min(self._due[Routine.SYNC], soon)

    def _tell_directly(self, now: float) -> list[Effect]:
        """Each change once to everybody at once, and to whom it declares dead: that one may want to object."""
        urgent = self._beliefs.take_urgent(now)
        if self._beliefs.silent:
            urgent = [rumor for rumor in urgent if rumor.member.peer == self._roster.me.peer]
        live = self._roster.live()
        if not urgent or len(live) > self._config.direct_members_max:
            return []
        buried = [rumor.member.peer for rumor in urgent if rumor.member.liveness is Liveness.DEAD]
        return self._packer.spread(now, (*live, *buried), urgent)
