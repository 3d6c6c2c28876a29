"""A peer that can't take a row says so, and nobody counts on it."""

from dataclasses import replace

import pytest

from meshq.config import SYNC_ROWS_MAX
from meshq.errors import PeerError, StoreError
from meshq.ids import LEDGER_EPOCH_MAX, ActorId, Dot, is_actor_id
from meshq.ledger import replica as module
from meshq.ledger.effects import Push, PushReply, SendPush
from meshq.ledger.pushes import PUSH_DOTS_MAX
from meshq.ledger.replica import sound
from meshq.ledger.row import Claim, Ended, Fact, Row
from meshq.ledger.settings import NOTHING_SET
from meshq.task import EndKind
from tests.ledger.builders import actor, dot, ledger, outcome, peer, row, spec, view, views
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


def test_a_row_of_a_purged_task_raises_no_floor_that_would_make_all_offers_nonsense(monkeypatch: pytest.MonkeyPatch) -> None:
    core = among()
    first = born_where_first("b", "ac")
    core.handle_push(1.0, C, Push(number=1, rows=(first,), dots=(first.birth,)))
    core._forgetting.forget([first.task])
    core._finish(1.0)
    far = replace(first, vector={**first.vector, actor("x"): 2**60})
    assert core.handle_push(2.0, C, Push(number=2, rows=(far,), dots=()))[0].refused == (far.task,)
    monkeypatch.setattr("meshq.ledger.replica.ACTORS_MAX", 3)
    many = [replace(first, vector={**first.vector, actor(name): 1}) for name in "wxyz"]
    for number, each in enumerate(many, 3):
        core.handle_push(3.0, C, Push(number=number, rows=(each,), dots=()))
    assert len(core._replica.floors) <= 3 and sound(core._replica.floors)


def test_a_task_whose_row_is_nearly_as_large_as_others_take_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the next attempt makes a row that all others refuse: no sync with its peer would ever be complete again."""
    claim = dot("c", 1)
    gave_up = Ended(claim=claim, outcome=outcome(EndKind.RELEASED, blameless=True))
    tried = row((claim, Claim(attempt=1, peer=C, seen={actor("b"): 1})), (dot("c", 2), gave_up), birth=dot("b", 1))
    for facts_max, claims in ((4_096, 1), (2, 0)):
        monkeypatch.setattr("meshq.ledger.board.FACTS_MAX", facts_max)
        core = ledger()
        core.adopt(0.0, [])
        core.handle_peers(0.0, views(view("a")))
        core.handle_push(1.0, B, Push(number=1, rows=(tried,), dots=(tried.birth,)))
        found = core.row(tried.task)
        assert found is not None and sum(isinstance(fact, Claim) for _, fact in found.facts) == 1 + claims
    assert core.waiting_reason(1.0, tried.task) == "was tried 1 times, and is not tried again: cancel it and submit it anew"


def naming(ledger_epoch: int, seq: int = 1) -> Row:
    """A row of c that pretends that a has been this actor, and has lost its database since."""
    first = row(birth=dot("c", 1))
    return replace(first, vector={**first.vector, actor("a"): 9, actor("a", ledger_epoch): seq})


def test_nobody_can_drive_a_peer_to_an_epoch_that_others_refuse() -> None:
    core = among()
    far = naming(LEDGER_EPOCH_MAX)
    reply, effects = core.handle_push(1.0, C, Push(number=1, rows=(far,), dots=(far.birth,)))
    assert (reply.refused, effects, core.ledger_epoch) == ((far.task,), [], 1)
    assert core.counters["rows_refused_epoch_too_far"] == 1
    for number in range(2, 12):  # step by step
        near = naming(min(core.ledger_epoch + module.EPOCH_AHEAD_MAX, LEDGER_EPOCH_MAX))
        near = replace(near, vector={**near.vector, actor("a", core.ledger_epoch): 9})
        core.handle_push(1.0, C, Push(number=number, rows=(near,), dots=()))
    [task], _ = core.submit(2.0, [spec()], hold=True)
    written = core.row(task)
    assert written is not None and is_actor_id(written.birth.actor)
    assert core.counters["rows_refused_epoch_too_far"] > 1


def test_what_a_lost_home_has_been_is_believed() -> None:
    core = among()
    plausible = naming(module.EPOCH_AHEAD_MAX)
    assert core.handle_push(1.0, C, Push(number=1, rows=(plausible,), dots=()))[0].refused == ()
    assert core.ledger_epoch > module.EPOCH_AHEAD_MAX


def test_settings_and_vectors_that_name_such_an_epoch_are_refused_too() -> None:
    replica = among()._replica
    far: dict[ActorId, int] = {actor("a"): 9, actor("a", LEDGER_EPOCH_MAX): 1}
    assert not replica.absorb_settings(replace(NOTHING_SET, vector=far))
    assert not replica.adopt(far, {}) and not replica.adopt({}, far)
    assert replica.counters == {"settings_refused_epoch_too_far": 1, "vectors_refused_epoch_too_far": 2}
    assert replica.ledger_epoch == 1


def test_after_the_last_epoch_nothing_is_written_as_another() -> None:
    replica = module.Replica(peer("a"), LEDGER_EPOCH_MAX, [], {}, {})
    with pytest.raises(StoreError):
        replica.detect_lost_database({actor("a", LEDGER_EPOCH_MAX): 1})
    assert replica.ledger_epoch == LEDGER_EPOCH_MAX and replica.take_changes() is None


def crowd(count: int, *, ended: bool) -> Row:
    """So many claims of the first attempt, all by c, who had seen none of them."""
    facts: list[tuple[Dot, Fact]] = [(dot("c", seq), Claim(attempt=1, peer=C, seen={})) for seq in range(1, count + 1)]
    if ended:
        facts += [
            (dot("c", count + seq), Ended(claim=dot("c", seq), outcome=outcome(EndKind.SUPERSEDED)))
            for seq in range(1, count + 1)
        ]
    return row(*facts, birth=dot("b", 1))


def test_a_row_with_more_claims_of_one_attempt_than_machines_can_race_is_refused() -> None:
    core = among()
    many = crowd(module.CLAIMS_OF_ATTEMPT_MAX + 1, ended=False)
    assert core.handle_push(1.0, C, Push(number=1, rows=(many,), dots=()))[0].refused == (many.task,)
    assert core.counters["rows_refused_too_many_claims"] == 1
    most = crowd(module.CLAIMS_OF_ATTEMPT_MAX, ended=True)
    assert core.handle_push(1.0, C, Push(number=2, rows=(most,), dots=()))[0].refused == ()


def test_a_row_keeps_room_for_the_ends_of_its_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FACTS_MAX", 8)
    assert module._has_too_many_claims(crowd(5, ended=False))
    assert not module._has_too_many_claims(crowd(4, ended=False)) and not module._has_too_many_claims(crowd(4, ended=True))


def test_a_push_of_more_than_anybody_sends_changes_nothing() -> None:
    core = among()
    rows = tuple(row(birth=dot("c", seq)) for seq in range(1, SYNC_ROWS_MAX + 2))
    dots = tuple(dot("c", seq) for seq in range(1, PUSH_DOTS_MAX + 2))
    for push in (Push(number=1, rows=rows, dots=()), Push(number=2, rows=rows[:1], dots=dots)):
        with pytest.raises(PeerError):
            core.handle_push(1.0, C, push)
    assert (core.vector, core.row(rows[0].task), core.counters["pushes_refused_too_large"]) == ({}, None, 2)
    assert core.handle_push(1.0, C, Push(number=3, rows=rows[:-1], dots=()))[0].refused == ()
