"""Whole meshes of the three real cores on virtual time, with everything that breaks in a lab.

`python -m tests.simulator.mesh --seeds 500` runs more of the same; what a seed found once stays in `tests/seeds/mesh.txt`.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from meshq.ids import TaskId
from meshq.ledger.holder import read
from meshq.task import Status
from tests.seeds import failed_seeds
from tests.simulator.mesh import main, seed_from, simulate
from tests.simulator.mesh_peer import MeshPeer
from tests.simulator.plan import CLASSIC, Fault, Plan, Submission, Weather, plan_for
from tests.simulator.simulation import Simulation

SEEDS = 60
LONG = Submission(
    at=4.0, name="long", gpus=0, retries=0, priority=0, time_limit=None, lease=None, source=None, cancelled_after=None
)  # fmt: skip


@pytest.mark.seeds
@pytest.mark.parametrize("seed", failed_seeds("mesh"))
def test_a_seed_that_failed_once_holds(seed: int) -> None:
    simulate(seed)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_whatever_breaks_no_promise_is_broken_and_in_the_end_everything_is_equal_and_done(seed: int) -> None:
    report = simulate(seed)
    assert report.tasks >= 5
    assert report.happened["starts"] > 0


def test_together_the_seeds_break_everything_that_can_break() -> None:
    faults = {fault.kind for seed in range(SEEDS) for fault in plan_for(seed).faults}
    assert faults == set(CLASSIC)
    assert {plan_for(seed).weather for seed in range(SEEDS)} == set(Weather)


# --- scenarios: the same machinery with a plan of its own


def quiet(seed: int, count: int = 3, *, submissions: tuple[Submission, ...] = (LONG,), faults: tuple[Fault, ...] = ()) -> Plan:
    """Nothing breaks but what is asked for, and tasks run for up to a minute."""
    plan = plan_for(seed, count, Weather.FAIR)
    return replace(
        plan, profile="lan", slots=(2,) * count, gpus=(0,) * count, run_seconds=60.0, seconds=10.0,
        submissions=submissions, faults=faults, weather=Weather.GENTLE if faults else Weather.FAIR,
    )  # fmt: skip


def running_task(simulation: Simulation) -> tuple[MeshPeer, TaskId]:
    """Start the mesh and go on until a task runs that goes on for a while; who runs it."""
    for peer in simulation.peers.values():
        peer.start()
    for submission in simulation.plan.submissions:
        simulation.world.call_at(submission.at, simulation.users.submit, submission)
    assert simulation.world.run_until_true(lambda: bool(simulation.watcher.live()), 60.0)
    [task] = simulation.watcher.live()
    [name] = simulation.watcher.live()[task].values()
    return next(peer for peer in simulation.peers.values() if peer.name == name), task


def long_seed() -> int:
    """A seed whose task runs for at least 20 s: how long a task runs is drawn from its fence."""
    for seed in range(100):
        simulation = Simulation(quiet(seed))
        running_task(simulation)
        simulation.world.run_until(simulation.world.now + 20.0)
        if simulation.watcher.live():
            return seed
    raise AssertionError("no task runs for long")


LONG_SEED = long_seed()


def status_everywhere(simulation: Simulation, task: TaskId) -> set[Status]:
    rows = [peer.core.row(task) for peer in simulation.running()]
    return {read(row).status for row in rows if row is not None}


def test_a_killed_agent_finds_its_task_again_and_reports_its_end() -> None:
    simulation = Simulation(quiet(LONG_SEED))
    runner, task = running_task(simulation)
    runner.kill()
    simulation.world.run_until(simulation.world.now + 5.0)
    runner.start()
    assert simulation.world.run_until_true(lambda: not simulation.watcher.live(), simulation.world.now + 70.0)
    simulation.world.run_until(simulation.world.now + 5.0)
    assert len(status_everywhere(simulation, task)) == 1
    assert simulation.watcher.counts["starts"] == 1
    assert simulation.watcher.counts["adopted"] == 1


def test_an_agent_that_is_held_dead_and_comes_back_within_its_lease_keeps_its_task() -> None:
    simulation = Simulation(quiet(LONG_SEED, 5))
    runner, _ = running_task(simulation)
    runner.kill()
    others = simulation.running()

    def held_dead() -> bool:
        return all(runner.id not in peer.peers.others_alive() for peer in others)

    assert simulation.world.run_until_true(held_dead, simulation.world.now + 30.0)
    simulation.world.run_until(simulation.world.now + 3.0)
    assert held_dead()
    runner.start()
    simulation.world.run_until(simulation.world.now + 12.0)
    assert simulation.watcher.counts["lost"] == 0
    assert simulation.watcher.counts["starts"] == 1


@pytest.mark.parametrize("seed", range(6))
def test_on_a_slow_and_lossy_network_no_task_ever_runs_twice_at_once(seed: int) -> None:
    """Claims take longer to arrive than the next peer waits, and what is prepared in no time starts as soon as it may: the
    acks of the claim are all that keeps two from starting."""
    tasks = tuple(replace(LONG, name=f"t{number}", at=4.0 + 2.0 * number) for number in range(16))
    plan = replace(
        quiet(seed, 5, submissions=tasks), weather=Weather.GENTLE, loss=0.1, delay=(0.05, 0.4), slots=(4,) * 5,
        build_seconds=0.11, run_seconds=8.0, seconds=40.0,
    )  # fmt: skip
    report = Simulation(plan).run()
    assert report.happened["dropped"] > 0
    assert report.happened["ended superseded"] > 0, "nobody claimed what another had claimed: the network was not slow enough"
    assert report.happened["overlaps"] == 0


def test_a_cancel_that_was_stored_when_the_agent_died_is_carried_out_by_its_next_run() -> None:
    simulation = Simulation(quiet(LONG_SEED))
    runner, task = running_task(simulation)
    runner.set_trap(0, runner.kill)
    runner.cancel(task)
    assert simulation.world.run_until_true(lambda: not runner.running, simulation.world.now + 1.0)
    runner.start()
    assert simulation.world.run_until_true(lambda: not simulation.watcher.live(), simulation.world.now + 12.0)
    simulation.world.run_until(simulation.world.now + 5.0)
    assert status_everywhere(simulation, task) == {Status.CANCELLED}


def test_claims_whose_tasks_are_cancelled_before_they_start_are_told_from_wasted_ones() -> None:
    """The check of fair weather takes a claim for wasted that led to no start."""
    tasks = tuple(replace(LONG, name=f"t{number}", at=4.0 + number, cancelled_after=0.05) for number in range(12))
    simulation = Simulation(quiet(LONG_SEED, submissions=tasks))
    report = simulation.run()
    cancelled = simulation.watcher.never_begun()
    assert cancelled > 0 and report.happened["starts"] > 0
    assert report.claims == report.happened["starts"] + report.happened["ended superseded"] + cancelled


@pytest.mark.parametrize("seed", range(8))
def test_what_a_dead_machine_ran_is_lost_and_claimed_again_in_time(seed: int) -> None:
    """L4: detection, the grace of 8 s, and 3 s. The slowest detection in a mesh of five is bounded by SWIM (section 4.3):
    nine probe intervals until its turn, and the longest suspicion."""
    simulation = Simulation(quiet(LONG_SEED, 5))
    runner, _ = running_task(simulation)
    simulation.world.run_until(simulation.world.now + seed / 8)
    runner.kill()
    runner.machine.lose_power(simulation.rng)
    died_at = simulation.world.now
    assert simulation.world.run_until_true(lambda: bool(simulation.watcher.live()), died_at + 9 + 24 + 8 + 3)
    assert simulation.world.now - died_at >= 4 + 8, "nobody may take it before the shortest suspicion and the grace are over"


def test_one_machine_alone_runs_its_own_tasks() -> None:
    simulation = Simulation(quiet(1, 1))
    _, task = running_task(simulation)
    assert simulation.world.run_until_true(lambda: not simulation.watcher.live(), 80.0)
    simulation.world.run_until(simulation.world.now + 2.0)
    assert all(status.final for status in status_everywhere(simulation, task))


# --- the simulation itself


def test_one_seed_makes_one_history() -> None:
    first, second, other = simulate(1), simulate(1), simulate(2)
    assert first.trace_hash == second.trace_hash != other.trace_hash


def test_the_history_does_not_depend_on_the_hash_seed_of_the_process() -> None:
    root = Path(__file__).parents[2]
    code = "from tests.simulator.mesh import simulate; print(simulate(1).trace_hash)"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True, check=True, text=True, cwd=root,
        ).stdout.strip()
        for hash_seed in ("1", "2")
    }  # fmt: skip
    assert outputs == {simulate(1).trace_hash}


def test_a_commit_is_a_seed() -> None:
    assert seed_from("123") == 123
    assert seed_from("a5b9ac0") == 0xA5B9AC0
    assert seed_from("9adf41099082c23ce72351da0cfde89f27787d7c") == 0x9ADF41099082


def test_the_command_prints_hash_faults_and_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seed", "2", "--small"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"2 {simulate(2).trace_hash[:16]} ok")
    assert all(fault.kind.value in printed for fault in plan_for(2).faults)


def test_a_violation_is_told_with_its_story_and_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Simulation, "settled", lambda self: self.watcher.fail("P0: nothing is good enough") or True)
    assert main(["--seed", "2", "--seeds", "2", "--small"]) == 1
    printed = capsys.readouterr().out
    assert "P0: nothing is good enough" in printed
    assert "user code starts" in printed
    assert "violated: 2 (P0), 3 (P0)" in printed
