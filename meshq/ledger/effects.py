"""All that the ledger core may ask its shell to do, and the messages that peers exchange about rows.

Effects are carried out in order. `Persist` precedes whatever depends on it: the shell commits before it sends, starts or
answers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from meshq.ids import Dot, Fence, PeerId, TaskId
from meshq.ledger.row import Row, Vector
from meshq.ledger.settings import NOTHING_SET, Settings
from meshq.task import Claimed, Telemetry


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerView:
    """What the ledger must know of another peer (or of this one); made by the agent out of gossip."""

    peer: PeerId
    name: str
    alive: bool  # SWIM's alive or suspect
    left: bool = False
    changed_at: float = 0.0  # monotonic seconds when `alive` last changed, on this peer's clock
    told: bool = True  # False: it has said nothing yet, and `telemetry` is made of defaults
    telemetry: Telemetry = field(default_factory=Telemetry)


@dataclass(frozen=True, slots=True, kw_only=True)
class Push:
    """Rows that the sender wrote or must get acknowledged. `dots` are the sender's writes in them (R2), and in `settings`."""

    number: int  # names the push in its reply; unique at the sender in one run
    rows: tuple[Row, ...]
    dots: tuple[Dot, ...]
    settings: Settings | None = None  # None: the sender has not just changed them


@dataclass(frozen=True, slots=True, kw_only=True)
class PushReply:
    """The receiver merged and committed the push, except for the tasks in `refused` (it is full, or can't read them).

    `rows` are its own, where it knew more than the push. `purged`: these tasks were over and are forgotten (R4).
    """

    number: int
    rows: tuple[Row, ...] = ()
    refused: tuple[TaskId, ...] = ()
    purged: tuple[TaskId, ...] = ()


# What a peer asks another one for the rows that it lacks, and what it is answered (`antientropy.py` asks, `donor.py` answers).
# `number` names the question at its asker, `run` the life of the donor's process: what it said in another one counts no more.


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncOpen:
    """What do you know that I don't? `buckets` are the hashes of the parts of my vector."""

    TAG: ClassVar[int] = 1
    number: int
    buckets: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncPull:
    """Send the rows with a write that this vector does not cover, of its actors only (R3). `at`: so many were sent already."""

    TAG: ClassVar[int] = 2
    number: int
    run: int
    vector: Vector
    at: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncCompare:
    """Compare all rows by ranges of their ids (`reconcile.py`). All fields may be empty.

    `root`: is the print of everything this? `prefixes`: of which parts do these ranges consist? `wanted`: of the rows in the
    range the ones with these first bytes of their hashes. `tasks`: send the rows of these, or say that they are absent.
    """

    TAG: ClassVar[int] = 3
    number: int
    run: int
    root: bytes = b""
    prefixes: tuple[str, ...] = ()
    wanted: tuple[tuple[str, bytes], ...] = ()
    tasks: tuple[TaskId, ...] = ()


Question = SyncOpen | SyncPull | SyncCompare


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncOffer:
    """The donor's vector and floors in the `parts` where the hashes differ; the settings if one of these actors wrote any."""

    TAG: ClassVar[int] = 1
    number: int
    run: int
    parts: tuple[int, ...] = ()
    vector: Vector = field(default_factory=dict)
    floors: Vector = field(default_factory=dict)
    settings: Settings | None = None
    yours: Vector = field(default_factory=dict)  # the asker's last writes that are in a row here, beyond the donor's vector


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncPage:
    """Rows as they stand on the wire, one by one. `at` goes into the next question, unless this was the `last` page.

    `below`: the donor has purged what the asker may lack, so a pull is not enough (R6).
    """

    TAG: ClassVar[int] = 2
    number: int
    rows: tuple[bytes, ...] = ()
    at: int = 0
    last: bool = True
    floors: Vector = field(default_factory=dict)
    below: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncRanges:
    """The answers to a `SyncCompare`, as far as one message holds them: to the first of its prefixes, wants and tasks.

    `ranges`: for each prefix whether it is a leaf, and the prints of its parts or the first bytes of its rows' hashes. `stale`:
    ranges in which a wanted row is not found any more. `floors`: all of them, for who asked for nothing else, and with `equal`.
    """

    TAG: ClassVar[int] = 3
    number: int
    equal: bool = False
    ranges: tuple[tuple[bool, bytes], ...] = ()
    rows: tuple[bytes, ...] = ()
    wants_served: int = 0
    tasks_served: int = 0
    stale: tuple[str, ...] = ()
    absent: tuple[TaskId, ...] = ()
    floors: Vector = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncBusy:
    """Too many peers are being served: ask another one, or later."""

    TAG: ClassVar[int] = 4
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncOver:
    """What was agreed on is forgotten (the donor was restarted, or the asker took too long): begin anew."""

    TAG: ClassVar[int] = 5
    number: int


Answer = SyncOffer | SyncPage | SyncRanges | SyncBusy | SyncOver


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """A voter's vote: as long as the grant lasts, no other claim of the task may have it (`grants.py`)."""

    fence: Fence  # of the claim that has it
    seconds: float  # how long it lasts after each renewal


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """Vote for this claim of the task, or renew the grant that it has."""

    task: TaskId
    fence: Fence


@dataclass(frozen=True, slots=True, kw_only=True)
class GrantRequest:
    """All that one peer asks of one voter. `seconds`: how long the sender will rely on a grant, counted from sending."""

    number: int  # names the request in its reply; unique at the sender in one run
    seconds: float
    asks: tuple[Ask, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GrantReply:
    """What a voter says to each ask. `waits`: ask again after so many seconds. The refused can never have its vote."""

    number: int
    granted: tuple[Fence, ...] = ()
    refused: tuple[Fence, ...] = ()
    waits: Mapping[Fence, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """All that is in memory, to be written into a new database: the one on disk is damaged. Rows as on the wire."""

    ledger_epoch: int
    packed: Mapping[TaskId, bytes] = field(default_factory=dict)
    vector: Mapping[str, int] = field(default_factory=dict)
    floors: Mapping[str, int] = field(default_factory=dict)
    settings: Settings = NOTHING_SET
    grants: Mapping[TaskId, Grant] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Persist:
    """Commit these rows, vector entries and floors in one transaction. `durable`: fsync before going on."""

    rows: tuple[Row, ...]
    vector: Mapping[str, int]
    floors: Mapping[str, int]
    durable: bool
    settings: Settings | None = None  # the whole map, if it has changed
    grants: Mapping[TaskId, Grant | None] = field(default_factory=dict)  # votes given; None: forget it
    purged: tuple[TaskId, ...] = ()  # rows to be deleted, after `rows` are written


@dataclass(frozen=True, slots=True)
class SendPush:
    """Post the push to the peer; report with `handle_push_reply` or `handle_push_failed`."""

    peer: PeerId
    push: Push


@dataclass(frozen=True, slots=True)
class SendSync:
    """Post the question to the peer; report its answer with `handle_sync_rows` (in parts that don't take long) and then
    `handle_sync_answer`, or `handle_sync_failed`."""

    peer: PeerId
    question: Question


@dataclass(frozen=True, slots=True)
class SendGrants:
    """Post the request to the voter; report with `handle_grant_reply` or `handle_grants_failed`."""

    peer: PeerId
    request: GrantRequest


@dataclass(frozen=True, slots=True)
class Keep:
    """What runs, or is about to start, under this claim must be dead by `until` unless a later `Keep` says otherwise.

    On the core's clock. Whoever supervises it must see to that alone: this process may be stopped or gone by then.
    """

    fence: Fence
    until: float


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
    reason: str  # "cancelled", "superseded", "released" or "leaving"


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


Effect = Persist | SendPush | SendSync | SendGrants | Keep | Prepare | Start | Stop | RowChanged | EpochMinted
