"""A real `Swim` core in the simulated world: one that can crash, restart, stall and leave.

`Mesh` is the wiring: it knows which peer is where and carries packets, streams and syncs over the network. Wider simulations
put a `GossipPeer` beside their other cores and listen with `on_effect`; experiments listen with a `Watcher`.

A peer that crashed is gone without a word, as a machine without power. One that was killed leaves a machine behind that
refuses connections.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Protocol, assert_never

from meshq.errors import PeerError
from meshq.gossip import effects as does
from meshq.gossip.effects import Answer, Cloned, Effect, MemberChanged, Refuted, Send, Stream, Sync, TransportChanged
from meshq.gossip.member import Address, Liveness, Member
from meshq.gossip.swim import PROFILES, Swim, SwimConfig
from meshq.gossip.wire import PACKET_PLAIN_BYTES_MAX
from meshq.ids import Epoch, PeerId, base32
from tests.simulator.world import Clock, Handle, Network, World

SYNC_TIMEOUT = 5.0
STREAM_TIMEOUT = 5.0
CONNECTION_SECONDS = 75.0  # that a connection stays open after its last use
WALL_SECONDS = 1_700_000_000  # the wall clock of all peers when the world begins


class Watcher(Protocol):
    """Who counts what peers do. Everything it is told has just happened."""

    def effect(self, peer: "GossipPeer", effect: Effect) -> None: ...

    def received(self, peer: "GossipPeer", plain_bytes: int) -> None:
        """By UDP."""

    def streamed(self, source: "GossipPeer", destination: "GossipPeer", plain_bytes: int) -> None:
        """By TCP: one request or one answer, of a sync or a stream, was sent."""


def peer_for(name: str) -> PeerId:
    """A well-formed peer id that belongs to `name`."""
    return PeerId(base32(hashlib.sha256(name.encode()).digest()))


def address_for(number: int) -> Address:
    return Address(f"10.0.{number // 250}.{number % 250 + 1}", 7733)


@dataclass
class Mesh:
    """All simulated peers by address. `check_every`: of so many inputs of a peer, one is followed by its core's `check`."""

    world: World
    network: Network
    config: SwimConfig = PROFILES["lan"]
    check_every: int = 1
    watcher: Watcher | None = None
    copies: int = 0
    peers: dict[Address, "GossipPeer"] = field(default_factory=dict)
    by_id: dict[PeerId, "GossipPeer"] = field(default_factory=dict)
    used: dict[tuple[str, int, str, int], float] = field(
        default_factory=dict
    )  # when connections were, by the runs at their ends

    def add(self, name: str, on_effect: Callable[[Effect], None] | None = None, clock: Clock | None = None) -> "GossipPeer":
        """A new peer at an address of its own; not started."""
        peer = GossipPeer(self, name, address_for(len(self.peers)), on_effect, clock or Clock(self.world))
        self.peers[peer.address] = self.by_id[peer.id] = peer
        return peer

    def copy(self, original: "GossipPeer", name: str, on_effect: Callable[[Effect], None], clock: Clock) -> "GossipPeer":
        """A second peer of the same identity, as another machine with a copy of its home is; not started."""
        peer = GossipPeer(self, name, address_for(len(self.peers)), on_effect, clock)
        peer.id, peer.epoch = original.id, original.epoch
        self.peers[peer.address] = peer
        self.copies += 1
        return peer

    def reached(self, asker: "GossipPeer", peer: PeerId) -> "GossipPeer | None":
        """Who is there where the asker believes that this peer is: of two with one identity either."""
        addresses = asker.swim.addresses(peer) if self.copies and asker.swim is not None else ()
        return self.peers.get(addresses[0]) if addresses else self.by_id.get(peer)

    def running(self) -> list["GossipPeer"]:
        return [peer for peer in self.peers.values() if peer.swim is not None]

    def converged(self) -> bool:
        """Do all that run hold exactly each other alive, and agree on it?"""
        running = self.running()
        expected = {peer.id: peer.core.me for peer in running}
        return all({m.peer: m for m in peer.core.members() if m.liveness <= Liveness.SUSPECT} == expected for peer in running)


class GossipPeer:
    """The shell of one core: carries out its effects in the world and arms its one timer."""

    def __init__(
        self, mesh: Mesh, name: str, address: Address, on_effect: Callable[[Effect], None] | None, clock: Clock
    ) -> None:
        self.mesh = mesh
        self.clock = clock
        self.wall_offset = 0  # seconds by which its wall clock is wrong
        self.name = name
        self.id = peer_for(name)
        self.address = address
        self.epoch = 0  # persists over crashes, as the home does
        self.swim: Swim | None = None
        self.changes: list[tuple[float, MemberChanged]] = []  # unless a watcher takes them
        self.refuted: list[Refuted] = []
        self.transports: list[TransportChanged] = []
        self.clones: list[Cloned] = []
        self.syncs = 0
        self.paused_until = 0.0
        self._on_effect = on_effect
        self._label = name.encode()
        self._refuses = False  # connections: the machine runs, and no agent on it
        self._timer: Handle | None = None
        self._run = 0  # tells callbacks of an earlier run apart
        self._inputs = 0
        self._backlog: list[Callable[[], None]] = []

    @property
    def core(self) -> Swim:
        assert self.swim is not None, f"{self.name} does not run"
        return self.swim

    @property
    def awake(self) -> bool:
        return self.swim is not None and self.mesh.world.now >= self.paused_until

    def start(self, seeds: Sequence["GossipPeer"] = ()) -> None:
        """A new run, with a higher epoch, that joins by the seeds."""
        assert self.swim is None
        self.epoch += 1
        self._run += 1
        world = self.mesh.world
        rng = world.rng_for(f"{self.name}/{self.epoch}")
        self.swim = Swim(self._member(rng), self.mesh.config, rng, self.clock.now)
        self.perform(self.swim.join(self.clock.now, [seed.address for seed in seeds]))

    def _member(self, rng: Random) -> Member:
        return Member(
            peer=self.id, epoch=Epoch(self.epoch), incarnation=0, liveness=Liveness.ALIVE,
            name=self.name, addresses=(self.address,), version="0.1.0",
            started_at=WALL_SECONDS + int(self.mesh.world.now) + self.wall_offset, boot=rng.getrandbits(63),
        )  # fmt: skip

    def crash(self) -> None:
        """Gone without a word."""
        self.swim = None
        self._refuses = False
        self._backlog.clear()
        if self._timer is not None:
            self._timer.cancel()

    def kill(self) -> None:
        """The process alone: its machine refuses connections, but nobody is told."""
        self.crash()
        self._refuses = True

    def leave(self) -> None:
        """Say so, pass it on for a second, and go."""
        self.perform(self.core.leave(self.clock.now))
        self.mesh.world.call_later(1.0, self.crash)

    def pause(self, seconds: float) -> None:
        """The process is stopped: packets wait in its socket and timers are late."""
        self.paused_until = self.mesh.world.now + seconds
        if self._timer is not None:
            self._timer.cancel()
        self.mesh.world.call_later(seconds, self._resume, self._run)

    def publish(self, record: bytes) -> None:
        self.perform(self.core.publish(self.clock.now, record))

    def perform(self, effects: list[Effect]) -> None:
        """Carry out what the core asks for, then arm its timer."""
        self._inputs += 1
        if self._inputs % self.mesh.check_every == 0:
            self.core.check()
        for effect in effects:
            self._perform(effect)
        self._arm()

    def receive(self, data: bytes, source: Address) -> None:
        """A packet has come by UDP."""
        if self.mesh.watcher is not None and self.swim is not None:
            self.mesh.watcher.received(self, len(data))
        self._when_awake(self._receive, data, source)

    def _receive(self, data: bytes, source: Address) -> None:
        self.perform(self.core.handle_packet(self.clock.now, data, source))

    def _arm(self) -> None:
        """A timer that comes too early does no harm, one that is moved at every packet does: it fills the world's heap."""
        if self.swim is None:
            return
        deadline = self.clock.when(self.swim.deadline())
        timer = self._timer
        if timer is not None and timer.call is not None:
            if timer.when <= deadline:
                return
            timer.cancel()
        self._timer = self.mesh.world.call_at(deadline, self._time_out, self._run)

    def _perform(self, effect: Effect) -> None:
        world, mesh = self.mesh.world, self.mesh
        match effect:
            case Send():
                assert len(effect.packet) <= PACKET_PLAIN_BYTES_MAX
                world.trace_bytes(self._label, effect.packet)
                target = mesh.peers.get(effect.address)
                if target is not None:
                    mesh.network.send(self.name, target.name, target.receive, effect.packet, self.address)
            case Stream():
                world.trace(self.name, "stream", effect.peer, effect.packet)
                self._stream(effect)
            case Sync():
                world.trace(self.name, "sync", str(effect.address), effect.request)
                self._sync(effect)
            case _:
                self._note(effect)
        if mesh.watcher is not None:
            mesh.watcher.effect(self, effect)
        if self._on_effect is not None:
            self._on_effect(effect)

    def _note(self, effect: Effect) -> None:
        """What is only remembered: nothing follows from it here."""
        self.mesh.world.trace(self.name, repr(effect))
        match effect:
            case MemberChanged():
                if self.mesh.watcher is None:
                    self.changes.append((self.mesh.world.now, effect))
            case Refuted():
                self.refuted.append(effect)
                self.epoch = max(self.epoch, self.core.me.epoch)
            case TransportChanged():
                self.transports.append(effect)
            case Cloned():
                self.clones.append(effect)
            case does.RecordChanged() | does.ProbeFailed() | does.NoteHeard():
                pass
            case Send() | Stream() | Sync() | Answer():
                raise AssertionError("an answer to nothing: only handle_stream_packet gives answers")
            case _:
                assert_never(effect)

    # ---- TCP: a request and its answer; whatever goes wrong is a failure at once or after a timeout

    def _sync(self, sync: Sync) -> None:
        self.syncs += 1

        def serve(target: "GossipPeer") -> list[bytes]:
            reply, effects = target.core.handle_sync_request(target.clock.now, self.id, sync.request)
            target.perform(effects)
            return [reply]

        def answered(answer: list[bytes]) -> None:
            assert target is not None
            self._sync_answered(target.id, answer[0])

        def failed(refused: bool) -> None:
            self.perform(self.core.handle_sync_failed(self.clock.now, sync.peer))
            if refused and sync.peer is not None:
                self.perform(self.core.handle_refused(self.clock.now, sync.peer))

        target = self.mesh.peers.get(sync.address)
        Request(self, target, len(sync.request), SYNC_TIMEOUT, serve, answered, failed)

    def _sync_answered(self, peer: PeerId, reply: bytes) -> None:
        try:
            self.perform(self.core.handle_sync_reply(self.clock.now, peer, reply))
        except PeerError as error:
            self.mesh.world.trace(self.name, str(error))

    def _stream(self, stream: Stream) -> None:
        def serve(target: "GossipPeer") -> list[bytes]:
            effects = target.core.handle_stream_packet(target.clock.now, self.id, stream.packet)
            target.perform([effect for effect in effects if not isinstance(effect, Answer)])
            return [effect.packet for effect in effects if isinstance(effect, Answer)]

        def answered(packets: list[bytes]) -> None:
            for packet in packets:
                self.perform(self.core.handle_stream_answer(self.clock.now, stream.peer, packet))

        def failed(refused: bool) -> None:
            self.perform(self.core.handle_stream_failed(self.clock.now, stream.peer))
            if refused:
                self.perform(self.core.handle_refused(self.clock.now, stream.peer))

        target = self.mesh.reached(self, stream.peer)
        Request(self, target, len(stream.packet), STREAM_TIMEOUT, serve, answered, failed)

    # ---- time

    def _time_out(self, run: int) -> None:
        if run != self._run or self.swim is None:
            return
        if self.clock.now >= self.swim.deadline():
            self.perform(self.swim.handle_timeout(self.clock.now))
        else:
            self._arm()

    def when_awake(self, run: int, call: Callable[..., None], *args: object) -> None:
        """Call it in this run, or never; later if the process is stopped."""
        if run == self._run:
            self._when_awake(call, *args)

    def _when_awake(self, call: Callable[..., None], *args: object) -> None:
        if self.swim is None:
            return
        if self.mesh.world.now < self.paused_until:
            self._backlog.append(lambda: call(*args))
        else:
            call(*args)

    def _resume(self, run: int) -> None:
        """The timer first: a process that wakes up may well see it before it reads its socket."""
        if run != self._run or self.swim is None or self.mesh.world.now < self.paused_until:
            return
        self._time_out(run)
        waiting, self._backlog = self._backlog, []
        for call in waiting:
            self._when_awake(call)


class Request:
    """One of the two callbacks is called, once, unless the asker dies."""

    def __init__(
        self,
        asker: GossipPeer,
        target: GossipPeer | None,
        request_bytes: int,
        timeout: float,
        serve: Callable[[GossipPeer], list[bytes]],
        answered: Callable[[list[bytes]], None],
        failed: Callable[[bool], None],
    ) -> None:
        self._asker = asker
        self._run = asker._run
        self._serve = serve
        self._answered = answered
        self._failed = failed
        self._pending = True
        self._timeout = asker.mesh.world.call_later(timeout, self._settle, failed, False)
        if target is not None:
            self._line = (asker.name, asker._run, target.name, target._run)
            used = asker.mesh.used.get(self._line)
            if used is not None and asker.mesh.world.now - used < CONNECTION_SECONDS:
                self._carry(asker, target, request_bytes, self._arrive, target)
            else:
                self._reach(asker, target, True, self._accept, target, request_bytes)

    # A connection is opened by two round trips: of TCP, which needs nothing of the processes, and of TLS.

    def _reach(
        self, source: GossipPeer, destination: GossipPeer, connecting: bool, call: Callable[..., None], *args: object
    ) -> None:
        source.mesh.network.send(source.name, destination.name, call, *args, reliable=True, connecting=connecting)

    def _accept(self, target: GossipPeer, request_bytes: int) -> None:
        if target.swim is not None:
            self._reach(target, self._asker, True, self._greet, target, request_bytes)
        elif target._refuses:
            self._reach(target, self._asker, False, self._settle, self._failed, True)

    def _greet(self, target: GossipPeer, request_bytes: int) -> None:
        asker = self._asker

        def greeted() -> None:
            self._reach(target, asker, False, asker.when_awake, self._run, ask)

        def ask() -> None:
            self._carry(asker, target, request_bytes, self._arrive, target)

        def hello() -> None:
            self._reach(asker, target, False, target.when_awake, target._run, greeted)

        asker.when_awake(self._run, hello)

    def _carry(
        self, source: GossipPeer, destination: GossipPeer, plain_bytes: int, call: Callable[..., None], *args: object
    ) -> None:
        mesh = source.mesh
        if mesh.watcher is not None:
            mesh.watcher.streamed(source, destination, plain_bytes)
        mesh.used[self._line] = mesh.world.now
        self._reach(source, destination, False, call, *args)

    def _arrive(self, target: GossipPeer) -> None:
        if target.swim is not None:
            target.when_awake(target._run, self._be_served, target)
        elif target._refuses:
            self._carry(target, self._asker, 0, self._settle, self._failed, True)

    def _be_served(self, target: GossipPeer) -> None:
        try:
            answer = self._serve(target)
        except PeerError as error:
            target.mesh.world.trace(target.name, str(error))
            self._carry(target, self._asker, 0, self._settle, self._failed, False)
        else:
            self._carry(target, self._asker, sum(map(len, answer)), self._settle, self._answered, answer)

    def _settle(self, call: Callable[..., None], *args: object) -> None:
        if self._pending:
            self._pending = False
            self._timeout.cancel()
            self._asker.when_awake(self._run, call, *args)
