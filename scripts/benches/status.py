"""How long `meshq status` takes, from the shell's point of view, beside a Python that does nothing."""

import subprocess
import sys
import time

from benches.measured import Figure, ratio, spread, three_agents

ROUNDS = 30


def measure() -> list[Figure]:
    with three_agents() as agents:
        environment = agents[0].environment()
        meshq = (sys.executable, "-m", "meshq", "status")
        bare = (sys.executable, "-c", "pass")
        pairs = [(_wall(meshq, environment), _wall(bare, environment)) for _ in range(ROUNDS + 2)][2:]  # two to warm up
    status, nothing = zip(*pairs, strict=True)
    return [
        Figure("meshq status, wall", spread(status), "<= 150 ms"),
        Figure("python -c pass, wall", spread(nothing)),
        Figure("ratio of the medians", ratio(status, nothing)),
    ]


def _wall(command: tuple[str, ...], environment: dict[str, str]) -> float:
    begun = time.perf_counter()
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begun
