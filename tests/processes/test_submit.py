"""Submitting, with agents and clients that die between any two of its steps: a whole task or none, and never two."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.processes.mesh import MESHQ, Agent, Mesh, wait_for

pytestmark = pytest.mark.xdist_group("processes")

STEPS = ("submitted", "committed", "replicated")  # of `meshq/failpoints.py`
CLIENT_SECONDS = 1.5  # what a submit takes at most here, its start included


def doomed(mesh: Mesh, step: str) -> tuple[Agent, Agent]:
    """Two agents, the first of which dies at this step of its first submit."""
    ada, bob = mesh.add("ada"), mesh.add("bob")
    ada.variables["MESHQ_FAILPOINT"] = f"{step}:1"
    ada.join("--new")
    bob.join("--seed", ada.seed, key=mesh.key())
    mesh.wait_until_whole(ada, bob)
    return ada, bob


def counting(mesh: Mesh) -> tuple[str, str]:
    """A program with code to send along, which succeeds."""
    folder = mesh.folder / "counts"
    folder.mkdir(exist_ok=True)
    (folder / "go").touch()
    return mesh.program("count.py"), str(folder)


def begin_submit(agent: Agent, *script: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        (*MESHQ, "submit", "--json", *script), env=agent.environment(), cwd=agent.here, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.parametrize("step", STEPS)
def test_a_client_whose_agent_dies_and_comes_back_gets_one_task(mesh: Mesh, step: str) -> None:
    ada, bob = doomed(mesh, step)
    client = begin_submit(ada, *counting(mesh))
    wait_for(lambda: not ada.alive(), 30, f"the agent dies when a task is {step}")
    del ada.variables["MESHQ_FAILPOINT"]
    ada.join()
    out, err = client.communicate(timeout=60)
    assert client.returncode == 0, err.decode()
    [task] = [each["id"] for each in ada.ask("tasks")]
    assert task in out.decode()
    ada.wait_until(task, "succeeded")
    assert [each["id"] for each in bob.ask("tasks")] == [task]


@pytest.mark.parametrize("step", STEPS)
def test_an_agent_that_dies_for_good_leaves_a_whole_task_or_none(mesh: Mesh, step: str) -> None:
    ada, bob = doomed(mesh, step)
    client = begin_submit(ada, *counting(mesh))
    wait_for(lambda: not ada.alive(), 30, f"the agent dies when a task is {step}")
    client.kill()
    client.communicate()
    tasks = [each["id"] for each in bob.ask("tasks")]
    assert len(tasks) <= 1 and (tasks or step != "replicated")
    for task in tasks:
        bob.wait_until(task, "succeeded")  # whose code came before it


def test_a_client_that_is_killed_at_any_moment_leaves_a_whole_task_or_none(mesh: Mesh) -> None:
    ada, bob = mesh.start("ada", "bob")
    rng = random.Random(1)
    script = counting(mesh)
    began = 0
    for _ in range(12):
        client = begin_submit(ada, *script)
        time.sleep(rng.uniform(0.1, CLIENT_SECONDS))
        os.kill(client.pid, signal.SIGKILL)
        client.communicate()
        began += 1
    last = ada.submit(*script)
    tasks = [each["id"] for each in ada.ask("tasks")]
    assert last in tasks and len(tasks) <= began + 1
    for task in tasks:
        ada.wait_until(task, "succeeded", limit=120)
    wait_for(lambda: {each["id"] for each in bob.ask("tasks")} == set(tasks), 30, "bob has the same tasks")


def test_as_many_copies_as_asked_for_are_there_when_the_id_is_given(mesh: Mesh) -> None:
    agents = mesh.start("ada", "bob", "cyd", "dan", "eve")
    ada = agents[0]
    everywhere = ada.run("submit", "--json", "--hold", "--label", "who=nobody", "--copies", "all", mesh.program("count.py"))
    assert everywhere.code == 0
    document = everywhere.json()
    assert sorted(document["stored_on"]) == ["ada", "bob", "cyd", "dan", "eve"] and document["not_stored_on"] == []
    for other in agents[1:]:
        assert other.show(document["id"])["status"] == "queued"
        assert _objects(other.home) >= _objects(ada.home)
    more = ada.run("submit", "--json", "--hold", "--label", "who=nobody", "--copies", "9", mesh.program("count.py"))
    assert (more.code, len(more.json()["stored_on"])) == (0, 5)
    assert "stored on 4 other machines, 9 were asked for: there are no more" in more.err


def _objects(home: Path) -> set[str]:
    return {file.name for file in home.glob("objects.git/objects/??/*")}
