"""Breaking things as planned: each fault hits as soon as there is somebody whom it can hit, and what it did is counted.

In the end all that can be mended is mended. In a liveness run some machines stay ill for ever, and the others must do without.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from tests.simulator.liar import Liar
from tests.simulator.machine import Disk
from tests.simulator.mesh_peer import MeshPeer
from tests.simulator.plan import Fault, FaultKind, Illness, Mode, Weather
from tests.simulator.world import Ailment

if TYPE_CHECKING:
    from tests.simulator.simulation import Simulation

POSTPONE: Final = 0.5
TRAP_SECONDS: Final = 5.0  # then it strikes without waiting for effects
REST_SECONDS: Final = 15.0
REPLAYED_MAX: Final = 40
BACKUP_SECONDS: Final = 4.0  # between two backups of a disk: a restored one lacks so much, at most
DAY: Final = 86_400.0
JUMPS: Final = (-10 * 365 * DAY, -DAY, DAY, 10 * 365 * DAY)
OF_NETWORK: Final = (FaultKind.PARTITION, FaultKind.DEAF, FaultKind.SLOW, FaultKind.BRIDGE)
OF_ALL: Final = (*OF_NETWORK, FaultKind.OUTAGE)
SLOW_DELAY: Final = (0.0005, 0.5)
OUTAGE_SPREAD: Final = 5.0  # seconds within which all machines are back


class Faults:
    """What breaks in one run."""

    def __init__(self, mesh: "Simulation") -> None:
        self._mesh = mesh
        self._world = mesh.world
        self._rng = mesh.rng
        self._cuts = 0
        self._hit_at: dict[MeshPeer, float] = {}
        self._backups: dict[MeshPeer, Disk] = {}
        self.calm = False

    def plan(self) -> None:
        """Let everything happen in its time."""
        for fault in self._mesh.plan.faults:
            self._world.call_at(fault.at, self._break, fault)
        self._world.call_at(2.0, self._spoil_network)
        if any(fault.kind is FaultKind.RESTORE for fault in self._mesh.plan.faults):
            self._world.call_at(BACKUP_SECONDS, self._back_up)

    def all_broken(self) -> bool:
        """All has happened that was planned, and nobody is cut off any more."""
        return not self._cuts and sum(self._mesh.happened[kind] for kind in FaultKind) == len(self._mesh.plan.faults)

    def rested(self, peer: MeshPeer) -> bool:
        """In gentle weather nobody is hit again before the mesh can have noticed that it is back."""
        since = self._world.now - self._hit_at.get(peer, -100.0)
        return self._mesh.plan.weather is Weather.STORMY or since > REST_SECONDS

    def _spoil_network(self) -> None:
        plan, network = self._mesh.plan, self._mesh.network
        network.loss, network.duplication, network.corruption = plan.loss, plan.duplication, plan.flips

    def _back_up(self) -> None:
        if not self.calm:
            self._backups = {peer: peer.machine.disk.copy() for peer in self._mesh.peers.values()}
            self._world.call_later(BACKUP_SECONDS, self._back_up)

    # ---- one fault

    def _break(self, fault: Fault) -> None:
        """Let it happen now, or as soon as it can hit anybody."""
        if not self._strike(fault):
            self._world.call_later(POSTPONE, self._break, fault)

    def _strike(self, fault: Fault) -> bool:
        up = [peer for peer in self._mesh.running() if peer.awake and peer.doors_open]
        if fault.kind in OF_NETWORK:
            if len(up) > 1:
                self._strike_network(fault, [peer.name for peer in self._rng.sample(up, 2)])
                self._mesh.happened[fault.kind] += 1
            return len(up) > 1
        victims = [peer for peer in up if not peer.draining and not peer.trapped and self.rested(peer)]
        if not victims or (fault.kind in (FaultKind.GONE, FaultKind.LEAVE) and len(self._mesh.running()) < 3):
            return False
        if fault.kind is FaultKind.OUTAGE:
            self._outage(fault)
            return True
        if fault.kind is FaultKind.RESTORE and not self._backups:
            return False
        busy = [peer for peer in victims if any(folder.ends for folder in peer.machine.folders.values())]
        victim = self._rng.choice(busy or victims)
        if fault.effects is None:
            self._strike_peer(fault, victim)
        else:
            self._set_trap(fault, fault.effects, victim)
        return True

    def _set_trap(self, fault: Fault, effects: int, victim: MeshPeer) -> None:
        sprung: list[bool] = []

        def spring() -> None:
            sprung.append(True)
            self._strike_peer(fault, victim)

        def strike_anyway() -> None:  # too little happened there, or it died of something else
            if not sprung:
                victim.disarm()
                self._break(replace(fault, effects=None))

        self._hit_at[victim] = self._world.now + TRAP_SECONDS
        victim.set_trap(effects, spring)
        self._world.call_later(TRAP_SECONDS, strike_anyway)

    # ---- the network

    def _strike_network(self, fault: Fault, ends: list[str]) -> None:
        """`ends`: two that run, between which the cut goes."""
        network, watcher = self._mesh.network, self._mesh.watcher
        names = [peer.name for peer in self._mesh.peers.values() if peer.name not in ends]
        self._rng.shuffle(names)
        names = [ends[0], *names, ends[1]]
        self._cuts += fault.kind is not FaultKind.SLOW
        at = self._rng.randint(1, len(names) - 1)
        match fault.kind:
            case FaultKind.PARTITION:
                watcher.note("net", f"is split into {' '.join(names[:at])} and {' '.join(names[at:])}")
                network.partition([names[:at], names[at:]])
            case FaultKind.DEAF:
                watcher.note("net", f"carries nothing from {ends[0]} to {ends[1]}")
                network.cut(ends[0], ends[1])
            case FaultKind.BRIDGE:
                one, other = names[:at], names[at + 1 :] or names[-1:]
                watcher.note("net", f"is split into {' '.join(one)} and {' '.join(other)}, and the rest hears both")
                network.bridge(one, other)
            case _:
                watcher.note("net", "gets slow")
                network.delay = SLOW_DELAY
                self._world.call_later(fault.seconds, self._speed_up)
                return
        self._world.call_later(fault.seconds, self._heal)

    def _heal(self) -> None:
        """Everything is healed at once, when the last of several cuts is over."""
        self._cuts -= 1
        if not self._cuts and not self.calm:
            self._mesh.watcher.note("net", "is whole again")
            self._mesh.network.heal()

    def _speed_up(self) -> None:
        self._mesh.network.delay = self._mesh.plan.delay

    # ---- one peer

    def _strike_peer(self, fault: Fault, peer: MeshPeer) -> None:
        self._hit_at[peer] = self._world.now + fault.seconds
        self._mesh.happened[fault.kind] += 1
        self._mesh.watcher.note(peer.name, f"is hit: {fault.kind} for {fault.seconds:.2f} s")
        if self._disturb(fault, peer):
            return
        self._fell(fault, peer)
        if not peer.gone:
            self._world.call_later(fault.seconds, self._restart, peer)

    def _disturb(self, fault: Fault, peer: MeshPeer) -> bool:
        """Faults that leave the agent running."""
        happened = self._mesh.happened
        match fault.kind:
            case FaultKind.STOP:
                peer.stop_for(fault.seconds)
            case FaultKind.SLEEP:
                happened["tasks frozen"] += peer.machine.freeze(fault.seconds)
                peer.stop_for(fault.seconds)
            case FaultKind.FREEZE:
                happened["tasks frozen"] += peer.machine.freeze(fault.seconds)
            case FaultKind.CLOCK:
                peer.machine.wall_offset += self._rng.choice(JUMPS)
                peer.wall_jumped()
            case FaultKind.CLONE:
                self._clone(fault, peer)
            case FaultKind.LIE:
                peer.liar = Liar(self._mesh, peer, self._world.now + fault.seconds)
            case _:
                return False
        return True

    def _clone(self, fault: Fault, peer: MeshPeer) -> None:
        """The newer of the two falls silent by itself; then its user stops it. It is the first one if that was restarted."""
        clone = peer.copied_to(f"{peer.name}-{len(self._mesh.clones) + 1}")
        self._mesh.watcher.note(clone.name, f"starts as a copy of {peer.name}")
        clone.start()
        self._world.call_later(fault.seconds, self._end_clone, peer, clone)

    def _end_clone(self, peer: MeshPeer, clone: MeshPeer) -> None:
        """What it had begun ends with it. Of the mesh that calms down it is no part any more."""
        if not clone.running:
            return
        happened = self._mesh.happened
        happened["clones stopped"] += 1
        happened["clones that were silent"] += clone.problem != ""
        self._mesh.watcher.note(clone.name, "is told to stop")
        clone.kill()
        happened["tasks killed"] += clone.machine.kill_tasks()
        clone.machine.powered = False
        if peer.running and peer.problem:
            happened["originals that were silent"] += 1
            peer.kill()
            self._start(peer)

    def _fell(self, fault: Fault, peer: MeshPeer) -> None:
        """Faults that end the agent, and more."""
        happened, machine = self._mesh.happened, peer.machine
        match fault.kind:
            case FaultKind.KILL:
                peer.kill()
            case FaultKind.KILL_ALL:
                peer.kill()
                happened["tasks killed"] += machine.kill_tasks()
            case FaultKind.POWER | FaultKind.GONE | FaultKind.OUTAGE:
                peer.kill()
                happened["commits lost"] += machine.lose_power(self._rng)
                peer.gone = fault.kind is FaultKind.GONE
                if peer.gone:
                    self._mesh.watcher.died[peer.id] = self._world.now
            case FaultKind.LEAVE:
                peer.gone = self._rng.random() < 0.5
                peer.leave()
            case FaultKind.WIPE:
                peer.kill()
                happened["rows wiped"] += machine.disk.wipe()
                self._mesh.watcher.disk_changed(peer.name)
            case FaultKind.RESTORE:
                peer.kill()
                happened["rows restored"] += machine.disk.restore(self._backups[peer])
                self._mesh.watcher.disk_changed(peer.name)
            case _:
                raise AssertionError(f"{fault.kind} ends no agent")

    def _outage(self, fault: Fault) -> None:
        self._mesh.happened[fault.kind] += 1
        self._mesh.watcher.note("net", "every machine loses its power")
        for peer in self._mesh.peers.values():
            if not peer.gone and peer.machine.powered:
                if peer.running:
                    self._fell(fault, peer)
                else:
                    self._mesh.happened["commits lost"] += peer.machine.lose_power(self._rng)
                    self._mesh.watcher.note(peer.name, "loses its power while its agent is down")
                self._world.call_later(fault.seconds + self._rng.uniform(0.0, OUTAGE_SPREAD), self._restart, peer)

    def _restart(self, peer: MeshPeer) -> None:
        if peer.gone or self.calm:
            return
        if peer.running and peer.draining:  # it has not finished leaving
            self._world.call_later(POSTPONE, self._restart, peer)
        elif not peer.running:
            self._start(peer)

    def _start(self, peer: MeshPeer) -> None:
        self._mesh.watcher.note(peer.name, "starts")
        self._mesh.happened["restarts"] += 1
        peer.machine.powered = True
        peer.start()
        if self._mesh.plan.replays and not self.calm:
            self._mesh.happened["replayed"] += self._mesh.network.replay(peer.name, REPLAYED_MAX)

    # ---- the end of the faults

    def calm_down(self) -> None:
        """No more faults; who is not gone for good comes back. In a liveness run some are ill from now on, for ever."""
        network = self._mesh.network
        self._mesh.watcher.note("net", "and everybody calm down")
        self.calm = True
        for peer in self._mesh.peers.values():
            peer.liar = None
        for clone in self._mesh.clones.values():
            self._end_clone(self._mesh.peers[clone.id], clone)
        network.loss = network.duplication = network.corruption = 0.0
        network.delay = self._mesh.plan.delay
        network.heal()
        for peer in self._mesh.peers.values():
            if not peer.running and not peer.gone:
                self._start(peer)
            elif peer.running and peer.draining and not peer.gone:
                self._world.call_later(POSTPONE, self._come_back, peer)
        if self._mesh.plan.mode is Mode.LIVENESS:
            peers = list(self._mesh.peers.values())
            for number, illness in self._mesh.plan.ill:
                self._make_ill(peers[number], illness)

    def _come_back(self, peer: MeshPeer) -> None:
        if peer.running:
            self._world.call_later(POSTPONE, self._come_back, peer)
        elif not peer.gone:
            self._start(peer)

    def _make_ill(self, peer: MeshPeer, illness: Illness) -> None:
        network, others = self._mesh.network, [other.name for other in self._mesh.peers.values() if other is not peer]
        self._mesh.watcher.note(peer.name, f"is {illness} for ever")
        self._mesh.happened[f"ill {illness}"] += 1
        peer.ill = True
        if illness in (Illness.HALF_DEAF, Illness.APART):
            for other in others:
                network.cut(other, peer.name)
        if illness in (Illness.MUTE, Illness.APART):
            for other in others:
                network.cut(peer.name, other)
        if illness is Illness.SLOW:
            network.ailments[peer.name] = Ailment(loss=self._rng.uniform(0.2, 0.6), lag=self._rng.uniform(0.3, 3.0))
        if illness is Illness.GONE:
            self._lose_for_good(peer)

    def _lose_for_good(self, peer: MeshPeer) -> None:
        peer.gone = True
        self._mesh.watcher.died.setdefault(peer.id, self._world.now)
        if peer.running:
            peer.kill()
        if peer.machine.powered:
            self._mesh.happened["commits lost"] += peer.machine.lose_power(self._rng)
