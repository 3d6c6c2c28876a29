"""Joining leaves a member, or the machine as it was; and a member's home is never taken back."""

import asyncio
import os
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from meshq import config, join, settings
from meshq.config import Home
from meshq.errors import MeshqError, StoreError, TaskFailed, Unreachable
from meshq.settings import Settings
from meshq.trust import keys

READY = {
    "warnings": [], "peers_alive": 1, "name": "ada", "mesh": {"id": "m"}, "queues": ["default"], "port": 7733, "user": "u",
}  # fmt: skip
Ready = Callable[[Mapping[str, Any]], None]


def options(*, new: bool = False, key: str | None = None, **given: object) -> join.Options:
    return join.Options(key=key, new=new, detach=False, given={"mdns": False, **given})


def an_agent(monkeypatch: pytest.MonkeyPatch, error: MeshqError | None = None, *, member: bool = True) -> None:
    """`join` starts this instead of the agent."""

    def run(home: Home, ready: Ready, switches: config.Switches) -> None:
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
        join._join(home, options(), NO_SWITCHES)
    assert home.key.exists() and home.settings.exists()


def test_who_does_not_become_a_member_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home(tmp_path / "home")
    an_agent(monkeypatch, TaskFailed("the port is taken"), member=False)
    with pytest.raises(TaskFailed):
        join._join(home, options(), NO_SWITCHES)
    assert not home.root.exists()


def test_new_that_fails_puts_the_old_mesh_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home(tmp_path / "home")
    an_agent(monkeypatch)
    join._join(home, options(), NO_SWITCHES)
    home.ledger.write_text("tasks")
    before, key = everything(home), keys.read(home.key)

    an_agent(monkeypatch, TaskFailed("the port is taken"), member=False)
    with pytest.raises(TaskFailed):
        join._join(home, options(new=True, slots=3), NO_SWITCHES)
    assert (everything(home), keys.read(home.key)) == (before, key)
    assert settings.load(home.settings) == Settings(mdns=False)


NO_SWITCHES = config.Switches()
SICK = {"name": "disk", "ok": False, "detail": "it is \x1b[31mfull", "fix": "make room"}
ALONE = {"name": "peers", "ok": False, "detail": "alone", "fix": "run `meshq join` elsewhere"}


@pytest.mark.parametrize(("founded", "said"), [("", ["peers: alone; run `meshq join` elsewhere"]), ("nobody was in sight", [])])
def test_join_says_what_the_doctor_found_but_not_to_a_founder_that_nobody_is_there(
    founded: str, said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    join._announce({**READY, "warnings": ["root"], "findings": [SICK, ALONE]}, founded, None)
    printed = capsys.readouterr()
    warnings = [line.removeprefix("warning: ") for line in printed.err.splitlines() if line.startswith("warning: ")]
    assert warnings == ["root", "disk: it is \\x1b[31mfull; make room", *said]
    assert printed.out.startswith("ada is in mesh m")


@pytest.mark.parametrize(("asked", "port", "told"), [(None, 7733, False), (None, 7734, True), (7734, 7734, False)])
def test_a_port_that_is_not_the_usual_one_is_told_once_unless_it_was_asked_for(
    asked: int | None, port: int, told: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    join._announce({**READY, "port": port}, "", asked)
    printed = capsys.readouterr()
    assert printed.err.count("another program uses port 7733, so this agent listens on 7734") == told
    assert printed.err.count("\n") == told and f"listens on port {port};" in printed.out


def test_a_seed_at_which_something_else_answers_is_no_peer_and_no_other_mesh() -> None:
    async def website(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async def join_there() -> None:
        server = await asyncio.start_server(website, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server:
            await join._meet_a_seed(keys.generate(), [f"127.0.0.1:{port}"])

    with pytest.raises(Unreachable, match=r"the seed 127\.0\.0\.1:\d+ does not answer: no peer answers there"):
        asyncio.run(join_there())


def test_a_seed_that_refuses_is_named_with_the_reason_in_words() -> None:
    with socket.socket() as unheard, pytest.raises(Unreachable) as told:
        unheard.bind(("127.0.0.1", 0))  # and does not listen
        asyncio.run(join._meet_a_seed(keys.generate(), [f"127.0.0.1:{unheard.getsockname()[1]}"]))
    assert told.value.message.endswith("does not answer: Connection refused")


def test_an_agent_that_ends_at_once_in_the_background_has_its_last_words_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho starting\necho 'no such module' >&2\nexit 3\n")
    program.chmod(0o700)
    monkeypatch.setattr("sys.executable", str(program))
    home = Home(tmp_path / "home")
    with pytest.raises(StoreError, match="the agent ended at once") as told:
        join._join(home, join.Options(key=None, new=True, detach=True, given={"mdns": False}), NO_SWITCHES)
    assert told.value.hint == "no such module"
    assert not home.root.exists(), "and so no file in it is named"

    an_agent(monkeypatch)
    join._join(home, options(), NO_SWITCHES)
    (home.root / "agent.out").write_text("of an earlier run")
    program.write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(StoreError) as told:
        join._join(home, join.Options(key=None, new=False, detach=True, given={"mdns": False}), NO_SWITCHES)
    assert told.value.hint == f"see {home.log}"


def test_who_cannot_be_told_on_stderr_is_a_member_all_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with suppress(OSError), Path("/dev/full").open("w") as full:
        monkeypatch.setattr("sys.stderr", full)
        join._announce({**READY, "findings": [SICK]}, "", None)
    monkeypatch.undo()
    assert capsys.readouterr().out.startswith("ada is in mesh m")


def test_new_puts_the_old_mesh_aside_and_forgets_its_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home(tmp_path / "home")
    an_agent(monkeypatch)
    join._join(home, options(), NO_SWITCHES)
    settings.save(home.settings, Settings(mdns=False, seeds=("127.0.0.1:9",), name="ada"))
    key = keys.read(home.key)

    join._join(home, options(new=True), NO_SWITCHES)
    assert keys.read(home.key) != key
    assert keys.read(next(home.root.glob("left-*")) / "trust" / "mesh.key") == key
    assert settings.load(home.settings) == Settings(mdns=False, name="ada")


def test_a_join_that_fails_keeps_the_settings_of_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home(tmp_path / "home")
    an_agent(monkeypatch)
    join._join(home, options(), NO_SWITCHES)
    an_agent(monkeypatch, TaskFailed("the port is taken"), member=False)
    with pytest.raises(TaskFailed):
        join._join(home, options(port=7), NO_SWITCHES)
    assert settings.load(home.settings) == Settings(mdns=False)
