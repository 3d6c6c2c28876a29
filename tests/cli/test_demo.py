"""What the demo leaves behind: nothing but the outputs. (The whole demo is a process test of its own: `scripts/demo`.)"""

import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from meshq.cli import demo
from meshq.errors import UsageError

SLEEP = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
print("started", flush=True)
time.sleep(300)
"""


def sleeper(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """A process in a session of its own, with a child."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEP, *arguments], cwd=folder, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None and process.stdout.readline()
    return process


def tree(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    root = psutil.Process(process.pid)
    return [root, *root.children(recursive=True)]


def test_all_that_works_in_the_folder_or_names_it_is_killed_and_the_folder_removed() -> None:
    with ExitStack() as stack:
        with demo._folder() as folder:
            assert folder.stat().st_mode & 0o777 == 0o700
            inside = stack.enter_context(sleeper(folder / "project"))
            named = stack.enter_context(sleeper(Path("/"), str(folder / "lab-1")))
            other = stack.enter_context(sleeper(Path("/"), "elsewhere"))
            stack.callback(demo._kill_trees, [other.pid])
            ours, others = tree(inside) + tree(named), tree(other)
        assert (len(ours), len(others)) == (4, 2)
        assert not folder.exists()
        assert [process for process in ours if process.is_running() and process.status() != psutil.STATUS_ZOMBIE] == []
        assert all(process.is_running() for process in others)


def test_the_folder_is_removed_when_the_demo_is_stopped() -> None:
    with pytest.raises(KeyboardInterrupt), demo._told_when_stopped(), demo._folder() as folder:
        raise KeyboardInterrupt
    assert not folder.exists()


def test_ports_are_free_for_both_protocols() -> None:
    ports = demo._free_ports(3)
    assert len(set(ports)) == 3
    for port in ports:
        with socket.create_server(("127.0.0.1", port)), socket.socket(type=socket.SOCK_DGRAM) as datagram:
            datagram.bind(("127.0.0.1", port))


def test_the_example_is_found() -> None:
    assert demo._example().name == "train_digits.py"


def test_outputs_never_go_into_a_folder_that_holds_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert demo._outputs_folder(None) == tmp_path / "meshq-demo-outputs"
    (tmp_path / "meshq-demo-outputs").mkdir()
    assert demo._outputs_folder(None) == tmp_path / "meshq-demo-outputs-2"
    assert demo._outputs_folder(Path("meshq-demo-outputs")) == tmp_path / "meshq-demo-outputs"
    (tmp_path / "meshq-demo-outputs" / "file").touch()
    with pytest.raises(UsageError, match="not empty"):
        demo._outputs_folder(Path("meshq-demo-outputs"))


def test_commands_of_the_demo_see_their_own_home_and_no_other_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHQ_KEY", "a key of the person's own mesh")
    monkeypatch.setenv("MESHQ_HOME", "/somewhere")
    environment = demo.Demo(tmp_path)._environment()
    assert {name: value for name, value in environment.items() if name.startswith("MESHQ_")} == {
        "MESHQ_HOME": str(tmp_path / "lab-1")
    }
    assert environment["PATH"] == os.environ["PATH"]
