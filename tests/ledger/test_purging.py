"""R4 to R7: a purged task never comes back and never runs again, and nothing else is lost by purging."""

from pathlib import Path

import pytest

from meshq.config import Home
from meshq.errors import MalformedData
from meshq.ids import Dot
from meshq.ledger import donor as giving
from meshq.ledger import reconcile
from meshq.ledger.effects import Persist, SyncCompare, SyncPage, SyncRanges
from meshq.ledger.replica import Replica
from meshq.ledger.row import Cancel, Row, Seat
from meshq.ledger.shell import merge_persists
from meshq.ledger.store import Store
from tests.ledger.builders import actor, peer, row, spec
from tests.ledger.purging import lives
from tests.ledger.syncs import Pull, pull
from tests.ledger.test_replica import contents, replica

LIVES = 250


def ended(one: Replica) -> Row:
    """A task that was born and is over."""
    _, born = one.create(spec(), 1)
    one.add(born.task, Cancel(by="x"))
    return of(one, born)


def of(one: Replica, some: Row) -> Row:
    found = one.get(some.task)
    assert found is not None
    return found


def test_a_purged_task_is_dropped_when_an_old_copy_of_it_comes_along() -> None:
    a, b = replica("a"), replica("b")
    old = ended(a)
    pull(b, a)
    a.purge(old.task)
    assert a.absorb(old) == old.task
    assert (len(a), a.counters, a.floors) == (0, {"rows_of_purged_tasks_dropped": 1}, old.vector)


def test_whoever_is_above_the_floors_keeps_its_copy_until_it_purges_it_itself() -> None:
    a, b = replica("a"), replica("b")
    gone = ended(a)
    pull(b, a)
    a.purge(gone.task)
    a.create(spec(), 1)
    sync = Pull(b, a).run()
    assert sync.pages == 1 and len(b) == 2 and b.vector == a.vector


def test_whoever_comes_back_below_the_floors_compares_all_rows_and_forgets_what_was_purged() -> None:
    a, b = replica("a"), replica("b")
    _, born = a.create(spec(), 1)
    kept = of(a, a.create(spec(), 1)[1])
    pull(b, a)
    a.add(born.task, Cancel(by="x"))
    a.purge(born.task)
    sync = Pull(b, a).run()
    assert sync.asks.counters["syncs_comparing_all_rows"] == 1
    assert (contents(b), b.vector, b.floors) == ({kept.task: kept}, a.vector, a.floors)
    assert b.absorb(born) == born.task and len(b) == 1, "it does not come back"


def test_a_late_write_to_a_purged_task_is_dropped_and_nobody_adopts_it_unseen() -> None:
    a, b, c = replica("a"), replica("b"), replica("c")
    gone = ended(a)
    pull(b, a)
    pull(c, a)
    a.purge(gone.task)
    late = b.move(gone.task, Seat(queue="q", position=1, priority=0))
    a.absorb(of(b, gone))
    a.cover([late], [of(b, gone)])
    assert a.vector[late.actor] == late.seq
    sync = Pull(c, a).run()
    assert len(c) == 0, "with the late write covered its row would lack it"
    assert sync.asks.counters["syncs_comparing_all_rows"] == 1


def test_a_row_that_is_purged_between_two_pages_does_not_stay_behind_unfinished(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(giving, "SYNC_ROWS_MAX", 1)
    a, b = replica("a"), replica("b")
    rows = [a.create(spec(), 1)[1] for _ in range(3)]
    pull(b, a)
    for each in rows:
        a.add(each.task, Cancel(by="x"))

    def purge(answers: int) -> None:
        if answers == 2:  # the offer and one page
            for each in rows:
                a.purge(each.task)

    sync = Pull(b, a).run(between=purge)
    assert [page.below for page in sync.answers if isinstance(page, SyncPage)] == [False, True]
    assert (len(b), b.vector, b.floors) == (0, a.vector, a.floors)


def test_a_row_that_changes_while_ranges_are_compared_is_not_missed() -> None:
    a, b = replica("a"), replica("b")
    gone = ended(a)
    a.purge(gone.task)
    _, born = a.create(spec(), 1)
    asked = []

    def change(answers: int) -> None:
        asked.append(answers)
        if answers == 2:  # it was listed, and is asked for now
            a.add(born.task, Cancel(by="x"))

    sync = Pull(b, a).run(between=change)
    assert sync.completed and contents(b) == contents(a)
    assert b.vector == {actor("a"): 3}, "what came after the offer is not adopted, though it is here"


def test_a_pull_that_broke_off_goes_on_with_what_is_missing() -> None:
    a, b = replica("a"), replica("b")
    for _ in range(100):
        a.create(spec(), 1)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(giving, "SYNC_ROWS_MAX", 60)
        pull(b, a, pages=1)
    assert len(b) == 60 and b.vector == {}
    sync = Pull(b, a, broken_off=True).run()
    sent = sum(len(answer.rows) for answer in sync.answers if hasattr(answer, "rows"))
    assert (sent, contents(b), b.vector) == (40, contents(a), a.vector)


def test_a_new_database_whose_writes_were_purged_by_others_is_known_for_a_lost_one() -> None:
    a, b = replica("a"), replica("b")
    gone = ended(a)
    pull(b, a)
    b.purge(gone.task)
    b.create(spec(), 1)
    restored = replica("a")
    pull(restored, b)
    assert restored.ledger_epoch == 2 and restored.vector == b.vector


def test_vectors_that_can_be_none_are_refused_before_anything_changes() -> None:
    a = replica("a")
    for wrong in ({"elsewhere": 1}, {actor("b"): 0}, {actor("b"): 2**60}):
        assert not a.adopt(wrong, {}) and not a.adopt({}, wrong)  # type: ignore[arg-type]  # a peer may send any text
    assert (a.vector, a.floors, a.counters, a.take_changes()) == ({}, {}, {"vectors_refused": 6}, None)


def test_a_floor_far_above_all_writes_costs_a_comparison_and_nothing_else() -> None:
    """A hostile peer sends a copy of a purged task with a vector that names writes which nobody has made."""
    a, b = replica("a"), replica("b")
    gone = ended(a)
    pull(b, a)
    a.purge(gone.task)
    a.absorb(Row(**{name: getattr(gone, name) for name in ("birth", "spec", "queue", "position", "priority", "facts")},
                 vector={**gone.vector, actor("z"): 2**50}))  # fmt: skip
    a.create(spec(), 1)
    sync = Pull(b, a).run()
    assert sync.pages == 1 and b.vector == a.vector


def test_dots_that_no_pushed_row_has_are_not_covered() -> None:
    a = replica("b")
    pushed = row()
    a.absorb(pushed)
    a.cover([pushed.birth, Dot(pushed.birth.actor, pushed.birth.seq + 1)], [pushed])
    assert (a.vector, a.counters) == ({pushed.birth.actor: 1}, {"dots_refused_without_rows": 1})


def test_rows_of_the_same_writes_that_differ_are_a_bug_that_is_counted() -> None:
    a = replica("c")
    one, other = row((Dot(actor("b"), 1), Cancel(by="x"))), row((Dot(actor("b"), 1), Cancel(by="y")))
    a.absorb(one)
    a.absorb(other)
    assert a.counters == {"bug_rows_contradict": 1}


def test_a_seen_write_that_is_missing_in_its_row_is_a_bug_that_is_counted() -> None:
    whole = row((Dot(actor("a"), 2), Cancel(by="x")))
    a = Replica(peer("b"), 1, [row()], {actor("a"): 2}, {})
    a.absorb(whole)
    assert a.counters == {"bug_covered_writes_were_missing": 1} and contents(a) == {whole.task: whole}


def test_commits_that_have_gathered_leave_purged_rows_purged() -> None:
    first, second = row(), row(birth=Dot(actor("a"), 2))
    purge, later = Persist((), {}, {}, False, purged=(first.task,)), Persist((), {"x": 1}, {}, False)
    merged = merge_persists([Persist((first, second), {}, {}, True), purge, later])
    assert merged == Persist((second,), {"x": 1}, {}, True, purged=(first.task,))


def test_purged_rows_are_gone_from_the_disk(tmp_path: Path) -> None:
    store = Store.open(Home(tmp_path), peer("a"))
    first, second = row(), row(birth=Dot(actor("a"), 2))
    store.commit(Persist((first, second), {actor("a"): 2}, {}, True))
    store.commit(Persist((), {}, {actor("a"): 1}, False, purged=(first.task,)))
    stored = store.load()
    assert (tuple(stored.rows), stored.floors) == ((second,), {actor("a"): 1})
    store.close()


def test_a_comparison_that_asks_for_too_much_is_refused() -> None:
    donor = giving.Donor(replica("a"), run=1)
    too_much = (
        SyncCompare(number=1, run=1, prefixes=("",) * (reconcile.RANGES_MAX + 1)),
        SyncCompare(number=1, run=1, prefixes=("xyz",)),
        SyncCompare(number=1, run=1, wanted=(("0" * (reconcile.DIGITS + 1), b""),)),
    )
    for question in too_much:
        with pytest.raises(MalformedData):
            donor.answer(0.0, peer("b"), question)


def test_who_asks_for_a_row_of_a_range_that_is_no_leaf_must_ask_for_its_parts_first() -> None:
    """Else one short question could have all rows hashed."""
    one = replica("a", *(row(birth=Dot(actor("a"), seq)) for seq in range(1, reconcile.LEAF_ROWS_MAX + 2)))
    [short, *_] = one.fingerprints.shorts("")
    answer = giving.Donor(one, run=1).answer(0.0, peer("b"), SyncCompare(number=1, run=1, wanted=(("", short),)))
    assert isinstance(answer, SyncRanges)
    assert (answer.rows, answer.wants_served, answer.stale) == ((), 1, ("",))


@pytest.mark.parametrize("part", range(8))
def test_random_lives_with_purges_lose_nothing_and_bring_nothing_back(part: int) -> None:
    counts = lives(range(part * LIVES, (part + 1) * LIVES))
    happened = ("syncs completed", "syncs by ranges", "power cuts", "pushes of purged tasks")
    assert all(counts[name] > 10 for name in happened), counts


def test_an_old_copy_that_comes_while_all_rows_are_compared_does_not_stay() -> None:
    """Its range was compared already, and when the donor's vector is adopted nobody would know it for a purged one."""
    a, b = replica("a"), replica("b")
    _, old = a.create(spec(), 1)
    a.add(old.task, Cancel(by="x"))
    a.purge(old.task)
    a.create(spec(), 1)

    def late_push(answers: int) -> None:
        if answers == 3:
            b.absorb(old)
            assert b.has(old.task)

    sync = Pull(b, a).run(between=late_push)
    assert len(sync.answers) > 4 and sync.completed
    assert not b.has(old.task) and b.absorb(old) == old.task and not b.has(old.task)
