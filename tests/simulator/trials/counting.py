"""The ledger of a trial: who sent how much, who learnt what when, and who was wronged.

Bytes by UDP are those of sealed datagrams: the plaintext and what sealing adds, without the headers of UDP and IP (28 or 48
bytes a packet). Bytes by TCP are the bodies of requests and answers, without those of HTTP, TLS, TCP and IP.

A suspicion is counted when a probe of a peer that runs has failed. A death is false if it is believed of a peer that runs, be
it stopped or cut off; one of one incarnation is one death, in however many views. Behind it stand the words of those whose own
probes of this incarnation failed.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from meshq.gossip.effects import Effect, MemberChanged, ProbeFailed, Send
from meshq.gossip.member import Liveness, Member
from meshq.ids import PeerId
from meshq.trust.seal import OVERHEAD_BYTES
from tests.simulator.gossip_peer import GossipPeer, Mesh
from tests.simulator.world import World


@dataclass(slots=True)
class Traffic:
    """Of one peer, since the count began."""

    packets_out: int = 0
    packets_in: int = 0
    bytes_out: int = 0
    bytes_in: int = 0
    tcp_bytes: int = 0  # both ways


@dataclass(slots=True)
class FalseDeath:
    """`harmed`: the trial had made the subject look dead. `views`: who believed it; those that the trial had harmed themselves
    stand in `harmed_views`. `words`: whose own probes had failed."""

    harmed: bool
    words: dict[str, None]
    views: dict[str, None] = field(default_factory=dict)
    harmed_views: dict[str, None] = field(default_factory=dict)


Incarnation = tuple[PeerId, int, int]
"""Peer, epoch, incarnation: what one suspicion or death is about."""


class Counts:
    """The watcher of a mesh. `harmed` are the peers to which the trial does what others may take for death."""

    def __init__(self, world: World) -> None:
        self.traffic: dict[str, Traffic] = {}
        self.tally: Counter[str] = Counter()
        self.false_deaths: dict[Incarnation, FalseDeath] = {}
        self.harmed: dict[str, None] = {}
        self.learnt: dict[str, float] = {}  # who knows what `watch` asked for, and since when
        self._world = world
        self._mesh: Mesh | None = None
        self.suspicions = self.suspicions_harmed = 0  # of healthy peers by healthy peers; all others
        self.ended_at: float | None = None
        self._subject: PeerId | None = None
        self._is_it: Callable[[Member], bool] = lambda member: False
        self._words: dict[Incarnation, dict[str, None]] = {}

    def attach(self, mesh: Mesh) -> None:
        mesh.watcher = self
        self._mesh = mesh

    def watch(self, subject: PeerId, is_it: Callable[[Member], bool]) -> None:
        """From now on, note when each peer's belief about the subject is such."""
        self.learnt, self._subject, self._is_it = {}, subject, is_it

    def begin(self) -> None:
        """Count traffic and wrongs from here."""
        self.traffic = {name: Traffic() for name in self.traffic}
        self.tally.clear()
        self.false_deaths.clear()
        self.suspicions = self.suspicions_harmed = 0
        self.ended_at = None

    def end(self) -> None:
        """What is wrong from here on is not counted."""
        self.ended_at = self._world.now

    # ---- as a Watcher

    def effect(self, peer: GossipPeer, effect: Effect) -> None:
        match effect:
            case Send(_, packet):
                traffic = self._of(peer)
                traffic.packets_out += 1
                traffic.bytes_out += len(packet) + OVERHEAD_BYTES
            case MemberChanged(_, after):
                self._believed(peer, after)
            case ProbeFailed(subject):
                self._suspected(peer, subject)
            case _:
                self.tally[type(effect).__name__] += 1

    def received(self, peer: GossipPeer, plain_bytes: int) -> None:
        traffic = self._of(peer)
        traffic.packets_in += 1
        traffic.bytes_in += plain_bytes + OVERHEAD_BYTES

    def streamed(self, source: GossipPeer, destination: GossipPeer, plain_bytes: int) -> None:
        self._of(source).tcp_bytes += plain_bytes
        self._of(destination).tcp_bytes += plain_bytes

    def _of(self, peer: GossipPeer) -> Traffic:
        traffic = self.traffic.get(peer.name)
        if traffic is None:
            traffic = self.traffic[peer.name] = Traffic()
        return traffic

    def _believed(self, observer: GossipPeer, after: Member) -> None:
        if after.peer == self._subject and observer.name not in self.learnt and self._is_it(after):
            self.learnt[observer.name] = self._world.now
        if after.liveness is Liveness.DEAD and after.peer != observer.id and self._is_false(after):
            incarnation = (after.peer, after.epoch, after.incarnation)
            if incarnation not in self.false_deaths:
                harmed = self._peer(after.peer).name in self.harmed
                self.false_deaths[incarnation] = FalseDeath(harmed, self._words.setdefault(incarnation, {}))
            death = self.false_deaths[incarnation]
            (death.harmed_views if observer.name in self.harmed else death.views)[observer.name] = None

    def _is_false(self, death: Member) -> bool:
        subject = self._peer(death.peer)
        if subject.swim is None or self.ended_at is not None:
            return False
        me = subject.core.me
        return me.liveness is Liveness.ALIVE and death.epoch == me.epoch

    def _suspected(self, observer: GossipPeer, suspect: PeerId) -> None:
        member, subject = observer.core.member(suspect), self._peer(suspect)
        if member is None or subject.swim is None:
            return
        self._words.setdefault((suspect, member.epoch, member.incarnation), {})[observer.name] = None
        if self.ended_at is not None:
            return
        if subject.name in self.harmed or observer.name in self.harmed:
            self.suspicions_harmed += 1
        else:
            self.suspicions += 1

    def _peer(self, peer: PeerId) -> GossipPeer:
        assert self._mesh is not None
        return self._mesh.by_id[peer]
