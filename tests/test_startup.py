"""Ctrl-C before a command has begun, and standard streams that are closed or full, end in one code and no traceback."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.builders import peer, queue, status
from tests.cli.small_agent import SmallAgent, running

CTRL_C_DURING_AN_IMPORT = """
import os, runpy, signal, sys

class CtrlC:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, CtrlC())
sys.argv = ["meshq", *{arguments!r}]
runpy.run_module({program!r}, run_name="__main__")
"""
SET_OFF = [("meshq", "typer", ["status"]), ("meshq", "meshq.cli.app", ["--help"]), ("meshq.join", "meshq.agent", [])]


@pytest.mark.parametrize(("program", "module", "arguments"), SET_OFF)
def test_ctrl_c_during_the_imports_is_no_traceback(program: str, module: str, arguments: list[str]) -> None:
    code = CTRL_C_DURING_AN_IMPORT.format(program=program, module=module, arguments=arguments)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_ctrl_c_that_came_while_it_was_blocked_ends_the_agent_that_is_to_be() -> None:
    """As between the two programs of `meshq join`."""
    code = (
        "import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT]); "
        "os.kill(os.getpid(), signal.SIGINT); os.execv(sys.executable, [sys.executable, '-m', 'meshq.join'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_who_ignores_ctrl_c_goes_on_to_ignore_it() -> None:
    code = (
        "import os, signal; signal.signal(signal.SIGINT, signal.SIG_IGN); from meshq import startup; "
        "startup.interrupts_end(); os.kill(os.getpid(), signal.SIGINT); startup.interrupts_raise(); "
        "os.kill(os.getpid(), signal.SIGINT); print('goes on')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"goes on\n", b"")


def in_a_shell(command: str, home: Path) -> tuple[int, str]:
    """Run it with `meshq` as the command line; its exit code and what it said on stderr."""
    script = f'meshq() {{ "{sys.executable}" -m meshq "$@"; }}; {command}'
    environ = {**os.environ, "MESHQ_HOME": str(home), "XDG_STATE_HOME": str(home / "state")}
    done = subprocess.run(["sh", "-c", script], env=environ, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[SmallAgent]:
    with running(tmp_path / "home") as agent:
        agent.set("GET /v1/status", status([peer("lab-1")], [queue("default")]))
        agent.set("GET /v1/tasks", [])
        yield agent


FULL = "error: cannot write to standard output: No space left on device\n"
CLOSED = "error: standard output is closed, so nothing was done\nhint: redirect it, to /dev/null if nobody shall read it\n"


@pytest.mark.parametrize("command", ["status", "status --json", "tasks", "--help", "--version"])
def test_a_stdout_that_takes_nothing_is_one_message(lab: SmallAgent, command: str) -> None:
    assert in_a_shell(f"meshq {command} > /dev/full", lab.home.root) == (1, FULL)
    asked = len(lab.requests)
    assert in_a_shell(f"meshq {command} >&-", lab.home.root) == (1, CLOSED)
    assert len(lab.requests) == asked


def test_a_failure_whose_document_is_refused_is_one_message_too(tmp_path: Path) -> None:
    assert in_a_shell("meshq status --json > /dev/full", tmp_path) == (1, FULL)


def test_without_stdin_and_stderr_a_command_does_its_work(lab: SmallAgent, tmp_path: Path) -> None:
    assert in_a_shell("meshq status <&- 2>&- > /dev/null", lab.home.root) == (0, "")
    assert in_a_shell("meshq status 2> /dev/full > /dev/null", tmp_path) == (69, "")
    assert in_a_shell("meshq status --json 2>&- >&-", tmp_path) == (1, "")
