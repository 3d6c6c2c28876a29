"""What a person sees who sits at a terminal: the same commands with a pseudo-terminal instead of pipes."""

import os
import pty
import subprocess
import sys
from pathlib import Path

from tests.cli.builders import TASK, peer, queue, status, submitted, task, waited
from tests.cli.small_agent import Answer, SmallAgent


def at_a_terminal(agent: SmallAgent, folder: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    """Exit code and all that the terminal got, both streams."""
    controller, terminal = pty.openpty()
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    given = {"MESHQ_HOME": str(agent.home.root), "TERM": "xterm", "COLUMNS": "80"}
    with subprocess.Popen(
        [sys.executable, "-m", "meshq", *arguments],
        env=kept | given | environment, cwd=folder, stdin=terminal, stdout=terminal, stderr=terminal,
    ) as process:  # fmt: skip
        os.close(terminal)
        got = b""
        try:
            while chunk := os.read(controller, 65_536):
                got += chunk
        except OSError:  # how Linux says that the other end is closed
            pass
        finally:
            os.close(controller)
    return process.returncode, got.decode().replace("\r\n", "\n")


def test_status_has_colours_unless_the_person_wants_none(agent: SmallAgent, tmp_path: Path) -> None:
    agent.set("GET /v1/status", status([peer("lab-1")], [queue("default")]))
    agent.set("GET /v1/tasks", [])
    assert "\x1b[32malive\x1b[0m" in at_a_terminal(agent, tmp_path, "status")[1]
    assert "\x1b" not in at_a_terminal(agent, tmp_path, "status", NO_COLOR="1")[1]
    assert "\x1b" not in at_a_terminal(agent, tmp_path, "status", TERM="dumb")[1]


def test_a_log_can_not_steer_the_terminal(agent: SmallAgent, tmp_path: Path) -> None:
    agent.set("GET /v1/tasks/t/log", Answer(chunks=(b"\x1b]0;owned\x07", b"10%\r", b"20%\r", b"done\n")))
    code, seen = at_a_terminal(agent, tmp_path, "logs", "t")
    assert code == 0
    assert "\x1b]0;" not in seen and "\x07" not in seen
    assert seen.endswith("done\n")


def test_submit_says_what_was_submitted_and_how_to_look(agent: SmallAgent, tmp_path: Path) -> None:
    agent.set("GET /v1/me", {})
    agent.set("POST /v1/tasks", submitted(["lab-1", "lab-2"]))
    code, seen = at_a_terminal(agent, tmp_path, "submit", "--", "true", NO_COLOR="1")
    assert code == 0
    assert seen.splitlines()[-2:] == [
        f"Submitted `train` ({TASK}) to queue gpu, stored on lab-1, lab-2",
        f"hint: `meshq logs {TASK[:8]} --follow` shows its output",
    ]


def test_who_waits_is_told_what_happens_until_the_task_runs(agent: SmallAgent, tmp_path: Path) -> None:
    agent.set("GET /v1/me", {})
    agent.set("POST /v1/tasks", submitted(["lab-1", "lab-2"]))
    waits = (
        waited("queued", None, final=False, peer=None, reason="no machine has a free slot"),
        waited("preparing", None, final=False),
        waited("preparing", None, final=False),
        waited("running", None, final=False),
        waited("failed", 2, reason="it broke"),
    )
    agent.set(f"GET /v1/tasks/{TASK}/wait", *waits)
    agent.set(f"GET /v1/tasks/{TASK}", task())
    code, seen = at_a_terminal(agent, tmp_path, "submit", "--wait", "--", "true", NO_COLOR="1")
    assert code == 2
    assert seen.splitlines()[-4:-1] == [
        f"hint: `meshq logs {TASK[:8]} --follow` shows its output",
        "queued: no machine has a free slot",
        "preparing on lab-2",
    ]
    assert seen.splitlines()[-1] == (
        f"note: train ({TASK}) failed on lab-2 with exit code 2: it broke; `meshq logs {TASK[:8]}` shows what it wrote"
    )
