"""A peer that can't take a row says so, and nobody counts on it."""

from dataclasses import replace
from random import Random

import pytest

from meshq.config import SYNC_ROWS_MAX
from meshq.errors import PeerError, StoreError
from meshq.ids import LEDGER_EPOCH_MAX, ActorId, Dot, is_actor_id
from meshq.ledger import replica as module
from meshq.ledger.effects import Push, PushReply, SendPush, SendSync, SyncOffer
from meshq.ledger.pushes import PUSH_DOTS_MAX
from meshq.ledger.replica import sound
from meshq.ledger.row import Claim, Ended, Fact, Lost, Row
from meshq.ledger.settings import NOTHING_SET
from meshq.task import EndKind
from tests.ledger.builders import actor, dot, ledger, outcome, peer, row, spec, view, views
from tests.ledger.test_core import among, born_where_first, only, row_in, with_facts

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
    for facts_full, claims in ((3_072, 1), (2, 0)):
        monkeypatch.setattr(module, "FACTS_FULL", facts_full)
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
    assert core.handle_push(1.0, C, Push(number=1, rows=(far,), dots=()))[0].refused == (), "its row would end no sync"
    assert 1 < core.ledger_epoch <= 1 + module.EPOCH_STEP_MAX
    for number in range(2, 42):  # step by step
        near = naming(min(core.ledger_epoch + module.EPOCH_AHEAD_MAX, LEDGER_EPOCH_MAX))
        near = replace(near, vector={**near.vector, core._replica.actor: 99})
        core.handle_push(1.0, C, Push(number=number, rows=(near,), dots=()))
    assert core.ledger_epoch < LEDGER_EPOCH_MAX // 2
    [task], _ = core.submit(2.0, [spec()], hold=True)
    written = core.row(task)
    assert written is not None and is_actor_id(written.birth.actor)


def test_no_number_of_rows_uses_up_the_epochs_of_a_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pretends to know a write of its newest actor, so each has it take another one."""
    monkeypatch.setattr(module, "EPOCH_STEPS_MIN", 64)  # or it would take a minute
    replica = module.Replica(peer("a"), 1, [], {}, {}, rng=Random(1))
    for _ in range(700):
        near = naming(LEDGER_EPOCH_MAX)
        assert replica.absorb(replace(near, vector={**near.vector, replica.actor: 99})) is not None
    assert LEDGER_EPOCH_MAX // 3 < replica.ledger_epoch < LEDGER_EPOCH_MAX - 64


@pytest.mark.parametrize("field", ["vector", "yours"])
def test_no_answer_makes_a_peer_what_it_can_hardly_have_been(field: str) -> None:
    core = among()
    [asked] = only(core.handle_peers(5.0, views(view("a"), view("b"), view("c"), view("d"))), SendSync)
    far: dict[ActorId, int] = {actor("a"): 9, actor("a", LEDGER_EPOCH_MAX): 1}
    vector, yours = (far if field == name else {} for name in ("vector", "yours"))
    core.handle_sync_answer(5.1, asked.peer, SyncOffer(number=asked.question.number, run=1, vector=vector, yours=yours))
    assert 1 < core.ledger_epoch <= 1 + module.EPOCH_STEP_MAX


def test_nobody_covers_the_writes_of_another_by_his_word() -> None:
    """Else the next task of the other would be taken for one that was purged, and be lost."""
    core = among()
    mine = row(birth=dot("c", 1), queue="nowhere")
    claiming_more = replace(mine, vector={**mine.vector, actor("b"): 1})
    core.handle_push(1.0, C, Push(number=1, rows=(claiming_more,), dots=(dot("b", 1), mine.birth)))
    assert core.vector == {actor("c"): 1} and core.counters["dots_of_others_left_to_syncs"] == 1
    next_one = row(birth=dot("b", 1), queue="nowhere")
    reply, _ = core.handle_push(2.0, B, Push(number=1, rows=(next_one,), dots=(next_one.birth,)))
    assert reply.purged == () and core.row(next_one.task) is not None


def test_what_a_lost_home_has_been_is_believed() -> None:
    core = among()
    plausible = naming(module.EPOCH_AHEAD_MAX)
    assert core.handle_push(1.0, C, Push(number=1, rows=(plausible,), dots=()))[0].refused == ()
    assert core.ledger_epoch > module.EPOCH_AHEAD_MAX


def test_settings_and_vectors_that_name_such_an_epoch_are_taken_and_not_believed() -> None:
    far: dict[ActorId, int] = {actor("a"): 9, actor("a", LEDGER_EPOCH_MAX): 1}
    by_settings, by_vector, by_floors = (among()._replica for _ in range(3))
    assert (
        by_settings.absorb_settings(replace(NOTHING_SET, vector=far)) and by_vector.adopt(far, {}) and by_floors.adopt({}, far)
    )
    for replica in (by_settings, by_vector, by_floors):
        assert 1 < replica.ledger_epoch <= 1 + module.EPOCH_STEP_MAX


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


def test_a_row_that_contradicts_one_of_the_same_writes_is_heeded_as_it_then_stands() -> None:
    """Only a liar makes such rows: what is remembered of a row must be that of the row all the same."""
    core = among()
    first = born_where_first("b", "ac")
    claim, lost = (dot("b", 1), Claim(attempt=1, peer=B, seen=first.vector)), (dot("c", 2), Lost(claim=dot("b", 1), reason="x"))
    whole = with_facts(first, claim, lost)
    partial = replace(whole, facts=tuple(fact for fact in whole.facts if fact != lost))
    core.handle_push(1.0, C, Push(number=1, rows=(partial,), dots=()))
    core.handle_push(2.0, C, Push(number=2, rows=(whole,), dots=()))
    assert lost in row_in(core, first.task).facts
    core.check()
