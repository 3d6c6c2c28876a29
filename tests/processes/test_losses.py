"""What is lost when an agent, or a whole machine, is: nothing that was acknowledged, and nothing runs twice."""

import contextlib
import json
import os
import signal

import pytest

from tests.processes.mesh import Agent, Mesh, wait_for

pytestmark = pytest.mark.xdist_group("processes")

FINAL = ("succeeded", "failed", "cancelled")


def stop(agent: Agent, number: signal.Signals) -> None:
    if number is signal.SIGKILL:
        agent.kill()
    else:
        agent.terminate()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_a_task_outlives_its_agent_and_the_next_one_reports_its_exit(mesh: Mesh, number: signal.Signals) -> None:
    [alone] = mesh.start("alone")
    gate = mesh.gate("gate")
    task = alone.submit(mesh.program("hold.py"), str(gate.folder), "7")
    gate.wait_for_starts(1)
    [before] = alone.attempts_running()

    stop(alone, number)
    alone.join()

    assert alone.wait_until(task, "running")["status"] == "running"
    [after] = alone.attempts_running()
    assert after == before
    gate.open()
    document = alone.wait_until(task, *FINAL)
    assert (document["status"], document["exit_code"]) == ("failed", 7)
    assert [attempt["status"] for attempt in document["attempts"]] == ["failed"]
    assert len(gate.starts()) == 1


def test_an_exit_that_happened_while_no_agent_ran_is_reported_by_the_next_one(mesh: Mesh) -> None:
    [alone] = mesh.start("alone")
    gate = mesh.gate("gate")
    task = alone.submit(mesh.program("hold.py"), str(gate.folder), "0")
    gate.wait_for_starts(1)

    alone.kill()
    gate.open()
    wait_for(lambda: list(alone.home.glob("attempts/*/exit.json")), 30, "the shim records the exit")
    alone.join()

    document = alone.wait_until(task, *FINAL)
    assert (document["status"], document["exit_code"]) == ("succeeded", 0)
    assert len(document["attempts"]) == len(gate.starts()) == 1
    assert alone.log(task).splitlines() == ["holding on alone", "released"]
    assert [each["path"] for each in document["outputs"]] == ["result.txt"]


def test_a_task_that_waits_survives_the_loss_of_all_agents(mesh: Mesh) -> None:
    ada, bob = mesh.start("ada", "bob", options=("--slots", "1"))
    gate = mesh.gate("gate")
    tasks = [ada.submit(mesh.program("hold.py"), str(gate.folder)) for _ in range(4)]
    gate.wait_for_starts(2)

    ada.kill()
    bob.kill()
    bob.join()
    ada.join()
    gate.open()

    for task in tasks:
        document = bob.wait_until(task, *FINAL)
        assert document["status"] == "succeeded"
        # Both machines become free in the same moment and may bid for the same task: one of the bids is then superseded.
        assert [attempt["status"] for attempt in document["attempts"] if attempt["started_at"]] == ["succeeded"]
    assert len(gate.starts()) == 4


def test_the_task_of_a_lost_machine_runs_again_elsewhere_with_one_result(mesh: Mesh) -> None:
    agents = mesh.start("ada", "bob", "cyd", options=("--profile", "fast"))
    gate = mesh.gate("gate")
    task = agents[0].submit(mesh.program("hold.py"), str(gate.folder))
    [(first, lost_name)] = gate.wait_for_starts(1).items()
    lost = mesh.by_name(lost_name)
    others = [agent for agent in agents if agent is not lost]

    lost.lose_the_machine()
    starts = gate.wait_for_starts(2)
    gate.open()

    documents = [agent.wait_until(task, *FINAL) for agent in others]
    for document in documents:
        assert document["status"] == "succeeded"
        # Two machines may claim at once where this one is busy; the claim that came second is superseded and starts nothing.
        lost_attempt, last = [attempt for attempt in document["attempts"] if attempt["status"] != "superseded"]
        assert (lost_attempt["status"], last["status"]) == ("lost", "succeeded")
        assert (lost_attempt["fence"], lost_attempt["peer"]) == (first, lost_name)
        assert last["peer"] != lost_name
    assert len(starts) == len(gate.starts()) == 2

    lost.join()
    mesh.wait_until_whole(*agents)
    wait_for(lambda: len({json.dumps(agent.show(task)) for agent in agents}) == 1, 30, "all show the same")
    assert lost.show(task)["status"] == "succeeded"
    assert len(gate.starts()) == 2  # a claim that came too late never starts


def test_a_task_whose_process_vanishes_runs_again(mesh: Mesh) -> None:
    """The shim is killed with all it supervised, as the kernel's OOM killer or a person might."""
    [alone] = mesh.start("alone")
    gate = mesh.gate("gate")
    task = alone.submit(mesh.program("hold.py"), str(gate.folder))
    gate.wait_for_starts(1)

    [running] = alone.attempts_running()
    for pid in (running["shim"], running["pid"]):
        with contextlib.suppress(ProcessLookupError):  # the task dies with its shim
            os.kill(pid, signal.SIGKILL)
    gate.wait_for_starts(2)
    gate.open()

    document = alone.wait_until(task, *FINAL)
    assert document["status"] == "succeeded"
    assert [attempt["status"] for attempt in document["attempts"]] == ["lost", "succeeded"]


def test_leaving_ends_the_attempts_of_the_machine_and_others_take_them_over(mesh: Mesh) -> None:
    agents = mesh.start("ada", "bob")
    gate = mesh.gate("gate")
    task = agents[0].submit(mesh.program("hold.py"), str(gate.folder))
    [(_, runner_name)] = gate.wait_for_starts(1).items()
    runner = mesh.by_name(runner_name)
    [other] = [agent for agent in agents if agent is not runner]

    assert runner.run("leave").code == 0
    assert runner.wait_until_ended() == 0
    gate.wait_for_starts(2)
    gate.open()

    assert other.wait_until(task, *FINAL)["status"] == "succeeded"
    [liveness] = [peer["liveness"] for peer in other.ask("peers") if peer["name"] == runner_name]
    assert liveness == "left"
