"""A request that is sent again is the same task, at whoever has its row."""

from random import Random

import pytest

from meshq.errors import Unplaceable
from meshq.ids import TaskId
from meshq.ledger import requests
from meshq.ledger.effects import Persist, PushReply, SendPush
from meshq.ledger.requests import Requests
from meshq.ledger.row import Claim, Ended
from meshq.task import Needs
from tests.ledger.builders import dot, ledger, outcome, peer, row, spec, view, views
from tests.ledger.test_replica import replica

A, B = peer("a"), peer("b")
BOTH = views(view("a"), view("b"))
NOBODY = Needs(labels={"who": "nobody"})


def test_a_request_that_is_sent_again_is_one_task_which_the_others_confirm_once_more() -> None:
    core = ledger()
    core.adopt(0.0, [])
    core.handle_peers(0.0, BOTH)
    first, effects = core.submit(1.0, [spec(request="r1", needs=NOBODY)], hold=True)
    [sent] = [each for each in effects if isinstance(each, SendPush)]
    again, effects = core.submit(2.0, [spec(request="r1", needs=NOBODY, submitted_at=2.0)], hold=True)
    assert again == first and len(list(core.tasks())) == 1
    [repeated] = [each for each in effects if isinstance(each, SendPush)]
    assert (repeated.push.rows, repeated.push.dots) == (sent.push.rows, sent.push.dots)
    assert not [each for each in effects if isinstance(each, Persist)], "it is durable since the first time"
    core.handle_push_reply(3.0, B, PushReply(number=repeated.push.number))
    assert core.stored_on(first[0]) == (B,)


def test_another_agent_that_has_the_row_knows_the_request_and_so_does_the_same_one_after_a_restart() -> None:
    a = ledger()
    a.adopt(0.0, [])
    a.handle_peers(0.0, BOTH)
    tasks, effects = a.submit(1.0, [spec(request=f"r.{number}", needs=NOBODY) for number in range(3)], hold=True)
    [sent] = [each for each in effects if isinstance(each, SendPush)]
    b = ledger("b")
    b.adopt(0.0, [])
    b.handle_push(1.1, A, sent.push)
    restarted = ledger("a", a.tasks())
    restarted.adopt(0.0, [])
    for core in (b, restarted):
        assert core.submit(2.0, [spec(request=f"r.{number}", needs=NOBODY) for number in range(3)], hold=True)[0] == tasks
        assert len(list(core.tasks())) == 3


def test_of_a_request_that_is_known_in_part_only_the_rest_is_new() -> None:
    core = ledger()
    core.adopt(0.0, [])
    (first,), _ = core.submit(1.0, [spec(request="r.0", needs=NOBODY)], hold=True)
    both, _ = core.submit(2.0, [spec(request="r.0", needs=NOBODY), spec(request="r.1", needs=NOBODY)], hold=True)
    assert both[0] == first and len(list(core.tasks())) == 2


def test_what_is_known_is_not_refused_because_nobody_could_run_it_now() -> None:
    core = ledger()
    core.adopt(0.0, [])
    core.handle_peers(0.0, BOTH)
    tasks, _ = core.submit(1.0, [spec(request="r", needs=NOBODY)], hold=True)
    assert core.submit(2.0, [spec(request="r", needs=NOBODY)], hold=False)[0] == tasks
    with pytest.raises(Unplaceable):
        core.submit(3.0, [spec(request="s", needs=NOBODY)], hold=False)


def test_tasks_without_a_token_are_always_new() -> None:
    core = ledger()
    core.adopt(0.0, [])
    assert len({core.submit(1.0, [spec(needs=NOBODY)], hold=True)[0] for _ in range(3)}) == 3


def test_a_request_that_became_two_tasks_is_the_same_one_of_them_everywhere() -> None:
    one, other = row(birth=dot("a", 1), request="r"), row(birth=dot("b", 1), request="r")
    found = []
    for rows in ((one, other), (other, one)):
        known = Requests()
        for each in rows:
            known.put(each)
        found.append(known.find("r", replica("a", one, other)))
    assert found[0] == found[1] == min(one.task, other.task)


def test_only_the_latest_requests_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row(birth=dot("a", number), request=f"r{number}", submitted_at=float(number)) for number in range(1, 12)]
    Random(1).shuffle(rows)
    known, everything = Requests(), replica("a", *rows)
    monkeypatch.setattr(requests, "KEPT", 5)
    for each in rows:
        known.put(each)
    found: list[TaskId | None] = [known.find(f"r{number}", everything) for number in range(1, 12)]
    assert None not in found[-5:] and found.count(None) >= 1


def test_the_requests_of_a_machine_whose_clock_lags_are_not_the_first_to_be_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "KEPT", 5)
    rows = [row(birth=dot("a", number), request=f"r{number}", submitted_at=float(100 - number)) for number in range(1, 12)]
    claimed = row((dot("b", 1), Claim(attempt=1, peer=B, seen={})), birth=dot("a", 12), request="r12", submitted_at=1.0)
    over = [
        row(
            (dot("c", 2 * number), Claim(attempt=1, peer=peer("c"), seen={})),
            (dot("c", 2 * number + 1), Ended(claim=dot("c", 2 * number), outcome=outcome())),
            birth=dot("d", number), request=f"old{number}", submitted_at=200.0,
        )
        for number in range(1, 30)
    ]  # fmt: skip
    known, everything = Requests(), replica("a", *rows, claimed, *over)
    known.loaded()
    for each in (*rows, claimed, *over):
        known.put(each)
    assert None not in [known.find(f"r{number}", everything) for number in range(9, 13)]
    assert known.find("r1", everything) is None
