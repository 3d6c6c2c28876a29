"""What a row means: who holds the task, how its attempts went, what its status is. Pure functions of the row, nothing else.

Problem. Peers write facts into a row without asking each other. From equal rows every peer must read the same holder and the
same result, no clock may take part, and merging rows must never turn a verdict that somebody has acted upon.

Rules (design section 6).
  1 A success is final. Of several, the one of the lowest attempt is the result; the others are orphans.
  2 Otherwise a cancel is final: a claim that has seen one is void, and what runs is stopped.
  3 A claim is judged by what its `seen` covers and by nothing else. It is legal if `seen` covers no other legal claim of its
    attempt and, beyond attempt 1, covers a legal claim of the attempt before and an `Ended` or a `Lost` for every such claim
    that it covers. So a merge never changes the verdict.
  4 A claim is live if it has no `Ended`, and every `Lost` of it is answered by a `Back` that has seen that `Lost`.
  5 The holder is the live, started, legal claim of the lowest (attempt, weight); without a started one the live legal claim
    of the lowest weight in the highest attempt that has any; else nobody.

Why the recursion of rule 3 ends. Rows travel whole, so `seen` is causally closed: whoever covers a claim covers all that
this claim has seen, and its own dot besides. The sum of `seen` therefore grows strictly from a claim to one that covers it,
and judging claims by ascending sum meets every claim after those that it covers.

Counting. `Ended(FAILED)` counts against the task's retries; claims that were lost count against `INFRASTRUCTURE_LOSSES_MAX` (a
`Lost` without answer counts even if the peer reports later: the count never falls but by a `Back`); claims that could not be
prepared count against `RELEASES_MAX`, unless they are blameless: a task must not fail because the only machine that has its
source is off for a weekend. Superseded and cancelled ones count for nothing. What is exhausted starts nothing more, but lets
end what runs.

Rejected: "the highest attempt wins" and "judge a claim by the whole row". Over random partition histories the first stops
live runs for a dead holder and the second wedges tasks (`tests/ledger/test_holder.py` keeps both from coming back).

Reading order: `read`, `_judge_legal`, `_find_holder`, then the questions at the end.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from meshq.config import INFRASTRUCTURE_LOSSES_MAX, RELEASES_MAX
from meshq.ids import Dot, Fence, PeerId, fence
from meshq.ledger.rendezvous import claim_weight
from meshq.ledger.row import Back, Cancel, Claim, Ended, Fact, Lost, Preparing, Row, Started, Vector, covers
from meshq.task import EndKind, Outcome, Status

_NONE: Final[Mapping[Dot, Any]] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """All that the rules say of one row, computed once. Every mapping is by the claim's dot."""

    row: Row
    claims: Mapping[Dot, Claim]
    legal: Mapping[Dot, Claim]
    live: Mapping[Dot, Claim]  # legal and live
    started: Mapping[Dot, Started]
    preparing: Mapping[Dot, Preparing]
    ended: Mapping[Dot, Outcome]
    lost: Mapping[Dot, Lost]  # the first `Lost` without an answer
    cancel: Cancel | None
    holder: Dot | None
    result: tuple[Dot, Outcome] | None
    last_failure: Outcome | None
    failures: int
    losses: int
    releases: int
    setbacks: int  # all of these, and the blameless ones: how long to pause before the next attempt

    @property
    def running(self) -> bool:
        """Whether user code runs somewhere, as far as this row knows."""
        return any(dot in self.started for dot in self.live)

    @property
    def exhausted(self) -> bool:
        """Whether failures, losses or releases have used up what the task is allowed."""
        limits = (
            self.failures > self.row.spec.retries,
            self.losses >= INFRASTRUCTURE_LOSSES_MAX,
            self.releases >= RELEASES_MAX,
        )
        return any(limits)

    @property
    def status(self) -> Status:
        if self.result is not None:
            return Status.SUCCEEDED
        if self.cancel is not None:
            return Status.RUNNING if self.running else Status.CANCELLED
        if self.exhausted:
            return Status.RUNNING if self.running else Status.FAILED
        if self.holder is None:
            return Status.QUEUED
        if self.holder in self.started:
            return Status.RUNNING
        return Status.PREPARING if self.holder in self.preparing else Status.CLAIMED

    @property
    def next_attempt(self) -> int | None:
        """The attempt that a new claim which has seen all of this row would legally have; None if there is none.

        Legal attempts have no gaps (rule 3), so only the one after the highest can be open.
        """
        if self.cancel is not None or self.result is not None:
            return None
        highest = max((claim.attempt for claim in self.legal.values()), default=0)
        closed = _closings(self.row)
        last = [dot for dot, claim in self.legal.items() if claim.attempt == highest]
        return highest + 1 if all(dot in closed for dot in last) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptView:
    """One attempt as `show` lists it. Times are wall-clock seconds."""

    number: int
    fence: Fence
    peer: PeerId
    status: str  # claimed, preparing, running, succeeded, failed, lost, superseded, cancelled (contract)
    started_at: float | None = None
    ended_at: float | None = None
    exit_code: int | None = None
    reason: str = ""
    timed_out: bool = False


def read(row: Row) -> Reading:
    """Apply the rules to the row."""
    return _apply_rules(row) if row.facts else _untouched(row)


def _apply_rules(row: Row) -> Reading:
    claims = {dot: fact for dot, fact in row.facts if isinstance(fact, Claim)}
    started: dict[Dot, Started] = {}
    preparing: dict[Dot, Preparing] = {}
    cancel: Cancel | None = None
    for _, fact in row.facts:
        if isinstance(fact, Started):
            started.setdefault(fact.claim, fact)
        elif isinstance(fact, Preparing):
            preparing.setdefault(fact.claim, fact)
        elif isinstance(fact, Cancel) and cancel is None:
            cancel = fact
    ended, lost = _ends(row.facts), _unanswered(row.facts)
    legal = _judge_legal(claims, row)
    live = {dot: claim for dot, claim in legal.items() if dot not in ended and dot not in lost}
    by_weight = {dot: (claim.attempt, claim_weight(row.task, claim.attempt, claim.peer), dot) for dot, claim in claims.items()}
    successes = [dot for dot in by_weight if dot in ended and ended[dot].kind is EndKind.SUCCEEDED]
    result = min(successes, key=by_weight.__getitem__, default=None)
    failed = sorted((dot for dot in by_weight if dot in ended and ended[dot].kind is EndKind.FAILED), key=by_weight.__getitem__)
    kinds = {dot: ended[dot].kind for dot in claims if dot in ended}
    losses = sum(1 for dot in claims if dot in lost or kinds.get(dot) is EndKind.LOST)
    released = [dot for dot, kind in kinds.items() if kind is EndKind.RELEASED and dot not in lost]
    return Reading(
        row=row, claims=claims, legal=legal, live=live, started=started, preparing=preparing, ended=ended, lost=lost,
        cancel=cancel, holder=None if result is not None else _find_holder(live, started, by_weight),
        result=None if result is None else (result, ended[result]),
        last_failure=ended[failed[-1]] if failed else None, failures=len(failed), losses=losses,
        releases=sum(1 for dot in released if not ended[dot].blameless), setbacks=len(failed) + losses + len(released),
    )  # fmt: skip


def _untouched(row: Row) -> Reading:
    """What the rules say of a row without facts, as nearly all are in a long queue: in a third of the time."""
    return Reading(
        row=row, claims=_NONE, legal=_NONE, live=_NONE, started=_NONE, preparing=_NONE, ended=_NONE, lost=_NONE,
        cancel=None, holder=None, result=None, last_failure=None, failures=0, losses=0, releases=0, setbacks=0,
    )  # fmt: skip


def _ends(facts: tuple[tuple[Dot, Fact], ...]) -> dict[Dot, Outcome]:
    """How each claim ended. Two ends of one claim take a database that was lost in between: a success goes first."""
    ends: dict[Dot, Outcome] = {}
    for _, fact in facts:
        if isinstance(fact, Ended):
            first = ends.get(fact.claim)
            if first is None or (first.kind is not EndKind.SUCCEEDED and fact.outcome.kind is EndKind.SUCCEEDED):
                ends[fact.claim] = fact.outcome
    return ends


def _unanswered(facts: tuple[tuple[Dot, Fact], ...]) -> dict[Dot, Lost]:
    """For each claim the first `Lost` that no `Back` of it has seen (rule 4)."""
    seen_by_backs: dict[Dot, list[Vector]] = {}
    for _, fact in facts:
        if isinstance(fact, Back):
            seen_by_backs.setdefault(fact.claim, []).append(fact.seen)
    lost: dict[Dot, Lost] = {}
    for dot, fact in facts:
        if isinstance(fact, Lost) and not any(covers(seen, dot) for seen in seen_by_backs.get(fact.claim, ())):
            lost.setdefault(fact.claim, fact)
    return lost


def _closings(row: Row) -> dict[Dot, list[Dot]]:
    """The dots of every `Ended` and `Lost`, by claim."""
    closings: dict[Dot, list[Dot]] = {}
    for dot, fact in row.facts:
        if isinstance(fact, Ended | Lost):
            closings.setdefault(fact.claim, []).append(dot)
    return closings


def _judge_legal(claims: Mapping[Dot, Claim], row: Row) -> dict[Dot, Claim]:
    """The legal claims (rules 2 and 3)."""
    cancels = [dot for dot, fact in row.facts if isinstance(fact, Cancel)]
    closings = _closings(row)
    legal: dict[Dot, Claim] = {}
    of_attempt: dict[int, list[Dot]] = {}  # the legal ones: a row may have a thousand attempts
    for dot, claim in sorted(claims.items(), key=lambda item: (sum(item[1].seen.values()), item[0])):
        if any(covers(claim.seen, cancel) for cancel in cancels):
            continue
        same, before = (
            [other for other in of_attempt.get(attempt, ()) if covers(claim.seen, other)]
            for attempt in (claim.attempt, claim.attempt - 1)
        )
        closed = all(any(covers(claim.seen, end) for end in closings.get(other, ())) for other in before)
        if not same and (claim.attempt == 1 or (before and closed)):
            legal[dot] = claim
            of_attempt.setdefault(claim.attempt, []).append(dot)
    return legal


def _find_holder(
    live: Mapping[Dot, Claim], started: Mapping[Dot, Started], by_weight: Mapping[Dot, tuple[int, bytes, Dot]]
) -> Dot | None:
    """Rule 5."""
    running = [dot for dot in live if dot in started]
    if running:
        return min(running, key=by_weight.__getitem__)
    highest = max((claim.attempt for claim in live.values()), default=0)
    return min((dot for dot, claim in live.items() if claim.attempt == highest), key=by_weight.__getitem__, default=None)


def legal(row: Row, claim: Dot) -> bool:
    """Whether the claim was allowed, judged by what it had seen (rule 3)."""
    return claim in read(row).legal


def live(row: Row, claim: Dot) -> bool:
    """Whether the claim is legal and neither ended nor lost without an answer (rule 4)."""
    return claim in read(row).live


def holder(row: Row) -> Dot | None:
    """The claim that may start or runs; None while nobody has one, and after a success (rule 5)."""
    return read(row).holder


def next_attempt(row: Row) -> int | None:
    """See `Reading.next_attempt`."""
    return read(row).next_attempt


def status(row: Row) -> Status:
    """What the task is doing."""
    return read(row).status


def result(row: Row) -> tuple[Dot, Outcome] | None:
    """The success that counts, with its claim."""
    return read(row).result


def ending(row: Row) -> Outcome | None:
    """The outcome that stands for the whole task once it is final: its exit code, times and outputs are the task's.

    The result of a success; the last failed attempt's of a failure; the last attempt's of a cancelled task, if any ran.
    """
    reading = read(row)
    match reading.status:
        case Status.SUCCEEDED:
            return None if reading.result is None else reading.result[1]
        case Status.FAILED:
            return reading.last_failure
        case Status.CANCELLED:
            cancelled = [end for end in reading.ended.values() if end.kind is EndKind.CANCELLED]
            return max(cancelled, key=lambda end: (end.exit_code is not None, end.ended_at), default=None)
        case _:
            return None


def reason(row: Row) -> str:
    """Why the status is what it is, for people; empty if there is nothing to say."""
    reading = read(row)
    match reading.status:
        case Status.CANCELLED if reading.cancel is not None:
            return f"cancelled by {reading.cancel.by}"
        case Status.RUNNING if reading.cancel is not None:
            return "cancelling"
        case Status.FAILED if reading.failures > row.spec.retries and reading.last_failure is not None:
            return reading.last_failure.reason or f"exit code {reading.last_failure.exit_code}"
        case Status.FAILED if reading.losses >= INFRASTRUCTURE_LOSSES_MAX:
            return f"poisoned: {reading.losses} attempts were lost with their machine; the last one: {_last_loss(reading)}"
        case Status.FAILED:
            return f"{reading.releases} attempts could not be prepared anywhere; the last one: {_last_loss(reading)}"
        case _:
            return ""


def _last_loss(reading: Reading) -> str:
    losses = [view for view in attempts(reading.row) if view.status == EndKind.LOST.value]
    return (losses[-1].reason or "no reason is known") if losses else "no reason is known"


def attempts(row: Row) -> tuple[AttemptView, ...]:
    """All attempts in order of number; two of one number (only a partition makes them) in order of their weight."""
    reading = read(row)
    order = sorted(
        reading.claims.items(), key=lambda item: (item[1].attempt, claim_weight(row.task, item[1].attempt, item[1].peer))
    )
    return tuple(_view(reading, dot, claim) for dot, claim in order)


def _view(reading: Reading, dot: Dot, claim: Claim) -> AttemptView:
    started, outcome, lost = reading.started.get(dot), reading.ended.get(dot), reading.lost.get(dot)
    token = fence(claim.attempt, dot)
    started_at = started.at if started is not None else None
    if outcome is not None:
        state, why = _ended_as(reading, dot, outcome)
        return AttemptView(
            number=claim.attempt, fence=token, peer=claim.peer, status=state, reason=why, timed_out=outcome.timed_out,
            started_at=outcome.started_at or started_at, ended_at=outcome.ended_at, exit_code=outcome.exit_code,
        )  # fmt: skip
    if lost is not None:
        return AttemptView(
            number=claim.attempt, fence=token, peer=claim.peer, status="lost",
            started_at=started_at, ended_at=lost.at, reason=lost.reason,
        )  # fmt: skip
    state = "running" if started is not None else "preparing" if dot in reading.preparing else "claimed"
    return AttemptView(number=claim.attempt, fence=token, peer=claim.peer, status=state, started_at=started_at)


def _ended_as(reading: Reading, dot: Dot, outcome: Outcome) -> tuple[str, str]:
    """The contract's word for an end, and why. An orphan success shows as superseded, a released claim as lost."""
    match outcome.kind:
        case EndKind.SUCCEEDED if reading.result is not None and reading.result[0] != dot:
            return "superseded", f"succeeded too, but the result is attempt {reading.claims[reading.result[0]].attempt}'s"
        case EndKind.RELEASED:
            return "lost", outcome.reason or "its peer could not run it"
        case _:
            return outcome.kind.value, outcome.reason
