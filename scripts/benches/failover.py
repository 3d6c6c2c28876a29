"""From the loss of a machine (agent, shim and task killed at once) to the first line of its task elsewhere.

On loopback the kernel answers for the dead at once, so the connections of the lost are refused; the peers do not trust that
alone. The environment is warm on every peer.
"""

import statistics
import time

from benches.measured import Figure
from tests.processes.mesh import Agent, Mesh, temporary_mesh

ROUNDS = 7


def measure() -> list[Figure]:
    with temporary_mesh() as mesh:
        agents = mesh.start("ada", "bob", "cyd")
        _failover(mesh, agents, "first")  # builds the environments
        seconds = [_failover(mesh, agents, f"round-{number}") for number in range(ROUNDS)]
    shown = f"{statistics.median(seconds):.1f} s ({min(seconds):.1f} s to {max(seconds):.1f} s, n={len(seconds)})"
    return [Figure("loss of a machine to the first line elsewhere, profile lan", shown, "median about 15 s")]


def _failover(mesh: Mesh, agents: list[Agent], name: str) -> float:
    gate = mesh.gate(name)
    task = agents[0].submit(mesh.program("hold.py"), str(gate.folder))
    [runner] = gate.wait_for_starts(1).values()
    lost = mesh.by_name(runner)
    lost.lose_the_machine()
    begun = time.monotonic()
    gate.wait_for_starts(2)
    passed = time.monotonic() - begun
    gate.open()
    lost.join()
    mesh.wait_until_whole(*agents)
    for agent in agents:
        agent.wait_until(task, "succeeded")
    return passed
