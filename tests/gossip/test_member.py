"""The laws of merging beliefs."""

from hypothesis import given
from hypothesis import strategies as st

from meshq.gossip.member import Member, merge
from tests.gossip.builders import DEAD, LEFT, SUSPECT, member, members

BELIEFS = members(st.just("a"))


@given(BELIEFS, BELIEFS)
def test_merging_does_not_depend_on_who_speaks_first(one: Member, other: Member) -> None:
    assert merge(one, other) == merge(other, one)


@given(BELIEFS, BELIEFS, BELIEFS)
def test_merging_does_not_depend_on_the_order_of_arrival(one: Member, two: Member, three: Member) -> None:
    assert merge(merge(one, two), three) == merge(one, merge(two, three))


@given(BELIEFS, BELIEFS)
def test_hearing_the_same_again_changes_nothing(one: Member, other: Member) -> None:
    merged = merge(one, other)
    assert merge(merged, one) == merge(merged, other) == merge(merged, merged) == merged


@given(BELIEFS, BELIEFS)
def test_a_merged_belief_is_one_of_the_two(one: Member, other: Member) -> None:
    assert merge(one, other) in (one, other)


def test_only_a_higher_incarnation_or_epoch_brings_back_the_dead() -> None:
    dead = member("a", DEAD, incarnation=3)
    assert merge(dead, member("a", incarnation=3)) == dead
    assert merge(dead, member("a", SUSPECT, incarnation=3)) == dead
    assert merge(dead, member("a", incarnation=4)) == member("a", incarnation=4)
    assert merge(dead, member("a", epoch=2)) == member("a", epoch=2)
    assert merge(dead, member("a", LEFT, incarnation=3)) == member("a", LEFT, incarnation=3)
