"""Everything that can be typed wrong gets one clear message before anything is stored; the rest becomes a task."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from meshq import codec
from meshq.errors import UsageError
from meshq.submit.snapshot import Snapshot
from meshq.submit.spec import SubmitOptions, build
from meshq.task import Environment, Needs, Source, TaskSpec
from tests.submit.repositories import repository, write

Build = Callable[[SubmitOptions], tuple[TaskSpec, Snapshot, list[str]]]


@pytest.fixture
def work(tmp_path: Path) -> Path:
    write(tmp_path / "work" / "train.py", "import sys\n")
    return tmp_path / "work"


@pytest.fixture
def submit(work: Path, tmp_path: Path) -> Build:
    return lambda options: build(options, cwd=work, cache=tmp_path / "cache", environ={**os.environ, "GIVEN": "here"})


def test_every_option_arrives_in_the_task(submit: Build) -> None:
    spec, source, notes = submit(
        SubmitOptions(
            script="train.py", args=("--lr", "0.1", "--queue", "x"), queue="night", name="run-7", priority=-3, cpus=4,
            memory="1.5G", gpus=2, gpu_memory="512M", labels=("disk=ssd", "room=b12"), env=("A=1=2", "GIVEN", "EMPTY="),
            python="3.12", retries=2, time_limit="1:30:00", lease="30s", on_isolation="stop",
        )
    )  # fmt: skip
    assert spec == TaskSpec(
        name="run-7", argv=("train.py", "--lr", "0.1", "--queue", "x"), submitted_by="", submitted_at=0.0,
        submitted_peer=spec.submitted_peer, queue="night", priority=-3,
        needs=Needs(
            cpus=4, memory_bytes=3 * 2**29, gpus=2, gpu_memory_bytes=2**29, labels={"disk": "ssd", "room": "b12"}
        ),
        source=Source(commit=source.commit, folder=""), environment=Environment(python="3.12"),
        env={"A": "1=2", "GIVEN": "here", "EMPTY": ""}, retries=2, time_limit=5400.0, lease=30.0, isolation="stop",
    )  # fmt: skip
    assert spec.submitted_peer == ""
    assert notes == ["requirements: train.py imports nothing that must be installed"]
    assert codec.from_plain(TaskSpec, codec.to_plain(spec)) == spec


def test_a_task_of_the_gpu_queue_gets_one_gpu_unless_it_says_otherwise(submit: Build) -> None:
    assert submit(SubmitOptions(script="train.py", queue="gpu"))[0].needs.gpus == 1
    assert submit(SubmitOptions(script="train.py", queue="gpu", gpus=0))[0].needs.gpus == 0
    assert submit(SubmitOptions(script="train.py"))[0].needs.gpus == 0


def test_a_command_runs_as_it_is_with_the_files_that_it_names(submit: Build, work: Path) -> None:
    spec, source, notes = submit(SubmitOptions(command=("nvidia-smi", "-L")))
    assert (spec.name, spec.argv, spec.environment.needs_python) == ("nvidia-smi", ("nvidia-smi", "-L"), False)
    assert (spec.source, source.objects, notes) == (
        Source(), {}, ["nothing of this folder is sent; `--workdir .` takes it along"],
    )  # fmt: skip
    repository(work)
    assert submit(SubmitOptions(command=("make",)))[0].source.commit is None
    spec, _, notes = submit(SubmitOptions(command=("python3", "train.py")))
    assert (spec.source.commit is not None, notes) == (True, [f"{work} goes along, for the command names `train.py`"])


def test_a_python_command_gets_an_environment_if_it_asks_for_one(submit: Build, work: Path) -> None:
    write(work / "needs.txt", "\n")
    spec, _, _ = submit(SubmitOptions(command=("python3", "-m", "package"), requirements="needs.txt"))
    assert (spec.argv, spec.environment.needs_python) == (("-m", "package"), True)
    with pytest.raises(UsageError, match="the command is make"):
        submit(SubmitOptions(command=("make", "all"), requirements="needs.txt"))


def test_an_executable_of_another_kind_is_run_as_a_command(submit: Build, work: Path) -> None:
    write(work / "job.sh", "#!/bin/sh\n", executable=True)
    spec, _, _ = submit(SubmitOptions(script="job.sh", args=("1",)))
    assert (spec.name, spec.argv, spec.environment.needs_python) == ("job", ("./job.sh", "1"), False)


def test_names_are_made_of_whatever_the_script_is_called(submit: Build, work: Path) -> None:
    for file, name in (("my script (2).py", "my-script-2"), ("___.py", "task"), ("a" * 80 + ".py", "a" * 63)):
        write(work / file)
        assert submit(SubmitOptions(script=file))[0].name == name


def test_warnings_of_the_snapshot_reach_the_person(submit: Build, work: Path) -> None:
    (work / "data").symlink_to("/somewhere/else")
    notes = submit(SubmitOptions(script="train.py", workdir="."))[2]
    assert notes[0].startswith("the link data -> /somewhere/else leaves")


GOOD = SubmitOptions(script="train.py")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"script": None}, "nothing to run"),
        ({"script": "trian.py"}, r"the script trian\.py does not exist in"),
        ({"script": "folder"}, "folder is a folder, not a script"),
        ({"script": "compiled.py"}, "is no Python text"),
        ({"script": "notes.txt"}, r"neither a \.py file nor executable"),
        ({"script": "train.py/x"}, "reading the script train.py/x: Not a directory"),
        ({"script": "zero\0.py"}, "reading the script"),
        ({"queue": "no spaces"}, "--queue: 'no spaces' is no name"),
        ({"name": "-x"}, "--name: '-x' is no name"),
        ({"priority": 1001}, "--priority: 1001 is out of range"),
        ({"cpus": -1}, "--cpus: -1 is out of range"),
        ({"gpus": 65}, "--gpus: 65 is out of range"),
        ({"memory": "lots"}, "--memory: 'lots' is no size"),
        ({"memory": "0"}, "--memory: 0 is out of range"),
        ({"gpu_memory": "9999999T"}, "--gpu-memory: 9999999T is out of range"),
        ({"labels": ("disk",)}, "--label: 'disk' has no value"),
        ({"labels": ("disk=a b",)}, "--label: 'a b' is no name"),
        ({"labels": tuple(f"l{number}=1" for number in range(33))}, "--label: 33 labels"),
        ({"env": ("A B=1",)}, "--env: 'A B' is no name of a variable"),
        ({"env": ("MESHQ_KEY=1",)}, "--env: MESHQ_KEY belongs to meshq"),
        ({"env": ("NOT_SET_ANYWHERE",)}, "--env: NOT_SET_ANYWHERE has no value"),
        ({"env": ("A=\udc80",)}, "--env A: .* is not UTF-8"),
        ({"env": ("A=" + "x" * 33_000,)}, "--env: 33003 bytes of variables"),
        ({"args": ("x" * 33_000,)}, r"the arguments have 330\d\d bytes"),
        ({"args": ("zero\0",)}, "zero byte"),
        ({"retries": 101}, "--retries: 101 is out of range"),
        ({"time_limit": "soon"}, "--time-limit: 'soon' is no duration"),
        ({"time_limit": "99999d"}, "--time-limit: 99999d is out of range"),
        ({"lease": "0s"}, "--lease: '0s' is no duration"),
        ({"on_isolation": "panic"}, "--on-isolation: 'panic' is none of the choices"),
        ({"manager": "apt"}, "--manager: 'apt' is none of the choices"),
        ({"python": "four"}, "--python: 'four' is no version"),
        ({"requirements": "nowhere.txt"}, "--requirements: .*nowhere.txt is no file"),
        ({"workdir": "nowhere"}, "--workdir: .*nowhere is no folder"),
        ({"script": "job.sh", "python": "3.12"}, r"job\.sh is no \.py file"),
    ],
)
def test_each_mistake_gets_one_clear_message(submit: Build, work: Path, changes: dict[str, object], message: str) -> None:
    (work / "folder").mkdir()
    (work / "compiled.py").write_bytes(b"\xcb\r\r\n\0\0")
    write(work / "notes.txt")
    write(work / "job.sh", "#!/bin/sh\n", executable=True)
    with pytest.raises(UsageError, match=message) as caught:
        submit(dataclasses.replace(GOOD, **changes))  # type: ignore[arg-type]  # each change fits its field
    assert "\n" not in caught.value.message


def test_a_task_that_is_too_large_in_sum_is_refused(submit: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshq.config.SPEC_BYTES_MAX", 500)
    with pytest.raises(UsageError, match="where at most 500 are allowed"):
        submit(dataclasses.replace(GOOD, args=("x" * 600,)))
