"""From the receipt of a submit to the first line of user code, on a warm and idle mesh, beside a bare start of Python.

The clock is CLOCK_MONOTONIC, the same for all processes of a machine. It starts before the request is written to the
agent's socket, so the figure contains what the agent's reading costs. The bare start uses the interpreter of the very
environment in which the task ran, on the same script, and alternates with the tasks.
"""

import subprocess
import time
from pathlib import Path
from typing import Any

from benches.measured import Figure, milliseconds, ratio, spread
from meshq.client import Client
from meshq.config import Home
from tests.processes.mesh import Agent, Mesh, temporary_mesh

ROUNDS = 40
PAUSE_SECONDS = 0.3  # the mesh is to be idle when a task comes: the end of the one before is still being told
PROGRAM = Path(__file__).parent / "programs" / "first_line.py"


def measure() -> list[Figure]:
    with temporary_mesh() as mesh:
        agents = _labelled(mesh, "ada", "bob", "cyd")
        spec = _warm_up(agents)
        with Client(Home(agents[0].home)) as client:
            pairs = [_pair(client, spec) for _ in range(ROUNDS)]
        peers = [attempt["peer"] for task in agents[0].ask("tasks", "--limit", str(ROUNDS)) for attempt in task["attempts"]]
    started, bare = zip(*pairs, strict=True)
    beyond = sorted(task - python for task, python in pairs)
    where = ", ".join(f"{name} {peers.count(name)}" for name in sorted(set(peers)))
    return [
        Figure("receipt of a submit to first line of user code", spread(started)),
        Figure("bare python script.py to first line", spread(bare)),
        Figure("difference, median of pairs", milliseconds(beyond[len(beyond) // 2]), "<= 60 ms, later 25 ms"),
        Figure("ratio of the medians", ratio(started, bare)),
        Figure("attempts by peer", where),
    ]


def _labelled(mesh: Mesh, *names: str) -> list[Agent]:
    """Three agents, each with its name as label, so that each can be made warm."""
    agents = [mesh.add(name) for name in names]
    first = agents[0]
    first.join("--new", "--label", f"who={first.name}")
    for agent in agents[1:]:
        agent.join("--seed", first.seed, "--label", f"who={agent.name}", key=mesh.key())
    mesh.wait_until_whole(*agents)
    return agents


def _warm_up(agents: list[Agent]) -> Any:
    """Run the program once on every peer; its spec, free to run anywhere."""
    for agent in agents:
        task = agents[0].submit("--label", f"who={agent.name}", str(PROGRAM))
        agents[0].wait_until(task, "succeeded", limit=120)
    spec = agents[0].show(task)["spec"]
    spec["needs"]["labels"] = {}
    return spec | {"submitted_by": "", "submitted_at": 0, "submitted_peer": ""}


def _pair(client: Client, spec: Any) -> tuple[float, float]:
    time.sleep(PAUSE_SECONDS)
    received = time.monotonic_ns()
    task = client.submit([spec])["ids"][0]
    client.result(task)
    first_line, interpreter = b"".join(client.log(task)).decode().split()
    begun = time.monotonic_ns()
    bare = subprocess.run((interpreter, str(PROGRAM)), capture_output=True, text=True, check=True).stdout.split()
    return (int(first_line) - received) / 1e9, (int(bare[0]) - begun) / 1e9
