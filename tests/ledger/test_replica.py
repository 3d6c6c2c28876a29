"""Replicas become equal whatever is lost, doubled, reordered or broken off, and never name two writes alike."""

from dataclasses import replace
from random import Random

import pytest

from meshq.ids import ActorId, Dot
from meshq.ledger import donor as giving
from meshq.ledger import replica as module
from meshq.ledger.effects import SyncOffer, SyncOver, SyncPage, SyncPull
from meshq.ledger.replica import Replica
from meshq.ledger.row import Cancel, Fact, Row, Started, Vector
from tests.ledger.builders import actor, dot, peer, row, spec
from tests.ledger.syncs import ASKER, Pull, pull


def replica(name: str, *rows: Row, vector: Vector | None = None, ledger_epoch: int = 1) -> Replica:
    return Replica(peer(name), ledger_epoch, rows, vector or {}, {})


def contents(one: Replica) -> dict[str, Row]:
    return {each.task: each for each in one.rows()}


def test_a_push_advances_the_vector_only_without_a_gap() -> None:
    a, b = replica("a"), replica("b")
    births = [a.create(spec(), 1) for _ in range(3)]
    for place, covered in ((0, 1), (2, 1), (1, 2)):
        at, pushed = births[place]
        assert b.absorb(pushed) == pushed.task
        b.cover([at], [pushed])
        assert b.vector == {actor("a"): covered}
    assert contents(a) == contents(b)


def test_a_sync_that_breaks_off_keeps_rows_and_leaves_the_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(giving, "SYNC_ROWS_MAX", 2)
    a, b = replica("a"), replica("b")
    for _ in range(5):
        a.create(spec(), 1)
    pull(b, a, pages=2)
    assert (len(b), b.vector) == (4, {})
    assert pull(b, a) == 3
    assert (contents(b), b.vector) == (contents(a), a.vector)


def test_a_sync_between_equals_is_one_short_answer() -> None:
    a, b = replica("a"), replica("b")
    a.create(spec(), 1)
    pull(b, a)
    assert Pull(b, a).run().answers == [SyncOffer(number=1, run=1)]


def test_a_donor_that_was_restarted_between_two_pages_is_asked_anew() -> None:
    """It may have had to give up a damaged row: what it knew before counts no more."""
    a = replica("a")
    a.create(spec(), 1)
    question = SyncPull(number=7, run=1, vector={actor("a"): 0})
    assert giving.Donor(a, run=2).answer(0.0, ASKER, question) == SyncOver(number=7)
    later = replace(question, run=2, at=1)
    assert giving.Donor(a, run=2).answer(0.0, ASKER, later) == SyncOver(number=7), "it has no list of that pull"


def test_a_page_holds_no_more_bytes_than_allowed_but_at_least_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(giving, "ANSWER_ROW_BYTES_MAX", 10)
    a, b = replica("a"), replica("b")
    for _ in range(3):
        a.create(spec(), 1)
    pages = [answer for answer in Pull(b, a).run().answers if isinstance(answer, SyncPage)]
    assert [(len(page.rows), page.last) for page in pages] == [(1, False), (1, False), (1, True)]


def test_writes_of_mine_that_i_do_not_know_mean_a_lost_database_and_a_new_actor() -> None:
    a, b = replica("a"), replica("b")
    for _ in range(3):
        a.create(spec(), 1)
    pull(b, a)
    restored = replica("a", next(a.rows()), vector={actor("a"): 1})
    pull(restored, b)
    changes = restored.take_changes()
    assert changes is not None and changes.minted == 2
    assert restored.ledger_epoch == 2
    assert contents(restored) == contents(a)
    at, _ = restored.create(spec(), 1)
    assert at == Dot(actor("a", 2), 1)


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (row((dot("a", 2), Started(claim=dot("b", 1)))), "malformed"),
        (replace(row((dot("a", 2), Cancel(by="x"))), vector={actor("a"): 1}), "malformed"),
        (replace(row(), facts=((dot("a", 1), Cancel(by="x")), (dot("a", 1), Cancel(by="y")))), "malformed"),
        (replace(row(), vector={ActorId("elsewhere"): 3, **row().vector}), "malformed"),
        (row(env={"X": "x" * module.ROW_BYTES_MAX}), "too_large"),
        (row(*[(dot("a", seq), Cancel(by="x")) for seq in range(2, module.FACTS_MAX + 3)]), "too_large"),
    ],
)
def test_a_row_that_breaks_the_rules_is_refused_and_counted(broken: Row, why: str) -> None:
    a = replica("a")
    assert a.absorb(broken) is None
    assert (len(a), a.counters, a.take_changes()) == (0, {f"rows_refused_{why}": 1}, None)


def test_more_rows_than_allowed_are_refused_and_the_sync_is_not_adopted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS_MAX", 2)
    a, b = replica("a"), replica("b")
    for _ in range(3):
        a.create(spec(), 1)
    pull(b, a)
    assert (len(b), b.vector, b.counters) == (2, {}, {"rows_refused_too_many": 1})


def test_changes_are_what_was_written_since_they_were_taken() -> None:
    a = replica("a")
    _, born = a.create(spec(), 1)
    first = a.take_changes()
    assert first is not None and (first.rows, first.vector) == ((born,), {actor("a"): 1})
    assert a.take_changes() is None
    a.add(born.task, Cancel(by="ann@a"))
    second = a.take_changes()
    assert second is not None and (len(second.rows[0].facts), second.vector) == (1, {actor("a"): 2})


def trial(seed: int) -> None:
    """A random life of 2 to 5 replicas, ending in a few honest syncs."""
    rng = Random(seed)
    names = "abcde"[: rng.randint(2, 5)]
    all_of_them = {name: replica(name) for name in names}
    written: dict[Dot, Fact | str] = {}
    network: list[tuple[str, Row, Dot]] = []
    born = 0
    for step in range(rng.randint(30, 150)):
        name = rng.choice(names)
        one = all_of_them[name]
        kind = rng.random()
        if kind < 0.45:
            rows = list(one.rows())
            if kind < 0.15 or not rows:
                at, news = one.create(spec(f"t{step}"), step)
                written_now: Fact | str = news.task
                born += 1
            else:
                fact = Cancel(by=f"{name}{step}")
                at = one.add(rng.choice(rows).task, fact)
                news = next(each for each in one.rows() if any(where == at for where, _ in each.facts))
                written_now = fact
            assert at not in written, "one name for two writes"
            written[at] = written_now
            network += [(other, news, at) for other in names if other != name and rng.random() < 0.7]
        elif kind < 0.75 and network:
            place = rng.randrange(len(network))
            to, news, at = network[place]
            if all_of_them[to].absorb(news) is not None:
                all_of_them[to].cover([at], [news])
            if rng.random() < 0.7:
                network.pop(place)
        else:
            pull(one, all_of_them[rng.choice(names)], pages=rng.choice((None, 0, 1, 2)))
        for each in all_of_them.values():
            each.check()
    finish(all_of_them, written, born, seed)


def finish(all_of_them: dict[str, Replica], written: dict[Dot, Fact | str], born: int, seed: int) -> None:
    for _ in range(2):
        for one in all_of_them.values():
            for other in all_of_them.values():
                pull(one, other)
    for one in all_of_them.values():
        first = next(iter(all_of_them.values()))
        assert (one.vector, contents(one)) == (first.vector, contents(first)), f"seed {seed}: not equal"
        assert len(one) == born, f"seed {seed}: a task was lost"
        facts = {at: fact for each in one.rows() for at, fact in each.facts}
        assert facts == {at: fact for at, fact in written.items() if not isinstance(fact, str)}, (
            f"seed {seed}: a write was lost"
        )


def test_replicas_become_equal_after_loss_doubling_reordering_and_broken_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(giving, "SYNC_ROWS_MAX", 3)
    for seed in range(100):
        trial(seed)


def test_the_index_of_writes_does_not_grow_with_the_writes() -> None:
    a = replica("a")
    _, born = a.create(spec(), 1)
    for number in range(500):
        a.add(born.task, Cancel(by=str(number)))
    assert len(a._table._writes[actor("a")]._blocks) == 1
    assert list(a.above({actor("a"): 500})) == [born.task]
