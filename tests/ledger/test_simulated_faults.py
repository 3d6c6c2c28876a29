"""What the simulated mesh found in the ledger, as small as it gets; the seeds stand in tests/seeds."""

import pytest

from meshq.ids import Dot, TaskId
from meshq.ledger import core as module
from meshq.ledger.board import Board
from meshq.ledger.buckets import bucket_of
from meshq.ledger.effects import Push, SendPush, SendSync, SyncCompare, SyncOffer
from meshq.ledger.holder import read
from meshq.ledger.journal import Journal
from meshq.ledger.replica import Replica
from meshq.ledger.retention import BATCH, Shelf
from meshq.ledger.row import Back, Cancel, Claim, Started, TextRegister
from meshq.ledger.sessions import Sessions
from meshq.ledger.settings import NOTHING_SET, Retention, Settings
from meshq.ledger.timing import LAN
from meshq.task import EndKind
from tests.ledger.builders import actor, dot, ledger, nothing_new, peer, row, view, views
from tests.ledger.test_core import only


def test_a_row_of_a_task_that_was_purged_here_is_dropped_and_reviewed_by_nobody() -> None:
    replica = Replica(peer("b"), 1, [row()], {actor("a"): 1}, {})
    journal = Journal(replica)
    journal.purge(row().task)
    journal.clear()
    assert journal.absorb([row((dot("a", 2), Cancel(by="ann")))]) == ()
    assert journal.touched == {} and not replica.has(row().task)
    assert replica.floors == {actor("a"): 2}


def test_a_task_that_cannot_be_forgotten_yet_is_looked_at_later_and_not_at_once_for_ever() -> None:
    shelf = Shelf(0.0)
    shelf.keep(0.0, Retention(tasks=0))
    assert shelf.take_old(0.5) == []
    shelf.put(1.0, row())
    due = shelf.deadline()
    assert 1.0 < due < 2.0, "not within the input that ends the task, which looks no more"
    assert shelf.take_old(due) == [row().task]
    shelf.put_back(due, row())
    assert shelf.deadline() > due
    assert shelf.take_old(shelf.deadline()) == [row().task]


def test_what_is_ahead_of_the_vector_is_passed_on_when_its_writer_falls_silent() -> None:
    """The writer's second write never came, and with the writer gone nobody has it: no vector will ever cover the third."""
    ahead = row((dot("c", 3), Claim(attempt=1, peer=peer("c"), seen={actor("a"): 1})))
    core = ledger("a", [ahead], vector={actor("a"): 1, actor("c"): 1})
    core.handle_peers(0.0, views(view("a"), view("b"), view("c")))
    effects = core.handle_peers(5.0, views(view("a"), view("b"), view("c", alive=False, changed_at=5.0)))
    [sent] = [effect for effect in effects if isinstance(effect, SendPush)]
    assert (sent.peer, sent.push.rows, sent.push.dots) == (peer("b"), (ahead,), ())
    [to_newcomer] = [
        effect
        for effect in core.handle_peers(6.0, views(view("a"), view("b"), view("d"), view("c", alive=False, changed_at=5.0)))
        if isinstance(effect, SendPush)
    ]
    assert (to_newcomer.peer, to_newcomer.push.rows) == (peer("d"), (ahead,))


def test_tasks_that_can_never_be_forgotten_do_not_keep_others_from_it() -> None:
    """More than a batch of them, all of which ended before the others: a write of their peer is missing for ever."""
    stuck = [row(birth=dot("a", 2 * seq)) for seq in range(1, 2 * BATCH)]
    others = [row((dot("b", seq), Cancel(by="x", at=9.0)), birth=dot("b", 1_000 + seq)) for seq in range(1, 9)]
    shelf = Shelf(0.0)
    shelf.set_wall_offset(1_000.0)
    shelf.keep(0.0, Retention(tasks=1))
    for each in (*stuck, *others):
        shelf.put(0.0, each)
    by_task = {each.task: each for each in stuck}
    told: list[TaskId] = []
    now = 0.0
    while now < 30.0:
        now = max(now, shelf.deadline())
        old = shelf.take_old(now)
        for task in old:
            if task in by_task:
                shelf.put_back(now, by_task[task])
        told += [task for task in old if task not in by_task]
    assert sorted(told) == sorted(each.task for each in others)


def test_settings_that_are_ahead_of_the_vector_are_passed_on_when_their_writer_falls_silent() -> None:
    """Equal notes tell nobody of them: a queue would be paused at one peer, and at no other."""
    ahead = Settings({"queue/default/paused": TextRegister(1, actor("c"), "ann@c")}, {actor("c"): 3})
    core, other = (ledger(name, vector={actor("c"): 1}, settings=ahead if name == "a" else NOTHING_SET) for name in "ab")
    core.handle_peers(0.0, views(*map(view, "abc")))
    sends = only(core.handle_peers(9.0, views(view("a"), view("b"), view("c", alive=False))), SendPush)
    [push] = [sent.push for sent in sends]
    other.handle_push(9.1, peer("a"), push)
    assert (push.rows, push.dots, other.settings, other.vector) == ((), (), ahead, {actor("c"): 1})


def test_a_copy_of_a_disk_does_not_end_what_the_first_one_runs_unless_it_is_alone() -> None:
    """Its store has seen the copy, so it writes in a later epoch. Others would hold the claims lost if that were true."""
    birth, claim = Dot(actor("a", 0), 1), Dot(actor("a", 0), 2)
    runs = row((claim, Claim(attempt=1, peer=peer("a"), seen={})), (Dot(claim.actor, 3), Started(claim=claim)), birth=birth)
    core = ledger("a", [runs], vector={claim.actor: 3})
    core.handle_peers(0.0, views(view("a"), view("b", alive=False)))  # known of an earlier run
    core.adopt(0.0, [])
    for asked in only(core.handle_peers(0.1, views(view("a"), view("b"))), SendSync):
        core.handle_sync_answer(0.2, asked.peer, nothing_new(asked))
    assert not core._sessions.blocked(1.0) and core.row(runs.task) == runs
    core.handle_peers(2.0, views(view("a"), view("b", alive=False, left=True)))
    found = core.row(runs.task)
    assert found is not None and read(found).ended[claim].kind is EndKind.LOST


def test_of_more_rows_ahead_of_the_vector_than_are_passed_on_at_once_all_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal notes tell of none of them, and the same ones were passed on each time."""
    monkeypatch.setattr(module, "AHEAD_MAX", 3)
    ahead = [row(birth=dot("c", seq)) for seq in range(2, 9)]
    core = ledger("a", ahead, vector={})
    passed = dict[TaskId, None]()
    for now in range(1, 9):
        effects = core.handle_peers(2.0 * now, views(view("a"), view("b")))
        [push] = [effect.push for effect in effects if isinstance(effect, SendPush)]
        assert len(push.rows) == 3
        passed |= dict.fromkeys(each.task for each in push.rows)
        core.handle_peers(2.0 * now + 1, views(view("a")))
    assert len(passed) > 3
    newcomer = ledger("b", vector={actor("d"): 1})
    newcomer.handle_peers(0.0, views(view("b")))
    newcomer.handle_peers(1.0, views(view("a"), view("b")))
    newcomer.handle_sync_failed(1.0, peer("a"), 1)
    _, effects = newcomer.handle_push(2.0, peer("a"), push)
    [asked] = [effect for effect in effects if isinstance(effect, SendSync)]
    offer = SyncOffer(number=asked.question.number, run=1, parts=(bucket_of(actor("z")),), vector={actor("z"): 5})
    [compare] = [each for each in newcomer.handle_sync_answer(2.1, peer("a"), offer) if isinstance(each, SendSync)]
    assert isinstance(compare.question, SyncCompare)


def test_a_few_rows_that_are_passed_on_have_nothing_compared() -> None:
    core = ledger("b")
    core.handle_peers(0.0, views(view("b"), view("a")))
    core.handle_sync_failed(0.0, peer("a"), 1)
    _, effects = core.handle_push(1.0, peer("a"), Push(number=1, rows=(row(birth=dot("c", 5)),), dots=()))
    assert not [effect for effect in effects if isinstance(effect, SendSync)]


def test_of_a_task_that_is_forgotten_nothing_is_remembered_of_claims_that_were_taken_back() -> None:
    claim, back = dot("b", 1), Back(claim=dot("b", 1), seen={})
    over = row((claim, Claim(attempt=1, peer=peer("b"), seen={})), (dot("b", 2), back), (dot("c", 1), Cancel(by="x")))
    board = Board(peer("a"), LAN, Sessions(peer("a"), LAN, 0.0))
    board.index(0.0, over)
    assert list(board._revived) == [claim]
    board.forget(over)
    assert board._revived == {}
