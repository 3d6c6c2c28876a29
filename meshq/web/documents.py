"""The JSON documents of the contract (design section 9), as pure functions of rows and peers.

Times are ISO 8601 in UTC, unknown is null, peers appear by their names. Fields may be added, none renamed or removed.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from meshq import codec
from meshq.gossip.member import Address, Member
from meshq.ids import PeerId, split_fence
from meshq.ledger import holder
from meshq.ledger.row import Row
from meshq.task import Gpu, Status, Telemetry

Document = dict[str, Any]
Names = Callable[[PeerId], str]


def iso(seconds: float | None) -> str | None:
    """ISO 8601 in UTC with milliseconds; None also for a time that no calendar has: it comes from another machine's clock."""
    if not seconds:
        return None
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    except (ValueError, OverflowError, OSError):
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerFacts:
    """One peer, as `status` shows it. `age` is None if it has published nothing yet."""

    member: Member
    address: Address | None
    telemetry: Telemetry
    age: float | None


def peer_document(facts: PeerFacts) -> Document:
    member, telemetry = facts.member, facts.telemetry
    known = facts.age is not None
    return {
        "id": member.peer,
        "name": member.name,
        "address": str(facts.address) if facts.address is not None else None,
        "liveness": member.liveness.name.lower(),
        "epoch": member.epoch,
        "version": member.version,
        "labels": dict(telemetry.labels),
        "queues": list(telemetry.queues),
        "order": telemetry.order,
        "draining": telemetry.draining,
        "problem": telemetry.problem or None,
        "slots": {"total": telemetry.slots_total, "free": telemetry.slots_free} if known else {"total": None, "free": None},
        "cpus": telemetry.cpus if known else None,
        "memory_bytes": telemetry.memory_bytes if known else None,
        "gpus": [_gpu_document(gpu) for gpu in telemetry.gpus],
        "usage": {
            "cpu_percent": telemetry.cpu_percent,
            "memory_used_bytes": telemetry.memory_used_bytes,
            "load_1m": telemetry.load_1m,
            "disk_free_bytes": telemetry.disk_free_bytes,
            "disk_read_bps": telemetry.disk_read_bps,
            "disk_write_bps": telemetry.disk_write_bps,
            "net_rx_bps": telemetry.net_rx_bps,
            "net_tx_bps": telemetry.net_tx_bps,
        },
        "running": list(telemetry.running),
        "workers": [],
        "expected_free_at": None,
        "telemetry_age_seconds": round(facts.age, 3) if facts.age is not None else None,
    }


def _gpu_document(gpu: Gpu) -> Document:
    document: Document = codec.to_plain(gpu)
    return document


def queue_documents(rows: Iterable[tuple[Row, Status]], serving: Mapping[str, int], wall: float) -> list[Document]:
    """One for each queue that a live peer serves (`serving`: how many) or that has tasks."""
    counts: dict[str, dict[Status, int]] = {name: {} for name in serving}
    oldest: dict[str, float] = {}
    for row, status in rows:
        name = row.queue.value
        counted = counts.setdefault(name, {})
        counted[status] = counted.get(status, 0) + 1
        if status is Status.QUEUED:
            oldest[name] = min(oldest.get(name, wall), row.spec.submitted_at)
    return [_queue_document(name, counts[name], serving.get(name, 0), oldest.get(name), wall) for name in sorted(counts)]


def _queue_document(name: str, counted: Mapping[Status, int], peers: int, oldest: float | None, wall: float) -> Document:
    running = (Status.CLAIMED, Status.PREPARING, Status.RUNNING)
    return {
        "name": name,
        "paused": False,
        "queued": counted.get(Status.QUEUED, 0) + counted.get(Status.WAITING, 0),
        "running": sum(counted.get(status, 0) for status in running),
        "succeeded": counted.get(Status.SUCCEEDED, 0),
        "failed": counted.get(Status.FAILED, 0),
        "cancelled": counted.get(Status.CANCELLED, 0),
        "peers": peers,
        "oldest_wait_seconds": round(max(0.0, wall - oldest), 3) if oldest is not None else None,
        "expected_wait_seconds": None,
    }


def task_summary(row: Row, names: Names, *, position: int | None, reason: str | None) -> Document:
    """One element of `tasks`: everything of `show` but `spec`, `parameters` and `outputs`."""
    attempts = holder.attempts(row)
    status = holder.status(row)
    decided = decisive(row)
    started = [attempt.started_at for attempt in attempts if attempt.started_at]
    return {
        "id": row.task,
        "name": row.spec.name,
        "queue": row.queue.value,
        "status": status.value,
        "priority": row.priority.value,
        "position": position,
        "submitted_by": row.spec.submitted_by,
        "submitted_at": iso(row.spec.submitted_at),
        "started_at": iso(decided.started_at if decided else (started[-1] if started else None)),
        "ended_at": iso(decided.ended_at if decided and status.final else None),
        "exit_code": decided.exit_code if decided and status.final else None,
        "reason": reason,
        "retry_of": row.spec.retry_of,
        "attempts": [_attempt_document(attempt, names) for attempt in attempts],
    }


def task_document(row: Row, names: Names, *, position: int | None, reason: str | None) -> Document:
    """What `show` prints."""
    result = holder.result(row)
    outputs = result[1].outputs if result is not None else ()
    spec: Document = codec.to_plain(row.spec)
    return task_summary(row, names, position=position, reason=reason) | {
        "spec": spec,
        "parameters": {},
        "outputs": [{"path": output.path, "bytes": output.bytes} for output in outputs],
        "outputs_total": result[1].outputs_total if result is not None else 0,
    }


def decisive(row: Row) -> holder.AttemptView | None:
    """The attempt whose numbers are the task's: the result's, else the last one that failed, else the last one."""
    attempts = holder.attempts(row)
    result = holder.result(row)
    if result is not None:
        return next((each for each in attempts if split_fence(each.fence)[1] == result[0]), None)
    failed = [each for each in attempts if each.status == "failed"]
    return failed[-1] if failed else (attempts[-1] if attempts else None)


def _attempt_document(attempt: holder.AttemptView, names: Names) -> Document:
    return {
        "number": attempt.number,
        "fence": attempt.fence,
        "peer": names(attempt.peer),
        "status": attempt.status,
        "started_at": iso(attempt.started_at),
        "ended_at": iso(attempt.ended_at),
        "exit_code": attempt.exit_code,
        "reason": attempt.reason or None,
    }


def wait_document(row: Row, names: Names, reason: str | None) -> Document:
    """What a waiter needs: whether it is over, and with which code."""
    status = holder.status(row)
    decided = decisive(row)
    return {
        "id": row.task,
        "status": status.value,
        "final": status.final,
        "exit_code": decided.exit_code if decided and status.final else None,
        "timed_out": bool(decided and status is Status.FAILED and decided.timed_out),
        "reason": reason,
        "attempt": decided.number if decided else None,
        "peer": names(decided.peer) if decided else None,
    }
