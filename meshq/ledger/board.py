"""What the rows mean for scheduling: who waits where, which claims of others are live, when whose lease is over.

Everything here is a function of the rows, of what gossip says, and of when this peer first saw what; the core calls `index` for
each row that changed and asks. Nothing here writes.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

from meshq.ids import Dot, PeerId, TaskId, actor_ledger_epoch
from meshq.ledger import holder as rules
from meshq.ledger.claiming import Candidate, Deal
from meshq.ledger.holder import Reading, read
from meshq.ledger.placement import Capacity, eligible, fits_now, free_capacity, why_not
from meshq.ledger.queues import Queues
from meshq.ledger.rendezvous import mourners
from meshq.ledger.row import Back, Lost, Row
from meshq.ledger.sessions import Sessions
from meshq.ledger.timing import LedgerConfig
from meshq.task import EndKind, Status, Telemetry

if TYPE_CHECKING:
    from random import Random

POSITION_STEP = 2**20  # room to move a task between two others twenty times over
SENTENCES_MAX = 5  # of a waiting reason; `submit` lists every peer


@dataclass(frozen=True, slots=True)
class Wait:
    """Since when a task waits for this attempt, as this peer saw it."""

    attempt: int
    since: float
    not_before: float
    jitter: float


@dataclass(frozen=True, slots=True)
class Mourning:
    """A claim whose lease is over, and when it is this peer's turn to say so."""

    due: float
    task: TaskId
    dot: Dot
    reason: str


@dataclass(frozen=True, slots=True)
class Revival:
    """How often a claim was taken back, and when this peer saw it last."""

    backs: int
    at: float


NEVER_REVIVED = Revival(0, -inf)


class Board:
    def __init__(self, me: PeerId, config: LedgerConfig, rng: "Random", sessions: Sessions) -> None:
        self._me = me
        self._config = config
        self._rng = rng
        self._sessions = sessions
        self._readings: dict[TaskId, Reading] = {}  # of all tasks that are not over
        self._queues = Queues()
        self._waits: dict[TaskId, Wait] = {}
        self._foreign: dict[PeerId, dict[Dot, TaskId]] = {}  # live claims of other peers
        self._revived: dict[Dot, Revival] = {}  # of live claims that had been lost and were taken back
        self._last_position: dict[str, int] = {}
        self._mournings: list[Mourning] | None = None  # sorted; None: to be made anew

    def index(self, now: float, row: Row) -> Reading:
        """The row is new or has changed."""
        task, reading = row.task, read(row)
        before = self._readings.pop(task, None)
        if not over(reading):
            self._readings[task] = reading
        self._index_claims(now, task, before, reading)
        queue = row.queue.value
        self._last_position[queue] = max(self._last_position.get(queue, 0), row.position.value)
        attempt = reading.next_attempt if reading.status is Status.QUEUED else None
        if attempt is None:
            self._queues.remove(task)
            self._waits.pop(task, None)
            return reading
        self._queues.put(task, row)
        if task not in self._waits or self._waits[task].attempt != attempt:
            pause = self._backoff(reading.setbacks)
            self._waits[task] = Wait(attempt, now, now + pause, self._rng.uniform(0, self._config.claim_jitter))
        return reading

    def _index_claims(self, now: float, task: TaskId, before: Reading | None, reading: Reading) -> None:
        for dot, claim in before.live.items() if before is not None else ():
            self._foreign.get(claim.peer, {}).pop(dot, None)
        for dot, claim in reading.live.items():
            if claim.peer != self._me:
                self._foreign.setdefault(claim.peer, {})[dot] = task
        backs = Counter(fact.claim for _, fact in reading.row.facts if isinstance(fact, Back))
        for dot, count in backs.items():  # counted in the row: this peer need not have seen that the claim was lost
            if count > self._revived.get(dot, NEVER_REVIVED).backs:
                self._revived[dot] = Revival(count, now)
        for dot in reading.ended:
            self._revived.pop(dot, None)
        self._mournings = None

    def _backoff(self, setbacks: int) -> float:
        """Nothing after the first setback, which is mostly a machine's end; then 1, 2, 4 ... seconds."""
        return 0.0 if setbacks < 2 else min(self._config.backoff_max, 2.0 ** min(setbacks - 2, 30))

    # ---- tasks

    def __len__(self) -> int:
        """How many tasks are not over."""
        return len(self._readings)

    def reading(self, row: Row) -> Reading:
        """The row, read; remembered while the task is not over."""
        remembered = self._readings.get(row.task)
        return remembered if remembered is not None and remembered.row is row else read(row)

    def next_position(self, queue: str) -> int:
        """Behind all that this peer has ever seen in the queue: a Lamport clock, so the order is that of what people saw."""
        return self._last_position.get(queue, 0) + POSITION_STEP

    def position(self, task: TaskId) -> int | None:
        return self._queues.position(task)

    @property
    def anybody_waits(self) -> bool:
        return len(self._queues) > 0

    def candidates(self, deal: Deal, mine: Telemetry, turn: int) -> Iterator[Candidate]:
        """The waiting tasks in the order in which this peer serves its queues; `turn`: which is first if they take turns."""
        queues = [self._queues.in_order(queue, deal.wanted(queue)) for queue in mine.queues]
        if mine.order == "fair" and queues:
            first = turn % len(queues)
            queues = queues[first:] + queues[:first]
        for task in _take_turns(queues) if mine.order == "fair" else _one_after_another(queues):
            reading, wait = self._readings[task], self._waits[task]
            released = [dot for dot, end in reading.ended.items() if end.kind is EndKind.RELEASED]
            yield Candidate(
                row=reading.row,
                attempt=wait.attempt,
                since=wait.since,
                not_before=wait.not_before,
                jitter=wait.jitter,
                released_by=tuple(reading.claims[dot].peer for dot in released),
            )

    def free_of(self, peer: PeerId, mine: Iterable[Row] = ()) -> Capacity:
        """What the peer says is free, less what its claims will take that it does not count yet. `mine`: this peer's claims."""
        told = self._sessions.views[peer].telemetry
        free = free_capacity(told)
        claimed = (self._readings[task].row for task in self._foreign.get(peer, {}).values())
        for row in mine if peer == self._me else claimed:
            if row.task not in told.running:
                free = free.minus(row.spec.needs)
        return free

    def waiting_reason(self, now: float, row: Row, mine: Iterable[Row]) -> str:
        """Why the task is where it is, for people. `mine`: the rows of this peer's claims."""
        wait = self._waits.get(row.task)
        if wait is None:
            return rules.reason(row)
        if wait.not_before > now:
            return f"is tried again in {wait.not_before - now:.0f} s: attempt {wait.attempt - 1} did not succeed"
        needs, queue, views = row.spec.needs, row.queue.value, self._sessions.views
        able = [view for view in views.values() if eligible(needs, queue, view)]
        if not able:
            sentences = [sentence for view in views.values() if (sentence := why_not(needs, queue, view))]
            more = [f"and {len(sentences) - SENTENCES_MAX} more"] if len(sentences) > SENTENCES_MAX else []
            return "no peer can take it now: " + "; ".join(sentences[:SENTENCES_MAX] + more)
        if any(fits_now(needs, view.telemetry, self.free_of(view.peer, mine)) for view in able):
            return "is about to be claimed"
        names = ", ".join(view.name for view in able[:SENTENCES_MAX])
        return f"waits until one of {len(able)} peers that can run it has room ({names})"

    # ---- leases of others

    def peers_changed(self) -> None:
        self._mournings = None

    def mournings(self) -> Sequence[Mourning]:
        """The claims whose lease is over or will be unless their peer comes back, in the order in which they are due."""
        if self._mournings is None:
            claims = [(task, dot) for claims in self._foreign.values() for dot, task in claims.items()]
            found = [mourning for task, dot in claims if (mourning := self._mourning(task, dot)) is not None]
            self._mournings = sorted(found, key=lambda mourning: (mourning.due, mourning.dot))
        return self._mournings

    def _mourning(self, task: TaskId, dot: Dot) -> Mourning | None:
        reading = self._readings[task]
        row, claim = reading.row, reading.claims[dot]
        end = self._sessions.lease_end(claim.peer, _latest_epoch(row, dot), row.spec.lease)
        if end is None:
            return None
        # Its peer has just taken it back and is still held dead: gossip is slower than a push, and must be given its time.
        since = max(end.at, self._revived.get(dot, NEVER_REVIVED).at + self._config.grace)
        others = [peer for peer in self._sessions.alive if peer != claim.peer]
        rank = mourners(task, dot, (self._me, *others)).index(self._me)
        return Mourning(since + rank * self._config.lost_slot, task, dot, end.reason)

    def check(self, rows: Iterable[Row]) -> None:
        for row in rows:
            reading, task = read(row), row.task
            queued = reading.status is Status.QUEUED and reading.next_attempt is not None
            assert (task in self._queues) == queued == (task in self._waits), f"{task} waits wrongly"
            assert self._readings.get(task) == (None if over(reading) else reading), f"{task} is remembered wrongly"
            for dot, claim in reading.live.items():
                assert claim.peer == self._me or self._foreign[claim.peer][dot] == task, (
                    f"a live claim of {task} is not watched"
                )


def over(reading: Reading) -> bool:
    """Whether nothing more can happen to the task but what its claims' own peers still report."""
    return reading.status.final and not reading.live


def _latest_epoch(row: Row, claim: Dot) -> int:
    """The latest ledger epoch in which the claim's own peer spoke of it: a `Back` after a lost disk renews the lease."""
    own = [
        dot.actor
        for dot, fact in row.facts
        if dot == claim or (getattr(fact, "claim", None) == claim and not isinstance(fact, Lost))
    ]
    return max(actor_ledger_epoch(actor) for actor in own)


def _one_after_another(queues: Sequence[Iterator[TaskId]]) -> Iterator[TaskId]:
    for queue in queues:
        yield from queue


def _take_turns(queues: Sequence[Iterator[TaskId]]) -> Iterator[TaskId]:
    """One task of each queue in turn, as long as there are any."""
    left = list(queues)
    while left:
        for queue in list(left):
            task = next(queue, None)
            if task is None:
                left.remove(queue)
            else:
                yield task
