"""The command line: parse, ask the agent, render. No rules of the mesh live here."""

import sys

from meshq import startup


def main() -> None:
    """The entry point of `meshq`."""
    startup.interrupts_end()
    closed = startup.open_streams()
    from meshq.cli import boundary, screen

    screen.guard_stdout()
    code = boundary.refuse_closed_stdout() if "stdout" in closed else boundary.run(sys.argv[1:])
    startup.interrupts_end()
    sys.exit(code)
