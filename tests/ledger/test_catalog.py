"""What there is to list: it is what one would find by looking at every row."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshq.ids import ObjectId
from meshq.ledger.catalog import Catalog, user_of
from meshq.ledger.row import Row
from meshq.task import Source, Status
from tests.ledger.builders import dot, row, spec, telemetry, view, views
from tests.ledger.builders import ledger as core_of

QUEUES, USERS, NAMES = ("default", "gpu"), ("ann", "bob"), ("one", "two", "three")
COMMITS = (None, ObjectId("1" * 40), ObjectId("2" * 40))
ASKED: list[tuple[str | None, Status | None, str | None]] = [
    (None, None, None), ("gpu", None, None), (None, Status.QUEUED, "ann"), ("gpu", Status.FAILED, "bob"),
]  # fmt: skip
Change = tuple[int, str, Status | None]


def made(seq: int, queue: str) -> Row:
    """The row of one task, in that queue now."""
    return row(
        birth=dot("ab"[seq % 2], seq), name=NAMES[seq % 3], queue=queue, submitted_by=f"{USERS[seq % 5 % 2]}@a",
        submitted_at=1.0 + seq // 3, source=Source(commit=COMMITS[seq % 3]),
    )  # fmt: skip


@given(st.lists(st.tuples(st.integers(1, 12), st.sampled_from(QUEUES), st.sampled_from([None, *Status])), max_size=40))
def test_after_any_changes_it_lists_what_a_look_at_all_rows_finds(changes: list[Change]) -> None:
    catalog, rows = Catalog(), {}
    for seq, queue, status in changes:
        if status is not None:
            rows[seq] = (made(seq, queue), status)
            catalog.put(*rows[seq])
        elif seq in rows:
            catalog.remove(rows.pop(seq)[0])
    newest = sorted(rows.values(), key=lambda each: (each[0].spec.submitted_at, each[0].birth.seq, each[0].task), reverse=True)
    counted = Counter((each.queue.value, status) for each, status in rows.values())
    assert {(queue, status): count for queue, of in catalog.counts().items() for status, count in of.items()} == counted
    for within, asked, user in ASKED:
        wanted = [
            each.task
            for each, status in newest
            if within in (None, each.queue.value) and asked in (None, status) and user in (None, user_of(each))
        ]
        assert catalog.newest(3, queue=within, status=asked, user=user) == tuple(wanted[:3])
    for name in NAMES:
        assert catalog.named(name) == tuple(sorted(each.task for each, _ in newest if each.spec.name == name))
    waiting = [each for each, status in newest if status is Status.QUEUED]
    assert catalog.oldest_queued() == {each.queue.value: each.spec.submitted_at for each in waiting}  # the oldest comes last
    assert set(catalog.sources()) == {each.spec.source.commit for each, _ in newest} - {None}
    assert len(catalog) == len(rows)
    catalog.check(rows.values())
    if rows:
        with pytest.raises(AssertionError):
            catalog.check(list(rows.values())[1:])


def test_the_core_keeps_it_up_to_date() -> None:
    core = core_of("a")
    core.handle_peers(0.0, views(view("a", telemetry(slots_free=0))))
    core.adopt(0.0, ())
    (first, second), _ = core.submit(0.0, [spec("one", submitted_at=5.0), spec("two", submitted_at=4.0)], hold=False)
    core.cancel(1.0, first, "ann@a")
    assert core.catalog.counts() == {"default": {Status.CANCELLED: 1, Status.QUEUED: 1}}
    assert core.catalog.newest(10) == (first, second)
    assert (core.catalog.newest(10, status=Status.QUEUED), core.catalog.named("one")) == ((second,), (first,))
    assert list(core.starting_with(second[:4])) == [second]
    core.check()
