"""The probe: what it says of this machine, and of GPUs that a small C library pretends."""

import asyncio
import json
import os
import queue
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from meshq.exec import probe
from meshq.exec.attempts import Alive
from meshq.exec.probe import GpuReader, Probe, Sample
from tests.exec.bench import LIMIT_SECONDS, Bench
from tests.exec.test_shim import daemon_code

ROOT = Path(__file__).parent.parent.parent

READ = """
import json, sys
from meshq import codec
from meshq.exec import probe
reader = probe.GpuReader()
for line in sys.stdin:
    gpus, problem = reader.read(json.loads(line))
    print(json.dumps({"gpus": codec.to_plain(gpus), "problem": problem}), flush=True)
"""


class Driver:
    """A process that reads the GPUs of a pretended driver whenever it is asked."""

    def __init__(self, folder: Path) -> None:
        compiler = shutil.which("gcc") or shutil.which("cc")
        if compiler is None:
            pytest.skip("no C compiler to build the pretended driver (Debian: apt-get install gcc)")
        library = folder / "libnvidia-ml.so.1"
        source = Path(__file__).parent / "fake_nvml.c"
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
        self.state = folder / "state"
        self.state.touch()
        self.process = subprocess.Popen(
            [sys.executable, "-c", READ],
            env=os.environ | {"LD_LIBRARY_PATH": str(folder), "FAKE_NVML": str(self.state)},
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def read(self, state: str, ours: tuple[int, ...] = ()) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.state.write_text(state)
        self.process.stdin.write(json.dumps(ours) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def close(self) -> None:
        self.process.communicate()


GPUS = "gpu GPU-a H100 81920 1024 37 55 300000\ngpu GPU-b T4 16384 0 -1 -1 -1\n"


@pytest.fixture
def driver(tmp_path: Path) -> Any:
    pretended = Driver(tmp_path)
    yield pretended
    pretended.close()


def test_gpus_are_shown_with_what_the_driver_knows(driver: Driver) -> None:
    told = driver.read(GPUS)
    assert told["problem"] == ""
    first, second = told["gpus"]
    assert first == {
        "index": 0, "uuid": "GPU-a", "name": "H100", "memory_bytes": 80 * 2**30, "memory_used_bytes": 2**30,
        "utilization_percent": 37.0, "temperature_c": 55.0, "power_w": 300.0, "task": None, "foreign_pids": [],
    }  # fmt: skip
    assert (second["utilization_percent"], second["temperature_c"], second["power_w"]) == (None, None, None)


def test_a_process_that_no_shim_of_ours_started_is_foreign(driver: Driver) -> None:
    child = driver.process.pid
    told = driver.read(GPUS + f"process 0 {os.getpid()}\nprocess 0 {child}\nprocess 1 {child}\n", ours=(child,))
    assert [gpu["foreign_pids"] for gpu in told["gpus"]] == [[os.getpid()], []]
    told = driver.read(GPUS + f"process 0 {child}\nprocess 1 999999\n", ours=(os.getpid(),))
    assert [gpu["foreign_pids"] for gpu in told["gpus"]] == [[], [999999]], "a child of a shim is ours"


def test_a_driver_that_is_not_loaded_is_a_state_with_words(driver: Driver) -> None:
    told = driver.read("fail nvmlInitWithFlags 9\n")
    assert told["gpus"] == []
    assert told["problem"].startswith("the NVIDIA driver does not work")


def test_a_driver_that_stops_answering_is_a_state_with_words(driver: Driver) -> None:
    assert len(driver.read(GPUS)["gpus"]) == 2
    told = driver.read(GPUS + "fail nvmlDeviceGetMemoryInfo 15\n")
    assert told["gpus"] == []
    assert told["problem"].startswith("the NVIDIA driver does not answer")


def test_a_machine_without_driver_says_so_and_does_not_load_pynvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_LIBRARY", "libno-such-driver.so.1")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert GpuReader().read(()) == ((), "no NVIDIA driver")


def test_a_sample_describes_this_machine_and_rates_come_with_the_second(tmp_path: Path) -> None:
    measure = Probe(tmp_path, lambda: ())
    first, second = measure.sample(), measure.sample()
    assert first.cpus == len(os.sched_getaffinity(0))
    assert 0 < first.memory_used_bytes < first.memory_bytes
    assert first.disk_free_bytes is not None and first.disk_free_bytes > 0
    assert first.net_rx_bps is None
    assert second.net_rx_bps is not None and second.net_rx_bps >= 0
    assert Probe(tmp_path / "gone", lambda: ()).sample().disk_free_bytes is None


def test_the_probe_measures_in_its_own_thread_until_it_is_closed(tmp_path: Path) -> None:
    samples: queue.Queue[Sample] = queue.Queue()
    failing = iter([OSError("one bad reading")])

    def ours() -> tuple[int, ...]:
        for error in failing:
            raise error
        return ()

    measure = Probe(tmp_path, ours, period=0.01)
    measure.start(samples.put)
    assert samples.get(timeout=LIMIT_SECONDS).cpus > 0
    assert samples.get(timeout=LIMIT_SECONDS).cpu_percent is not None
    measure.close()
    assert measure._thread is not None
    measure._thread.join(LIMIT_SECONDS)
    assert not measure._thread.is_alive()


def test_what_a_task_leaves_in_the_background_is_of_its_shims_family(tmp_path: Path) -> None:
    async def story() -> None:
        async with Bench(tmp_path) as bench:
            fence = bench.prepare(1, daemon_code("{}") + "import signal; signal.pause()")
            task = await bench.spawn(fence)
            daemon = int(await bench.line(fence, "daemon "))
            alive = bench.attempts.inspect(fence)
            assert isinstance(alive, Alive)
            assert bench.attempts.shim_pid(fence) == alive.shim
            assert {task, daemon, alive.shim} <= probe._families((alive.shim,))
            bench.attempts.signal(fence, b"kill")
            await bench.end(fence)
            assert bench.attempts.shim_pid(fence) is None

    asyncio.run(story())
