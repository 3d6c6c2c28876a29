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


class GpuProcessDocument(TypedDict):
    """`user` is None if the process is not visible; `task` is None if it is foreign; `graphics`: it only draws."""

    pid: int
    user: str | None
    task: str | None
    memory_bytes: int | None
    graphics: bool


class MigDocument(TypedDict):
    """An instance of a GPU in MIG mode. `parent` is the index of that GPU."""

    parent: int
    uuid: str
    profile: str
    memory_bytes: int
    memory_used_bytes: int | None
    foreign_pids: list[int]


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
    processes: NotRequired[list[GpuProcessDocument]]
    mig_mode: NotRequired[bool]
    mig: NotRequired[list[MigDocument]]
    problem: NotRequired[str | None]  # why no task gets it, in words


class VersionsDocument(TypedDict):
    meshq: str | None
    python: str | None
    kernel: str | None
    system: str | None
    driver: str | None  # of NVIDIA
    cuda: str | None  # the newest that this driver can do
    docker: str | None  # the server's


class UsageDocument(TypedDict):
    cpu_percent: float | None
    memory_used_bytes: int | None
    load_1m: float | None
    disk_free_bytes: int | None
    disk_read_bps: float | None
    disk_write_bps: float | None
    net_rx_bps: float | None
    net_tx_bps: float | None


class ConnectivityDocument(TypedDict):
    """How the answering peer reaches another one. `transport` is `udp`, `tcp` (for UDP does not get through), or None.

    `silent`: it is held alive, by the word of others, and nothing of it came here for long.
    """

    transport: str | None
    udp: bool | None
    tcp: bool | None
    rtt_ms: float | None
    last_heard_seconds: float | None
    silent: NotRequired[bool]


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
    gpu_problem: NotRequired[str | None]  # what is wrong with the driver of its GPUs, in words
    versions: NotRequired[VersionsDocument]
    environments: NotRequired[list[str]]  # heads of the keys of those that it has cached, the one used last first
    slots: SlotsDocument
    cpus: int | None
    memory_bytes: int | None
    gpus: list[GpuDocument]
    usage: UsageDocument
    running: list[str]
    workers: list[str]
    expected_free_at: str | None
    telemetry_age_seconds: float | None
    incarnation: NotRequired[int]
    started_at: NotRequired[str | None]  # on its own clock
    connectivity: NotRequired[ConnectivityDocument | None]  # None: the answering peer itself


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
    paused_by: NotRequired[str | None]  # user@machine


class ClearedDocument(TypedDict):
    name: str
    cancelled: int


class RetentionDocument(TypedDict):
    """For how long, and how many of, the tasks that are over are kept."""

    days: float
    tasks: int


class DeletedDocument(TypedDict):
    name: str
    deleted: bool


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


class QueueDetailsDocument(QueueDocument):
    """What `queue show` says. `waiting` are the tasks that are next, in running order."""

    served_by: list[str]
    waiting: list[TaskSummaryDocument]


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


class WithoutCopyDocument(TypedDict):
    """A machine that is alive and did not take a copy of a task."""

    name: str
    reason: str


class SubmittedDocument(TypedDict):
    ids: list[str]
    name: str
    queue: str
    stored_on: list[str]
    not_stored_on: NotRequired[list[WithoutCopyDocument]]
    copies: NotRequired[int]  # on other machines, that were asked for
    voters: NotRequired[list[str]]
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
    fix: NotRequired[str | None]  # what to do; None if there is nothing to do


class DoctorDocument(TypedDict):
    checks: list[CheckDocument]
    counters: dict[str, int]


class KeyDocument(TypedDict):
    """One key of the mesh, by its public id, and the live machines that have it, use it, or lack it. `off`: known machines
    that are not there now, and are not known to have it."""

    id: str
    in_use: bool
    peers: list[str]
    used_by: list[str]
    lacking: list[str]
    off: NotRequired[list[str]]


class KeysDocument(TypedDict):
    """`removed`: the ids of keys that are never accepted again."""

    keys: list[KeyDocument]
    removed: list[str]


class KeyFailureDocument(TypedDict):
    name: str
    reason: str


class KeyStepDocument(TypedDict):
    """What became of one step of a change of keys, and at which machines; `failed` ones hear of it later."""

    id: str
    peers: list[str]
    failed: list[KeyFailureDocument]
    later: NotRequired[list[str]]  # are off, and get the key when they come back
    left_out: NotRequired[list[str]]  # get it by hand only
    stranded: NotRequired[list[str]]  # are off, and have no key that is still accepted, as far as is known
