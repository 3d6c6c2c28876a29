"""What the ledger core does with each input: whole lists of effects."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import pytest

from meshq.errors import TaskFailed, Unplaceable, UsageError
from meshq.ids import Dot, Fence, PeerId, TaskId, fence
from meshq.ledger.core import Ledger
from meshq.ledger.effects import (
    Effect,
    PeerView,
    Persist,
    Prepare,
    Push,
    PushReply,
    RowChanged,
    SendPush,
    SendSync,
    Start,
    Stop,
    SyncOffer,
)
from meshq.ledger.holder import attempts, read, status
from meshq.ledger.rendezvous import claimants, mourners
from meshq.ledger.row import Back, Cancel, Claim, Ended, Fact, Lost, Preparing, Row, Started, Vector, merge
from meshq.task import Claimed, EndKind, Needs, Status
from tests.ledger.builders import actor, busy, dot, ledger, nothing_new, outcome, peer, row, spec, telemetry, view, views

T = TypeVar("T")
A, B, C = peer("a"), peer("b"), peer("c")
ALONE = views(view("a"))
BOTH = views(view("a"), view("b"))
THREE = views(view("a"), view("b"), view("c"))


def alone() -> Ledger:
    """A core with nobody else, ready to work."""
    core = ledger()
    core.adopt(0.0, [])
    core.handle_peers(0.0, ALONE)
    return core


def among(seen: Mapping[PeerId, PeerView] = THREE, *rows: Row, name: str = "a", **more: Any) -> Ledger:
    """A core that has met these peers and heard from one of them after its start."""
    core = ledger(name, rows, **more)
    core.adopt(0.0, [])
    [asked, *_] = only(core.handle_peers(0.0, seen), SendSync)
    core.handle_sync_answer(0.0, asked.peer, nothing_new(asked))
    return core


def only(effects: Sequence[Effect], kind: type[T]) -> list[T]:
    return [effect for effect in effects if isinstance(effect, kind)]


def as_text(vector: Vector) -> dict[str, int]:
    return {str(who): seq for who, seq in vector.items()}


def row_in(core: Ledger, task: TaskId) -> Row:
    found = core.row(task)
    assert found is not None
    return found


def born_where_first(core: str, others: str) -> Row:
    """A task for whose first attempt `core` is the first contender."""
    for seq in range(1, 99):
        task = row(birth=dot("c", seq))
        if claimants(task.task, 1, [peer(name) for name in core + others])[0] == peer(core):
            return task
    raise AssertionError("rendezvous prefers somebody always")


def ack(core: Ledger, now: float, effects: Sequence[Effect]) -> list[Effect]:
    """Every push in these effects is acknowledged."""
    answers: list[Effect] = []
    for effect in only(effects, SendPush):
        answers += core.handle_push_reply(now, effect.peer, PushReply(number=effect.push.number))
    return answers


def test_a_task_submitted_where_it_runs_is_stored_and_claimed_in_one_commit() -> None:
    core = alone()
    [task], effects = core.submit(1.0, [spec()], hold=False)
    stored = row_in(core, task)
    claim = Dot(actor("a"), 2)
    assert stored.facts == ((claim, Claim(attempt=1, peer=A, seen={actor("a"): 1}, at=1.0)),)
    assert effects == [
        Persist((stored,), {actor("a"): 2}, {}, True),
        Prepare(Claimed(task=task, fence=fence(1, claim), attempt=1, spec=spec())),
        RowChanged(task),
    ]


def test_with_nobody_else_alive_a_claim_starts_as_soon_as_it_is_ready() -> None:
    core = alone()
    [task], _ = core.submit(1.0, [spec()], hold=False)
    token = fence(1, Dot(actor("a"), 2))
    effects = core.handle_ready(1.5, token)
    assert effects == [Persist((row_in(core, task),), {actor("a"): 3}, {}, True), Start(token), RowChanged(task)]
    assert core.handle_ready(1.6, token) == []
    assert status(row_in(core, task)) is Status.RUNNING


def test_the_end_of_an_attempt_is_committed_and_final() -> None:
    core = alone()
    [task], _ = core.submit(1.0, [spec()], hold=False)
    token = fence(1, Dot(actor("a"), 2))
    core.handle_ready(1.5, token)
    effects = core.handle_ended(9.0, token, outcome())
    assert effects == [Persist((row_in(core, task),), {actor("a"): 4}, {}, True), RowChanged(task)]
    assert status(row_in(core, task)) is Status.SUCCEEDED
    assert core.handle_ended(9.1, token, outcome()) == []
    assert core.counters["ends_of_ended_claims"] == 1


def test_a_claim_is_pushed_to_all_and_starts_when_every_live_peer_has_acked_it() -> None:
    first = born_where_first("a", "bc")
    core = among()
    reply, effects = core.handle_push(1.0, C, Push(number=1, rows=(first,), dots=(first.birth,)))
    claimed = row_in(core, first.task)
    assert reply == PushReply(number=1, rows=(claimed,))
    push = Push(number=1, rows=(claimed,), dots=(Dot(actor("a"), 1),))
    token = fence(1, Dot(actor("a"), 1))
    assert effects == [
        Persist((claimed,), as_text(claimed.vector if first.birth.seq == 1 else {actor("a"): 1}), {}, True),
        *[SendPush(each, push) for each in sorted((B, C))],
        Prepare(Claimed(task=first.task, fence=token, attempt=1, spec=first.spec)),
        RowChanged(first.task),
    ]
    assert core.handle_ready(1.1, token) == []
    assert core.handle_push_reply(1.2, B, PushReply(number=1)) == []
    started = core.handle_push_reply(1.3, C, PushReply(number=1))
    assert only(started, Start) == [Start(token)]
    assert isinstance(started[0], Persist) and isinstance(started[1], SendPush)


def test_without_all_acks_a_claim_starts_after_a_second() -> None:
    first = born_where_first("a", "bc")
    core = among()
    core.handle_push(1.0, C, Push(number=1, rows=(first,), dots=(first.birth,)))
    token = fence(1, Dot(actor("a"), 1))
    core.handle_ready(1.1, token)
    assert only(run_until(core, 1.0, 1.99), Start) == []
    assert only(core.handle_timeout(2.0), Start) == [Start(token)]


def run_until(core: Ledger, now: float, end: float) -> list[Effect]:
    """All timeouts in between; none may be due at once again."""
    effects: list[Effect] = []
    while (due := core.deadline()) <= end:
        now = max(now, due)
        effects += core.handle_timeout(now)
        assert core.deadline() > now, "a busy loop"
    return effects


def test_a_peer_of_rank_one_claims_a_slot_later_and_not_if_it_was_claimed_by_then() -> None:
    first = born_where_first("b", "ac")
    push = Push(number=1, rows=(first,), dots=(first.birth,))
    core = among()
    _, effects = core.handle_push(1.0, C, push)
    assert only(effects, Prepare) == []
    later = run_until(core, 1.0, 1.6)
    assert len(only(later, Prepare)) == 1
    other = among()
    other.handle_push(1.0, C, push)
    theirs = with_facts(first, (dot("b", 1), Claim(attempt=1, peer=B, seen=first.vector)))
    other.handle_push(1.1, B, Push(number=1, rows=(theirs,), dots=(dot("b", 1),)))
    assert only(run_until(other, 1.1, 3.0), Prepare) == []


def with_facts(base: Row, *facts: tuple[Dot, Fact]) -> Row:
    """The row after others have written to it."""
    return merge(base, replace(row(*facts, birth=base.birth), spec=base.spec))


def test_a_claim_that_turns_out_second_ends_as_superseded_before_it_starts() -> None:
    first = born_where_first("b", "a")
    core = among(BOTH)
    core.handle_push(1.0, B, Push(number=1, rows=(first,), dots=(first.birth,)))
    run_until(core, 1.0, 1.5)
    mine = row_in(core, first.task)
    assert [claim.peer for claim in read(mine).claims.values()] == [A]
    theirs = with_facts(first, (dot("b", 1), Claim(attempt=1, peer=B, seen=first.vector)))
    _, effects = core.handle_push(1.6, B, Push(number=2, rows=(theirs,), dots=(dot("b", 1),)))
    token = fence(1, Dot(actor("a"), 1))
    assert [type(effect) for effect in effects] == [Persist, SendPush, Stop, RowChanged]
    assert only(effects, Stop) == [Stop(token, "superseded")]
    ends = [each.status for each in attempts(row_in(core, first.task)) if each.peer == A]
    assert ends == ["superseded"]
    assert core.handle_ready(1.7, token) == []


def running(core: Ledger, now: float = 1.0) -> tuple[TaskId, Fence]:
    """A task that runs at this core."""
    [task], effects = core.submit(now, [spec()], hold=False)
    [prepare] = only(effects, Prepare)
    ack(core, now, effects)
    ack(core, now, core.handle_ready(now, prepare.claimed.fence))
    assert status(row_in(core, task)) is Status.RUNNING
    return task, prepare.claimed.fence


def test_cancelling_what_runs_stops_it_and_is_recorded_when_it_has_ended() -> None:
    core = alone()
    task, token = running(core)
    effects = core.cancel(2.0, task, "bob@b")
    assert effects == [
        Persist((row_in(core, task),), {actor("a"): 4}, {}, True),
        Stop(fence(1, Dot(actor("a"), 2)), "cancelled"),
        RowChanged(task),
    ]
    assert status(row_in(core, task)) is Status.RUNNING
    core.handle_ended(2.5, fence(1, Dot(actor("a"), 2)), outcome(EndKind.FAILED, exit_code=143))
    [attempt] = attempts(row_in(core, task))
    assert (attempt.status, attempt.exit_code, attempt.reason) == ("cancelled", 143, "cancelled by bob@b")
    assert status(row_in(core, task)) is Status.CANCELLED
    assert core.cancel(3.0, task, "bob@b") == []
    assert token


def test_cancelling_what_has_succeeded_or_does_not_exist_is_refused() -> None:
    core = alone()
    task, _ = running(core)
    core.handle_ended(2.0, fence(1, Dot(actor("a"), 2)), outcome())
    with pytest.raises(TaskFailed, match="has succeeded already"):
        core.cancel(3.0, task, "bob@b")
    with pytest.raises(UsageError, match="no such task"):
        core.cancel(3.0, TaskId("a" * 16), "bob@b")


def test_a_task_that_no_known_peer_could_run_is_refused_unless_it_is_held() -> None:
    core = alone()
    with pytest.raises(Unplaceable) as caught:
        core.submit(1.0, [spec(), spec(needs=Needs(gpus=2))], hold=False)
    assert "a has 0 GPUs where 2 are needed" in caught.value.hint
    assert list(core.tasks()) == []
    [task], effects = core.submit(1.0, [spec(needs=Needs(gpus=2))], hold=True)
    assert [type(effect) for effect in effects] == [Persist, RowChanged]
    assert core.waiting_reason(1.0, task) == "no peer can take it now: a has 0 GPUs where 2 are needed"
    assert core.position(task) == 1


def test_a_peer_claims_no_more_than_it_has_room_for_and_the_urgent_first() -> None:
    core = ledger()
    core.adopt(0.0, [])
    tasks, _ = core.submit(0.5, [spec("x"), spec("y"), spec("z", priority=3)], hold=True)
    effects = core.handle_peers(1.0, views(view("a", telemetry(slots_total=2, slots_free=2))))
    assert [prepare.claimed.spec.name for prepare in only(effects, Prepare)] == ["z", "x"]
    assert [core.position(task) for task in tasks] == [None, 1, None]
    assert core.waiting_reason(1.0, tasks[1]) == "waits until one of 1 peers that can run it has room (a)"
    taken = telemetry(slots_total=2, slots_free=0, running=(tasks[0], tasks[2]))
    assert core.handle_capacity(1.1, taken) == []
    [freed] = only(core.handle_capacity(2.0, replace(taken, slots_free=1)), Prepare)
    assert freed.claimed.spec.name == "y"


def test_queues_are_served_strictly_in_order_or_in_turns() -> None:
    for order, expected in (("strict", ["a1", "a2", "b1", "b2"]), ("fair", ["a1", "b1", "a2", "b2"])):
        core = ledger()
        core.adopt(0.0, [])
        core.submit(0.5, [spec(name, queue=name[0]) for name in ("b1", "a1", "b2", "a2")], hold=True)
        told = telemetry(queues=("a", "b"), order=order, slots_total=4, slots_free=4)
        effects = core.handle_peers(1.0, views(view("a", told)))
        assert [prepare.claimed.spec.name for prepare in only(effects, Prepare)] == expected


def test_two_peers_with_a_slot_each_claim_different_tasks_at_once() -> None:
    tasks = [row(birth=dot("c", seq), name=f"t{seq}") for seq in (1, 2)]
    claimed = []
    for name in "ab":
        core = among(BOTH, name=name)
        _, effects = core.handle_push(1.0, C, Push(number=1, rows=tuple(tasks), dots=tuple(each.birth for each in tasks)))
        claimed += [prepare.claimed.spec.name for prepare in only(effects, Prepare)]
    assert sorted(claimed) == ["t1", "t2"]


def theirs_running(*more: tuple[Dot, Fact], **fields: object) -> Row:
    """A task that runs at b."""
    base = row(birth=dot("c", 99), **fields)
    claim = dot("b", 1)
    return with_facts(base, (claim, Claim(attempt=1, peer=B, seen=base.vector)), (dot("b", 2), Started(claim=claim)), *more)


def dead(name: str, since: float) -> PeerView:
    return replace(view(name), alive=False, changed_at=since)


def gone_b(since: float) -> Mapping[PeerId, PeerView]:
    return views(view("a"), dead("b", since), view("c"))


def test_a_claim_of_a_dead_peer_is_declared_lost_after_the_grace_and_its_task_is_tried_again() -> None:
    lost = theirs_running()
    core = among(THREE, lost)
    core.handle_peers(10.0, gone_b(10.0))
    rank = mourners(lost.task, dot("b", 1), [A, C]).index(A)
    before = run_until(core, 10.0, 17.9 + rank)
    assert only(before, Persist) == []
    effects = run_until(core, 17.9 + rank, 18.3 + rank)
    kinds = [type(fact).__name__ for _, fact in row_in(core, lost.task).facts]
    assert kinds.count("Lost") == 1
    [view_of_b, *_] = attempts(row_in(core, lost.task))
    assert (view_of_b.status, view_of_b.reason) == ("lost", "b was not seen for 8 s")
    assert [prepare.claimed.attempt for prepare in only(effects, Prepare)] == [2]


def test_a_claim_that_was_taken_back_has_time_until_gossip_knows_even_if_its_task_had_failed_otherwise() -> None:
    base = row(birth=dot("c", 99))
    first, second = dot("c", 100), dot("b", 2)
    running_at_b = with_facts(
        base,
        (first, Claim(attempt=1, peer=C, seen=base.vector)),
        (dot("b", 1), Lost(claim=first)),
        (second, Claim(attempt=2, peer=B, seen={actor("c"): 100, actor("b"): 1})),
        (dot("b", 3), Started(claim=second)),
        (dot("c", 101), Ended(claim=first, outcome=outcome(EndKind.FAILED))),  # written meanwhile on the other side
    )
    core = among(THREE, running_at_b)
    core.handle_peers(10.0, gone_b(10.0))
    run_until(core, 10.0, 20.0)
    lost = row_in(core, base.task)
    assert second in read(lost).lost and read(lost).status is Status.FAILED
    back = with_facts(lost, (dot("b", 4), Back(claim=second, seen=lost.vector)))
    core.handle_push(20.0, B, Push(number=1, rows=(back,), dots=(dot("b", 4),)))
    run_until(core, 20.0, 27.9)
    assert second in read(row_in(core, base.task)).live, "b is still held dead, and has just spoken"
    run_until(core, 27.9, 30.0)
    assert second in read(row_in(core, base.task)).lost


def test_a_task_may_bring_its_own_grace() -> None:
    lost = theirs_running(lease=1.0)
    core = among(THREE, lost)
    core.handle_peers(10.0, gone_b(10.0))
    run_until(core, 10.0, 12.5)
    assert attempts(row_in(core, lost.task))[0].status == "lost"


def test_a_peer_that_left_or_lost_its_ledger_has_lost_its_claims_at_once() -> None:
    for b in (replace(view("b"), alive=False, left=True, changed_at=10.0), view("b", telemetry(ledger_epoch=2))):
        lost = theirs_running()
        core = among(THREE, lost)
        core.handle_peers(10.0, views(view("a"), b, view("c")))
        run_until(core, 10.0, 11.1)
        assert attempts(row_in(core, lost.task))[0].status == "lost"


def test_a_peer_that_sees_fewer_than_half_of_the_others_declares_nobody_lost_until_they_are_long_gone() -> None:
    lost = theirs_running()
    core = among(THREE, lost)
    core.handle_peers(10.0, views(view("a"), dead("b", 10.0), dead("c", 10.0)))
    run_until(core, 10.0, 609.0)
    assert attempts(row_in(core, lost.task))[0].status == "running"
    run_until(core, 609.0, 612.0)
    assert attempts(row_in(core, lost.task))[0].status == "lost"


def test_after_a_stall_nothing_is_claimed_started_or_mourned_before_a_peer_has_answered() -> None:
    lost = theirs_running()
    core = among(THREE, lost)
    core.handle_peers(10.0, gone_b(10.0))
    asked = core.handle_stall(30.0, 20.0)
    [request] = only(asked, SendSync)
    assert request.peer == C
    first = born_where_first("a", "c")
    core.handle_push(30.1, C, Push(number=1, rows=(first,), dots=(first.birth,)))
    run_until(core, 30.1, 33.0)
    assert attempts(row_in(core, lost.task))[0].status == "running"
    assert attempts(row_in(core, first.task)) == ()
    core.handle_sync_answer(33.1, C, nothing_new(request))
    run_until(core, 33.1, 36.0)
    assert attempts(row_in(core, lost.task))[0].status == "lost"


def declared_lost(core: Ledger, task: TaskId, later_attempt: bool) -> tuple[Push, Row]:
    """What c pushes after it gave up this core, perhaps after starting the task itself."""
    mine = row_in(core, task)
    [at] = read(mine).live
    facts: list[tuple[Dot, Fact]] = [(dot("c", 1), Lost(claim=at))]
    if later_attempt:
        seen = with_facts(mine, *facts).vector
        facts += [(dot("c", 2), Claim(attempt=2, peer=C, seen=seen)), (dot("c", 3), Started(claim=dot("c", 2)))]
    told = with_facts(mine, *facts)
    return Push(number=1, rows=(told,), dots=tuple(at for at, _ in facts)), told


def test_a_running_claim_that_was_declared_lost_is_taken_back_and_holds_before_later_attempts() -> None:
    core = among(views(view("a"), view("c", busy(telemetry()))))
    task, _ = running(core)
    push, _ = declared_lost(core, task, later_attempt=True)
    _, effects = core.handle_push(5.0, C, push)
    assert only(effects, Stop) == []
    assert [each.status for each in attempts(row_in(core, task))] == ["running", "running"]
    reading = read(row_in(core, task))
    assert reading.holder is not None and reading.claims[reading.holder].peer == A


def test_a_machine_that_slept_gives_way_to_a_later_attempt_that_runs() -> None:
    core = among(views(view("a"), view("c", busy(telemetry()))))
    task, token = running(core)
    push, _ = declared_lost(core, task, later_attempt=True)
    core.handle_stall(50.0, 40.0)
    _, effects = core.handle_push(50.1, C, push)
    assert only(effects, Stop) == [Stop(fence(1, Dot(actor("a"), 2)), "superseded")]
    assert [each.status for each in attempts(row_in(core, task))] == ["superseded", "running"]
    assert token


def test_a_success_elsewhere_ends_what_runs_here() -> None:
    core = among(views(view("a"), view("c", busy(telemetry()))))
    task, token = running(core)
    push, told = declared_lost(core, task, later_attempt=True)
    done = with_facts(told, (dot("c", 4), Ended(claim=dot("c", 2), outcome=outcome())))
    _, effects = core.handle_push(5.0, C, replace(push, rows=(done,)))
    assert len(only(effects, Stop)) == 1
    assert core.handle_ended(5.1, fence(1, Dot(actor("a"), 2)), outcome()) == []
    assert [each.status for each in attempts(row_in(core, task))] == ["superseded", "succeeded"]
    assert token


def test_at_the_start_claims_that_exec_still_has_are_adopted_and_the_others_are_lost() -> None:
    kept, gone = row(birth=dot("a", 1)), row(birth=dot("a", 2))
    rows = [
        with_facts(
            base, (dot("a", seq), Claim(attempt=1, peer=A, seen=base.vector)), (dot("a", seq + 1), Started(claim=dot("a", seq)))
        )
        for base, seq in ((kept, 3), (gone, 5))
    ]
    core = ledger(rows=rows)
    core.handle_peers(0.0, views(view("a", busy(telemetry()))))
    effects = core.adopt(0.1, [fence(1, dot("a", 3))])
    assert effects == [
        Persist((row_in(core, gone.task),), {actor("a"): 7}, {}, True),
        RowChanged(kept.task),
        RowChanged(gone.task),
    ]
    assert [attempts(row_in(core, each.task))[0].status for each in (kept, gone)] == ["running", "lost"]
    core.handle_ended(1.0, fence(1, dot("a", 3)), outcome())
    assert status(row_in(core, kept.task)) is Status.SUCCEEDED


def test_a_claim_that_was_being_prepared_when_the_agent_died_waits_for_exec_to_give_it_up() -> None:
    base = row(birth=dot("a", 1))
    claim = dot("a", 2)
    core = ledger(rows=[with_facts(base, (claim, Claim(attempt=1, peer=A, seen=base.vector)))])
    core.handle_peers(0.0, views(view("a", busy(telemetry()))))
    assert core.adopt(0.1, [fence(1, claim)]) == [RowChanged(base.task)]  # no second Prepare of one fence
    core.handle_ended(0.2, fence(1, claim), outcome(EndKind.RELEASED))
    assert [each.status for each in attempts(row_in(core, base.task))] == ["lost"]
    assert status(row_in(core, base.task)) is Status.QUEUED


def test_what_exec_runs_under_a_claim_that_has_ended_is_stopped_at_the_start() -> None:
    base = row(birth=dot("a", 1))
    claim = dot("a", 2)
    over = with_facts(
        base,
        (claim, Claim(attempt=1, peer=A, seen=base.vector)),
        (dot("a", 3), Ended(claim=claim, outcome=outcome(EndKind.SUPERSEDED))),
    )
    core = ledger(rows=[over])
    assert only(core.adopt(0.0, [fence(1, claim)]), Stop) == [Stop(fence(1, claim), "superseded")]


def test_an_end_that_is_reported_before_its_row_came_back_is_recorded_when_it_comes() -> None:
    base = row(birth=dot("a", 1))
    claim = dot("a", 2)
    known_elsewhere = with_facts(base, (claim, Claim(attempt=1, peer=A, seen=base.vector)), (dot("a", 3), Started(claim=claim)))
    core = ledger()
    core.adopt(0.0, [fence(1, claim)])
    [asked] = only(core.handle_peers(0.0, BOTH), SendSync)
    assert core.handle_ended(1.0, fence(1, claim), outcome()) == []
    core.handle_push(2.0, B, Push(number=1, rows=(known_elsewhere,), dots=()))
    assert core.holds_back(fence(1, claim)), "the agent may have been away for a week: first somebody must answer it"
    core.handle_sync_answer(3.0, asked.peer, nothing_new(asked))
    assert status(row_in(core, base.task)) is Status.SUCCEEDED
    assert not core.holds_back(fence(1, claim))
    assert core.ledger_epoch > 1, "b knew writes of mine that I had lost"


def test_an_agent_that_knows_others_waits_for_them_before_it_claims() -> None:
    core = ledger()
    core.adopt(0.0, [])
    core.submit(0.0, [spec()], hold=True)
    assert only(core.handle_peers(0.0, views(view("a"), dead("b", 0.0))), Prepare) == []
    assert only(run_until(core, 0.0, 7.9), Prepare) == []
    assert len(only(run_until(core, 7.9, 8.1), Prepare)) == 1


def test_a_peer_that_released_a_task_leaves_it_to_others_while_there_are_any() -> None:
    base = row(birth=dot("c", 1))
    claim = dot("a", 1)
    released = with_facts(
        base,
        (claim, Claim(attempt=1, peer=A, seen=base.vector)),
        (dot("a", 2), Ended(claim=claim, outcome=outcome(EndKind.RELEASED))),
    )
    core = among(BOTH, released)
    assert only(run_until(core, 0.0, 5.0), Prepare) == []
    effects = core.handle_peers(5.0, ALONE)
    assert len(only(effects, Prepare)) == 1


def test_leaving_gives_back_what_is_claimed_and_stops_what_runs() -> None:
    core = ledger()
    core.adopt(0.0, [])
    core.handle_peers(0.0, views(view("a", telemetry(slots_total=2, slots_free=2))))
    one, token = running(core)
    [other], _ = core.submit(1.5, [spec("second")], hold=False)
    effects = core.leave(2.0)
    assert [stop.reason for stop in only(effects, Stop)] == ["leaving", "leaving"]
    core.handle_ended(2.5, fence(1, Dot(actor("a"), 2)), outcome(EndKind.CANCELLED))
    for task in (one, other):
        [attempt] = attempts(row_in(core, task))
        assert (attempt.status, attempt.reason) == ("lost", "its peer left the mesh")
        assert status(row_in(core, task)) is Status.QUEUED
    assert only(run_until(core, 2.5, 20.0), Prepare) == []
    assert token


def test_slow_preparation_is_shown() -> None:
    core = alone()
    [task], _ = core.submit(1.0, [spec()], hold=False)
    token = fence(1, Dot(actor("a"), 2))
    effects = core.handle_slow(2.0, token)
    assert effects == [Persist((row_in(core, task),), {actor("a"): 3}, {}, True), RowChanged(task)]
    assert isinstance(row_in(core, task).facts[-1][1], Preparing)
    assert core.handle_slow(3.0, token) == []


def test_pushes_are_repeated_after_failures_and_then_left_to_syncs() -> None:
    core = among(views(view("a", busy(telemetry())), view("b", busy(telemetry()))))
    _, effects = core.submit(1.0, [spec()], hold=False)
    [push] = only(effects, SendPush)
    times = []
    now = 1.0
    for _ in range(4):
        core.handle_push_failed(now, B, push.push.number)
        again = [effect for effect in run_until(core, now, now + 0.5) if isinstance(effect, SendPush)]
        times.append(len(again))
        now += 0.5
    assert times == [1, 1, 1, 0]
    assert core.counters["pushes_left_to_sync"] == 1


def test_who_acknowledged_a_submitted_task_is_remembered() -> None:
    core = among(views(view("a", busy(telemetry())), view("b", busy(telemetry()))))
    [task], effects = core.submit(1.0, [spec()], hold=False)
    assert core.stored_on(task) == ()
    assert ack(core, 1.1, effects) == [RowChanged(task)]
    assert core.stored_on(task) == (B,)


def test_a_sync_that_brings_nothing_commits_nothing() -> None:
    core = among(BOTH, row())
    asked = [effect for effect in run_until(core, 0.0, 6.0) if isinstance(effect, SendSync)]
    assert core.handle_sync_answer(6.0, asked[0].peer, nothing_new(asked[0])) == []


def test_an_idle_core_wakes_up_a_few_times_a_minute() -> None:
    core = among(BOTH)
    wakes = 0
    now = 1.0
    while (due := core.deadline()) < 301.0:
        assert due > now
        now, wakes = due, wakes + 1
        for sync in only(core.handle_timeout(now), SendSync):
            core.handle_sync_answer(now, sync.peer, nothing_new(sync))
    assert wakes <= 60


INPUTS: list[Callable[[Ledger, Fence], object]] = [
    lambda core, token: core.handle_ready(9.0, token),
    lambda core, token: core.handle_slow(9.0, token),
    lambda core, token: core.handle_ended(9.0, token, outcome()),
    lambda core, token: core.handle_push_reply(9.0, B, PushReply(number=99)),
    lambda core, token: core.handle_push_failed(9.0, B, 99),
    lambda core, token: core.handle_sync_answer(9.0, B, SyncOffer(number=99, run=1, vector={actor("c"): 5})),
]


@pytest.mark.parametrize("late", INPUTS)
def test_an_answer_to_nothing_changes_nothing(late: Callable[[Ledger, Fence], object]) -> None:
    core = among(BOTH, row((dot("b", 1), Cancel(by="x"))))
    assert late(core, fence(3, dot("b", 5))) == []
    core.check()
