"""Joining leaves a member, or the machine as it was; and a member's home is never taken back."""

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from meshq import join, settings
from meshq.config import Home
from meshq.errors import MeshqError, StoreError, TaskFailed
from meshq.settings import Settings
from meshq.trust import keys

READY = {
    "warnings": [], "peers_alive": 1, "name": "ada", "mesh": {"id": "m"}, "queues": ["default"], "port": 1, "user": "u",
}  # fmt: skip
Ready = Callable[[Mapping[str, Any]], None]


def options(*, new: bool = False, key: str | None = None, **given: object) -> join.Options:
    return join.Options(key=key, new=new, detach=False, given={"mdns": False, **given})


def an_agent(monkeypatch: pytest.MonkeyPatch, error: MeshqError | None = None, *, member: bool = True) -> None:
    """`join` starts this instead of the agent."""

    def run(home: Home, ready: Ready) -> None:
        if member:
            ready(READY)
        if error is not None:
            raise error

    monkeypatch.setattr("meshq.agent.run", run)


def everything(home: Home) -> list[str]:
    return sorted(os.path.relpath(path, home.root) for path in home.root.rglob("*"))


def test_a_founder_whose_disk_refuses_one_day_keeps_its_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home(tmp_path / "home")
    an_agent(monkeypatch, StoreError("the disk has refused for too long"))
    with pytest.raises(StoreError):
        join._join(home, options())
    assert home.key.exists() and home.settings.exists()


def test_who_does_not_become_a_member_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home(tmp_path / "home")
    an_agent(monkeypatch, TaskFailed("the port is taken"), member=False)
    with pytest.raises(TaskFailed):
        join._join(home, options())
    assert not home.root.exists()


def test_new_that_fails_puts_the_old_mesh_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home(tmp_path / "home")
    an_agent(monkeypatch)
    join._join(home, options())
    home.ledger.write_text("tasks")
    before, key = everything(home), keys.read(home.key)

    an_agent(monkeypatch, TaskFailed("the port is taken"), member=False)
    with pytest.raises(TaskFailed):
        join._join(home, options(new=True, slots=3))
    assert (everything(home), keys.read(home.key)) == (before, key)
    assert settings.load(home.settings) == Settings(mdns=False)


SICK = {"name": "disk", "ok": False, "detail": "it is \x1b[31mfull", "fix": "make room"}
ALONE = {"name": "peers", "ok": False, "detail": "alone", "fix": "run `meshq join` elsewhere"}


@pytest.mark.parametrize(("founded", "said"), [("", ["peers: alone; run `meshq join` elsewhere"]), ("nobody was in sight", [])])
def test_join_says_what_the_doctor_found_but_not_to_a_founder_that_nobody_is_there(
    founded: str, said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    join._announce({**READY, "warnings": ["root"], "findings": [SICK, ALONE]}, founded)
    printed = capsys.readouterr()
    warnings = [line.removeprefix("warning: ") for line in printed.err.splitlines() if line.startswith("warning: ")]
    assert warnings == ["root", "disk: it is \\x1b[31mfull; make room", *said]
    assert printed.out.startswith("ada is in mesh m")


def test_who_cannot_be_told_on_stderr_is_a_member_all_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with suppress(OSError), Path("/dev/full").open("w") as full:
        monkeypatch.setattr("sys.stderr", full)
        join._announce({**READY, "findings": [SICK]}, "")
    monkeypatch.undo()
    assert capsys.readouterr().out.startswith("ada is in mesh m")


def test_new_puts_the_old_mesh_aside_and_forgets_its_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home(tmp_path / "home")
    an_agent(monkeypatch)
    join._join(home, options())
    settings.save(home.settings, Settings(mdns=False, seeds=("127.0.0.1:9",), name="ada"))
    key = keys.read(home.key)

    join._join(home, options(new=True))
    assert keys.read(home.key) != key
    assert keys.read(next(home.root.glob("left-*")) / "trust" / "mesh.key") == key
    assert settings.load(home.settings) == Settings(mdns=False, name="ada")


def test_a_join_that_fails_keeps_the_settings_of_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home(tmp_path / "home")
    an_agent(monkeypatch)
    join._join(home, options())
    an_agent(monkeypatch, TaskFailed("the port is taken"), member=False)
    with pytest.raises(TaskFailed):
        join._join(home, options(port=7))
    assert settings.load(home.settings) == Settings(mdns=False)
