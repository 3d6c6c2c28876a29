"""`--on-isolation stop` with real agents: whatever cuts the runner off, its task is dead before another attempt begins.

All machines here are namespaces of one, so they have one clock, and the beats of the attempts can be compared. The task heeds
no SIGTERM: its end is the shim's.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes.mesh import Agent, Mesh, wait_for
from tests.processes.netns import Lan, lan

pytestmark = [pytest.mark.xdist_group("processes"), pytest.mark.netns]

PORT = 7733
FAILOVER_LIMIT = 90.0  # of `fast`: detection 2 s, grace 2 s, grants 15 s, and a busy machine
REASON = "cut off from the majority of its voters"


@pytest.fixture
def three(mesh: Mesh) -> Iterator[tuple[Mesh, Lan, list[Agent]]]:
    """Three machines with two slots each."""
    with lan(3) as net:
        agents = [
            mesh.add(name, address=machine.address, port=PORT, netns=machine.netns)
            for name, machine in zip(("ada", "bob", "cyd"), net.machines, strict=True)
        ]
        options = ("--profile", "fast", "--slots", "2")
        agents[0].join("--new", *options)
        for agent in agents[1:]:
            agent.join("--seed", agents[0].seed, *options, key=mesh.key())
        mesh.wait_until_whole(*agents)
        yield mesh, net, agents


def beats(folder: Path) -> dict[str, list[float]]:
    """When each attempt was alive, by fence and peer, in the order in which they began."""
    found = {file.name: [float(line) for line in file.read_text().splitlines()[:-1]] for file in folder.iterdir()}
    return dict(sorted(((name, times) for name, times in found.items() if times), key=lambda item: item[1][0]))


def submit(mesh: Mesh, agent: Agent, folder: Path) -> str:
    """A task that beats into this folder, and has begun."""
    folder.mkdir()
    task = agent.submit("--on-isolation", "stop", "--", "python3", mesh.program("beat.py"), str(folder))
    wait_for(lambda: len(beats(folder)) == 1, 60, "it runs")
    return task


def runner(agents: list[Agent], folder: Path) -> Agent:
    [first] = beats(folder)
    return next(agent for agent in agents if agent.name == first.split("@")[1])


def assert_one_after_the_other(folder: Path) -> None:
    first, second = beats(folder).values()
    assert first[-1] < second[0], f"both were alive for {first[-1] - second[0]:.3f} s"


@pytest.mark.parametrize("agent_is", ["well", "stopped", "killed"])
def test_who_is_cut_off_has_stopped_its_task_before_another_attempt_begins(
    three: tuple[Mesh, Lan, list[Agent]], agent_is: str
) -> None:
    mesh, net, agents = three
    folder = mesh.folder / "beats"
    task = submit(mesh, agents[0], folder)
    victim = runner(agents, folder)
    others = [agent for agent in agents if agent is not victim]
    net.unplug(net.machines[agents.index(victim)])
    if agent_is == "stopped":
        os.kill(victim.pid, signal.SIGSTOP)
    elif agent_is == "killed":
        victim.kill()
    wait_for(lambda: len(beats(folder)) == 2, FAILOVER_LIMIT, "another attempt begins")
    assert_one_after_the_other(folder)

    net.plug_in(net.machines[agents.index(victim)])
    if agent_is == "stopped":
        os.kill(victim.pid, signal.SIGCONT)
    elif agent_is == "killed":
        victim.join("--profile", "fast")
    mesh.wait_until_whole(*agents, limit=60)

    def told() -> bool:
        attempts = others[0].show(task)["attempts"]
        return [(each["status"], REASON in (each["reason"] or "")) for each in attempts[:1]] == [("lost", True)]

    wait_for(told, 60, "everybody knows why it ended")
    assert len(beats(folder)) == 2, "and the second attempt goes on"
    assert others[0].status_of(task) == "running"
    assert_one_after_the_other(folder)


def test_without_its_agent_a_task_ends_too_and_a_restart_in_time_saves_it(three: tuple[Mesh, Lan, list[Agent]]) -> None:
    mesh, _, agents = three
    folder = mesh.folder / "beats"
    task = submit(mesh, agents[0], folder)
    victim = runner(agents, folder)
    victim.kill()
    victim.join("--profile", "fast", "--slots", "2")
    [first] = beats(folder).values()
    begun = first[0]
    wait_for(lambda: next(iter(beats(folder).values()))[-1] > begun + 20, 60, "the adopted attempt outlives its first grants")
    victim.kill()
    wait_for(lambda: len(beats(folder)) == 2, FAILOVER_LIMIT, "another attempt begins")
    assert_one_after_the_other(folder)
    assert task


def test_the_side_without_a_majority_starts_nothing_and_says_why(three: tuple[Mesh, Lan, list[Agent]]) -> None:
    _, net, agents = three
    done = agents[2].run("submit", "--json", "--hold", "--label", "who=nobody", "--on-isolation", "stop", "--", "true")
    assert sorted(done.json()["voters"]) == ["ada", "bob", "cyd"]
    assert "2 of 3 machines agree" in done.err
    net.unplug(net.machines[2])
    task = done.json()["id"]
    wait_for(
        lambda: "waits for a majority of its voters" in (agents[2].show(task)["reason"] or ""), 60, "cyd says what it waits for"
    )
