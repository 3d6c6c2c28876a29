"""What the ledger core does for tasks under `--on-isolation stop`: whole lists of effects."""

from dataclasses import replace

import pytest

from meshq.errors import PeerError
from meshq.ids import Dot, Fence, TaskId, fence
from meshq.ledger.core import Ledger
from meshq.ledger.effects import (
    Ask,
    Effect,
    Grant,
    GrantReply,
    GrantRequest,
    Keep,
    Persist,
    Prepare,
    Push,
    RowChanged,
    SendGrants,
    Start,
    Stop,
)
from meshq.ledger.holder import attempts, read
from meshq.ledger.row import Cancel, Claim, Ended, Lost, Row, Started
from meshq.task import Claimed, EndKind, Status
from tests.ledger.builders import actor, dot, ledger, outcome, row, spec, telemetry, view, views
from tests.ledger.test_core import (
    ALONE,
    BOTH,
    THREE,
    A,
    B,
    C,
    ack,
    among,
    born_where_first,
    dead,
    only,
    row_in,
    run_until,
    with_facts,
)

VOTERS = (actor("a"), actor("b"), actor("c"))
BURIED = views(view("a"), dead("b", 1.0), dead("c", 1.0))


def strict(*, first: str = "a", others: str = "bc") -> Row:
    """A task for whose first attempt `first` is the first contender, with all three as its voters."""
    born = born_where_first(first, others).birth
    return replace(row(birth=born, isolation="stop"), voters=VOTERS)


def claimed(core_name: str = "a") -> tuple[Ledger, TaskId, Fence]:
    """A core that has claimed such a task at 1.0, and whose claim all have acked; nobody has granted anything but itself."""
    core = among(THREE, name=core_name)
    task = strict()
    effects = core.handle_push(1.0, C, Push(number=1, rows=(task,), dots=()))[1]
    [prepare] = only(effects, Prepare)
    ack(core, 1.1, effects)
    return core, task.task, prepare.claimed.fence


def granted(core: Ledger, now: float, request: SendGrants) -> list[Effect]:
    """The voter grants all of it."""
    tokens = tuple(ask.fence for ask in request.request.asks)
    return core.handle_grant_reply(now, request.peer, GrantReply(number=request.request.number, granted=tokens))


def running() -> tuple[Ledger, TaskId, Fence]:
    """A core that runs such a task since 1.3, by its own vote and b's."""
    core, task, token = claimed()
    core.handle_ready(1.2, token)
    [_, to_b, _] = [None, *only(core.handle_timeout(2.0), SendGrants)]
    granted(core, 2.1, to_b)
    assert read(row_in(core, task)).status is Status.RUNNING
    return core, task, token


# --- voters


def test_up_to_five_voters_are_drawn_from_who_is_alive_and_has_said_which_database_it_has() -> None:
    many = [view(name) for name in "abcdefg"]
    silent = view("h", telemetry(ledger_epoch=0))
    core = among(views(*many, silent, dead("i", 0.0)))
    [task], _ = core.submit(1.0, [spec(isolation="stop")], hold=True)
    drawn = row_in(core, task).voters
    assert len(set(drawn)) == 5 and set(drawn) < {actor(name) for name in "abcdefg"}
    [ordinary], _ = core.submit(1.0, [spec()], hold=True)
    assert row_in(core, ordinary).voters == ()


def test_with_two_peers_both_are_voters_and_alone_one_is_its_own() -> None:
    core = among(BOTH)
    [task], _ = core.submit(1.0, [spec(isolation="stop")], hold=True)
    assert set(row_in(core, task).voters) == {actor("a"), actor("b")}
    core = ledger()
    core.adopt(0.0, [])
    core.handle_peers(0.0, ALONE)
    [task], _ = core.submit(1.0, [spec(isolation="stop")], hold=True)
    assert row_in(core, task).voters == (actor("a"),)


def test_a_row_whose_voters_and_spec_contradict_each_other_is_refused() -> None:
    core = among(THREE)
    task = strict()
    many = replace(task, voters=tuple(actor(name) for name in "abcdef"))
    for broken in (replace(task, voters=()), replace(row(birth=dot("c", 9)), voters=VOTERS), many):
        reply, _ = core.handle_push(1.0, C, Push(number=1, rows=(broken,), dots=()))
        assert reply.refused == (broken.task,)


# --- starting


def test_a_claim_votes_for_itself_in_the_commit_that_makes_it_and_asks_the_others_at_once() -> None:
    core = among(THREE)
    task = strict()
    _, effects = core.handle_push(1.0, C, Push(number=1, rows=(task,), dots=()))
    claim = Dot(actor("a"), 1)
    token = fence(1, claim)
    asks = (Ask(task=task.task, fence=token),)
    stored = row_in(core, task.task)
    vote = {task.task: Grant(fence=token, seconds=30.0)}
    assert effects[0] == Persist((stored,), {actor("a"): 1}, {}, True, grants=vote)
    tail = effects[-4:]
    assert tail == [
        Prepare(Claimed(task=task.task, fence=token, attempt=1, spec=task.spec)),
        SendGrants(B, GrantRequest(number=tail_number(tail, 1), seconds=30.0, asks=asks)),
        SendGrants(C, GrantRequest(number=tail_number(tail, 2), seconds=30.0, asks=asks)),
        RowChanged(task.task),
    ]


def tail_number(effects: list[Effect], place: int) -> int:
    effect = effects[place]
    assert isinstance(effect, SendGrants)
    return effect.request.number


def test_it_starts_only_with_a_majority_and_the_shim_is_told_until_when_before_it_starts() -> None:
    core, task, token = claimed()
    assert only(core.handle_ready(1.2, token), Start) == []
    assert only(run_until(core, 1.2, 1.9), Start) == []
    [to_b, _] = only(core.handle_timeout(2.0), SendGrants)
    effects = granted(core, 2.1, to_b)
    stored = row_in(core, task)
    assert effects[0] == Persist((stored,), {actor("a"): 2}, {}, True)
    assert effects[-3:] == [Keep(token, 1.0 + 29.4), Start(token), RowChanged(task)]
    assert Dot(actor("a"), 2) in dict(stored.facts) and isinstance(dict(stored.facts)[Dot(actor("a"), 2)], Started)


def test_renewals_are_one_message_to_each_voter_and_move_the_moment_on() -> None:
    core, _, token = running()
    keep = Keep(token, 2.0 + 29.4)
    assert only(core.handle_timeout(6.0), Keep) == [keep], "its own vote was renewed, so b's is the second of two"
    [to_b] = [send for send in only(core.handle_timeout(7.0), SendGrants) if send.peer == B]
    assert granted(core, 7.1, to_b) == [Keep(token, 6.0 + 29.4)]
    assert core.handle_grants_failed(7.2, C, 99) == []


def test_without_a_task_that_asks_for_it_no_message_is_sent_and_no_timer_set() -> None:
    core = among(THREE)
    plain = born_where_first("a", "bc")
    effects = core.handle_push(1.0, C, Push(number=1, rows=(plain,), dots=()))[1]
    [prepare] = only(effects, Prepare)
    ack(core, 1.1, effects)
    effects += core.handle_ready(1.2, prepare.claimed.fence)
    assert len(only(effects, Start)) == 1
    assert only(effects + run_until(core, 1.2, 60.0), SendGrants) == []
    assert only(effects, Keep) == []


def test_who_cannot_reach_a_majority_claims_nothing_and_says_why() -> None:
    core = among(THREE)
    core.handle_peers(0.5, BURIED)
    _, effects = core.handle_push(1.0, C, Push(number=1, rows=(strict(),), dots=()))
    assert only([*effects, *run_until(core, 1.0, 30.0)], Prepare) == []
    reason = core.waiting_reason(30.0, strict().task)
    assert reason == "waits for a majority of its voters: b, c cannot vote now"
    assert len(only([*core.handle_peers(31.0, BOTH), *run_until(core, 31.0, 33.0)], Prepare)) == 1


def test_a_task_whose_voters_are_gone_for_good_says_what_helps() -> None:
    core = among(THREE)
    core.handle_push(1.0, C, Push(number=1, rows=(strict(),), dots=()))
    lost = view("c", telemetry(ledger_epoch=2))
    core.handle_peers(2.0, views(view("a"), replace(dead("b", 1.0), left=True), lost))
    assert core.waiting_reason(3.0, strict().task) == (
        "no majority of its voters will ever be there again (b has left, c has lost its ledger): "
        "cancel it, then `meshq retry` it"
    )


def test_a_claim_that_can_get_no_majority_any_more_is_released_at_once_and_blameless() -> None:
    core, task, token = claimed()
    sends = only(core.handle_timeout(2.0), SendGrants)
    for send in sends:
        effects = core.handle_grant_reply(2.1, send.peer, GrantReply(number=send.request.number, refused=(token,)))
    [end] = read(row_in(core, task)).ended.values()
    assert (end.kind, end.blameless) == (EndKind.RELEASED, True)
    assert Stop(token, "released") in effects
    core, task, token = claimed()
    effects = core.handle_peers(3.0, BURIED)
    assert Stop(token, "released") in effects, "the others are gone, and this side is the minority"


def test_what_runs_is_not_given_up_by_the_agent_when_the_others_are_gone_since_the_shim_counts() -> None:
    core, task, token = running()
    effects = [*core.handle_peers(3.0, BURIED), *run_until(core, 3.0, 60.0)]
    assert only(effects, Stop) == []
    assert [keep.until for keep in only(effects, Keep)] == [2.0 + 29.4], "as long as b has granted, and no longer"
    core.handle_ended(61.0, token, outcome(EndKind.RELEASED, exit_code=143, blameless=True))
    reading = read(row_in(core, task))
    assert (reading.releases, reading.losses, reading.failures) == (0, 0, 0)


def test_a_claim_that_runs_is_recorded_as_ended_only_when_it_has_ended() -> None:
    """Voters grant the next attempt on the word of that end."""
    core, task, token = running()
    before = row_in(core, task)
    other = with_facts(
        before, (dot("b", 1), Claim(attempt=1, peer=B, seen={})), (dot("b", 2), Ended(claim=dot("b", 1), outcome=outcome()))
    )
    effects = core.handle_push(3.0, B, Push(number=2, rows=(other,), dots=()))[1]
    assert only(effects, Stop) == [Stop(token, "superseded")]
    assert Dot(actor("a"), 1) not in read(row_in(core, task)).ended
    core.handle_ended(4.0, token, outcome(EndKind.SUPERSEDED))
    assert read(row_in(core, task)).ended[Dot(actor("a"), 1)].kind is EndKind.SUPERSEDED


def test_what_its_voters_had_ended_says_so_though_another_attempt_has_succeeded_meanwhile() -> None:
    core, task, token = running()
    core.handle_stall(2.0, 100.0)  # what it hears first now may be old
    core.handle_ended(2.1, token, outcome(EndKind.RELEASED, reason="cut off", blameless=True))
    later = (dot("b", 1), Claim(attempt=2, peer=B, seen=row_in(core, task).vector))
    lost = (dot("b", 2), Lost(claim=Dot(actor("a"), 1), reason="was not seen", at=0.0))
    other = with_facts(row_in(core, task), lost, later, (dot("b", 3), Ended(claim=dot("b", 1), outcome=outcome())))
    core.handle_push(3.0, B, Push(number=2, rows=(other,), dots=()))
    run_until(core, 3.0, 60.0)
    first = attempts(row_in(core, task))[0]
    assert (first.status, first.reason) == ("lost", "cut off")


def test_an_adopted_attempt_goes_on_being_renewed() -> None:
    task = strict()
    claim = dot("a", 1)
    known = with_facts(task, (claim, Claim(attempt=1, peer=A, seen=task.vector)), (dot("a", 2), Started(claim=claim)))
    token = fence(1, claim)
    core = ledger("a", [known], grants={task.task: Grant(fence=token, seconds=30.0)})
    core.adopt(0.0, [token])
    sends = only(core.handle_peers(0.5, THREE), SendGrants)
    sends += only(run_until(core, 0.5, 1.0), SendGrants)
    [to_b, _] = sends
    [keep] = only(granted(core, 1.1, to_b), Keep)
    assert keep.fence == token and keep.until >= 29.4


# --- voting


def voter() -> tuple[Ledger, TaskId, Fence]:
    """b, which knows of a's claim of the task."""
    task = strict()
    claim = dot("a", 1)
    known = with_facts(task, (claim, Claim(attempt=1, peer=A, seen=task.vector)))
    return among(THREE, known, name="b"), task.task, fence(1, claim)


def test_a_vote_is_committed_before_it_is_told_and_survives_a_restart() -> None:
    core, task, token = voter()
    request = GrantRequest(number=7, seconds=30.0, asks=(Ask(task=task, fence=token),))
    reply, effects = core.handle_grant_request(1.0, A, request)
    assert reply == GrantReply(number=7, granted=(token,))
    assert effects == [Persist((), {}, {}, True, grants={task: Grant(fence=token, seconds=30.0)})]
    assert core.handle_grant_request(6.0, A, replace(request, number=8)) == (GrantReply(number=8, granted=(token,)), [])
    assert core.handle_grant_request(6.0, A, GrantRequest(number=9, seconds=30.0, asks=())) == (GrantReply(number=9), [])


@pytest.mark.parametrize("new_actor", [True, False])
def test_only_who_may_have_voted_as_this_actor_in_an_earlier_run_waits_after_a_start(new_actor: bool) -> None:
    """Votes are no writes of the ledger: a disk that was set back does not show that some are missing."""
    task = strict()
    claim = dot("a", 1)
    known = with_facts(task, (claim, Claim(attempt=1, peer=A, seen=task.vector)))
    core = among(THREE, known, name="b", new_actor=new_actor)
    token = fence(1, claim)
    request = GrantRequest(number=7, seconds=30.0, asks=(Ask(task=task.task, fence=token),))
    reply = core.handle_grant_request(1.0, A, request)[0]
    assert reply == GrantReply(number=7, granted=(token,) if new_actor else (), waits={} if new_actor else {token: 29.0})


def test_requests_that_break_the_rules_change_nothing() -> None:
    core, task, token = voter()
    ask = Ask(task=task, fence=token)
    for sender, seconds, asks in (
        (C, 30.0, (ask,)),
        (A, 0.0, (ask,)),
        (A, 10_000.0, (ask,)),
        (A, float("nan"), (ask,)),
        (A, 30.0, (ask,) * 1001),
        (A, 30.0, (replace(ask, fence=Fence("no fence")),)),
    ):
        with pytest.raises(PeerError):
            core.handle_grant_request(1.0, sender, GrantRequest(number=1, seconds=seconds, asks=asks))
    assert core.handle_timeout(1.0) == []


def test_grants_of_tasks_that_are_over_are_forgotten() -> None:
    core, task, token = voter()
    core.handle_grant_request(1.0, A, GrantRequest(number=7, seconds=30.0, asks=(Ask(task=task, fence=token),)))
    over = with_facts(row_in(core, task), (dot("a", 2), Ended(claim=dot("a", 1), outcome=outcome())))
    core.handle_push(5.0, A, Push(number=1, rows=(over,), dots=()))
    forgotten = [effect.grants for effect in only(run_until(core, 5.0, 70.0), Persist) if effect.grants]
    assert forgotten == [{task: None}]


def test_a_voter_that_knows_of_a_cancel_lets_nothing_start() -> None:
    core, task, token = voter()
    cancelled = with_facts(row_in(core, task), (dot("c", 99), Cancel(by="ann@c")))
    core.handle_push(2.0, C, Push(number=1, rows=(cancelled,), dots=()))
    reply, _ = core.handle_grant_request(3.0, A, GrantRequest(number=1, seconds=30.0, asks=(Ask(task=task, fence=token),)))
    assert reply.refused == (token,)


# --- sleepers (also of ordinary tasks): nothing is claimed, started, declared lost or reported on beliefs of the past


def test_the_end_of_an_attempt_is_held_back_until_a_peer_that_slept_has_an_answer() -> None:
    core = among(THREE)
    plain = born_where_first("a", "bc")
    effects = core.handle_push(1.0, C, Push(number=1, rows=(plain,), dots=()))[1]
    [prepare] = only(effects, Prepare)
    token = prepare.claimed.fence
    ack(core, 1.1, effects)
    core.handle_ready(1.2, token)
    core.handle_stall(100.0, 98.0)
    assert only(core.handle_ended(100.1, token, outcome()), Persist) == []
    assert core.holds_back(token)
    claim = Dot(actor("a"), 1)
    elsewhere = with_facts(
        row_in(core, plain.task),
        (dot("b", 1), Lost(claim=claim)),
        (dot("b", 2), Claim(attempt=2, peer=B, seen={actor("a"): 2, actor("b"): 1, actor("c"): 99})),
        (dot("b", 3), Started(claim=dot("b", 2))),
        (dot("b", 4), Ended(claim=dot("b", 2), outcome=outcome())),
    )
    _, effects = core.handle_push(100.2, B, Push(number=9, rows=(elsewhere,), dots=()))
    assert core.holds_back(token) and only(effects, Stop) == []
    run_until(core, 100.2, 100.0 + 30.5)
    assert not core.holds_back(token)
    assert read(row_in(core, plain.task)).ended[claim].kind is EndKind.SUPERSEDED, "another success was there first"


def test_alone_nothing_is_held_back_for_there_is_nobody_to_ask() -> None:
    core = ledger()
    core.adopt(0.0, [])
    core.handle_peers(0.0, ALONE)
    [task], _ = core.submit(1.0, [spec()], hold=False)
    token = fence(1, Dot(actor("a"), 2))
    core.handle_ready(1.5, token)
    core.handle_stall(100.0, 98.0)
    core.handle_ended(100.1, token, outcome())
    assert not core.holds_back(token)
    assert read(row_in(core, task)).status is Status.SUCCEEDED
