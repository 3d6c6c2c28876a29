"""A small agent, and the real command line as a subprocess."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.small_agent import SmallAgent, running

Meshq = Callable[..., subprocess.CompletedProcess[bytes]]


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[SmallAgent]:
    with running(tmp_path / "home") as agent:
        yield agent


@pytest.fixture
def meshq(tmp_path: Path) -> Meshq:
    """Runs `meshq ARGS…` with the home and state folder of this test; its streams are pipes."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("MESHQ_", "XDG_", "FORCE_", "NO_", "COLUMNS"))
        }
        given = {"MESHQ_HOME": str(tmp_path / "home"), "XDG_STATE_HOME": str(tmp_path / "state")}
        command = [sys.executable, "-m", "meshq", *arguments]
        return subprocess.run(command, env=kept | given | environment, cwd=tmp_path, capture_output=True, timeout=60)

    return run
