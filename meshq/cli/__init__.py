"""The command line: parse, ask the agent, render. No rules of the mesh live here."""

import sys

try:
    from meshq import startup
except KeyboardInterrupt:  # what it imports takes a few milliseconds, too
    sys.exit(130)


def main() -> None:
    """The entry point of `meshq`."""
    startup.interrupts_end()
    closed = startup.open_streams()
    from meshq.cli import boundary, screen

    screen.guard_stdout()
    code = boundary.refuse_closed_stdout() if "stdout" in closed else boundary.run(sys.argv[1:])
    startup.interrupts_are_late()
    sys.exit(code)
