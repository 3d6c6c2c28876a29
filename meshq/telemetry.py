"""What this peer says about itself to the others: machine, capacity and what runs, in at most RECORD_BYTES_MAX bytes.

Pure: the agent hands in what exec and the probe know. What does not fit is left out in a fixed order: process ids of others
first, then running tasks beyond the eighth, names and figures of GPUs, the usage of the machine. What placement reads goes
last, and only beside the longest labels and queues that `settings.check` lets pass: then the last of many GPUs are not told.
"""

from collections.abc import Sequence
from dataclasses import replace

from meshq import codec, config
from meshq.exec.probe import Sample
from meshq.exec.worker import Capacity
from meshq.ids import TaskId
from meshq.machine import Machine
from meshq.settings import Settings, queues_served
from meshq.task import Gpu, Telemetry


def publish(
    settings: Settings, machine: Machine, free: Capacity, sample: Sample | None, running: Sequence[TaskId], *,
    ledger_epoch: int, draining: bool, gpus_allowed: frozenset[int] | None,
) -> Telemetry:  # fmt: skip
    """The record of this moment."""
    gpus = tuple(gpu for gpu in sample.gpus if gpus_allowed is None or gpu.index in gpus_allowed) if sample else ()
    telemetry = Telemetry(
        queues=queues_served(settings, len(gpus)),
        order=settings.order,
        draining=draining,
        slots_total=machine.slots,
        slots_free=free.slots,
        cpus=machine.cpus,
        cpus_free=free.cpus,
        memory_bytes=machine.memory_bytes,
        memory_free_bytes=free.memory_bytes,
        gpus=gpus,
        gpus_free=len(free.gpus),
        labels=settings.labels,
        ledger_epoch=ledger_epoch,
        running=tuple(running),
        problem=_problem(sample),
    )
    return fitted(telemetry if sample is None else _with_usage(telemetry, sample))


def _with_usage(telemetry: Telemetry, sample: Sample) -> Telemetry:
    return replace(
        telemetry,
        cpu_percent=sample.cpu_percent,
        memory_used_bytes=sample.memory_used_bytes,
        load_1m=sample.load_1m,
        disk_free_bytes=sample.disk_free_bytes,
        disk_read_bps=sample.disk_read_bps,
        disk_write_bps=sample.disk_write_bps,
        net_rx_bps=sample.net_rx_bps,
        net_tx_bps=sample.net_tx_bps,
    )


def _problem(sample: Sample | None) -> str:
    """Why nothing is claimed, in words; empty if nothing stands in the way."""
    if sample is None:
        return "its machine is not measured yet"
    if sample.disk_free_bytes is not None and sample.disk_free_bytes < config.DISK_FREE_BYTES_MIN:
        return f"its disk is nearly full ({sample.disk_free_bytes >> 20} MiB free)"
    return ""


def fitted(telemetry: Telemetry) -> Telemetry:
    """The same record, cut down until it fits one packet."""
    for cut in (_without_pids, _with_fewer_running, _with_short_gpus, _with_bare_gpus, _without_usage):
        if _fits(telemetry):
            return telemetry
        telemetry = cut(telemetry)
    while telemetry.gpus and not _fits(telemetry):
        telemetry = replace(telemetry, gpus=telemetry.gpus[:-1])
    return telemetry


def _fits(telemetry: Telemetry) -> bool:
    return len(codec.encode(telemetry)) <= config.RECORD_BYTES_MAX


def _without_pids(telemetry: Telemetry) -> Telemetry:
    """One foreign process says as much to placement as ten."""
    return replace(telemetry, gpus=tuple(replace(gpu, foreign_pids=gpu.foreign_pids[:1]) for gpu in telemetry.gpus))


def _with_fewer_running(telemetry: Telemetry) -> Telemetry:
    return replace(telemetry, running=telemetry.running[:8])


def _with_short_gpus(telemetry: Telemetry) -> Telemetry:
    """Sixteen GPUs with UUIDs alone take 700 bytes."""
    return replace(telemetry, gpus=tuple(_short(gpu) for gpu in telemetry.gpus))


def _short(gpu: Gpu) -> Gpu:
    return replace(gpu, uuid=gpu.uuid[:12], name=gpu.name[:16], power_w=None, temperature_c=None)


def _with_bare_gpus(telemetry: Telemetry) -> Telemetry:
    """What placement reads of a GPU, and nothing else."""
    bare = (
        Gpu(index=gpu.index, uuid="", name="", memory_bytes=gpu.memory_bytes, task=gpu.task, foreign_pids=gpu.foreign_pids)
        for gpu in telemetry.gpus
    )
    return replace(telemetry, gpus=tuple(bare), running=())


def _without_usage(telemetry: Telemetry) -> Telemetry:
    return replace(
        telemetry,
        cpu_percent=None,
        memory_used_bytes=None,
        load_1m=None,
        disk_free_bytes=None,
        disk_read_bps=None,
        disk_write_bps=None,
        net_rx_bps=None,
        net_tx_bps=None,
    )
