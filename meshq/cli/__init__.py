"""The command line: parse, ask the agent, render. No rules of the mesh live here."""

import sys


def main() -> None:
    """The entry point of `meshq`."""
    from meshq.cli.boundary import run

    sys.exit(run(sys.argv[1:]))
