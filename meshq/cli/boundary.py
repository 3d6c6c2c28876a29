"""Where every command ends: whatever happened becomes one message and one exit code, never a traceback.

Exit codes (contract): 0 done, 1 it failed, 2 wrong usage, 69 no agent or peer reachable, 75 cannot be placed now, 124 time
limit, 130 detached while the task goes on.
"""

import os
import re
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from meshq import startup
from meshq.cli import screen
from meshq.errors import MeshqError, UsageError

EXIT_DETACHED: Final = 130
_COMPLETING: Final = "_MESHQ_COMPLETE"  # set by the shell's completion function
_QUOTED = re.compile(r"'([^']*)'")
_SUGGESTION = re.compile(r"\s*(?:Did you mean (?:one of: )?(?P<one>.*?)\?|\(Possible options: (?P<several>.*?)\))\s*$")


def run(args: Sequence[str]) -> int:
    """Run the command and say what went wrong, if anything did; its exit code."""
    try:
        return _attempt(args)
    except KeyboardInterrupt:
        return EXIT_DETACHED
    except BrokenPipeError:  # whoever read our output has enough of it
        startup.abandon_stdout()
        return 1
    except screen.StdoutRefused as error:
        startup.abandon_stdout()  # the document of the failure, too, would be refused
        screen.fail(error.code, error.message, error.hint)
        return error.exit_code


def refuse_closed_stdout() -> int:
    """Say that nothing is done, rather than do it and lose its answer; the exit code."""
    screen.fail("store", "standard output is closed, so nothing was done", "redirect it, to /dev/null if nobody shall read it")
    return 1


def _attempt(args: Sequence[str]) -> int:
    """Run the command and say what went wrong; raises only what concerns stdout, and KeyboardInterrupt."""
    try:
        return _invoke(args)
    except (BrokenPipeError, screen.StdoutRefused):
        raise
    except MeshqError as error:
        screen.fail(error.code, error.message, error.hint)
        return error.exit_code
    except Exception as error:
        return _report_bug(error, args)


def _invoke(args: Sequence[str]) -> int:
    import typer

    from meshq.cli.app import command

    startup.interrupts_raise()
    try:
        parser = command(completion=not args or args[0].startswith("-") or _COMPLETING in os.environ)
        code = parser.main(list(args) or ["--help"], prog_name="meshq", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except typer.Abort:
        return EXIT_DETACHED
    except Exception as error:
        # typer brings its own copy of click or uses the real one, depending on its version: both errors look like this
        message = getattr(error, "format_message", None)
        if message is None or isinstance(error, MeshqError):
            raise
        screen.choose_json("--json" in _before_dashes(args))
        raise _usage_error(message(), _help_command(error)) from None


def _help_command(error: Exception) -> str:
    """What shows the help of the command that was typed wrong."""
    context = getattr(error, "ctx", None)
    return f"{context.command_path if context is not None else 'meshq'} --help"


def _before_dashes(args: Sequence[str]) -> Sequence[str]:
    return args[: args.index("--")] if "--" in args else args


def _usage_error(text: str, help_of: str) -> UsageError:
    """The parser's message in our grammar: no capital, no full stop, literals in backticks, the suggestion as hint."""
    text = " ".join(text.split())
    advice = f"see `{help_of}`"
    if found := _SUGGESTION.search(text):
        text = text[: found.start()]
        names = [name.strip(" '\"") for name in (found["one"] or found["several"]).split(",")]
        advice = "did you mean " + " or ".join(f"`{name}`" for name in names) + "?"
    text = _QUOTED.sub(r"`\1`", text.strip().rstrip("."))
    text = re.sub(r": (-{1,2}[\w-]+)$", r" `\1`", text)
    return UsageError(text[:1].lower() + text[1:], advice)


def _report_bug(error: Exception, args: Sequence[str]) -> int:
    advice = "please report it, with what you did"
    try:
        advice += f" and the file `{_write_traceback(args)}`"
    except OSError:
        traceback.print_exc()  # nowhere to write to: better in front of people than lost
    screen.fail("internal", f"internal error: {type(error).__name__}: {error}", advice)
    return 1


def _write_traceback(args: Sequence[str]) -> Path:
    """The traceback in a new private file; never the values of options, which may be secrets."""
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "meshq"
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = state / f"crash-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(f"meshq {args[0] if args else ''}\npython {sys.version}\n\n{traceback.format_exc()}")
    return path
