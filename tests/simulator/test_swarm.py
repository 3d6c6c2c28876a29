"""Meshes as large as a lab's, with everything that breaks in one; `scripts/simulate commit --for 180` runs others each time."""

from dataclasses import replace

import pytest

from meshq.task import Isolation
from tests.seeds import failed_seeds
from tests.simulator import figures
from tests.simulator.invariants import INVARIANTS, LIVENESS, Violation
from tests.simulator.mesh import Choice, judge, main, simulate_swarm
from tests.simulator.plan import ActionKind, FaultKind, Illness, Mode, Weather, plan_for
from tests.simulator.shrink import failure, shrink
from tests.simulator.simulation import Simulation
from tests.simulator.swarm import PEERS, TASKS, swarm_plan

SEEDS = 4
PLANS = 300


@pytest.mark.seeds
@pytest.mark.parametrize("seed", failed_seeds("swarm"))
def test_a_seed_that_failed_once_holds(seed: int) -> None:
    simulate_swarm(seed)


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("mode", Mode)
def test_whatever_breaks_in_a_lab_no_promise_is_broken(seed: int, mode: Mode) -> None:
    report = simulate_swarm(seed, mode)
    assert report.happened["starts"] > 0


def test_the_plans_have_every_size_fault_illness_and_action() -> None:
    plans = [swarm_plan(seed) for seed in range(PLANS)]
    assert {len(plan.slots) for plan in plans} == set(range(PEERS[0], PEERS[1] + 1))
    assert all(TASKS[0] <= len(plan.submissions) <= TASKS[1] for plan in plans)
    assert {fault.kind for plan in plans for fault in plan.faults} == set(FaultKind)
    assert {illness for plan in plans for _, illness in plan.ill} == set(Illness)
    assert {action.kind for plan in plans for action in plan.actions} == set(ActionKind)
    assert {plan.mode for plan in plans} == set(Mode)
    assert all(len(plan.ill) < len(plan.slots) / 2 for plan in plans), "a majority is well"


def test_one_seed_makes_one_history() -> None:
    assert len({judge(7, Choice()).text for _ in range(2)}) == 1


# --- what a run that fails tells


def test_the_rule_that_was_broken_is_named() -> None:
    assert failure(Violation("at 3.000: P3: live at once: 1.ab.3 on p1")) == "P3"
    assert failure(AssertionError("kaziebjacglrthvf is no task")) == failure(AssertionError("qsa6nfgeqkzxvohf is no task"))
    assert failure(AssertionError("an input was not finished")) != failure(AssertionError("they wait"))


def test_a_plan_is_shrunk_to_what_it_fails_of() -> None:
    plan = replace(swarm_plan(3), loss=0.2)
    culprit, needed = plan.faults[0], plan.submissions[17]
    small, tries = shrink(
        plan, lambda smaller: culprit in smaller.faults and needed in smaller.submissions, out_of_time=lambda: False
    )
    assert (small.faults, small.submissions, small.actions, small.ill) == ((culprit,), (needed,), (), ())
    assert (small.loss, small.rates, len(small.slots)) == (0.0, (), 1)
    assert tries < 200


def test_shrinking_ends_when_there_is_no_more_time() -> None:
    plan = swarm_plan(3)
    assert shrink(plan, lambda smaller: True, out_of_time=lambda: True) == (plan, 0)


def test_the_command_tells_the_smallest_plan_that_breaks_the_rule(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Simulation, "settled", lambda self: self.watcher.fail("P5: nothing is good enough") or True)
    assert main(["--seed", "2", "--small", "--shrink"]) == 1
    printed = capsys.readouterr().out
    assert "plans that break P5" in printed
    assert printed.count("Submission(") == printed.count("Fault(") == 0, "it fails without any of them"


def test_every_rule_has_a_place_where_it_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--rules"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n{name}" in "\n" + printed for name in (*INVARIANTS, *LIVENESS))
    assert [name for name in INVARIANTS if name[0] == "I"] == [f"I{number}" for number in range(1, 14)]
    assert list(LIVENESS) == [f"L{number}" for number in range(1, 7)]


# --- figures


@pytest.mark.parametrize("isolation", Isolation)
def test_what_a_machine_without_power_ran_runs_elsewhere(isolation: Isolation) -> None:
    seconds = figures.failover(range(4), 5, "fast", isolation)
    assert seconds, "nothing was interrupted"
    assert min(seconds) > 2.0, "nobody may take it before the grace is over"


def test_where_nothing_is_broken_each_task_is_claimed_and_started_once() -> None:
    found = figures.count(range(1), 5, 40, 0.0)
    assert (found.starts, found.again, found.overlaps) == (40, 0, 0)
    assert found.claims <= 1.1 * 40


def test_a_small_mesh_is_drawn_as_ever() -> None:
    assert plan_for(1).weather is Weather.STORMY and not plan_for(1).rates
