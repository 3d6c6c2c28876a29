"""What a watcher who sees every machine notes, and what must be true of it.

The watcher is told of every commit, start, end, belief and answer, and raises `Violation` at once where a rule is broken for
good. What can only be judged in the end (nothing lost, everything equal) stands in `final_checks`.

Of the promises P1 to P5, the invariants I1 to I13 and the rules of liveness L1 to L6 the tables below say what each one is and
where it is checked.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from meshq.config import SYNC_BYTES_MAX, SYNC_ROWS_MAX
from meshq.exec.worker import Exited
from meshq.gossip.member import Member
from meshq.ids import ACTOR_PEER_CHARS, Dot, Fence, ObjectId, PeerId, TaskId, split_fence
from meshq.ledger.core import Ledger
from meshq.ledger.holder import Reading, read
from meshq.ledger.placement import could_ever
from meshq.ledger.rendezvous import claim_weight
from meshq.ledger.replica import includes
from meshq.ledger.row import Back, Claim, Ended, Fact, Lost, Row, Started, covers, merge_vectors
from meshq.ledger.table import row_bytes
from meshq.task import Claimed, EndKind, Isolation, Status, Telemetry
from tests.simulator.world import World

if TYPE_CHECKING:
    from tests.simulator.machine import Disk

INVARIANTS = {
    "P1": "nothing acknowledged is lost: `final_checks`",
    "P2": "a claim starts user code at most once: `started`",
    "P3": "one live attempt of each task, where nothing excuses two: `started`; what has ended is stopped: `check_running`",
    "P4": "one result, a true one, and no success is forgotten: `_check_exit`, `check_result`, `check_finished`",
    "P5": "in the end everything is equal: `Simulation.settled`, `final_checks`",
    "I1": "merging is commutative, associative and idempotent: laws in tests/ledger/test_row.py",
    "I2": "what the vector covers is in the rows, or purged: `check_vector`",
    "I3": "a dot never names two writes: `committed`",
    "I4": "equal vectors and floors, equal rows: `check_equal`, `final_checks`",
    "I5": "no claim that knew another one of its attempt wins: `_check_holder`",
    "I6": "a final status stays, but for a success or what was running all the time: `row_changed`",
    "I7": "a task that was purged does not come back and never runs again: `started`, `row_changed`",
    "I8": "under `--on-isolation stop` two attempts are never live at once: `started`",
    "I9": "nobody starts what is not committed: `told_to_start`",
    "I10": "a result is only ever replaced by one of a lower attempt or weight: `row_changed`",
    "I11": "nobody is believed to be what it never was: `believes`",
    "I12": "packets, pushes and queues stay within their limits: `GossipPeer`, `MeshPeer.feed`, `check_push`",
    "I13": "what was tampered with or repeated changes nothing: tests/trust/test_seal.py; replayed packets: `Faults`",
}
LIVENESS = {
    "L1": "memberships are equal within the longest suspicion and three push/pulls: `Liveness`",
    "L2": "ledgers are equal within 3 x log2 N rounds of anti-entropy: `Liveness`",
    "L3": "every task that somebody could run ends: `Simulation.settled`; nobody claims without end: `_new_fact`",
    "L4": "what a machine ran that is gone is held lost within detection, grace and three seconds: `Liveness`",
    "L5": "of two live attempts one is left soon after a healing: `Liveness`; no claim is lost and back for ever: `_new_fact`",
    "L6": "machines that are ill for ever stop nobody else: all of these, in liveness mode",
}

STORY_LINES = 90
CLAIMS_PER_TASK_MAX = 20  # on average; 5 losses and 2 retries for each, and concurrent claims, make half of it
BACKS_MAX = 10  # of one claim: every other peer may hold it lost once at the same time, and some of them twice
STOPPED_WITHIN = 12.0  # after its claim ended: SIGTERM, 10 s, SIGKILL
READINGS_MAX = 20_000
WAKING_SECONDS = 1.0  # a machine that slept too long ends what must not run any more within so long after it wakes


class Violation(AssertionError):
    """A rule of the mesh was broken; the message says which, where and when."""


@dataclass(frozen=True, slots=True)
class Event:
    """A line of the story. `task` is empty where it concerns no single one."""

    at: float
    place: str
    task: str
    text: str


class Watcher:
    def __init__(self, world: World, *, one_live_attempt: bool, claims_max: int) -> None:
        """`one_live_attempt`: nothing happens in this run that excuses two live attempts of one task (P3)."""
        self.world = world
        self.one_live_attempt = one_live_attempt
        self._claims_max = claims_max
        self.events: list[Event] = []
        self.counts: Counter[str] = Counter()
        self.facts: dict[Dot, tuple[TaskId, Fact | None]] = {}  # every write that was ever committed by its writer
        self.acknowledged: dict[TaskId, str] = {}  # to its user, with at least one copy elsewhere; by which machine
        self.stored_here_only: dict[TaskId, str] = {}  # its user was told so; by which machine
        self.lost_after: list[float] = []  # from the death of a machine to the `Lost` of what it ran
        self._starts: Counter[Fence] = Counter()
        self._live: dict[TaskId, dict[Fence, str]] = {}
        self._finished: dict[Fence, tuple[str, TaskId]] = {}  # ended by itself with 0: nobody may lose that
        self._names: dict[str, str] = {}  # by the head of the peer id
        self._incarnations: dict[PeerId, tuple[int, int]] = {}
        self._exit_codes: dict[Fence, int] = {}
        self._backs: Counter[Dot] = Counter()
        self._over_since: dict[Fence, float] = {}
        self._read: dict[tuple[TaskId, tuple[tuple[str, int], ...]], Reading] = {}
        self._readings: dict[str, dict[TaskId, Reading]] = {}
        self.died: dict[PeerId, float] = {}  # machines that are gone for good, since when
        self.purged: dict[TaskId, float] = {}  # when somebody forgot it first
        self._purged_at: dict[str, dict[TaskId, None]] = {}  # by machine
        self.forgetful: dict[str, None] = {}  # machines that lost a part of their disks, or all of it
        self.forged: dict[TaskId, None] = {}  # tasks about which a liar has told lies: they may be as it says
        self.copies: dict[str, str] = {}  # machines that were made as copies, of which they are
        self.settings_forged = False  # and so are the settings: each peer was told other ones
        self.slandered: dict[PeerId, None] = {}  # peers to which it has ascribed what they never said
        self._frozen_until: dict[str, float] = {}
        self._writes: dict[str, dict[int, TaskId]] = {}  # by actor and seq
        self._covered: dict[str, dict[str, int]] = {}  # by machine: up to where `check_vector` has looked

    # ---- the story

    def note(self, place: str, text: str, task: TaskId | str = "") -> None:
        self.events.append(Event(self.world.now, place, str(task), text))
        self.world.trace(place, str(task), text)

    def lines(self, task: str = "") -> list[str]:
        """The whole story, those of other tasks left out if one is given."""
        events = [event for event in self.events if not task or event.task in ("", task)]
        return [f"  {e.at:9.3f} {e.place:<4} {e.task[:6]:<6} {e.text}" for e in events]

    def story(self, task: str = "") -> str:
        """The last events."""
        return "\n".join(self.lines(task)[-STORY_LINES:])

    def fail(self, rule: str, task: TaskId | str = "") -> None:
        raise Violation(f"at {self.world.now:.3f}: {rule}\n{self.story(str(task))}")

    def call(self, peer: PeerId, name: str) -> None:
        """The machine's name, for the story."""
        self._names[peer[:ACTOR_PEER_CHARS]] = name

    def _writer(self, dot: Dot) -> str:
        return self._names.get(dot.actor[:ACTOR_PEER_CHARS], "?")

    # ---- processes (P2, P3)

    def started(self, place: str, claimed: Claimed) -> None:
        self.note(place, f"user code starts under {short(claimed.fence)}", claimed.task)
        self.counts["starts"] += 1
        self._starts[claimed.fence] += 1
        if self._starts[claimed.fence] > 1:
            self.fail(f"P2: {claimed.fence} started user code {self._starts[claimed.fence]} times", claimed.task)
        live = self._live.setdefault(claimed.task, {})
        if claimed.task in self._purged_at.get(place, ()) or (claimed.task in self.purged and self.one_live_attempt):
            self.fail(f"I7: {place} starts a task that was forgotten at {self.purged[claimed.task]:.3f}", claimed.task)
        live[claimed.fence] = place
        if len(live) > 1:
            self.counts["overlaps"] += 1
            awake = {token: where for token, where in live.items() if not self._asleep(where)}
            told = ", ".join(f"{short(token)} on {where}" for token, where in live.items())
            if self.one_live_attempt:
                self.fail(f"P3: live at once: {told}", claimed.task)
            if claimed.spec.isolation == Isolation.STOP.value and len(awake) > 1:
                self.fail(f"I8: live at once under `stop`: {told}", claimed.task)

    def freeze(self, place: str, until: float) -> None:
        """No process of a task gets on there before then."""
        self._frozen_until[place] = until

    def _asleep(self, place: str) -> bool:
        return self.world.now < self._frozen_until.get(place, -WAKING_SECONDS) + WAKING_SECONDS

    def ended(self, place: str, claimed: Claimed, exit: Exited | None) -> None:
        how = "vanished" if exit is None else f"ended with {exit.exit_code}{' after ' + exit.stopped if exit.stopped else ''}"
        self.note(place, f"{short(claimed.fence)} {how}", claimed.task)
        del self._live[claimed.task][claimed.fence]
        if exit is not None:
            self._exit_codes[claimed.fence] = exit.exit_code
        if exit is not None and exit.exit_code == 0:
            self._finished[claimed.fence] = (place, claimed.task)

    def live(self) -> dict[TaskId, dict[Fence, str]]:
        """What runs now, by task, with the machine."""
        return {task: fences for task, fences in self._live.items() if fences}

    def never_begun(self) -> int:
        """Claims of tasks that a user cancelled before their user code started."""
        begun = {split_fence(fence)[1] for fence in self._starts}
        ends = (fact for _, fact in self.facts.values() if isinstance(fact, Ended))
        return len({end.claim for end in ends if end.outcome.kind is EndKind.CANCELLED} - begun)

    def started_tasks(self) -> Collection[TaskId]:
        """Whose user code was ever started."""
        return self._live.keys()

    def told_to_start(self, place: str, fence: Fence, rows: dict[TaskId, Row]) -> None:
        """I9: nobody starts what is not committed."""
        _, claim = split_fence(fence)
        owner = self.copies.get(place, place)
        known = dict(fact for row in rows.values() for fact in row.facts if self._writer(fact[0]) == owner)
        started = any(isinstance(fact, Started) and fact.claim == claim for fact in known.values())
        if not isinstance(known.get(claim), Claim) or not started:
            self.fail(f"I9: {place} starts {fence} without a committed claim and start")

    def check_running(self, place: str, core: Ledger, running: Iterable[tuple[Claimed, bool]]) -> None:
        """What runs here is known here: what has ended is stopped, what others hold lost is taken back.

        `running` says of each whether it was told to end.
        """
        for claimed, stopping in running:
            _, dot = split_fence(claimed.fence)
            row = core.row(claimed.task)
            reading = self.read(row) if row is not None else None
            if reading is None or dot not in reading.claims or claimed.task in self.forged:
                continue  # its row comes with a sync
            if dot not in reading.ended and reading.cancel is None:
                if dot in reading.lost and not stopping:
                    self.fail(
                        f"P3: {place} runs {short(claimed.fence)}, knows that it is held lost, and says nothing", claimed.task
                    )
                continue
            since = max(self._over_since.setdefault(claimed.fence, self.world.now), self._frozen_until.get(place, 0.0))
            if self.world.now - since > STOPPED_WITHIN:
                self.fail(f"P3: {place} goes on with {short(claimed.fence)}, which has ended or is cancelled", claimed.task)

    def check_no_duplicates(self, places: Collection[str]) -> None:
        """L5: of attempts that a fault had let run at once on these machines, one is left."""
        for task, everywhere in self.live().items():
            fences = {token: place for token, place in everywhere.items() if place in places}
            if len(fences) > 1:
                self.fail(f"L5: still live at once: {fences}", task)

    def read(self, row: Row) -> Reading:
        """The row, read once for all who show it. By its vector: that rows of one vector are one is a rule of its own (I4)."""
        key = (row.task, tuple(sorted(row.vector.items())))
        if key not in self._read:
            if len(self._read) >= READINGS_MAX:
                self._read.clear()
            self._read[key] = read(row)
        return self._read[key]

    # ---- writes (I2, I3) and what they mean (I6)

    def committed(self, place: str, rows: Iterable[Row], purged: Iterable[TaskId] = ()) -> None:
        self._purged_at.setdefault(place, {}).update(dict.fromkeys(purged))
        for row in rows:
            if row.task in self.forged:
                continue
            if row.birth not in self.facts:
                self.facts[row.birth] = (row.task, None)
                self._writes.setdefault(row.birth.actor, {})[row.birth.seq] = row.task
                self.note(place, f"submitted {row.spec.name}", row.task)
            for dot, fact in row.facts:
                known = self.facts.get(dot)
                if known is None:
                    self._new_fact(place, row.task, dot, fact)
                elif known[1] is not fact and known != (row.task, fact):
                    self.fail(f"I3: {dot} names {known[1]} and {fact}", row.task)

    def forgets(self, place: str, tasks: Iterable[TaskId]) -> None:
        """I7: only what is over is forgotten. A second attempt that is cut off may still run then."""
        for task in tasks:
            if task not in self.purged:
                self.purged[task] = self.world.now
                self.counts["purged"] += 1
                self.note(place, "forgets it", task)
            if self._live.get(task) and self.one_live_attempt:
                self.fail(f"I7: {place} forgets a task that runs: {self._live[task]}", task)

    def _new_fact(self, place: str, task: TaskId, dot: Dot, fact: Fact) -> None:
        self._writes.setdefault(dot.actor, {})[dot.seq] = task
        if self._writer(dot) != self.copies.get(place, place):
            self.fail(f"I3: {place} has {fact} of {self._writer(dot)}, who never committed it", task)
        if isinstance(fact, Ended) and fact.outcome.exit_code is not None:
            self._check_exit(task, fact)
        self.facts[dot] = (task, fact)
        self.counts[type(fact).__name__.lower()] += 1
        if isinstance(fact, Ended):
            self.counts[f"ended {fact.outcome.kind.value}"] += 1
        if isinstance(fact, Back):
            self._backs[fact.claim] += 1
            if self._backs[fact.claim] > BACKS_MAX:
                self.fail(f"L5: {short_dot(fact.claim)} is held lost and taken back without end", task)
        if self.counts["claim"] > self._claims_max:
            self.fail("L3: peers claim without end", task)
        self.note(place, f"writes {describe(fact)} as {short_dot(dot)}", task)

    def _check_exit(self, task: TaskId, end: Ended) -> None:
        """P4: no result that never was."""
        exits = {code for fence, code in self._exit_codes.items() if split_fence(fence)[1] == end.claim}
        if end.outcome.exit_code not in exits or (end.outcome.kind is EndKind.SUCCEEDED and exits != {0}):
            self.fail(f"P4: {end.outcome} is recorded, and user code ended with {exits or 'nothing'}", task)

    def row_changed(self, place: str, task: TaskId, row: Row | None) -> None:
        """What a peer shows of a task is another thing than before."""
        readings = self._readings.setdefault(place, {})
        if task in self.forged:
            return
        if row is None:  # forgotten
            readings.pop(task, None)
            return
        if task in self._purged_at.get(place, ()):
            self.fail(f"I7: {place} had forgotten a task and has it again", task)
        before, reading = readings.get(task), self.read(row)
        readings[task] = reading
        self._check_holder(place, reading)
        if before is None:
            return
        if before.result is not None and before.result != reading.result:
            self._check_new_result(place, before, reading)
        if before.status is reading.status:
            return
        self.world.trace(place, task, reading.status)
        if before.status.final and not _may_follow(before, reading):
            self.fail(f"I6: at {place} a task that had {before.status} is {reading.status}", task)

    def _check_holder(self, place: str, reading: Reading) -> None:
        """I5: whoever holds the task had not seen another legal claim of the attempt."""
        holder = reading.claims.get(reading.holder) if reading.holder is not None else None
        if holder is None:
            return
        for dot, claim in reading.legal.items():
            if dot != reading.holder and claim.attempt == holder.attempt and covers(holder.seen, dot):
                self.fail(f"I5: at {place} a claim holds the task that had seen {short_dot(dot)}", reading.row.task)

    def _check_new_result(self, place: str, before: Reading, now: Reading) -> None:
        """I10: of two successes the one of the lower attempt, or of the lower weight, is the result."""
        assert before.result is not None
        if now.result is None:
            self.fail(f"I10: at {place} a result was shown, and is none any more", now.row.task)
            return
        self.counts["results replaced"] += 1
        ranks = [
            (claim.attempt, claim_weight(now.row.task, claim.attempt, claim.peer))
            for claim in (before.claims[before.result[0]], now.claims[now.result[0]])
        ]
        if ranks[0] < ranks[1]:
            self.fail(f"I10: at {place} a result was replaced by one of a higher attempt or weight", now.row.task)

    def forget(self, place: str) -> None:
        """The agent died: what it knew and had not committed is gone."""
        self._readings.pop(place, None)
        self._covered.pop(place, None)

    def begins(self, place: str, rows: Collection[TaskId]) -> None:
        """An agent finds these on its disk; what was forgotten by a commit that the power cut took back is there again."""
        for task in rows:
            self._purged_at.get(place, {}).pop(task, None)

    def disk_changed(self, place: str) -> None:
        """The machine's database is gone or an old one."""
        self.forgetful[place] = None
        self._purged_at.pop(place, None)

    def check_vector(self, place: str, core: Ledger, *, anew: bool = False) -> None:
        """I2: what the vector covers is in the rows, or its task was forgotten. Looks at what is new since the last time."""
        covered = {} if anew else self._covered.setdefault(place, {})
        for actor, seq in core.vector.items():
            first, writes = covered.get(actor, 0), self._writes.get(actor, {})
            for number in range(first + 1, seq + 1):
                task = writes.get(number)
                if task is None or task in self.purged or task in self.forged:
                    continue
                row = core.row(task)
                if row is None or row.vector.get(actor, 0) < number:
                    self.fail(f"I2: {place} covers {actor[:4]}.{number}, and its row does not", task)
            covered[actor] = max(first, seq)

    def check_counters(self, place: str, counters: Mapping[str, int]) -> None:
        """What a core counts as a bug never happens. A liar can bring about all of it."""
        bugs = {name: count for name, count in counters.items() if name.startswith("bug_") and count}
        if bugs and not self.forged:
            self.fail(f"I2: {place} has counted {bugs}")

    def check_equal(self, disks: Mapping[str, "Disk"]) -> None:
        """I4: what was made by the same writes is the same. A row may be ahead of the vector: that is left to later looks."""
        alike: dict[tuple[tuple[str, int], ...], tuple[str, Disk]] = {}
        for place, disk in disks.items():
            other, first = alike.setdefault(tuple(sorted(disk.vector.items())), (place, disk))
            for task, row in disk.rows.items() if first is not disk else ():
                twin = first.rows.get(task, row)
                if twin is row or twin == row or task in self.forged:
                    continue
                if includes(disk.vector, merge_vectors(row.vector, twin.vector)):
                    self.fail(f"I4: {other} and {place} have seen the same writes, and have other rows", task)

    def check_push(self, place: str, rows: Sequence[Row]) -> None:
        """I12: no push is larger than a receiver takes."""
        if len(rows) > SYNC_ROWS_MAX or (len(rows) > 1 and sum(map(row_bytes, rows)) > SYNC_BYTES_MAX):
            self.fail(f"I12: {place} pushes {len(rows)} rows at once")

    # ---- beliefs (I11)

    def is_now(self, peer: PeerId, member: Member) -> None:
        """What the owner itself says it is."""
        self._incarnations[peer] = max(self._incarnations.get(peer, (0, 0)), (member.epoch, member.incarnation))

    def believes(self, place: str, member: Member) -> None:
        if member.peer not in self.slandered and (member.epoch, member.incarnation) > self._incarnations[member.peer]:
            self.fail(f"I11: {place} believes in {member}, which its owner never was")
        self.note(place, f"holds {member.name} {member.liveness.name.lower()} ({member.epoch}.{member.incarnation})")

    # ---- in the end

    def check_result(self, place: str, task: TaskId, row: Row | None, readings: Sequence[Reading]) -> None:
        """P4, for a machine that lives in the end: one result everywhere, and no success forgotten."""
        if len({reading.result for reading in readings}) > 1:
            self.fail(f"P4: {len(readings)} peers show different results", task)
        reading = readings[0]
        if reading.status is not Status.SUCCEEDED and any(e.kind is EndKind.SUCCEEDED for e in reading.ended.values()):
            self.fail(f"P4: a task with a success is {reading.status}", task)

    def check_finished(self, alive: dict[str, Ledger]) -> None:
        """P4: user code that ended by itself with 0, on a machine that lives, is recorded as what it was.

        Superseded is allowed: the claim had lost the task to another one when its end was seen.
        """
        for fence, (place, task) in self._finished.items():
            core = alive.get(place) if place not in self.forgetful else None
            row = core.row(task) if core is not None else None
            if core is None or (task in self.purged and row is None) or task in self.forged:
                continue
            end = read(row).ended.get(split_fence(fence)[1]) if row is not None else None
            if end is None or end.kind not in (EndKind.SUCCEEDED, EndKind.SUPERSEDED):
                self.fail(f"P4: {short(fence)} succeeded on {place}, and is recorded as {end and end.kind.value}", task)


def _may_follow(before: Reading, now: Reading) -> bool:
    """A success is the one status that replaces others; whatever runs after all is shown as running."""
    if before.status is Status.SUCCEEDED:
        return False
    return now.status is Status.SUCCEEDED or now.running or (before.status, now.status) == (Status.FAILED, Status.CANCELLED)


def final_checks(
    watcher: Watcher, alive: dict[str, Ledger], telemetry: Sequence[Telemetry], sources: Collection[ObjectId],
    elsewhere: Collection[TaskId], startable: Collection[TaskId],
) -> None:  # fmt: skip
    """P1, P4, P5, I2 and I4, over the ledgers of all agents that must be equal in the end, by the names of their machines.

    `sources` are those that one of them has; `elsewhere` are tasks on the disks of machines that are ill; `startable` are those
    that voters don't keep from starting.
    """
    first, *others = alive.values()
    for place, core in alive.items():
        core.check()
        watcher.check_counters(place, core.counters)
        watcher.check_vector(place, core, anew=True)
    rows = {row.task: row for row in first.tasks()}
    for core in others:
        if core.vector != first.vector:
            watcher.fail("P5: the vectors differ")
        for row in core.tasks():
            if rows.get(row.task, row) != row and row.task not in watcher.forged:
                watcher.fail("I4: equal vectors, and other rows", row.task)
        if core.settings != first.settings and not watcher.settings_forged:
            watcher.fail("I4: equal vectors, and other settings")
    here_only = {task: place for task, place in watcher.stored_here_only.items() if place in alive}
    kept = watcher.acknowledged | {task: place for task, place in here_only.items() if place not in watcher.forgetful}
    for task in kept:
        if not any(task in known for known in (rows, watcher.purged, elsewhere, watcher.forged)):
            watcher.fail(f"P1: {task} was acknowledged and is gone", task)
    _check_results(watcher, alive, telemetry, sources, startable)
    watcher.check_finished(alive)


def _check_results(
    watcher: Watcher, alive: dict[str, Ledger], telemetry: Sequence[Telemetry], sources: Collection[ObjectId],
    startable: Collection[TaskId],
) -> None:  # fmt: skip
    """P4 and L3."""
    for row in next(iter(alive.values())).tasks():
        task = row.task
        if task in watcher.forged:
            continue
        watcher.check_result("", task, row, [read(core_row) for core in alive.values() if (core_row := core.row(task))])
        commit = row.spec.source.commit
        runnable = (
            task in startable
            and (commit is None or commit in sources)
            and any(could_ever(row.spec.needs, row.queue.value, told) for told in telemetry)
        )
        if runnable and not read(row).status.final:
            watcher.fail(f"L3: a task that {len(alive)} peers could run is {read(row).status}", task)


def describe(fact: Fact) -> str:
    match fact:
        case Claim():
            return f"a claim for attempt {fact.attempt}"
        case Ended():
            return f"{fact.outcome.kind.value} of {short_dot(fact.claim)} ({fact.outcome.reason})"
        case Lost():
            return f"lost of {short_dot(fact.claim)} ({fact.reason})"
        case _:
            claim = getattr(fact, "claim", None)
            return type(fact).__name__.lower() + (f" of {short_dot(claim)}" if claim else "")


def short_dot(dot: Dot) -> str:
    return f"{dot.actor[:4]}.{dot.seq}"


def short(fence: Fence) -> str:
    attempt, dot = split_fence(fence)
    return f"{attempt}.{short_dot(dot)}"
