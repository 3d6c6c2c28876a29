"""What happens to the mesh, and what is measured of it: a function a scenario.

Each does its harm, asserts that the harm was done, and adds samples to the trial's figures. A figure's unit stands in its name.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from meshq.gossip.member import Liveness, Member
from tests.simulator.gossip_peer import GossipPeer
from tests.simulator.trials.setup import Result, Scenario, Setup
from tests.simulator.trials.trial import Trial

CHANGE_SECONDS: Final = 30.0  # a change that somebody has not heard of by then waits for a push/pull, which may take minutes
HEAL_SECONDS: Final = 600.0
STOP_SECONDS: Final = (0.5, 2.0)  # a starved agent hangs for so long
AWAKE_SECONDS: Final = (1.0, 9.0)  # and then runs for so long
FLAP_SECONDS: Final = (2.0, 8.0)  # a bad cable is on, and off, for so long

FIRST_DEAD: Final = "a crash is known to the first (s)"
ALL_DEAD: Final = "a crash is known to all (s)"
LEAVE: Final = "a leave is known to all (s)"
RENAME: Final = "another name is known to all (s)"
MET: Final = "a newcomer is known to its seed (s)"
JOIN: Final = "a newcomer is known to all, from then on (s)"
FULL_VIEW: Final = "from the start to the full view (s)"
FORGOTTEN: Final = "members that a side has forgotten (share)"
DAMPED: Final = "a flapping peer must not claim for up to (s)"
EQUAL: Final = "time in which all views are equal (share)"
TOLD_BLOCKED: Final = "peers that told their shell that UDP is blocked (share)"
HEALED: Final = "from the end of the harm to equal views (s)"


def run_trial(setup: Setup) -> Result:
    """The trial that the setup describes, from its beginning to its figures."""
    trial = Trial(setup)
    SCENARIOS[setup.scenario](trial)
    for peer in trial.mesh.running():
        peer.core.check()
    return trial.result()


def crash(trial: Trial) -> None:
    trial.begin()
    _crash_one(trial)


def _crash_one(trial: Trial) -> None:
    victim = trial.rng.choice(trial.peers)
    trial.counts.watch(victim.id, lambda member: member.liveness is Liveness.DEAD)
    victim.crash()
    trial.happened["crashes"] += 1
    first, last = _until_all_know(trial, [peer for peer in trial.peers if peer is not victim], HEAL_SECONDS)
    trial.add(FIRST_DEAD, first)
    trial.add(ALL_DEAD, last)


def _until_all_know(trial: Trial, others: Sequence[GossipPeer], limit: float) -> tuple[float, float]:
    """Seconds from now until the first and until the last of the others knows what is watched; `limit` for never."""
    began, learnt = trial.world.now, trial.counts.learnt
    trial.wait(lambda: len(learnt) >= len(others) and all(peer.name in learnt for peer in others), limit)
    times = [learnt.get(peer.name, began + limit) - began for peer in others]
    return min(times), max(times)


def change(trial: Trial) -> None:
    """One after the other: a name changes, one leaves, one is new.

    A join is a change of the mesh from the moment somebody there knows of it. What a newcomer needs until then is its own
    figure: with loss TCP's and TLS's round trips, of which each lost one costs a second and more. No gossip shortens them.
    """
    trial.begin()
    renamed, leaver = trial.rng.sample(trial.peers, 2)
    others = [peer for peer in trial.peers if peer is not renamed]
    trial.counts.watch(renamed.id, lambda member: member.name == "renamed")
    renamed.perform(renamed.core.rename(trial.world.now, "renamed"))
    trial.add(RENAME, _until_all_know(trial, others, CHANGE_SECONDS)[1])
    trial.run(trial.rng.uniform(2.0, 4.0))

    others = [peer for peer in trial.peers if peer is not leaver]
    trial.counts.watch(leaver.id, lambda member: member.liveness is Liveness.LEFT)
    leaver.leave()
    trial.add(LEAVE, _until_all_know(trial, others, CHANGE_SECONDS)[1])
    trial.run(trial.rng.uniform(2.0, 4.0))

    newcomer = trial.mesh.add("newcomer")
    trial.counts.watch(newcomer.id, lambda member: member.liveness is Liveness.ALIVE)
    newcomer.start([trial.rng.choice(others)])
    met, known = _until_all_know(trial, others, CHANGE_SECONDS)
    trial.add(MET, met)
    trial.add(JOIN, known - met)
    trial.happened["changes"] += 3


def cold(trial: Trial) -> None:
    """All start within a second and know only the first."""
    trial.network.loss = trial.setup.loss
    trial.start_cold()
    trial.happened["starts"] += len(trial.peers)
    trial.add(FULL_VIEW, trial.world.now)


def idle(trial: Trial) -> None:
    """Telemetry, and what it costs. Its age is looked at twenty times."""
    trial.begin()
    seconds = trial.setup.seconds or 3 * trial.publish_seconds
    trial.measure()
    for _ in range(20):
        trial.run(seconds / 20)
        trial.add_telemetry_ages()
    trial.add_traffic()
    sent = sum(each.packets_out for each in trial.counts.traffic.values())
    assert sent > len(trial.peers) * seconds, "a mesh in which nobody probes was measured"


def loss(trial: Trial) -> None:
    """Nothing else: whoever is declared dead is so falsely."""
    assert trial.setup.loss > 0, "say how much is lost"
    trial.begin()
    trial.run(trial.setup.seconds or 600.0)
    trial.add_traffic()
    _heal(trial)


def starved(trial: Trial) -> None:
    """Some are stopped and go on at random, as an agent whose machine computes."""
    victims = trial.rng.sample(trial.peers, _struck(trial, 0.2))
    trial.begin()
    trial.counts.harmed.update(dict.fromkeys(peer.name for peer in victims))
    end = trial.world.now + (trial.setup.seconds or 600.0)

    def stop(peer: GossipPeer) -> None:
        if trial.world.now < end:
            seconds = trial.rng.uniform(*STOP_SECONDS)
            trial.stop(peer, seconds)
            trial.world.call_later(seconds + trial.rng.uniform(*AWAKE_SECONDS), stop, peer)

    for peer in victims:
        trial.world.call_later(trial.rng.uniform(*AWAKE_SECONDS), stop, peer)
    trial.run(end - trial.world.now)
    assert trial.happened["stops"] >= len(victims), "nobody was stopped"
    trial.run(STOP_SECONDS[1])
    _heal(trial)


def one_way(trial: Trial) -> None:
    """With an even seed they hear nobody, with an odd one nobody hears them. TCP needs both ways and does not work either."""
    trial.begin()
    deaf = trial.setup.seed % 2 == 0
    victims = trial.rng.sample(trial.peers, _struck(trial, 0.01))
    trial.counts.harmed.update(dict.fromkeys(peer.name for peer in victims))
    for victim in victims:
        for other in trial.peers:
            if other is not victim:
                trial.network.cut(*((other.name, victim.name) if deaf else (victim.name, other.name)))
    trial.happened["deaf peers" if deaf else "mute peers"] += len(victims)
    trial.run(trial.setup.seconds or 300.0)
    assert trial.network.traffic.cut > 0, "nothing was cut"
    _heal(trial)


def partition(trial: Trial) -> None:
    """Two halves. Who is to heal longer than memory lasts needs somebody who shows the addresses again: mDNS."""
    trial.begin()
    if trial.setup.discovery:
        trial.begin_discovery()
    names = [peer.name for peer in trial.peers]
    trial.rng.shuffle(names)
    half = len(names) // 2
    trial.counts.harmed.update(dict.fromkeys(names))
    trial.network.partition([names[:half], names[half:]])
    seconds = trial.setup.seconds or 60.0
    trial.run(seconds)
    trial.happened["partitions"] += 1
    sides = [[peer for peer in trial.peers if peer.name in part] for part in (names[:half], names[half:])]
    if seconds >= 60:
        assert not any(_holds_live(one, other) for one in sides[0] for other in sides[1]), "the halves knew of each other"
    assert all(_holds_live(one, other) for side in sides for one in side for other in side if one is not other)
    trial.add(FORGOTTEN, *_forgotten(sides[0], sides[1]))
    _heal(trial)


def _forgotten(side: Sequence[GossipPeer], others: Sequence[GossipPeer]) -> list[float]:
    return [sum(peer.core.member(other.id) is None for other in others) / len(others) for peer in side]


def _holds_live(observer: GossipPeer, subject: GossipPeer) -> bool:
    member: Member | None = observer.core.member(subject.id)
    return member is not None and member.liveness <= Liveness.SUSPECT


def flapping(trial: Trial) -> None:
    """Some are cut off and connected again, over and over."""
    trial.begin()
    victims = trial.rng.sample(trial.peers, _struck(trial, 0.1))
    trial.counts.harmed.update(dict.fromkeys(peer.name for peer in victims))
    end = trial.world.now + (trial.setup.seconds or 300.0)
    damped: dict[str, float] = {}

    def switch(peer: GossipPeer, on: bool) -> None:
        damped[peer.name] = max(damped.get(peer.name, 0.0), peer.core.damped(trial.world.now))
        for other in trial.peers:
            for ends in ((peer.name, other.name), (other.name, peer.name)):
                (trial.network.mend if on else trial.network.cut)(*ends)
        trial.happened["cables pulled"] += not on
        if trial.world.now < end:
            trial.world.call_later(trial.rng.uniform(*FLAP_SECONDS), switch, peer, not on)

    for peer in victims:
        switch(peer, False)
    trial.run(end - trial.world.now)
    assert trial.happened["cables pulled"] > 2 * len(victims), "nothing flapped"
    trial.add(DAMPED, *damped.values())
    trial.run(FLAP_SECONDS[1])
    _heal(trial)


def bridge(trial: Trial) -> None:
    """Two sides, and one peer that both reach. Nobody is dead, whatever the sides may think of each other."""
    trial.begin()
    names = [peer.name for peer in trial.peers]
    trial.rng.shuffle(names)
    half = len(names) // 2
    for one in names[1 : half + 1]:
        for other in names[half + 1 :]:
            trial.network.cut(one, other)
            trial.network.cut(other, one)
    equal = 0
    seconds = int(trial.setup.seconds or 300.0)
    for _ in range(seconds):
        trial.run(1.0)
        equal += trial.mesh.converged()
    trial.happened["bridges"] += 1
    assert trial.network.traffic.cut > 0, "nothing was cut"
    trial.add(EQUAL, equal / seconds)
    _heal(trial)


def udp_blocked(trial: Trial) -> None:
    """From the start, between some or all pairs, only TCP works. Then one crashes."""
    pairs = [(one.name, other.name) for one in trial.peers for other in trial.peers if one.name < other.name]
    blocked = trial.rng.sample(pairs, max(1, round(len(pairs) * (trial.setup.share or 1.0))))
    for one, other in blocked:
        trial.network.cut_datagrams(one, other)
        trial.network.cut_datagrams(other, one)
    trial.begin()
    trial.happened["pairs blocked"] += len(blocked)
    trial.run(trial.setup.seconds or 120.0)
    trial.add_traffic()
    trial.add_telemetry_ages()
    assert trial.network.traffic.cut > 0, "nothing was blocked"
    told = sum(any(not each.udp for each in peer.transports) for peer in trial.peers)
    trial.add(TOLD_BLOCKED, told / len(trial.peers))
    _crash_one(trial)


def _struck(trial: Trial, share: float) -> int:
    """How many peers the scenario strikes: at least one."""
    return max(1, round(len(trial.peers) * (trial.setup.share or share)))


def _heal(trial: Trial) -> None:
    """All harm ends, and with it what counts as wrong."""
    trial.counts.end()
    trial.network.heal()
    trial.network.loss = 0.0
    began = trial.world.now
    healed = trial.wait(trial.mesh.converged, HEAL_SECONDS)
    trial.add(HEALED, trial.world.now - began if healed else HEAL_SECONDS)
    trial.counts.tally["never healed"] += not healed


SCENARIOS: Final[Mapping[Scenario, Callable[[Trial], None]]] = {
    Scenario.CRASH: crash,
    Scenario.CHANGE: change,
    Scenario.COLD: cold,
    Scenario.IDLE: idle,
    Scenario.LOSS: loss,
    Scenario.STARVED: starved,
    Scenario.ONE_WAY: one_way,
    Scenario.PARTITION: partition,
    Scenario.FLAPPING: flapping,
    Scenario.BRIDGE: bridge,
    Scenario.UDP_BLOCKED: udp_blocked,
}
