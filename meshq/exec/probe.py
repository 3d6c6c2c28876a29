"""What this machine does: cores, memory, disk, network by psutil, and its GPUs by NVML.

One thread measures once in a period and hands over a `Sample`; nothing here waits on the event loop, and a driver that hangs
(they do) stops only this thread. A missing or broken driver is a state with words, no error. A GPU is usable for tasks
if no foreign process computes on it: one that neither is nor descends from one of our shims. People on lab machines come first.

NVML shows pids of the host. In a container without the host's pids every process on a GPU looks foreign, which errs on
the side of leaving the GPU alone.
"""

import ctypes
import logging
import os
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import psutil

from meshq.exec import shim
from meshq.exec.worker import Device
from meshq.task import Gpu

log = logging.getLogger("meshq.exec")

PERIOD_SECONDS: Final = 2.0
RETRY_SECONDS: Final = 60.0  # between looks for a driver that was missing
GPUS_MAX: Final = 64
_LIBRARY: Final = "libnvidia-ml.so.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One look at the machine. Rates are over the time since the look before; None if unknown."""

    cpus: int
    cpu_percent: float | None
    load_1m: float | None
    memory_bytes: int
    memory_used_bytes: int
    disk_free_bytes: int | None  # where the agent's home is
    disk_read_bps: float | None
    disk_write_bps: float | None
    net_rx_bps: float | None
    net_tx_bps: float | None
    gpus: tuple[Gpu, ...]
    gpu_problem: str  # why there are no GPUs, in words; empty: there are, or NVML says that there are none

    def usable_gpus(self) -> tuple[Device, ...]:
        """The GPUs that no foreign process uses."""
        free = (gpu for gpu in self.gpus if not gpu.foreign_pids)
        return tuple(Device(index=gpu.index, memory_bytes=gpu.memory_bytes) for gpu in free)


class _Counters(NamedTuple):
    """Totals since boot, at one time."""

    at: float
    disk_read: int
    disk_write: int
    net_rx: int
    net_tx: int


class Probe:
    """Measures in its own thread, named meshq-probe. `ours` gives the pids of our shims, and is called in that thread."""

    def __init__(self, home: Path, ours: Callable[[], Collection[int]], period: float = PERIOD_SECONDS) -> None:
        self._home = home
        self._ours = ours
        self._period = period
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._before: _Counters | None = None
        self._gpus = GpuReader()

    def start(self, on_sample: Callable[[Sample], None]) -> None:
        """Begin to measure. `on_sample` is called in the thread of the probe."""
        assert self._thread is None
        psutil.cpu_percent()  # the first answer has nothing to compare with
        self._thread = threading.Thread(target=self._run, args=(on_sample,), name="meshq-probe", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Let the thread end; a driver that hangs is not waited for (the thread is a daemon)."""
        self._ended.set()

    def sample(self) -> Sample:
        """Look now. Blocking; from one thread only."""
        memory = psutil.virtual_memory()
        rates = self._rates()
        gpus, problem = self._gpus.read(self._ours())
        return Sample(
            cpus=len(os.sched_getaffinity(0)),
            cpu_percent=psutil.cpu_percent(),
            load_1m=os.getloadavg()[0],
            memory_bytes=memory.total,
            memory_used_bytes=memory.total - memory.available,
            disk_free_bytes=self._disk_free(),
            disk_read_bps=rates[0],
            disk_write_bps=rates[1],
            net_rx_bps=rates[2],
            net_tx_bps=rates[3],
            gpus=gpus,
            gpu_problem=problem,
        )

    def _run(self, on_sample: Callable[[Sample], None]) -> None:
        while not self._ended.is_set():
            try:
                on_sample(self.sample())
            except Exception:  # one odd reading must not end the telemetry of this peer
                log.exception("the probe could not read this machine")
            self._ended.wait(self._period)

    def _disk_free(self) -> int | None:
        try:
            info = os.statvfs(self._home)
        except OSError:
            return None
        return info.f_bavail * info.f_frsize

    def _rates(self) -> tuple[float | None, float | None, float | None, float | None]:
        disk = psutil.disk_io_counters()
        nets = psutil.net_io_counters(pernic=True)
        rx = sum(each.bytes_recv for name, each in nets.items() if name != "lo")
        tx = sum(each.bytes_sent for name, each in nets.items() if name != "lo")
        now = _Counters(time.monotonic(), disk.read_bytes if disk else 0, disk.write_bytes if disk else 0, rx, tx)
        before, self._before = self._before, now
        if before is None or now.at <= before.at:
            return (None, None, None, None)
        seconds = now.at - before.at
        read, write, down, up = (max(0.0, (new - old) / seconds) for old, new in zip(before[1:], now[1:], strict=True))
        return (read if disk else None, write if disk else None, down, up)


class GpuReader:
    """Reads all GPUs. The library stays loaded while it works; a missing one is looked for again after a while."""

    def __init__(self) -> None:
        self._nvml: Any = None  # the module pynvml; it has no types
        self._problem = ""
        self._retry_at = 0.0

    def read(self, ours: Collection[int]) -> tuple[tuple[Gpu, ...], str]:
        """The GPUs, or none and why."""
        if self._nvml is None and time.monotonic() >= self._retry_at:
            self._connect()
        if self._nvml is None:
            return (), self._problem
        try:
            count = min(int(self._nvml.nvmlDeviceGetCount()), GPUS_MAX)
            mine = _families(ours) if count else frozenset()
            return tuple(self._gpu(index, mine) for index in range(count)), ""
        except self._nvml.NVMLError as error:
            self._fail(f"the NVIDIA driver does not answer: {error}")
            return (), self._problem

    def _connect(self) -> None:
        try:
            ctypes.CDLL(_LIBRARY)  # asked first: pynvml is 8,000 lines, which a machine without GPUs need not load
        except OSError:
            self._fail("no NVIDIA driver")
            return
        import pynvml

        try:
            pynvml.nvmlInit()
            self._nvml = pynvml
        except pynvml.NVMLError as error:
            self._fail(f"the NVIDIA driver does not work: {error}")

    def _fail(self, problem: str) -> None:
        if problem != self._problem and self._nvml is not None:
            log.warning("%s", problem)
        self._nvml = None
        self._problem = problem
        self._retry_at = time.monotonic() + RETRY_SECONDS

    def _gpu(self, index: int, mine: frozenset[int]) -> Gpu:
        nvml = self._nvml
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        power = self._ask(nvml.nvmlDeviceGetPowerUsage, handle)
        usage = self._ask(nvml.nvmlDeviceGetUtilizationRates, handle)
        processes = self._ask(nvml.nvmlDeviceGetComputeRunningProcesses, handle) or ()
        temperature = self._ask(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU)
        return Gpu(
            index=index,
            uuid=str(nvml.nvmlDeviceGetUUID(handle)),
            name=str(nvml.nvmlDeviceGetName(handle)),
            memory_bytes=int(memory.total),
            memory_used_bytes=int(memory.used),
            utilization_percent=None if usage is None else float(usage.gpu),
            temperature_c=None if temperature is None else float(temperature),
            power_w=None if power is None else power / 1000,
            foreign_pids=tuple(sorted(each.pid for each in processes if each.pid not in mine)),
        )

    def _ask(self, function: Callable[..., Any], *arguments: object) -> Any:
        """What many models don't tell is None; it is no failure of the driver."""
        try:
            return function(*arguments)
        except (self._nvml.NVMLError_NotSupported, self._nvml.NVMLError_FunctionNotFound, self._nvml.NVMLError_NoPermission):
            return None


def _families(shims: Collection[int]) -> frozenset[int]:
    """The pids of these shims and of all that descends from them; nothing escapes a shim, it is a subreaper."""
    roots = set(shims)
    return frozenset(roots | {each.pid for each in shim.descendants(roots, list(shim.processes()))})
