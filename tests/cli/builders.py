"""Documents of the contract, of which a test states only what it cares about."""

from datetime import UTC, datetime, timedelta
from typing import Any, cast

from meshq.documents import (
    AttemptDocument,
    GpuDocument,
    PeerDocument,
    QueueDocument,
    StatusDocument,
    SubmittedDocument,
    TaskDocument,
    WaitDocument,
)

NOW = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)
TASK = "abcdefgh23456722"
OTHER = "abcdefgh23456733"
GIB = 2**30


def before(**ago: float) -> str:
    """The ISO text of a moment so long before NOW."""
    return (NOW - timedelta(**ago)).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def gpu(index: int = 0, **given: Any) -> GpuDocument:
    plain: dict[str, Any] = {
        "index": index, "uuid": f"GPU-{index}", "name": "RTX 4090", "memory_bytes": 24 * GIB, "memory_used_bytes": GIB,
        "utilization_percent": 0.0, "temperature_c": 40.0, "power_w": 30.0, "task": None, "foreign_pids": [],
    }  # fmt: skip
    return cast(GpuDocument, plain | given)


def peer(
    name: str, *, free: int = 1, slots: int = 1, cpu: float | None = 12.0, used: float | None = 3.1, **given: Any
) -> PeerDocument:
    plain: dict[str, Any] = {
        "id": name * 5, "name": name, "address": "192.168.1.5:7733", "liveness": "alive", "epoch": 1, "version": "0.1.0",
        "labels": {}, "queues": ["default"], "order": "strict", "draining": False, "problem": None,
        "slots": {"total": slots, "free": free}, "cpus": 16, "memory_bytes": round(15.6 * GIB), "gpus": [],
        "usage": {
            "cpu_percent": cpu, "memory_used_bytes": None if used is None else round(used * GIB), "load_1m": 0.5,
            "disk_free_bytes": 100 * GIB, "disk_read_bps": 0.0, "disk_write_bps": 0.0, "net_rx_bps": 0.0, "net_tx_bps": 0.0,
        },
        "running": [], "workers": [], "expected_free_at": None, "telemetry_age_seconds": 2.0,
    }  # fmt: skip
    return cast(PeerDocument, plain | given)


def queue(name: str, **given: Any) -> QueueDocument:
    plain: dict[str, Any] = {
        "name": name, "paused": False, "queued": 0, "running": 0, "succeeded": 0, "failed": 0, "cancelled": 0, "peers": 1,
        "oldest_wait_seconds": None, "expected_wait_seconds": None,
    }  # fmt: skip
    return cast(QueueDocument, plain | given)


def status(peers: list[PeerDocument], queues: list[QueueDocument]) -> StatusDocument:
    alive = sum(peer["liveness"] in ("alive", "suspect") for peer in peers)
    return {
        "mesh": {"id": "m" * 8, "name": "lab", "peers_alive": alive, "peers_known": len(peers)},
        "peers": peers,
        "queues": queues,
    }


def attempt(number: int, peer: str, status: str, **given: Any) -> AttemptDocument:
    plain: dict[str, Any] = {
        "number": number, "fence": f"{number}.{'p' * 26}.1.7", "peer": peer, "status": status, "started_at": before(minutes=5),
        "ended_at": None, "exit_code": None, "reason": None,
    }  # fmt: skip
    return cast(AttemptDocument, plain | given)


def task(name: str = "train", id: str = TASK, status: str = "running", **given: Any) -> TaskDocument:
    plain: dict[str, Any] = {
        "id": id, "name": name, "queue": "gpu", "status": status, "priority": 0, "position": None, "submitted_by": "ann@lab-1",
        "submitted_at": before(minutes=6), "started_at": None, "ended_at": None, "exit_code": None, "reason": None,
        "retry_of": None, "attempts": [], "parameters": {}, "outputs": [],
        "spec": {
            "argv": ["train.py", "--lr", "0.1"],
            "needs": {"cpus": 4, "memory_bytes": 16 * GIB, "gpus": 1, "labels": {"room": "b12"}},
            "environment": {"needs_python": True}, "retries": 0, "time_limit": None, "lease": None, "isolation": "continue",
        },
    }  # fmt: skip
    return cast(TaskDocument, plain | given)


def waited(status: str = "succeeded", exit_code: int | None = 0, **given: Any) -> WaitDocument:
    plain: dict[str, Any] = {
        "id": TASK, "status": status, "final": True, "exit_code": exit_code, "timed_out": False, "reason": None, "attempt": 1,
        "peer": "lab-2",
    }  # fmt: skip
    return cast(WaitDocument, plain | given)


def submitted(stored_on: list[str], **given: Any) -> SubmittedDocument:
    plain = {"ids": [TASK], "name": "train", "queue": "gpu", "stored_on": stored_on}
    return cast(SubmittedDocument, plain | given)
