"""What every bench shares: the mesh that it measures, the machine that it ran on, and how numbers are shown."""

import os
import platform
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.processes.mesh import Agent, temporary_mesh


@dataclass(frozen=True)
class Figure:
    """One line of a result."""

    what: str
    value: str
    goal: str = ""


@contextmanager
def three_agents() -> Iterator[list[Agent]]:
    """An idle mesh on loopback, as a lab would have it: three agents that know each other."""
    with temporary_mesh() as mesh:
        yield mesh.start("ada", "bob", "cyd")


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def spread(samples: Sequence[float]) -> str:
    """Median, and where nine of ten lie."""
    cuts = statistics.quantiles(samples, n=20, method="inclusive")
    return f"{milliseconds(statistics.median(samples))} ({milliseconds(cuts[0])} to {milliseconds(cuts[-1])}, n={len(samples)})"


def ratio(of: Sequence[float], to: Sequence[float]) -> str:
    return f"{statistics.median(of) / statistics.median(to):.2f}"


def machine() -> str:
    """The machine in one line."""
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"{_processor()}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}, load {os.getloadavg()[0]:.1f}"
    )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
