"""The probe: what it says of this machine, while nothing waits for a GPU driver or anything else that hangs."""

import os
import queue
import threading
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from meshq.exec import probe
from meshq.exec.environment import DURABLE
from meshq.exec.gpus import HIDDEN_BYTES_MAX, GpuReader, Ours
from meshq.exec.inventory import Inventory
from meshq.exec.probe import Counted, Meter, Probe, Sample, with_hardware
from meshq.ids import TaskId
from meshq.task import Gpu, GpuProcess, MigInstance
from tests.exec.bench import LIMIT_SECONDS

MIB, GIB = 2**20, 2**30
MINE, OTHER = TaskId("a" * 16), TaskId("b" * 16)
GPU = Gpu(index=0, uuid="GPU-a", name="A100", memory_bytes=40 * GIB, memory_used_bytes=5 * MIB)


class Fixed(GpuReader):
    """A reader that answers the same at once, or as soon as it may."""

    def __init__(self, *gpus: Gpu, may: threading.Event | None = None) -> None:
        super().__init__()
        self._fixed, self._may = gpus, may
        self.driver, self.cuda = "550.54.14", "12.4"

    def read(self, ours: Ours) -> tuple[tuple[Gpu, ...], str]:
        assert self._may is None or self._may.wait(LIMIT_SECONDS)
        return self._fixed, ""


def a_probe(home: Path, *gpus: Gpu, may: threading.Event | None = None, period: float = 0.01) -> Probe:
    return Probe(home, dict, period, reader=Fixed(*gpus, may=may), inventory=Inventory(home / "environments", ()))


def test_a_sample_describes_this_machine_and_rates_come_with_the_second(tmp_path: Path) -> None:
    measure = a_probe(tmp_path, GPU)
    first, second = measure.sample(), measure.sample()
    measure.close()
    assert first.cpus == len(os.sched_getaffinity(0))
    assert first.cpu_percent is not None and first.load_1m is not None
    assert 0 < first.memory_used_bytes < first.memory_bytes
    assert first.disk_free_bytes is not None and first.disk_free_bytes > 0
    assert first.net_rx_bps is None
    assert second.net_rx_bps is not None and second.net_rx_bps >= 0
    assert (first.gpus, first.gpu_problem) == ((GPU,), "")
    assert (first.versions.driver, first.versions.cuda, first.versions.kernel) == ("550.54.14", "12.4", os.uname().release)


def test_what_can_not_be_read_is_unknown_and_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("not in this container")

    for name in ("disk_io_counters", "net_io_counters", "cpu_percent"):
        monkeypatch.setattr(psutil, name, refuse)
    monkeypatch.setattr(os, "getloadavg", refuse)
    measure = a_probe(tmp_path / "gone", GPU)
    told = (measure.sample(), measure.sample())[1]
    measure.close()
    assert (told.disk_free_bytes, told.disk_read_bps, told.net_rx_bps, told.cpu_percent, told.load_1m) == (None,) * 5
    assert told.memory_bytes > 0 and told.gpus == (GPU,)


def test_the_probe_measures_in_its_own_thread_until_it_is_closed(tmp_path: Path) -> None:
    samples: queue.Queue[Sample] = queue.Queue()
    failing = iter([OSError("one bad reading")])

    def take(sample: Sample) -> None:
        for error in failing:
            raise error
        samples.put(sample)

    measure = a_probe(tmp_path)
    measure.start(take)
    assert samples.get(timeout=LIMIT_SECONDS).cpus > 0
    assert samples.get(timeout=LIMIT_SECONDS).cpu_percent is not None
    measure.close()
    assert measure._thread is not None
    for thread in (measure._thread, measure._gpus._thread):
        assert thread is not None
        thread.join(1.0)
        assert not thread.is_alive()


def test_cached_environments_and_versions_are_told_soon(tmp_path: Path) -> None:
    folder = tmp_path / "environments" / ("a" * 32)
    folder.mkdir(parents=True)
    (folder / ".complete").write_text(DURABLE)
    samples: queue.Queue[Sample] = queue.Queue()
    measure = a_probe(tmp_path)
    measure.start(samples.put)
    told = [samples.get(timeout=LIMIT_SECONDS).environments for _ in range(2)]
    measure.close()
    assert told == [(), ("a" * 8,)]


def test_the_rest_of_the_machine_is_measured_while_the_gpus_do_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "GPU_PATIENCE_FIRST_SECONDS", 0.01)
    samples: queue.Queue[Sample] = queue.Queue()
    may = threading.Event()
    measure = a_probe(tmp_path, GPU, may=may)
    measure.start(samples.put)
    first, second = samples.get(timeout=LIMIT_SECONDS), samples.get(timeout=LIMIT_SECONDS)
    assert (first.gpus, second.gpus) == ((), ())
    assert first.gpu_problem.startswith("the NVIDIA driver has not answered for")
    assert second.net_rx_bps is not None
    may.set()
    while not (told := samples.get(timeout=LIMIT_SECONDS)).gpus:
        pass  # one more at most
    measure.close()
    assert (told.gpus, told.gpu_problem) == ((GPU,), "")


# --- which GPUs a task can have -------------------------------------------------------------------------------------


def computes(task: TaskId | None, *, graphics: bool = False) -> Gpu:
    process = GpuProcess(pid=7, task=task, memory_bytes=2 * GIB, graphics=graphics)
    used = replace(GPU, processes=(process,), memory_used_bytes=2 * GIB)
    return used if task is not None or graphics else replace(used, foreign_pids=(7,))


@pytest.mark.parametrize(
    ("gpu", "usable"),
    [
        (GPU, True),
        (replace(GPU, memory_used_bytes=None), True),
        (replace(GPU, problem="it is lost"), False),
        (computes(None), False),
        (computes(None, graphics=True), True),
        (computes(MINE), True),
        (replace(GPU, mig_mode=True), False),
        (replace(GPU, mig_mode=True, mig=(MigInstance(uuid="MIG-x", profile="1g.5gb", memory_bytes=GIB),)), False),
        (replace(GPU, memory_used_bytes=HIDDEN_BYTES_MAX), True),
        (replace(GPU, memory_used_bytes=HIDDEN_BYTES_MAX + 1), False),
        (replace(computes(None, graphics=True), memory_used_bytes=4 * GIB), False),
        (replace(GPU, processes=(GpuProcess(pid=7, graphics=True),), memory_used_bytes=4 * GIB), True),
    ],
)
def test_a_gpu_is_usable_if_it_works_and_nobody_else_computes_on_it(gpu: Gpu, usable: bool) -> None:
    assert bool(sample_of(gpu).usable_gpus()) == usable


def test_a_task_of_ours_on_a_gpu_that_it_was_not_given_is_in_the_way() -> None:
    told = sample_of(computes(MINE))
    assert [device.index for device in told.usable_gpus({MINE: (0, 1)})] == [0]
    assert told.usable_gpus({MINE: (1,)}) == ()
    assert [device.index for device in told.usable_gpus({OTHER: (1,)})] == [0], "it is over, and its process is ending"
    assert sample_of(computes(MINE, graphics=True)).usable_gpus({MINE: (1,)}), "it only draws there"


def sample_of(*gpus: Gpu) -> Sample:
    return Sample(
        cpus=1, cpu_percent=None, load_1m=None, memory_bytes=1, memory_used_bytes=1, disk_free_bytes=None, disk_read_bps=None,
        disk_write_bps=None, net_rx_bps=None, net_tx_bps=None, gpus=gpus, gpu_problem="",
    )  # fmt: skip


# --- rates ----------------------------------------------------------------------------------------------------------


def test_a_rate_is_the_difference_over_the_time() -> None:
    meter = Meter()
    assert meter.rates(10.0, {"a": Counted(100, 7), "b": Counted(0, 0)}) == (None, None)
    assert meter.rates(12.0, {"a": Counted(300, 7), "b": Counted(100, 4)}) == (150.0, 2.0)
    assert meter.rates(12.0, {"a": Counted(300, 7)}) == (None, None), "no time has passed"


def test_a_device_that_comes_goes_or_begins_anew_makes_no_rate_of_its_whole_count() -> None:
    meter = Meter()
    meter.rates(0.0, {"a": Counted(0, 0), "usb": Counted(10**9, 10**9)})
    assert meter.rates(1.0, {"a": Counted(50, 5)}) == (50.0, 5.0)
    assert meter.rates(2.0, {"a": Counted(50, 5), "usb": Counted(10**9, 10**9)}) == (0.0, 0.0)
    assert meter.rates(3.0, {"a": Counted(60, 5), "usb": Counted(0, 0)}) == (10.0, 0.0)
    assert meter.rates(4.0, {"new": Counted(9, 9)}) == (None, None)


def test_bytes_that_a_bridge_or_a_volume_passes_on_are_not_counted_twice(tmp_path: Path) -> None:
    counted = {name: Counted(1, 1) for name in ("eth0", "wlan0", "docker0", "veth1")}
    assert with_hardware(counted, tmp_path / "none") == counted, "in a container nothing has hardware"
    for name in ("eth0", "wlan0", "unused"):
        (tmp_path / name / "device").mkdir(parents=True)
    assert sorted(with_hardware(counted, tmp_path)) == ["eth0", "wlan0"]
