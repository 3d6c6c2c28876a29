"""Both sides of a vote: what a voter says and keeps, what the asker asks and relies on."""

from dataclasses import replace

import pytest

from meshq.ids import Fence, TaskId, fence
from meshq.ledger import grants as module
from meshq.ledger.effects import Ask, Grant, GrantReply, GrantRequest
from meshq.ledger.grants import Asker, Granted, Later, Refused, Vote, Voter
from meshq.ledger.holder import read
from meshq.ledger.rendezvous import voters
from meshq.ledger.row import Cancel, Claim, Ended, Fact, Lost, Row, Started
from meshq.ledger.sessions import majority
from meshq.ledger.timing import FAST, LAN, WAN
from meshq.task import EndKind
from tests.ledger.builders import actor, dot, outcome, peer, row

A, B, C = actor("a"), actor("b"), actor("c")
FIRST, SECOND, OTHER = dot("a", 2), dot("b", 1), dot("c", 1)
ONE, TWO = fence(1, FIRST), fence(2, SECOND)
CLAIMS = (
    (FIRST, Claim(attempt=1, peer=peer("a"), seen={})),
    (OTHER, Claim(attempt=1, peer=peer("c"), seen={})),
    (SECOND, Claim(attempt=2, peer=peer("b"), seen={})),
)


def known(*facts: tuple[object, Fact]) -> Row:
    """A task with three voters and three claims, and what else is known of it."""
    made = row(*CLAIMS, *facts, birth=dot("a", 1), isolation="stop")  # type: ignore[arg-type]  # dots
    return replace(made, voters=(A, B, C))


TASK = known().task


def vote(voter: Voter, now: float, token: Fence, of: Row | None = None, *, me: str = "a", seconds: float = 30.0) -> Vote:
    reading = read(known() if of is None else of)
    return voter.vote(now, actor(me), Ask(task=TASK, fence=token), seconds, reading, new=True)


# --- the voter


def test_the_first_claim_gets_the_vote_and_it_is_to_be_committed_once() -> None:
    voter = Voter({}, 0.0)
    assert vote(voter, 1.0, ONE) == Granted()
    assert voter.take_changes() == {TASK: Grant(fence=ONE, seconds=30.0)}
    assert vote(voter, 5.0, ONE) == Granted()
    assert voter.take_changes() == {}, "a renewal costs nothing"


def test_no_other_claim_of_the_attempt_or_of_an_earlier_one_gets_it_ever() -> None:
    voter = Voter({}, 0.0)
    vote(voter, 1.0, TWO)
    assert vote(voter, 100.0, fence(1, FIRST)) == Refused()
    voter = Voter({}, 0.0)
    vote(voter, 1.0, ONE)
    assert vote(voter, 100.0, fence(1, OTHER)) == Refused()


def test_a_later_attempt_waits_until_the_last_renewal_has_run_out() -> None:
    voter = Voter({}, 0.0)
    vote(voter, 1.0, ONE)
    vote(voter, 6.0, ONE)
    assert vote(voter, 20.0, TWO) == Later(16.0)
    assert vote(voter, 36.0, TWO) == Granted()
    assert vote(voter, 36.1, ONE) == Refused(), "granting the next attempt ends the renewals"


def test_the_end_of_a_claim_by_its_own_peer_frees_the_vote_at_once_but_nobody_elses_word_does() -> None:
    voter = Voter({}, 0.0)
    vote(voter, 1.0, ONE)
    end = Ended(claim=FIRST, outcome=outcome(EndKind.RELEASED))
    lost = known((dot("b", 2), Lost(claim=FIRST)))
    other_database = known((dot("a2", 1), end))
    assert vote(voter, 2.0, TWO, lost) == Later(29.0)
    assert vote(voter, 2.0, TWO, other_database) == Later(29.0)
    assert vote(voter, 2.0, TWO, known((dot("a", 3), end))) == Granted()


def test_what_has_ended_or_is_final_gets_no_vote_but_what_runs_may_be_brought_to_its_end() -> None:
    cancelled = known((dot("c", 2), Cancel(by="ann@a")))
    succeeded = known((dot("c", 2), Ended(claim=OTHER, outcome=outcome())))
    ended = known((dot("a", 3), Ended(claim=FIRST, outcome=outcome(EndKind.FAILED))))
    for of in (cancelled, succeeded, ended):
        assert vote(Voter({}, 0.0), 1.0, ONE, of) == Refused()
    voter = Voter({}, 0.0)
    vote(voter, 1.0, ONE)
    assert vote(voter, 2.0, ONE, cancelled) == Granted()
    assert vote(voter, 2.0, ONE, ended) == Refused()


def test_a_peer_that_is_no_voter_or_has_another_database_by_now_abstains() -> None:
    assert vote(Voter({}, 0.0), 1.0, ONE, me="d") == Refused()
    reading = read(known())
    assert Voter({}, 0.0).vote(1.0, actor("a", 2), Ask(task=TASK, fence=ONE), 30.0, reading, new=True) == Refused()


def test_what_the_voter_has_not_heard_of_is_asked_for_again() -> None:
    voter = Voter({}, 0.0)
    ask = Ask(task=TASK, fence=fence(3, dot("b", 7)))
    assert voter.vote(1.0, A, ask, 30.0, None, new=True) == Later(module.ROW_SOON)
    assert voter.vote(1.0, A, ask, 30.0, read(known()), new=True) == Later(module.ROW_SOON)


def test_a_voter_that_must_first_prove_its_session_renews_but_grants_nothing_new() -> None:
    voter = Voter({TASK: Grant(fence=ONE, seconds=30.0)}, 0.0)
    ask = Ask(task=TASK, fence=ONE)
    assert voter.vote(1.0, A, ask, 30.0, read(known()), new=False) == Granted()
    assert Voter({}, 0.0).vote(1.0, A, ask, 30.0, read(known()), new=False) == Later(module.ASK_AGAIN)


def test_a_restart_renews_and_who_asks_for_longer_gets_longer_also_after_it() -> None:
    voter = Voter({TASK: Grant(fence=ONE, seconds=30.0)}, 100.0)
    assert vote(voter, 129.0, TWO) == Later(1.0)
    assert vote(voter, 129.0, ONE, seconds=60.0) == Granted()
    assert voter.take_changes() == {TASK: Grant(fence=ONE, seconds=60.0)}
    assert vote(voter, 130.0, ONE, seconds=15.0) == Granted()
    assert vote(voter, 130.0, TWO) == Later(60.0), "a shorter promise does not take back a longer one"


def test_a_voter_whose_disk_may_have_been_set_back_renews_only_what_runs_until_all_its_votes_have_run_out() -> None:
    only_first = row(CLAIMS[0], birth=dot("a", 1), isolation="stop")
    only_first = replace(only_first, voters=(A, B, C))
    runs = (dot("a", 3), Started(claim=FIRST))
    runs_alone = replace(row(CLAIMS[0], runs, birth=dot("a", 1), isolation="stop"), voters=(A, B, C))
    voter = Voter({TASK: Grant(fence=ONE, seconds=30.0)}, 100.0, 30.0)
    assert vote(voter, 101.0, ONE, only_first) == Later(29.0), "it waits: another claim may have the vote"
    assert vote(voter, 101.0, ONE, known(runs)) == Later(29.0), "so may the later attempt"
    assert vote(voter, 101.0, ONE, runs_alone) == Granted(), "an ordinary restart stops nothing"
    assert vote(voter, 130.0, ONE, only_first) == Granted()
    voter = Voter({}, 100.0, 30.0)
    assert vote(voter, 110.0, ONE) == Later(20.0)
    assert vote(voter, 130.0, ONE) == Granted()
    longer = Voter({TASK: Grant(fence=ONE, seconds=60.0)}, 100.0, 30.0)
    assert vote(longer, 130.0, ONE, only_first) == Later(30.0)


def test_grants_are_forgotten_when_they_have_run_out_and_their_task_is_over() -> None:
    voter = Voter({TASK: Grant(fence=ONE, seconds=30.0), TaskId("other"): Grant(fence=TWO, seconds=60.0)}, 0.0)
    voter.forget(29.0, lambda task: True)
    voter.forget(31.0, lambda task: False)
    assert (len(voter), voter.take_changes()) == (2, {})
    voter.forget(31.0, lambda task: True)
    assert (len(voter), voter.take_changes()) == (1, {TASK: None})


# --- the asker

VOTERS = (A, B, C)


def request(number: int, *tokens: Fence) -> GrantRequest:
    return GrantRequest(number=number, seconds=30.0, asks=tuple(Ask(task=TASK, fence=token) for token in tokens))


def asker(*tokens: Fence) -> Asker:
    made = Asker(LAN)
    for token in tokens or (ONE,):
        made.watch(0.0, TASK, token, VOTERS)
    return made


def test_all_voters_are_asked_at_once_and_again_every_second_until_there_is_a_majority_then_every_five() -> None:
    core = asker()
    assert core.begin(0.0) == [(A, request(1, ONE)), (B, request(2, ONE)), (C, request(3, ONE))]
    core.replied(0.1, peer("a"), GrantReply(number=1, granted=(ONE,)))
    assert (core.until(ONE), core.begin(0.9)) == (float("-inf"), [])
    assert core.begin(1.0) == [(B, request(4, ONE)), (C, request(5, ONE))]
    core.replied(1.1, peer("b"), GrantReply(number=4, granted=(ONE,)))
    assert core.until(ONE) == 29.4, "that of the second of two, counted from sending"
    assert core.begin(2.0) == [(C, request(6, ONE))]
    assert core.begin(4.9) == []
    assert core.begin(5.0) == [(A, request(7, ONE))]
    core.replied(5.1, peer("a"), GrantReply(number=7, granted=(ONE,)))
    assert core.until(ONE) == 1.0 + 29.4
    assert core.begin(7.0) == [(B, request(8, ONE)), (C, request(9, ONE))]
    core.replied(7.1, peer("c"), GrantReply(number=9, granted=(ONE,)))
    assert core.until(ONE) == 5.0 + 29.4


def test_all_claims_are_renewed_by_one_message_to_each_voter(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = tuple(fence(1, dot("a", seq)) for seq in range(2, 5))
    core = asker(*tokens)
    assert core.begin(0.0) == [(A, request(1, *tokens)), (B, request(2, *tokens)), (C, request(3, *tokens))]
    monkeypatch.setattr(module, "ASKS_MAX", 2)
    core = asker(*tokens)
    assert core.begin(0.0)[:2] == [(A, request(1, *tokens[:2])), (A, request(2, tokens[2]))]


def test_a_refusal_is_final_and_without_a_possible_majority_the_claim_has_no_future() -> None:
    core = asker()
    core.begin(0.0)
    core.replied(0.1, peer("a"), GrantReply(number=1, refused=(ONE,)))
    assert core.possible(ONE, lambda voter: True)
    assert not core.possible(ONE, lambda voter: voter != C), "c is not there"
    core.replied(0.1, peer("b"), GrantReply(number=2, refused=(ONE,)))
    assert not core.possible(ONE, lambda voter: True)
    assert core.begin(60.0) == [(C, request(4, ONE))]


def test_who_must_wait_asks_when_the_voter_said_but_looks_in_every_five_seconds() -> None:
    core = asker()
    core.begin(0.0)
    core.replied(0.1, peer("a"), GrantReply(number=1, waits={ONE: 2.0}))
    core.replied(0.1, peer("b"), GrantReply(number=2, waits={ONE: 29.0}))
    core.replied(0.1, peer("c"), GrantReply(number=3, waits={ONE: -1.0}))
    assert core.deadline() == 0.1 + module.ROW_SOON
    assert [voter for voter, _ in core.begin(0.4)] == [C]
    assert [voter for voter, _ in core.begin(2.1)] == [A, C]
    assert B in [voter for voter, _ in core.begin(5.1)]


def test_what_is_due_soon_to_the_same_voter_goes_along() -> None:
    core = asker(ONE)
    core.begin(0.0)
    for number, name in ((1, "a"), (2, "b"), (3, "c")):
        core.replied(0.1, peer(name), GrantReply(number=number, granted=(ONE,)))
    core.watch(3.0, TASK, TWO, (A,))
    assert core.begin(3.0) == [(A, request(4, ONE, TWO))]


def test_an_answer_counts_once_from_whom_it_was_awaited_and_for_what_was_asked() -> None:
    core = asker(ONE)
    core.begin(0.0)
    assert not core.replied(0.1, peer("b"), GrantReply(number=1, granted=(ONE,)))
    assert not core.replied(0.1, peer("a"), GrantReply(number=9, granted=(ONE,)))
    assert core.replied(0.1, peer("a"), GrantReply(number=1, granted=(TWO,)))
    assert not core.replied(0.2, peer("a"), GrantReply(number=1, granted=(ONE,)))
    assert core.begin(31.0) != [] and not core.replied(31.1, peer("b"), GrantReply(number=2, granted=(ONE,))), "too late"


def test_a_failed_request_is_repeated_after_a_second_and_forgotten_claims_ask_for_nothing() -> None:
    core = asker(ONE)
    core.begin(0.0)
    core.failed(0.5, 2)
    core.failed(0.5, 99)
    assert [voter for voter, _ in core.begin(1.0)] == [A, C]
    assert [voter for voter, _ in core.begin(1.5)] == [B]
    core.forget(ONE)
    assert (ONE in core, core.begin(9.0), core.deadline()) == (False, [], float("inf"))
    core.failed(9.0, 3)
    assert core.replied(9.0, peer("c"), GrantReply(number=5, granted=(ONE,)))


def test_the_askers_count_ends_before_the_voters_however_wrong_their_clocks_are() -> None:
    for seconds in (LAN.grant_ttl, WAN.grant_ttl, FAST.grant_ttl):
        assert module.relied_on(seconds) / (1 - module.CLOCK_RATE) < seconds / (1 + module.CLOCK_RATE)


def test_majorities_meet() -> None:
    assert [majority(count) for count in range(1, 6)] == [1, 2, 2, 3, 3]
    assert all(2 * majority(count) > count for count in range(1, 6))


def test_voters_are_drawn_in_an_order_of_their_own_that_everybody_knows() -> None:
    names = [peer(name) for name in "abcdefgh"]
    drawn = voters(TASK, names)
    assert sorted(drawn) == sorted(names) and drawn == voters(TASK, reversed(names))
    assert {voters(TaskId(f"task-{number}"), names)[0] for number in range(100)} == set(names)
