"""The sorted collection that is cut into blocks: it does what a plain sorted list does."""

from bisect import bisect_left

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshq.ledger import ordered as module
from meshq.ledger.ordered import Ordered

NUMBERS = st.integers(-50, 50)


@given(added=st.lists(NUMBERS, unique=True), removed=st.sets(NUMBERS), asked=NUMBERS)
def test_whatever_is_added_and_removed_it_is_sorted_and_finds_its_places(
    added: list[int], removed: set[int], asked: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK_ITEMS_MAX", 4)
        numbers: Ordered[int] = Ordered()
        for number in added:
            numbers.add(number)
        for number in removed.intersection(added):
            numbers.remove(number)
    plain = sorted(set(added) - removed)
    place = bisect_left(plain, asked)
    assert (list(numbers), list(reversed(numbers)), len(numbers)) == (plain, plain[::-1], len(plain))
    assert (numbers.rank(asked), list(numbers.since(asked)), list(numbers.before(asked))) == (
        place, plain[place:], plain[:place][::-1],
    )  # fmt: skip


def test_no_block_is_ever_empty_or_too_large_in_whatever_order_items_come() -> None:
    for step in (1, 7, 999):  # in order, and from everywhere
        numbers: Ordered[int] = Ordered()
        for count in range(1_000):
            numbers.add(count * step % 1_000)
        assert len(numbers._blocks) <= 4
        for count in range(999):
            numbers.remove(count * step % 1_000)
            assert all(0 < len(block) <= module.BLOCK_ITEMS_MAX for block in numbers._blocks)
        assert len(numbers._blocks) == 1


def test_what_is_not_there_is_not_removed() -> None:
    numbers: Ordered[int] = Ordered()
    numbers.add(1)
    numbers.add(3)
    with pytest.raises(AssertionError, match="2 is not here"):
        numbers.remove(2)
    assert (list(numbers), len(numbers)) == ([1, 3], 2)
