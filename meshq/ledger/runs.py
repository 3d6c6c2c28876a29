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
from meshq.ids import Dot, Fence, PeerId, TaskId, actor_ledger_epoch, fence, split_fence
from meshq.ledger.board import Board
from meshq.ledger.effects import Prepare, Start, Stop
from meshq.ledger.grants import Grants
from meshq.ledger.holder import Reading
from meshq.ledger.journal import Journal
from meshq.ledger.own import OwnClaim, OwnClaims, Running, Stopping, Waiting
from meshq.ledger.pushes import Pushes
from meshq.ledger.replica import ROW_BYTES_FULL
from meshq.ledger.row import Back, Claim, Ended, Preparing, Row, Started, covers
from meshq.ledger.sessions import Sessions
from meshq.ledger.table import row_bytes
from meshq.ledger.timing import LedgerConfig
from meshq.task import Claimed, EndKind, Needs, Outcome

REASON_CHARS_MAX = 2_000
PATIENCES_MAX = 4  # for the acks of whoever comes meanwhile: a peer that comes again and again must not hold up all starts (P5)


class Runs:
    def __init__(
        self, me: PeerId, config: LedgerConfig, journal: Journal, board: Board, sessions: Sessions, pushes: Pushes,
        grants: Grants,
    ) -> None:  # fmt: skip
        self._me = me
        self._config = config
        self._journal = journal
        self._board = board
        self._sessions = sessions
        self._pushes = pushes
        self._grants = grants
        self._own = OwnClaims()
        self._held: dict[Fence, Outcome] = {}  # ends of own claims that wait until this peer has proven its session
        self._running_unknown: dict[Fence, Outcome | None] = {}  # of claims whose rows are not (yet) here
        self._vanished: dict[TaskId, None] = {}  # own claims of which exec knows nothing: their ends wait, too
        self._of_older: dict[TaskId, None] = {}  # the same, of an earlier ledger epoch: others say what became of them
        self._unmet = True  # at the last `announce_again` some that were known at the start were still on the way
        self.adopted = False
        self.ends_of_ended_claims = 0
        self.results_of_purged_tasks = 0

    # ---- inputs

    def adopt(self, fences: Sequence[Fence]) -> None:
        """Once, at the start: the claims of this peer that exec still runs or can still report. Every other one is lost."""
        assert not self.adopted, "adopt is for the start"
        self.adopted = True
        self._running_unknown = dict.fromkeys(fences)
        self._journal.touched |= dict.fromkeys(self._board.take_claimed_here())

    def claim(self, now: float, task: TaskId, attempt: int) -> None:
        row = self._journal.row(task)
        bid = Claim(attempt=attempt, peer=self._me, seen=row.vector, at=self._journal.wall(now))
        own = OwnClaim(task, self._journal.write(task, bid), attempt, row.spec.needs, Waiting(False, pushed_at=now, since=now))
        self._own.add(own)
        self._grants.watch(now, task, own.fence)
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

    def announce_again(self, now: float) -> dict[Dot, TaskId]:
        """Claims that others must still acknowledge, to be pushed to who has come: as if they were new, within bounds."""
        patience = self._pushes.ack_patience(self._config.ack_patience)
        unmet, self._unmet = self._unmet, self._sessions.all_met_at() > now
        waiting = [(own, own.state) for own in self._own.all() if isinstance(own.state, Waiting)]
        for own, state in waiting:
            only_acks_missed = state.ready and not unmet and now <= state.pushed_at + patience
            own.state = replace(state, pushed_at=now, since=state.since if only_acks_missed else now)
        return {own.dot: own.task for own, _ in waiting}

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

    def ended(self, now: float, token: Fence, outcome: Outcome) -> None:
        """The attempt is over, for whatever reason. A peer that may have slept learns first what has happened meanwhile."""
        own = self._own.get(token)
        if own is not None and self._sessions.blocked(now):
            self._held[token] = outcome
        elif own is not None:
            self._record(own, outcome)
        elif token in self._running_unknown:
            self._running_unknown[token] = outcome  # its row comes with a sync
        else:
            self.ends_of_ended_claims += 1

    def speak_again(self, now: float) -> None:
        """This peer writes as another actor now: say so of what runs, or others would take it for lost with the old one."""
        for own in self._own.all():
            if isinstance(own.state, Running | Stopping):
                row = self._journal.row(own.task)
                self._journal.write(own.task, Back(claim=own.dot, seen=row.vector, at=self._journal.wall(now)))

    def purged(self, task: TaskId) -> None:
        """The task is forgotten: it was over, and whatever this peer still does about it is of no use."""
        for own in self._own.of(task):
            self._own.remove(own)
            self._grants.forget(own.fence)
            self.results_of_purged_tasks += self._held.pop(own.fence, None) is not None
            self._journal.after.append(Stop(own.fence, "superseded"))
        self._vanished.pop(task, None)
        self._of_older.pop(task, None)

    def drop_purged(self) -> None:
        """Give up claims of this peer that it has written, that exec has, and that no row has: their tasks were purged."""
        for token, outcome in list(self._running_unknown.items()):
            if covers(self._journal.replica.vector, split_fence(token)[1]):
                del self._running_unknown[token]
                self.results_of_purged_tasks += outcome is not None
                self._journal.after += [Stop(token, "superseded")] if outcome is None else []

    # ---- views

    def claimed(self, task: TaskId) -> bool:
        """Whether this peer has a claim of the task that has not ended."""
        return bool(self._own.of(task))

    def taken(self) -> list[tuple[TaskId, Needs]]:
        """What this peer has claimed."""
        return [(own.task, own.needs) for own in self._own.all()]

    def holds_back(self, token: Fence) -> bool:
        """Whether the end of this claim was reported and will be recorded later."""
        return token in self._held or self._running_unknown.get(token) is not None

    def deadline(self, now: float) -> float:
        """When the next claim can start."""
        return min((self._start_at(now, own) for own in self._own.all()), default=inf)

    def check(self) -> None:
        for own in self._own.all():
            reading = self._reading(own.task)
            assert own.dot in reading.claims and own.dot not in reading.ended, f"{own.fence} is over"
            assert isinstance(own.state, Stopping) or isinstance(own.state, Running) == (own.dot in reading.started)
            assert not reading.row.voters or isinstance(own.state, Waiting) or own.fence in self._grants
        assert all(token in self._own for token in self._held), "an end is held back of a claim that has ended"

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
                    self.ended(now, token, outcome)
            elif dot in reading.live and self._sessions.blocked(now):
                self._vanished[task] = None
            elif dot in reading.live and self._sessions.alive and self._is_older(dot):
                self._of_older[task] = None
            elif dot in reading.live:
                why = "its peer restarted and found nothing of it"
                lost = Outcome(kind=EndKind.LOST, reason=why, ended_at=self._journal.wall(now))
                self._journal.write(task, Ended(claim=dot, outcome=lost))

    def _is_older(self, dot: Dot) -> bool:
        """Whether this peer wrote that in an earlier ledger epoch.

        If this disk was lost or set back, the others see the new epoch and hold the claim lost. But if it is a copy of one
        whose agent lives, that one still runs the claim, and must not be told by its clone that it has ended.
        """
        return actor_ledger_epoch(dot.actor) < self._journal.replica.ledger_epoch

    def _adopt_one(self, now: float, task: TaskId, dot: Dot, claim: Claim, reading: Reading) -> OwnClaim:
        if dot in reading.started:
            self._grants.watch(now, task, fence(claim.attempt, dot))
            return OwnClaim(task, dot, claim.attempt, reading.row.spec.needs, Running(since=now))
        # What was being prepared when the agent died is given up: exec, which knows it, reports its end in a moment.
        return OwnClaim(task, dot, claim.attempt, reading.row.spec.needs, Waiting(False, pushed_at=now, since=now))

    def _review_own(self, now: float, own: OwnClaim, reading: Reading) -> None:
        """Does this claim still hold its task? (Rules 1, 2 and 5.)"""
        if isinstance(own.state, Waiting) and own.dot in reading.started:
            self._began_before(now, own)
        if isinstance(own.state, Stopping) or own.fence in self._held:
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

    def _began_before(self, now: float, own: OwnClaim) -> None:
        """The database had been set back: others bring what this peer wrote when it started the claim."""
        own.state = Running(since=now)
        if own.fence not in self._grants:
            self._grants.watch(now, own.task, own.fence)

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
                self._journal.after += [*self._grants.keep(own.fence), Start(own.fence)]
            elif not isinstance(own.state, Waiting):
                self._journal.after += self._grants.keep(own.fence)

    def end_held_back(self, now: float) -> None:
        """Record the ends that had to wait, and give up what voters will not let start."""
        if self._sessions.blocked(now):
            return
        self._journal.touched |= self._vanished
        self._vanished = {}
        if not self._sessions.alive:
            self._journal.touched |= self._of_older  # there is nobody who could hold them lost
            self._of_older = {}
        held, self._held = self._held, {}
        for token, outcome in held.items():
            self.ended(now, token, outcome)
        for own in self._own.all():
            if isinstance(own.state, Waiting) and not self._grants.possible(own.fence):
                why = "a majority of its voters has granted another attempt, or is not there"
                self._end(now, own, EndKind.RELEASED, why, stop="released")

    def _start_at(self, now: float, own: OwnClaim) -> float:
        """When the claim starts without all acks; now or earlier with all of them; never while it must not start."""
        if not isinstance(own.state, Waiting) or not own.state.ready or self._sessions.blocked(now):
            return inf
        if self._reading(own.task).holder != own.dot or not self._grants.may_start(now, own.fence):
            return inf
        acked = all(peer in own.acked for peer in self._sessions.alive)
        patience = 0.0 if acked else self._pushes.ack_patience(self._config.ack_patience)
        patient_until = min(own.state.pushed_at + patience, own.state.since + PATIENCES_MAX * patience)
        return max(patient_until, self._sessions.all_met_at())

    def _stop(self, own: OwnClaim, kind: EndKind, reason: str, *, stop: str) -> None:
        """Have it ended; its end is recorded when exec reports it."""
        own.state = Stopping(kind, reason)
        self._journal.after.append(Stop(own.fence, stop))

    def _end(self, now: float, own: OwnClaim, kind: EndKind, reason: str, *, stop: str) -> None:
        """Record its end at once and have whatever there is of it stopped.

        Where voters wait for that end before they grant another claim, it must be true: then what runs is stopped first.
        """
        if own.fence in self._grants and isinstance(own.state, Running):
            self._stop(own, kind, reason, stop=stop)
            return
        self._journal.after.append(Stop(own.fence, stop))
        blameless = kind is EndKind.RELEASED
        self._write_end(own, Outcome(kind=kind, reason=reason, ended_at=self._journal.wall(now), blameless=blameless))

    def _record(self, own: OwnClaim, outcome: Outcome) -> None:
        """Record what exec reported. A success stands, unless another is known already (rule 1)."""
        reading = self._reading(own.task)
        if reading.result is not None and not outcome.blameless:  # why voters had it ended is worth more than that
            outcome = replace(outcome, kind=EndKind.SUPERSEDED, reason="another attempt had succeeded")
        elif isinstance(own.state, Stopping) and outcome.kind is not EndKind.SUCCEEDED:
            leaving = own.state.kind is EndKind.RELEASED
            outcome = replace(outcome, kind=own.state.kind, reason=own.state.reason, blameless=leaving)
        self._write_end(own, outcome)

    def _write_end(self, own: OwnClaim, outcome: Outcome) -> None:
        row = self._reading(own.task).row
        outcome = replace(outcome, reason=outcome.reason[:REASON_CHARS_MAX])
        if 2 * (row_bytes(row) + len(codec.encode(outcome))) > ROW_BYTES_FULL:  # the row must keep room for its later attempts
            outcome = replace(outcome, outputs=())
        self._own.remove(own)
        self._held.pop(own.fence, None)
        self._grants.forget(own.fence)
        self._journal.write(own.task, Ended(claim=own.dot, outcome=outcome))

    def _reading(self, task: TaskId) -> Reading:
        return self._board.reading(self._journal.row(task))
