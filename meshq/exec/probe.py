"""What this machine does: cores, memory, disk, network by psutil, its GPUs by NVML, and what is installed on it.

One thread measures once in a period and hands over a `Sample`; nothing here waits on the event loop. The GPUs are read in a
thread of their own (`gpus`), since a driver may hang: then the rest of the sample is as fresh as ever, and says so. What can't
be read is None; a missing or broken driver is a state with words, no error.

Rates count what has hardware behind it. A logical volume, a bridge or a VPN passes on the bytes of a disk or a card that
counts them, too.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

import psutil

from meshq.config import Home
from meshq.exec.gpus import HIDDEN_BYTES_MAX, GpuReader, GpuWatch, Ours, hidden_bytes
from meshq.exec.inventory import Inventory
from meshq.exec.worker import Device
from meshq.ids import TaskId
from meshq.task import Gpu, Versions

log = logging.getLogger("meshq.exec")
T = TypeVar("T")

PERIOD_SECONDS: Final = 2.0
GPU_PATIENCE_SECONDS: Final = 1.0  # that a sample waits for its GPUs
GPU_PATIENCE_FIRST_SECONDS: Final = 2.5  # the first sample, without which the agent knows of no GPU; it waits for 3 s itself


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
    gpu_problem: str  # why there are no GPUs, or what is wrong with their driver; empty: NVML answers
    versions: Versions = field(default_factory=Versions)
    environments: tuple[str, ...] = ()  # heads of the keys of those that are cached, the one used last first

    def usable_gpus(self, given: Mapping[TaskId, Collection[int]] | None = None) -> tuple[Device, ...]:
        """The GPUs that a task can have without being in anybody's way. `given`: those that our running tasks have.

        A task of ours that computes on a GPU that it was not given is in the way like a foreign process.
        """
        free = (gpu for gpu in self.gpus if _is_usable(gpu) and not _has_stray(gpu, given or {}))
        return tuple(Device(index=gpu.index, memory_bytes=gpu.memory_bytes) for gpu in free)


def _is_usable(gpu: Gpu) -> bool:
    return not (gpu.problem or gpu.foreign_pids or gpu.mig_mode) and hidden_bytes(gpu) <= HIDDEN_BYTES_MAX


def _has_stray(gpu: Gpu, given: Mapping[TaskId, Collection[int]]) -> bool:
    tasks = (TaskId(each.task) for each in gpu.processes if each.task is not None and not each.graphics)
    return any(task in given and gpu.index not in given[task] for task in tasks)


class Probe:
    """Measures in its own thread, named meshq-probe. `ours` gives our shims, and is called in the thread of the GPUs."""

    def __init__(
        self,
        home: Path,
        ours: Callable[[], Ours],
        period: float = PERIOD_SECONDS,
        *,
        reader: GpuReader | None = None,
        inventory: Inventory | None = None,
    ) -> None:
        self._home = home
        self._period = period
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._rates = Rates()
        self._gpus = GpuWatch(ours, reader)
        self._inventory = inventory or Inventory(Home(home).environments)
        self._said = ""

    def start(self, on_sample: Callable[[Sample], None]) -> None:
        """Begin to measure. `on_sample` is called in the thread of the probe."""
        assert self._thread is None
        psutil.cpu_percent()  # the first answer has nothing to compare with
        self._thread = threading.Thread(target=self._run, args=(on_sample,), name="meshq-probe", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Let the threads end; a driver that hangs is not waited for (they are daemons)."""
        self._ended.set()
        self._gpus.close()

    def sample(self, gpu_patience: float = GPU_PATIENCE_SECONDS) -> Sample:
        """Look now. Blocking; from one thread only."""
        memory = psutil.virtual_memory()
        disk, net = self._rates.disk(), self._rates.net()
        gpus = self._gpus.look(gpu_patience)
        return Sample(
            cpus=len(os.sched_getaffinity(0)),
            cpu_percent=_or_none(psutil.cpu_percent),
            load_1m=_or_none(lambda: os.getloadavg()[0]),
            memory_bytes=memory.total,
            memory_used_bytes=memory.total - memory.available,
            disk_free_bytes=_or_none(self._disk_free),
            disk_read_bps=disk[0],
            disk_write_bps=disk[1],
            net_rx_bps=net[0],
            net_tx_bps=net[1],
            gpus=gpus.gpus,
            gpu_problem=gpus.problem,
            versions=self._inventory.versions(gpus.driver, gpus.cuda),
            environments=self._inventory.environments,
        )

    def _run(self, on_sample: Callable[[Sample], None]) -> None:
        patience = GPU_PATIENCE_FIRST_SECONDS
        while not self._ended.is_set():
            try:
                on_sample(self.sample(patience))
                self._inventory.look(time.monotonic())  # after the sample: docker may take its time
            except Exception as error:  # one odd reading must not end the telemetry of this peer
                self._say_once(f"the probe could not read this machine: {type(error).__name__}: {error}")
            patience = GPU_PATIENCE_SECONDS
            self._ended.wait(self._period)

    def _say_once(self, problem: str) -> None:
        """What fails now fails again in two seconds."""
        if problem != self._said:
            log.exception("%s", problem)
            self._said = problem

    def _disk_free(self) -> int:
        info = os.statvfs(self._home)
        return info.f_bavail * info.f_frsize


def _or_none(read: Callable[[], T]) -> T | None:
    """Not every kernel and container shows everything."""
    try:
        return read()
    except (OSError, ValueError, NotImplementedError, psutil.Error):
        return None


# --- rates ----------------------------------------------------------------------------------------------------------


class Counted(NamedTuple):
    """The bytes that one device has moved since it is there."""

    incoming: int
    outgoing: int


Pair = tuple[float | None, float | None]


class Rates:
    """Bytes a second since the last call, in and out, of disks and of network cards."""

    def __init__(self) -> None:
        self._disks, self._cards = Meter(), Meter()

    def disk(self) -> Pair:
        counted = _or_none(lambda: psutil.disk_io_counters(perdisk=True)) or {}
        found = {name: Counted(each.read_bytes, each.write_bytes) for name, each in counted.items()}
        return self._disks.rates(time.monotonic(), with_hardware(found, Path("/sys/block")))

    def net(self) -> Pair:
        counted = _or_none(lambda: psutil.net_io_counters(pernic=True)) or {}
        found = {name: Counted(each.bytes_recv, each.bytes_sent) for name, each in counted.items() if name != "lo"}
        return self._cards.rates(time.monotonic(), with_hardware(found, Path("/sys/class/net")))


class Meter:
    """Turns counters into rates. A device that comes or goes counts for nothing in the period in which it does."""

    def __init__(self) -> None:
        self._at = 0.0
        self._before: Mapping[str, Counted] = {}

    def rates(self, now: float, counted: Mapping[str, Counted]) -> Pair:
        before, at = self._before, self._at
        self._before, self._at = counted, now
        both = [(before[name], counted[name]) for name in counted if name in before]
        if not both or now <= at:
            return (None, None)
        incoming = sum(max(0, new.incoming - old.incoming) for old, new in both)
        outgoing = sum(max(0, new.outgoing - old.outgoing) for old, new in both)
        return (incoming / (now - at), outgoing / (now - at))


def with_hardware(counted: Mapping[str, Counted], folder: Path) -> Mapping[str, Counted]:
    """Those that are no partition, volume, bridge or tunnel; all of them where none has hardware, as in a container."""
    hard = {name: each for name, each in counted.items() if (folder / name / "device").exists()}
    return hard or counted
