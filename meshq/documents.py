"""The shapes of the JSON documents that agent and command line exchange (contract: more may be added, none renamed).

Times are ISO 8601 in UTC, sizes are bytes, ages and waits are seconds; what is unknown is None. The classes cost nothing
at run time: a document is a plain dict, as `json.loads` gives it.
"""

from typing import Final, NotRequired, TypedDict

STATUSES: Final = ("queued", "waiting", "claimed", "preparing", "running", "succeeded", "failed", "cancelled")
"""Of a task: `meshq.task.Status`, which takes longer to import than a command may."""

ACTIVE: Final = ("running", "preparing", "claimed")
"""Some machine works on it right now."""


class MeshDocument(TypedDict):
    id: str
    name: str
    peers_alive: int
    peers_known: int


class SlotsDocument(TypedDict):
    total: int | None
    free: int | None


class GpuDocument(TypedDict):
    index: int
    uuid: str
    name: str
    memory_bytes: int
    memory_used_bytes: int | None
    utilization_percent: float | None
    temperature_c: float | None
    power_w: float | None
    task: str | None
    foreign_pids: list[int]


class UsageDocument(TypedDict):
    cpu_percent: float | None
    memory_used_bytes: int | None
    load_1m: float | None
    disk_free_bytes: int | None
    disk_read_bps: float | None
    disk_write_bps: float | None
    net_rx_bps: float | None
    net_tx_bps: float | None


class PeerDocument(TypedDict):
    id: str
    name: str
    address: str | None
    liveness: str
    epoch: int
    version: str
    labels: dict[str, str]
    queues: list[str]
    order: str
    draining: bool
    problem: NotRequired[str | None]  # why it claims nothing, in words
    slots: SlotsDocument
    cpus: int | None
    memory_bytes: int | None
    gpus: list[GpuDocument]
    usage: UsageDocument
    running: list[str]
    workers: list[str]
    expected_free_at: str | None
    telemetry_age_seconds: float | None


class QueueDocument(TypedDict):
    name: str
    paused: bool
    queued: int
    running: int
    succeeded: int
    failed: int
    cancelled: int
    peers: int
    oldest_wait_seconds: float | None
    expected_wait_seconds: float | None


class StatusDocument(TypedDict):
    mesh: MeshDocument
    peers: list[PeerDocument]
    queues: list[QueueDocument]


class AttemptDocument(TypedDict):
    number: int
    fence: str
    peer: str
    status: str
    started_at: str | None
    ended_at: str | None
    exit_code: int | None
    reason: str | None


class OutputDocument(TypedDict):
    """One output file, as the row lists it."""

    path: str
    bytes: int


class NeedsDocument(TypedDict, total=False):
    cpus: int
    memory_bytes: int
    gpus: int
    gpu_memory_bytes: int
    labels: dict[str, str]


class EnvironmentDocument(TypedDict, total=False):
    needs_python: bool


class SpecDocument(TypedDict, total=False):
    """The parts of a task's spec that people look at; the whole of it is `codec.to_plain(TaskSpec)`."""

    argv: list[str]
    needs: NeedsDocument
    environment: EnvironmentDocument
    retries: int
    time_limit: float | None
    lease: float | None
    isolation: str


class TaskSummaryDocument(TypedDict):
    """An element of `tasks`."""

    id: str
    name: str
    queue: str
    status: str
    priority: int
    position: int | None
    submitted_by: str
    submitted_at: str
    started_at: str | None
    ended_at: str | None
    exit_code: int | None
    reason: str | None
    retry_of: str | None
    attempts: list[AttemptDocument]


class TaskDocument(TaskSummaryDocument):
    """What `show` says."""

    spec: SpecDocument
    parameters: dict[str, object]
    outputs: list[OutputDocument]
    outputs_total: NotRequired[int]  # the row lists the first 100 of them


class WaitDocument(TypedDict):
    """Where a task stands when a wait returns; `final` says whether it is over."""

    id: str
    status: str
    final: bool
    exit_code: int | None
    timed_out: bool
    reason: str | None
    attempt: int | None
    peer: str | None


class SubmittedDocument(TypedDict):
    ids: list[str]
    name: str
    queue: str
    stored_on: list[str]
    warnings: NotRequired[list[str]]


class FileDocument(TypedDict):
    """One output file with its digest, as it can be fetched."""

    path: str
    bytes: int
    sha256: str


class OutputsDocument(TypedDict):
    fence: str
    files: list[FileDocument]
    skipped: NotRequired[int]  # files that were too many or too big to keep


class MeDocument(TypedDict):
    """The agent of this home. `mesh` has `id` and `name`."""

    id: str
    name: str
    mesh: dict[str, str]
    version: str
    pid: int
    home: str
    port: int
    addresses: list[str]
    queues: list[str]
    peers_alive: int


class CheckDocument(TypedDict):
    name: str
    ok: bool
    detail: str


class DoctorDocument(TypedDict):
    checks: list[CheckDocument]
    counters: dict[str, int]
