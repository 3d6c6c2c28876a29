"""Rows that have been tried for weeks, and a peer that is full: what is full must still converge."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count

import pytest

from meshq.ids import Dot, TaskId, fence
from meshq.ledger import replica as module
from meshq.ledger.antientropy import Progress
from meshq.ledger.core import Ledger
from meshq.ledger.effects import Push, SendSync, Start
from meshq.ledger.holder import status
from meshq.ledger.replica import Replica, fullness
from meshq.ledger.row import Cancel, Claim, Ended, Lost, Row, Started
from meshq.ledger.table import row_bytes
from meshq.ledger.timing import LAN
from meshq.ledger.transfer import rows_of
from meshq.task import EndKind, Status
from tests.ledger.builders import actor, busy, dot, ledger, outcome, peer, row, spec, telemetry, view, views
from tests.ledger.test_core import BOTH, among, only, row_in
from tests.ledger.test_replica import replica

A, B = peer("a"), peer("b")
CLAIM = Dot(actor("a"), 2)
BUSY = busy(telemetry())  # nobody else takes over: each absence costs a `Lost` and a `Back`, and nothing else


LOOK_EVERY = 10  # claims


def tries(names: Sequence[str], first: Row) -> Iterator[Row]:
    """The row after these peers have given the task up in turn, each time a few times more, until it is full."""
    latest, facts, vector = first, list(first.facts), dict(first.vector)
    for attempt in count(1):
        name = names[attempt % len(names)]
        claim = dot(name, vector.get(actor(name), 0) + 1)
        end = Dot(claim.actor, claim.seq + 1)
        facts.append((claim, Claim(attempt=attempt, peer=peer(name), seen=dict(vector))))
        facts.append((end, Ended(claim=claim, outcome=outcome(EndKind.RELEASED, blameless=True, reason="no source"))))
        vector[end.actor] = end.seq
        if attempt % LOOK_EVERY == 0:
            latest = replace(first, facts=tuple(sorted(facts, key=lambda fact: fact[0])), vector=dict(vector))
            yield latest
        if fullness(latest) >= 1:
            return


def running_at_a() -> tuple[Ledger, TaskId]:
    core = ledger()
    core.adopt(0.0, [])
    core.handle_peers(0.0, views(view("a")))
    [task], _ = core.submit(1.0, [spec()], hold=False)
    assert only(core.handle_ready(1.5, fence(1, CLAIM)), Start)
    core.handle_peers(2.0, views(view("a"), view("b", BUSY), view("c", BUSY)))
    return core, task


def flap(runner: Ledger, other: Ledger, task: TaskId, now: float) -> None:
    """For the other the runner is gone for so long that its lease ends; then they tell each other what they have."""
    seen = (view("b", BUSY), view("c", BUSY))
    other.handle_peers(now, views(view("a", alive=False, changed_at=now), *seen))
    other.handle_timeout(now + LAN.grace + 3.0)
    other.handle_peers(now + 20.0, views(view("a"), *seen))
    runner.handle_push(now + 21.0, B, Push(number=1, rows=(row_in(other, task),), dots=()))
    reply, _ = other.handle_push(now + 22.0, A, Push(number=1, rows=(row_in(runner, task),), dots=()))
    assert reply.refused == (), "the others can never hear of its end"


def test_a_machine_that_vanishes_hundreds_of_times_while_it_runs_a_task_can_still_report_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "ROW_BYTES_FULL", 6_000)
    monkeypatch.setattr(module, "ROW_BYTES_MAX", 8_000)
    runner, task = running_at_a()
    other = among(views(view("a"), view("b", BUSY), view("c", BUSY)), row_in(runner, task), name="b")
    for number in range(60):
        flap(runner, other, task, 100.0 * (number + 1))
    assert fullness(row_in(other, task)) >= 1, "this is about full rows"
    runner.handle_ended(9_000.0, fence(1, CLAIM), outcome())
    reply, _ = other.handle_push(9_001.0, A, Push(number=1, rows=(row_in(runner, task),), dots=()))
    assert reply.refused == () and status(row_in(other, task)) is Status.SUCCEEDED
    runner.check()
    other.check()


def test_of_a_full_row_claims_are_lost_only_once_it_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FACTS_FULL", 2)
    running = row((dot("a", 2), Claim(attempt=1, peer=A, seen={actor("a"): 1})), (dot("a", 3), Started(claim=dot("a", 2))))
    core = among(views(view("a"), view("b"), view("c")), running, name="b")
    core.handle_peers(1.0, views(view("a", alive=False, changed_at=1.0), view("b"), view("c")))
    core.handle_timeout(1.0 + LAN.grace + 3.0)
    assert row_in(core, running.task) == running
    assert core.waiting_reason(20.0, running.task) == (
        "a was not seen for 8 s, and no other peer tries it again after so many times: cancel it and submit it anew"
    )
    core.cancel(20.0, running.task, "ann@b")
    core.handle_timeout(24.0)
    assert [type(fact) for _, fact in row_in(core, running.task).facts if isinstance(fact, Cancel | Lost)] == [Cancel, Lost]
    assert status(row_in(core, running.task)) is Status.CANCELLED


def test_a_row_that_both_sides_of_a_cut_have_filled_is_still_passed_on() -> None:
    """At the real limits. Whoever merges the two has a row that everybody else must be able to take."""
    first = row(birth=dot("z", 1), env={"X": "x" * 30_000})
    left, right = ([*tries([f"{side}{number}" for number in range(10)], first)][-1] for side in ("l", "r"))
    both = Replica(B, 1, [left], {}, {})
    assert both.absorb(right) is not None
    merged = both.get(first.task)
    assert merged is not None and row_bytes(merged) > 1.8 * module.ROW_BYTES_FULL
    assert replica("c").absorb(merged) is not None


def test_a_source_that_is_off_for_a_weekend_finds_its_task_waiting_in_a_large_mesh() -> None:
    """The more peers have tried, the larger is each claim; so the pauses grow with the row."""
    core, seconds = ledger("x"), 0.0
    core.adopt(0.0, [])
    core.handle_peers(0.0, views(view("x", BUSY)))
    first = row(birth=dot("z", 1))
    for number, latest in enumerate(tries([f"p{number}" for number in range(150)], first)):
        core.handle_push(0.0, B, Push(number=number, rows=(latest,), dots=()))
        wait = core._board._waits[first.task]
        seconds += LOOK_EVERY * (wait.not_before - wait.since)
    assert seconds > 63 * 3_600, "from Friday evening to Monday morning"


def sync_with(late: Ledger, donor: Ledger, now: float) -> None:
    """The next sync of `late`, to its end."""
    sends = only(late.handle_timeout(now), SendSync)
    while sends:
        [send] = sends
        answer = donor.handle_sync_request(now, B, send.question)
        for rows in rows_of(answer):
            late.handle_sync_rows(now, A, send.question.number, rows)
        sends = only(late.handle_sync_answer(now, A, answer), SendSync)


def test_a_peer_that_comes_back_full_of_what_was_purged_makes_room_for_what_there_is_now(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Otherwise it would never know what has been purged, and be free to run it again once it waits no longer."""
    donor, late = among(BOTH), ledger("b")
    late.adopt(0.0, [])
    late.handle_peers(0.0, BOTH)
    old, _ = donor.submit(1.0, [spec(queue="elsewhere")] * 10, hold=True)
    rows = tuple(row_in(donor, task) for task in old)
    late.handle_push(1.0, A, Push(number=1, rows=rows, dots=tuple(each.birth for each in rows)))
    late.handle_peers(2.0, views(view("a", alive=False), view("b")))
    for task in old:
        donor.cancel(2.0, task, "ann@a")
    donor._forgetting.forget(old)
    donor._finish(2.0)
    new, _ = donor.submit(3.0, [spec(queue="elsewhere")] * 10, hold=True)
    monkeypatch.setattr(module, "ROWS_MAX", 15)
    late.handle_peers(4.0, BOTH)
    for now in (20.0, 40.0, 60.0):
        sync_with(late, donor, now)
    assert sorted(each.task for each in late.tasks()) == sorted(new)
    assert late.vector == donor.vector and late.counters["rows_refused_too_many"] == 5
    late.check()


def test_who_has_no_room_forgets_only_what_cannot_come_again_as_new() -> None:
    """A row ahead of its vector would, from anybody who still has it: it stays until a sync is complete."""
    seen, ahead = row(birth=dot("c", 1), queue="elsewhere"), row(birth=dot("c", 3), queue="elsewhere")
    core = among(BOTH, seen, ahead, vector={actor("c"): 1})
    progress = Progress(began_at=0.0, absent=(seen.task, ahead.task))
    assert core._forgetting.finish_sync(progress) is False
    core._finish(1.0)
    assert [each.task for each in core.tasks()] == [ahead.task]
    core.check()
