"""What is told of GPUs, by the real nvidia-ml-py with a driver that a small C library pretends."""

import asyncio
import os
import pwd
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from meshq.exec import gpus
from meshq.exec.attempts import Alive
from meshq.exec.gpus import LATE_SECONDS, LOOK_AGAIN_SECONDS, PROCESSES_MAX, RETRY_SECONDS, GpuReader, GpuWatch
from meshq.ids import TaskId
from tests.exec.bench import LIMIT_SECONDS, Bench
from tests.exec.driver import LIBRARY, Driver, build
from tests.exec.test_shim import daemon_code

GIB, MIB = 2**30, 2**20
TASK = "a" * 16
GPUS = "gpu GPU-a NVIDIA_H100 81920 1024 37 55 300000\ngpu GPU-b Tesla_T4 16384 0 -1 -1 -1\n"
FIGURES = ("memory_used_bytes", "utilization_percent", "temperature_c", "power_w")
PER_GPU = (
    "nvmlDeviceGetHandleByIndex_v2", "nvmlDeviceGetUUID", "nvmlDeviceGetName", "nvmlDeviceGetMemoryInfo_v2",
    "nvmlDeviceGetUtilizationRates", "nvmlDeviceGetTemperature", "nvmlDeviceGetPowerUsage", "nvmlDeviceGetMigMode",
    "nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetGraphicsRunningProcesses_v3",
)  # fmt: skip
GONE = "the NVIDIA driver does not answer: "


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def driver(library: Path, tmp_path: Path) -> Iterator[Driver]:
    pretended = Driver(library.parent, tmp_path / "state")
    yield pretended
    pretended.close()


# --- what works -----------------------------------------------------------------------------------------------------


def test_gpus_are_shown_with_what_the_driver_knows(driver: Driver) -> None:
    told = driver.read("driver 550.54.14 12040\n" + GPUS)
    assert (told["problem"], told["driver"], told["cuda"]) == ("", "550.54.14", "12.4")
    first, second = told["gpus"]
    assert first == {
        "index": 0, "uuid": "GPU-a", "name": "NVIDIA H100", "memory_bytes": 80 * GIB, "memory_used_bytes": GIB,
        "utilization_percent": 37.0, "temperature_c": 55.0, "power_w": 300.0, "task": None, "foreign_pids": [],
        "processes": [], "mig": [], "mig_mode": False, "problem": "",
    }  # fmt: skip
    assert (second["utilization_percent"], second["temperature_c"], second["power_w"]) == (None, None, None)


def test_a_process_that_no_shim_of_ours_started_is_foreign_and_shown_with_its_user(driver: Driver) -> None:
    me, child = os.getpid(), driver.process.pid
    state = GPUS + f"process 0 {me} 300\nprocess 0 {child} 500\nprocess 1 {child} 16\n"
    first, second = driver.read(state, {child: TASK})["gpus"]
    user = pwd.getpwuid(os.geteuid()).pw_name
    assert first["processes"] == [
        {"pid": me, "user": user, "task": None, "memory_bytes": 300 * MIB, "graphics": False},
        {"pid": child, "user": user, "task": TASK, "memory_bytes": 500 * MIB, "graphics": False},
    ]
    assert (first["foreign_pids"], second["foreign_pids"]) == ([me], [])


def test_a_descendant_of_a_shim_is_of_its_task_and_one_that_is_not_visible_is_foreign(driver: Driver) -> None:
    child = driver.process.pid
    told = driver.read(GPUS + f"process 0 {child}\nprocess 1 4194304\n", {os.getpid(): TASK})
    assert [gpu["foreign_pids"] for gpu in told["gpus"]] == [[], [4194304]]
    assert [gpu["processes"][0]["task"] for gpu in told["gpus"]] == [TASK, None]
    assert told["gpus"][1]["processes"][0]["user"] is None


def test_a_desktop_that_draws_on_a_gpu_does_not_make_it_foreign(driver: Driver) -> None:
    me, child = os.getpid(), driver.process.pid
    both = driver.read(GPUS + f"graphics 0 {me} 200\ngraphics 1 {child} 9\nprocess 1 {child} 7\n")["gpus"]
    assert [(gpu["foreign_pids"], [each["graphics"] for each in gpu["processes"]]) for gpu in both] == [
        ([], [True]),
        ([child], [False]),
    ]
    assert both[1]["processes"][0]["memory_bytes"] == 9 * MIB


def test_of_many_processes_the_foreign_ones_with_the_most_memory_are_kept(driver: Driver) -> None:
    many = [4194304 + n for n in range(PROCESSES_MAX + 8)]
    lines = "".join(f"process 0 {pid} {n}\n" for n, pid in enumerate(many))
    told = driver.read(
        GPUS + lines + f"graphics 0 {os.getpid()} 9999\nprocess 0 {driver.process.pid} 9999\n", {driver.process.pid: TASK}
    )
    kept = told["gpus"][0]["processes"]
    assert [each["pid"] for each in kept] == many[:7:-1]
    assert told["gpus"][0]["foreign_pids"] == sorted(each["pid"] for each in kept)


def test_memory_of_a_process_that_the_driver_does_not_tell_is_unknown(driver: Driver) -> None:
    [gpu, _] = driver.read(GPUS + f"process 0 {os.getpid()} -1\n")["gpus"]
    assert (gpu["processes"][0]["memory_bytes"], gpu["foreign_pids"]) == (None, [os.getpid()])


def test_a_gpu_in_mig_mode_is_shown_with_its_instances_and_who_uses_them(driver: Driver) -> None:
    me, child = os.getpid(), driver.process.pid
    state = (
        "gpu GPU-a NVIDIA_A100-SXM4-40GB 40960 512 -1 40 90000\ngpu GPU-b NVIDIA_A100-SXM4-40GB 40960 0 0 40 90000\n"
        "mig 0 MIG-x 1g.5gb 4864 128\nmig 0 MIG-y 3g.20gb 19968 256\n"
        f"process 0 {me} 100 1\nprocess 0 {child} 50 0\n"
    )
    first, second = driver.read(state, {child: TASK})["gpus"]
    assert first["mig_mode"] and not second["mig_mode"]
    assert first["mig"] == [
        {"uuid": "MIG-x", "profile": "1g.5gb", "memory_bytes": 4864 * MIB, "memory_used_bytes": 128 * MIB, "foreign_pids": []},
        {
            "uuid": "MIG-y",
            "profile": "3g.20gb",
            "memory_bytes": 19968 * MIB,
            "memory_used_bytes": 256 * MIB,
            "foreign_pids": [me],
        },
    ]
    assert first["foreign_pids"] == [me]
    assert [each["pid"] for each in first["processes"]] == [me, child], "each once, though GPU and instance list it"


def test_mig_mode_without_an_instance_is_mig_mode(driver: Driver) -> None:
    [gpu, _] = driver.read(GPUS + "mode 0\n")["gpus"]
    assert (gpu["mig_mode"], gpu["mig"]) == (True, [])


def test_a_gpu_without_memory_of_its_own_uses_the_machines(driver: Driver) -> None:
    [gpu] = driver.read("gpu GPU-a NVIDIA_GB10 -1 -1 3 40 9000\n")["gpus"]
    assert gpu["memory_bytes"] == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert (gpu["memory_used_bytes"], gpu["problem"], gpu["utilization_percent"]) == (None, "", 3.0)


def test_an_old_driver_is_asked_in_the_old_way(tmp_path: Path) -> None:
    build(tmp_path, "-DOLD")
    old = Driver(tmp_path, tmp_path / "state")
    me = os.getpid()
    [gpu, _] = old.read(GPUS + f"process 0 {me} 300\ngraphics 0 {old.process.pid} 5\nmode 0\n")["gpus"]
    old.close()
    assert [(each["pid"], each["memory_bytes"]) for each in gpu["processes"]] == [(me, 300 * MIB), (old.process.pid, 5 * MIB)]
    assert (gpu["foreign_pids"], gpu["mig_mode"], gpu["problem"]) == ([me], False, "")
    assert gpu["memory_used_bytes"] == (1024 + 600) * MIB, "it counts what it reserves"


# --- one bad GPU ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", PER_GPU)
def test_a_gpu_that_fails_hides_no_other(driver: Driver, function: str) -> None:
    healthy = driver.read(GPUS)["gpus"]
    told = driver.read(GPUS + f"fail {function} 999 1\n")
    assert told["problem"] == ""
    first, second = told["gpus"]
    assert first == healthy[0]
    assert second["problem"] == "Unknown Error"
    assert [second[each] for each in FIGURES] == [None] * 4
    assert (second["uuid"], second["name"], second["memory_bytes"]) == ("GPU-b", "Tesla T4", 16 * GIB)
    assert driver.read(GPUS)["gpus"] == healthy


@pytest.mark.parametrize("code", [3, 4, 7, 13, 21])
def test_what_a_gpu_can_not_tell_is_unknown_and_no_failure(driver: Driver, code: int) -> None:
    [gpu, _] = driver.read(GPUS + "".join(f"fail {function} {code} 0\n" for function in PER_GPU[4:]))["gpus"]
    assert (gpu["problem"], gpu["name"], gpu["memory_used_bytes"]) == ("", "NVIDIA H100", GIB)
    assert [gpu[each] for each in FIGURES[1:]] == [None] * 3
    assert (gpu["processes"], gpu["mig_mode"]) == ([], False)


def test_a_gpu_that_was_never_seen_to_work_is_listed_by_its_index(driver: Driver) -> None:
    first, second = driver.read(GPUS + "fail * 16 0\n")["gpus"]
    assert (first["index"], first["uuid"], first["name"], first["problem"]) == (0, "", "", "it must be reset")
    assert second["problem"] == ""


def test_a_gpu_that_fell_off_the_bus_is_looked_for_again(driver: Driver) -> None:
    driver.read(GPUS)
    [_, lost] = driver.read(GPUS + "fail nvmlDeviceGetPowerUsage 15 1\n", now=1.0)["gpus"]
    assert lost["problem"] == "it is lost; the machine must be restarted"
    assert driver.read(GPUS, now=2.0)["gpus"][1]["problem"] == lost["problem"], "NVML sees it again only in a new session"
    back = driver.read(GPUS, now=LOOK_AGAIN_SECONDS)
    assert [gpu["problem"] for gpu in back["gpus"]] == ["", ""]


def test_text_that_is_none_is_nonsense_of_that_gpu(driver: Driver) -> None:
    told = driver.read("gpu GPU-a \xff\xfe 81920 1024 37 55 300000\ngpu GPU-b T4 16384 0 -1 -1 -1\n")
    assert told["gpus"][0]["problem"].startswith("NVML answers nonsense")
    assert told["gpus"][1]["problem"] == ""


def test_a_gpu_whose_instances_can_not_be_asked_hides_no_other(driver: Driver) -> None:
    state = "gpu GPU-a A100 40960 0 0 40 9000\nmig 0 MIG-x 1g.5gb 4864 128\ngpu GPU-b T4 16384 0 -1 -1 -1\n"
    first, second = driver.read(state + "fail nvmlDeviceGetMigDeviceHandleByIndex 999\n")["gpus"]
    assert (first["problem"], second["problem"]) == ("Unknown Error", "")


# --- a driver that does not work ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (9, "the NVIDIA driver does not work: the NVIDIA driver is not loaded"),
        (18, "the NVIDIA driver does not work: the NVIDIA driver was updated: restart the machine, or the agent if"),
        (12345, "the NVIDIA driver does not work: as the test wants it"),
    ],
)
def test_a_driver_that_does_not_begin_is_a_state_with_words_until_it_works(driver: Driver, code: int, words: str) -> None:
    told = driver.read(f"fail nvmlInitWithFlags {code}\n")
    assert told["gpus"] == []
    assert told["problem"].startswith(words)
    assert driver.read(GPUS, now=RETRY_SECONDS - 0.1)["problem"] == told["problem"], "not asked at every look"
    told = driver.read(GPUS, now=RETRY_SECONDS)
    assert (len(told["gpus"]), told["problem"]) == (2, "")


@pytest.mark.parametrize(
    ("code", "words"),
    [(9, "the NVIDIA driver is not loaded"), (1, "Uninitialized"), (18, "the NVIDIA driver was updated: restart the")],
)
def test_a_driver_that_vanishes_leaves_its_gpus_listed_and_comes_back(driver: Driver, code: int, words: str) -> None:
    healthy = driver.read(GPUS + f"process 0 {os.getpid()}\n", now=0.0)
    told = driver.read(GPUS + f"fail * {code}\nfail nvmlInitWithFlags {code}\n", now=1.0)
    assert told["problem"].startswith(GONE + words)
    assert [gpu["problem"] for gpu in told["gpus"]] == [told["problem"]] * 2
    assert [gpu["uuid"] for gpu in told["gpus"]] == ["GPU-a", "GPU-b"]
    assert all(gpu[each] is None for gpu in told["gpus"] for each in FIGURES)
    assert (told["gpus"][0]["foreign_pids"], told["driver"]) == ([], healthy["driver"])
    again = driver.read(GPUS + f"fail nvmlInitWithFlags {code}\n", now=2.0 + RETRY_SECONDS)
    assert again["problem"].startswith("the NVIDIA driver does not work")
    back = driver.read(GPUS + f"process 0 {os.getpid()}\n", now=3.0 + 2 * RETRY_SECONDS)
    assert back == healthy


def test_a_session_that_a_reload_of_the_driver_ended_is_begun_anew(driver: Driver) -> None:
    driver.read(GPUS)
    assert driver.read(GPUS + "fail nvmlDeviceGetCount_v2 9\n", now=1.0)["problem"].startswith(GONE)
    assert driver.read(GPUS, now=1.0 + RETRY_SECONDS)["problem"] == ""


@pytest.mark.parametrize("code", [1, 9, 18])
def test_an_error_of_the_driver_that_one_gpu_meets_first_concerns_all(driver: Driver, code: int) -> None:
    driver.read(GPUS)
    told = driver.read(GPUS + f"fail nvmlDeviceGetPowerUsage {code} 1\n")
    assert told["problem"].startswith(GONE)
    assert [gpu["problem"] for gpu in told["gpus"]] == [told["problem"]] * 2


def test_a_driver_that_takes_an_unexpected_error_for_an_answer_is_a_state_with_words(driver: Driver) -> None:
    assert driver.read(GPUS + "fail nvmlDeviceGetCount_v2 999\n")["problem"] == GONE + "Unknown Error"


def test_a_driver_that_is_installed_while_the_agent_runs_is_found(library: Path, tmp_path: Path) -> None:
    folder = tmp_path / "later"
    folder.mkdir()
    driver = Driver(folder, tmp_path / "state")
    told = driver.read(GPUS)
    assert told["gpus"] == []
    assert told["problem"].startswith(gpus.NO_DRIVER)
    shutil.copy(library, folder / LIBRARY)
    assert driver.read(GPUS, now=LOOK_AGAIN_SECONDS - 0.1)["problem"] == told["problem"]
    assert [gpu["uuid"] for gpu in driver.read(GPUS, now=LOOK_AGAIN_SECONDS)["gpus"]] == ["GPU-a", "GPU-b"]
    driver.close()


def test_a_library_that_can_not_be_loaded_is_a_state_with_words(tmp_path: Path) -> None:
    (tmp_path / LIBRARY).write_text("no library")
    driver = Driver(tmp_path, tmp_path / "state")
    told = driver.read(GPUS)
    driver.close()
    assert told["problem"].startswith("the NVIDIA library can't be loaded: ")
    assert len(told["problem"]) <= gpus.WORDS_MAX


def test_a_machine_without_driver_says_so_and_does_not_load_pynvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "LIBRARY", "libno-such-driver.so.1")
    monkeypatch.setattr(gpus, "nvidia_hardware", lambda: False)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert GpuReader().read({}) == ((), "no NVIDIA driver")
    monkeypatch.setattr(gpus, "nvidia_hardware", lambda: True)
    assert GpuReader().read({}) == ((), "no NVIDIA driver, though an NVIDIA GPU is built in")


def test_a_gpu_without_a_driver_is_told_from_no_gpu(tmp_path: Path) -> None:
    assert not gpus.nvidia_hardware(tmp_path / "none")
    for name, vendor, kind in (("a", "0x8086", "0x030000"), ("b", "0x10de", "0x040300"), ("c", "", "")):
        (tmp_path / name).mkdir()
        if vendor:
            (tmp_path / name / "vendor").write_text(vendor + "\n")
            (tmp_path / name / "class").write_text(kind + "\n")
    assert not gpus.nvidia_hardware(tmp_path), "another maker's GPU, the sound of a card, a device that is going away"
    (tmp_path / "b" / "class").write_text("0x030200\n")
    assert gpus.nvidia_hardware(tmp_path)


# --- a driver that hangs --------------------------------------------------------------------------------------------


def test_a_driver_that_hangs_holds_nobody_up_and_its_gpus_are_given_to_nobody(driver: Driver) -> None:
    healthy = driver.read(GPUS)
    driver.show(GPUS + "hang nvmlDeviceGetTemperature 1\n")
    assert driver.look(0.01, now=10.0) == healthy, "a moment's delay says nothing"
    assert driver.look(60.0, now=10.0 + LATE_SECONDS - 0.1) == healthy, "who comes later does not wait at all"
    told = driver.look(60.0, now=50.0)
    assert told["problem"] == "the NVIDIA driver has not answered for 40 s"
    assert [gpu["problem"] for gpu in told["gpus"]] == [told["problem"]] * 2
    assert [gpu["uuid"] for gpu in told["gpus"]] == ["GPU-a", "GPU-b"]
    assert driver.look(60.0, now=10.0 + 7300)["problem"] == "the NVIDIA driver has not answered for 2 h"
    driver.show(GPUS)
    while (told := driver.look(1.0, now=60.0))["problem"]:
        pass  # each look ends: the hanging call notices the new file within milliseconds
    assert told == healthy


def test_a_driver_that_hangs_from_the_start_is_a_state_with_words(driver: Driver) -> None:
    driver.show("hang nvmlInitWithFlags\n")
    told = driver.look(0.01, now=0.0)
    assert (told["gpus"], told["problem"]) == ([], "the NVIDIA driver has not answered for 0 s")
    assert driver.look(60.0, now=300.0)["problem"] == "the NVIDIA driver has not answered for 5 min"


class Stuck(GpuReader):
    """A reader that answers when the test lets it."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on, self.closed = threading.Event(), threading.Event()

    def read(self, ours: gpus.Ours) -> tuple[tuple[Any, ...], str]:
        assert self.go_on.wait(LIMIT_SECONDS)
        return (), f"{len(ours)} shims"

    def close(self) -> None:
        self.closed.set()


def test_a_watch_that_is_closed_ends_its_thread_as_soon_as_the_driver_lets_it() -> None:
    reader = Stuck()
    watch = GpuWatch(lambda: {1: TaskId(TASK)}, reader)
    assert watch.look(0.001).problem.startswith("the NVIDIA driver has not answered")
    watch.close()
    assert watch._thread is not None and watch._thread.is_alive() and not reader.closed.is_set()
    reader.go_on.set()
    watch._thread.join(LIMIT_SECONDS)
    assert not watch._thread.is_alive() and reader.closed.is_set()


def test_a_look_that_fails_unexpectedly_is_a_state_with_words(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> gpus.Ours:
        raise OSError("one bad reading")

    watch = GpuWatch(fail, Stuck())
    problem = "reading the GPUs failed: OSError: one bad reading"
    assert [watch.look(LIMIT_SECONDS).problem for _ in range(3)] == [problem] * 3
    watch.close()
    assert len(caplog.records) == 1, "said once"


def test_a_single_look_leaves_no_thread_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "LIBRARY", "libno-such-driver.so.1")
    before = set(threading.enumerate())
    assert gpus.look(LIMIT_SECONDS)[0] == ()
    for thread in set(threading.enumerate()) - before:
        thread.join(1.0)
        assert not thread.is_alive()


# --- whose a process is ---------------------------------------------------------------------------------------------


def test_what_a_task_leaves_in_the_background_is_of_its_shims_family(tmp_path: Path) -> None:
    async def story() -> None:
        async with Bench(tmp_path) as bench:
            fence = bench.prepare(1, daemon_code("{}") + "import signal; signal.pause()")
            task = await bench.spawn(fence)
            daemon = int(await bench.line(fence, "daemon "))
            alive = bench.attempts.inspect(fence)
            assert isinstance(alive, Alive)
            assert bench.attempts.shim_pid(fence) == alive.shim
            ours = {alive.shim: TaskId(TASK)}
            assert [gpus.task_of(pid, ours) for pid in (task, daemon, alive.shim)] == [TASK] * 3
            assert [gpus.task_of(pid, ours) for pid in (os.getpid(), 1, 4194304)] == [None] * 3
            bench.attempts.signal(fence, b"kill")
            await bench.end(fence)
            assert bench.attempts.shim_pid(fence) is None

    asyncio.run(story())
