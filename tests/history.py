"""Proves the promises P1 to P5 (docs/guarantees.md) of one history of real agents, offline.

Problem. A mesh of real processes ran while it was killed, frozen and cut apart. Each agent kept a log of what it did
(`meshq.eventlog`), each task wrote down when it lived, the one who hurt them wrote down how, and at the end there are the
ledgers. None of them is believed alone.

What is proven
  P1  Every task whose id was given out is in every ledger at the end.
  P2  The user code of a fence began at most once; and only after its claim and the decision to start it were stored, by the
      peer whose claim it is.
  P3  Two attempts of a task live at the same time only if a fault explains it: one that parted their peers, or that kept the
      agent of the earlier one away, or it frozen, for as long as a lease; never under `--on-isolation stop`. When the fault is
      over, one of the two ends soon.
  P4  At the end all peers name the same result, which is a run that came to its end; what any peer ever stored as a success
      left the task succeeded; nobody saw more than two results of a task.
  P5  At the end every task is over and all ledgers are equal, byte for byte; and after each cut they were equal in time.

Limits. That a run lived is known from its pulses, so overlaps shorter than a pulse are not seen. All times are of one clock.

Reading order: `History`, then `check`.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

LEASE = 8.0  # seconds: the grace of profile `lan`; that a death must be found first comes on top
CLAIM_SECONDS = 5.0  # from a claim to the first line of its task
LATE_SECONDS = 10.0  # what follows from a fault may begin so long after its end: a claim that was made in it starts
SETTLE_SECONDS = 20.0  # for one of two runs to be ended when the fault is over: SIGTERM, then SIGKILL after 10 s
EQUAL_SECONDS = 10.0  # for ledgers to be equal after a cut
RESULTS_SEEN_MAX = 2  # a result may be replaced once (P4)
FINAL = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One line of an agent's log."""

    at: float
    peer: str  # its name
    event: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fence(self) -> str:
        return str(self.facts.get("fence", ""))


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """User code under one fence, by its own marks."""

    fence: str
    task: str
    peer: str
    begins: tuple[float, ...]
    last: float  # its last sign of life
    ended: bool  # it came to its own end


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What was done to the mesh. `cut`: nothing got from `one` to `other` (or back, unless one way).

    `agentless`: the peers of `one` had no agent. `frozen`: theirs, or their tasks, were stopped by SIGSTOP.
    """

    kind: str
    one: frozenset[str]
    other: frozenset[str] = frozenset()
    since: float
    until: float
    equal_after: float | None = None  # of a cut: seconds until all ledgers were equal; None if nobody looked

    def parts(self, one: str, other: str) -> bool:
        return (one in self.one and other in self.other) or (other in self.one and one in self.other)


@dataclass(frozen=True, slots=True, kw_only=True)
class Final:
    """How one ledger says that a task has ended. `claims`: the peer of each fence."""

    status: str
    result: str = ""  # the fence of the success that counts
    isolation: str = "continue"
    claims: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    tasks: Mapping[str, Final]
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    events: tuple[Event, ...]
    runs: tuple[Run, ...]
    faults: tuple[Fault, ...]
    acked: tuple[str, ...]  # the tasks whose ids were given out
    ledgers: Mapping[str, Ledger]  # at the end, by the peer's name

    @property
    def final(self) -> Mapping[str, Final]:
        """Of one of the ledgers: whether they are equal is P5's question."""
        return next(iter(self.ledgers.values())).tasks if self.ledgers else {}


@dataclass(frozen=True, slots=True)
class Violation:
    promise: str
    what: str

    def __str__(self) -> str:
        return f"{self.promise}: {self.what}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """Two runs of one task that lived at the same time, and the fault that explains it."""

    task: str
    first: Run
    second: Run
    fault: Fault | None

    @property
    def seconds(self) -> float:
        return min(self.first.last, self.second.last) - self.second.begins[0]


def check(history: History) -> list[Violation]:
    """Everything that is wrong with it."""
    assert history.ledgers, "a history without ledgers proves nothing"
    checks: tuple[Callable[[History], Iterator[Violation]], ...] = (_p1, _p2, _p3, _p4, _p5)
    return [violation for each in checks for violation in each(history)]


def _p1(history: History) -> Iterator[Violation]:
    for task in history.acked:
        missing = sorted(peer for peer, ledger in history.ledgers.items() if task not in ledger.tasks)
        if missing:
            yield Violation("P1", f"task {task} was acknowledged and is not in the ledger of {', '.join(missing)}")


def _p2(history: History) -> Iterator[Violation]:
    claimed = {fence: (task, peer) for task, final in history.final.items() for fence, peer in final.claims.items()}
    noted: dict[tuple[str, str, str], float] = {}
    for event in history.events:
        noted.setdefault((event.event, event.fence, event.peer), event.at)
    for run in history.runs:
        if len(run.begins) > 1:
            yield Violation("P2", f"the user code of {run.fence} began {len(run.begins)} times")
        if claimed.get(run.fence) != (run.task, run.peer):
            yield Violation("P2", f"{run.fence} of {run.task} ran at {run.peer}; the claim is {claimed.get(run.fence)}")
            continue
        times = [noted.get((event, run.fence, run.peer), float("inf")) for event in ("claimed", "started")]
        if not times[0] <= times[1] <= run.begins[0]:
            yield Violation("P2", f"{run.fence} began at {run.begins[0]}, claimed and started at {times}")


def overlaps(history: History) -> list[Overlap]:
    """Every pair of runs of one task that lived at the same time."""
    of_task: dict[str, list[Run]] = defaultdict(list)
    for run in history.runs:
        of_task[run.task].append(run)
    found = []
    for task, runs in of_task.items():
        for first, second in combinations(sorted(runs, key=lambda run: run.begins[0]), 2):
            if second.begins[0] < first.last:
                fault = _explain(history, first, second)
                found.append(Overlap(task=task, first=first, second=second, fault=fault))
    return found


def _explain(history: History, first: Run, second: Run) -> Fault | None:
    """The fault that allows the two to live at the same time, the last one to end."""
    fitting = [fault for fault in history.faults if _explains(fault, first, second)]
    return max(fitting, key=lambda fault: fault.until, default=None)


def _explains(fault: Fault, first: Run, second: Run) -> bool:
    began = second.begins[0]
    if fault.kind == "cut":  # parted while either was claimed, or while the first ran
        return fault.parts(first.peer, second.peer) and fault.since < began < fault.until + LATE_SECONDS and (
            fault.until > first.begins[0] - CLAIM_SECONDS
        )  # fmt: skip
    lasted = min(fault.until, began) - fault.since
    return first.peer in fault.one and lasted >= LEASE and began < fault.until + LATE_SECONDS


def _p3(history: History) -> Iterator[Violation]:
    for each in overlaps(history):
        pair = f"{each.first.fence} at {each.first.peer} and {each.second.fence} at {each.second.peer} of {each.task}"
        final = history.final.get(each.task)
        if final is not None and final.isolation == "stop":
            yield Violation("P3", f"{pair} lived at the same time for {each.seconds:.2f} s, in spite of `--on-isolation stop`")
        elif each.fault is None:
            yield Violation("P3", f"{pair} lived at the same time for {each.seconds:.2f} s, and no fault explains it")
        else:
            over = max(each.second.begins[0], each.fault.until)
            if min(each.first.last, each.second.last) > over + SETTLE_SECONDS:
                yield Violation("P3", f"{pair} went on side by side long after the {each.fault.kind} was over")


def _p4(history: History) -> Iterator[Violation]:
    runs = {run.fence: run for run in history.runs}
    for task in sorted({task for ledger in history.ledgers.values() for task in ledger.tasks}):
        finals = {peer: ledger.tasks[task] for peer, ledger in history.ledgers.items() if task in ledger.tasks}
        if len({(final.status, final.result) for final in finals.values()}) > 1:
            yield Violation("P4", f"peers disagree about {task}: { {peer: final.result for peer, final in finals.items()} }")
        result = next(iter(finals.values())).result
        if result and not (result in runs and runs[result].task == task and runs[result].ended):
            yield Violation("P4", f"the result of {task} is {result}, which never ran to its end")
    yield from _p4_seen(history)


def _p4_seen(history: History) -> Iterator[Violation]:
    """What single peers stored and saw on the way."""
    task_of = {fence: task for task, final in history.final.items() for fence in final.claims}
    kinds = {(event.peer, event.fence): event.facts["kind"] for event in history.events if event.event == "exited"}
    results: dict[str, set[str]] = defaultdict(set)
    for event in history.events:
        if event.event == "ended" and kinds.get((event.peer, event.fence)) == "succeeded":
            final = history.final.get(task_of.get(event.fence, ""))
            if final is None or final.status != "succeeded":
                yield Violation("P4", f"{event.peer} stored the success of {event.fence}, and the task is {final}")
        elif event.event == "result" and event.fence:
            results[str(event.facts["task"])].add(event.fence)
    for task, seen in results.items():
        final = history.final.get(task)
        if len(seen) > RESULTS_SEEN_MAX:
            yield Violation("P4", f"{len(seen)} results of {task} were seen: {sorted(seen)}")
        if final is None or final.status != "succeeded":
            yield Violation("P4", f"{task} was seen to have succeeded ({sorted(seen)}), and is {final}")


def _p5(history: History) -> Iterator[Violation]:
    for peer, ledger in history.ledgers.items():
        open_tasks = {task: final.status for task, final in ledger.tasks.items() if final.status not in FINAL}
        for task, status in open_tasks.items():
            yield Violation("P5", f"task {task} is {status} for ever, says {peer}")
    digests = {peer: ledger.digest for peer, ledger in history.ledgers.items()}
    if len(set(digests.values())) > 1:
        yield Violation("P5", f"the ledgers differ: {digests}")
    for fault in history.faults:
        if fault.equal_after is not None and fault.equal_after > EQUAL_SECONDS:
            what = f"the cut of {sorted(fault.one)} from {sorted(fault.other)} at {fault.since:.1f}"
            yield Violation("P5", f"{fault.equal_after:.1f} s after {what} the ledgers were not equal yet")
