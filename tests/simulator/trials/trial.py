"""One mesh of real cores on virtual time, and what every scenario does with it: begin, do harm, wait, measure.

Up to `COLD_PEERS_MAX` peers begin as in a lab: they start within a second and join by the first. More of them would spend their
first minutes, and most of the trial's time, with a thousand joins that nobody wants to measure; they begin with a view of
everybody that is handed to them as one push/pull, and with routines at random phases.

What a core does not do itself is done here as the agent does it: telemetry is published when the agent would publish it, a
stall is noticed, and the addresses that mDNS shows are tried again while they belong to no live member.
"""

import functools
import struct
import time
from collections import Counter
from collections.abc import Callable
from typing import Final
from unittest.mock import patch

from meshq.agent import TELEMETRY_SECONDS
from meshq.gossip import wire
from meshq.gossip.discovery import RETRY_MAX, RETRY_MIN
from meshq.gossip.member import Liveness
from meshq.gossip.swim import Routine
from meshq.gossip.wire import Rumor, SyncReply
from tests.simulator.gossip_peer import GossipPeer, Mesh
from tests.simulator.trials.counting import Counts, Traffic
from tests.simulator.trials.setup import SECONDS_MAX, Result, Setup, Wrongs
from tests.simulator.world import Network, World

COLD_PEERS_MAX: Final = 32
CALM_SECONDS: Final = 20.0  # before anything is measured: round trips are known, first push/pulls are done
CALM_SECONDS_LARGE: Final = 4.0  # with more than LARGE_PEERS: of a probe in a second, each has made a few
LARGE_PEERS: Final = 128
LOOK_SECONDS: Final = 0.05  # between looks whether something has come about; what is measured has its own time
CHECK_EVERY: Final = 256  # inputs of a core
PAIRS_SAMPLED: Final = 2_000  # at each look at the age of telemetry
_PUBLISHED_AT: Final = struct.Struct(">d")


class Trial:
    """`figures` and `happened` are for the scenario to fill."""

    def __init__(self, setup: Setup) -> None:
        self._began = time.perf_counter()
        self.setup = setup
        self.world = World(setup.seed)
        self.network = Network(self.world)
        self.rng = self.world.rng_for("trial")
        self.config = setup.swim_config()
        self.counts = Counts(self.world)
        self.mesh = Mesh(self.world, self.network, self.config, CHECK_EVERY)
        self.counts.attach(self.mesh)
        self.peers = [self.mesh.add(f"peer-{number}") for number in range(setup.peers)]
        self.figures: dict[str, list[float]] = {}
        self.happened: Counter[str] = Counter()
        self._measured_from = 0.0

    # ---- the beginning

    def begin(self) -> None:
        """Everybody runs, knows everybody and has calmed down. Loss begins here."""
        if len(self.peers) <= COLD_PEERS_MAX:
            self.start_cold()
        else:
            self.start_warm()
        calm = CALM_SECONDS if len(self.peers) <= LARGE_PEERS else CALM_SECONDS_LARGE
        self.run(calm + self.rng.uniform(0.0, 1.0))
        self.network.loss = self.setup.loss
        if self.setup.record_bytes:
            for peer in self.peers:
                self._begin_telemetry(peer)
            self.run(2 * self.publish_seconds)
        self.measure()

    def start_cold(self) -> None:
        """All start within a second, join by the first, and are waited for."""
        first, *others = self.peers
        first.start()
        for peer in others:
            self.world.call_later(self.rng.uniform(0.0, 1.0), peer.start, [first])
        formed = self.wait(lambda: len(self.mesh.running()) == len(self.peers) and self.mesh.converged())
        assert formed, "the mesh never formed"

    def start_warm(self) -> None:
        """All know all, and nobody has anything to tell."""
        for peer in self.peers:
            peer.start()
        rumors = [Rumor(peer.core.me) for peer in self.peers]
        replies = [wire.fill_sync(SyncReply, peer.core.me, rumors, ()) for peer in self.peers[:2]]
        # A million beliefs would take a gigabyte and minutes. Reading is pure and its results cannot change: once is enough.
        with patch.object(wire, "read_sync_reply", functools.cache(wire.read_sync_reply)):
            for peer in self.peers:
                other = peer is self.peers[0]
                # What it would do next is not done: all know all.
                peer.core.handle_sync_reply(self.world.now, self.peers[other].id, replies[other])
                self._forget_the_news(peer)
        assert self.mesh.converged()

    def _forget_the_news(self, peer: GossipPeer) -> None:
        """Nothing is left to tell, and the next push/pull comes at a random time."""
        core = peer.core
        for other in self.peers:
            core._beliefs.queue.discard(other.id)
        core._due[Routine.SYNC] = self.world.now + self.rng.uniform(0.0, self.config.sync_interval)
        peer.perform([])

    # ---- what an agent does beside its core

    @property
    def publish_seconds(self) -> float:
        return max(TELEMETRY_SECONDS, len(self.peers) / 50)

    def _begin_telemetry(self, peer: GossipPeer) -> None:
        def periodically() -> None:
            self.publish(peer)
            self.world.call_later(self.publish_seconds, periodically)

        def on_change() -> None:
            self.publish(peer)
            self.world.call_later(self.rng.expovariate(1 / self.setup.change_seconds), on_change)

        self.world.call_later(self.rng.uniform(0.0, self.publish_seconds), periodically)
        self.world.call_later(self.rng.expovariate(1 / self.setup.change_seconds), on_change)

    def publish(self, peer: GossipPeer) -> None:
        """A record that says when it was published; nothing from a process that is stopped."""
        if peer.awake:
            peer.publish(_PUBLISHED_AT.pack(self.world.now) + bytes(max(0, self.setup.record_bytes - _PUBLISHED_AT.size)))

    def stop(self, peer: GossipPeer, seconds: float) -> None:
        """As SIGSTOP and SIGCONT. The agent's watch notices before or after what has piled up is read."""
        watch_first = self.rng.random() < 0.5
        if watch_first:
            self.world.call_later(seconds, self._notice_stall, peer, peer.epoch, seconds)
        peer.pause(seconds)
        if not watch_first:
            self.world.call_later(seconds, self._notice_stall, peer, peer.epoch, seconds)
        self.happened["stops"] += 1

    def _notice_stall(self, peer: GossipPeer, epoch: int, seconds: float) -> None:
        if peer.swim is not None and peer.epoch == epoch:
            peer.perform(peer.core.handle_stall(self.world.now, seconds))

    def begin_discovery(self) -> None:
        """Everybody has seen everybody's address by mDNS and tries it again, ever more seldom, while nobody live has it."""
        for peer in self.peers:
            self.world.call_later(self.rng.uniform(0.0, RETRY_MIN), self._try_again, peer, {})

    def _try_again(self, peer: GossipPeer, tries: dict[str, tuple[float, float]]) -> None:
        """`tries`: of those that are not live, when the next one is due and the pause after it."""
        now = self.world.now
        for other in self.peers if peer.awake else ():
            member = peer.core.member(other.id)
            if other is peer or (member is not None and member.liveness <= Liveness.SUSPECT):
                tries.pop(other.name, None)
                continue
            due, pause = tries.get(other.name, (now, RETRY_MIN))
            if due <= now:
                tries[other.name] = (now + pause, min(RETRY_MAX, 2 * pause))
                peer.perform(peer.core.join(now, [other.address]))
                self.happened["addresses tried again"] += 1
        self.world.call_later(RETRY_MIN, self._try_again, peer, tries)

    # ---- time

    def run(self, seconds: float) -> None:
        self.world.run_until(self.world.now + seconds)

    def wait(self, predicate: Callable[[], bool], limit: float = SECONDS_MAX) -> bool:
        """Until it holds; looks seldom, since looking at a thousand peers takes longer than what they do meanwhile."""
        end = self.world.now + limit
        while not predicate():
            if self.world.now >= end:
                return False
            self.world.run_until(min(end, self.world.now + LOOK_SECONDS))
        return True

    # ---- measuring

    def measure(self) -> None:
        """From here on, traffic and wrongs count."""
        self.counts.begin()
        self._measured_from = self.world.now

    def add(self, figure: str, *samples: float) -> None:
        self.figures.setdefault(figure, []).extend(samples)

    def add_traffic(self) -> None:
        """A sample a peer: what went over the wire since `measure`, in a second."""
        seconds = self.world.now - self._measured_from
        of_peers = [self.counts.traffic.get(peer.name, Traffic()) for peer in self.peers]
        self.add("UDP sent (kB/s a peer)", *(each.bytes_out / seconds / 1000 for each in of_peers))
        self.add("UDP received (kB/s a peer)", *(each.bytes_in / seconds / 1000 for each in of_peers))
        self.add("UDP packets sent (/s a peer)", *(each.packets_out / seconds for each in of_peers))
        self.add("UDP packets received (/s a peer)", *(each.packets_in / seconds for each in of_peers))
        self.add("TCP both ways (kB/s a peer)", *(each.tcp_bytes / seconds / 1000 for each in of_peers))

    def add_telemetry_ages(self) -> None:
        """Samples of pairs: how old is what the one has of the other, and by how much it is mistaken about that."""
        running = self.mesh.running()
        now = self.world.now
        for _ in range(min(PAIRS_SAMPLED, len(running) * (len(running) - 1))):
            observer, subject = self.rng.sample(running, 2)
            record, shown = observer.core.record(subject.id), observer.core.record_age(now, subject.id)
            if record is None or shown is None:
                self.counts.tally["telemetry missing"] += 1
                continue
            age = now - _PUBLISHED_AT.unpack_from(record)[0]
            self.add("telemetry age (s)", age)
            self.add("telemetry age, shown wrong by (s)", abs(shown - age))

    def result(self) -> Result:
        traffic = self.network.traffic
        assert self.setup.loss == 0 or traffic.dropped > 0, "nothing was lost"
        happened = Counter(self.happened)
        happened.update({"packets lost": traffic.dropped, "packets cut": traffic.cut, "packets sent": traffic.sent})
        return Result(
            setup=self.setup,
            figures={name: tuple(samples) for name, samples in self.figures.items()},
            wrongs=self._wrongs(),
            counts=dict(sorted(self.counts.tally.items())),
            happened=dict(sorted(happened.items())),
            peer_hours=len(self.peers) * (self._measured_until() - self._measured_from) / 3600,
            real_seconds=time.perf_counter() - self._began,
            trace_hash=self.world.trace_hash(),
        )

    def _measured_until(self) -> float:
        return self.world.now if self.counts.ended_at is None else self.counts.ended_at

    def _wrongs(self) -> Wrongs:
        deaths = self.counts.false_deaths.values()
        healthy = [death for death in deaths if not death.harmed]
        believed = [death for death in healthy if death.views]
        return Wrongs(
            suspicions=self.counts.suspicions,
            suspicions_harmed=self.counts.suspicions_harmed,
            deaths=len(deaths),
            deaths_healthy=len(healthy),
            deaths_believed=len(believed),
            views_max=max((len(death.views) for death in believed), default=0),
            words_min=min((len(death.words) for death in believed), default=0),
        )
