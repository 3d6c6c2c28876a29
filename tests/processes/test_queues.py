"""Queues at real agents: what is said of a queue at one machine holds at the others."""

import pytest

from tests.processes.mesh import Mesh, wait_for

pytestmark = pytest.mark.xdist_group("processes")


def test_a_pause_at_one_machine_is_obeyed_at_another_and_a_move_changes_the_order_there(mesh: Mesh) -> None:
    """Ada runs nothing, so bob, with one slot, runs all tasks one after the other, in the order that ada and bob say."""
    ada, bob = mesh.add("ada"), mesh.add("bob")
    ada.join("--new", "--slots", "0")
    bob.join("--seed", ada.seed, "--slots", "1", key=mesh.key())
    mesh.wait_until_whole(ada, bob)

    paused = ada.ask("queue", "pause", "default")
    assert paused["paused"] and paused["paused_by"].endswith("@ada")
    wait_for(lambda: bob.ask("queue", "show", "default")["paused"], 20, "bob has heard of the pause")
    tasks = {name: ada.submit("--name", name, "--", "true") for name in ("one", "two", "three")}
    wait_for(lambda: len(bob.ask("queue", "show", "default")["waiting"]) == 3, 20, "bob has the tasks")
    assert bob.show(tasks["one"])["reason"] == f"the queue default is paused by {paused['paused_by']}"

    moved = bob.ask("queue", "move", "three", "--first")
    assert (moved["position"], moved["queue"]) == (1, "default")
    assert ada.ask("queue", "move", "one", "--last")["position"] in (2, 3)  # ada may not have heard of bob's move yet

    def order_at_ada() -> list[str]:
        return [task["name"] for task in ada.ask("queue", "show", "default")["waiting"]]

    wait_for(lambda: order_at_ada() == ["three", "two", "one"], 20, "ada sees the order that both made")
    assert all(task["status"] == "queued" and task["attempts"] == [] for task in ada.ask("tasks"))
    assert bob.run("queue", "list").out.splitlines()[1].startswith("default (paused)")

    bob.ask("queue", "resume", "default")
    ended = {name: ada.wait_until(task, "succeeded") for name, task in tasks.items()}
    assert sorted(ended, key=lambda name: ended[name]["started_at"]) == ["three", "two", "one"]

    assert ada.ask("retention", "--tasks", "1000") == {"days": 7.0, "tasks": 1000}
    wait_for(lambda: bob.ask("retention")["tasks"] == 1000, 20, "bob has heard how many tasks are kept")
    wrong = ada.run("retention", "--days", "0")
    assert wrong.code == 2 and "--days: 0 is out of range" in wrong.err

    late = ada.run("queue", "move", "one", "--first")
    assert late.code == 1 and "it does not wait any more, it is succeeded" in late.err


def test_a_queue_is_created_cleared_and_deleted_and_its_pause_outlives_the_agent(mesh: Mesh) -> None:
    ada = mesh.add("ada")
    ada.join("--new", "--slots", "0")
    assert ada.ask("queue", "create", "night")["name"] == "night"
    task = ada.submit("--hold", "--queue", "night", "--", "true")
    ada.ask("queue", "pause", "night")
    refused = ada.run("queue", "delete", "night")
    assert refused.code == 1 and "1 tasks wait or run in it" in refused.err
    ada.kill()
    ada.join()
    [night] = [queue for queue in ada.ask("queue", "list") if queue["name"] == "night"]
    assert (night["paused"], night["queued"]) == (True, 1)
    assert ada.ask("queue", "clear", "night") == {"name": "night", "cancelled": 1}
    assert ada.show(task)["status"] == "cancelled"
    ada.ask("queue", "delete", "night")
    assert "night" not in [queue["name"] for queue in ada.ask("status")["queues"]]
    unknown = ada.run("queue", "pause", "night")
    assert (unknown.code, unknown.out) == (2, "") and unknown.err.startswith("error: there is no queue 'night'")
