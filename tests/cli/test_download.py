"""Fetching outputs: paths that stay inside, whole files, nothing overwritten."""

import hashlib
import json
from pathlib import Path

import pytest

from meshq.client import Client
from meshq.download import default_folder, download
from meshq.errors import PeerError, StoreError, TaskFailed
from tests.cli.builders import TASK, task
from tests.cli.conftest import Meshq
from tests.cli.small_agent import Answer, SmallAgent

CONTENT = {"model.npz": b"weights" * 1000, "plots/loss.png": b"\x89PNG", "empty.txt": b""}


def offer(agent: SmallAgent, files: dict[str, bytes], *, damaged: str = "") -> None:
    listed = [{"path": path, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for path, data in files.items()]
    agent.set(f"GET /v1/tasks/{TASK}", task())
    agent.set("GET /v1/tasks/train", task())
    agent.set(f"GET /v1/tasks/{TASK}/outputs", {"fence": "1.p.1", "files": listed, "skipped": 0})
    for path, data in files.items():
        sent = data[:-1] + b"?" if path == damaged else data
        agent.set(f"GET /v1/tasks/{TASK}/outputs/{path}", Answer(chunks=(sent,) if sent else ()))


def fetched(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_all_outputs_come_into_a_folder_named_after_the_task(meshq: Meshq, agent: SmallAgent, tmp_path: Path) -> None:
    offer(agent, CONTENT)
    done = meshq("fetch", "train")
    assert (done.returncode, done.stderr) == (0, b"")
    assert fetched(tmp_path / "train-outputs") == CONTENT
    assert done.stdout.decode().splitlines() == [f"train-outputs/{path}" for path in CONTENT]


def test_fetch_under_json_lists_what_came(meshq: Meshq, agent: SmallAgent, tmp_path: Path) -> None:
    offer(agent, CONTENT)
    document = json.loads(meshq("fetch", "train", "--to", str(tmp_path / "there"), "--json").stdout)
    assert document["folder"] == str(tmp_path / "there")
    assert [file["path"] for file in document["outputs"]] == list(CONTENT)


def test_a_second_fetch_copies_nothing_again(agent: SmallAgent, tmp_path: Path) -> None:
    offer(agent, CONTENT)
    with Client(agent.home) as client:
        download(client, TASK, tmp_path / "out")
        asked = len(agent.requests)
        download(client, TASK, tmp_path / "out")
    assert len(agent.requests) == asked + 1


def test_a_file_that_differs_is_never_overwritten_and_nothing_else_is_copied(agent: SmallAgent, tmp_path: Path) -> None:
    offer(agent, CONTENT)
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "loss.png").write_bytes(b"mine")
    with Client(agent.home) as client, pytest.raises(TaskFailed, match="something else is there") as caught:
        download(client, TASK, tmp_path)
    assert "--to" in caught.value.hint
    assert (tmp_path / "plots" / "loss.png").read_bytes() == b"mine"
    assert not (tmp_path / "model.npz").exists()


@pytest.mark.parametrize("path", ["../up", "/etc/passwd", "a/../../up", "..", ".", "", "a/./b", "nul\0"])
def test_a_path_that_would_leave_the_folder_is_refused(agent: SmallAgent, tmp_path: Path, path: str) -> None:
    offer(agent, {"good": b"1", path: b"2"})
    with Client(agent.home) as client, pytest.raises(PeerError, match="would leave the folder"):
        download(client, TASK, tmp_path / "out")
    assert fetched(tmp_path / "out") == {}


def test_a_link_inside_the_folder_is_not_followed(agent: SmallAgent, tmp_path: Path) -> None:
    offer(agent, {"plots/loss.png": b"1"})
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "plots").symlink_to(tmp_path / "elsewhere")
    with Client(agent.home) as client, pytest.raises(TaskFailed, match="is in the way"):
        download(client, TASK, tmp_path / "out")
    assert fetched(tmp_path / "elsewhere") == {}


def test_a_damaged_file_is_not_left_behind(agent: SmallAgent, tmp_path: Path) -> None:
    offer(agent, CONTENT, damaged="model.npz")
    with Client(agent.home) as client, pytest.raises(TaskFailed, match="arrived damaged"):
        download(client, TASK, tmp_path / "out")
    assert fetched(tmp_path / "out") == {}


def test_a_folder_that_can_not_be_written_is_named(agent: SmallAgent, tmp_path: Path) -> None:
    offer(agent, CONTENT)
    (tmp_path / "file").write_text("")
    with Client(agent.home) as client, pytest.raises((StoreError, TaskFailed), match="file"):
        download(client, TASK, tmp_path / "file" / "out")


def test_a_task_without_outputs_is_no_failure(meshq: Meshq, agent: SmallAgent, tmp_path: Path) -> None:
    offer(agent, {})
    done = meshq("fetch", "train")
    assert (done.returncode, done.stdout) == (0, b"")
    assert b"left no files" in done.stderr
    assert not (tmp_path / "train-outputs").exists()


def test_a_name_that_is_no_folder_gives_way_to_the_id() -> None:
    assert default_folder(task("train")) == Path("train-outputs")
    assert default_folder(task("../../etc")) == Path(f"{TASK}-outputs")
