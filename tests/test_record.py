"""Records: what one is as bytes, that nothing else gets in, and what is left out when it does not fit."""

import hashlib
import random
import uuid
import zlib
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshq import codec, config, record
from meshq.errors import MalformedData
from meshq.ids import TaskId
from meshq.record import CUTS, PLAIN_BYTES_MAX, fitted, pack, unpack
from meshq.task import Gpu, GpuProcess, MigInstance, Telemetry, Versions

GIB, MIB = 2**30, 2**20
RNG = random.Random(3)
ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"
PLACEMENT = (
    "queues", "order", "draining", "slots_total", "slots_free", "cpus", "cpus_free", "memory_bytes", "memory_free_bytes",
    "gpus_free", "labels", "ledger_epoch", "problem", "keys", "ring",
)  # fmt: skip
LABELS = {f"label-{n}": "v" * 50 for n in range(5)}  # the longest that `join` lets pass, as are these queues
QUEUES = ("q" * 63, "r" * 63, "s" * 63)


def task_id() -> TaskId:
    return TaskId("".join(RNG.choice(ALPHABET) for _ in range(16)))


def gpu(index: int, task: TaskId | None = None, *, foreign: int = 0) -> Gpu:
    """As real as it gets: nothing of it deflates better than on a real machine."""
    processes = [GpuProcess(pid=RNG.randrange(10**6), user="ann", task=task, memory_bytes=RNG.randrange(20 << 10) << 20)]
    processes += [
        GpuProcess(pid=RNG.randrange(10**6), user=f"user-{n}", memory_bytes=RNG.randrange(9000) << 20) for n in range(foreign)
    ]
    return Gpu(
        index=index, uuid=f"GPU-{uuid.UUID(int=RNG.getrandbits(128))}", name="NVIDIA GeForce RTX 4090",
        memory_bytes=25_757_220_864, memory_used_bytes=RNG.randrange(24564) << 20 if task else 5 << 20,
        utilization_percent=RNG.randrange(100) if task else 0, temperature_c=RNG.randrange(30, 90),
        power_w=RNG.randrange(450) if task else 22, task=task,
        foreign_pids=tuple(each.pid for each in processes if each.task is None)[:foreign],
        processes=tuple(processes) if task or foreign else (),
    )  # fmt: skip


def sliced(index: int) -> Gpu:
    """A GPU in MIG mode with all the instances that there can be, each used by somebody."""
    instances = tuple(
        MigInstance(
            uuid=f"MIG-{uuid.UUID(int=RNG.getrandbits(128))}", profile="1g.10gb", memory_bytes=10 * GIB,
            memory_used_bytes=RNG.randrange(10240) << 20, foreign_pids=(RNG.randrange(10**6), RNG.randrange(10**6)),
        )
        for _ in range(7)
    )  # fmt: skip
    return replace(gpu(index), mig=instances, mig_mode=True, problem="in MIG mode; only whole GPUs are given to tasks so far")


def machine(*gpus: Gpu, running: int = 0) -> Telemetry:
    tasks = [TaskId(each.task) for each in gpus if each.task] + [task_id() for _ in range(running)]
    return Telemetry(
        queues=("default", "gpu") if gpus else ("default",), slots_total=max(1, len(gpus)), slots_free=1, cpus=16, cpus_free=9,
        memory_bytes=67_326_259_200, memory_free_bytes=33_663_129_600, gpus=gpus, gpus_free=1, labels={"room": "b12"},
        ledger_epoch=1, running=tuple(tasks), cpu_percent=37, memory_used_bytes=14_213 * MIB, load_1m=3.265625,
        disk_free_bytes=413_225 * MIB, disk_read_bps=1_034_112, disk_write_bps=88_112, net_rx_bps=12_004, net_tx_bps=9_113,
        versions=Versions(
            python="3.11.2", kernel="6.1.0-18-amd64", system="debian 12", driver="550.54.14" if gpus else "",
            cuda="12.4" if gpus else "", docker="24.0.7",
        ),
        environments=tuple(f"{RNG.getrandbits(32):08x}" for _ in range(4)), wall=1_790_000_000.25,
        keys=(f"{RNG.getrandbits(32):08x}",), ring=f"{RNG.getrandbits(32):08x}",
    )  # fmt: skip


# --- bytes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "bytes_max"),
    [
        (machine(), 250),
        (machine(running=1), 250),
        (machine(gpu(0)), 300),
        (machine(gpu(0, task_id())), 350),
        (machine(*(gpu(n, task_id()) for n in range(4))), 600),
        (machine(*(gpu(n, task_id()) for n in range(8))), 1000),
    ],
    ids=["no GPU", "no GPU, busy", "1 GPU", "1 GPU, busy", "4 GPUs, busy", "8 GPUs, busy"],
)
def test_a_usual_machine_tells_all_it_has_in_few_bytes(told: Telemetry, bytes_max: int) -> None:
    assert fitted(told) == told
    assert len(pack(told)) <= bytes_max
    assert unpack(pack(told)) == told


def test_every_field_comes_back() -> None:
    told = replace(
        machine(sliced(0), gpu(1, task_id(), foreign=2)),
        problem="no disk",
        profile="fast",
        damped=True,
        gpu_problem="lost",
        draining=True,
        slots_free=2,
    )
    assert unpack(pack(told)) == told
    default = Telemetry()
    assert all(getattr(told, each.name) != getattr(default, each.name) for each in fields(told) if each.name != "order")


def test_a_record_of_the_first_release_is_still_read() -> None:
    """Version 0.1.0 sent plain MessagePack; its fields stand where they stood."""
    first = bytes.fromhex(
        "dc001801 91a764656661756c74 a6737472696374 c2 01 01 08 08 ce40000000 ce20000000"
        "91 9a 00 a54750552d61 a441313030 ce10000000 c0 c0 c0 c0 c0 9107"
        "00 81a4726f6f6da3623132 03 90 07 c0 c0 c0 c0 c0 c0 c0 a0"
    )
    told = unpack(first)
    assert (told.queues, told.cpus, told.memory_bytes, told.labels, told.ledger_epoch) == (
        ("default",), 8, GIB, {"room": "b12"}, 3,
    )  # fmt: skip
    assert (told.gpus[0].name, told.gpus[0].foreign_pids, told.gpus[0].processes) == ("A100", (7,), ())
    assert (told.cpu_percent, told.wall, told.versions) == (7.0, 0.0, Versions())


def test_a_deflated_record_of_today_is_read_for_ever() -> None:
    """The dictionary must never change: a better one gets a mark of its own."""
    assert hashlib.sha256(record._DICTIONARY).hexdigest()[:16] == "56a68a08334e3f84"
    assert unpack(bytes.fromhex(GOLDEN)) == Telemetry(queues=("default", "gpu"), labels={"room": "b12"}, cpus=16, wall=12.5)


GOLDEN = "c1c3137f028c2077352e29cacfcf5d9c6468c430e100142c98b060c1b4056030e1b48326c48100"


@pytest.mark.parametrize("longer", [b"", b"\xc1", b"\xc1\xff", pack(machine())[:-1], pack(machine()) + b"\0", b"\x93\1\2\3"])
def test_what_is_no_record_is_refused(longer: bytes) -> None:
    with pytest.raises(MalformedData):
        unpack(longer)


@given(st.binary(max_size=1100))
def test_garbage_raises_one_exception_and_nothing_else(data: bytes) -> None:
    for each in (data, b"\xc1" + data):
        try:
            unpack(each)
        except MalformedData:
            continue


def test_a_record_that_inflates_without_end_costs_no_more_than_the_limit() -> None:
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = deflater.compress(bytes(900_000)) + deflater.flush()
    assert len(bomb) < config.RECORD_BYTES_MAX
    with pytest.raises(MalformedData, match="too long when inflated"):
        unpack(b"\xc1" + bomb)


def test_the_limits_hold_exactly() -> None:
    with pytest.raises(MalformedData, match="a record of 1001 bytes"):
        unpack(bytes(config.RECORD_BYTES_MAX + 1))
    equal = Telemetry(gpus=tuple(Gpu(index=0, uuid="", name="n" * 63, memory_bytes=GIB) for _ in range(200)))
    assert len(pack(equal)) < config.RECORD_BYTES_MAX < PLAIN_BYTES_MAX < len(codec.encode(equal))
    told = fitted(equal)
    assert len(codec.encode(told)) <= PLAIN_BYTES_MAX and unpack(pack(told)) == told


# --- what does not fit ----------------------------------------------------------------------------------------------


def test_what_fits_is_left_as_it_is() -> None:
    small = machine(gpu(0, task_id(), foreign=2))
    assert fitted(small) is small


CROWDS = {
    "8 GPUs with crowds": machine(*(gpu(n, task_id(), foreign=8) for n in range(8))),
    "16 GPUs, busy": machine(*(gpu(n, task_id(), foreign=n % 3) for n in range(16)), running=48),
    "16 GPUs, sliced": machine(*map(sliced, range(16))),
    "16 GPUs, mixed, long labels": replace(
        machine(*(sliced(n) if n % 2 else gpu(n, task_id(), foreign=3) for n in range(16))), labels=LABELS, queues=QUEUES
    ),
    "16 GPUs, all hanging": replace(
        machine(
            *(replace(gpu(n, task_id()), problem=f"the NVIDIA driver has not answered for {'9' * 40} s") for n in range(16))
        ),
        gpu_problem="x" * 100,
    ),
}


@pytest.mark.parametrize("crowd", CROWDS.values(), ids=CROWDS)
def test_what_placement_reads_is_told_of_sixteen_gpus_and_more(crowd: Telemetry) -> None:
    told = fitted(crowd)
    assert len(pack(told)) <= config.RECORD_BYTES_MAX
    assert unpack(pack(told)) == told
    assert [getattr(told, name) for name in PLACEMENT] == [getattr(crowd, name) for name in PLACEMENT]
    assert [placed_by(each) for each in told.gpus] == [placed_by(each) for each in crowd.gpus]


def placed_by(gpu: Gpu) -> tuple[object, ...]:
    return (
        gpu.index, gpu.memory_bytes, gpu.task, bool(gpu.foreign_pids), bool(gpu.problem), gpu.mig_mode,
        [(each.profile, each.memory_bytes, bool(each.foreign_pids)) for each in gpu.mig],
    )  # fmt: skip


def test_there_is_a_cut_that_fits_even_for_the_largest_machine_with_the_longest_labels() -> None:
    crowd = machine(*(gpu(n, task_id(), foreign=5) for n in range(64)), running=64)
    told = fitted(replace(crowd, labels=LABELS, queues=QUEUES))
    assert len(pack(told)) <= config.RECORD_BYTES_MAX
    assert (told.labels, told.queues, told.slots_free) == (LABELS, QUEUES, 1)
    assert len(told.gpus) > 16


def test_each_cut_takes_something_that_the_next_one_leaves() -> None:
    crowd = replace(
        machine(*(sliced(n) if n % 2 else gpu(n, task_id(), foreign=5) for n in range(16)), running=64),
        environments=("e" * 8,) * 16,
    )
    sizes = [len(pack(crowd))]
    for cut in CUTS:
        crowd = cut(crowd)
        sizes.append(len(pack(crowd)))
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)


def test_people_lose_details_before_names_and_names_before_placement_loses_anything() -> None:
    order = [cut.__name__ for cut in CUTS]
    assert order == [
        "_with_fewer_environments", "_with_few_processes", "_with_fewer_running", "_without_details",
        "_with_short_gpus", "_with_bare_gpus", "_without_usage",
    ]  # fmt: skip
    told = fitted(CROWDS["8 GPUs with crowds"])
    assert all(each.uuid and each.name and each.processes and each.foreign_pids for each in told.gpus)
    assert record.CUTS is CUTS
