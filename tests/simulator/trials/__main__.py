"""`scripts/simulate gossip`: what gossip does in a mesh of so many peers, measured over many seeds.

    scripts/simulate gossip --peers 1000 --loss 0.2 --seeds 10
    scripts/simulate gossip --scenario partition --seconds 10800 --set dead_kept=1800 --set left_kept=1800
    scripts/simulate gossip --table

Without a scenario it measures a crash, changes of membership, and an idle mesh. Each figure is printed with its median, 99th
percentile and maximum. The same seed makes the same history: --verbose prints the hash of each. --table makes the
table of docs/benchmarks.md.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

from meshq.gossip.swim import PROFILES, SwimConfig
from tests.simulator.trials import report, table
from tests.simulator.trials.pool import run_all
from tests.simulator.trials.setup import Result, Scenario, Setup


def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    results = table.print_table(options.only, options.jobs) if options.table else _run(options)
    if options.json is not None:
        options.json.write_text(json.dumps(report.as_json(results), indent=1))
    return 0


def _run(options: argparse.Namespace) -> list[Result]:
    everything: list[Result] = []
    for scenario in options.scenario or (Scenario.CRASH, Scenario.CHANGE, Scenario.IDLE):
        setups = [
            Setup(
                scenario=scenario, peers=options.peers, seed=seed, loss=options.loss, profile=options.profile,
                seconds=options.seconds, share=options.share, record_bytes=options.record_bytes,
                change_seconds=options.change_seconds, config=tuple(options.set), discovery=not options.no_discovery,
            )
            for seed in range(options.seed, options.seed + options.seeds)
        ]  # fmt: skip
        results = run_all(setups, options.jobs)
        print("\n".join(report.lines(results)), flush=True)
        if options.verbose:
            for each in results:
                print(f"  seed {each.setup.seed}: {each.trace_hash[:16]}, {each.real_seconds:.1f} s")
        everything += results
    return everything


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/simulate gossip", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--scenario", action="append", type=Scenario, choices=list(Scenario), help="may be given again")
    add("--peers", type=_at_least(2), default=10)
    add("--loss", type=_share, default=0.0, help="share of all UDP packets, both ways")
    add("--profile", choices=sorted(PROFILES), default="lan")
    add("--seeds", type=_at_least(1), default=10, help="how many")
    add("--seed", type=int, default=0, help="the first of them")
    add("--seconds", type=float, default=0.0, help="of virtual time that are measured; the default is the scenario's")
    add(
        "--share",
        type=_share,
        default=0.0,
        help="of the peers, or of the pairs, that are struck; the default is the scenario's",
    )
    add("--record-bytes", type=int, default=250, help="telemetry of one peer; 0 for none")
    add("--change-seconds", type=float, default=60.0, help="between changes of one peer's telemetry, beside the periodic ones")
    add(
        "--set",
        action="append",
        type=_setting,
        default=[],
        metavar="NAME=VALUE",
        help="a field of the profile, e.g. dead_kept=60",
    )
    add("--no-discovery", action="store_true", help="partition: mDNS does not show the addresses again")
    add("--jobs", type=_at_least(1), default=None, help="processes; the default is one a core")
    add("--json", type=Path, help="write all samples there")
    add("--verbose", action="store_true", help="print the hash of each history")
    add("--table", action="store_true", help="measure the table of docs/benchmarks.md; takes an hour on two cores")
    add("--only", default="", metavar="WORDS", help="with --table: only cells with a row in which this stands")
    return parser


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share: say it between 0 and 1")
    return value


def _at_least(smallest: int) -> Callable[[str], int]:
    def count(text: str) -> int:
        value = int(text)
        if value < smallest:
            raise argparse.ArgumentTypeError(f"{text} is too few: at least {smallest}")
        return value

    return count


def _setting(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    if name not in {field.name for field in fields(SwimConfig)}:
        raise argparse.ArgumentTypeError(f"{name!r} is no field of a profile")
    return name, float(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
