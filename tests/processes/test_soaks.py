"""Short soaks: real agents are killed and cut apart while tasks run, and the checker of histories finds P1 to P5 kept.

What `scripts/soak kills` and `scripts/soak partitions` do for half an hour, in half a minute.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from meshq import failpoints
from tests.processes.mesh import ROOT, Agent, Done, Mesh, end_processes_of, wait_for

pytestmark = [pytest.mark.xdist_group("processes"), pytest.mark.slow]

SOAK = """
import sys
from pathlib import Path
from soaks import kills, partitions
from soaks.place import Options, Place
from soaks.report import report
place = Place(Path(sys.argv[2]), Options(kind=sys.argv[1], seed=7, peers=3, kills=15, tasks=12, short=3), anew=False)
if sys.argv[1] == "kills":
    kills.run(place, seconds=(0.5, 3.0), pause=0.6)
else:
    partitions.run(place, seconds=(0.5, 5.0))
line, violations = report(place)
print(line, *violations, sep="\\n")
"""
LIMIT = 150.0  # a soak that takes so long is stuck


@pytest.fixture
def folder() -> Iterator[Path]:
    """With a short path, for the sockets of agents."""
    made = Path(tempfile.mkdtemp(prefix="meshq-"))
    try:
        yield made
    finally:
        end_processes_of(made)
        shutil.rmtree(made)


def soak(kind: str, folder: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        (sys.executable, "-c", SOAK, kind, str(folder)),
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip


def result_of(process: "subprocess.Popen[str]") -> str:
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, err
    return out


def record(folder: Path) -> list[dict[str, Any]]:
    file = folder / "record.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def count(folder: Path, event: str) -> int:
    return sum(entry["event"] == event for entry in record(folder))


def test_a_soak_of_kills_that_was_interrupted_goes_on_and_nothing_is_lost_or_run_twice(folder: Path) -> None:
    process = soak("kills", folder)
    wait_for(lambda: count(folder, "killed") >= 3, LIMIT, "three kills")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=LIMIT)
    before = count(folder, "killed")
    line, *violations = result_of(soak("kills", folder)).splitlines()
    kills, acked, lost, stuck = map(int, re.findall(r"(\d+) (?:SIGKILLs|tasks acknowledged|lost|stuck)", line))
    assert count(folder, "began") == 2 and kills >= 15 > before >= 3
    assert (acked, lost, stuck, violations) == (12, 0, 0, [])


@pytest.mark.netns
def test_a_soak_of_partitions_keeps_every_promise(folder: Path) -> None:
    line, *violations = result_of(soak("partitions", folder)).splitlines()
    assert line.startswith("3 cuts of 3 peers; ") and "0 lost, 0 stuck" in line
    assert violations == []
    assert all(entry["lost"] > 0 for entry in record(folder) if entry["event"] == "healed"), "the faults happened"


OF_THE_TASK = ("claimed", "prepared", "starting", "launched", "reported", "acked", "discarded")
OF_THE_SHIM = ("forking", "spawned", "started", "running", "exiting", "exit-written")
OF_THE_SUBMIT = ("submitted", "committed", "replicated")


def deaths(agent: Agent) -> list[str]:
    file = agent.home / "failpoints.log"
    return [line.split()[0] for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def aside() -> Iterator[ThreadPoolExecutor]:
    """For commands that go on while their agent dies and comes back."""
    with ThreadPoolExecutor(len(failpoints.POINTS)) as pool:
        yield pool


def arm(agent: Agent, point: str) -> None:
    """Let it, or what it starts, die there from its next start on."""
    if agent.alive():
        agent.terminate()
    agent.variables["MESHQ_FAILPOINT"] = f"{point}:1"


def submit(aside: ThreadPoolExecutor, agent: Agent, name: str, *command: str) -> "Future[Done]":
    return aside.submit(agent.run, "submit", "--json", "--name", name, *command)


def test_whatever_dies_at_whatever_step_of_its_life_a_task_ends_once(mesh: Mesh, aside: ThreadPoolExecutor) -> None:
    """One machine alone: nobody can take over, so its agent and its shims must get everything right themselves."""
    [alone] = mesh.start("alone")
    gate = mesh.gate("gate")
    gate.open()
    program, submits = mesh.program("hold.py"), []
    for place, point in enumerate((*OF_THE_TASK, *OF_THE_SHIM)):
        arm(alone, point)
        alone.spawn()
        wait_for(partial(has_died_or_answers, alone), 60, "the agent answers")  # a task before may kill it right away
        submits.append(submit(aside, alone, point, program, str(gate.folder)))
        wait_for(partial(has_died_at, alone, point, place), 60, f"somebody dies at {point}")
    arm(alone, "purged")
    alone.join()
    answers = [each.result() for each in submits]
    names = [task["name"] for task in alone.ask("tasks")]
    assert len(set(names)) == len(names), "a submit that was sent again made a second task"
    assert {answer.json()["name"] for answer in answers if answer.code == 0} <= set(names)
    assert len(names) >= len(OF_THE_SHIM)
    for name in names:
        document = alone.wait_until(name, "succeeded", "failed")
        *before, last = [attempt["status"] for attempt in document["attempts"]]
        assert (set(before) <= {"lost"}, last) == (True, "succeeded"), document  # a fence that started twice would have failed


def has_died_or_answers(agent: Agent) -> bool:
    return not agent.alive() or agent.run("peers").code == 0


def has_died_at(agent: Agent, point: str, place: int) -> bool:
    assert len(deaths(agent)) <= place + 1
    return deaths(agent)[place:] == [point]


def test_a_submit_whose_agent_dies_on_the_way_is_answered_by_the_next_one(mesh: Mesh, aside: ThreadPoolExecutor) -> None:
    """Whatever was stored before it died, there is one task in the end."""
    [alone] = mesh.start("alone")
    for point in OF_THE_SUBMIT:
        arm(alone, point)
        alone.join()
        answer = submit(aside, alone, point, "--", "true")
        assert alone.wait_until_ended() == -signal.SIGKILL
        arm(alone, "purged")
        alone.join()
        assert answer.result().code == 0, answer.result().err
        [task] = [task["id"] for task in alone.ask("tasks") if task["name"] == point]
        assert answer.result().json()["id"] == task
        assert alone.wait_until(task, "succeeded", "failed")["status"] == "succeeded"


def test_a_failpoint_that_is_none_keeps_the_agent_from_starting(mesh: Mesh) -> None:
    agent = mesh.add("ada")
    agent.variables["MESHQ_FAILPOINT"] = "nowhere:1"
    agent.spawn("--new")
    assert agent.wait_until_ended() == 2
    assert "nowhere:1" in agent.output.read_text() and all(name in agent.output.read_text() for name in failpoints.POINTS)
    assert not agent.home.exists()
