"""The figures of the ledger, measured in simulated meshes over many seeds: `scripts/simulate ledger --table`.

    claims     how many claims and starts a task takes where nothing is broken
    loss       how many of the starts are of a task that had started already, at 20 % loss
    failover   how long after a power cut the tasks of that machine run elsewhere, per profile, and under `stop`

Everything is counted by the watcher who sees all machines. The same seed gives the same figure.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from meshq.task import Isolation
from tests.simulator.plan import Plan, Submission, Weather, plan_for
from tests.simulator.simulation import Simulation

LOSS: Final = 0.2
TASK_SECONDS: Final = 400.0  # a task that is to be interrupted
LEFT_SECONDS: Final = 200.0  # it must have so much left when its machine goes down
LIMIT: Final = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """Of all runs of one setting."""

    tasks: int
    claims: int
    starts: int
    again: int  # starts of a task that had been started before
    overlaps: int  # of these, while it ran


def _submission(number: int, at: float, isolation: Isolation) -> Submission:
    return Submission(
        at=at, name=f"t{number}", gpus=0, retries=0, priority=0, time_limit=None, lease=None, source=None,
        cancelled_after=None, isolation=isolation.value,
    )  # fmt: skip


def _calm(seed: int, peers: int, profile: str, submissions: Sequence[Submission], run_seconds: float) -> Plan:
    """Nothing breaks."""
    return replace(
        plan_for(seed, peers, Weather.FAIR), profile=profile, slots=(2,) * peers, gpus=(0,) * peers, page_rows=1_000,
        delay=(0.0005, 0.003), build_seconds=0.1, run_seconds=run_seconds, seconds=20.0, submissions=tuple(submissions),
        actions=(), faults=(), release_chance=0.0, reliable=True,
    )  # fmt: skip


def count(seeds: range, peers: int, tasks: int, loss: float) -> Counted:
    """Submit so many tasks within 15 s, and let them all end."""
    total = [0] * 5
    for seed in seeds:
        submissions = [_submission(number, 3.0 + 15.0 * number / tasks, Isolation.CONTINUE) for number in range(tasks)]
        plan = replace(_calm(seed, peers, "lan", submissions, 8.0), loss=loss, weather=Weather.STORMY)
        simulation = Simulation(plan)
        simulation.run()
        counts = simulation.watcher.counts
        again = counts["starts"] - len(simulation.watcher.started_tasks())
        for place, number in enumerate((tasks, counts["claim"], counts["starts"], again, counts["overlaps"])):
            total[place] += number
    return Counted(tasks=total[0], claims=total[1], starts=total[2], again=total[3], overlaps=total[4])


def failover(seeds: range, peers: int, profile: str, isolation: Isolation) -> list[float]:
    """For each task that was interrupted: the seconds from the power cut until its user code runs elsewhere."""
    return sorted(seconds for seed in seeds for seconds in _cut_power(seed, peers, profile, isolation))


def _cut_power(seed: int, peers: int, profile: str, isolation: Isolation) -> list[float]:
    submissions = [_submission(number, 4.0 + 0.3 * number, isolation) for number in range(2 * (peers - 1))]
    simulation = Simulation(_calm(seed, peers, profile, submissions, TASK_SECONDS))
    world, watcher = simulation.world, simulation.watcher
    for peer in simulation.peers.values():
        world.call_later(simulation.rng.uniform(0.0, 0.5), peer.start)
    simulation.users.plan()
    world.run_until(20.0 + simulation.rng.uniform(0.0, 5.0))
    now = world.now
    interrupted = {
        peer: [f.claimed.task for f in peer.machine.folders.values() if f.ends is not None and f.ends.when > now + LEFT_SECONDS]
        for peer in simulation.peers.values()
    }
    victim = max(interrupted, key=lambda peer: len(interrupted[peer]))
    victim.gone = True
    victim.kill()
    victim.machine.lose_power(simulation.rng)
    waiting, seconds = interrupted[victim], list[float]()

    def back() -> bool:
        for task in [task for task in waiting if watcher.live().get(task)]:
            waiting.remove(task)
            seconds.append(world.now - now)
        return not waiting

    if not world.run_until_true(back, now + LIMIT):
        watcher.fail(f"L4: {waiting} do not run {LIMIT:g} s after the power cut")
    return seconds


def at(values: Sequence[float], share: float) -> float:
    """The value that so large a share of them does not exceed."""
    return values[min(len(values) - 1, int(share * len(values)))]


# ---- the command


def _claims(seeds: range) -> None:
    print("| peers | loss | tasks | claims a task | starts | started again | live twice |\n|---|---|---|---|---|---|---|")
    for peers, loss in ((5, 0.0), (10, 0.0), (50, 0.0), (10, LOSS), (50, LOSS)):
        few = range(seeds.start, seeds.start + max(1, len(seeds) * 5 // peers))
        found = count(few, peers, 100, loss)
        share = f"{found.again} ({found.again / found.tasks:.2%})"
        row = (peers, f"{loss:.0%}", found.tasks, f"{found.claims / found.tasks:.3f}", found.starts, share, found.overlaps)
        print("| " + " | ".join(map(str, row)) + " |", flush=True)


def _failovers(seeds: range) -> None:
    print("| profile | isolation | cuts | tasks | median | p99 | max |\n|---|---|---|---|---|---|---|")
    for profile in ("lan", "fast"):
        for isolation in Isolation:
            found = failover(seeds, 5, profile, isolation)
            figures = (f"{at(found, 0.5):.1f} s", f"{at(found, 0.99):.1f} s", f"{found[-1]:.1f} s")
            print("| " + " | ".join((profile, isolation.value, str(len(seeds)), str(len(found)), *figures)) + " |", flush=True)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/simulate ledger", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", action="store_true", help="all of it, as docs/benchmarks.md shows it")
    parser.add_argument("--only", choices=("claims", "failover"), action="append", help="may be given again")
    parser.add_argument("--seed", type=int, default=1, help="the first one")
    parser.add_argument("--seeds", type=int, default=100, help="how many power cuts, and how many meshes of five")
    options = parser.parse_args(arguments)
    seeds = range(options.seed, options.seed + options.seeds)
    wanted = options.only or ("claims", "failover")
    if "claims" in wanted:
        _claims(seeds)
    if "failover" in wanted:
        _failovers(seeds)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
