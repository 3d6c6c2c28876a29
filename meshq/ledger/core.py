"""The ledger of one peer: what shall be done, and who does it.

Problem. Every peer holds all tasks and any may vanish. A task must run once when nothing goes wrong, must run again when its
machine is gone, and must never be lost or get two results, with no server to ask and no clock to trust.

Invariants
  - Whatever is sent, prepared, started or answered was committed first: `Persist` precedes it in the list of effects.
  - User code of a claim starts only while the claim holds the task by the rules of `holder.py`, after `Started` is committed.
  - Only the peer of a claim ends it or takes it back; others may only declare it lost.
  - Queue, indexes and own claims are functions of the rows and of what exec reported (`check`).

Algorithm. Inputs change rows. Each changed row is reviewed (`_review`): what does it mean now for the queues, for the leases of
others, for this peer's own claims? A review may write, which is reviewed in turn. Then what can start is started (`_start`),
whose lease is over is declared lost (`_mourn`), and free capacity bids for waiting tasks (`_bid`). Last, one `Persist` and one
push to every live peer carry all that this input changed (`_flush`): one commit for an input, whatever it causes. So a task
submitted at the peer that will run it is stored and claimed in one commit.

A claim goes Waiting -> Running -> ended, or to Stopping from either (`own.py`). It starts when it is prepared and every peer
held alive has acked it; or after `ack_patience` without all acks, for a peer that is cut off must not stop the others.

Limits: TASKS_LIVE_MAX waiting or running tasks, 32 claims for one input, and those of `replica.py` and `pushes.py`.

Reading order: the inputs, then `_finish`, `_review`, `_review_own`, `_start`, `_mourn`, `_bid`, `_flush`.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import inf
from typing import TYPE_CHECKING, assert_never

from meshq import codec
from meshq.config import ARRAY_TASKS_MAX
from meshq.errors import TaskFailed, UsageError
from meshq.ids import Dot, Fence, PeerId, TaskId, fence
from meshq.ledger.admission import admit
from meshq.ledger.antientropy import AntiEntropy, note_of
from meshq.ledger.board import Board
from meshq.ledger.claiming import Deal
from meshq.ledger.effects import (
    Effect,
    EpochMinted,
    PeerView,
    Persist,
    Prepare,
    Push,
    PushReply,
    RowChanged,
    SendPush,
    Start,
    Stop,
    SyncPage,
    SyncRequest,
)
from meshq.ledger.holder import Reading
from meshq.ledger.own import OwnClaim, OwnClaims, Running, Stopping, Waiting
from meshq.ledger.placement import Capacity
from meshq.ledger.pushes import Pushes, batches
from meshq.ledger.replica import ROW_BYTES_MAX, Replica, row_bytes
from meshq.ledger.row import Back, Cancel, Claim, Ended, Fact, Lost, Preparing, Row, Started, Vector, covers
from meshq.ledger.sessions import Sessions
from meshq.ledger.timing import LedgerConfig
from meshq.task import Claimed, EndKind, Outcome, TaskSpec, Telemetry

if TYPE_CHECKING:
    from random import Random

REASON_CHARS_MAX = 2_000
VALIDATORS = 3  # peers asked after a stall: one of them may be gone


class Ledger:
    def __init__(
        self,
        me: PeerId,
        ledger_epoch: int,
        config: LedgerConfig,
        rows: Iterable[Row],
        vector: Vector,
        floors: Vector,
        rng: "Random",
        now: float,
    ) -> None:
        self._me = me
        self._config = config
        self._rng = rng
        self._wall_offset = 0.0
        self._replica = Replica(me, ledger_epoch, rows, vector, floors)
        self._sessions = Sessions(me, config, now)
        self._pushes = Pushes()
        self._sync = AntiEntropy(config, rng, now)
        self._counters: Counter[str] = Counter()
        self._board = Board(me, config, rng, self._sessions)
        # What exec does
        self._own = OwnClaims()
        self._adopted = False
        self._leaving = False
        self._running_unknown: dict[Fence, Outcome | None] = {}  # of claims whose rows are not (yet) here
        # Bidding
        self._turn = 0
        self._last_free = Capacity(0, 0, 0, 0)
        self._capacity_since = now
        self._look_again_at = inf
        self._mourn_at = inf
        # Of the current input
        self._now = now
        self._push_number = 0
        self._touched: dict[TaskId, None] = {}
        self._changed: dict[TaskId, None] = {}
        self._fresh: dict[Dot, TaskId] = {}
        self._after: list[Effect] = []
        self._durable = False
        self._stored: dict[TaskId, dict[PeerId, None]] = {}
        for row in self._replica.rows():
            self._board.index(now, row)

    # ---- commands

    def set_wall_offset(self, now: float, wall: float) -> None:
        """What the wall clock shows now: for display, nothing is decided by it."""
        self._wall_offset = wall - now

    def submit(self, now: float, specs: Sequence[TaskSpec], hold: bool) -> tuple[tuple[TaskId, ...], list[Effect]]:
        """New tasks, in order. Unless `hold`, each must fit a peer that is known.

        Raises Unplaceable, UsageError (a spec is too large) or TaskFailed (too many tasks); then nothing was stored.
        """
        admit(specs, hold, self._sessions.views.values(), live=len(self._board), room=self._replica.room)
        tasks = []
        for spec in specs:
            dot, row = self._replica.create(spec, self._board.next_position(spec.queue))
            self._wrote(row.task, dot)
            self._board.index(now, row)
            tasks.append(row.task)
        return tuple(tasks), self._finish(now)

    def cancel(self, now: float, task: TaskId, by: str) -> list[Effect]:
        """Cancel the task; again does nothing. TaskFailed if it has ended otherwise, UsageError if there is no such task."""
        row = self._replica.get(task)
        if row is None:
            raise UsageError(f"cancelling {task}: there is no such task", "`meshq tasks` lists what there is")
        reading = self._board.reading(row)
        if reading.cancel is not None:
            return self._finish(now)
        if reading.status.final:
            raise TaskFailed(f"cancelling {row.spec.name!r} ({task}): it has {reading.status.value} already")
        self._write(task, Cancel(by=by, at=self._wall(now)))
        return self._finish(now)

    def adopt(self, now: float, fences: Sequence[Fence]) -> list[Effect]:
        """Once, at the start: the claims of this peer that exec still runs or can still report. Every other one is lost.

        Nothing is claimed before.
        """
        assert not self._adopted, "adopt is for the start"
        self._adopted = True
        self._running_unknown = dict.fromkeys(fences)
        for row in self._replica.rows():
            if any(isinstance(fact, Claim) and fact.peer == self._me for _, fact in row.facts):
                self._touched[row.task] = None
        return self._finish(now)

    def leave(self, now: float) -> list[Effect]:
        """Claim nothing more, and give back what is claimed: what runs is stopped, others may take it."""
        self._leaving = True
        for own in self._own.all():
            match own.state:
                case Waiting():
                    self._end(now, own, EndKind.RELEASED, "its peer left the mesh", stop="leaving")
                case Running():
                    self._stop(own, EndKind.RELEASED, "its peer left the mesh", stop="leaving")
                case Stopping():
                    pass
                case _:
                    assert_never(own.state)
        return self._finish(now)

    # ---- what gossip says

    def handle_peers(self, now: float, views: Mapping[PeerId, PeerView]) -> list[Effect]:
        """All beliefs anew, this peer's own included."""
        came, gone = self._sessions.replace(now, views)
        self._board.peers_changed()
        for peer in gone:
            self._pushes.forget(peer)
            self._sync.failed(peer)
        for peer in came:
            self._sync.ask(peer)
        unstarted = {own.dot: own.task for own in self._own.all() if isinstance(own.state, Waiting)}
        if came and unstarted:  # they must ack these claims too, and the first push did not go to them
            self._after += self._send(now, came, unstarted)
        return self._finish(now)

    def handle_capacity(self, now: float, telemetry: Telemetry) -> list[Effect]:
        """This peer's own telemetry, before gossip carries it around."""
        self._sessions.told(telemetry)
        return self._finish(now)

    def handle_stall(self, now: float, seconds: float) -> list[Effect]:
        """This process did nothing for so long: what it believes may be of the past."""
        if self._sessions.stalled(now, seconds):
            self._counters["stalls"] += 1
            alive = self._sessions.alive
            for peer in self._rng.sample(alive, min(VALIDATORS, len(alive))):
                self._sync.failed(peer)  # a page that was asked for before the stall proves nothing
                self._sync.ask(peer)
        return self._finish(now)

    # ---- what other peers say

    def handle_push(self, now: float, peer: PeerId, push: Push) -> tuple[PushReply, list[Effect]]:
        """Merge; the reply may be sent once the effects' `Persist` is committed."""
        self._durable |= any(self._replica.get(row.task) is None for row in push.rows)
        if not (refused := self._absorb(push.rows)):
            self._replica.cover(push.dots)
        for row in push.rows:  # who pushes a row that covers a claim of mine has merged and committed it
            mine = frozenset(own.dot for own in self._own.of(row.task) if covers(row.vector, own.dot))
            self._own.acknowledged(peer, row.task, mine)
        effects = self._finish(now)
        return PushReply(number=push.number, rows=tuple(self._replica.better(push.rows)), refused=refused), effects

    def handle_push_reply(self, now: float, peer: PeerId, reply: PushReply) -> list[Effect]:
        acked = self._pushes.replied(now, peer, reply.number)
        if acked is None:
            self._counters["push_replies_unexpected"] += 1
        else:
            self._sessions.heard(acked.sent_at)
            self._note_acks(peer, acked.push, frozenset(reply.refused))
        self._absorb(reply.rows)
        return self._finish(now)

    def handle_push_failed(self, now: float, peer: PeerId, number: int) -> list[Effect]:
        self._pushes.failed(now, peer, number)
        return self._finish(now)

    def handle_sync_request(self, now: float, peer: PeerId, request: SyncRequest) -> SyncPage:
        """The rows that the peer lacks. The page may be sent once all effects so far are carried out."""
        return self._replica.page(request)

    def handle_sync_page(self, now: float, peer: PeerId, page: SyncPage) -> list[Effect]:
        accepted = not self._absorb(page.rows)
        progress = self._sync.handle_page(now, peer, page, accepted=accepted)
        if progress is None:
            self._counters["sync_pages_unexpected"] += 1
        else:
            self._after += progress.more
            if not progress.more:
                self._sessions.heard(progress.began_at)
            if progress.adopt:
                self._replica.adopt(page.upto, page.floors)
        return self._finish(now)

    def handle_note(self, now: float, peer: PeerId, note: bytes) -> list[Effect]:
        """By gossip: a hash of what the peer has."""
        self._sync.heed(now, peer, note)
        return self._finish(now)

    def handle_sync_failed(self, now: float, peer: PeerId) -> list[Effect]:
        self._sync.failed(peer)
        self._sync.hurry(now)
        return self._finish(now)

    # ---- what exec says

    def handle_slow(self, now: float, token: Fence) -> list[Effect]:
        """Preparing this claim takes a while."""
        own = self._own.get(token)
        if own is not None and isinstance(own.state, Waiting) and own.dot not in self._reading(own.task).preparing:
            self._write(own.task, Preparing(claim=own.dot, at=self._wall(now)))
        return self._finish(now)

    def handle_ready(self, now: float, token: Fence) -> list[Effect]:
        """Source and environment of this claim are there."""
        own = self._own.get(token)
        if own is not None and isinstance(own.state, Waiting):
            own.state = replace(own.state, ready=True)
        return self._finish(now)

    def handle_ended(self, now: float, token: Fence, outcome: Outcome) -> list[Effect]:
        """The attempt is over, for whatever reason."""
        own = self._own.get(token)
        if own is not None:
            self._record(own, outcome)
        elif token in self._running_unknown:
            self._running_unknown[token] = outcome  # its row comes with a sync
        else:
            self._counters["ends_of_ended_claims"] += 1
        return self._finish(now)

    # ---- time

    def deadline(self) -> float:
        """When `handle_timeout` has something to do."""
        starts = (self._start_at(self._now, own) for own in self._own.all())
        free_at = self._sessions.blocked_until(self._now)
        blocked = free_at if free_at > self._now else inf
        return min(self._pushes.deadline(), self._sync.deadline(), self._look_again_at, self._mourn_at, blocked, *starts)

    def handle_timeout(self, now: float) -> list[Effect]:
        self._after += self._pushes.handle_timeout(now)
        self._sync.handle_timeout(now, self._sessions.alive, self._replica.vector)
        return self._finish(now)

    # ---- views

    @property
    def ledger_epoch(self) -> int:
        return self._replica.ledger_epoch

    @property
    def vector(self) -> Vector:
        return self._replica.vector

    @property
    def note(self) -> bytes:
        """A hash of what I have, to be told by gossip."""
        return note_of(self._replica.vector)

    @property
    def counters(self) -> Mapping[str, int]:
        """All that was refused, repeated or given up."""
        return self._counters + self._replica.counters + self._pushes.counters

    def row(self, task: TaskId) -> Row | None:
        return self._replica.get(task)

    def tasks(self) -> Iterator[Row]:
        """All rows, in no order that means anything."""
        return self._replica.rows()

    def stored_on(self, task: TaskId) -> tuple[PeerId, ...]:
        """The other peers that have acknowledged a task submitted here."""
        return tuple(self._stored.get(task, ()))

    def position(self, task: TaskId) -> int | None:
        """From 1 in its queue, in running order; None unless queued."""
        return self._board.position(task)

    def waiting_reason(self, now: float, task: TaskId) -> str:
        """Why the task is where it is, for people."""
        row = self._replica.get(task)
        return "" if row is None else self._board.waiting_reason(now, row, self._claimed_rows())

    def check(self) -> None:
        """Assert every invariant."""
        assert not (self._touched or self._changed or self._fresh or self._after), "an input was not finished"
        self._replica.check()
        self._board.check(self._replica.rows())
        for own in self._own.all():
            reading = self._reading(own.task)
            assert own.dot in reading.claims and own.dot not in reading.ended, f"{own.fence} is over"
            assert isinstance(own.state, Stopping) or isinstance(own.state, Running) == (own.dot in reading.started)

    # ---- inside: one input

    def _finish(self, now: float) -> list[Effect]:
        """Carry an input to its end: everything that follows from it now, then the effects."""
        self._now = now
        self._settle(now)
        self._start(now)
        self._mourn(now)
        self._settle(now)
        self._bid(now)
        self._settle(now)
        self._mourn_at = self._next_mourning(now)
        self._after += self._sync.begin(now, self._replica.vector)
        return self._flush(now)

    def _settle(self, now: float) -> None:
        while self._touched:
            task = next(iter(self._touched))
            del self._touched[task]
            self._changed[task] = None
            self._review(now, task)

    def _flush(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        if changes := self._replica.take_changes():
            if changes.minted is not None:
                effects.append(EpochMinted(changes.minted))
            durable = self._durable or bool(self._fresh)
            effects.append(Persist(changes.rows, changes.vector, changes.floors, durable))
        effects += self._send(now, self._sessions.alive, self._fresh)
        effects += self._after
        effects += [RowChanged(task) for task in self._changed]
        self._changed, self._fresh, self._after, self._durable = {}, {}, [], False
        return effects

    def _send(self, now: float, peers: Sequence[PeerId], writes: Mapping[Dot, TaskId]) -> list[SendPush]:
        """Push the rows of these writes, in as many pushes as their size demands."""
        sends: list[SendPush] = []
        dots_of: dict[TaskId, list[Dot]] = {}
        for dot, task in writes.items() if peers else ():
            dots_of.setdefault(task, []).append(dot)
        for rows in batches(self._row(task) for task in dots_of):
            self._push_number += 1
            dots = tuple(sorted(dot for row in rows for dot in dots_of[row.task]))
            sends += self._pushes.send(now, peers, Push(number=self._push_number, rows=rows, dots=dots))
        return sends

    def _row(self, task: TaskId) -> Row:
        row = self._replica.get(task)
        assert row is not None
        return row

    def _claimed_rows(self) -> list[Row]:
        return [self._row(own.task) for own in self._own.all()]

    def _reading(self, task: TaskId) -> Reading:
        return self._board.reading(self._row(task))

    def _write(self, task: TaskId, fact: Fact) -> Dot:
        dot = self._replica.add(task, fact)
        self._wrote(task, dot)
        return dot

    def _wrote(self, task: TaskId, dot: Dot) -> None:
        self._fresh[dot] = task
        self._touched[task] = None

    def _absorb(self, rows: Iterable[Row]) -> tuple[TaskId, ...]:
        """Merge what came from outside; the tasks whose rows were refused."""
        refused: list[TaskId] = []
        for row in rows:
            before = self._replica.get(row.task)
            task = self._replica.absorb(row)
            if task is None:
                refused.append(row.task)
            elif self._replica.get(task) is not before:
                self._touched[task] = None
        return tuple(refused)

    def _note_acks(self, peer: PeerId, push: Push, refused: frozenset[TaskId]) -> None:
        self._counters["rows_refused_elsewhere"] += len(refused)
        dots = frozenset(push.dots)
        for row in (row for row in push.rows if row.task not in refused):
            self._own.acknowledged(peer, row.task, dots)
            if row.birth in dots:
                self._stored.setdefault(row.task, {})[peer] = None
                self._changed[row.task] = None
        while len(self._stored) > ARRAY_TASKS_MAX:
            del self._stored[next(iter(self._stored))]

    def _wall(self, now: float) -> float:
        return now + self._wall_offset

    # ---- inside: what a row means for this peer

    def _review(self, now: float, task: TaskId) -> None:
        reading = self._board.index(now, self._row(task))
        if self._adopted:
            self._find_own(now, task, reading)
        for own in self._own.of(task):
            if task in self._touched:
                return  # this review wrote something: the next one sees it
            self._review_own(now, own, reading)

    def _find_own(self, now: float, task: TaskId, reading: Reading) -> None:
        """Claims of this peer that this run did not make: adopt what exec has of them, end the others."""
        for dot, claim in reading.claims.items():
            token = fence(claim.attempt, dot)
            if claim.peer != self._me or token in self._own:
                continue
            known = token in self._running_unknown
            outcome = self._running_unknown.pop(token, None)
            if dot in reading.ended:
                self._after += [Stop(token, "superseded")] if known and outcome is None else []
            elif known:
                self._own.add(self._adopt_one(now, task, dot, claim, reading))
                if outcome is not None:
                    self._record(self._own.of(task)[-1], outcome)
            elif dot in reading.live:
                lost = Outcome(kind=EndKind.LOST, reason="its peer restarted and found nothing of it", ended_at=self._wall(now))
                self._write(task, Ended(claim=dot, outcome=lost))

    def _adopt_one(self, now: float, task: TaskId, dot: Dot, claim: Claim, reading: Reading) -> OwnClaim:
        if dot in reading.started:
            return OwnClaim(task, dot, claim.attempt, Running(since=now))
        # What was being prepared when the agent died is given up: exec, which knows it, reports its end in a moment.
        return OwnClaim(task, dot, claim.attempt, Waiting(ready=False, pushed_at=now))

    def _review_own(self, now: float, own: OwnClaim, reading: Reading) -> None:
        """Does this claim still hold its task? (Rules 1, 2 and 5.)"""
        if isinstance(own.state, Stopping):
            return
        if reading.result is not None:
            self._end(now, own, EndKind.SUPERSEDED, "another attempt has succeeded", stop="superseded")
        elif reading.cancel is not None and isinstance(own.state, Waiting):
            self._end(now, own, EndKind.CANCELLED, f"cancelled by {reading.cancel.by}", stop="cancelled")
        elif reading.cancel is not None:
            self._stop(own, EndKind.CANCELLED, f"cancelled by {reading.cancel.by}", stop="cancelled")
        elif own.dot in reading.lost and isinstance(own.state, Running):
            self._answer_lost(now, own, own.state, reading)
        elif reading.exhausted and isinstance(own.state, Waiting):
            self._end(now, own, EndKind.SUPERSEDED, "the task has failed already", stop="superseded")
        elif reading.holder != own.dot:
            self._end(now, own, EndKind.SUPERSEDED, "another attempt holds the task", stop="superseded")

    def _answer_lost(self, now: float, own: OwnClaim, running: Running, reading: Reading) -> None:
        """Others believed this running claim lost. It goes on, unless this machine slept while a later one got going."""
        later = any(claim.attempt > own.attempt and dot in reading.started for dot, claim in reading.live.items())
        if later and self._sessions.slept_since(running.since):
            self._end(now, own, EndKind.SUPERSEDED, "its machine slept, and a later attempt runs", stop="superseded")
        else:
            self._write(own.task, Back(claim=own.dot, seen=reading.row.vector, at=self._wall(now)))

    def _stop(self, own: OwnClaim, kind: EndKind, reason: str, *, stop: str) -> None:
        """Have it ended; its end is recorded when exec reports it."""
        own.state = Stopping(kind, reason)
        self._after.append(Stop(own.fence, stop))

    def _end(self, now: float, own: OwnClaim, kind: EndKind, reason: str, *, stop: str) -> None:
        """Record its end at once and have whatever there is of it stopped."""
        self._after.append(Stop(own.fence, stop))
        self._write_end(own, Outcome(kind=kind, reason=reason, ended_at=self._wall(now), blameless=kind is EndKind.RELEASED))

    def _record(self, own: OwnClaim, outcome: Outcome) -> None:
        """Record what exec reported. A success stands, unless another is known already (rule 1)."""
        reading = self._reading(own.task)
        if reading.result is not None:
            outcome = replace(outcome, kind=EndKind.SUPERSEDED, reason="another attempt had succeeded")
        elif isinstance(own.state, Stopping) and outcome.kind is not EndKind.SUCCEEDED:
            leaving = own.state.kind is EndKind.RELEASED
            outcome = replace(outcome, kind=own.state.kind, reason=own.state.reason, blameless=leaving)
        self._write_end(own, outcome)

    def _write_end(self, own: OwnClaim, outcome: Outcome) -> None:
        row = self._reading(own.task).row
        outcome = replace(outcome, reason=outcome.reason[:REASON_CHARS_MAX])
        if 2 * row_bytes(row) + len(codec.encode(outcome)) > ROW_BYTES_MAX:  # the row must keep room for its later attempts
            outcome = replace(outcome, outputs=())
        self._own.remove(own)
        self._write(own.task, Ended(claim=own.dot, outcome=outcome))

    # ---- inside: starting, mourning, bidding

    def _start_at(self, now: float, own: OwnClaim) -> float:
        """When the claim starts without all acks; now or earlier with all of them; never while it must not start."""
        if not isinstance(own.state, Waiting) or not own.state.ready or self._sessions.blocked(now):
            return inf
        if self._reading(own.task).holder != own.dot:
            return inf
        if all(peer in own.acked for peer in self._sessions.alive):
            return own.state.pushed_at
        return own.state.pushed_at + self._pushes.ack_patience(self._config.ack_patience)

    def _start(self, now: float) -> None:
        for own in self._own.all():
            if self._start_at(now, own) <= now:
                self._write(own.task, Started(claim=own.dot, at=self._wall(now)))
                own.state = Running(since=now)
                self._after.append(Start(own.fence))

    def _mourn(self, now: float) -> None:
        """Declare lost what is over, unless this peer may be the one that is cut off."""
        if self._next_mourning(now) > now:
            return
        for mourning in self._board.mournings():
            if mourning.due > now:
                return
            self._write(mourning.task, Lost(claim=mourning.dot, reason=mourning.reason, at=self._wall(now)))

    def _next_mourning(self, now: float) -> float:
        """When there is something to mourn and this peer may do it."""
        mournings = self._board.mournings() if self._sessions.views else ()
        if not mournings or self._sessions.blocked(now):
            return inf
        silent_until = self._sessions.minority_until(now)
        return mournings[0].due if silent_until is None else max(mournings[0].due, silent_until)

    def _bid(self, now: float) -> None:
        """Claim what falls to this peer."""
        self._look_again_at = inf
        mine = self._sessions.views.get(self._me)
        if mine is None or not self._adopted or self._leaving or self._sessions.blocked(now):
            return
        free = self._board.free_of(self._me, self._claimed_rows())
        if free.exceeds(self._last_free):
            self._capacity_since = now
        self._last_free = free
        if free.slots < 1 or not self._board.anybody_waits:
            return
        alive = {peer: view for peer, view in self._sessions.views.items() if view.alive or peer == self._me}
        capacities = {peer: free if peer == self._me else self._board.free_of(peer) for peer in alive}
        deal = Deal(self._me, alive, capacities, self._capacity_since, self._config)
        plan = deal.plan(now, self._board.candidates(deal, mine.telemetry, self._turn))
        self._look_again_at = plan.look_again_at
        for task, attempt in plan.claims:
            self._claim(now, task, attempt)

    def _claim(self, now: float, task: TaskId, attempt: int) -> None:
        row = self._row(task)
        dot = self._write(task, Claim(attempt=attempt, peer=self._me, seen=row.vector, at=self._wall(now)))
        own = OwnClaim(task, dot, attempt, Waiting(ready=False, pushed_at=now))
        self._own.add(own)
        self._turn += 1
        self._after.append(Prepare(Claimed(task=task, fence=own.fence, attempt=attempt, spec=row.spec)))
