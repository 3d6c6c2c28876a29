"""The options of `join`: checked here, handed to the agent through a pipe."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from meshq.cli import join
from meshq.errors import UsageError
from tests.cli.conftest import Meshq


def test_options_become_the_agents_settings(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("mq1-secret\n")
    key.chmod(0o600)
    given = {
        "name": "lab-1", "key-file": key, "seed": ["lab-2", "[fd00::1]:80"], "bind": "::1", "port": 7000, "mdns": False,
        "queue": ["gpu", "default"], "order": "fair", "slots": 2, "cpus": 4, "memory": "16G", "gpus": "0,1",
        "label": ["room=b12", "x=a=b"], "profile": "fast", "group": "lab", "detach": True,
    }  # fmt: skip
    with pytest.raises(UsageError, match="--label x"):  # its value is no name
        join.agent_options(given)
    assert join.agent_options(given | {"label": ["room=b12"]}) == {
        "name": "lab-1", "seeds": ["lab-2:7733", "[fd00::1]:80"], "bind": "::1", "port": 7000, "mdns": False,
        "queues": ["gpu", "default"], "order": "fair", "slots": 2, "cpus": 4, "memory_bytes": 16 * 2**30, "gpus": "0,1",
        "labels": {"room": "b12"}, "profile": "fast", "group": "lab", "detach": True, "new": False, "key": "mq1-secret",
    }  # fmt: skip


def test_what_was_not_given_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MESHQ_KEY", raising=False)
    assert join.agent_options({}) == {"key": None, "new": False, "detach": False}


WRONG = [
    ({"name": "a b"}, "--name"),
    ({"queue": ["a/b"]}, "--queue"),
    ({"order": "random"}, "--order"),
    ({"profile": "quick"}, "--profile"),
    ({"port": 0}, "--port"),
    ({"port": 65_536}, "--port"),
    ({"slots": -1}, "--slots"),
    ({"cpus": 0}, "--cpus"),
    ({"memory": "much"}, "--memory"),
    ({"gpus": "first"}, "--gpus"),
    ({"label": ["room"]}, "--label"),
    ({"bind": "lab-1"}, "--bind"),
    ({"seed": [":7733"]}, "--seed"),
    ({"seed": ["lab:x"]}, "--seed"),
    ({"seed": ["lab:99999"]}, "--seed"),
    ({"seed": ["fe80::1"]}, "--seed"),
    ({"key-file": "/nowhere/at/all"}, "--key-file"),
]


@pytest.mark.parametrize(("given", "option"), WRONG, ids=lambda value: str(value))
def test_an_option_out_of_range_is_named(given: dict[str, Any], option: str) -> None:
    with pytest.raises(UsageError, match=option):
        join.agent_options(given)


@pytest.mark.parametrize(
    ("text", "seed"),
    [
        ("lab-1", "lab-1:7733"),
        ("lab-1:80", "lab-1:80"),
        ("10.0.0.1", "10.0.0.1:7733"),
        ("[::1]", "[::1]:7733"),
        ("[::1]:9", "[::1]:9"),
    ],
)
def test_a_seed_gets_the_default_port(text: str, seed: str) -> None:
    assert join.check_seed(text) == seed


@pytest.mark.parametrize(
    ("text", "why", "hint"),
    [
        ("fd00::1", "no HOST:PORT", "--seed '[fd00::3]:7733'"),
        ("fd00::1:7733", "no HOST:PORT", "brackets, and quotes for the shell"),
        ("[fd00::1:7733", "no HOST:PORT", "'[fd00::3]:7733'"),
        ("[lab-1]:7733", "no HOST:PORT", "--seed lab-1:7733"),
        ("[fe80::1%eth0]:7733", "link-local", "another address"),
        ("fe80::1%eth0", "link-local", "another address"),
        ("lab 1", "no HOST:PORT", "--seed lab-1:7733"),
    ],
)
def test_a_seed_that_is_none_comes_with_how_to_write_it(text: str, why: str, hint: str) -> None:
    with pytest.raises(UsageError, match=f"--seed: .* is {why}") as told:
        join.check_seed(text)
    assert hint in told.value.hint


def test_a_file_has_the_same_keys_as_the_options(tmp_path: Path) -> None:
    file = tmp_path / "meshq.toml"
    file.write_text(
        'name = "lab-1"\nseed = "lab-2"\nno-mdns = true\nqueue = ["gpu"]\nmemory = "1G"\ngpus = [0, 1]\n[label]\nroom = "b12"\n'
    )
    assert join.agent_options(join.read_config(file)) | {"key": None} == {
        "name": "lab-1", "seeds": ["lab-2:7733"], "mdns": False, "queues": ["gpu"], "memory_bytes": 2**30, "gpus": "0,1",
        "labels": {"room": "b12"}, "key": None, "new": False, "detach": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("nmae = 1", "nmae"),
        ("port = true", "port"),
        ("port = '7733'", "port"),
        ("new = 1", "new"),
        ("= 3", "cannot read"),
        ("key = 'x'", "key"),
    ],
)
def test_a_file_that_makes_no_sense_is_named(tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "meshq.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=named):
        join.read_config(file)


@pytest.mark.parametrize("text", ["", "two words\n", "x" * 5000, "\xff"])
def test_a_file_that_holds_no_key_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "key"
    file.write_text(text)
    file.chmod(0o600)
    with pytest.raises(UsageError, match="--key-file"):
        join.agent_options({"key-file": file})


def test_a_key_that_others_can_read_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "key"
    file.write_text("mq1-x\n")
    file.chmod(0o644)
    join.agent_options({"key-file": file})
    assert "can be read by other users" in capsys.readouterr().err


def test_the_agent_gets_the_key_through_a_pipe_and_never_by_arguments_or_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    class Replaced(Exception):
        pass

    seen: list[tuple[Sequence[str], dict[str, str]]] = []

    def execve(path: str, arguments: Sequence[str], environment: dict[str, str]) -> None:
        seen.append((arguments, environment))
        raise Replaced

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setenv("MESHQ_KEY", "mq1-secret")
    with pytest.raises(Replaced):
        join._become_agent(join.agent_options({"name": "lab-1"}))
    [(arguments, environment)] = seen
    assert list(arguments[1:4]) == ["-m", "meshq.join", "--options-fd"]
    assert not any("mq1" in text for text in (*arguments, *environment.values()))
    assert os.get_inheritable(int(arguments[4]))
    with os.fdopen(int(arguments[4]), "rb") as pipe:
        assert json.loads(pipe.read()) == {"name": "lab-1", "key": "mq1-secret", "new": False, "detach": False}


def test_a_home_that_is_a_file_is_said_and_the_file_is_left_alone(meshq: Meshq, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    done = meshq("join", MESHQ_HOME=str(tmp_path / "notes.txt"))
    assert done.returncode == 2
    assert done.stderr.decode().endswith("notes.txt is a file\nhint: set MESHQ_HOME to a folder\n")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_options_that_fit_into_no_pipe_are_refused() -> None:
    with pytest.raises(UsageError, match="at most"):
        join._become_agent({"seeds": ["x" * 100] * 1000})


def test_a_wrong_option_leaves_nothing_behind(meshq: Meshq, tmp_path: Path) -> None:
    done = meshq("join", "--port", "99999")
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: --port: 99999")
    assert not (tmp_path / "home").exists()
