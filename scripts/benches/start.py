"""From the receipt of a submit to the first line of user code, on a warm and idle mesh, beside a bare start of Python.

The clock is that of the machine, the same for all its processes. It starts before the request is written to the agent's
socket, so the figure contains what the agent's reading costs. The bare start uses the interpreter of the very environment
in which the task ran, on the same script, and alternates with the tasks. What lies between is split by the times that
the row shows: when the agent answered the submit, and when the start was about to be committed.
"""

import shutil
import statistics
import subprocess
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from benches.measured import Figure, milliseconds, ratio, spread
from meshq.client import Client
from meshq.config import Home
from tests.processes.mesh import Agent, Mesh, temporary_mesh

ROUNDS = 40
PAUSE_SECONDS = 0.3  # the mesh is to be idle when a task comes: the end of the one before is still being told
PROGRAM = Path(__file__).parent / "programs" / "first_line.py"


@dataclass(frozen=True)
class Sample:
    """Seconds after the receipt, but for `bare`, which is seconds after that start."""

    answered: float
    started: float
    first_line: float
    bare: float


def measure() -> list[Figure]:
    with temporary_mesh() as mesh:
        agents = _labelled(mesh, "ada", "bob", "cyd")
        script = str(shutil.copy(PROGRAM, mesh.folder))
        spec = _warm_up(agents, script)
        with Client(Home(agents[0].home)) as client:
            samples = [_sample(client, spec) for _ in range(ROUNDS)]
        peers = [attempt["peer"] for task in agents[0].ask("tasks", "--limit", str(ROUNDS)) for attempt in task["attempts"]]
    first_line, bare = [each.first_line for each in samples], [each.bare for each in samples]
    beyond = statistics.median(each.first_line - each.bare for each in samples)
    where = ", ".join(f"{name} {peers.count(name)}" for name in sorted(set(peers)))
    return [
        Figure("receipt of a submit to first line of user code", spread(first_line)),
        Figure("bare python script.py to first line", spread(bare)),
        Figure("difference, median of pairs", milliseconds(beyond), "<= 60 ms, later 25 ms"),
        Figure("ratio of the medians", ratio(first_line, bare)),
        Figure("receipt to the answer with the id", spread([each.answered for each in samples])),
        Figure("receipt to the decision to start", spread([each.started for each in samples])),
        Figure("decision to first line", spread([each.first_line - each.started for each in samples])),
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


def _warm_up(agents: list[Agent], script: str) -> Any:
    """Run the program once on every peer; its spec, free to run anywhere."""
    for agent in agents:
        task = agents[0].submit("--label", f"who={agent.name}", script)
        agents[0].wait_until(task, "succeeded", limit=120)
    spec = agents[0].show(task)["spec"]
    spec["needs"]["labels"] = {}
    return spec | {"submitted_by": "", "submitted_at": 0, "submitted_peer": "", "request": ""}


def _sample(client: Client, spec: Any) -> Sample:
    time.sleep(PAUSE_SECONDS)
    received = time.time()
    task = client.submit([spec])["ids"][0]
    answered = time.time()
    client.result(task)
    first_line, interpreter = b"".join(client.log(task)).decode().split()
    [attempt] = client.show(task)["attempts"]
    started = datetime.fromisoformat(attempt["started_at"] or "").timestamp()
    begun = time.time()
    bare = subprocess.run((interpreter, str(PROGRAM)), capture_output=True, text=True, check=True).stdout.split()
    return Sample(answered - received, started - received, float(first_line) - received, float(bare[0]) - begun)
