"""Two sets of rows that differ in a few: found by ranges, whatever the sizes, and whatever nonsense the other side talks."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshq.ids import Dot, TaskId, task_id
from meshq.ledger import reconcile as module
from meshq.ledger.reconcile import DIGITS, Fingerprints, Inquiry, Reconciliation, hash_row, key_of
from tests.ledger.builders import actor

TASKS = tuple(task_id(Dot(actor("a"), seq)) for seq in range(1, 400))


@dataclass(frozen=True)
class Told:
    equal: bool = False
    ranges: tuple[tuple[bool, bytes], ...] = ()
    wants_served: int = 0
    tasks_served: int = 0
    stale: tuple[str, ...] = ()
    absent: tuple[TaskId, ...] = ()


class Side:
    """Rows as nothing but texts."""

    def __init__(self, rows: dict[TaskId, str]) -> None:
        self.rows = dict(rows)
        self.prints = Fingerprints(self.hash_of)
        for task in rows:
            self.prints.add(task, self.hash_of(task))

    def hash_of(self, task: TaskId) -> bytes:
        return hash_row(f"{task} {self.rows[task]}".encode())

    def answer(self, ask: Inquiry) -> tuple[Told, dict[TaskId, str]]:
        if ask.root == self.prints.root():
            return Told(equal=True), {}
        ranges = []
        for prefix in ask.prefixes:
            if self.prints.is_leaf(prefix):
                ranges.append((True, b"".join(self.prints.shorts(prefix))))
            else:
                ranges.append((False, b"".join(each.to_bytes(16) for each in self.prints.parts(prefix))))
        found = {task: self.rows[task] for task in ask.tasks if task in self.rows}
        for prefix, short in ask.wanted:
            task = self.prints.shorts(prefix)[short]
            found[task] = self.rows[task]
        absent = tuple(task for task in ask.tasks if task not in self.rows)
        return Told(ranges=tuple(ranges), wants_served=len(ask.wanted), tasks_served=len(ask.tasks), absent=absent), found


def reconcile(mine: Side, theirs: Side) -> tuple[dict[TaskId, str], set[TaskId], int]:
    """What the asker received, what it learned to be absent, and in how many questions."""
    ranges, received, questions = Reconciliation(mine.prints), dict[TaskId, str](), 0
    while (ask := ranges.ask()) is not None:
        questions += 1
        told, rows = theirs.answer(ask)
        assert ranges.heed(told)
        received |= rows
    return received, set(ranges.absent), questions


sides = st.dictionaries(st.sampled_from(TASKS), st.sampled_from("xyz"), max_size=120)


@settings(max_examples=150, deadline=None)
@given(both=sides, mine=sides, theirs=sides, leaf=st.integers(1, 70))
def test_exactly_the_rows_in_which_two_sides_differ_are_sent(
    both: dict[TaskId, str], mine: dict[TaskId, str], theirs: dict[TaskId, str], leaf: int
) -> None:
    here, there = both | mine, both | theirs
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "LEAF_ROWS_MAX", leaf)
        received, absent, _ = reconcile(Side(here), Side(there))
    assert received == {task: row for task, row in there.items() if here.get(task) != row}
    assert absent == here.keys() - there.keys()


def test_equal_sides_need_one_question() -> None:
    rows = dict.fromkeys(TASKS, "x")
    assert reconcile(Side(rows), Side(rows)) == ({}, set(), 1)


@settings(max_examples=60, deadline=None)
@given(rows=sides, changes=st.lists(st.tuples(st.sampled_from(TASKS), st.sampled_from("xyz-")), max_size=40))
def test_the_prints_after_any_changes_are_those_of_what_is_there(
    rows: dict[TaskId, str], changes: list[tuple[TaskId, str]]
) -> None:
    side = Side(rows)
    for task, text in changes:
        before = side.hash_of(task) if task in side.rows else None
        if text == "-" and before is not None:
            side.prints.remove(task, before)
            del side.rows[task]
        elif text != "-":
            side.rows[task] = text
            if before is None:
                side.prints.add(task, side.hash_of(task))
            else:
                side.prints.replace(task, before, side.hash_of(task))
    fresh = Side(side.rows)
    assert side.prints.root() == fresh.prints.root()
    for prefix in ("", "3", "a7", "c01", "c012"):
        assert side.prints.parts(prefix) == fresh.prints.parts(prefix)
        assert set(side.prints.tasks(prefix)) == {task for task in side.rows if key_of(task).startswith(prefix)}


def nothing_served(ask: Inquiry, told: Told) -> Told:
    return Told()


def too_much_served(ask: Inquiry, told: Told) -> Told:
    return replace(told, tasks_served=len(ask.tasks) + 1)


def short_parts(ask: Inquiry, told: Told) -> Told:
    return replace(told, ranges=((False, b"x" * 255),) * len(ask.prefixes))


def uneven_leaf(ask: Inquiry, told: Told) -> Told:
    return replace(told, ranges=((True, b"x" * 9),) * len(ask.prefixes))


def absent_unasked(ask: Inquiry, told: Told) -> Told:
    return replace(told, absent=(TASKS[0],))


def stale_unasked(ask: Inquiry, told: Told) -> Told:
    return replace(told, stale=("",))


@pytest.mark.parametrize(
    "lie",
    [nothing_served, too_much_served, short_parts, uneven_leaf, absent_unasked, stale_unasked],
    ids=lambda lie: lie.__name__,
)
def test_an_answer_that_makes_no_sense_ends_it(lie: Callable[[Inquiry, Told], Told]) -> None:
    ranges = Reconciliation(Side({}).prints)
    ask = ranges.ask()
    assert ask is not None
    assert not ranges.heed(lie(ask, Side(dict.fromkeys(TASKS, "x")).answer(ask)[0]))


@pytest.mark.parametrize("kind", ["parts", "leaves", "stale"])
def test_a_donor_that_always_finds_more_differences_is_given_up(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUESTIONS_MAX", 50)
    rng = Random(1)
    ranges = Reconciliation(Side(dict.fromkeys(TASKS[:9], "x")).prints)
    questions = 0
    while questions < 60:
        questions += 1
        ask = ranges.ask()
        if ask is None:
            break
        noise = tuple((kind != "parts", rng.randbytes(256)) for _ in ask.prefixes)
        stale = tuple({prefix for prefix, _ in ask.wanted}) if kind == "stale" else ()
        told = Told(ranges=noise, wants_served=len(ask.wanted), tasks_served=len(ask.tasks), stale=stale)
        if not ranges.heed(told):
            break
    assert questions <= 50


def test_nobody_is_asked_for_more_digits_than_a_key_has() -> None:
    ranges = Reconciliation(Side({}).prints)
    ranges._prefixes = {"0" * DIGITS: None}
    ranges.ask()
    assert not ranges.heed(Told(ranges=((False, b"x" * 256),)))
