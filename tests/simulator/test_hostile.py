"""A member that lies, a machine that was cloned, an hour apart: faults of which each run has one at most.

What a liar can do is written down here, too (docs/security.md): meshq is no Byzantine system.
"""

from collections import Counter
from dataclasses import replace

import pytest

from meshq import codec
from meshq.errors import PeerError
from meshq.gossip.effects import Cloned
from meshq.gossip.wire import GossipOnly, Packet, Rumor
from meshq.ids import Epoch
from meshq.ledger.effects import Push
from meshq.ledger.pushes import Pushes
from meshq.ledger.runs import Runs
from tests.seeds import failed_seeds
from tests.simulator import soak
from tests.simulator.invariants import Violation
from tests.simulator.plan import Fault, FaultKind, Plan, Weather, plan_for
from tests.simulator.simulation import Report, Simulation
from tests.simulator.swarm import HOUR, HOUR_PEERS_MAX, MORE, swarm_plan
from tests.simulator.test_mesh import LONG_SEED, quiet, running_task

LIES = (
    "a huge row", "answers", "answers unasked", "claims that are none", "deaths", "epochs", "epochs of others", "incarnations",
    "losses", "many rows", "metadata", "positions", "questions", "settings", "stamps of the future", "too many rows", "votes",
    "writes of others",
)  # fmt: skip


def plan_with(seed: int, *faults: Fault) -> Plan:
    return replace(plan_for(seed, 5, Weather.STORMY), faults=faults, loss=0.05, profile="lan", seconds=36.0, page_rows=1_000)


def lying(seed: int) -> Report:
    return Simulation(plan_with(seed, Fault(at=5.0, kind=FaultKind.LIE, seconds=30.0))).run()


# ---- a liar


def test_whatever_a_member_says_the_others_go_on_and_are_equal_in_the_end() -> None:
    happened: Counter[str] = sum((lying(seed).happened for seed in range(3)), Counter())
    assert {name.removeprefix("lies: ") for name in happened if name.startswith("lies: ")} == set(LIES)
    assert happened["lies refused"] > 50 and happened["lies taken"] > 50
    assert happened["starts"] > 20


def test_a_core_that_changes_something_and_then_refuses_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def check_too_late(self: Pushes, push: Push) -> None:
        if len(push.rows) > 500:
            for peer in simulation.peers.values():
                if peer.running:
                    peer.core._replica._raise_floors({push.rows[0].birth.actor: 9})
            raise PeerError("too many rows")

    monkeypatch.setattr(Pushes, "check_limits", check_too_late)
    for seed in range(4):
        simulation = Simulation(plan_with(seed, Fault(at=5.0, kind=FaultKind.LIE, seconds=30.0)))
        try:
            simulation.run()
        except Violation as error:
            assert "has refused too many rows, and is changed by it" in str(error)
            return
    raise AssertionError("nobody has noticed")


def test_a_member_can_silence_another_by_gossip() -> None:
    """By UDP anybody with the key may say that a second run of a peer lives. The peer is silent until it is started anew."""
    simulation = Simulation(quiet(1))
    running_task(simulation)
    first, liar = list(simulation.peers.values())[:2]
    swim, clones = first.gossip.core, list[Cloned]()
    for step in range(1, 6):
        said = replace(swim.me, boot=swim.me.boot ^ 1, started_at=1, incarnation=swim.me.incarnation + step)
        packet = Packet(liar.id, Epoch(liar.gossip.epoch), GossipOnly(), (Rumor(said),))
        effects = swim.handle_packet(simulation.world.now, codec.encode(packet), liar.gossip.address)
        clones += [effect for effect in effects if isinstance(effect, Cloned)]
    assert [clone.newer for clone in clones] == [True] and swim.silent


# ---- a clone


CLONE = Fault(at=0.0, kind=FaultKind.CLONE, seconds=30.0)


@pytest.mark.parametrize("seed", range(4))
def test_two_with_one_identity_find_out_and_the_newer_takes_no_part(seed: int) -> None:
    report = Simulation(plan_with(seed, replace(CLONE, at=6.0))).run()
    happened = report.happened
    assert happened["clones seen by the newer"] == happened["clones seen by the older"] == 1
    assert happened["clones that were silent"] == happened["clones stopped"] == 1


def cloned_while_it_runs() -> Simulation:
    """A task runs at a machine that is cloned; a while later."""
    simulation = Simulation(quiet(LONG_SEED))
    runner, _ = running_task(simulation)
    simulation.faults._strike_peer(CLONE, runner)
    simulation.world.run_until(simulation.world.now + 15.0)
    [clone] = simulation.clones.values()
    assert clone.problem and not runner.problem
    return simulation


def test_a_clone_does_not_end_what_the_first_one_runs() -> None:
    simulation = cloned_while_it_runs()
    assert simulation.watcher.live(), "it goes on"
    assert simulation.watcher.counts["starts"] == 1 and not simulation.watcher.counts["ended lost"]


def test_a_clone_that_did_would_be_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runs, "_is_older", lambda self, dot: False)
    with pytest.raises(Violation, match="P3: live at once"):
        cloned_while_it_runs()


# ---- an hour apart, and many hours


def test_after_an_hour_apart_everything_is_equal_and_done() -> None:
    report = Simulation(plan_with(3, Fault(at=10.0, kind=FaultKind.PARTITION, seconds=HOUR))).run()
    assert report.happened["partition"] == 1 and report.happened["cut"] > 0


def test_a_large_mesh_goes_on_for_hours(capsys: pytest.CaptureFixture[str]) -> None:
    assert soak.main(["--peers", "5", "--hours", "1.01", "--seed", "2"]) == 0
    printed = capsys.readouterr().out
    assert "hour 1: " in printed and " ok " in printed and "in all: " in printed


def test_rows_that_are_never_forgotten_end_a_soak(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(soak, "LATE", -50)
    monkeypatch.setattr(soak, "KEPT", 3)
    assert soak.main(["--peers", "5", "--hours", "1", "--seed", "2"]) == 1
    assert "F39: " in capsys.readouterr().out


def test_the_plans_have_all_of_them_and_those_that_failed_once_have_none() -> None:
    plans = [swarm_plan(seed) for seed in range(300)]
    kinds = {fault.kind for plan in plans for fault in plan.faults}
    assert kinds >= {kind for kind, _ in MORE}
    hours = [plan for plan in plans if any(fault.seconds == HOUR for fault in plan.faults)]
    assert hours and all(len(plan.slots) <= HOUR_PEERS_MAX for plan in hours)
    later = {kind for kind, _ in MORE}
    assert not any(fault.kind in later for seed in failed_seeds("swarm")[:4] for fault in swarm_plan(seed).faults)


def test_what_a_core_counts_as_a_bug_is_a_violation() -> None:
    simulation = Simulation(plan_for(1))
    with pytest.raises(Violation, match="bug_rows_contradict"):
        simulation.watcher.check_counters("p0", {"bug_rows_contradict": 1, "bug_free": 0})
