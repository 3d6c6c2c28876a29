"""What a command does first as a process, before anything that takes time to import. Standard library only.

Ctrl-C during the imports has nothing to clean up, and a traceback through somebody's imports tells nobody anything: it ends
the process at once. A standard stream that was closed by whoever started us (`>&-`) leads to the null device: else the next
socket that is opened would become stdout.
"""

import os
import signal
import sys
from types import FrameType
from typing import Final

EXIT_INTERRUPTED: Final = 130
_STREAMS: Final = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))


def interrupts_end() -> None:
    """From here on Ctrl-C ends the process at once, and one that came while SIGINT was blocked does so now.

    Whoever ignores it (`nohup`, a shell's background) goes on to ignore it.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT,))


def interrupts_raise() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def interrupts_are_late() -> None:
    """From here on Ctrl-C changes nothing: all is done and said, and the exit code is known."""
    if signal.getsignal(signal.SIGINT) in (signal.default_int_handler, _end):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # else Python's own end makes it deadly once more


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(EXIT_INTERRUPTED)


def open_streams() -> frozenset[str]:
    """Open the standard streams that are closed, on the null device; their names."""
    closed = [name for name, _ in _STREAMS if getattr(sys, name) is None]
    for descriptor, (name, mode) in enumerate(_STREAMS):
        if name in closed:
            _to_null(descriptor)
            setattr(sys, name, os.fdopen(descriptor, mode, encoding="utf-8", closefd=False))
    return frozenset(closed)


def abandon_stdout() -> None:
    """Nobody takes what we write: don't fail once more when Python flushes at exit."""
    _to_null(1)


def _to_null(descriptor: int) -> None:
    opened = os.open(os.devnull, os.O_RDWR)
    if opened == descriptor:
        os.set_inheritable(opened, True)
    else:
        os.dup2(opened, descriptor)
        os.close(opened)
