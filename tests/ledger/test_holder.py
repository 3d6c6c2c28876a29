"""What a row means: examples of each rule, and histories of partitions in which no rule may ever break."""

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshq.config import INFRASTRUCTURE_LOSSES_MAX, RELEASES_MAX
from meshq.ids import Dot, fence
from meshq.ledger.holder import (
    Reading,
    _apply_rules,
    attempts,
    ending,
    holder,
    legal,
    live,
    next_attempt,
    read,
    reason,
    result,
    status,
)
from meshq.ledger.rendezvous import claim_weight
from meshq.ledger.row import Back, Cancel, Claim, Ended, Fact, Lost, Preparing, Row, Started, merge
from meshq.ledger.row import merge_vectors as merged
from meshq.task import EndKind, Status
from tests.ledger.builders import actor, dot, outcome, peer, row

A, B, C = dot("a", 2), dot("b", 1), dot("c", 1)
BORN = {actor("a"): 1}


def claim(name: str, attempt: int = 1, seen: dict[str, int] | None = None) -> Claim:
    return Claim(attempt=attempt, peer=peer(name), seen=BORN | {actor(who): seq for who, seq in (seen or {}).items()})


def lowest(attempt: int, *names: str) -> str:
    """Who wins between concurrent bids."""
    task = row().task
    return min(names, key=lambda name: claim_weight(task, attempt, peer(name)))


def test_a_task_without_claims_is_queued_and_open_for_attempt_one() -> None:
    assert (status(row()), holder(row()), next_attempt(row()), attempts(row())) == (Status.QUEUED, None, 1, ())


def test_a_row_without_facts_is_read_as_the_rules_read_it() -> None:
    assert read(row()) == _apply_rules(row())


def test_of_two_concurrent_claims_the_one_of_lower_weight_holds() -> None:
    both = row((A, claim("a")), (B, claim("b")))
    assert holder(both) == {"a": A, "b": B}[lowest(1, "a", "b")]
    assert legal(both, A) and legal(both, B)
    assert next_attempt(both) is None


def test_a_claim_that_had_seen_another_of_its_attempt_is_void() -> None:
    knew = row((A, claim("a")), (B, claim("b", seen={"a": 2})))
    assert not legal(knew, B)
    assert holder(knew) == A


def test_whoever_started_holds_against_a_better_weight() -> None:
    worse = {"a": B, "b": A}[lowest(1, "a", "b")]
    started = row((A, claim("a")), (B, claim("b")), (Dot(worse.actor, 9), Started(claim=worse)))
    assert holder(started) == worse
    assert status(started) is Status.RUNNING


def test_the_next_attempt_needs_the_end_of_the_one_before() -> None:
    early = row((A, claim("a")), (B, claim("b", 2, seen={"a": 2})))
    assert not legal(early, B)
    in_time = row((A, claim("a")), (C, Lost(claim=A)), (B, claim("b", 2, seen={"a": 2, "c": 1})))
    assert legal(in_time, B)
    assert holder(in_time) == B


def test_a_lost_claim_that_came_back_is_live_again_and_holds_before_later_attempts() -> None:
    facts: list[tuple[Dot, Fact]] = [(A, claim("a")), (dot("a", 3), Started(claim=A)), (C, Lost(claim=A))]
    later: list[tuple[Dot, Fact]] = [(B, claim("b", 2, seen={"a": 3, "c": 1})), (dot("b", 2), Started(claim=B))]
    gone = row(*facts, *later)
    assert (live(gone, A), holder(gone)) == (False, B)
    back = row(*facts, *later, (dot("a", 4), Back(claim=A, seen={actor("c"): 1})))
    assert (live(back, A), holder(back)) == (True, A)


def test_a_second_loss_needs_a_second_answer() -> None:
    answered: list[tuple[Dot, Fact]] = [(A, claim("a")), (C, Lost(claim=A)), (dot("a", 4), Back(claim=A, seen={actor("c"): 1}))]
    assert live(row(*answered), A)
    assert not live(row(*answered, (dot("c", 2), Lost(claim=A))), A)


def test_a_success_is_final_and_the_lowest_attempt_gives_the_result() -> None:
    both = row(
        (A, claim("a")), (dot("a", 3), Started(claim=A)), (C, Lost(claim=A)), (B, claim("b", 2, seen={"a": 3, "c": 1})),
        (dot("b", 2), Started(claim=B)), (dot("b", 3), Ended(claim=B, outcome=outcome(reason="second"))),
        (dot("a", 4), Ended(claim=A, outcome=outcome(reason="first"))),
    )  # fmt: skip
    assert result(both) == (A, outcome(reason="first"))
    assert ending(both) == outcome(reason="first")
    assert (status(both), holder(both), next_attempt(both)) == (Status.SUCCEEDED, None, None)
    assert [(view.number, view.status, view.exit_code) for view in attempts(both)] == [
        (1, "succeeded", 0),
        (2, "superseded", 0),
    ]
    assert attempts(both)[1].reason == "succeeded too, but the result is attempt 1's"


def test_a_success_stands_against_a_cancel() -> None:
    both = row((A, claim("a")), (C, Cancel(by="bob@b")), (dot("a", 3), Ended(claim=A, outcome=outcome())))
    assert status(both) is Status.SUCCEEDED


def test_cancelling_shows_until_nothing_runs() -> None:
    running: list[tuple[Dot, Fact]] = [(A, claim("a")), (dot("a", 3), Started(claim=A)), (C, Cancel(by="bob@b"))]
    assert (status(row(*running)), reason(row(*running))) == (Status.RUNNING, "cancelling")
    end: tuple[Dot, Fact] = (dot("a", 4), Ended(claim=A, outcome=outcome(EndKind.CANCELLED, exit_code=143)))
    ended = row(*running, end)
    assert (status(ended), reason(ended)) == (Status.CANCELLED, "cancelled by bob@b")
    last = ending(ended)
    assert last is not None and last.exit_code == 143


def test_a_claim_that_had_seen_the_cancel_is_void() -> None:
    assert not legal(row((C, Cancel(by="bob@b")), (B, claim("b", seen={"c": 1}))), B)
    assert next_attempt(row((C, Cancel(by="bob@b")))) is None


def failed(name: str, attempt: int, seen: dict[str, int], **more: object) -> list[tuple[Dot, Fact]]:
    """An attempt that failed: the third, fourth and fifth write of its peer for attempt 1, and so on."""
    first = dot(name, 3 * attempt)
    return [
        (first, claim(name, attempt, seen)),
        (dot(name, 3 * attempt + 1), Started(claim=first)),
        (dot(name, 3 * attempt + 2), Ended(claim=first, outcome=outcome(EndKind.FAILED, **more))),
    ]


def test_a_failure_is_tried_again_as_often_as_the_user_allows() -> None:
    once = failed("b", 1, {}, exit_code=3)
    twice = [*once, *failed("b", 2, {"b": 5}, exit_code=4)]
    assert status(row(*once)) is Status.FAILED
    assert (status(row(*once, retries=1)), next_attempt(row(*once, retries=1))) == (Status.QUEUED, 2)
    last = ending(row(*twice, retries=1))
    assert last is not None and last.exit_code == 4
    assert reason(row(*twice, retries=1)) == "exit code 4"


def test_losses_are_counted_apart_from_failures_and_poison_a_task_in_the_end() -> None:
    facts: list[tuple[Dot, Fact]] = []
    for attempt in range(1, INFRASTRUCTURE_LOSSES_MAX + 1):
        assert (status(row(*facts)), next_attempt(row(*facts))) == (Status.QUEUED, attempt)
        mine = dot("b", attempt)
        facts.append((mine, claim("b", attempt, {"b": attempt - 1, "c": attempt - 1})))
        facts.append((dot("c", attempt), Lost(claim=mine, reason="b was not seen for 8 s")))
    poisoned = row(*facts)
    assert status(poisoned) is Status.FAILED
    assert reason(poisoned) == "poisoned: 5 attempts were lost with their machine; the last one: b was not seen for 8 s"
    assert [view.status for view in attempts(poisoned)] == ["lost"] * 5


def released(number: int, *, blameless: bool) -> list[tuple[Dot, Fact]]:
    """So many attempts that b could not prepare."""
    facts: list[tuple[Dot, Fact]] = []
    for attempt in range(1, number + 1):
        mine, end = dot("b", 2 * attempt - 1), dot("b", 2 * attempt)
        facts.append((mine, claim("b", attempt, {"b": 2 * attempt - 2})))
        facts.append(
            (end, Ended(claim=mine, outcome=replace(outcome(EndKind.RELEASED), reason="no index", blameless=blameless)))
        )
    return facts


def test_a_task_that_cannot_be_prepared_anywhere_fails_in_the_end_and_says_why() -> None:
    almost = read(row(*released(RELEASES_MAX - 1, blameless=False)))
    assert (almost.status, almost.losses, almost.setbacks) == (Status.QUEUED, 0, RELEASES_MAX - 1)
    failed_row = row(*released(RELEASES_MAX, blameless=False))
    assert status(failed_row) is Status.FAILED
    assert reason(failed_row) == "50 attempts could not be prepared anywhere; the last one: no index"


def test_a_task_whose_source_nobody_has_just_now_waits_for_ever_but_less_and_less_often() -> None:
    reading = read(row(*released(3 * RELEASES_MAX, blameless=True)))
    assert (reading.status, reading.releases, reading.setbacks) == (Status.QUEUED, 0, 3 * RELEASES_MAX)


@pytest.mark.parametrize("kind", [EndKind.SUPERSEDED, EndKind.CANCELLED])
def test_superseded_and_cancelled_attempts_count_for_nothing(kind: EndKind) -> None:
    reading = read(row((A, claim("a")), (dot("a", 3), Ended(claim=A, outcome=outcome(kind)))))
    assert (reading.failures, reading.losses, reading.status, reading.next_attempt) == (0, 0, Status.QUEUED, 2)


def test_a_claim_says_how_far_it_is() -> None:
    states: list[tuple[Dot, Fact]] = [(A, claim("a"))]
    assert status(row(*states)) is Status.CLAIMED
    states.append((dot("a", 3), Preparing(claim=A, at=5.0)))
    assert status(row(*states)) is Status.PREPARING
    assert attempts(row(*states))[0].status == "preparing"
    started = row(*states, (dot("a", 4), Started(claim=A, at=6.0)))
    [view] = attempts(started)
    assert (view.status, view.started_at, view.fence, view.peer) == ("running", 6.0, fence(1, A), peer("a"))


# ---- histories


class History:
    """Peers that write by the rules into their own copies of one row, while partitions come and go."""

    def __init__(self, count: int) -> None:
        self.names = "abcd"[:count]
        self.rows = {name: row(retries=9) for name in self.names}
        self.seq = {name: 1 for name in self.names}
        self.side = {name: 0 for name in self.names}
        self.started: dict[Dot, int] = {}
        self.judged: dict[Dot, bool] = {}

    def write(self, name: str, fact: Fact) -> Dot:
        self.seq[name] += 1
        mine, at = self.rows[name], dot(name, self.seq[name])
        news = Row(
            birth=mine.birth, spec=mine.spec, queue=mine.queue, position=mine.position, priority=mine.priority,
            vector=merged(mine.vector, {at.actor: at.seq}), facts=tuple(sorted([*mine.facts, (at, fact)], key=lambda f: f[0])),
        )  # fmt: skip
        self.rows[name] = news
        return at

    def claim(self, name: str) -> None:
        reading = read(self.rows[name])
        if reading.status is Status.QUEUED and reading.next_attempt is not None:
            at = self.write(name, Claim(attempt=reading.next_attempt, peer=peer(name), seen=self.rows[name].vector))
            assert legal(self.rows[name], at), "a claim for the next attempt is legal"

    def own(self, name: str) -> list[Dot]:
        reading = read(self.rows[name])
        return [at for at, bid in reading.claims.items() if bid.peer == peer(name) and at not in reading.ended]

    def start(self, name: str) -> None:
        reading = read(self.rows[name])
        for at in self.own(name):
            if reading.holder == at and at not in reading.started and reading.cancel is None:
                self.write(name, Started(claim=at))
                self.started[at] = self.started.get(at, 0) + 1

    def lose(self, name: str) -> None:
        for at, bid in read(self.rows[name]).live.items():
            other = next(other for other in self.names if peer(other) == bid.peer)
            if self.side[other] != self.side[name]:
                self.write(name, Lost(claim=at))

    def end(self, name: str, kind: EndKind) -> None:
        for at in self.own(name):
            self.write(name, Ended(claim=at, outcome=outcome(kind)))

    def come_back(self, name: str) -> None:
        reading = read(self.rows[name])
        for at in self.own(name):
            if at in reading.started and at in reading.lost and reading.result is None:
                self.write(name, Back(claim=at, seen=self.rows[name].vector))

    def give_up(self, name: str) -> None:
        """What does not hold its task ends as superseded."""
        reading = read(self.rows[name])
        for at in self.own(name):
            if at in reading.live and reading.holder not in (None, at):
                self.write(name, Ended(claim=at, outcome=outcome(EndKind.SUPERSEDED)))

    def exchange(self, one: str, other: str) -> None:
        if self.side[one] == self.side[other]:
            self.rows[other] = merge(self.rows[other], self.rows[one])

    def step(self, what: str, one: str, other: str, side: int) -> None:
        kinds = {"succeed": EndKind.SUCCEEDED, "fail": EndKind.FAILED, "release": EndKind.RELEASED}
        simple = {"claim": self.claim, "start": self.start, "lose": self.lose, "back": self.come_back, "give up": self.give_up}
        if what in simple:
            simple[what](one)
        elif what in kinds:
            self.end(one, kinds[what])
        elif what == "cut":
            self.side[one] = side
        else:
            self.exchange(one, other)

    def check(self) -> None:
        for name in self.names:
            reading = read(self.rows[name])
            for at in reading.claims:
                verdict = self.judged.setdefault(at, at in reading.legal)
                assert verdict == (at in reading.legal), "legality flips on merge"
        assert all(count == 1 for count in self.started.values()), "a fence started twice"


STEPS = {
    "claim": 30, "start": 20, "lose": 10, "back": 6, "give up": 4,
    "succeed": 1, "fail": 2, "release": 3, "cut": 5, "exchange": 28,
}  # fmt: skip
"""What peers do, and how often: such that most histories have several attempts, and runs that others gave up."""


@settings(max_examples=400)
@given(st.integers(0, 2**32))
def test_in_no_history_of_partitions_the_rules_flip_wedge_or_stop_a_live_run(seed: int) -> None:
    rng = Random(seed)
    world = History(rng.randint(2, 4))
    for what in rng.choices(list(STEPS), list(STEPS.values()), k=rng.randint(10, 60)):
        world.step(what, rng.choice(world.names), rng.choice(world.names), rng.randrange(2))
        world.check()
    for one in world.names:
        for other in world.names:
            world.side = dict.fromkeys(world.names, 0)
            world.exchange(one, other)
    for one in world.names:
        world.exchange(world.names[-1], one)
    world.check()
    readings = [read(each) for each in world.rows.values()]
    assert all(reading == readings[0] for reading in readings), "equal rows, different meaning"
    check_end(readings[0])


def check_end(reading: Reading) -> None:
    if reading.result is not None:
        assert reading.status is Status.SUCCEEDED
        return
    runs = [at for at in reading.live if at in reading.started]
    if runs:
        assert reading.holder in runs, "a live started run is stopped for a claim that runs nothing"
    if not reading.live and not reading.exhausted:
        assert reading.next_attempt is not None, "wedged: nothing lives, and no claim can ever be legal"
