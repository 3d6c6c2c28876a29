"""The table of docs/benchmarks.md: what gossip promises, what was measured, and what memberlist and others show for it.

A cell is one kind of trial over many seeds; a row is one figure of it, with its goal. Rows that miss their goal say so.

The numbers beside ours are of models of memberlist's LAN timing that were made for this project, unless a source is named.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from tests.simulator.trials import scenarios
from tests.simulator.trials.pool import run_all
from tests.simulator.trials.report import pooled, wrongs
from tests.simulator.trials.setup import Result, Scenario, Setup, spread

SEEDS: Final = 30
SEEDS_LARGE: Final = 10  # at 1,000 peers
HOURS_SCALED: Final = (("dead_kept", 1800.0), ("left_kept", 1800.0))  # a week, in a mesh that is watched for three hours
HEADER: Final = "| figure | peers | loss | measured | goal | memberlist and others |\n|---|---:|---:|---|---|---|"


@dataclass(frozen=True, slots=True)
class Measured:
    """`value` is compared with the goal's limit."""

    shown: str
    value: float


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of a cell. `anchor`: what others show for it."""

    what: str
    measure: Callable[[Sequence[Result]], Measured]
    goal: str
    limit: float
    anchor: str = ""


@dataclass(frozen=True, slots=True)
class Cell:
    """Trials that differ in their seeds only."""

    setup: Setup
    seeds: int
    rows: tuple[Row, ...]


def print_table(only: str, jobs: int | None) -> list[Result]:
    """Measure and print each row as soon as it is there. `only`: words of a row whose cell is wanted."""
    everything: list[Result] = []
    print(HEADER, flush=True)
    for cell in cells():
        if not any(only in f"{row.what}, {cell.setup.peers} peers" for row in cell.rows):
            continue
        results = run_all([replace(cell.setup, seed=seed) for seed in range(cell.seeds)], jobs)
        for row in cell.rows:
            print(line(cell, row, results), flush=True)
        seconds = sum(each.real_seconds for each in results)
        print(f"{cell.setup.scenario} with {cell.setup.peers} peers: {seconds:.0f} s of computing", file=sys.stderr, flush=True)
        everything += results
    return everything


def line(cell: Cell, row: Row, results: Sequence[Result]) -> str:
    """One line of the table."""
    found = row.measure(results)
    missed = "" if found.value <= row.limit else " **missed**"
    cells = [row.what, f"{cell.setup.peers:,}", f"{cell.setup.loss:.0%}", found.shown, row.goal + missed, row.anchor]
    return "| " + " | ".join(cells) + " |"


def cells() -> tuple[Cell, ...]:
    return (*_detection(), *_convergence(), *_false_deaths(), *_idle(), *_healing())


def _detection() -> list[Cell]:
    """Without telemetry, which shares no packet with what finds a crash."""
    models = {10: ("5.7", "8.9"), 100: ("9.8", "13.2"), 1000: ("13.7", "17.1")}
    found = []
    for peers, (median, p99) in models.items():
        limit = 1.1 * float(median)
        anchor = f"{median} s (p99 {p99} s)"
        rows = (
            Row("a crash is known to the first, `lan`", _times(scenarios.FIRST_DEAD), f"median ≤ {limit:.1f} s", limit, anchor),
            Row("a crash is known to all, `lan`", _times(scenarios.ALL_DEAD), "", float("inf")),
        )
        found.append(Cell(_setup(Scenario.CRASH, peers, record_bytes=0), _seeds(peers), rows))
    fast = Row("a crash is known to all, `fast`", _times(scenarios.ALL_DEAD), "median ≤ 2 s", 2.0)
    return [*found, Cell(_setup(Scenario.CRASH, 10, profile="fast", record_bytes=0), SEEDS, (fast,))]


def _convergence() -> list[Cell]:
    changes = (scenarios.RENAME, scenarios.LEAVE, scenarios.JOIN)
    limits = {10: 0.6, 100: 1.2, 1000: 1.6}
    found = []
    for loss in (0.0, 0.2):
        for peers, limit in limits.items():
            within = limit + (0.5 if loss else 0.0)
            anchor = f"{limit} s" + (" and 0.2 to 0.4 s more" if loss else "")
            measure = _times_within(within, *changes)
            row = Row("a change of membership is known to all", measure, f"all ≤ {within:.1f} s", within, anchor)
            setup = _setup(Scenario.CHANGE, peers, loss=loss, record_bytes=0)
            met = Row("a newcomer is known to its seed", _times(scenarios.MET), "", float("inf"))
            found.append(Cell(setup, _seeds(peers), (row, met)))
    return found


def _false_deaths() -> list[Cell]:
    lifeguard = "Lifeguard: 50 × fewer than SWIM"
    found = []
    for peers in (10, 100):
        seconds = 100 * 3600 / (SEEDS * peers)
        lossy = Row("false deaths in 100 peer-hours", _deaths, "0", 0, lifeguard)
        found.append(Cell(_setup(Scenario.LOSS, peers, loss=0.3, seconds=seconds), SEEDS, (lossy,)))
        starved = Row(
            "false deaths in 100 peer-hours, a fifth stops for 0.5 to 2 s again and again", _deaths, "0", 0, lifeguard
        )
        found.append(Cell(_setup(Scenario.STARVED, peers, seconds=seconds), SEEDS, (starved,)))
    one_way = Row(
        "deaths of healthy peers that other healthy peers believe, one peer deaf or mute",
        _believed_deaths, "0", 0, "memberlist: oscillates, removes healthy ones too (Rapid, ATC 2018)",
    )  # fmt: skip
    return [*found, Cell(_setup(Scenario.ONE_WAY, 100, seconds=300.0), SEEDS, (one_way,))]


def _idle() -> list[Cell]:
    budgets = {10: 2.0, 100: 10.0, 600: 25.0}
    models = {10: "", 100: "model of sliced scuttlebutt: 7 kB/s; chitchat's test: < 120 kB/s", 600: "model: 23 kB/s"}
    ages = {10: "", 100: "model: 11.7 s at most", 600: "model: 15.9 s at most"}
    found = []
    for peers, budget in budgets.items():
        rows = (
            Row("sent by UDP and TCP, idle, with telemetry", _sent, f"mean ≤ {budget:g} kB/s a peer", budget, models[peers]),
            Row("age of telemetry, all pairs", _ages, "p99 ≤ 20 s", 20.0, ages[peers]),
        )
        seconds = 15.0 if peers >= 600 else 0.0  # one round of publishing is enough, of 18,000 peers in all
        found.append(Cell(_setup(Scenario.IDLE, peers, seconds=seconds), SEEDS, rows))
    return found


def _healing() -> list[Cell]:
    equal = "from the end of the harm to equal views"
    limit = scenarios.HEAL_SECONDS - 1
    harms = (
        (f"split 5/5 for a minute: {equal}", _setup(Scenario.PARTITION, 10, seconds=60.0), SEEDS),
        (
            f"split 5/5 for 3 h, retention 30 min: {equal}",
            _setup(Scenario.PARTITION, 10, seconds=10_800.0, config=HOURS_SCALED),
            10,
        ),
        (f"one peer deaf or mute for 5 min: {equal}", _setup(Scenario.ONE_WAY, 10), SEEDS),
        (f"a bridge for 5 min: {equal}", _setup(Scenario.BRIDGE, 9), SEEDS),
        (f"one peer flaps for 5 min: {equal}", _setup(Scenario.FLAPPING, 10), SEEDS),
    )
    healing = [Cell(setup, seeds, (Row(what, _times(scenarios.HEALED), "always", limit),)) for what, setup, seeds in harms]
    blocked = (
        Row("UDP blocked between all: false deaths", _deaths, "0", 0),
        Row("UDP blocked between all: a crash is known to all", _times(scenarios.ALL_DEAD), "", float("inf")),
    )
    return [*healing, Cell(_setup(Scenario.UDP_BLOCKED, 10), SEEDS, blocked)]


def _setup(scenario: Scenario, peers: int, **rest: object) -> Setup:
    return replace(Setup(scenario=scenario, peers=peers), **rest)  # type: ignore[arg-type]  # checked by the rows' test


def _seeds(peers: int) -> int:
    return SEEDS_LARGE if peers >= 1000 else SEEDS


def _times(*figures: str) -> Callable[[Sequence[Result]], Measured]:
    """The spread of these figures, pooled; the median counts, but of healing the maximum."""

    def measure(results: Sequence[Result]) -> Measured:
        found = spread([sample for figure in figures for sample in pooled(results, figure)])
        return Measured(f"**{found.median:.2f} s** (p99 {found.p99:.2f}, max {found.max:.2f}; n={found.samples})", found.median)

    def measure_worst(results: Sequence[Result]) -> Measured:
        return replace(measure(results), value=spread(pooled(results, scenarios.HEALED)).max)

    return measure_worst if figures == (scenarios.HEALED,) else measure


def _times_within(limit: float, *figures: str) -> Callable[[Sequence[Result]], Measured]:
    """The same, and how many are within the goal, which is for the slowest: who missed a rumor waits for a push/pull."""

    def measure(results: Sequence[Result]) -> Measured:
        samples = [sample for figure in figures for sample in pooled(results, figure)]
        share = sum(sample <= limit for sample in samples) / len(samples)
        shown = _times(*figures)(results).shown
        return Measured(f"{shown[:-1]}; {share:.1%} within {limit:g} s)", max(samples))

    return measure


def _deaths(results: Sequence[Result]) -> Measured:
    found, hours = wrongs(results), sum(each.peer_hours for each in results)
    suspicions = found.suspicions + found.suspicions_harmed
    return Measured(f"**{found.deaths}** ({suspicions} suspicions in {hours:.0f} h)", found.deaths)


def _believed_deaths(results: Sequence[Result]) -> Measured:
    found = wrongs(results)
    alone = found.deaths_healthy - found.deaths_believed
    return Measured(f"**{found.deaths_believed}** (and {alone} that only the deaf or mute one believed)", found.deaths_believed)


def _sent(results: Sequence[Result]) -> Measured:
    udp, tcp = pooled(results, "UDP sent (kB/s a peer)"), pooled(results, "TCP both ways (kB/s a peer)")
    mean = (sum(udp) + sum(tcp) / 2) / len(udp)
    packets = pooled(results, "UDP packets sent (/s a peer)")
    return Measured(f"**{mean:.1f} kB/s** (busiest peer {max(udp):.1f}; {sum(packets) / len(packets):.1f} packets/s)", mean)


def _ages(results: Sequence[Result]) -> Measured:
    found = spread(pooled(results, "telemetry age (s)"))
    missing = sum(each.counts.get("telemetry missing", 0) for each in results)
    return Measured(f"{found.median:.1f} s (**p99 {found.p99:.1f}**, max {found.max:.1f}; {missing} missing)", found.p99)
