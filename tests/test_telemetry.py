"""What a peer says about itself must fit one packet and never lose what placement reads."""

from dataclasses import replace

from meshq import codec, config
from meshq.exec.probe import Sample
from meshq.exec.worker import Capacity
from meshq.ids import TaskId
from meshq.machine import Machine
from meshq.settings import Settings
from meshq.task import Gpu, Telemetry
from meshq.telemetry import fitted, publish

MACHINE = Machine(slots=2, cpus=8, memory_bytes=2**35)
FREE = Capacity(slots=1, cpus=4, memory_bytes=2**34, gpus=(1,))
SAMPLE = Sample(
    cpus=8, cpu_percent=12.5, load_1m=1.0, memory_bytes=2**35, memory_used_bytes=2**33, disk_free_bytes=2**40,
    disk_read_bps=0.0, disk_write_bps=0.0, net_rx_bps=0.0, net_tx_bps=0.0, gpus=(), gpu_problem="no driver",
)  # fmt: skip
FOREIGN = tuple(range(10**6, 10**6 + 9))
GPUS = tuple(
    Gpu(index=n, uuid="GPU-" + "a" * 36, name="NVIDIA GeForce RTX 4090", memory_bytes=24 << 30, foreign_pids=FOREIGN)
    for n in range(16)
)


def record(
    sample: Sample | None = SAMPLE, *, allowed: frozenset[int] | None = None, settings: Settings | None = None
) -> Telemetry:
    return publish(
        settings or Settings(), MACHINE, FREE, sample, [TaskId("a" * 16)], ledger_epoch=3, draining=False, gpus_allowed=allowed
    )


def test_capacity_usage_and_running_tasks_are_told() -> None:
    told = record()
    assert (told.slots_total, told.slots_free, told.cpus, told.cpus_free, told.gpus_free) == (2, 1, 8, 4, 1)
    assert (told.cpu_percent, told.ledger_epoch, told.running, told.problem) == (12.5, 3, ("a" * 16,), "")


def test_a_machine_that_is_not_measured_or_has_a_full_disk_says_that_it_claims_nothing() -> None:
    assert record(None).problem == "its machine is not measured yet"
    assert "disk is nearly full (100 MiB free)" in record(replace(SAMPLE, disk_free_bytes=100 << 20)).problem


def test_only_the_gpus_that_may_be_given_out_are_told_and_they_bring_the_gpu_queue() -> None:
    told = record(replace(SAMPLE, gpus=GPUS[:3]), allowed=frozenset({0, 2}))
    assert [gpu.index for gpu in told.gpus] == [0, 2]
    assert told.queues == ("default", "gpu")
    assert record(replace(SAMPLE, gpus=GPUS[:3]), allowed=frozenset()).queues == ("default",)


def test_what_does_not_fit_is_left_out_but_never_what_placement_reads() -> None:
    labels = {f"label-{n}": "v" * 40 for n in range(6)}
    running = tuple(TaskId(f"{n:016}") for n in range(64))
    full = Telemetry(
        gpus=GPUS, queues=("default", "g" * 60, "h" * 60), running=running, slots_total=64, slots_free=3, labels=labels
    )
    told = fitted(full)
    assert len(codec.encode(told)) <= config.RECORD_BYTES_MAX
    assert (len(told.gpus), told.slots_total, told.slots_free, told.queues) == (16, 64, 3, full.queues)
    assert told.labels == labels
    assert all(gpu.memory_bytes == 24 << 30 and gpu.foreign_pids for gpu in told.gpus)


def test_there_is_a_cut_that_fits_even_for_the_largest_machine_with_the_longest_labels() -> None:
    busy = tuple(replace(gpu, index=n, task="a" * 16) for n, gpu in enumerate(GPUS * 4))
    usage = replace(SAMPLE, disk_read_bps=1.5, disk_write_bps=1.5, net_rx_bps=1.5, net_tx_bps=1.5, gpus=busy)
    settings = Settings(labels={f"label-{n}": "v" * 50 for n in range(5)}, queues=("q" * 63, "r" * 63, "s" * 63))
    told = record(usage, settings=settings)
    assert len(codec.encode(told)) <= config.RECORD_BYTES_MAX
    assert (told.labels, told.queues, told.slots_free) == (settings.labels, settings.queues, 1)
    assert len(told.gpus) > 4


def test_what_fits_is_left_as_it_is() -> None:
    small = Telemetry(gpus=GPUS[:2])
    assert fitted(small) == small
