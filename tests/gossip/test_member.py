"""The laws of merging beliefs."""

from collections.abc import Callable
from functools import reduce
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from meshq.gossip.member import Member, merge
from meshq.gossip.swim import Swim
from meshq.gossip.wire import Rumor
from tests.gossip import builders
from tests.gossip.builders import DEAD, LEFT, SUSPECT, address, member, members, packet, peer

BELIEFS = members(st.just("b"))


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


@given(st.lists(BELIEFS, min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_a_peer_believes_the_merge_of_all_that_it_heard_in_whatever_order_and_however_often(
    told: list[Member], rng: Random
) -> None:
    core = builders.swim("a")
    for belief in rng.sample(told * 2, 2 * len(told)):
        core.handle_packet(0, packet("c", rumors=(Rumor(belief),)), address("c"))
    core.check()
    assert core.member(peer("b")) == reduce(merge, told)


def test_only_a_higher_incarnation_or_epoch_brings_back_the_dead(swim: Callable[..., Swim]) -> None:
    core, dead = swim("a"), member("b", DEAD, incarnation=3)
    back, later = member("b", incarnation=4), member("b", DEAD, incarnation=4)
    told = (dead, member("b", incarnation=3), member("b", SUSPECT, incarnation=3), back, later, member("b", epoch=2))
    believed = []
    for belief in told:
        core.handle_packet(0, packet("c", rumors=(Rumor(belief),)), address("c"))
        believed.append(core.member(peer("b")))
    assert believed == [dead, dead, dead, back, later, member("b", epoch=2)]
    assert merge(dead, member("b", LEFT, incarnation=3)) == member("b", LEFT, incarnation=3)
