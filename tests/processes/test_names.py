"""Machines that want one name, as real processes."""

from functools import partial

from tests.processes.mesh import Agent, Mesh, alive_at, wait_for

LIMIT = 30.0


def names(agents: list[Agent]) -> list[str]:
    """What each calls itself."""
    return [peer["name"] for agent in agents for peer in agent.ask("peers") if peer["address"] == agent.seed]


def sees_three(agent: Agent) -> bool:
    return alive_at(agent) == {"lab", "lab-2", "lab-3"}


def test_who_comes_takes_a_suffix_that_lasts_and_its_tasks_know_it(mesh: Mesh) -> None:
    first, second, third = agents = [mesh.add(name) for name in ("first", "second", "third")]
    first.join("--new", "--name", "lab", "--slots", "0")
    for agent in (second, third):
        agent.join("--seed", first.seed, "--name", "lab", "--label", f"who={agent.name}", key=mesh.key())
    for agent in agents:
        wait_for(partial(sees_three, agent), LIMIT, f"{agent.name} sees three names")
    assert names(agents) == ["lab", "lab-2", "lab-3"]
    assert "another peer is called" not in (first.home / "agent.log").read_text()

    for agent in (first, third):
        agent.terminate()
        agent.join("--name", "lab", "--label", f"who={agent.name}")
    for agent in agents:
        wait_for(partial(sees_three, agent), LIMIT, f"{agent.name} sees the same three names")
    assert names(agents) == ["lab", "lab-2", "lab-3"]

    task = first.submit("--label", "who=third", "--", "sh", "-c", "echo I run on $MESHQ_PEER")
    assert first.wait_until(task, "succeeded")["attempts"][0]["peer"] == "lab-3"
    assert "I run on lab-3" in first.log(task)
