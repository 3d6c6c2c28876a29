"""A peer that can't take a row says so, and nobody counts on it."""

from dataclasses import replace

import pytest

from meshq.ledger.effects import Push, PushReply, SendPush
from tests.ledger.builders import peer, spec
from tests.ledger.test_core import among, born_where_first, only

B, C = peer("b"), peer("c")


def test_who_refuses_a_row_says_so_and_does_not_count_as_having_it() -> None:
    core = among()
    [task], effects = core.submit(1.0, [spec()], hold=False)
    pushes = {push.peer: push.push for push in only(effects, SendPush)}
    core.handle_push_reply(1.1, B, PushReply(number=pushes[B].number, refused=(task,)))
    assert core.stored_on(task) == ()
    assert core.counters["rows_refused_elsewhere"] == 1
    core.handle_push_reply(1.2, C, PushReply(number=pushes[C].number))
    assert core.stored_on(task) == (C,)


def test_a_push_that_is_refused_is_answered_with_its_tasks_and_not_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshq.ledger.replica.ROWS_MAX", 0)
    core = among()
    first = born_where_first("b", "ac")
    reply, effects = core.handle_push(1.0, C, Push(number=1, rows=(first,), dots=(first.birth,)))
    assert (reply, effects, core.vector) == (PushReply(number=1, refused=(first.task,)), [], {})


def test_a_row_whose_numbers_would_overflow_those_of_later_rows_is_refused() -> None:
    core = among()
    first = born_where_first("b", "ac")
    far = replace(first, position=replace(first.position, value=2**60))
    reply, _ = core.handle_push(1.0, C, Push(number=1, rows=(far,), dots=(far.birth,)))
    assert (reply.refused, core.row(far.task)) == ((far.task,), None)
