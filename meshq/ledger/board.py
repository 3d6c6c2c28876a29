"""What the rows mean for scheduling: who waits where, which claims of others are live, when whose lease is over.

Everything here is a function of the rows, of what gossip says, and of when this peer first saw what; the core calls `index` for
each row that changed and asks. Nothing here writes.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf

from meshq.ids import ActorId, Dot, PeerId, TaskId, actor_ledger_epoch
from meshq.ledger import holder as rules
from meshq.ledger.claiming import Candidate, Deal
from meshq.ledger.holder import Reading, read
from meshq.ledger.moves import POSITION_STEP, Place, new_seats
from meshq.ledger.placement import Capacity, eligible, fits_now, free_capacity, why_not
from meshq.ledger.queues import Queues
from meshq.ledger.rendezvous import mourners
from meshq.ledger.replica import fullness
from meshq.ledger.row import REGISTER_MAX, Back, Lost, Row, Seat
from meshq.ledger.sessions import Sessions, majority
from meshq.ledger.timing import LedgerConfig
from meshq.task import EndKind, Needs, Status, Telemetry

Taken = tuple[TaskId, Needs]
"""A claimed task, and what it takes of its peer."""

SENTENCES_MAX = 5  # of a waiting reason; `submit` lists every peer


@dataclass(frozen=True, slots=True)
class Wait:
    """Since when a task waits in this queue for this attempt, as this peer saw it, and until when it must."""

    queue: str
    attempt: int
    since: float
    not_before: float


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
    def __init__(self, me: PeerId, config: LedgerConfig, sessions: Sessions) -> None:
        self._me = me
        self._config = config
        self._sessions = sessions
        self._readings: dict[TaskId, Reading] = {}  # of all tasks that are not over and have facts
        self._queues = Queues()
        self._waits: dict[TaskId, Wait] = {}  # of the waiting ones among these
        self._voters: dict[TaskId, tuple[ActorId, ...]] = {}  # of waiting tasks that have some
        self._free: dict[PeerId, Capacity] = {}  # of others, until their claims or their telemetry change
        self._foreign: dict[PeerId, dict[Dot, TaskId]] = {}  # live claims of other peers
        self._revived: dict[Dot, Revival] = {}  # of live claims that had been lost and were taken back
        self._last_position: dict[str, int] = {}
        self._mournings: list[Mourning] | None = None  # sorted; None: to be made anew
        self._claimed_here: dict[TaskId, None] | None = {}  # tasks that this peer has ever claimed, until somebody takes them
        self._paused: Mapping[str, str] = {}  # queues that nobody bids for, and who paused them
        self._resumed_at: dict[str, float] = {}  # queues that had been paused

    def index(self, now: float, row: Row) -> Reading:
        """The row is new or has changed."""
        task, reading = row.task, read(row)
        before = self._readings.pop(task, None)
        if row.facts and not over(reading):
            self._readings[task] = reading
        if row.facts or before is not None:
            self._index_claims(now, task, before, reading)
            if self._claimed_here is not None and any(claim.peer == self._me for claim in reading.claims.values()):
                self._claimed_here[task] = None
        queue = row.queue.value
        self._last_position[queue] = max(self._last_position.get(queue, 0), row.position.value)
        attempt = 1 if not row.facts else reading.next_attempt if reading.status is Status.QUEUED else None
        if attempt is None:
            self._queues.remove(task)
            self._waits.pop(task, None)
            self._voters.pop(task, None)
        else:
            self._queues.put(task, row, now)
            if row.voters:
                self._voters[task] = row.voters
            if row.facts:
                self._index_wait(now, task, attempt, reading)
        return reading

    def _index_wait(self, now: float, task: TaskId, attempt: int, reading: Reading) -> None:
        """Of a task without facts, which are nearly all that wait, the queue knows enough."""
        wait, queue = self._waits.get(task), reading.row.queue.value
        if wait is None or (wait.queue, wait.attempt) != (queue, attempt):
            since = self._queues.since(task) if wait is None and attempt == 1 else now
            self._waits[task] = Wait(queue, attempt, since, since + self._backoff(reading))

    def forget(self, row: Row) -> None:
        """The row was purged."""
        task = row.task
        for dot, _ in row.facts:
            self._revived.pop(dot, None)
        before = self._readings.pop(task, None)
        if before is not None:
            self._unwatch(before)
        self._queues.remove(task)
        self._waits.pop(task, None)
        self._voters.pop(task, None)
        if self._claimed_here is not None:
            self._claimed_here.pop(task, None)

    def take_claimed_here(self) -> Iterable[TaskId]:
        """Once, at the start: the tasks that this peer has claimed in earlier runs, whatever became of them."""
        taken, self._claimed_here = self._claimed_here, None
        return taken or ()

    def pause(self, now: float, paused: Mapping[str, str]) -> None:
        """These queues are paused, and no others. Whoever resumes one lets its tasks wait anew: not all may bid at once."""
        self._resumed_at |= {queue: now for queue in self._paused if queue not in paused}
        self._paused = paused

    def _index_claims(self, now: float, task: TaskId, before: Reading | None, reading: Reading) -> None:
        if before is not None:
            self._unwatch(before)
        foreign = {dot: claim for dot, claim in reading.live.items() if claim.peer != self._me}
        for dot, claim in foreign.items():
            self._foreign.setdefault(claim.peer, {})[dot] = task
        backs = Counter(fact.claim for _, fact in reading.row.facts if isinstance(fact, Back))
        for dot, count in backs.items():  # counted in the row: this peer need not have seen that the claim was lost
            if count > self._revived.get(dot, NEVER_REVIVED).backs:
                self._revived[dot] = Revival(count, now)
        for dot in reading.ended:
            self._revived.pop(dot, None)
        if foreign:
            self._mournings, self._free = None, {}

    def _unwatch(self, before: Reading) -> None:
        """What this row said of others' claims holds no more."""
        for dot, claim in before.live.items():
            if self._foreign.get(claim.peer, {}).pop(dot, None) is not None:
                self._mournings, self._free = None, {}

    def _backoff(self, reading: Reading) -> float:
        """Nothing after the first setback, which is mostly a machine's end; then 1, 2, 4 ... seconds.

        It doubles with each quarter of the row that is filled: a source that is off for a weekend must find its tasks waiting.
        """
        if reading.setbacks < 2:
            return 0.0
        pause = min(self._config.backoff_max, 2.0 ** min(reading.setbacks - 2, 30))
        return pause * 2.0 ** min(3, int(4 * fullness(reading.row)))

    # ---- tasks

    def __len__(self) -> int:
        """How many tasks are not over."""
        return len(self._readings) + len(self._queues) - len(self._waits)

    def reading(self, row: Row) -> Reading:
        """The row, read; remembered while the task is not over. A row that was packed meanwhile is another object."""
        remembered = self._readings.get(row.task)
        same = remembered is not None and (remembered.row is row or remembered.row.vector == row.vector)
        return remembered if remembered is not None and same else read(row)

    def next_position(self, queue: str) -> int:
        """Behind all that this peer has ever seen in the queue: a Lamport clock, so the order is that of what people saw."""
        return min(REGISTER_MAX, self._last_position.get(queue, 0) + POSITION_STEP)

    def position(self, task: TaskId) -> int | None:
        return self._queues.position(task)

    def waiting_in(self, queue: str) -> Iterator[TaskId]:
        """In running order."""
        return self._queues.in_order(queue, lambda needs: True)

    def waits(self, task: TaskId) -> bool:
        """Whether it could be claimed, if not now then later."""
        return task in self._queues

    def new_seats(self, row: Row, place: Place, row_of: Callable[[TaskId], Row]) -> dict[TaskId, Seat]:
        """What is to be written for this move of a waiting task. TaskFailed if there is no room for it."""
        return new_seats(row, place, self._queues, row_of, self.next_position)

    @property
    def anybody_waits(self) -> bool:
        return len(self._queues) > 0

    def candidates(self, deal: Deal, mine: Telemetry, turn: int) -> Iterator[Candidate]:
        """The waiting tasks in the order in which this peer serves its queues; `turn`: which is first if they take turns."""
        served = [queue for queue in mine.queues if queue not in self._paused]
        queues = [self._queues.in_order(queue, deal.wanted(queue)) for queue in served]
        if mine.order == "fair" and queues:
            first = turn % len(queues)
            queues = queues[first:] + queues[:first]
        for task in _take_turns(queues) if mine.order == "fair" else _one_after_another(queues):
            if self._sessions.has_majority(self._voters.get(task, ())) and not self._is_full(task):
                yield self._candidate(task)  # else nobody on this side of the cut may start it

    def _is_full(self, task: TaskId) -> bool:
        """Whether it was tried so often that its row has no room for more."""
        reading = self._readings.get(task)
        return reading is not None and fullness(reading.row) >= 1

    def _candidate(self, task: TaskId) -> Candidate:
        queue, needs, wait = self._queues.queue_of(task), self._queues.needs_of(task), self._waits.get(task)
        since = self._queues.since(task) if wait is None else wait.since
        first = max(since, self._resumed_at.get(queue, since))
        if wait is None:
            return Candidate(task=task, queue=queue, needs=needs, attempt=1, since=first, not_before=since)
        reading = self._readings[task]
        released = (dot for dot, end in reading.ended.items() if end.kind is EndKind.RELEASED)
        return Candidate(
            task=task,
            queue=queue,
            needs=needs,
            attempt=wait.attempt,
            since=first,
            not_before=wait.not_before,
            released_by=tuple(reading.claims[dot].peer for dot in released),
        )

    def free_of(self, peer: PeerId, mine: Iterable[Taken] = ()) -> Capacity:
        """What the peer says is free, less what its claims will take that it does not count yet. `mine`: this peer's claims."""
        if peer == self._me:
            return self._free_now(peer, mine)
        if peer not in self._free:
            tasks = self._foreign.get(peer, {}).values()
            self._free[peer] = self._free_now(peer, ((task, self._readings[task].row.spec.needs) for task in tasks))
        return self._free[peer]

    def _free_now(self, peer: PeerId, taken: Iterable[Taken]) -> Capacity:
        told = self._sessions.views[peer].telemetry
        free, running = free_capacity(told), frozenset(told.running)
        for task, needs in taken:
            if task not in running:
                free = free.minus(needs)
        return free

    def waiting_reason(self, now: float, row: Row, mine: Iterable[Taken]) -> str:
        """Why the task is where it is, for people. `mine`: what this peer has claimed."""
        wait = self._waits.get(row.task)
        if row.task not in self._queues:
            reading = self.reading(row)
            known = rules.reason(row)
            return known if reading.status.final else ": ".join(filter(None, (known, self._held_up(now, reading))))
        if by := self._paused.get(row.queue.value):
            return f"the queue {row.queue.value} is paused by {by}"
        if self._is_full(row.task):
            return f"was tried {wait.attempt - 1 if wait else 0} times, and is not tried again: cancel it and submit it anew"
        if not self._sessions.has_majority(row.voters):
            return self._without_majority(row.voters)
        if wait is not None and wait.not_before > now:
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

    def _without_majority(self, voters: Sequence[ActorId]) -> str:
        gone = self._sessions.gone(voters)
        if len(voters) - len(gone) < majority(len(voters)):
            told = ", ".join(f"{name} {why}" for name, why in gone.items())
            return f"no majority of its voters will ever be there again ({told}): cancel it, then `meshq retry` it"
        return f"waits for a majority of its voters: {self._sessions.absent(voters)} cannot vote now"

    def _held_up(self, now: float, reading: Reading) -> str:
        """Why a task that somebody holds does not go on; empty if nothing is known against it."""
        claim = None if reading.holder is None else reading.claims[reading.holder]
        view = None if claim is None or claim.peer == self._me else self._sessions.views.get(claim.peer)
        if reading.holder is not None and claim is not None and claim.peer != self._me and self._is_left_to_its_peer(reading):
            spoke_in = _latest_epoch(reading.row, reading.holder)
            if (end := self._sessions.lease_end(claim.peer, spoke_in, reading.row.spec.lease)) is not None:
                return f"{end.reason}, and no other peer tries it again after so many times: cancel it and submit it anew"
        if view is not None and not view.alive:
            until = self._sessions.minority_until(now)
            if until is None:
                return f"{view.name} does not answer: when its lease is over, the task is given to another peer"
            return (
                f"{view.name} does not answer, and this peer sees fewer than half of those that were there: for "
                f"{until - now:.0f} s more, or until they are back, it gives their tasks to nobody"
            )
        if claim is not None and claim.attempt > 1 and reading.row.voters and reading.status is Status.CLAIMED:
            return "waits for a majority of its voters: what they granted to an earlier attempt must run out first"
        return ""

    # ---- leases of others

    def peers_changed(self) -> None:
        self._mournings, self._free = None, {}

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
        if self._is_left_to_its_peer(reading):
            return None
        if self._sessions.lease_end(claim.peer, actor_ledger_epoch(dot.actor), row.spec.lease) is None:
            return None  # and what the peer wrote of it later can only have renewed it
        end = self._sessions.lease_end(claim.peer, _latest_epoch(row, dot), row.spec.lease)
        if end is None:
            return None
        # Its peer has just taken it back and is still held dead: gossip is slower than a push, and must be given its time.
        since = max(end.at, self._revived.get(dot, NEVER_REVIVED).at + self._config.grace)
        others = [peer for peer in self._sessions.alive if peer != claim.peer]
        rank = mourners(task, dot, (self._me, *others)).index(self._me)
        return Mourning(since + rank * self._config.lost_slot, task, dot, end.reason)

    def _is_left_to_its_peer(self, reading: Reading) -> bool:
        """Whether nobody else would take the task, and to say that its claims are lost would only fill its row still more.

        Each time that a machine vanishes and comes back costs a `Lost` and a `Back`; in a cancelled task it is the last one.
        """
        return reading.cancel is None and reading.result is None and fullness(reading.row) >= 1

    def check(self, rows: Iterable[Row]) -> None:
        for row in rows:
            reading, task = read(row), row.task
            queued = reading.status is Status.QUEUED and reading.next_attempt is not None
            assert (task in self._queues) == queued, f"{task} waits wrongly"
            assert (task in self._waits) == (queued and bool(row.facts)), f"{task} waits wrongly for its next attempt"
            known = bool(row.facts) and not over(reading)
            assert self._readings.get(task) == (reading if known else None), f"{task} is remembered wrongly"
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
