"""A pretended NVIDIA driver: `fake_nvml.c` built into a folder, and a process that reads its GPUs as the agent does."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import compiler, missing

ROOT = Path(__file__).parent.parent.parent
SOURCE = Path(__file__).parent / "fake_nvml.c"
LIBRARY = "libnvidia-ml.so.1"
WHOLE = 60.0  # patience: longer than anything takes

READ = """
import json, sys
from meshq import codec
from meshq.exec.gpus import GpuReader, GpuWatch
now, ours = 0.0, {}
watch = GpuWatch(lambda: ours, GpuReader(lambda: now), lambda: now)
for line in sys.stdin:
    asked = json.loads(line)
    now, ours = asked["now"], {int(pid): task for pid, task in asked["ours"].items()}
    print(json.dumps(codec.to_plain(watch.look(asked["patience"]))), flush=True)
"""


def build(folder: Path, *options: str) -> Path:
    """The library, in this folder."""
    if reason := missing("cc"):
        pytest.skip(reason)
    library = folder / LIBRARY
    subprocess.run([str(compiler()), "-Wall", "-Werror", "-shared", "-fPIC", *options, "-o", library, SOURCE], check=True)
    return library


class Driver:
    """A process that reads the GPUs of the library in `folder`, if there is one, whenever it is asked; its clock is ours."""

    def __init__(self, folder: Path, state: Path) -> None:
        self.state = state
        self.show("")
        self.process = subprocess.Popen(
            [sys.executable, "-c", READ],
            env=os.environ | {"LD_LIBRARY_PATH": str(folder), "FAKE_NVML": str(state)},
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def show(self, state: str) -> None:
        """In one step: the library may read it just now."""
        partial = self.state.with_suffix(".new")
        partial.write_bytes(state.encode("latin-1"))
        partial.replace(self.state)

    def read(self, state: str, ours: Mapping[int, str] | None = None, *, now: float = 0.0) -> dict[str, Any]:
        """What is known after a whole reading of this state at this time."""
        self.show(state)
        return self.look(WHOLE, ours, now=now)

    def look(self, patience: float, ours: Mapping[int, str] | None = None, *, now: float = 0.0) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"ours": ours or {}, "now": now, "patience": patience}) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def close(self) -> None:
        self.show("")  # whatever hangs goes on
        self.process.communicate()
