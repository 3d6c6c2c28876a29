"""The ledger of one peer: what shall be done, and who does it.

Problem. Every peer holds all tasks and any may vanish. A task must run once when nothing goes wrong, must run again when its
machine is gone, and must never be lost or get two results, with no server to ask and no clock to trust.

Invariants
  - Whatever is sent, prepared, started or answered was committed first: `Persist` precedes it in the list of effects.
  - User code of a claim starts only while the claim holds the task by the rules of `holder.py`, after `Started` is committed.
  - Only the peer of a claim ends it or takes it back; others may only declare it lost.
  - Queue, indexes and own claims are functions of the rows and of what exec reported (`check`).

Algorithm. Inputs change rows. Each changed row is reviewed (`_review`): what does it mean now for the queues, for the leases of
others (`board.py`), for this peer's own claims (`runs.py`)? A review may write, which is reviewed in turn. Then what can start
is started, whose lease is over is declared lost (`_mourn`), and free capacity bids for waiting tasks (`_bid`). Last, one
`Persist` and one push to every live peer carry all that this input changed (`_flush`): one commit for an input, whatever it
causes. So a task submitted at the peer that will run it is stored and claimed in one commit.

Limits: TASKS_LIVE_MAX waiting or running tasks, 32 claims for one input, and those of `replica.py` and `pushes.py`.

Reading order: the inputs, then `_finish`, `_review`, `_mourn`, `_bid`, `_flush`.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import inf
from typing import TYPE_CHECKING

from meshq.config import ARRAY_TASKS_MAX
from meshq.errors import TaskFailed, UsageError
from meshq.ids import Dot, Fence, PeerId, TaskId
from meshq.ledger.admission import admit
from meshq.ledger.antientropy import AntiEntropy, note_of
from meshq.ledger.board import Board
from meshq.ledger.claiming import Deal
from meshq.ledger.effects import (
    Effect,
    EpochMinted,
    PeerView,
    Persist,
    Push,
    PushReply,
    RowChanged,
    SendPush,
    SyncPage,
    SyncRequest,
)
from meshq.ledger.journal import Journal
from meshq.ledger.placement import Capacity
from meshq.ledger.pushes import Pushes, batches
from meshq.ledger.replica import Replica
from meshq.ledger.row import Cancel, Lost, Row, Vector
from meshq.ledger.runs import Runs
from meshq.ledger.sessions import Sessions
from meshq.ledger.timing import LedgerConfig
from meshq.task import Outcome, TaskSpec, Telemetry

if TYPE_CHECKING:
    from random import Random

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
        self._replica = Replica(me, ledger_epoch, rows, vector, floors)
        self._journal = Journal(self._replica)
        self._sessions = Sessions(me, config, now)
        self._pushes = Pushes()
        self._sync = AntiEntropy(config, rng, now)
        self._counters: Counter[str] = Counter()
        self._board = Board(me, config, rng, self._sessions)
        self._runs = Runs(me, config, self._journal, self._board, self._sessions, self._pushes)
        self._leaving = False
        # Bidding
        self._turn = 0
        self._last_free = Capacity(0, 0, 0, 0)
        self._capacity_since = now
        self._look_again_at = inf
        self._mourn_at = inf
        self._now = now
        self._push_number = 0
        self._stored: dict[TaskId, dict[PeerId, None]] = {}
        for row in self._replica.rows():
            self._board.index(now, row)

    # ---- commands

    def set_wall_offset(self, now: float, wall: float) -> None:
        """What the wall clock shows now: for display, nothing is decided by it."""
        self._journal.wall_offset = wall - now

    def submit(self, now: float, specs: Sequence[TaskSpec], hold: bool) -> tuple[tuple[TaskId, ...], list[Effect]]:
        """New tasks, in order. Unless `hold`, each must fit a peer that is known.

        Raises Unplaceable, UsageError (a spec is too large) or TaskFailed (too many tasks); then nothing was stored.
        """
        admit(specs, hold, self._sessions.views.values(), live=len(self._board), room=self._replica.room)
        tasks = []
        for spec in specs:
            dot, row = self._replica.create(spec, self._board.next_position(spec.queue))
            self._journal.wrote(row.task, dot)
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
        self._journal.write(task, Cancel(by=by, at=self._journal.wall(now)))
        return self._finish(now)

    def adopt(self, now: float, fences: Sequence[Fence]) -> list[Effect]:
        """Once, at the start: the claims of this peer that exec still runs or can still report. Every other one is lost.

        Nothing is claimed before.
        """
        self._runs.adopt(fences)
        return self._finish(now)

    def leave(self, now: float) -> list[Effect]:
        """Claim nothing more, and give back what is claimed: what runs is stopped, others may take it."""
        self._leaving = True
        self._runs.leave(now)
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
        unstarted = self._runs.unstarted()
        if came and unstarted:  # they must ack these claims too, and the first push did not go to them
            self._journal.after += self._send(now, came, unstarted)
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
        self._journal.durable |= any(self._replica.get(row.task) is None for row in push.rows)
        if not (refused := self._journal.absorb(push.rows)):
            self._replica.cover(push.dots)
        for row in push.rows:
            self._runs.pushed(peer, row)
        effects = self._finish(now)
        return PushReply(number=push.number, rows=tuple(self._replica.better(push.rows)), refused=refused), effects

    def handle_push_reply(self, now: float, peer: PeerId, reply: PushReply) -> list[Effect]:
        acked = self._pushes.replied(now, peer, reply.number)
        if acked is None:
            self._counters["push_replies_unexpected"] += 1
        else:
            self._sessions.heard(acked.sent_at)
            self._note_acks(peer, acked.push, frozenset(reply.refused))
        self._journal.absorb(reply.rows)
        return self._finish(now)

    def handle_push_failed(self, now: float, peer: PeerId, number: int) -> list[Effect]:
        self._pushes.failed(now, peer, number)
        return self._finish(now)

    def handle_sync_request(self, now: float, peer: PeerId, request: SyncRequest) -> SyncPage:
        """The rows that the peer lacks. The page may be sent once all effects so far are carried out."""
        return self._replica.page(request)

    def handle_sync_page(self, now: float, peer: PeerId, page: SyncPage) -> list[Effect]:
        accepted = not self._journal.absorb(page.rows)
        progress = self._sync.handle_page(now, peer, page, accepted=accepted)
        if progress is None:
            self._counters["sync_pages_unexpected"] += 1
        else:
            self._journal.after += progress.more
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
        self._runs.slow(now, token)
        return self._finish(now)

    def handle_ready(self, now: float, token: Fence) -> list[Effect]:
        """Source and environment of this claim are there."""
        self._runs.ready(token)
        return self._finish(now)

    def handle_ended(self, now: float, token: Fence, outcome: Outcome) -> list[Effect]:
        """The attempt is over, for whatever reason."""
        self._runs.ended(token, outcome)
        return self._finish(now)

    # ---- time

    def deadline(self) -> float:
        """When `handle_timeout` has something to do."""
        free_at = self._sessions.blocked_until(self._now)
        blocked = free_at if free_at > self._now else inf
        return min(
            self._pushes.deadline(),
            self._sync.deadline(),
            self._runs.deadline(self._now),
            self._look_again_at,
            self._mourn_at,
            blocked,
        )

    def handle_timeout(self, now: float) -> list[Effect]:
        self._journal.after += self._pushes.handle_timeout(now)
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
        of_runs = Counter(ends_of_ended_claims=self._runs.ends_of_ended_claims)
        return self._counters + self._replica.counters + self._pushes.counters + of_runs

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
        return "" if row is None else self._board.waiting_reason(now, row, self._runs.rows())

    def check(self) -> None:
        """Assert every invariant."""
        assert self._journal.empty, "an input was not finished"
        self._replica.check()
        self._board.check(self._replica.rows())
        self._runs.check()

    # ---- inside: one input

    def _finish(self, now: float) -> list[Effect]:
        """Carry an input to its end: everything that follows from it now, then the effects."""
        self._now = now
        self._settle(now)
        self._runs.start(now)
        self._mourn(now)
        self._settle(now)
        self._bid(now)
        self._settle(now)
        self._mourn_at = self._next_mourning(now)
        self._journal.after += self._sync.begin(now, self._replica.vector)
        return self._flush(now)

    def _settle(self, now: float) -> None:
        """Review what has changed, and what that changes in turn."""
        touched, changed = self._journal.touched, self._journal.changed
        while touched:
            task = next(iter(touched))
            del touched[task]
            changed[task] = None
            self._runs.review(now, task, self._board.index(now, self._journal.row(task)))

    def _flush(self, now: float) -> list[Effect]:
        journal = self._journal
        effects: list[Effect] = []
        if changes := self._replica.take_changes():
            if changes.minted is not None:
                effects.append(EpochMinted(changes.minted))
            durable = journal.durable or bool(journal.fresh)
            effects.append(Persist(changes.rows, changes.vector, changes.floors, durable))
        effects += self._send(now, self._sessions.alive, journal.fresh)
        effects += journal.after
        effects += [RowChanged(task) for task in journal.changed]
        journal.clear()
        return effects

    def _send(self, now: float, peers: Sequence[PeerId], writes: Mapping[Dot, TaskId]) -> list[SendPush]:
        """Push the rows of these writes, in as many pushes as their size demands."""
        sends: list[SendPush] = []
        dots_of: dict[TaskId, list[Dot]] = {}
        for dot, task in writes.items() if peers else ():
            dots_of.setdefault(task, []).append(dot)
        for rows in batches(self._journal.row(task) for task in dots_of):
            self._push_number += 1
            dots = tuple(sorted(dot for row in rows for dot in dots_of[row.task]))
            sends += self._pushes.send(now, peers, Push(number=self._push_number, rows=rows, dots=dots))
        return sends

    def _note_acks(self, peer: PeerId, push: Push, refused: frozenset[TaskId]) -> None:
        self._counters["rows_refused_elsewhere"] += len(refused)
        dots = frozenset(push.dots)
        for row in (row for row in push.rows if row.task not in refused):
            self._runs.acked(peer, row.task, dots)
            if row.birth in dots:
                self._stored.setdefault(row.task, {})[peer] = None
                self._journal.changed[row.task] = None
        while len(self._stored) > ARRAY_TASKS_MAX:
            del self._stored[next(iter(self._stored))]

    # ---- inside: mourning, bidding

    def _mourn(self, now: float) -> None:
        """Declare lost what is over, unless this peer may be the one that is cut off."""
        if self._next_mourning(now) > now:
            return
        for mourning in self._board.mournings():
            if mourning.due > now:
                return
            lost = Lost(claim=mourning.dot, reason=mourning.reason, at=self._journal.wall(now))
            self._journal.write(mourning.task, lost)

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
        if mine is None or not self._runs.adopted or self._leaving or self._sessions.blocked(now):
            return
        free = self._board.free_of(self._me, self._runs.rows())
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
            self._runs.claim(now, task, attempt)
            self._turn += 1
