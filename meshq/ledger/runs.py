"""The claims of this peer, from the bid to the end: what it prepares, starts, stops and reports.

A claim goes Waiting -> Running -> ended, or to Stopping from either (`own.py`). It starts when it is prepared and every peer
held alive has acked it; or after `ack_patience` without all acks, for a peer that is cut off must not stop the others. Whoever
claims, `review` decides at each change of the row whether the claim still holds its task by the rules of `holder.py`; only the
peer of a claim ends it or takes it back.

Reading order: `claim`, `review`, `start`, `ended`; `adopt` for what an earlier run of the agent left.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import inf
from typing import assert_never

from meshq import codec
from meshq.ids import Dot, Fence, PeerId, TaskId, fence
from meshq.ledger.board import Board
from meshq.ledger.effects import Prepare, Start, Stop
from meshq.ledger.holder import Reading
from meshq.ledger.journal import Journal
from meshq.ledger.own import OwnClaim, OwnClaims, Running, Stopping, Waiting
from meshq.ledger.pushes import Pushes
from meshq.ledger.replica import ROW_BYTES_MAX
from meshq.ledger.row import Back, Claim, Ended, Preparing, Row, Started, covers
from meshq.ledger.sessions import Sessions
from meshq.ledger.table import row_bytes
from meshq.ledger.timing import LedgerConfig
from meshq.task import Claimed, EndKind, Outcome

REASON_CHARS_MAX = 2_000


class Runs:
    def __init__(
        self, me: PeerId, config: LedgerConfig, journal: Journal, board: Board, sessions: Sessions, pushes: Pushes
    ) -> None:
        self._me = me
        self._config = config
        self._journal = journal
        self._board = board
        self._sessions = sessions
        self._pushes = pushes
        self._own = OwnClaims()
        self._running_unknown: dict[Fence, Outcome | None] = {}  # of claims whose rows are not (yet) here
        self.adopted = False
        self.ends_of_ended_claims = 0

    # ---- inputs

    def adopt(self, fences: Sequence[Fence]) -> None:
        """Once, at the start: the claims of this peer that exec still runs or can still report. Every other one is lost."""
        assert not self.adopted, "adopt is for the start"
        self.adopted = True
        self._running_unknown = dict.fromkeys(fences)
        for row in self._journal.replica.rows():
            if any(isinstance(fact, Claim) and fact.peer == self._me for _, fact in row.facts):
                self._journal.touched[row.task] = None

    def claim(self, now: float, task: TaskId, attempt: int) -> None:
        row = self._journal.row(task)
        bid = Claim(attempt=attempt, peer=self._me, seen=row.vector, at=self._journal.wall(now))
        own = OwnClaim(task, self._journal.write(task, bid), attempt, Waiting(ready=False, pushed_at=now))
        self._own.add(own)
        self._journal.after.append(Prepare(Claimed(task=task, fence=own.fence, attempt=attempt, spec=row.spec)))

    def leave(self, now: float) -> None:
        """Give back what is claimed, and have stopped what runs: others may take it."""
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

    def pushed(self, peer: PeerId, row: Row) -> None:
        """Who pushes a row that covers a claim of mine has merged and committed it."""
        mine = frozenset(own.dot for own in self._own.of(row.task) if covers(row.vector, own.dot))
        self._own.acknowledged(peer, row.task, mine)

    def acked(self, peer: PeerId, task: TaskId, dots: frozenset[Dot]) -> None:
        """The peer has merged and committed these writes of mine to the task's row."""
        self._own.acknowledged(peer, task, dots)

    def slow(self, now: float, token: Fence) -> None:
        """Preparing this claim takes a while."""
        own = self._own.get(token)
        if own is not None and isinstance(own.state, Waiting) and own.dot not in self._reading(own.task).preparing:
            self._journal.write(own.task, Preparing(claim=own.dot, at=self._journal.wall(now)))

    def ready(self, token: Fence) -> None:
        """Source and environment of this claim are there."""
        own = self._own.get(token)
        if own is not None and isinstance(own.state, Waiting):
            own.state = replace(own.state, ready=True)

    def ended(self, token: Fence, outcome: Outcome) -> None:
        """The attempt is over, for whatever reason."""
        own = self._own.get(token)
        if own is not None:
            self._record(own, outcome)
        elif token in self._running_unknown:
            self._running_unknown[token] = outcome  # its row comes with a sync
        else:
            self.ends_of_ended_claims += 1

    # ---- views

    def rows(self) -> list[Row]:
        """Of the tasks that this peer has claimed."""
        return [self._journal.row(own.task) for own in self._own.all()]

    def unstarted(self) -> dict[Dot, TaskId]:
        """Claims that others must still acknowledge."""
        return {own.dot: own.task for own in self._own.all() if isinstance(own.state, Waiting)}

    def deadline(self, now: float) -> float:
        """When the next claim can start."""
        return min((self._start_at(now, own) for own in self._own.all()), default=inf)

    def check(self) -> None:
        for own in self._own.all():
            reading = self._reading(own.task)
            assert own.dot in reading.claims and own.dot not in reading.ended, f"{own.fence} is over"
            assert isinstance(own.state, Stopping) or isinstance(own.state, Running) == (own.dot in reading.started)

    # ---- what a row means for this peer

    def review(self, now: float, task: TaskId, reading: Reading) -> None:
        """The row of the task has changed."""
        if self.adopted:
            self._find_own(now, task, reading)
        for own in self._own.of(task):
            if task in self._journal.touched:
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
                self._journal.after += [Stop(token, "superseded")] if known and outcome is None else []
            elif known:
                self._own.add(self._adopt_one(now, task, dot, claim, reading))
                if outcome is not None:
                    self._record(self._own.of(task)[-1], outcome)
            elif dot in reading.live:
                why = "its peer restarted and found nothing of it"
                lost = Outcome(kind=EndKind.LOST, reason=why, ended_at=self._journal.wall(now))
                self._journal.write(task, Ended(claim=dot, outcome=lost))

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
            self._journal.write(own.task, Back(claim=own.dot, seen=reading.row.vector, at=self._journal.wall(now)))

    # ---- starting and ending

    def start(self, now: float) -> None:
        """Start what may start."""
        for own in self._own.all():
            if self._start_at(now, own) <= now:
                self._journal.write(own.task, Started(claim=own.dot, at=self._journal.wall(now)))
                own.state = Running(since=now)
                self._journal.after.append(Start(own.fence))

    def _start_at(self, now: float, own: OwnClaim) -> float:
        """When the claim starts without all acks; now or earlier with all of them; never while it must not start."""
        if not isinstance(own.state, Waiting) or not own.state.ready or self._sessions.blocked(now):
            return inf
        if self._reading(own.task).holder != own.dot:
            return inf
        if all(peer in own.acked for peer in self._sessions.alive):
            return own.state.pushed_at
        return own.state.pushed_at + self._pushes.ack_patience(self._config.ack_patience)

    def _stop(self, own: OwnClaim, kind: EndKind, reason: str, *, stop: str) -> None:
        """Have it ended; its end is recorded when exec reports it."""
        own.state = Stopping(kind, reason)
        self._journal.after.append(Stop(own.fence, stop))

    def _end(self, now: float, own: OwnClaim, kind: EndKind, reason: str, *, stop: str) -> None:
        """Record its end at once and have whatever there is of it stopped."""
        self._journal.after.append(Stop(own.fence, stop))
        blameless = kind is EndKind.RELEASED
        self._write_end(own, Outcome(kind=kind, reason=reason, ended_at=self._journal.wall(now), blameless=blameless))

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
        self._journal.write(own.task, Ended(claim=own.dot, outcome=outcome))

    def _reading(self, task: TaskId) -> Reading:
        return self._board.reading(self._journal.row(task))
