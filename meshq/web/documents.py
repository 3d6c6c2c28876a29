"""The JSON documents of the contract (design section 9), as pure functions of rows and peers.

Times are ISO 8601 in UTC, unknown is null, peers appear by their names. Fields may be added, none renamed or removed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, assert_never

from meshq import codec
from meshq.gossip.connectivity import Connectivity
from meshq.gossip.member import Address, Liveness, Member
from meshq.ids import Dot, PeerId, split_fence
from meshq.ledger import holder
from meshq.ledger.catalog import Catalog
from meshq.ledger.row import Row
from meshq.ledger.settings import DELETED, NOTHING_SET, Settings, queues_with
from meshq.task import EndKind, Gpu, Outcome, Status, Telemetry

UNKNOWN_LINK: Final = Connectivity(udp=None, tcp=None, address=None, rtt=None, heard_seconds=None)
"""To a peer that this run has not met."""

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
    """One peer, as `status` shows it. `age` is None if it has published nothing yet, `connectivity` for this peer itself."""

    member: Member
    address: Address | None
    telemetry: Telemetry
    age: float | None
    connectivity: Connectivity | None = UNKNOWN_LINK


def peer_document(facts: PeerFacts) -> Document:
    member, telemetry = facts.member, facts.telemetry
    known = facts.age is not None
    address = (facts.connectivity.address if facts.connectivity is not None else None) or facts.address
    return {
        "id": member.peer,
        "name": member.name,
        "address": str(address) if address is not None else None,
        "liveness": member.liveness.name.lower(),
        "epoch": member.epoch,
        "incarnation": member.incarnation,
        "started_at": iso(member.started_at),
        "version": member.version,
        "labels": dict(telemetry.labels),
        "queues": list(telemetry.queues),
        "order": telemetry.order,
        "draining": telemetry.draining,
        "problem": telemetry.problem or None,
        "gpu_problem": telemetry.gpu_problem or None,
        "versions": {"meshq": member.version or None} | _or_null(codec.to_plain(telemetry.versions)),
        "environments": list(telemetry.environments),
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
        "connectivity": _connectivity_document(member.liveness, facts.connectivity) if facts.connectivity is not None else None,
    }


def _connectivity_document(liveness: Liveness, link: Connectivity) -> Document:
    """Whoever is dead, has left, or is only said to be alive is reached by nothing, whatever worked before."""
    gone = liveness in (Liveness.DEAD, Liveness.LEFT)
    transport = "udp" if link.udp else "tcp" if link.udp is False and link.tcp is not False else None
    return {
        "transport": None if gone or link.silent else transport,
        "udp": link.udp,
        "tcp": link.tcp,
        "rtt_ms": round(link.rtt * 1000, 3) if link.rtt is not None else None,
        "last_heard_seconds": round(link.heard_seconds, 3) if link.heard_seconds is not None else None,
        "silent": link.silent and not gone,
    }


def _gpu_document(gpu: Gpu) -> Document:
    document: Document = codec.to_plain(gpu)
    instances = [{"parent": gpu.index} | instance for instance in document["mig"]]
    return document | {"mig": instances, "problem": gpu.problem or None}


def _or_null(texts: Mapping[str, str]) -> Document:
    return {name: text or None for name, text in texts.items()}


def queue_documents(listed: Catalog, serving: Mapping[str, int], wall: float, said: Settings = NOTHING_SET) -> list[Document]:
    """One for each queue that a live peer serves (`serving`: how many), that has tasks, or that was created or paused.

    A queue that was deleted shows up again only while something waits or runs in it.
    """
    created, paused = queues_with(said, "created"), queues_with(said, "paused")
    counts: dict[str, Mapping[Status, int]] = {name: {} for name in serving}
    counts |= {name: {} for found in (created, paused) for name, by in found.items() if by != DELETED}
    kept = frozenset(counts)
    counts |= listed.counts()
    oldest = listed.oldest_queued()
    deleted = {name for name, by in created.items() if by == DELETED and name not in kept}
    shown = sorted(name for name in counts if name not in deleted or not all(status.final for status in counts[name]))
    return [
        _queue_document(name, counts[name], serving.get(name, 0), oldest.get(name), wall) | _pause(paused.get(name, DELETED))
        for name in shown
    ]


def _pause(by: str) -> Document:
    return {"paused": by != DELETED, "paused_by": by or None}


def _queue_document(name: str, counted: Mapping[Status, int], peers: int, oldest: float | None, wall: float) -> Document:
    running = (Status.CLAIMED, Status.PREPARING, Status.RUNNING)
    return {
        "name": name,
        "paused": False,  # see `_pause`
        "queued": counted.get(Status.QUEUED, 0) + counted.get(Status.WAITING, 0),
        "running": sum(counted.get(status, 0) for status in running),
        "succeeded": counted.get(Status.SUCCEEDED, 0),
        "failed": counted.get(Status.FAILED, 0),
        "cancelled": counted.get(Status.CANCELLED, 0),
        "peers": peers,
        "oldest_wait_seconds": round(max(0.0, wall - oldest), 3) if oldest is not None else None,
        "expected_wait_seconds": None,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """What stands for the whole task: the attempt that decided it, or has it now, and its times and code."""

    status: Status
    attempt: holder.AttemptView | None = None
    outcome: Outcome | None = None
    started_at: float | None = None
    ended_at: float | None = None
    exit_code: int | None = None


def story(row: Row) -> Story:
    """Read the row once for everything that a document says of the task as a whole."""
    reading = holder.read(row)
    status = reading.status
    views = {split_fence(view.fence)[1]: view for view in holder.attempts(row)}
    decisive = _decisive(reading, status)
    view = views.get(decisive) if decisive is not None else None
    outcome = reading.ended.get(decisive) if decisive is not None else None
    if not status.final:
        return Story(status=status, attempt=view, started_at=view.started_at if view is not None else None)
    ended_at = view.ended_at if view is not None else None
    if status is Status.CANCELLED and ended_at is None and reading.cancel is not None:
        ended_at = reading.cancel.at  # it never ran
    return Story(
        status=status,
        attempt=view,
        outcome=outcome,
        started_at=view.started_at if view is not None else None,
        ended_at=ended_at,
        exit_code=outcome.exit_code if outcome is not None else None,
    )


def _decisive(reading: holder.Reading, status: Status) -> Dot | None:
    """The claim of the attempt that stands for the task; None for one that waits, or was cancelled before it ran."""
    in_order = sorted(reading.claims, key=lambda dot: reading.claims[dot].attempt)
    last = {end.kind: dot for dot in in_order if (end := reading.ended.get(dot)) is not None}
    match status:
        case Status.SUCCEEDED:
            return reading.result[0] if reading.result is not None else None
        case Status.FAILED:
            return last.get(EndKind.FAILED) or (in_order[-1] if in_order else None)
        case Status.CANCELLED:
            return last.get(EndKind.CANCELLED)
        case Status.CLAIMED | Status.PREPARING | Status.RUNNING:
            return reading.holder or next((dot for dot in reading.live if dot in reading.started), None)
        case Status.QUEUED | Status.WAITING:
            return None
        case _:
            assert_never(status)


def task_summary(row: Row, names: Names, *, position: int | None, reason: str | None) -> Document:
    """One element of `tasks`: everything of `show` but `spec`, `parameters` and `outputs`."""
    return _summary(row, story(row), names, position, reason)


def _summary(row: Row, told: Story, names: Names, position: int | None, reason: str | None) -> Document:
    return {
        "id": row.task,
        "name": row.spec.name,
        "queue": row.queue.value,
        "status": told.status.value,
        "priority": row.priority.value,
        "position": position,
        "submitted_by": row.spec.submitted_by,
        "submitted_at": iso(row.spec.submitted_at),
        "started_at": iso(told.started_at),
        "ended_at": iso(told.ended_at),
        "exit_code": told.exit_code,
        "reason": reason,
        "retry_of": row.spec.retry_of,
        "attempts": [_attempt_document(attempt, names) for attempt in holder.attempts(row)],
    }


def task_document(row: Row, names: Names, *, position: int | None, reason: str | None) -> Document:
    """What `show` prints. Also an attempt that failed has outputs: a checkpoint is what one looks for then."""
    told = story(row)
    outputs = told.outcome.outputs if told.outcome is not None else ()
    spec: Document = codec.to_plain(row.spec) | {"submitted_at": iso(row.spec.submitted_at)}
    return _summary(row, told, names, position, reason) | {
        "spec": spec,
        "parameters": {},
        "outputs": [{"path": output.path, "bytes": output.bytes} for output in outputs],
        "outputs_total": told.outcome.outputs_total if told.outcome is not None else 0,
    }


def attempt_with_outputs(row: Row) -> holder.AttemptView | None:
    """The attempt whose outputs are the task's: the one that decided it, else the last one that started and ended."""
    told = story(row)
    if told.outcome is not None and told.attempt is not None:
        return told.attempt
    over = [view for view in holder.attempts(row) if view.started_at is not None and view.ended_at is not None]
    return over[-1] if over else None


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
    told = story(row)
    return {
        "id": row.task,
        "status": told.status.value,
        "final": told.status.final,
        "exit_code": told.exit_code,
        "timed_out": told.status is Status.FAILED and told.outcome is not None and told.outcome.timed_out,
        "reason": reason,
        "attempt": told.attempt.number if told.attempt is not None else None,
        "peer": names(told.attempt.peer) if told.attempt is not None else None,
    }
