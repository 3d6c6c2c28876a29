"""Membership with real agents, meshq's beside Debian's serf: how fast it is, what it costs, and whether it errs.

Each agent has a machine of its own, a network namespace on a bridge, and nothing to do. First the one system is measured,
then the other, at each size: cold starts, what an idle agent uses, losses of an agent; at the largest size also a network
that drops a quarter of all packets. Where an agent was killed, its machine refuses connections, which is a hint that a
machine without power does not give: so there are losses with the cable pulled, too. Needs root, `ip`, `iptables` and,
beside meshq, `serf`.
"""

import argparse
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import NoReturn

from benches.fleets import STARTS_AT_ONCE, SYSTEMS, ColdStart, Fleet, Loss
from benches.measured import Figure, ratio
from benches.views import POLL_SECONDS, Kind
from benches.weights import LossyNetwork, Weight, weigh
from meshq.errors import UsageError
from tests.processes.mesh import end_processes_of
from tests.processes.netns import lan

PAUSE_SECONDS = (3.0, 6.0)  # between losses: random, lest they fall on the same moment of the probe period each time
FALSE_ALARMS: Mapping[Kind, str] = {
    "dead": "false deaths",
    "suspect": "beliefs that somebody is suspect",
    "unanswered": "probes that failed",
    "refuted": "refutations",
    "tcp_only": "beliefs that UDP is blocked",
}
GOALS = {
    "resident memory of an agent": "<= 70 MB",
    "processor, the agent": "<= 1 %",
    "sent by an agent, frames": "<= 2 kB/s where N = 10",
    "false deaths": "0",
}
"""Of meshq's figures, by what stands after the colon."""
RATIO_GOAL = "<= 1.2"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is measured, and how often."""

    sizes: Sequence[int]
    systems: Sequence[str]
    cold_starts: int
    losses: int
    cuts: int
    settle_seconds: float
    idle_seconds: float
    loss: float
    loss_minutes: float
    seed: int


@dataclass(slots=True, kw_only=True)
class Lossy:
    """What happened while packets were dropped."""

    minutes: float
    dropped: tuple[int, int]
    alarms: dict[Kind, int]  # in all logs; what a system's log does not tell is not in it
    healed: float  # seconds from the end of the loss until everybody held everybody alive
    weights: list[Weight]


@dataclass(slots=True, kw_only=True)
class Result:
    """Everything about one system at one size."""

    load: float
    cold_starts: list[ColdStart] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)
    cuts: list[Loss] = field(default_factory=list)
    idle: list[Weight] = field(default_factory=list)
    lossy: Lossy | None = None


def measure(arguments: Sequence[str] = ()) -> list[Figure]:
    plan = _plan(arguments)
    _check_machine(plan)
    figures = []
    with _interruptible():
        for size in plan.sizes:
            results: dict[str, Result] = {}
            for system in plan.systems:
                results[system] = _measure(plan, system, size)
                shown = _figures(f"{system} {size}", results[system])
                for figure in shown:
                    _say(str(figure))  # a bench of half an hour that is interrupted has not been for nothing
                figures += _with_goals(shown) if system == "meshq" else shown
            if {"meshq", "serf"} <= set(results):
                figures += _ratios(size, results["meshq"], results["serf"])
    return [*_how(plan), *figures]


# ---- what to do


def _plan(arguments: Sequence[str]) -> Plan:
    parser = argparse.ArgumentParser(prog="scripts/bench gossip", description=__doc__)
    parser.add_argument(
        "--agents", dest="sizes", type=int, nargs="+", default=[10, 30], metavar="N", help="sizes of the mesh (10 30)"
    )
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS), help="which to measure (both)")
    parser.add_argument("--cold-starts", type=int, default=3, metavar="N", help="of the whole mesh (3)")
    parser.add_argument("--losses", type=int, default=5, metavar="N", help="agents killed, one after the other (5)")
    parser.add_argument("--cuts", type=int, default=3, metavar="N", help="the same with the cable pulled first (3)")
    parser.add_argument("--settle-seconds", type=float, default=20.0, metavar="S", help="from a full view to idling (20)")
    parser.add_argument("--idle-seconds", type=float, default=60.0, metavar="S", help="over which cost is measured (60)")
    parser.add_argument("--loss", type=float, default=0.25, metavar="SHARE", help="of the packets, on the lossy network (0.25)")
    parser.add_argument("--loss-minutes", type=float, default=2.0, metavar="M", help="on the lossy network; 0: none (2)")
    parser.add_argument("--seed", type=int, default=0, help="of what is chosen at random: whom to kill, and when (0)")
    plan = Plan(**vars(parser.parse_args(arguments)))
    if not all(2 <= size <= 250 for size in plan.sizes):
        parser.error("a mesh of 2 to 250 agents can be measured")
    if plan.cold_starts < 1 or plan.losses < 0 or plan.cuts < 0 or plan.idle_seconds <= 0 or not 0 < plan.loss < 1:
        parser.error("at least one cold start, some idle seconds, and a loss between 0 and 1 are needed")
    return plan


def _check_machine(plan: Plan) -> None:
    if os.geteuid() != 0:
        raise UsageError("bench gossip: only root may make network namespaces", "run it with sudo, or in a container of root's")
    for program, package in {"ip": "iproute2", "iptables": "iptables", "serf": "serf"}.items():
        if shutil.which(program) is None and (program != "serf" or "serf" in plan.systems):
            alone = ", or measure meshq alone with --systems meshq" if program == "serf" else ""
            raise UsageError(f"bench gossip: {program} is missing", f"apt-get install -y {package}{alone}")
    if subprocess.run(("unshare", "--net", "true"), capture_output=True, check=False).returncode != 0:
        raise UsageError("bench gossip: this machine lets not even root make network namespaces", "run it on another machine")


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the bench once everything is put away; more of them don't cut that short."""
    numbers = (signal.SIGINT, signal.SIGTERM)

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        _say("interrupted: putting everything away")
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


# ---- doing it


@contextmanager
def _fleet(system: str, size: int) -> Iterator[Fleet]:
    folder = Path(tempfile.mkdtemp(prefix="meshq-bench-"))
    try:
        with lan(size) as net:
            fleet = Fleet(system, net, folder)
            try:
                yield fleet
            finally:
                fleet.stop()
                end_processes_of(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _measure(plan: Plan, system: str, size: int) -> Result:
    result = Result(load=os.getloadavg()[0])
    for number in range(1, plan.cold_starts + 1):
        with _fleet(system, size) as fleet:
            _say(f"{system}, {size} agents: cold start {number} of {plan.cold_starts}")
            result.cold_starts.append(fleet.start())
            if number == plan.cold_starts:
                _measure_running(plan, fleet, result, f"{system}, {size} agents")
    return result


def _measure_running(plan: Plan, fleet: Fleet, result: Result, what: str) -> None:
    _say(f"{what}: idle")
    time.sleep(plan.settle_seconds)
    result.idle = weigh(fleet.runners, plan.idle_seconds)
    fleet.check_views()
    rng = random.Random(plan.seed)
    result.losses = [_lose_one(fleet, rng, f"{what}: SIGKILL", machine=False) for _ in range(plan.losses)]
    result.cuts = [_lose_one(fleet, rng, f"{what}: cable pulled", machine=True) for _ in range(plan.cuts)]
    fleet.check_views()
    if plan.loss_minutes and len(fleet.runners) == max(plan.sizes):
        _say(f"{what}: {plan.loss_minutes:g} minutes with {plan.loss:.0%} loss")
        result.lossy = _lossy(plan, fleet)


def _lose_one(fleet: Fleet, rng: random.Random, what: str, *, machine: bool) -> Loss:
    lost = rng.choice(fleet.runners[1:])  # the seed is spared: the lost one comes back through it
    time.sleep(rng.uniform(*PAUSE_SECONDS))
    loss = fleet.lose_and_restart(lost, machine=machine)
    _say(f"{what}: {lost.name} held dead by all after {loss.all:.1f} s")
    return loss


def _lossy(plan: Plan, fleet: Fleet) -> Lossy:
    fleet.views.read()
    before = {kind: fleet.views.total(kind) for kind in FALSE_ALARMS if kind in fleet.views.words}
    network = LossyNetwork(fleet.runners, plan.loss)
    weights = weigh(fleet.runners, 60 * plan.loss_minutes)
    dropped = network.dropped()
    fleet.views.read()
    alarms = {kind: fleet.views.total(kind) - count for kind, count in before.items()}
    network.mend()
    healed = fleet.wait_until_full()
    fleet.check_views()
    return Lossy(minutes=plan.loss_minutes, dropped=dropped, alarms=alarms, healed=healed, weights=weights)


# ---- showing it


def _how(plan: Plan) -> list[Figure]:
    return [
        Figure("each agent", "has a machine of its own; encrypted, profile lan, joined by one seed"),
        Figure("cold starts", f"{STARTS_AT_ONCE} agents starting at a time, the next when one is ready"),
        Figure("events", f"as the agents' logs tell, read every {POLL_SECONDS * 1e3:.0f} ms; counted over all logs"),
        Figure("chosen at random", f"whom to kill and when, seed {plan.seed}"),
    ]


def _with_goals(figures: Sequence[Figure]) -> list[Figure]:
    return [replace(figure, goal=GOALS.get(figure.what.split(": ")[1], "")) for figure in figures]


def _figures(what: str, result: Result) -> list[Figure]:
    colds = result.cold_starts
    figures = [
        Figure(f"{what}: load before", f"{result.load:.1f}"),
        Figure(f"{what}: cold start, first process to full view", _seconds([each.from_first for each in colds])),
        Figure(f"{what}: cold start, last process to full view", _seconds([each.from_last for each in colds])),
        *_loss_figures(f"{what}: SIGKILL", result.losses),
        *_loss_figures(f"{what}: cable pulled", result.cuts),
    ]
    figures += _idle_figures(f"{what}, idle", result.idle)
    return figures + (_lossy_figures(what, result.lossy) if result.lossy is not None else [])


def _loss_figures(what: str, losses: Sequence[Loss]) -> list[Figure]:
    if not losses:
        return []
    return [
        Figure(f"{what} until the first holds it dead", _seconds([each.first for each in losses])),
        Figure(f"{what} until all hold it dead", _seconds([each.all for each in losses])),
        Figure(f"{what}; from its restart until all hold it alive", _seconds([each.back for each in losses])),
    ]


def _idle_figures(what: str, weights: Sequence[Weight]) -> list[Figure]:
    figures = [
        Figure(f"{what}: resident memory of an agent", _range([each.memory for each in weights], "MiB")),
        Figure(f"{what}: processor, the agent", _range([each.cpu for each in weights], "% of a core")),
    ]
    if any(each.memory_helpers for each in weights):
        figures += [
            Figure(f"{what}: resident memory of its helpers", _range([each.memory_helpers for each in weights], "MiB")),
            Figure(f"{what}: processor, its helpers", _range([each.cpu_helpers for each in weights], "% of a core")),
        ]
    return [
        *figures,
        Figure(f"{what}: memory of all these that nobody shares", _range([each.unshared for each in weights], "MiB")),
        Figure(f"{what}: sent by an agent, frames", _range([each.sent for each in weights], "kB/s")),
        Figure(f"{what}: received by an agent, frames", _range([each.received for each in weights], "kB/s")),
        Figure(f"{what}: packets of an agent, both ways", _range([each.packets for each in weights], "/s")),
    ]


def _lossy_figures(what: str, lossy: Lossy) -> list[Figure]:
    dropped, came = lossy.dropped
    what = f"{what}, {lossy.minutes:g} min lossy"
    return [
        Figure(f"{what}: packets dropped", f"{dropped} of {came} ({dropped / max(1, came):.1%})"),
        *(
            Figure(f"{what}: {alarm}", str(lossy.alarms.get(kind, "its log does not tell")))
            for kind, alarm in FALSE_ALARMS.items()
        ),
        Figure(f"{what}: processor meanwhile", _range([each.cpu for each in lossy.weights], "% of a core")),
        Figure(f"{what}: sent meanwhile, frames", _range([each.sent for each in lossy.weights], "kB/s")),
        Figure(f"{what}: end of it until all see all", f"{lossy.healed:.1f} s"),
    ]


def _ratios(size: int, meshq: Result, serf: Result) -> list[Figure]:
    pairs = {"SIGKILL": (meshq.losses, serf.losses), "cable pulled": (meshq.cuts, serf.cuts)}
    figures = []
    for how, (ours, theirs) in pairs.items():
        if ours and theirs:
            first = ratio([each.first for each in ours], [each.first for each in theirs])
            last = ratio([each.all for each in ours], [each.all for each in theirs])
            figures += [
                Figure(f"meshq / serf {size}: {how} until the first holds it dead", first, RATIO_GOAL),
                Figure(f"meshq / serf {size}: {how} until all hold it dead", last, RATIO_GOAL),
            ]
    return figures


def _seconds(samples: Sequence[float]) -> str:
    return f"{_range(samples, 's')}, n={len(samples)}"


def _range(samples: Sequence[float], unit: str) -> str:
    """Median, least and most."""
    return f"{statistics.median(samples):.2f} {unit} ({min(samples):.2f} to {max(samples):.2f})"
