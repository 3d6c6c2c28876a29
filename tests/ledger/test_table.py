"""The rows in memory: packed or not, they are the same rows; and the index of writes finds what a look at all rows finds."""

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshq.ids import Dot, TaskId
from meshq.ledger import table as module
from meshq.ledger.row import Cancel, Row, Vector, merge
from meshq.ledger.table import PackedRows, RowTable
from tests.ledger.builders import actor, dot, ledger, peer, row, spec, telemetry, view, views

TASKS, SEQS = range(1, 9), range(1, 400)
Write = tuple[int, str, int]


@pytest.fixture(autouse=True)
def two_open_rows() -> Iterator[None]:
    """Nearly every look at a row unpacks it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ROWS_OPEN_MAX", 2)
        yield


def written(base: Row, *writes: Dot) -> Row:
    """The row with a fact by each of these writes."""
    for at in writes:
        base = merge(base, row((at, Cancel(by="ann@a")), birth=base.birth))
    return base


def above(rows: dict[TaskId, Row], vector: Vector) -> set[TaskId]:
    return {task for task, each in rows.items() if any(seq > vector.get(who, 0) for who, seq in each.vector.items())}


@given(
    writes=st.lists(st.tuples(st.sampled_from(TASKS), st.sampled_from("abc"), st.sampled_from(SEQS)), max_size=30),
    removed=st.sets(st.sampled_from(TASKS)),
    seen=st.dictionaries(st.sampled_from("abcd"), st.integers(0, 400)),
)
def test_a_table_finds_what_a_look_at_all_rows_finds(writes: list[Write], removed: set[int], seen: dict[str, int]) -> None:
    """Also where one write is in two rows: of a cloned database."""
    table = RowTable(())
    rows: dict[TaskId, Row] = {}
    for number, name, seq in writes:
        base = row(birth=dot("z", number))
        rows[base.task] = written(rows.get(base.task, base), dot(name, seq))
        table.put(rows[base.task])
    for task in [row(birth=dot("z", number)).task for number in sorted(removed)]:
        if rows.pop(task, None) is not None:
            table.remove(task)
    vector = {actor(name): seq for name, seq in seen.items()}
    assert set(table.above(vector)) == above(rows, vector)
    assert {each.task: each for each in table.rows()} == rows
    assert all(table.get(task) == each for task, each in rows.items())
    assert (len(table), [*table.starting_with("")]) == (len(rows), sorted(rows))
    anew = RowTable(rows.values())
    assert table.fingerprints.root() == anew.fingerprints.root()
    assert all(
        table.hash_of(task) == anew.hash_of(task) and table.size_of(task) == len(each.wire) for task, each in rows.items()
    )


def test_ids_are_found_by_how_they_begin() -> None:
    rows = [row(birth=dot("a", seq)) for seq in range(1, 300)]
    table = RowTable(rows)
    ids = sorted(each.task for each in rows)
    for prefix in ("", ids[7][:1], ids[7][:2], ids[7][:5], ids[7], "7777"):
        assert list(table.starting_with(prefix)) == [task for task in ids if task.startswith(prefix)], prefix


def test_rows_that_nobody_looks_at_are_packed() -> None:
    table = RowTable(row(birth=dot("a", seq)) for seq in range(1, 10))
    list(table.rows())
    assert len(table._open) == 2
    for task in tuple(table.tasks()):
        assert table.get(task) is table.get(task), "it was used last"
        assert len(table._open) == 2


def test_rows_from_the_disk_are_a_sequence_of_rows_that_is_unpacked_on_demand() -> None:
    rows = [row(birth=dot("a", seq)) for seq in range(1, 5)]
    packed = PackedRows(each.wire for each in rows)
    assert packed == rows and packed == tuple(rows) and packed != rows[1:] and packed != rows[::-1] and packed != "rows"
    assert (len(packed), packed[1], list(packed[1:]), list(packed)) == (4, rows[1], rows[1:], rows)


def test_a_task_that_was_unpacked_meanwhile_is_the_same_task_to_the_core() -> None:
    """A push that brings nothing new changes nothing, whether its rows were packed or not."""
    core = ledger("b")
    core.handle_peers(0.0, views(view("a", telemetry(slots_free=0)), view("b", telemetry(slots_free=0))))
    core.adopt(0.0, ())
    tasks, _ = core.submit(0.0, [spec(f"t{number}") for number in range(6)], hold=False)
    known = [each for task in tasks if (each := core.row(task)) is not None]
    assert core.handle_sync_rows(1.0, peer("a"), 1, known) == []
    core.cancel(2.0, tasks[0], "ann@a")
    core.check()
