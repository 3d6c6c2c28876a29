"""The two streams of a command: facts go to stdout, everything that is said about them to stderr.

Colour only for a terminal, and never with `NO_COLOR`. A pipe gets whole lines, never shortened ones. Messages follow one
grammar: a sentence without full stop, literals in backticks, what to do next as a hint of its own.
"""

import contextlib
import io
import json
import os
import shutil
import sys
from typing import TYPE_CHECKING, Final, TextIO

from meshq.errors import StoreError
from meshq.terminal import harmless

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_CODES: Final = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36", "alarm": "1;31"}
_UNLIMITED: Final = 10_000

_json = False


class StdoutRefused(StoreError):
    """What stdout leads to takes no more: a full disk. State: the command has done its work, its answer is cut off."""


class _GuardedStdout(io.FileIO):
    """Descriptor 1; tells a failure of its own from every other OSError."""

    def write(self, data: "ReadableBuffer", /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise StdoutRefused(f"cannot write to standard output: {error.strerror}") from None


def guard_stdout() -> None:
    """Have every failure to write to stdout raise StdoutRefused, or BrokenPipeError if its reader has gone."""
    plain = sys.stdout
    if isinstance(plain, io.TextIOWrapper):
        buffer = io.BufferedWriter(_GuardedStdout(1, "w", closefd=False))
        sys.stdout = io.TextIOWrapper(buffer, plain.encoding, plain.errors, line_buffering=plain.line_buffering)


def choose_json(chosen: bool) -> bool:
    """Remember that this command answers with one JSON document, so that a failure does so too."""
    global _json
    _json = _json or chosen
    return chosen


def colours(stream: TextIO) -> bool:
    """Whether colour may be written to the stream."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return bool(os.environ.get("FORCE_COLOR")) or is_terminal(stream)


def is_terminal(stream: TextIO) -> bool:
    return not stream.closed and stream.isatty()


def width() -> int:
    """Columns that a line on stdout may have: of the terminal, or what COLUMNS says, or as many as it takes."""
    if is_terminal(sys.stdout) or os.environ.get("COLUMNS", "").isdigit():
        return shutil.get_terminal_size().columns
    return _UNLIMITED


def painted(text: str, style: str, stream: TextIO) -> str:
    return f"\x1b[{_CODES[style]}m{text}\x1b[0m" if style and text and colours(stream) else text


def paint(text: str, style: str) -> str:
    """The text in this style, for stdout."""
    return painted(text, style, sys.stdout)


def say(*lines: str) -> None:
    """Facts, on stdout."""
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def document(value: object, *, lines: bool = False) -> None:
    """One JSON document on stdout; with `lines` on a line of its own."""
    say(json.dumps(value) if lines else json.dumps(value, indent=2))


def note(message: str) -> None:
    _remark("note", "cyan", message)


def warn(message: str) -> None:
    _remark("warning", "yellow", message)


def hint(message: str) -> None:
    _remark("hint", "cyan", message)


def fail(code: str, message: str, advice: str) -> None:
    """Say what went wrong; under `--json` also as the document."""
    if _json:
        document({"error": {"code": code, "message": message, "hint": advice}})
    _remark("error", "alarm", message)
    if advice:
        hint(advice)


def progress(message: str) -> None:
    """What is being done right now: for people who watch, not for files."""
    if is_terminal(sys.stderr):
        _print_on_stderr(painted(message, "dim", sys.stderr))


def _remark(kind: str, style: str, message: str) -> None:
    sys.stdout.flush()
    _print_on_stderr(f"{painted(kind, style, sys.stderr)}: {harmless(message)}")


def _print_on_stderr(text: str) -> None:
    with contextlib.suppress(OSError):  # there is nowhere left to say it
        print(text, file=sys.stderr, flush=True)
