"""What a task is: the one description that travels from `submit` to the peer that runs it.

It is written once, never changed, and content-addressed by its row. The ledger reads what placement needs (`Needs`), exec
reads the rest; neither imports the other, both import this. Append-only: new fields go to the end, with defaults.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar

from meshq.ids import Fence, ObjectId, PeerId, TaskId

QUEUE_DEFAULT = "default"
QUEUE_GPU = "gpu"
QUEUE_SERVICES = "services"


class Status(StrEnum):
    """What a task is doing: always derived from its row, never stored (contract)."""

    QUEUED = "queued"
    WAITING = "waiting"
    CLAIMED = "claimed"
    PREPARING = "preparing"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        return self in (Status.SUCCEEDED, Status.FAILED, Status.CANCELLED)


class Isolation(StrEnum):
    """What a running attempt does when its machine is cut off (P3)."""

    CONTINUE = "continue"
    STOP = "stop"


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a peer must have to run the task; `labels` must all be equal to the peer's."""

    cpus: int = 0
    memory_bytes: int = 0
    gpus: int = 0
    gpu_memory_bytes: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The submitted files. `commit` is None when there are none (`submit -- COMMAND`)."""

    commit: ObjectId | None = None
    folder: str = ""  # where inside the checkout the command starts; relative, without `..`


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What must be installed. `lock` holds resolved requirement lines; empty means the bare interpreter."""

    manager: str = "uv"
    python: str = ""  # "3.12"; empty: any interpreter that meshq supports
    lock: str = ""
    needs_python: bool = True  # False: a plain command; no virtual environment is made


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSpec:
    """A task as submitted. Times are wall-clock seconds and for display only."""

    name: str
    argv: tuple[str, ...]  # ("train.py", "--lr", "0.1") with needs_python, else a command
    submitted_by: str  # user@peer
    submitted_at: float
    submitted_peer: PeerId
    queue: str = QUEUE_DEFAULT
    priority: int = 0
    needs: Needs = field(default_factory=Needs)
    source: Source = field(default_factory=Source)
    environment: Environment = field(default_factory=Environment)
    env: Mapping[str, str] = field(default_factory=dict)
    retries: int = 0
    time_limit: float | None = None  # seconds of running
    lease: float | None = None  # seconds of grace after the runner died; None: the mesh's default
    isolation: str = Isolation.CONTINUE.value
    retry_of: TaskId | None = None
    request: str = ""  # a token of whoever submitted it: sent again, it is the same task


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFile:
    """One file below `$MESHQ_OUTPUT_DIR`, after the end."""

    path: str  # relative, with `/`, without `..`
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuProcess:
    """A process that has something on a GPU."""

    pid: int
    user: str | None = None  # None: not visible from where the agent runs
    task: str | None = None  # the task of this peer that it belongs to; None: it is foreign
    memory_bytes: int | None = None
    graphics: bool = False  # it only draws, as a desktop does: that keeps no task away


@dataclass(frozen=True, slots=True, kw_only=True)
class MigInstance:
    """A part of a GPU that is in MIG mode. CUDA knows it by its UUID alone."""

    uuid: str
    profile: str  # "1g.10gb"
    memory_bytes: int
    memory_used_bytes: int | None = None
    foreign_pids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU as NVML shows it; unknown numbers are None."""

    index: int
    uuid: str
    name: str
    memory_bytes: int
    memory_used_bytes: int | None = None
    utilization_percent: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    task: str | None = None  # the task that meshq gave it to
    foreign_pids: tuple[int, ...] = ()  # of those that compute and are of no task of this peer
    processes: tuple[GpuProcess, ...] = ()  # foreign ones first, then by memory
    mig: tuple[MigInstance, ...] = ()
    mig_mode: bool = False  # no task can have the whole of it, also where it has no instances
    problem: str = ""  # why it is given to nobody now, in words; empty: nothing is wrong with it


@dataclass(frozen=True, slots=True, kw_only=True)
class Versions:
    """What a peer runs on; empty: unknown, or there is none."""

    python: str = ""  # "3.11.2"
    kernel: str = ""  # "6.1.0-18-amd64"
    system: str = ""  # "debian 12"
    driver: str = ""  # of NVIDIA: "550.54.14"
    cuda: str = ""  # the newest that the driver can do: "12.4"
    docker: str = ""  # the server's


@dataclass(frozen=True, slots=True, kw_only=True)
class Telemetry:
    """What one peer publishes about itself: carried by gossip, read by placement and `status`.

    `record.pack` makes at most RECORD_BYTES_MAX bytes of it. Append-only. `running` holds the fences' task ids.
    """

    TAG: ClassVar[int] = 1

    queues: tuple[str, ...] = ()
    order: str = "strict"
    draining: bool = False
    slots_total: int = 1
    slots_free: int = 1
    cpus: int = 1
    cpus_free: int = 1
    memory_bytes: int = 0
    memory_free_bytes: int = 0  # not promised to tasks; what is in use is below
    gpus: tuple[Gpu, ...] = ()
    gpus_free: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    ledger_epoch: int = 0
    running: tuple[TaskId, ...] = ()
    cpu_percent: float | None = None
    memory_used_bytes: int | None = None
    load_1m: float | None = None
    disk_free_bytes: int | None = None
    disk_read_bps: float | None = None
    disk_write_bps: float | None = None
    net_rx_bps: float | None = None
    net_tx_bps: float | None = None
    problem: str = ""  # why this peer claims nothing, in words; empty: it claims
    keys: tuple[str, ...] = ()  # ids of the mesh keys that it has, the one in use first; empty: it can't change keys
    ring: str = ""  # a digest of its ring of keys: who shows another one has something to tell
    gpu_problem: str = ""  # what is wrong with the driver of the GPUs, in words; empty: nothing, or there are none
    versions: Versions = field(default_factory=Versions)
    environments: tuple[str, ...] = ()  # heads of the keys of cached environments, the one used last first
    wall: float = 0.0  # this peer's wall clock when it said all this, in seconds; 0: unknown. For display only
    damped: bool = False  # `problem` is no more than that it flaps: it counts as long as most others don't
    profile: str = ""  # of its gossip and leases; empty: it does not say


class EndKind(StrEnum):
    """How a claim ended, as its own peer reports it (design section 6); `lost` is also what others write."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"  # user code ended with another code than 0, or ran into its time limit
    CANCELLED = "cancelled"
    SUPERSEDED = "superseded"  # another claim holds the task, or a success was known already
    RELEASED = "released"  # this peer could not run it (environment, source, disk): somebody else may
    LOST = "lost"  # its process vanished: a reboot, a killed shim


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The end of one attempt, as exec reports it and the ledger records it. Wall-clock seconds are for display only."""

    kind: EndKind
    exit_code: int | None = None  # 0-255, signal n is 128+n; None if no user code ended
    reason: str = ""
    started_at: float | None = None
    ended_at: float = 0.0
    timed_out: bool = False
    outputs: tuple[OutputFile, ...] = ()  # the first OUTPUT_FILES_IN_ROW_MAX, by path
    outputs_total: int = 0
    blameless: bool = False  # says nothing about the task: its peer left, or nobody who has the source answered


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimed:
    """A claim that this peer won so far: what the ledger hands to exec."""

    task: TaskId
    fence: Fence
    attempt: int
    spec: TaskSpec
