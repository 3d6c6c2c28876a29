"""What a peer says about itself: the right figures, no finer than people read them, and in words what is wrong."""

from dataclasses import replace

import pytest

from meshq import config
from meshq.exec.gpus import HIDDEN_BYTES_MAX, NO_DRIVER
from meshq.exec.probe import Sample
from meshq.exec.worker import Capacity
from meshq.ids import TaskId
from meshq.machine import Machine
from meshq.record import pack, unpack
from meshq.settings import Settings
from meshq.task import Gpu, GpuProcess, Telemetry, Versions
from meshq.telemetry import is_urgent, publish

GIB, MIB = 2**30, 2**20
TASK = TaskId("a" * 16)
MACHINE = Machine(slots=2, cpus=8, memory_bytes=2**35)
FREE = Capacity(slots=1, cpus=4, memory_bytes=2**34, gpus=(1,))
VERSIONS = Versions(python="3.11.2", kernel="6.1.0-18-amd64", system="debian 12", driver="550.54.14", cuda="12.4")
SAMPLE = Sample(
    cpus=8, cpu_percent=12.4, load_1m=1.3, memory_bytes=2**35, memory_used_bytes=2**33 + 5, disk_free_bytes=2**40 + 17,
    disk_read_bps=0.0, disk_write_bps=1234.56, net_rx_bps=None, net_tx_bps=7.7, gpus=(), gpu_problem="",
    versions=VERSIONS, environments=("e" * 8,),
)  # fmt: skip
GPUS = tuple(
    Gpu(index=n, uuid="GPU-" + "a" * 36, name="NVIDIA GeForce RTX 4090", memory_bytes=24 * GIB, foreign_pids=(n + 1,))
    for n in range(16)
)
GPU = replace(
    GPUS[0], foreign_pids=(), memory_used_bytes=5 * MIB + 3, utilization_percent=3.0, temperature_c=41.0, power_w=22.735
)


def record(
    sample: Sample | None = SAMPLE, *, allowed: frozenset[int] | None = None, settings: Settings | None = None
) -> Telemetry:
    return publish(
        settings or Settings(), MACHINE, FREE, sample, [TASK], ledger_epoch=3, draining=False, gpus_allowed=allowed,
        wall=1_790_000_000.123,
    )  # fmt: skip


def test_capacity_usage_and_running_tasks_are_told() -> None:
    told = record()
    assert (told.slots_total, told.slots_free, told.cpus, told.cpus_free, told.gpus_free) == (2, 1, 8, 4, 1)
    assert (told.ledger_epoch, told.running, told.problem, told.gpu_problem) == (3, (TASK,), "", "")
    assert (told.versions, told.environments) == (VERSIONS, ("e" * 8,))


def test_figures_are_no_finer_than_people_read_them() -> None:
    told = record(replace(SAMPLE, gpus=(GPU,)))
    assert (told.cpu_percent, told.memory_used_bytes, told.disk_free_bytes) == (12, 2**33, 2**40)
    assert (told.disk_read_bps, told.disk_write_bps, told.net_rx_bps, told.net_tx_bps) == (0, 1235, None, 8)
    assert abs((told.load_1m or 0) - 1.3) <= 1 / 128
    assert abs(told.wall - 1_790_000_000.123) <= 1 / 128
    [gpu] = told.gpus
    assert (gpu.memory_used_bytes, gpu.utilization_percent, gpu.temperature_c, gpu.power_w) == (5 * MIB, 3, 41, 23)
    assert gpu.memory_bytes == 24 * GIB
    assert unpack(pack(told)) == told


def test_a_machine_that_is_not_measured_or_has_a_full_disk_says_that_it_claims_nothing() -> None:
    assert record(None).problem == "its machine is not measured yet"
    assert "disk is nearly full (100 MiB free)" in record(replace(SAMPLE, disk_free_bytes=100 << 20)).problem
    stuck = publish(
        Settings(), MACHINE, FREE, None, [], ledger_epoch=3, draining=False, gpus_allowed=None,
        keys=("k" * 8,), ring="r" * 8, problem="another live agent has its identity",
    )  # fmt: skip
    assert (stuck.problem, stuck.keys, stuck.ring) == ("another live agent has its identity", ("k" * 8,), "r" * 8)


def test_only_the_gpus_that_may_be_given_out_are_told_and_they_bring_the_gpu_queue() -> None:
    told = record(replace(SAMPLE, gpus=GPUS[:3]), allowed=frozenset({0, 2}))
    assert [gpu.index for gpu in told.gpus] == [0, 2]
    assert told.queues == ("default", "gpu")
    assert record(replace(SAMPLE, gpus=GPUS[:3]), allowed=frozenset()).queues == ("default",)


def test_a_driver_that_does_not_answer_is_told_and_no_driver_is_not() -> None:
    hanging = replace(SAMPLE, gpu_problem="the NVIDIA driver has not answered for 40 s")
    assert record(hanging).gpu_problem == hanging.gpu_problem
    assert record(hanging, allowed=frozenset()).gpu_problem == "", "nobody wants to know: no GPU is given to tasks here"
    assert record(replace(SAMPLE, gpu_problem=NO_DRIVER)).gpu_problem == ""
    though = f"{NO_DRIVER}, though an NVIDIA GPU is built in"
    assert record(replace(SAMPLE, gpu_problem=though)).gpu_problem == though


def test_a_machine_whose_gpus_are_all_in_mig_mode_does_not_serve_the_gpu_queue() -> None:
    sliced = replace(GPU, mig_mode=True)
    told = record(replace(SAMPLE, gpus=(sliced,)))
    assert told.queues == ("default",)
    assert told.gpus[0].problem == "in MIG mode; only whole GPUs are given to tasks so far"
    assert record(replace(SAMPLE, gpus=(sliced, replace(GPU, index=1)))).queues == ("default", "gpu")


def test_a_gpu_that_nobody_gets_says_why() -> None:
    def why(gpu: Gpu) -> str:
        return record(replace(SAMPLE, gpus=(gpu,))).gpus[0].problem

    mine = GpuProcess(pid=7, task=TASK, memory_bytes=GIB)
    assert why(GPU) == ""
    assert why(replace(GPU, problem="it is lost")) == "it is lost"
    assert why(replace(GPU, processes=(mine,))) == f"task {TASK} uses it without having asked for it"
    assert why(replace(GPU, processes=(replace(mine, graphics=True),))) == ""
    assert why(replace(GPU, processes=(replace(mine, task="b" * 16),))) == "", "a task that is over: its process is ending"
    assert why(replace(GPU, task=TASK, processes=(mine,))) == ""
    assert why(replace(GPU, memory_used_bytes=HIDDEN_BYTES_MAX)) == ""
    hidden = replace(GPU, memory_used_bytes=HIDDEN_BYTES_MAX + GIB // 2)
    assert why(hidden) == "1.5 GiB of it are used by processes that are not visible from here"
    assert why(replace(hidden, task=TASK)) == ""
    assert why(replace(hidden, foreign_pids=(7,))) == "", "its foreign process says enough"


def test_the_largest_machine_with_the_longest_labels_tells_what_placement_reads() -> None:
    busy = tuple(replace(gpu, index=n, task="a" * 16) for n, gpu in enumerate(GPUS * 4))
    usage = replace(SAMPLE, disk_read_bps=1.5, disk_write_bps=1.5, net_rx_bps=1.5, net_tx_bps=1.5, gpus=busy)
    settings = Settings(labels={f"label-{n}": "v" * 50 for n in range(5)}, queues=("q" * 63, "r" * 63, "s" * 63))
    told = record(usage, settings=settings)
    assert len(pack(told)) <= config.RECORD_BYTES_MAX
    assert (told.labels, told.queues, told.slots_free) == (settings.labels, settings.queues, 1)
    assert len(told.gpus) > 4


# --- what others make of it -----------------------------------------------------------------------------------------


BASE = record(replace(SAMPLE, gpus=(GPU,)))


@pytest.mark.parametrize(
    "changed",
    [
        replace(BASE, slots_free=0), replace(BASE, running=()), replace(BASE, draining=True), replace(BASE, problem="disk"),
        replace(BASE, queues=("a",)), replace(BASE, labels={"a": "b"}), replace(BASE, gpus=()), replace(BASE, gpus_free=0),
        replace(BASE, ledger_epoch=4),
        replace(BASE, keys=("k",)), replace(BASE, ring="r"), replace(BASE, cpus_free=0), replace(BASE, memory_free_bytes=0),
        *(
            replace(BASE, gpus=(replace(BASE.gpus[0], **field),))
            for field in ({"task": "t"}, {"foreign_pids": (7,)}, {"problem": "lost"}, {"mig_mode": True}, {"memory_bytes": 1})
        ),
    ],
)  # fmt: skip
def test_what_placement_reads_is_urgent(changed: Telemetry) -> None:
    assert is_urgent(BASE, changed) and is_urgent(changed, BASE)


@pytest.mark.parametrize(
    "changed",
    [
        BASE,
        replace(BASE, cpu_percent=99, load_1m=9.0, wall=2.0, disk_free_bytes=1, net_rx_bps=5, environments=()),
        replace(BASE, versions=Versions(), gpu_problem="the NVIDIA driver has not answered for 40 s"),
        replace(BASE, gpus=(replace(BASE.gpus[0], utilization_percent=99, temperature_c=80, power_w=300),)),
    ],
)  # fmt: skip
def test_figures_that_people_read_are_not_urgent(changed: Telemetry) -> None:
    assert not is_urgent(BASE, changed)


def test_the_seconds_in_the_words_of_a_problem_are_not_urgent() -> None:
    first, second = (replace(BASE, gpus=(replace(BASE.gpus[0], problem=f"silent for {n} s"),)) for n in (40, 42))
    assert not is_urgent(first, second)
    assert is_urgent(replace(BASE, problem=""), replace(BASE, problem="100 MiB free"))
    assert not is_urgent(replace(BASE, problem="101 MiB free"), replace(BASE, problem="100 MiB free"))


def test_that_it_flaps_hides_no_full_disk() -> None:
    """Where most flap, the flapping is excused (`sessions.judged`), and with it went the disk."""
    for sample, problem, damped in [
        (SAMPLE, "it flaps", True),
        (replace(SAMPLE, disk_free_bytes=100 << 20), "its disk is nearly full (100 MiB free)", False),
    ]:
        told = publish(
            Settings(), MACHINE, FREE, sample, [], ledger_epoch=3, draining=False, gpus_allowed=None,
            problem="it flaps", damped=True,
        )  # fmt: skip
        assert (told.problem, told.damped) == (problem, damped)
