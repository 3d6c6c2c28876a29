"""Whole meshes whose every task is under `--on-isolation stop`, on a network that is mostly cut somewhere; clocks are wrong."""

from collections import Counter
from dataclasses import replace
from random import Random

import pytest

from meshq.ledger.grants import Granted, Voter
from meshq.task import Isolation
from tests.simulator.invariants import Violation
from tests.simulator.plan import Fault, FaultKind, Plan, Weather, plan_for
from tests.simulator.simulation import Report, Simulation

SEEDS = 16
KINDS = (FaultKind.PARTITION, FaultKind.PARTITION, FaultKind.DEAF, FaultKind.STOP, FaultKind.KILL, FaultKind.POWER)


def plan(seed: int) -> Plan:
    """Tasks run for up to two and a half minutes, and what breaks stays broken for up to one: twice the time of a grant."""
    rng = Random(f"{seed}/isolation")
    faults = [
        Fault(at=3.0 + rng.uniform(0.0, 120.0), kind=rng.choice(KINDS), seconds=rng.uniform(5.0, 60.0))
        for _ in range(rng.randint(3, 9))
    ]
    usual = plan_for(seed, weather=Weather.STORMY)
    return replace(
        usual,
        run_seconds=150.0,
        seconds=140.0,
        faults=tuple(sorted(faults, key=lambda fault: fault.at)),
        submissions=tuple(
            replace(each, isolation=Isolation.STOP.value, time_limit=None, at=2.0 + rng.uniform(0.0, 60.0))
            for each in usual.submissions
        ),
        rates=tuple(rng.choice((0.99, 1.01)) for _ in usual.slots),
    )


def simulate(seed: int) -> Report:
    return Simulation(plan(seed)).run()


@pytest.mark.parametrize("seed", range(SEEDS))
def test_no_task_ever_runs_twice_at_once_and_in_the_end_every_one_has_run(seed: int) -> None:
    report = simulate(seed)
    assert report.happened["overlaps"] == 0
    assert report.happened["starts"] > 0


def test_together_the_seeds_cut_machines_off_and_their_tasks_run_elsewhere() -> None:
    happened: Counter[str] = Counter()
    for seed in range(SEEDS):
        happened += simulate(seed).happened
    assert happened["stopped in isolation"] > 8 and happened["lost"] > 20


def test_with_voters_that_grant_everything_tasks_run_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Voter, "vote", lambda *_, **__: Granted())
    with pytest.raises(Violation, match="I8"):
        for seed in range(SEEDS):
            simulate(seed)
