"""Simulates whole meshes and says what happened: `scripts/simulate 41`, or `python -m tests.simulator.mesh --seed 41`.

Each seed prints the hash of its trace, what broke, and the verdict. A violation prints the last events that tell its story, and
the exit code is 1; with --shrink it goes on to find a smaller plan that breaks the same rule, and tells that one's story. A
commit's id is a seed, too: the number that its first twelve digits are. --small draws meshes of a few peers and tasks, not
those of a lab; --for goes on with further seeds for so many seconds.
"""

import argparse
import multiprocessing
import os
import string
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from tests.simulator.invariants import INVARIANTS, LIVENESS, Violation
from tests.simulator.plan import FaultKind, Mode, Plan, plan_for
from tests.simulator.shrink import failure, shrink, told
from tests.simulator.simulation import Report, Simulation
from tests.simulator.swarm import swarm_plan

ROOT = Path(__file__).parents[2]
SHRINK_SECONDS = 300.0


def simulate(seed: int) -> Report:
    """Run the small mesh of this seed. Raises Violation if a rule of the mesh was broken."""
    return Simulation(plan_for(seed)).run()


def simulate_swarm(seed: int, mode: Mode | None = None) -> Report:
    """Run the mesh of this seed that is as large as a lab's."""
    return Simulation(swarm_plan(seed, mode)).run()


def seed_from(text: str) -> int:
    """A number, or the number that a commit's id begins with."""
    if text.isdecimal() and len(text) <= 18:
        return int(text)
    if text and all(letter in string.hexdigits for letter in text):
        return int(text[:12], 16)
    raise argparse.ArgumentTypeError(f"{text!r} is neither a seed nor a commit's id")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which plan a seed stands for, and what is printed of its run."""

    small: bool = False
    mode: Mode | None = None
    shrink: bool = False
    verbose: bool = False

    def plan(self, seed: int) -> Plan:
        return plan_for(seed) if self.small else swarm_plan(seed, self.mode)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    seed: int
    text: str
    rule: str  # that was broken; empty if none was
    happened: Counter[str]


def judge(seed: int, choice: Choice) -> Verdict:
    """Run the seed and say what happened."""
    plan = choice.plan(seed)
    simulation = Simulation(plan)
    rule, happened = "", Counter[str]()
    try:
        report = simulation.run()
        text, happened = describe(report), report.happened
    except AssertionError as error:
        rule = failure(error)
        text = f"{seed} {simulation.world.trace_hash()[:16]} VIOLATED  {plan.mode} {plan.weather}\n{_what(simulation, error)}"
    if choice.verbose:
        text += "\n" + "\n".join(simulation.watcher.lines())
    if rule and choice.shrink:
        text += "\n" + _shrunken(plan, rule)
    return Verdict(seed=seed, text=text, rule=rule, happened=happened)


def _what(simulation: Simulation, error: AssertionError) -> str:
    if isinstance(error, Violation):
        return str(error)
    return f"{''.join(traceback.format_exception(error))}\n{simulation.watcher.story()}"


def _shrunken(plan: Plan, rule: str) -> str:
    ends = time.monotonic() + SHRINK_SECONDS

    def fails(smaller: Plan) -> bool:
        try:
            Simulation(smaller).run()
        except AssertionError as error:
            return failure(error) == rule
        return False

    small, tries = shrink(plan, fails, lambda: time.monotonic() > ends)
    simulation, story = Simulation(small), "it does not fail any more"
    try:
        simulation.run()
    except AssertionError as error:
        story = _what(simulation, error)
    return f"The smallest of {tries} plans that break {rule}:\n{told(small)}\n{story}"


def describe(report: Report) -> str:
    plan = report.plan
    happened = " ".join(f"{name}={count}" for name, count in sorted(report.happened.items()) if count)
    mesh = f"{plan.weather} {plan.profile} {len(plan.slots)} peers, loss {plan.loss:.0%}, {report.tasks} tasks"
    if plan.mode is Mode.LIVENESS:
        mesh = f"{len(plan.ill)} ill, {mesh}"
    work = f"{report.claims_per_task:.2f} claims a task, calm after {report.calm_seconds:.0f} s"
    return f"{plan.seed} {report.trace_hash[:16]} ok  {mesh}, {work}\n    {happened}"


def commit() -> str:
    """Of this checkout; empty where there is none."""
    told = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return told.stdout.strip()


# ---- the command


def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    if options.rules:
        print("\n".join(f"{name:<4} {text}" for name, text in (INVARIANTS | LIVENESS).items()))
        return 0
    first = options.first if options.seed is None else options.seed
    choice = Choice(small=options.small, mode=options.mode, shrink=options.shrink, verbose=options.verbose)
    many = options.seeds > 1 or options.seconds is not None
    if many:
        print(f"commit {commit() or 'unknown'}, seeds from {first}", flush=True)
    ends = None if options.seconds is None else time.monotonic() + options.seconds
    seeds = iter(range(first, first + options.seeds)) if ends is None else _until(first, ends)
    failed, done, happened = list[Verdict](), 0, Counter[str]()
    for verdict in _judged(seeds, choice, options.jobs):
        done += 1
        happened += verdict.happened
        failed += [verdict] if verdict.rule else []
        if verdict.rule or not options.quiet:
            print(verdict.text, flush=True)
    if many:
        violated = ", ".join(f"{verdict.seed} ({verdict.rule})" for verdict in failed)
        print("in all: " + " ".join(f"{name}={happened[name]}" for name in (*FaultKind, "submitted", "starts", "overlaps")))
        print(f"{done - len(failed)} of {done} seeds hold" + (f"; violated: {violated}" if failed else ""))
    return 1 if failed else 0


def _until(first: int, ends: float) -> Iterator[int]:
    """Seed after seed as long as there is time; at least one."""
    yield first
    while time.monotonic() < ends:
        first += 1
        yield first


def _judged(seeds: Iterator[int], choice: Choice, jobs: int) -> Iterator[Verdict]:
    """In the order of the seeds with one job; else as they come."""
    if jobs == 1:
        yield from (judge(seed, choice) for seed in seeds)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        running: set[Future[Verdict]] = set()
        for seed in seeds:
            running.add(pool.submit(judge, seed, choice))
            if len(running) >= jobs:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (each.result() for each in done)
        yield from (each.result() for each in running)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.simulator.mesh", description=__doc__)
    add = parser.add_argument
    add("--seed", type=seed_from, help="one seed, or a commit's id; with --seeds or --for the first one")
    add("--seeds", type=int, default=1, help="how many seeds, one after the other")
    add("--for", type=float, dest="seconds", metavar="SECONDS", help="go on with further seeds for so long")
    add("--from", type=seed_from, default=0, dest="first", help="the first of them, without --seed")
    add("--jobs", type=int, default=1, help=f"processes that run seeds side by side; this machine has {os.cpu_count()} CPUs")
    add("--small", action="store_true", help="meshes of a few peers and tasks")
    add("--mode", type=Mode, choices=list(Mode), help="ask for safety or for liveness; else each seed says which")
    add("--shrink", action="store_true", help="find a smaller plan that breaks the same rule")
    add("--quiet", action="store_true", help="print nothing of seeds that hold")
    add("--verbose", action="store_true", help="print the whole story, also of runs that hold")
    add("--rules", action="store_true", help="print what is checked, and where")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
