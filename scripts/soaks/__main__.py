"""`scripts/soak kills` and `scripts/soak partitions`: hurt real agents as often as was asked for, then judge."""

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType

from meshq.errors import MeshqError
from soaks import kills, partitions
from soaks.place import NAMES, Options, Place
from soaks.report import report

EXIT_INTERRUPTED = 130


def main(arguments: list[str]) -> int:
    given = _parser().parse_args(arguments)
    options = Options(
        kind=given.kind, seed=given.seed, peers=given.peers, kills=getattr(given, "kills", 0), tasks=getattr(given, "tasks", 0),
        short=getattr(given, "short", 0), long=getattr(given, "long", 0),
    )  # fmt: skip
    folder = given.folder or Path("build") / "soak" / given.kind
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # also where a shell had SIGINT ignored, as it does for jobs in the background
        signal.signal(number, _interrupt)
    try:
        place = Place(folder, options, anew=given.anew)
        (kills.run if options.kind == "kills" else partitions.run)(place)
        line, violations = report(place)
    except MeshqError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on where it was ({folder})", file=sys.stderr)
        return EXIT_INTERRUPTED
    print(line)
    for violation in violations:
        print(violation)
    print(f"details: {folder / 'report.md'}", file=sys.stderr)
    return 1 if violations else 0


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    killing = kinds.add_parser(
        "kills", help="SIGKILL to agents, zygotes, shims, tasks and machines, at random and at failpoints"
    )
    killing.add_argument("--kills", type=int, default=1_000)
    killing.add_argument("--tasks", type=int, default=500)
    cutting = kinds.add_parser("partitions", help="cuts between network namespaces, both ways and one way; needs root")
    cutting.add_argument("--short", type=int, default=20, help="cuts of 2 to 10 s")
    cutting.add_argument("--long", type=int, default=40, help="cuts of 20 to 40 s")
    for each in (killing, cutting):
        each.add_argument("--peers", type=int, default=5, choices=range(2, len(NAMES) + 1))
        each.add_argument("--seed", type=int, default=1)
        each.add_argument("--folder", type=Path, help="where its state is (build/soak/KIND)")
        each.add_argument("--anew", action="store_true", help="throw away what an earlier soak left in the folder")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
