"""What a watcher who sees every machine notes, and what must be true of it.

The watcher is told of every commit, start, end, belief and answer, and raises `Violation` at once where a rule is broken for
good. What can only be judged in the end (nothing lost, everything equal) stands in `final_checks`.

The names are those of design section 2 (P1 to P5) and of the facts' list of invariants (I1 to I13, L1 to L5). What is not
here: I7 and I8 (nothing is purged and there are no voters yet), I1 and I13 (laws of the merge and of the seal, which have
tests of their own).
"""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from meshq.exec.worker import Exited
from meshq.gossip.member import Member
from meshq.ids import ACTOR_PEER_CHARS, Dot, Fence, ObjectId, PeerId, TaskId, split_fence
from meshq.ledger.core import Ledger
from meshq.ledger.holder import Reading, read
from meshq.ledger.placement import could_ever
from meshq.ledger.row import Back, Claim, Ended, Fact, Lost, Row, Started
from meshq.task import Claimed, EndKind, Status, Telemetry
from tests.simulator.world import World

STORY_LINES = 90
CLAIMS_MAX = 300  # in one run of at most 16 tasks; 5 losses and 2 retries for each, and concurrent claims, make half of it
BACKS_MAX = 10  # of one claim: every other peer may hold it lost once at the same time, and some of them twice
STOPPED_WITHIN = 12.0  # after its claim ended: SIGTERM, 10 s, SIGKILL


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
    def __init__(self, world: World, *, one_live_attempt: bool) -> None:
        """`one_live_attempt`: nothing happens in this run that excuses two live attempts of one task (P3)."""
        self.world = world
        self.one_live_attempt = one_live_attempt
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
        self._readings: dict[tuple[str, TaskId], Reading] = {}

    # ---- the story

    def note(self, place: str, text: str, task: TaskId | str = "") -> None:
        self.events.append(Event(self.world.now, place, str(task), text))
        self.world.trace(place, str(task), text)

    def story(self, task: str = "") -> str:
        """The last events, those of other tasks left out if one is given."""
        events = [event for event in self.events if not task or event.task in ("", task)]
        return "\n".join(f"  {e.at:9.3f} {e.place:<4} {e.task[:6]:<6} {e.text}" for e in events[-STORY_LINES:])

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
        live[claimed.fence] = place
        if len(live) > 1:
            self.counts["overlaps"] += 1
            if self.one_live_attempt:
                self.fail(f"P3: live at once: {', '.join(f'{short(f)} on {p}' for f, p in live.items())}", claimed.task)

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

    def told_to_start(self, place: str, fence: Fence, rows: dict[TaskId, Row]) -> None:
        """I9: nobody starts what is not committed."""
        _, claim = split_fence(fence)
        known = dict(fact for row in rows.values() for fact in row.facts if fact[0].actor == claim.actor)
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
            reading = read(row) if row is not None else None
            if reading is None or dot not in reading.claims:
                continue  # its row comes with a sync
            if dot not in reading.ended and reading.cancel is None:
                if dot in reading.lost and not stopping:
                    self.fail(
                        f"P3: {place} runs {short(claimed.fence)}, knows that it is held lost, and says nothing", claimed.task
                    )
                continue
            since = self._over_since.setdefault(claimed.fence, self.world.now)
            if self.world.now - since > STOPPED_WITHIN:
                self.fail(f"P3: {place} goes on with {short(claimed.fence)}, which has ended or is cancelled", claimed.task)

    def check_no_duplicates(self) -> None:
        """L5: of attempts that a fault had let run at once, one is left."""
        for task, fences in self.live().items():
            if len(fences) > 1:
                self.fail(f"L5: still live at once: {fences}", task)

    # ---- writes (I2, I3) and what they mean (I6)

    def committed(self, place: str, rows: Iterable[Row]) -> None:
        for row in rows:
            if row.birth not in self.facts:
                self.facts[row.birth] = (row.task, None)
                self.note(place, f"submitted {row.spec.name}", row.task)
            for dot, fact in row.facts:
                known = self.facts.get(dot)
                if known is None:
                    self._new_fact(place, row.task, dot, fact)
                elif known[1] is not fact and known != (row.task, fact):
                    self.fail(f"I3: {dot} names {known[1]} and {fact}", row.task)

    def _new_fact(self, place: str, task: TaskId, dot: Dot, fact: Fact) -> None:
        if self._writer(dot) != place:
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
        if self.counts["claim"] > CLAIMS_MAX:
            self.fail("L3: peers claim without end", task)
        self.note(place, f"writes {describe(fact)} as {short_dot(dot)}", task)

    def _check_exit(self, task: TaskId, end: Ended) -> None:
        """P4: no result that never was."""
        exits = {code for fence, code in self._exit_codes.items() if split_fence(fence)[1] == end.claim}
        if end.outcome.exit_code not in exits or (end.outcome.kind is EndKind.SUCCEEDED and exits != {0}):
            self.fail(f"P4: {end.outcome} is recorded, and user code ended with {exits or 'nothing'}", task)

    def row_changed(self, place: str, row: Row) -> None:
        """I6: a final status stays, unless an attempt shows up that was running all the time, or a success."""
        before, reading = self._readings.get((place, row.task)), read(row)
        self._readings[place, row.task] = reading
        if before is None or before.status is reading.status:
            return
        self.world.trace(place, row.task, reading.status)
        if before.status.final and not _may_follow(before, reading):
            self.fail(f"I6: at {place} a task that had {before.status} is {reading.status}", row.task)

    def forget(self, place: str) -> None:
        """The agent died: what it knew and had not committed is gone."""
        for key in [key for key in self._readings if key[0] == place]:
            del self._readings[key]

    def check_vector(self, place: str, core: Ledger) -> None:
        """I2: what the vector covers is in the rows."""
        vector = core.vector
        for dot, (task, _) in self.facts.items():
            if vector.get(dot.actor, 0) >= dot.seq:
                row = core.row(task)
                if row is None or row.vector.get(dot.actor, 0) < dot.seq:
                    self.fail(f"I2: {place} covers {dot}, and its row does not", task)

    # ---- beliefs (I11)

    def is_now(self, peer: PeerId, member: Member) -> None:
        """What the owner itself says it is."""
        self._incarnations[peer] = max(self._incarnations.get(peer, (0, 0)), (member.epoch, member.incarnation))

    def believes(self, place: str, member: Member) -> None:
        if (member.epoch, member.incarnation) > self._incarnations[member.peer]:
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
            core = alive.get(place)
            row = core.row(task) if core is not None else None
            if core is None:
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
    watcher: Watcher, alive: dict[str, Ledger], telemetry: Sequence[Telemetry], sources: Collection[ObjectId]
) -> None:
    """P1, P4, P5, I2 and I4, over the ledgers of all agents that live in the end, by the names of their machines.

    `sources` are those that one of them has.
    """
    first, *others = alive.values()
    for place, core in alive.items():
        core.check()
        watcher.check_vector(place, core)
    rows = {row.task: row for row in first.tasks()}
    for core in others:
        if core.vector != first.vector:
            watcher.fail("P5: the vectors differ")
        if {row.task: row for row in core.tasks()} != rows:
            watcher.fail("I4: equal vectors, and other rows")
    kept = watcher.acknowledged | {task: place for task, place in watcher.stored_here_only.items() if place in alive}
    for task in kept:
        if task not in rows:
            watcher.fail(f"P1: {task} was acknowledged and is gone", task)
    for task, row in rows.items():
        watcher.check_result("", task, row, [read(core_row) for core in alive.values() if (core_row := core.row(task))])
        commit = row.spec.source.commit
        runnable = (commit is None or commit in sources) and any(
            could_ever(row.spec.needs, row.queue.value, told) for told in telemetry
        )
        if runnable and not read(row).status.final:
            watcher.fail(f"L3: a task that {len(alive)} peers could run is {read(row).status}", task)
    watcher.check_finished(alive)


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
