"""What a core forgets, when, and what becomes of what it was doing about it."""

from dataclasses import replace

import pytest

from meshq.ids import Dot, TaskId, actor_peer_prefix, fence
from meshq.ledger import retention as module
from meshq.ledger.core import Ledger
from meshq.ledger.effects import Persist, Push, PushReply, RowChanged, SendPush, SendSync, Stop
from meshq.ledger.retention import LOOK_AGAIN, SEEN_SECONDS, Shelf
from meshq.ledger.row import Cancel, Claim, Row, Started, Vector
from meshq.ledger.settings import Retention
from meshq.task import Status
from tests.ledger.builders import actor, dot, ledger, nothing_new, outcome, peer, row, spec, telemetry, view, views
from tests.ledger.test_core import THREE, B, C, alone, among, only, row_in

DAY = 86_400.0
WALL = 1_700_000_000.0


def over(seq: int = 1, at: float = WALL) -> Row:
    return row((dot("b", seq), Cancel(by="x", at=at)), birth=dot("a", seq))


# ---- what is old


def shelf(*ends: float, wall: float = WALL) -> Shelf:
    """Tasks that ended at these times, on a machine that has just started."""
    one = Shelf(0.0)
    one.set_wall_offset(wall)
    for seq, end in enumerate(ends, 1):
        one.put(0.0, over(seq, end))
    return one


def test_a_task_is_old_when_it_ended_longer_ago_than_tasks_are_kept() -> None:
    one = shelf(WALL - 8 * DAY, WALL - 6 * DAY)
    assert one.take_old(SEEN_SECONDS) == [over(1).task]
    assert one.take_old(SEEN_SECONDS + LOOK_AGAIN) == []
    assert one.take_old(1.2 * DAY) == [over(2).task]


def test_the_first_hour_forgets_nothing_for_its_age() -> None:
    assert shelf(WALL - 80 * DAY).take_old(SEEN_SECONDS - 1) == []


def test_beyond_the_number_that_is_kept_those_that_ended_first_are_old() -> None:
    one = shelf(WALL - 1, WALL - 3, WALL - 2)
    one.keep(0.0, Retention(tasks=1))
    assert one.take_old(0.0) == [over(2).task, over(3).task]


def test_a_clock_that_jumps_ahead_forgets_nothing() -> None:
    one = shelf(WALL)
    one.set_wall_offset(WALL + 3_650 * DAY)
    assert one.take_old(6 * DAY) == []
    assert one.take_old(7 * DAY) == [over(1).task]


def test_an_end_in_the_future_counts_from_when_it_was_seen() -> None:
    one = shelf(WALL + 3_650 * DAY, WALL - 3 * DAY)
    assert one.take_old(5 * DAY) == [over(2).task]
    assert one.take_old(8 * DAY) == [over(1).task]


def test_nothing_is_old_before_the_wall_clock_was_told() -> None:
    one = Shelf(0.0)
    one.put(0.0, over(1, 0.0))
    assert one.take_old(30 * DAY) == []
    one.set_wall_offset(WALL)
    assert one.take_old(31 * DAY) == [over(1).task]


def test_no_more_are_taken_at_once_than_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH", 2)
    one = shelf(*(WALL - 9 * DAY + number for number in range(3)))
    assert len(one.take_old(SEEN_SECONDS)) == 2
    assert one.take_old(one.deadline()) == [over(3).task]


def test_a_task_that_goes_on_after_all_is_not_old() -> None:
    one = shelf(WALL - 9 * DAY)
    one.remove(over(1).task)
    assert one.take_old(SEEN_SECONDS) == [] and one.deadline() == float("inf")


# ---- what the core does


def keeping(*rows: Row, vector: Vector) -> Ledger:
    core = ledger("a", rows, vector=vector)
    core.set_wall_offset(0.0, WALL)
    core.adopt(0.0, [])
    core.handle_peers(0.0, views(view("a")))
    return core


def test_a_task_that_is_over_for_seven_days_is_forgotten_with_one_commit() -> None:
    gone, kept = over(1, WALL - 8 * DAY), over(2, WALL - 6 * DAY)
    core = keeping(gone, kept, vector={actor("a"): 2, actor("b"): 2})
    effects = core.handle_timeout(SEEN_SECONDS)
    assert effects == [
        Persist((), {}, {str(who): seq for who, seq in gone.vector.items()}, False, purged=(gone.task,)),
        RowChanged(gone.task),
    ]
    assert [each.task for each in core.tasks()] == [kept.task]
    core.check()


def test_a_task_of_which_not_all_is_seen_is_kept() -> None:
    core = keeping(over(1, WALL - 8 * DAY), vector={actor("a"): 1})
    assert core.handle_timeout(SEEN_SECONDS) == []


def test_a_change_of_the_retention_is_heeded_at_once() -> None:
    core = keeping(over(1, WALL - 1), over(2, WALL - 2), vector={actor("a"): 2, actor("b"): 2})
    core.change_settings(1.0, {"retention/tasks": "1"})
    [persist] = only(core.handle_timeout(1.0), Persist)
    assert persist.purged == (over(2).task,)


def test_a_task_that_ends_here_is_forgotten_in_its_time() -> None:
    core = keeping(vector={})
    [task], _ = core.submit(1.0, [spec()], hold=False)
    token = fence(1, Dot(actor("a"), 2))
    core.handle_ready(1.5, token)
    core.handle_ended(9.0, token, replace(outcome(), ended_at=WALL + 9.0))
    core.handle_timeout(7 * DAY)
    assert core.row(task) is not None
    core.handle_timeout(7 * DAY + LOOK_AGAIN)
    assert core.row(task) is None
    core.check()


# ---- what others have purged


def purged_by_others(core: Ledger, born: Row, now: float = 1.0) -> None:
    """The core hears of a task that it has then forgotten."""
    submitter = next(each for each in (B, C) if each.startswith(actor_peer_prefix(born.birth.actor)))
    core.handle_push(now, submitter, Push(number=1, rows=(born,), dots=(born.birth,)))
    core._forgetting.forget([born.task])
    core._finish(now)


def test_a_push_of_a_purged_task_is_answered_so() -> None:
    core, born = among(), row(birth=dot("c", 1))
    purged_by_others(core, row(birth=born.birth, queue="elsewhere"))
    reply, _ = core.handle_push(2.0, C, Push(number=7, rows=(born,), dots=()))
    assert reply == PushReply(number=7, purged=(born.task,))
    assert core.counters["rows_of_purged_tasks_dropped"] == 1


def claiming() -> tuple[Ledger, TaskId, list[SendPush]]:
    """A core that has just claimed a task of another peer."""
    core = ledger()
    core.adopt(0.0, [])
    for asked in only(core.handle_peers(0.0, views(view("a"), *(view(name, telemetry(queues=())) for name in "bc"))), SendSync):
        core.handle_sync_answer(0.0, asked.peer, nothing_new(asked))
    born = row(birth=dot("c", 1))
    _, effects = core.handle_push(1.0, C, Push(number=1, rows=(born,), dots=(born.birth,)))
    return core, born.task, only(effects, SendPush)


def test_a_claim_of_a_task_that_others_have_purged_is_given_up_and_never_starts() -> None:
    core, task, pushes = claiming()
    token = fence(1, Dot(actor("a"), 1))
    effects = core.handle_push_reply(1.2, pushes[0].peer, PushReply(number=pushes[0].push.number, purged=(task,)))
    assert only(effects, Stop) == [Stop(token, "superseded")]
    assert [persist.purged for persist in only(effects, Persist)] == [(task,)]
    assert [send.peer for send in only(effects, SendSync)] == [pushes[0].peer]
    assert core.row(task) is None
    assert core.handle_ready(1.3, token) == []
    core.handle_ended(9.0, token, outcome())
    assert core.counters["ends_of_ended_claims"] == 1
    core.check()


def test_nobody_can_speak_of_tasks_that_were_not_pushed_to_it() -> None:
    core, _, pushes = claiming()
    other = row(birth=dot("c", 2), queue="elsewhere")
    core.handle_push(1.1, C, Push(number=2, rows=(other,), dots=(other.birth,)))
    core.handle_push_reply(1.2, pushes[0].peer, PushReply(number=pushes[0].push.number, purged=(other.task,)))
    assert status_of(core, other) is Status.QUEUED


def status_of(core: Ledger, some: Row) -> Status:
    return core._board.reading(row_in(core, some.task)).status


def test_what_runs_of_a_task_that_was_purged_meanwhile_is_stopped_when_the_agent_finds_it() -> None:
    claim = dot("a", 2)
    base = row(birth=dot("c", 1))
    run = row(
        (claim, Claim(attempt=1, peer=peer("a"), seen=base.vector)), (dot("a", 3), Started(claim=claim)), birth=base.birth
    )
    core = ledger("a", (), vector=dict(run.vector))
    assert core.adopt(0.0, [fence(1, claim)]) == [Stop(fence(1, claim), "superseded")]


def test_a_core_alone_forgets_nothing_by_the_word_of_a_stale_reply() -> None:
    core = alone()
    [task], _ = core.submit(1.0, [spec(queue="elsewhere")], hold=True)
    core.handle_push_reply(2.0, B, PushReply(number=1, purged=(task,)))
    assert core.row(task) is not None and core.counters["push_replies_unexpected"] == 1


def test_whoever_comes_back_after_long_forgets_what_others_have_purged() -> None:
    """Over cores: a ghost is in no queue and nobody's work afterwards."""
    donor, late = among(THREE, name="a"), ledger("b", config=ledger()._config)
    [task], _ = donor.submit(1.0, [spec(queue="elsewhere")], hold=True)
    born = row_in(donor, task)
    late.adopt(0.0, [])
    late.handle_peers(0.0, views(view("a"), view("b")))
    late.handle_push(1.0, peer("a"), Push(number=1, rows=(born,), dots=(born.birth,)))
    donor.cancel(2.0, task, "ann@a")
    donor._forgetting.forget([task])
    donor._finish(2.0)
    sends = only(late.handle_peers(3.0, views(view("b"))), SendSync) + only(
        late.handle_peers(3.0, views(view("a"), view("b"))), SendSync
    )
    assert late.position(task) == 1
    changed: list[RowChanged] = []
    while sends:
        [send] = sends
        answer = donor.handle_sync_request(3.0, peer("b"), send.question)
        effects = late.handle_sync_answer(3.0, peer("a"), answer)
        changed += only(effects, RowChanged)
        sends = only(effects, SendSync)
    assert late.row(task) is None and late.position(task) is None and changed == [RowChanged(task)]
    assert late.vector == donor.vector
    late.check()
