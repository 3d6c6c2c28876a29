"""Making the plan of a run that failed smaller, as long as the same rule is still broken.

Delta debugging (Zeller and Hildebrandt, "Simplifying and Isolating Failure-Inducing Input", TSE 2002): leave out ever smaller
parts of what the plan lists (faults, submissions, what users do, who is ill), then see which of its other plagues and which
peers are needed at all. A run of a smaller plan draws other numbers, so what is left need not be the smallest plan, but it is a
plan that fails, and its story is short.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from tests.simulator.invariants import Violation
from tests.simulator.plan import Action, Fault, Illness, Plan, Submission

Piece = Fault | Submission | Action | tuple[int, Illness]
"""One element of one of the plan's lists."""

LISTS = ("faults", "submissions", "actions", "ill")
TRIES_MAX = 400


def failure(error: AssertionError) -> str:
    """Which rule was broken: what a smaller run must break, too."""
    first = str(error).splitlines()[0] if str(error) else ""
    if isinstance(error, Violation):
        rule = first.partition(": ")[2]
        if named := re.match(r"[PIL]\d+", rule):
            return named.group()
        first = rule
    return re.sub(r"\b[a-z]*\d\S*|\S{12,}", "_", first)[:60]


def shrink(plan: Plan, fails: Callable[[Plan], bool], out_of_time: Callable[[], bool]) -> tuple[Plan, int]:
    """The smallest plan found that still fails, and how many were tried. `fails`: run it, is the same rule broken?"""
    tries = 0

    def still(smaller: Plan) -> bool:
        nonlocal tries
        if tries >= TRIES_MAX or out_of_time():
            return False
        tries += 1
        return fails(smaller)

    while True:  # until a round changes nothing
        before = plan
        plan = _calmed(plan, still)
        plan = _pruned(plan, still)
        while len(plan.slots) > 1 and still(smaller := _without_last_peer(plan)):
            plan = smaller
        if plan == before or tries >= TRIES_MAX or out_of_time():
            return plan, tries


def _pruned(plan: Plan, still: Callable[[Plan], bool]) -> Plan:
    pieces: list[Piece] = [*plan.faults, *plan.submissions, *plan.actions, *plan.ill]
    return _with(plan, _minimal(pieces, lambda fewer: still(_with(plan, fewer))))


def _with(plan: Plan, pieces: Sequence[Piece]) -> Plan:
    """The plan with these pieces and no others."""
    return replace(
        plan,
        faults=tuple(each for each in pieces if isinstance(each, Fault)),
        submissions=tuple(each for each in pieces if isinstance(each, Submission)),
        actions=tuple(each for each in pieces if isinstance(each, Action)),
        ill=tuple(each for each in pieces if isinstance(each, tuple)),
    )


def _minimal(pieces: list[Piece], fails: Callable[[list[Piece]], bool]) -> list[Piece]:
    """Leave out a half, then quarters, and so on down to single pieces."""
    size = max(1, len(pieces) // 2)
    while pieces:
        at = 0
        while at < len(pieces):
            fewer = pieces[:at] + pieces[at + size :]
            if len(fewer) < len(pieces) and fails(fewer):
                pieces = fewer
            else:
                at += size
        if size == 1:
            break
        size //= 2
    return pieces


def _calmed(plan: Plan, still: Callable[[Plan], bool]) -> Plan:
    """Without the plagues that it fails without."""
    calmer: tuple[Callable[[Plan], Plan], ...] = (
        lambda plan: replace(plan, loss=0.0),
        lambda plan: replace(plan, duplication=0.0),
        lambda plan: replace(plan, flips=0.0),
        lambda plan: replace(plan, replays=False),
        lambda plan: replace(plan, rates=()),
        lambda plan: replace(plan, release_chance=0.0),
        lambda plan: replace(plan, reliable=True),
        lambda plan: replace(plan, delay=(0.0005, 0.003)),
        lambda plan: replace(plan, page_rows=1_000),
    )
    for calm in calmer:
        if (changed := calm(plan)) != plan and still(changed):
            plan = changed
    return plan


def _without_last_peer(plan: Plan) -> Plan:
    count = len(plan.slots) - 1
    ill = tuple((number, illness) for number, illness in plan.ill if number < count)
    return replace(plan, slots=plan.slots[:count], gpus=plan.gpus[:count], rates=plan.rates[:count], ill=ill)


def told(plan: Plan) -> str:
    """The plan, for people and for a test: one line for each thing."""
    lines = [f"  {name}={getattr(plan, name)!r}" for name in plan.__dataclass_fields__ if name not in LISTS]
    for name in LISTS:
        lines += [f"  {name}:", *(f"    {each!r}" for each in getattr(plan, name))]
    return "\n".join(lines)
