"""Simulates whole meshes and says what happened: `python -m tests.simulator.mesh --seed 41`.

Each seed prints the hash of its trace, what broke, and the verdict. A violation prints the last events that tell its story, and
the exit code is 1. A commit's id is a seed, too: the number that its first twelve digits are.
"""

import argparse
import string
import sys

from tests.simulator.invariants import Violation
from tests.simulator.plan import plan_for
from tests.simulator.simulation import Report, Simulation


def simulate(seed: int) -> Report:
    """Run the seed. Raises Violation if a rule of the mesh was broken."""
    return Simulation(plan_for(seed)).run()


def seed_from(text: str) -> int:
    """A number, or the number that a commit's id begins with."""
    if text.isdecimal() and len(text) <= 18:
        return int(text)
    if text and all(letter in string.hexdigits for letter in text):
        return int(text[:12], 16)
    raise argparse.ArgumentTypeError(f"{text!r} is neither a seed nor a commit's id")


def describe(report: Report) -> str:
    plan = report.plan
    happened = " ".join(f"{name}={count}" for name, count in sorted(report.happened.items()) if count)
    mesh = f"{plan.weather} {plan.profile} {len(plan.slots)} peers, loss {plan.loss:.0%}, {report.tasks} tasks"
    work = f"{report.claims_per_task:.2f} claims a task, calm after {report.calm_seconds:.0f} s"
    return f"{plan.seed} {report.trace_hash[:16]} ok  {mesh}, {work}\n    {happened}"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulator.mesh", description="Simulate whole meshes.")
    parser.add_argument("--seed", type=seed_from, help="one seed, or a commit's id; with --seeds the first one")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds, one after the other")
    parser.add_argument("--from", type=seed_from, default=0, dest="first", help="the first of them, without --seed")
    parser.add_argument("--verbose", action="store_true", help="print the story of runs that hold, too")
    options = parser.parse_args(arguments)
    first = options.first if options.seed is None else options.seed
    failed = []
    for seed in range(first, first + options.seeds):
        simulation = Simulation(plan_for(seed))
        try:
            print(describe(simulation.run()), flush=True)
        except Violation as violation:
            failed.append(seed)
            print(f"{seed} {simulation.world.trace_hash()[:16]} VIOLATED  {simulation.plan.weather}\n{violation}", flush=True)
        if options.verbose:
            print("\n".join(f"  {e.at:9.3f} {e.place:<4} {e.task[:6]:<6} {e.text}" for e in simulation.watcher.events))
    if options.seeds > 1:
        print(f"{options.seeds - len(failed)} of {options.seeds} seeds hold" + (f"; violated: {failed}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
