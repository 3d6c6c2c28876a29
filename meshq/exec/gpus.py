"""What NVML tells of the GPUs, read in a thread of its own.

Problem. A driver may be missing, broken, of another version than its library, installed or reloaded while the agent runs,
or hang in the kernel for minutes. One of eight GPUs may fall off the bus. People on lab machines compute beside the mesh,
and come first. None of that may stop the agent, hide a GPU that works, or put a task on a GPU that somebody uses.

What is wrong is a state with words, no error. A GPU that was seen once stays listed with its problem, so that tasks wait for
it instead of being refused; nothing is given out that was not just seen to work. A reading that takes too long goes on in
its thread, and what was read last is shown meanwhile, as old.

Who uses a GPU: only processes that compute keep tasks away. NVML lists what draws (an X server, a compositor) separately,
and a desktop draws on every GPU with a screen: if that counted, no workstation would ever take a task. A process is ours if
it is a shim of ours or descends from one (shims are subreapers, nothing escapes them). Memory that no visible process
accounts for means that somebody computes where we can't look, as in another container.

NVML shows pids of the host. In a container without the host's pids every process looks foreign, which errs on the side of
leaving the GPU alone. Limits: a reader keeps the driver's device files open, so an administrator who unloads the driver has
to stop the agent first; a driver of another version is used after a restart of the agent.
"""

import ctypes
import logging
import os
import pwd
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import psutil

from meshq.exec import shim
from meshq.ids import TaskId
from meshq.task import Gpu, GpuProcess, MigInstance

log = logging.getLogger("meshq.exec")

LIBRARY: Final = "libnvidia-ml.so.1"
NO_DRIVER: Final = "no NVIDIA driver"
GPUS_MAX: Final = 64
MIG_MAX: Final = 16  # instances of one GPU; hardware has at most 7
PROCESSES_MAX: Final = 32  # listed of one GPU
WORDS_MAX: Final = 100  # characters of a problem
LOOK_AGAIN_SECONDS: Final = 60.0  # for a driver that was missing, and for GPUs that are lost
RETRY_SECONDS: Final = 10.0  # of a driver that is there and does not work
LATE_SECONDS: Final = 5.0  # a reading takes milliseconds; with eight GPUs that must wake up first, a few seconds
HIDDEN_BYTES_MAX: Final = 2**30  # of memory in use that no visible process accounts for; a driver takes less for itself
ANCESTORS_MAX: Final = 256  # of a process that are looked at

Ours = Mapping[int, TaskId]
"""The pids of our shims, and the task of each."""

_DRIVER_GONE: Final = (1, 9, 12, 18)  # uninitialized, not loaded, no library, library and driver differ: no GPU works
_UNKNOWABLE: Final = (3, 4, 7, 13, 21, 25, 26, 27)  # not supported here, not permitted, too old: no failure of the GPU
_NO_FUNCTION: Final = 13

_WORDS: Final[Mapping[int, str]] = {
    9: "the NVIDIA driver is not loaded",
    15: "it is lost; the machine must be restarted",
    16: "it must be reset",
    18: "the NVIDIA driver was updated: restart the machine, or the agent if the new driver is loaded already",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What is known of the GPUs at one time."""

    gpus: tuple[Gpu, ...] = ()
    problem: str = ""  # what is wrong with the driver, or why there is none
    driver: str = ""  # its version
    cuda: str = ""  # the newest version of CUDA that it can do


def hidden_bytes(gpu: Gpu) -> int:
    """The memory in use that none of the visible processes accounts for; 0 if that can't be said."""
    known = [each.memory_bytes for each in gpu.processes if each.memory_bytes is not None]
    if gpu.memory_used_bytes is None or len(known) < len(gpu.processes):
        return 0
    return max(0, gpu.memory_used_bytes - sum(known))


class GpuReader:
    """Reads all GPUs, blocking. The library stays loaded; a driver that does not work is tried again after a while."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._nvml: Any = None  # the module pynvml, which has no types, while the driver works
        self._problem = ""
        self._retry_at = 0.0
        self._known: tuple[Gpu, ...] = ()  # as they were seen last
        self._users: dict[int, str] = {}
        self.driver = ""
        self.cuda = ""

    def read(self, ours: Ours) -> tuple[tuple[Gpu, ...], str]:
        """The GPUs, and what is wrong with all of them or why there are none."""
        if self._clock() >= self._retry_at and (self._nvml is None or any(gpu.problem for gpu in self._known)):
            self._connect()  # anew also for a GPU that is lost: NVML sees it again only after that
        if self._nvml is not None:
            try:
                count = min(int(self._nvml.nvmlDeviceGetCount()), GPUS_MAX)
                self._known = tuple(self._gpu(index, ours) for index in range(count))
                return self._known, ""
            except self._nvml.NVMLError as error:
                self._fail(f"the NVIDIA driver does not answer: {_words(error)}", RETRY_SECONDS)
        self._known = tuple(broken(gpu, self._problem) for gpu in self._known)
        return self._known, self._problem

    def close(self) -> None:
        """Give the driver back."""
        if self._nvml is not None:
            try:
                self._nvml.nvmlShutdown()
            except self._nvml.NVMLError as error:
                log.debug("closing NVML: %s", error)
            self._nvml = None

    def _connect(self) -> None:
        self.close()
        try:
            ctypes.CDLL(LIBRARY)  # asked first: pynvml is 8,000 lines, which a machine without GPUs need not load
        except OSError as error:
            self._fail(_why_no_library(str(error)), LOOK_AGAIN_SECONDS)
            return
        import pynvml

        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            self._fail(f"the NVIDIA driver does not work: {_words(error)}", RETRY_SECONDS)
            return
        if self._problem and self._problem != NO_DRIVER:
            log.info("the NVIDIA driver works again")
        self._nvml, self._problem, self._retry_at = pynvml, "", self._clock() + LOOK_AGAIN_SECONDS
        self.driver = str(self._ask(pynvml.nvmlSystemGetDriverVersion) or "")
        self.cuda = self._cuda_version()

    def _fail(self, problem: str, seconds: float) -> None:
        problem = problem[:WORDS_MAX]
        if problem not in (self._problem, NO_DRIVER):
            log.warning("%s", problem)
        self.close()
        self._problem = problem
        self._retry_at = self._clock() + seconds

    def _cuda_version(self) -> str:
        for function in (self._nvml.nvmlSystemGetCudaDriverVersion_v2, self._nvml.nvmlSystemGetCudaDriverVersion):
            try:
                number = int(function())
                return f"{number // 1000}.{number % 1000 // 10}"
            except self._nvml.NVMLError:
                continue  # the newer one asks libcuda, which need not be installed
        return ""

    # --- one GPU ----------------------------------------------------------------------------------------------------

    def _gpu(self, index: int, ours: Ours) -> Gpu:
        """One that fails is told with its words; an error that concerns the driver is raised."""
        gpu = next((gpu for gpu in self._known if gpu.index == index), None) or _unknown(index)
        try:
            handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
            gpu = self._identified(index, handle)
            return self._measured(gpu, handle, ours)
        except self._nvml.NVMLError as error:
            if error.value in _DRIVER_GONE:
                raise
            return broken(gpu, _words(error))
        except ValueError as error:  # text that is none
            return broken(gpu, f"NVML answers nonsense: {error}")

    def _identified(self, index: int, handle: Any) -> Gpu:
        return replace(
            _unknown(index),
            uuid=str(self._ask(self._nvml.nvmlDeviceGetUUID, handle) or ""),
            name=str(self._ask(self._nvml.nvmlDeviceGetName, handle) or ""),
            memory_bytes=self._memory(handle)[0],
        )

    def _measured(self, gpu: Gpu, handle: Any, ours: Ours) -> Gpu:
        nvml = self._nvml
        power = self._ask(nvml.nvmlDeviceGetPowerUsage, handle)
        usage = self._ask(nvml.nvmlDeviceGetUtilizationRates, handle)
        temperature = self._ask(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU)
        mode = self._ask(nvml.nvmlDeviceGetMigMode, handle)
        mig_mode = mode is not None and mode[0] == nvml.NVML_DEVICE_MIG_ENABLE
        parts = self._instances(handle) if mig_mode else []
        processes = self._processes([handle, *parts], ours)
        return replace(
            gpu,
            memory_used_bytes=self._memory(handle)[1],
            utilization_percent=None if usage is None else float(usage.gpu),
            temperature_c=None if temperature is None else float(temperature),
            power_w=None if power is None else power / 1000,
            foreign_pids=_foreign(processes),
            processes=processes,
            mig=tuple(self._instance(part, ours) for part in parts),
            mig_mode=mig_mode,
        )

    def _memory(self, handle: Any) -> tuple[int, int | None]:
        """All of it, and what is in use beside what the driver reserves (older ones count that as used)."""
        memory = self._ask(self._nvml.nvmlDeviceGetMemoryInfo, handle, version=self._nvml.nvmlMemory_v2)
        if memory is None:
            memory = self._ask(self._nvml.nvmlDeviceGetMemoryInfo, handle)
        if memory is None:  # a GPU without memory of its own uses the machine's (GB10)
            return psutil.virtual_memory().total, None
        return int(memory.total), int(memory.used)

    def _instances(self, handle: Any) -> list[Any]:
        """The handles of a GPU's MIG instances."""
        count = min(int(self._ask(self._nvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0), MIG_MAX)
        parts = []
        for index in range(count):
            try:
                part = self._ask(self._nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, index)
            except self._nvml.NVMLError_NotFound:
                continue  # places for instances may be empty, also between others
            parts += [] if part is None else [part]
        return parts

    def _instance(self, part: Any, ours: Ours) -> MigInstance:
        told = self._identified(0, part)
        return MigInstance(
            uuid=told.uuid,
            profile=told.name.rpartition("MIG ")[2],  # "NVIDIA A100-SXM4-40GB MIG 1g.5gb"
            memory_bytes=told.memory_bytes,
            memory_used_bytes=self._memory(part)[1],
            foreign_pids=_foreign(self._processes([part], ours)),
        )

    # --- who uses it ------------------------------------------------------------------------------------------------

    def _processes(self, handles: Iterable[Any], ours: Ours) -> tuple[GpuProcess, ...]:
        """Each once, also if it has several contexts; one that draws and computes is one that computes."""
        memory: dict[int, int | None] = {}
        computes: set[int] = set()
        for handle in handles:
            for kind in ("Compute", "Graphics"):
                for each in self._running(kind, handle):
                    memory[each.pid] = max(memory.get(each.pid) or 0, each.usedGpuMemory or 0) or None
                    if kind == "Compute":
                        computes.add(each.pid)
        found = [
            GpuProcess(
                pid=pid, user=self._user(pid), task=task_of(pid, ours), memory_bytes=memory[pid], graphics=pid not in computes
            )
            for pid in sorted(memory)
        ]
        found.sort(key=lambda each: (each.graphics, each.task is not None, -(each.memory_bytes or 0)))
        return tuple(found[:PROCESSES_MAX])

    def _running(self, kind: str, handle: Any) -> list[Any]:
        """What NVML lists as computing, or as drawing. pynvml's own choice of the function fails with drivers before 510."""
        for version in ("_v3", "_v2"):
            try:
                found: list[Any] = getattr(self._nvml, f"nvmlDeviceGet{kind}RunningProcesses{version}")(handle)
                return found
            except self._nvml.NVMLError as error:
                if error.value not in _UNKNOWABLE:
                    raise
                if error.value != _NO_FUNCTION:
                    break
        return []  # if there are some, their memory shows

    def _user(self, pid: int) -> str | None:
        try:
            uid = os.stat(f"/proc/{pid}").st_uid
        except OSError:
            return None
        if uid not in self._users:  # asked once: the directory of users may be a server
            try:
                self._users[uid] = pwd.getpwuid(uid).pw_name
            except KeyError:
                self._users[uid] = str(uid)
        return self._users[uid]

    def _ask(self, function: Callable[..., Any], *arguments: object, **options: object) -> Any:
        """None for what this GPU, this driver or this user can't tell."""
        try:
            return function(*arguments, **options)
        except self._nvml.NVMLError as error:
            if error.value in _UNKNOWABLE:
                return None
            raise


def broken(gpu: Gpu, problem: str) -> Gpu:
    """What is still true of a GPU that can't be read."""
    return Gpu(
        index=gpu.index, uuid=gpu.uuid, name=gpu.name, memory_bytes=gpu.memory_bytes, task=gpu.task, mig_mode=gpu.mig_mode,
        problem=problem[:WORDS_MAX],
    )  # fmt: skip


def task_of(pid: int, ours: Ours) -> TaskId | None:
    """The task whose shim this is, or an ancestor of this."""
    for _ in range(ANCESTORS_MAX if ours else 0):
        if pid in ours:
            return ours[pid]
        found = shim.process(pid)
        if found is None or found.parent <= 1:
            return None
        pid = found.parent
    return None


def _foreign(processes: Iterable[GpuProcess]) -> tuple[int, ...]:
    return tuple(sorted(each.pid for each in processes if each.task is None and not each.graphics))


def _unknown(index: int) -> Gpu:
    return Gpu(index=index, uuid="", name="", memory_bytes=0)


def _words(error: Any) -> str:
    return _WORDS.get(error.value) or str(error)


def _why_no_library(told: str) -> str:
    if "cannot open shared object file: No such file" not in told:
        return f"the NVIDIA library can't be loaded: {told}"
    return f"{NO_DRIVER}, though an NVIDIA GPU is built in" if nvidia_hardware() else NO_DRIVER


def nvidia_hardware(devices: Path = Path("/sys/bus/pci/devices")) -> bool:
    """Whether the bus has a display or 3D controller made by NVIDIA."""
    for device in devices.glob("*"):
        try:
            vendor, kind = ((device / name).read_text("ascii").strip() for name in ("vendor", "class"))
        except (OSError, ValueError):
            continue
        if vendor == "0x10de" and kind.startswith(("0x0300", "0x0302")):
            return True
    return False


class GpuWatch:
    """A reader in a thread of its own, named meshq-gpus: whoever asks waits as long as he likes, not as the driver does."""

    def __init__(
        self, ours: Callable[[], Ours], reader: GpuReader | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`ours` is called in that thread."""
        self._ours = ours
        self._reader = reader or GpuReader()
        self._clock = clock
        self._changed = threading.Condition()
        self._asked_at: float | None = None  # for the reading that is going on
        self._ended = False
        self._reading: Reading | None = None
        self._thread: threading.Thread | None = None

    def look(self, patience: float) -> Reading:
        """The GPUs as they are now; as they were, if reading them takes longer than `patience` seconds."""
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="meshq-gpus", daemon=True)
                self._thread.start()
            if self._asked_at is None:
                self._asked_at = self._clock()
                self._changed.notify_all()
                if self._changed.wait_for(self._is_done, patience):
                    assert self._reading is not None
                    return self._reading
            return _late(self._reading, self._clock() - self._asked_at)

    def close(self) -> None:
        """Let the thread end, as soon as the driver lets it."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _is_done(self) -> bool:
        return self._asked_at is None

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ended or not self._is_done())
                if self._ended:
                    break
            reading = self._read()
            with self._changed:
                self._reading, self._asked_at = reading, None
                self._changed.notify_all()
        self._reader.close()

    def _read(self) -> Reading:
        try:
            gpus, problem = self._reader.read(self._ours())
        except Exception as error:  # whatever a driver says, the next look is another one
            gpus, problem = (), f"reading the GPUs failed: {type(error).__name__}: {error}"[:WORDS_MAX]
            if self._reading is None or self._reading.problem != problem:
                log.exception("reading the GPUs failed")
        return Reading(gpus=gpus, problem=problem, driver=self._reader.driver, cuda=self._reader.cuda)


def _late(last: Reading | None, seconds: float) -> Reading:
    """What to show while a reading goes on: for a few seconds what was read last, then that the driver hangs."""
    if last is not None and seconds < LATE_SECONDS:
        return last
    problem = f"the NVIDIA driver has not answered for {_about(seconds)}"
    last = last or Reading()
    return replace(last, gpus=tuple(broken(gpu, problem) for gpu in last.gpus), problem=problem)


def _about(seconds: float) -> str:
    """`40 s`, `5 min`, `2 h`: no finer than anybody cares."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def look(patience: float) -> tuple[tuple[Gpu, ...], str]:
    """The GPUs once, and what is wrong with them: for a caller that a hanging driver must not hold up."""
    watch = GpuWatch(dict)
    reading = watch.look(patience)
    watch.close()
    return reading.gpus, reading.problem
