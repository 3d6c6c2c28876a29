"""All that the ledger core may ask its shell to do, and the messages that peers exchange about rows.

Effects are carried out in order. `Persist` precedes whatever depends on it: the shell commits before it sends, starts or
answers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from meshq.ids import Dot, Fence, PeerId, TaskId
from meshq.ledger.row import Row, Vector
from meshq.task import Claimed, Telemetry


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerView:
    """What the ledger must know of another peer (or of this one); made by the agent out of gossip."""

    peer: PeerId
    name: str
    alive: bool  # SWIM's alive or suspect
    left: bool = False
    changed_at: float = 0.0  # monotonic seconds when `alive` last changed, on this peer's clock
    telemetry: Telemetry = field(default_factory=Telemetry)


@dataclass(frozen=True, slots=True, kw_only=True)
class Push:
    """Rows that the sender wrote or must get acknowledged. `dots` are the sender's writes in them (R2)."""

    number: int  # names the push in its reply; unique at the sender in one run
    rows: tuple[Row, ...]
    dots: tuple[Dot, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PushReply:
    """The receiver merged and committed the push, except for the tasks in `refused` (it is full, or can't read them).

    `rows` are its own, where it knew more than the push.
    """

    number: int
    rows: tuple[Row, ...] = ()
    refused: tuple[TaskId, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncRequest:
    """Send me what I lack. `after` is the last task of the page before; `upto` the donor's vector on the first page."""

    vector: Vector
    after: TaskId | None = None
    upto: Vector | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncPage:
    """Rows in the order of their task ids. The receiver adopts `upto` and `floors` only after the last page (R3, R7)."""

    rows: tuple[Row, ...]
    upto: Vector
    floors: Vector
    last: bool
    requested: Vector  # echoes the request's vector


@dataclass(frozen=True, slots=True)
class Persist:
    """Commit these rows, vector entries and floors in one transaction. `durable`: fsync before going on."""

    rows: tuple[Row, ...]
    vector: Mapping[str, int]
    floors: Mapping[str, int]
    durable: bool


@dataclass(frozen=True, slots=True)
class SendPush:
    """Post the push to the peer; report with `handle_push_reply` or `handle_push_failed`."""

    peer: PeerId
    push: Push


@dataclass(frozen=True, slots=True)
class SendSync:
    """Post the request to the peer; report with `handle_sync_page` or `handle_sync_failed`."""

    peer: PeerId
    request: SyncRequest


@dataclass(frozen=True, slots=True)
class Prepare:
    """Fetch source and environment of this claim, now held; user code must not run yet."""

    claimed: Claimed


@dataclass(frozen=True, slots=True)
class Start:
    """`Started` is durable: run the user code of this claim."""

    fence: Fence


@dataclass(frozen=True, slots=True)
class Stop:
    """End what was prepared or runs under this claim; report its end with `handle_ended`."""

    fence: Fence
    reason: str  # "cancelled" or "superseded"


@dataclass(frozen=True, slots=True)
class RowChanged:
    """Something about the task changed: waiters and views may want to look."""

    task: TaskId


@dataclass(frozen=True, slots=True)
class EpochMinted:
    """Another peer has seen later writes of mine than I have: the database is older than it claims to be.

    The shell stores the new ledger epoch; all further writes use it.
    """

    ledger_epoch: int


Effect = Persist | SendPush | SendSync | Prepare | Start | Stop | RowChanged | EpochMinted
