"""The laws of merging rows, and that equal rows mean the same to everybody."""

from hypothesis import given, settings
from hypothesis import strategies as st

from meshq import codec
from meshq.ids import Dot
from meshq.ledger.holder import attempts, read
from meshq.ledger.row import (
    Back,
    Cancel,
    Claim,
    Ended,
    Fact,
    Lost,
    NumberRegister,
    Preparing,
    Row,
    Started,
    TextRegister,
    merge,
)
from meshq.task import EndKind
from tests.ledger.builders import actor, dot, outcome, peer, spec

NAMES = "abc"
dots = st.builds(dot, st.sampled_from(NAMES), st.integers(1, 9))
vectors = st.dictionaries(st.sampled_from([actor(name) for name in NAMES]), st.integers(1, 9))
at = st.floats(0, 9)


def fact_of(where: Dot) -> st.SearchStrategy[Fact]:
    """A fact is determined by its dot: one write names one thing for ever."""
    owner = next(peer(name) for name in NAMES if actor(name) == where.actor)
    return st.one_of(
        st.builds(Claim, attempt=st.integers(1, 3), peer=st.just(owner), seen=vectors, at=at),
        st.builds(Preparing, claim=dots, at=at),
        st.builds(Started, claim=dots, at=at),
        st.builds(Ended, claim=dots, outcome=st.sampled_from([outcome(kind) for kind in EndKind])),
        st.builds(Lost, claim=dots, reason=st.text(max_size=5), at=at),
        st.builds(Back, claim=dots, seen=vectors, at=at),
        st.builds(Cancel, by=st.sampled_from(["ann@a", "bob@b"]), at=at),
    )


@st.composite
def three_rows(draw: st.DrawFn) -> list[Row]:
    """Three rows of one task that hold parts of one history."""
    where = draw(st.lists(dots, unique=True, max_size=9))
    history = [(one, draw(fact_of(one))) for one in where]

    def some_row() -> Row:
        facts = tuple(sorted((fact for fact in history if draw(st.booleans())), key=lambda fact: fact[0]))
        revision, actors = st.integers(1, 3), st.sampled_from([actor(name) for name in NAMES])
        return Row(
            birth=dot("a", 1),
            spec=spec(retries=1),
            vector=draw(vectors),
            queue=TextRegister(draw(revision), draw(actors), draw(st.sampled_from(["default", "gpu"]))),
            position=NumberRegister(draw(revision), draw(actors), draw(st.integers(0, 3))),
            priority=NumberRegister(draw(revision), draw(actors), draw(st.integers(0, 3))),
            facts=facts,
        )

    return [some_row() for _ in range(3)]


@given(three_rows())
def test_merge_is_commutative_associative_and_idempotent(rows: list[Row]) -> None:
    a, b, c = rows
    assert merge(a, b) == merge(b, a)
    assert merge(merge(a, b), c) == merge(a, merge(b, c))
    assert merge(a, a) == a
    assert merge(merge(a, b), b) == merge(a, b)


@given(three_rows())
def test_rows_that_became_equal_on_different_ways_read_the_same(rows: list[Row]) -> None:
    a, b, c = rows
    one, other = merge(merge(a, b), c), merge(c, merge(b, a))
    assert read(one) == read(other)
    assert attempts(one) == attempts(other)
    assert codec.encode(one) == codec.encode(other)


@settings(max_examples=40)
@given(three_rows())
def test_a_row_survives_its_encoding(rows: list[Row]) -> None:
    assert codec.decode(Row, codec.encode(rows[0]), bytes_max=2**20) == rows[0]


@settings(max_examples=40)
@given(three_rows())
def test_whatever_a_row_holds_can_be_read(rows: list[Row]) -> None:
    """Also facts of claims that the row does not have, and vectors that no correct peer writes."""
    for row in rows:
        reading = read(row)
        assert reading.holder is None or reading.holder in reading.live
        assert len(attempts(row)) == len(reading.claims)
        assert reading.status in type(reading.status)
