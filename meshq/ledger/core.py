"""The ledger of one peer: what shall be done, and who does it.

Problem. Every peer holds all tasks and any may vanish. A task must run once when nothing goes wrong, must run again when its
machine is gone, and must never be lost or get two results, with no server to ask and no clock to trust.

Invariants
  - Whatever is sent, prepared, started or answered was committed first: `Persist` precedes it in the list of effects.
  - User code of a claim starts only while the claim holds the task by the rules of `holder.py`, after `Started` is committed.
  - Only the peer of a claim ends it or takes it back; others may only declare it lost.
  - Queue, indexes and own claims are functions of the rows and of what exec reported (`check`).

Algorithm. Inputs change rows. Each changed row is reviewed (`_settle`): what does it mean now for the queues, for the leases of
others (`board.py`), for this peer's own claims (`runs.py`)? A review may write, which is reviewed in turn. Then what can start
is started, whose lease is over is declared lost (`_mourn`), and free capacity bids for waiting tasks (`bidding.py`). Last, one
`Persist` and one push to every live peer carry all that this input changed (`_flush`): one commit for an input, whatever it
causes. So a task submitted at the peer that will run it is stored and claimed in one commit.

Limits: TASKS_LIVE_MAX waiting or running tasks, 32 claims for one input, and those of `replica.py` and `pushes.py`.

Reading order: the inputs, then `_finish`, `_settle`, `_mourn`, `_flush`.
"""

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import inf
from typing import TYPE_CHECKING

from meshq.config import ARRAY_TASKS_MAX
from meshq.ids import ACTOR_PEER_CHARS, Dot, Fence, PeerId, TaskId, actor_peer_prefix
from meshq.ledger.admission import admit
from meshq.ledger.antientropy import AntiEntropy
from meshq.ledger.authorship import Authorship
from meshq.ledger.bidding import Bidding
from meshq.ledger.board import Board, over
from meshq.ledger.buckets import RECENT_MAX, note_with
from meshq.ledger.catalog import Catalog
from meshq.ledger.donor import Donor
from meshq.ledger.effects import (
    Answer,
    Contents,
    Effect,
    EpochMinted,
    Grant,
    GrantReply,
    GrantRequest,
    PeerView,
    Persist,
    Push,
    PushReply,
    Question,
    RowChanged,
    SendPush,
    SyncOffer,
)
from meshq.ledger.forgetting import Forgetting
from meshq.ledger.grants import Grants
from meshq.ledger.holder import Reading
from meshq.ledger.journal import Journal
from meshq.ledger.moves import Place
from meshq.ledger.pushes import PUSH_ALL_MAX, Pushes, audience, batches, parts
from meshq.ledger.replica import Replica, includes
from meshq.ledger.requests import Requests
from meshq.ledger.retention import Shelf
from meshq.ledger.row import Lost, Row, Vector
from meshq.ledger.runs import Runs
from meshq.ledger.sessions import Sessions
from meshq.ledger.settings import NOTHING_SET, Settings
from meshq.ledger.steering import Steering
from meshq.ledger.timing import LedgerConfig
from meshq.task import Outcome, TaskSpec, Telemetry

if TYPE_CHECKING:
    from random import Random

CAME_ASKED = 3  # of the peers that come alive at once
AHEAD_MAX = 256  # rows that are passed on at a time when a peer comes or goes; of more all rows are compared
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
        settings: Settings = NOTHING_SET,
        grants: Mapping[TaskId, Grant] | None = None,
        *,
        new_actor: bool = False,
    ) -> None:
        """`new_actor`: nobody ever wrote or voted as the actor of this ledger epoch."""
        self._me = me
        self._config = config
        self._rng = rng
        self._sessions = Sessions(me, config, now)
        self._board = Board(me, config, self._sessions)
        self.catalog = Catalog()
        self._requests = Requests()
        self._shelf = Shelf(now)
        self._replica = Replica(me, ledger_epoch, self._indexed(now, rows), vector, floors, settings, rng)
        self._journal = Journal(self._replica)
        self._authorship = Authorship(me, self._replica, self._sessions)
        self._loose = True  # something is committed and may not be durable
        self._pushes = Pushes()
        self._sync = AntiEntropy(config, rng, self._replica, now)
        self._donor = Donor(self._replica, run=rng.getrandbits(48))
        self._counters: Counter[str] = Counter()
        self._grants = Grants(me, config, self._journal, self._board, self._sessions, grants or {}, now, new=new_actor)
        self._runs = Runs(me, config, self._journal, self._board, self._sessions, self._pushes, self._grants)
        self._forgetting = Forgetting(self._journal, self._board, self._runs, self.catalog, self._shelf)
        self._steering = Steering(self._journal, self._board, self._shelf)
        self._bidding = Bidding(me, config, self._board, self._sessions, self._runs, now)
        self._mourn_at = inf
        self._now = now
        self._push_number = 0
        self._stored: dict[TaskId, dict[PeerId, None]] = {}
        self._recent: deque[Dot] = deque(maxlen=RECENT_MAX)  # writes that were not pushed to everybody
        self._steering.heed_settings(now)

    # ---- commands

    def set_wall_offset(self, now: float, wall: float) -> None:
        """What the wall clock shows now: for display, and for how long ended tasks are displayed."""
        self._journal.wall_offset = wall - now
        self._shelf.set_wall_offset(wall - now)

    def submit(self, now: float, specs: Sequence[TaskSpec], hold: bool) -> tuple[tuple[TaskId, ...], list[Effect]]:
        """The tasks, in order. A request that is known already is the task that it was, which others confirm once more.

        Unless `hold`, each new one must fit a peer that is known. Raises Unplaceable, UsageError (a spec is too large) or
        TaskFailed (too many tasks); then nothing was stored.
        """
        new = [spec for spec in specs if self._requests.find(spec.request, self._replica) is None]
        admit(new, hold, self._sessions.views.values(), live=len(self._board), room=self._replica.room)
        tasks, again = [], dict[Dot, TaskId]()
        if new:
            self._replica.settle_author()
        for spec in specs:
            if (known := self._requests.find(spec.request, self._replica)) is not None:
                again[self._journal.row(known).birth] = known
                tasks.append(known)
                continue
            dot, row = self._replica.create(spec, self._board.next_position(spec.queue), self._grants.draw_voters(spec))
            self._journal.wrote(row.task, dot)
            self._index(now, row)
            tasks.append(row.task)
        if again:
            self._journal.durable = True
            self._journal.after += self._send(now, self._sessions.alive, again)
        return tuple(tasks), self._finish(now)

    def cancel(self, now: float, task: TaskId, by: str) -> list[Effect]:
        """Cancel the task; again does nothing. TaskFailed if it has ended otherwise, UsageError if there is no such task."""
        self._steering.cancel(now, task, by)
        return self._finish(now)

    def clear(self, now: float, queue: str, by: str, most: int) -> tuple[int, list[Effect]]:
        """Cancel the tasks that wait in the queue, at most so many; how many that were. To be repeated until it is 0."""
        count = self._steering.clear(now, queue, by, most)
        return count, self._finish(now)

    def move(self, now: float, task: TaskId, place: Place) -> list[Effect]:
        """Let a waiting task wait elsewhere. UsageError if there is no such task, TaskFailed if it does not wait (any more)."""
        self._steering.move(task, place)
        return self._finish(now)

    def change_settings(self, now: float, values: Mapping[str, str]) -> list[Effect]:
        """Set these names to these values, all in one write. UsageError or TaskFailed: nothing was changed."""
        self._steering.change_settings(now, values)
        return self._finish(now)

    def adopt(self, now: float, fences: Sequence[Fence]) -> list[Effect]:
        """Once, at the start: the claims of this peer that exec still runs or can still report. Every other one is lost.

        Nothing is claimed before.
        """
        self._runs.adopt(fences)
        self._settle(now)
        self._runs.drop_purged()
        return self._finish(now)

    def leave(self, now: float) -> list[Effect]:
        """Claim nothing more, and give back what is claimed: what runs is stopped, others may take it."""
        self._bidding.leaving = True
        self._runs.leave(now)
        return self._finish(now)

    # ---- what gossip says

    def handle_peers(self, now: float, views: Mapping[PeerId, PeerView]) -> list[Effect]:
        """All beliefs anew, this peer's own included."""
        came, gone = self._sessions.replace(now, views)
        self._board.peers_changed()
        for peer in gone:
            self._pushes.forget(peer)
            self._donor.forget(peer)
        self._sync.peers_changed(self._sessions.alive)
        for peer in self._rng.sample(came, min(CAME_ASKED, len(came))):  # the notes of the others tell whether to ask them
            self._sync.ask(peer)
            self._authorship.asked(now, peer)
        if came:  # they must ack these claims too, and the first push did not go to them
            self._journal.after += self._send(now, came, self._runs.announce_again(now))
        self._pass_on(now, self._sessions.alive if gone else came)
        return self._finish(now)

    def _pass_on(self, now: float, peers: Sequence[PeerId]) -> None:
        """Push what is ahead of the vector, settings too: no sync asks for it if its writer, and the gap before, is gone.

        Of more than are pushed at a time others each time; whoever gets them then has so many that it compares all
        (`handle_push`).
        """
        if not peers:
            return
        replica = self._replica
        ahead = sorted(replica.above(replica.vector))
        if len(ahead) > AHEAD_MAX:
            ahead = self._rng.sample(ahead, AHEAD_MAX)
        passed = [Push(number=0, rows=rows, dots=()) for rows in batches(self._journal.row(task) for task in ahead)]
        if not includes(replica.vector, replica.settings.vector):
            passed.append(Push(number=0, rows=(), dots=(), settings=replica.settings))
        for push in passed:
            self._push_number += 1
            self._journal.after += self._pushes.send(now, peers, replace(push, number=self._push_number))

    def handle_capacity(self, now: float, telemetry: Telemetry) -> list[Effect]:
        """This peer's own telemetry, before gossip carries it around."""
        self._sessions.told(telemetry)
        return self._finish(now)

    def handle_stall(self, now: float, seconds: float) -> list[Effect]:
        """This process did nothing for so long: what it believes may be of the past."""
        if self._sessions.stalled(now, seconds):
            self._counters["stalls"] += 1
            self._sync.drop_all()  # what was asked before the stall proves nothing
            alive = self._sessions.alive
            for peer in self._rng.sample(alive, min(VALIDATORS, len(alive))):
                self._sync.ask(peer)
        return self._finish(now)

    # ---- what other peers say

    def handle_push(self, now: float, peer: PeerId, push: Push) -> tuple[PushReply, list[Effect]]:
        """Merge; the reply may be sent once the effects' `Persist` is committed. PeerError: nothing but a counter changed."""
        self._pushes.check_limits(push)
        new = [row.task for row in push.rows if not self._replica.has(row.task)]
        refused = self._journal.absorb(push.rows)
        # Whoever submitted these counts on this disk. One that is known already may have come without an fsync.
        born = frozenset(push.dots)
        self._journal.durable |= any(row.birth in born or row.task in new for row in push.rows if row.task not in refused)
        if self._steering.absorb_settings(now, push.settings) and not refused:
            theirs = tuple(dot for dot in push.dots if actor_peer_prefix(dot.actor) == peer[:ACTOR_PEER_CHARS])
            self._counters["dots_of_others_left_to_syncs"] += len(push.dots) - len(theirs)  # of a request submitted again
            self._replica.cover(theirs, push.rows, push.settings)
            self._recent.extend(theirs[-RECENT_MAX:])
        for row in push.rows:
            self._runs.pushed(peer, row)
        if push.rows and not push.dots and len(tuple(self._replica.above(self._replica.vector))) >= AHEAD_MAX:
            self._sync.compare(peer)  # these were passed on, and there may be more
        purged = tuple(row.task for row in push.rows if row.task not in refused and not self._replica.has(row.task))
        effects = self._finish(now)
        better = tuple(self._replica.better(push.rows))
        return PushReply(number=push.number, rows=better, refused=refused, purged=purged), effects

    def handle_push_reply(self, now: float, peer: PeerId, reply: PushReply) -> list[Effect]:
        acked = self._pushes.replied(now, peer, reply.number)
        if acked is None:
            self._counters["push_replies_unexpected"] += 1
        else:
            self._sessions.heard(acked.sent_at)
            self._note_acks(peer, acked.push, frozenset(reply.refused) | frozenset(reply.purged))
            if reply.purged:
                self._sync.ask(peer)
                self._forgetting.heed_reply(acked.push, reply.purged)
        self._journal.absorb(reply.rows)
        return self._finish(now)

    def handle_push_failed(self, now: float, peer: PeerId, number: int) -> list[Effect]:
        self._pushes.failed(now, peer, number)
        return self._finish(now)

    def handle_sync_request(self, now: float, peer: PeerId, question: Question) -> Answer:
        """What the peer lacks, in parts. The answer may be sent once all effects so far are carried out.

        MalformedData if it is no sensible question; nothing was changed.
        """
        return self._donor.answer(now, peer, question)

    def handle_sync_rows(self, now: float, peer: PeerId, number: int, rows: Sequence[Row | None]) -> list[Effect]:
        """Some rows of the answer to the question of this number; None stands for one that could not be read."""
        unread = rows.count(None)
        self._counters["rows_refused_unreadable"] += unread
        readable = [row for row in rows if row is not None]
        refused = self._journal.absorb(readable)
        self._sync.handle_rows(peer, number, [row.task for row in readable], accepted=not (refused or unread))
        self._sessions.progressed(now)
        return self._finish(now)

    def handle_sync_answer(self, now: float, peer: PeerId, answer: Answer) -> list[Effect]:
        """The answer to a question of mine, after its rows."""
        if isinstance(answer, SyncOffer) and not self._steering.absorb_settings(now, answer.settings):
            self._sync.handle_rows(peer, answer.number, (), accepted=False)
        progress = self._sync.handle_answer(now, peer, answer)
        if progress is None:
            self._counters["sync_answers_unexpected"] += 1
            return self._finish(now)
        self._journal.after += progress.more
        if self._forgetting.finish_sync(progress):
            self._authorship.synced(progress.began_at)
        if isinstance(answer, SyncOffer):
            self._authorship.answered(peer)
        return self._finish(now)

    def handle_note(self, now: float, peer: PeerId, note: bytes) -> list[Effect]:
        """By gossip: a hash of what the peer has."""
        self._sync.heed(now, peer, note)
        return self._finish(now)

    def handle_sync_failed(self, now: float, peer: PeerId, number: int) -> list[Effect]:
        """The peer did not answer the question of this number. A later one still waits for its answer."""
        if self._sync.failed(peer, number):
            self._authorship.failed(peer)
        self._sync.hurry(now)
        return self._finish(now)

    # ---- what the disk says

    def tasks_after(self, task: str, count: int) -> list[TaskId]:
        """The next tasks in the order of their ids, whose rows may be looked for on the disk once all so far is committed."""
        return self._replica.tasks_after(task, count)

    def handle_damage(self, now: float, tasks: Sequence[TaskId]) -> list[Effect]:
        """The disk has lost the rows of these tasks: they are written again."""
        self._counters["rows_written_again"] += self._replica.write_again(tasks)
        self._journal.durable = True
        return self._finish(now)

    def contents(self) -> Contents:
        """All that is in memory, for a new database: the old one is damaged."""
        return self._replica.contents(self._grants.given)

    # ---- votes

    def handle_grant_request(self, now: float, peer: PeerId, request: GrantRequest) -> tuple[GrantReply, list[Effect]]:
        """Vote; the reply may be sent once the effects' `Persist` is committed. PeerError: state unchanged."""
        reply = self._grants.answer(now, peer, request)
        return reply, self._finish(now)

    def handle_grant_reply(self, now: float, peer: PeerId, reply: GrantReply) -> list[Effect]:
        self._grants.replied(now, peer, reply)
        return self._finish(now)

    def handle_grants_failed(self, now: float, peer: PeerId, number: int) -> list[Effect]:
        self._grants.failed(now, number)
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
        self._runs.ended(now, token, outcome)
        return self._finish(now)

    # ---- time

    def deadline(self) -> float:
        """When `handle_timeout` has something to do."""
        free_at = self._sessions.blocked_until(self._now)
        blocked = free_at if free_at > self._now else inf
        return min(
            self._pushes.deadline(),
            self._authorship.deadline(),
            self._sync.deadline(),
            self._runs.deadline(self._now),
            self._grants.deadline(),
            self._shelf.deadline(),
            self._bidding.look_again_at,
            self._mourn_at,
            blocked,
        )

    def handle_timeout(self, now: float) -> list[Effect]:
        self._grants.handle_timeout(now)
        self._journal.after += self._pushes.handle_timeout(now)
        self._sync.handle_timeout(now)
        self._forgetting.forget_old(now)
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
        """A hash of what I have, to be told by gossip; where pushes don't reach everybody, also the latest writes."""
        note = self._replica.note
        return note_with(note, self._recent) if len(self._sessions.alive) > PUSH_ALL_MAX else note

    @property
    def counters(self) -> Mapping[str, int]:
        """All that was refused, repeated or given up."""
        of_runs = Counter(
            ends_of_ended_claims=self._runs.ends_of_ended_claims, results_of_purged_tasks=self._runs.results_of_purged_tasks
        )
        of_syncs = self._sync.counters + self._donor.counters
        return self._counters + self._replica.counters + self._pushes.counters + of_syncs + self._grants.counters + of_runs

    def row(self, task: TaskId) -> Row | None:
        return self._replica.get(task)

    @property
    def settings(self) -> Settings:
        return self._replica.settings

    def waiting_in(self, queue: str) -> Iterator[TaskId]:
        """The tasks that wait in the queue, in running order."""
        return self._board.waiting_in(queue)

    def tasks(self) -> Iterator[Row]:
        """All rows, in no order that means anything."""
        return self._replica.rows()

    def starting_with(self, prefix: str) -> Iterator[TaskId]:
        """The tasks whose ids begin so, in order."""
        return self._replica.starting_with(prefix)

    def stored_on(self, task: TaskId) -> tuple[PeerId, ...]:
        """The other peers that have acknowledged a task submitted here."""
        return tuple(self._stored.get(task, ()))

    def voters(self, task: TaskId) -> tuple[str, ...]:
        """The names of those that must agree by a majority before the task starts; none if it may start anywhere."""
        row = self._replica.get(task)
        return () if row is None else tuple(map(self._sessions.name, row.voters))

    def holds_back(self, token: Fence) -> bool:
        """Whether the end of this attempt was reported and is not recorded yet: this peer must first prove its session, or get
        to know the task. Until then exec must not forget it."""
        return self._runs.holds_back(token)

    def position(self, task: TaskId) -> int | None:
        """From 1 in its queue, in running order; None unless queued."""
        return self._board.position(task)

    def waiting_reason(self, now: float, task: TaskId) -> str:
        """Why the task is where it is, for people."""
        row = self._replica.get(task)
        return "" if row is None else self._board.waiting_reason(now, row, self._runs.taken())

    def check(self) -> None:
        """Assert every invariant."""
        assert self._journal.empty, "an input was not finished"
        self._replica.check()
        self._board.check(self._replica.rows())
        self.catalog.check((row, self._board.reading(row).status) for row in self._replica.rows())
        self._runs.check()
        self._grants.check()

    # ---- inside: one input

    def _finish(self, now: float) -> list[Effect]:
        """Carry an input to its end: everything that follows from it now, then the effects."""
        self._now = now
        self._authorship.weigh(now)
        self._settle(now)
        if self._authorship.changed():  # others take the claims of the old one for lost
            self._runs.speak_again(now)
            self._settle(now)
        self._runs.end_held_back(now)
        self._settle(now)
        self._journal.after += self._grants.ask(now)
        self._runs.start(now)
        self._mourn(now)
        self._settle(now)
        self._bidding.bid(now)
        self._settle(now)
        self._journal.after += self._grants.ask(now)
        self._mourn_at = self._next_mourning(now)
        self._journal.after += self._sync.begin(now)
        return self._flush(now)

    def _settle(self, now: float) -> None:
        """Review what has changed, and what that changes in turn."""
        touched, changed = self._journal.touched, self._journal.changed
        while touched:
            task = next(iter(touched))
            del touched[task]
            changed[task] = None
            self._runs.review(now, task, self._index(now, self._journal.row(task)))

    def _index(self, now: float, row: Row) -> Reading:
        """What the row means, told to all who keep something of what rows mean."""
        reading = self._board.index(now, row)
        self.catalog.put(row, reading.status)
        self._requests.put(row)
        if over(reading):
            self._shelf.put(now, row)
        else:
            self._shelf.remove(row.task)
        return reading

    def _indexed(self, now: float, rows: Iterable[Row]) -> Iterator[Row]:
        """The rows, on their way into memory: to go through them once is work enough for a start."""
        for row in rows:
            self._index(now, row)
            yield row
        self._requests.loaded()

    def _flush(self, now: float) -> list[Effect]:
        journal = self._journal
        effects: list[Effect] = []
        grants = self._grants.take_changes()
        if changes := self._replica.take_changes():
            if changes.minted is not None:
                effects.append(EpochMinted(changes.minted))
            durable = journal.durable or bool(journal.fresh or journal.settings_dots or grants)
            effects.append(
                Persist(changes.rows, changes.vector, changes.floors, durable, changes.settings, grants, changes.purged)
            )
        elif grants or (journal.durable and self._loose):
            effects.append(Persist((), {}, {}, True, grants=grants))
        for effect in effects:
            if isinstance(effect, Persist):
                self._loose = not effect.durable
        self._recent.extend([*journal.fresh, *journal.settings_dots][-RECENT_MAX:])
        to = audience(self._rng, self._sessions.alive)
        effects += self._send(now, to, journal.fresh, tuple(journal.settings_dots))
        effects += journal.after
        effects += [RowChanged(task) for task in journal.changed]
        journal.clear()
        return effects

    def _send(
        self, now: float, peers: Sequence[PeerId], writes: Mapping[Dot, TaskId], settings_dots: tuple[Dot, ...] = ()
    ) -> list[SendPush]:
        """Push the rows of these writes, in as many pushes as their size demands; the settings with the first, if written."""
        sends: list[SendPush] = []
        for part in parts(writes, self._journal.row, self._replica.settings, settings_dots) if peers else ():
            self._push_number += 1
            sends += self._pushes.send(now, peers, replace(part, number=self._push_number))
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

    # ---- inside: mourning

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
