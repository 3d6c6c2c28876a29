"""What an agent costs that has nothing to do: memory and CPU of each of three, over half a minute."""

import time

import psutil

from benches.measured import Figure, three_agents

SETTLE_SECONDS = 15.0  # start-up, discovery and the first probes are no idling
WINDOW_SECONDS = 30.0


def measure() -> list[Figure]:
    with three_agents() as agents:
        time.sleep(SETTLE_SECONDS)
        families = {agent.name: _family(agent.pid) for agent in agents}
        before = {name: _cpu_seconds(family) for name, family in families.items()}
        begun = time.monotonic()
        time.sleep(WINDOW_SECONDS)
        passed = time.monotonic() - begun
        figures = []
        for name, family in families.items():
            percent = 100 * (_cpu_seconds(family) - before[name]) / passed
            agent, *children = [process.memory_info().rss / 2**20 for process in family]
            figures += [
                Figure(f"{name}: resident memory of the agent", f"{agent:.1f} MiB", "<= 70 MB"),
                Figure(f"{name}: resident memory of its {len(children)} helpers", f"{sum(children):.1f} MiB"),
                Figure(f"{name}: processor, helpers included", f"{percent:.2f} % of a core", "<= 1 %"),
            ]
        return figures


def _family(pid: int) -> list[psutil.Process]:
    agent = psutil.Process(pid)
    return [agent, *agent.children(recursive=True)]


def _cpu_seconds(family: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in family)
