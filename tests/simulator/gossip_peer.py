"""A real `Swim` core in the simulated world: one that can crash, restart, stall and leave.

`Mesh` is the wiring: it knows which peer is where and carries packets and syncs over the network. Wider simulations put a
`GossipPeer` beside their other cores and listen with `on_effect`.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from meshq.errors import PeerError
from meshq.gossip.effects import Effect, MemberChanged, ProbeFailed, RecordChanged, Refuted, Send, Sync
from meshq.gossip.member import Address, Liveness, Member
from meshq.gossip.swim import PROFILES, Swim, SwimConfig
from meshq.gossip.wire import PACKET_PLAIN_BYTES_MAX
from meshq.ids import Epoch, PeerId, base32
from tests.simulator.world import Handle, Network, World

SYNC_TIMEOUT = 5.0


def peer_for(name: str) -> PeerId:
    """A well-formed peer id that belongs to `name`."""
    return PeerId(base32(hashlib.sha256(name.encode()).digest()))


def address_for(number: int) -> Address:
    return Address(f"10.0.{number // 250}.{number % 250 + 1}", 7733)


@dataclass
class Mesh:
    """All simulated peers by address."""

    world: World
    network: Network
    config: SwimConfig = PROFILES["lan"]
    peers: dict[Address, "GossipPeer"] = field(default_factory=dict)

    def add(self, name: str, on_effect: Callable[[Effect], None] | None = None) -> "GossipPeer":
        """A new peer at an address of its own; not started."""
        peer = GossipPeer(self, name, address_for(len(self.peers)), on_effect)
        self.peers[peer.address] = peer
        return peer

    def running(self) -> list["GossipPeer"]:
        return [peer for peer in self.peers.values() if peer.swim is not None]

    def converged(self) -> bool:
        """Do all that run hold exactly each other alive, and agree on it?"""
        running = self.running()
        expected = {peer.id: peer.core.me for peer in running}
        return all({m.peer: m for m in peer.core.members() if m.liveness <= Liveness.SUSPECT} == expected for peer in running)


class GossipPeer:
    """The shell of one core: carries out its effects in the world and arms its one timer."""

    def __init__(self, mesh: Mesh, name: str, address: Address, on_effect: Callable[[Effect], None] | None) -> None:
        self.mesh = mesh
        self.name = name
        self.id = peer_for(name)
        self.address = address
        self.epoch = 0  # persists over crashes, as the home does
        self.swim: Swim | None = None
        self.changes: list[tuple[float, MemberChanged]] = []
        self.refuted: list[Refuted] = []
        self.syncs = 0
        self.paused_until = 0.0
        self._on_effect = on_effect
        self._timer: Handle | None = None
        self._run = 0  # tells callbacks of an earlier run apart
        self._backlog: list[Callable[[], None]] = []

    @property
    def core(self) -> Swim:
        assert self.swim is not None, f"{self.name} does not run"
        return self.swim

    def start(self, seeds: Sequence["GossipPeer"] = ()) -> None:
        """A new run, with a higher epoch, that joins by the seeds."""
        assert self.swim is None
        self.epoch += 1
        self._run += 1
        world = self.mesh.world
        me = Member(
            peer=self.id, epoch=Epoch(self.epoch), incarnation=0, liveness=Liveness.ALIVE,
            name=self.name, addresses=(self.address,), version="0.1.0",
        )  # fmt: skip
        self.swim = Swim(me, self.mesh.config, world.rng_for(f"{self.name}/{self.epoch}"), world.now)
        self.perform(self.swim.join(world.now, [seed.address for seed in seeds]))

    def crash(self) -> None:
        """Gone without a word."""
        self.swim = None
        self._backlog.clear()
        if self._timer is not None:
            self._timer.cancel()

    def leave(self) -> None:
        """Say so, pass it on for a second, and go."""
        self.perform(self.core.leave(self.mesh.world.now))
        self.mesh.world.call_later(1.0, self.crash)

    def pause(self, seconds: float) -> None:
        """The process is stopped: packets wait in its socket and timers are late."""
        self.paused_until = self.mesh.world.now + seconds
        if self._timer is not None:
            self._timer.cancel()
        self.mesh.world.call_later(seconds, self._resume, self._run)

    def publish(self, record: bytes) -> None:
        self.perform(self.core.publish(self.mesh.world.now, record))

    def perform(self, effects: list[Effect]) -> None:
        """Carry out what the core asks for, then arm its timer."""
        core = self.core
        core.check()
        for effect in effects:
            self._perform(effect)
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.mesh.world.call_at(core.deadline(), self._time_out, self._run)

    def receive(self, data: bytes, source: Address) -> None:
        self._when_awake(lambda: self.perform(self.core.handle_packet(self.mesh.world.now, data, source)))

    def _perform(self, effect: Effect) -> None:
        world, mesh = self.mesh.world, self.mesh
        match effect:
            case Send():
                assert len(effect.packet) <= PACKET_PLAIN_BYTES_MAX
                world.trace(self.name, "send", str(effect.address), effect.packet)
                target = mesh.peers.get(effect.address)
                if target is not None:
                    mesh.network.send(self.name, target.name, target.receive, effect.packet, self.address)
            case Sync():
                world.trace(self.name, "sync", str(effect.address), effect.request)
                self._sync(effect)
            case MemberChanged():
                world.trace(self.name, repr(effect))
                self.changes.append((world.now, effect))
            case Refuted():
                self.refuted.append(effect)
                self.epoch = max(self.epoch, self.core.me.epoch)
            case RecordChanged() | ProbeFailed():
                world.trace(self.name, repr(effect))
        if self._on_effect is not None:
            self._on_effect(effect)

    def _sync(self, sync: Sync) -> None:
        """A request and its reply over TCP; whatever goes wrong is a failure after a timeout."""
        run, network = self._run, self.mesh.network
        target = self.mesh.peers.get(sync.address)
        self.syncs += 1
        timeout = self.mesh.world.call_later(SYNC_TIMEOUT, lambda: self._if_running(run, self._sync_failed, sync.address))

        def answered(reply: bytes) -> None:
            timeout.cancel()
            self._if_running(run, self._sync_answered, reply)

        def asked() -> None:
            if target is not None and target.swim is not None:
                reply, effects = target.core.handle_sync_request(self.mesh.world.now, sync.request)
                target.perform(effects)
                network.send(target.name, self.name, answered, reply, reliable=True)

        if target is not None:
            network.send(self.name, target.name, lambda: target._when_awake(asked), reliable=True)

    def _sync_answered(self, reply: bytes) -> None:
        try:
            self.perform(self.core.handle_sync_reply(self.mesh.world.now, reply))
        except PeerError as error:
            self.mesh.world.trace(self.name, str(error))

    def _sync_failed(self, address: Address) -> None:
        self.perform(self.core.handle_sync_failed(self.mesh.world.now, address))

    def _time_out(self, run: int) -> None:
        if run == self._run and self.swim is not None:
            self.perform(self.swim.handle_timeout(self.mesh.world.now))

    def _if_running(self, run: int, call: Callable[..., None], *args: object) -> None:
        if run == self._run and self.swim is not None:
            self._when_awake(lambda: call(*args))

    def _when_awake(self, call: Callable[[], None]) -> None:
        if self.swim is None:
            return
        if self.mesh.world.now < self.paused_until:
            self._backlog.append(call)
        else:
            call()

    def _resume(self, run: int) -> None:
        """The timer first: a process that wakes up may well see it before it reads its socket."""
        if run != self._run or self.swim is None:
            return
        self._time_out(run)
        waiting, self._backlog = self._backlog, []
        for call in waiting:
            self._when_awake(call)
