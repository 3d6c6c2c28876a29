"""A sorted collection of up to some 100,000 items, of which one is found, added or removed without moving all others.

A plain sorted list moves half a megabyte for each item that comes somewhere in the middle: a peer that joins would spend more
time on that than on all the rest. So the list is cut into blocks, each sorted, and all that a block holds is before all that
the next one holds.

Limits. BLOCK_ITEMS_MAX items in a block; one that grows beyond is cut in two. Items that come in order fill the last block.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Any, Final, Generic, TypeVar

T = TypeVar("T", bound=Any)  # has an order

BLOCK_ITEMS_MAX: Final = 512


class Ordered(Generic[T]):
    """Mutable. No two items are equal."""

    __slots__ = ("_blocks", "_lasts", "_length")

    def __init__(self) -> None:
        self._blocks: list[list[T]] = []  # none is empty
        self._lasts: list[T] = []  # the last item of each
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[T]:
        for block in self._blocks:
            yield from block

    def __reversed__(self) -> Iterator[T]:
        for block in reversed(self._blocks):
            yield from reversed(block)

    def add(self, item: T) -> None:
        self._length += 1
        at = bisect_left(self._lasts, item)
        if at == len(self._blocks):  # it is the last of all
            if not self._blocks or len(self._blocks[-1]) >= BLOCK_ITEMS_MAX:
                self._blocks.append([item])
                self._lasts.append(item)
            else:
                self._blocks[-1].append(item)
                self._lasts[-1] = item
            return
        block = self._blocks[at]
        insort(block, item)
        if len(block) > BLOCK_ITEMS_MAX:
            middle = len(block) // 2
            self._blocks[at : at + 1] = [block[:middle], block[middle:]]
            self._lasts.insert(at, block[middle - 1])

    def remove(self, item: T) -> None:
        """The item must be there."""
        at = bisect_left(self._lasts, item)
        block = self._blocks[at]
        place = bisect_left(block, item)
        assert block[place] == item, f"{item} is not here"
        self._length -= 1
        del block[place]
        if block:
            self._lasts[at] = block[-1]
        else:
            del self._blocks[at], self._lasts[at]

    def rank(self, item: T) -> int:
        """How many are before this item, which need not be there."""
        at = bisect_left(self._lasts, item)
        inside = bisect_left(self._blocks[at], item) if at < len(self._blocks) else 0
        return sum(map(len, self._blocks[:at])) + inside

    def since(self, item: T) -> Iterator[T]:
        """The item, if it is there, and what comes behind it, in order."""
        at = bisect_left(self._lasts, item)
        for number in range(at, len(self._blocks)):
            block = self._blocks[number]
            yield from block[bisect_left(block, item) :] if number == at else block

    def before(self, item: T) -> Iterator[T]:
        """What comes before the item, the nearest first."""
        at = min(bisect_left(self._lasts, item), len(self._blocks) - 1)
        for number in range(at, -1, -1):
            block = self._blocks[number]
            yield from reversed(block[: bisect_left(block, item)] if number == at else block)
