"""Which peer could run a task, which can run it now, and why another can't. Pure functions of a task and of telemetry."""

from collections.abc import Iterable
from dataclasses import dataclass

from meshq.errors import Unplaceable
from meshq.ledger.effects import PeerView
from meshq.task import Gpu, Needs, TaskSpec, Telemetry

GIB = 2**30
REASONS_MAX = 8  # lines of one refusal: more are not read


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a peer can still give away."""

    slots: int
    cpus: int
    memory_bytes: int
    gpus: int

    def holds(self, needs: Needs) -> bool:
        return (
            self.slots >= 1
            and self.cpus >= needs.cpus
            and self.memory_bytes >= needs.memory_bytes
            and self.gpus >= gpus_needed(needs)
        )

    def exceeds(self, other: "Capacity") -> bool:
        """Whether there is more of anything."""
        return (
            self.slots > other.slots
            or self.cpus > other.cpus
            or self.memory_bytes > other.memory_bytes
            or self.gpus > other.gpus
        )

    def minus(self, needs: Needs) -> "Capacity":
        return Capacity(
            self.slots - 1, self.cpus - needs.cpus, self.memory_bytes - needs.memory_bytes, self.gpus - gpus_needed(needs)
        )


def gpus_needed(needs: Needs) -> int:
    """GPU memory without a number of GPUs means one GPU."""
    return max(needs.gpus, 1 if needs.gpu_memory_bytes else 0)


def free_capacity(telemetry: Telemetry) -> Capacity:
    """What the peer says is free now."""
    return Capacity(telemetry.slots_free, telemetry.cpus_free, telemetry.memory_free_bytes, telemetry.gpus_free)


def fits_now(needs: Needs, telemetry: Telemetry, free: Capacity) -> bool:
    """Whether the task fits into `free`, which is at most what `telemetry` says is free."""
    if not free.holds(needs):
        return False
    idle = [gpu for gpu in telemetry.gpus if gpu.task is None and not gpu.foreign_pids and not gpu.problem]
    return not needs.gpu_memory_bytes or _large_enough(needs, idle) >= gpus_needed(needs)


def could_ever(needs: Needs, queue: str, telemetry: Telemetry) -> bool:
    """Whether the peer serves the queue and has what the task needs, whatever it is doing now."""
    return not _lacks(needs, queue, telemetry)


def eligible(needs: Needs, queue: str, view: PeerView) -> bool:
    """Whether the peer would take such a task as soon as it has room."""
    told = view.telemetry
    return view.alive and not told.draining and not told.problem and could_ever(needs, queue, told)


def why_not(needs: Needs, queue: str, view: PeerView) -> str:
    """A sentence that says why this peer does not take the task; empty if it would as soon as it has room."""
    told = view.telemetry
    if view.alive and not view.told:
        return f"{view.name} has only just come, and has not said yet what it has"
    if view.told and (lacks := _lacks(needs, queue, told)):
        return f"{view.name} {lacks[0]}"
    if view.left:
        return f"{view.name} left the mesh"
    if not view.alive:
        return f"{view.name} does not answer"
    if told.problem:
        return f"{view.name} takes no tasks: {told.problem}"
    return f"{view.name} is draining" if told.draining else ""


def check_placeable(spec: TaskSpec, views: Iterable[PeerView]) -> None:
    """Raise Unplaceable, with a line for each peer, if none of them could ever run the task.

    Who has only just come may have what it needs, and is no reason to refuse it.
    """
    known = tuple(views)
    if any((view.alive and not view.told) or could_ever(spec.needs, spec.queue, view.telemetry) for view in known):
        return
    reasons = [why_not(spec.needs, spec.queue, view) for view in known[:REASONS_MAX]]
    if len(known) > REASONS_MAX:
        reasons.append(f"and {len(known) - REASONS_MAX} more")
    raise Unplaceable(
        f"submitting {spec.name!r}: none of the {len(known)} peers that are known could ever run it",
        "\n".join([*reasons, "change what it needs, or keep it for a later peer with --hold"]),
    )


def _large_enough(needs: Needs, gpus: Iterable[Gpu]) -> int:
    return sum(1 for gpu in gpus if gpu.memory_bytes >= needs.gpu_memory_bytes)


def _lacks(needs: Needs, queue: str, told: Telemetry) -> list[str]:
    """What will never fit, as ends of a sentence about the peer; the most telling one first."""
    lacks = []
    if queue not in told.queues:
        serves = ", ".join(told.queues) or "no queue"
        lacks.append(f"does not serve the queue {queue!r} (it serves {serves})")
    for label, value in sorted(needs.labels.items()):
        if told.labels.get(label) != value:
            has = f"{label}={told.labels[label]}" if label in told.labels else "no such label"
            lacks.append(f"is not labelled {label}={value} (it has {has})")
    whole = [gpu for gpu in told.gpus if not gpu.mig_mode]
    if len(whole) < gpus_needed(needs):
        sliced = f" and {len(told.gpus) - len(whole)} in MIG mode" if len(whole) < len(told.gpus) else ""
        lacks.append(f"has {len(whole)} GPUs{sliced} where {gpus_needed(needs)} are needed")
    elif _large_enough(needs, whole) < gpus_needed(needs):
        lacks.append(f"has too few GPUs with {needs.gpu_memory_bytes / GIB:.1f} GiB of memory")
    if told.cpus < needs.cpus:
        lacks.append(f"has {told.cpus} CPUs where {needs.cpus} are needed")
    if told.memory_bytes < needs.memory_bytes:
        lacks.append(f"has {told.memory_bytes / GIB:.1f} GiB of memory where {needs.memory_bytes / GIB:.1f} GiB are needed")
    if told.slots_total < 1:
        lacks.append("has no slots")
    return lacks
