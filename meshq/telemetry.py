"""What this peer says about itself to the others: machine, capacity and what runs, in at most RECORD_BYTES_MAX bytes.

Pure: the agent hands in what exec and the probe know. Figures are as fine as people read them, since every digit travels to
every peer: whole percents, degrees, watts and bytes a second, mebibytes, and binary fractions that deflate well.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Final

from meshq import config
from meshq.exec.gpus import HIDDEN_BYTES_MAX, NO_DRIVER, hidden_bytes
from meshq.exec.probe import Sample
from meshq.exec.worker import Capacity
from meshq.ids import TaskId
from meshq.machine import Machine
from meshq.record import fitted
from meshq.settings import Settings, queues_served
from meshq.task import Gpu, Telemetry

MIG_WORDS: Final = "in MIG mode; only whole GPUs are given to tasks so far"


def publish(
    settings: Settings, machine: Machine, free: Capacity, sample: Sample | None, running: Sequence[TaskId], *,
    ledger_epoch: int, draining: bool, gpus_allowed: frozenset[int] | None,
    keys: tuple[str, ...] = (), ring: str = "", problem: str = "", damped: bool = False, wall: float = 0.0,
) -> Telemetry:  # fmt: skip
    """The record of this moment. `problem`: why nothing is claimed, if the agent knows; `wall`: the wall clock, in seconds."""
    seen = sample.gpus if sample is not None else ()
    gpus = tuple(_told(gpu, running) for gpu in seen if gpus_allowed is None or gpu.index in gpus_allowed)
    own = _problem(sample)
    telemetry = Telemetry(
        queues=queues_served(settings, sum(1 for gpu in gpus if not gpu.mig_mode)),
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
        problem=(own or problem) if damped else (problem or own),
        damped=damped and not own,  # that it flaps may be excused (`sessions.judged`), what else is wrong may not
        keys=keys,
        ring=ring,
        wall=_short(wall) or 0.0,
        profile=settings.profile,
    )
    return fitted(telemetry if sample is None else _with_sample(telemetry, sample, gpus_allowed))


def _with_sample(telemetry: Telemetry, sample: Sample, gpus_allowed: Collection[int] | None) -> Telemetry:
    asked_for = gpus_allowed is None or len(gpus_allowed) > 0
    return replace(
        telemetry,
        cpu_percent=_whole(sample.cpu_percent),
        memory_used_bytes=_mebibytes(sample.memory_used_bytes),
        load_1m=_short(sample.load_1m),
        disk_free_bytes=_mebibytes(sample.disk_free_bytes),
        disk_read_bps=_whole(sample.disk_read_bps),
        disk_write_bps=_whole(sample.disk_write_bps),
        net_rx_bps=_whole(sample.net_rx_bps),
        net_tx_bps=_whole(sample.net_tx_bps),
        gpu_problem="" if sample.gpu_problem == NO_DRIVER or not asked_for else sample.gpu_problem,  # most machines have none
        versions=sample.versions,
        environments=sample.environments,
    )


def _told(gpu: Gpu, running: Sequence[TaskId]) -> Gpu:
    """With its figures rounded, and the reason if no task can have it."""
    return replace(
        gpu,
        memory_used_bytes=_mebibytes(gpu.memory_used_bytes),
        utilization_percent=_whole(gpu.utilization_percent),
        temperature_c=_whole(gpu.temperature_c),
        power_w=_whole(gpu.power_w),
        processes=tuple(replace(each, memory_bytes=_mebibytes(each.memory_bytes)) for each in gpu.processes),
        problem=gpu.problem or _why_not_given(gpu, running),
    )


def _why_not_given(gpu: Gpu, running: Sequence[TaskId]) -> str:
    """What an owner or a list of foreign processes does not explain."""
    if gpu.mig_mode:
        return MIG_WORDS
    if gpu.task is not None or gpu.foreign_pids:
        return ""
    if strays := [each.task for each in gpu.processes if each.task in running and not each.graphics]:
        return f"task {strays[0]} uses it without having asked for it"
    if (hidden := hidden_bytes(gpu)) > HIDDEN_BYTES_MAX:
        return f"{hidden / 2**30:.1f} GiB of it are used by processes that are not visible from here"
    return ""


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)


def _mebibytes(count: int | None) -> int | None:
    """Rounded down to whole ones; still in bytes."""
    return None if count is None else count >> 20 << 20


def _short(value: float | None) -> float | None:
    """To a 64th: a fraction of few bits."""
    return None if value is None or not math.isfinite(value) else round(value * 64) / 64


def _problem(sample: Sample | None) -> str:
    """Why nothing is claimed, in words; empty if nothing stands in the way."""
    if sample is None:
        return "its machine is not measured yet"
    if sample.disk_free_bytes is not None and sample.disk_free_bytes < config.DISK_FREE_BYTES_MIN:
        return f"its disk is nearly full ({sample.disk_free_bytes >> 20} MiB free)"
    return ""


def is_urgent(before: Telemetry, after: Telemetry) -> bool:
    """Whether something changed by which others place tasks or change keys: then it goes out at once, else when it is time."""
    return _acted_on(before) != _acted_on(after)


def _acted_on(telemetry: Telemetry) -> tuple[object, ...]:
    gpus = tuple(
        (gpu.index, gpu.memory_bytes, gpu.task, bool(gpu.foreign_pids), bool(gpu.problem), gpu.mig_mode)
        for gpu in telemetry.gpus
    )
    return (
        telemetry.queues, telemetry.order, telemetry.draining, telemetry.slots_total, telemetry.slots_free, telemetry.cpus,
        telemetry.cpus_free, telemetry.memory_bytes, telemetry.memory_free_bytes, gpus, telemetry.gpus_free, telemetry.labels,
        telemetry.ledger_epoch, telemetry.running, bool(telemetry.problem),
        telemetry.keys, telemetry.ring,
    )  # fmt: skip
