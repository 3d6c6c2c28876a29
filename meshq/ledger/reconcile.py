"""Finding the few rows in which two replicas differ, without naming all that are equal: range-based set reconciliation.

Problem. A peer that was away for long asks for rows that the other has purged meanwhile, so the index of writes does not tell
what it lacks (R6). It has 100,000 rows of which perhaps ten differ; a list of all ids with their hashes is 2.4 MB.

Algorithm. A task's key is its id in 20 hex digits, and a range is what begins with some of them. Its print is the sum of the
hashes of its rows. The asker sends ranges whose prints differ; the donor answers each with the prints of its 16 parts, or, once
no more than LEAF_ROWS_MAX rows are in it, with the first bytes of their hashes. The asker descends where the parts differ and
in the end knows which of the donor's rows it lacks (by those bytes), and which of its own the donor has not got like that (by
their ids). It asks for both; the donor answers with rows, and says which ids it has purged. Nothing is concluded from a list
that may be out of date: absence counts only in the donor's answer to that very question, and a row that has changed between
list and question makes its range be listed again; a row that a third side brings meanwhile is asked for by its id. So both may
go on writing, and be written to.

The prints of the first three digits (4,096 ranges) are kept up to date with each write, so that the root costs nothing and a
range of few rows little; ids are hashes, so the ranges fill evenly.

Limits. RANGES_MAX ranges and ROWS_MAX rows in one question, OPEN_MAX things on the asker's list, DIGITS levels, QUESTIONS_MAX
questions. A donor whose answers make no sense costs no more than these, and the reconciliation is given up.

Reading: Aljoscha Meyer, "Range-Based Set Reconciliation" (2023).
"""

import hashlib
from base64 import b32decode
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final, Protocol

from meshq.ids import TaskId

WAYS: Final = 16
DIGITS: Final = 20  # of a key: 80 bits
KEPT_DIGITS: Final = 3
LEAF_ROWS_MAX: Final = 64  # 100,000 rows make 24 in each range of three digits, 200,000 make 49: neither is split for few
PRINT_BYTES: Final = 16
RANGES_MAX: Final = 128  # in one question: their rows are hashed within some milliseconds
ROWS_MAX: Final = 256  # that one question asks for by each of the two ways
OPEN_MAX: Final = 500_000  # what the asker still has to ask for: twice the rows that there may be, and some ranges
QUESTIONS_MAX: Final = 10_000
SHORT_BYTES: Final = 8  # of a row's hash: two of the 64 in one list are the same once in 10^16 lists
_PRINT_MASK: Final = 2 ** (8 * PRINT_BYTES) - 1
_HEX: Final = "0123456789abcdef"


def key_of(task: TaskId) -> str:
    """The task's id in hex digits, of which ranges are beginnings."""
    return b32decode(task.upper()).hex()


def hash_row(packed: bytes) -> bytes:
    """Of a row as it stands on the wire. Equal rows have equal bytes there (`codec`)."""
    return hashlib.blake2b(packed, digest_size=PRINT_BYTES).digest()


class Fingerprints:
    """The prints of all ranges of up to three digits, and which tasks are in each. Mutable.

    `hash_of` gives the hash of a task's row as it is now; it must be what was told to `add`.
    """

    def __init__(self, hash_of: Callable[[TaskId], bytes]) -> None:
        self._hash_of = hash_of
        self._sums = [0] * WAYS**KEPT_DIGITS
        self._tasks: list[list[TaskId]] = [[] for _ in range(WAYS**KEPT_DIGITS)]

    def add(self, task: TaskId, digest: bytes) -> None:
        """A row that was not here."""
        place = _place(key_of(task))
        self._tasks[place].append(task)
        self._change(place, int.from_bytes(digest))

    def replace(self, task: TaskId, before: bytes, after: bytes) -> None:
        self._change(_place(key_of(task)), int.from_bytes(after) - int.from_bytes(before))

    def remove(self, task: TaskId, digest: bytes) -> None:
        place = _place(key_of(task))
        self._tasks[place].remove(task)
        self._change(place, -int.from_bytes(digest))

    def root(self) -> bytes:
        """The print of everything."""
        return (sum(self._sums) & _PRINT_MASK).to_bytes(PRINT_BYTES)

    def tasks(self, prefix: str) -> Iterator[TaskId]:
        """Those whose keys begin so."""
        first, count = _places(prefix)
        for tasks in self._tasks[first : first + count]:
            for task in tasks:
                if len(prefix) <= KEPT_DIGITS or key_of(task).startswith(prefix):
                    yield task

    def parts(self, prefix: str) -> tuple[int, ...]:
        """The prints of the 16 ranges that this one consists of."""
        if len(prefix) < KEPT_DIGITS:
            first, count = _places(prefix)
            width = count // WAYS
            return tuple(sum(self._sums[at : at + width]) & _PRINT_MASK for at in range(first, first + count, width))
        sums = [0] * WAYS
        for task in self.tasks(prefix):
            sums[int(key_of(task)[len(prefix)], WAYS)] += int.from_bytes(self._hash_of(task))
        return tuple(each & _PRINT_MASK for each in sums)

    def is_leaf(self, prefix: str) -> bool:
        """Whether so few rows are in the range that they are listed."""
        if len(prefix) == DIGITS:
            return True
        first, count = _places(prefix)
        if len(prefix) <= KEPT_DIGITS:
            return sum(map(len, self._tasks[first : first + count])) <= LEAF_ROWS_MAX
        return sum(1 for _ in self.tasks(prefix)) <= LEAF_ROWS_MAX

    def shorts(self, prefix: str) -> dict[bytes, TaskId]:
        """The tasks of a range by the first bytes of their rows' hashes."""
        return {self._hash_of(task)[:SHORT_BYTES]: task for task in self.tasks(prefix)}

    def _change(self, place: int, by: int) -> None:
        self._sums[place] = (self._sums[place] + by) & _PRINT_MASK


def below(prefix: str) -> Iterable[str]:
    """The 16 parts of a range, in the order of their prints."""
    return (prefix + digit for digit in _HEX)


def is_prefix(text: str) -> bool:
    return len(text) <= DIGITS and all(digit in _HEX for digit in text)


def _place(key: str) -> int:
    return int(key[:KEPT_DIGITS], WAYS)


def _places(prefix: str) -> tuple[int, int]:
    """The first kept range of those that hold everything with this prefix, and how many they are."""
    head = prefix[:KEPT_DIGITS]
    count = WAYS ** (KEPT_DIGITS - len(head))
    return (int(head, WAYS) if head else 0) * count, count


class Reconciliation:
    """The asker's side, from the first question to the last answer. Mutable.

    `ask` says what to ask next, and None when nothing is left to ask; `heed` takes the answer.
    """

    def __init__(self, mine: Fingerprints, arrived: dict[TaskId, None] | None = None) -> None:
        """`arrived`: tasks that have come here from elsewhere since, maybe after their range was compared. It is emptied."""
        self._mine = mine
        self.arrived = {} if arrived is None else arrived
        self._prefixes: dict[str, None] = {"": None}
        self._wanted: dict[tuple[str, bytes], None] = {}
        self._tasks: dict[TaskId, None] = {}
        self._questions = 0
        self._asked = Inquiry()
        self.absent: dict[TaskId, None] = {}  # tasks of mine that the donor does not have

    def ask(self) -> "Inquiry | None":
        self._tasks |= self.arrived
        self.arrived.clear()
        if not (self._prefixes or self._wanted or self._tasks):
            return None
        first = self._questions == 0
        self._questions += 1
        self._asked = Inquiry(
            root=self._mine.root() if first else b"",
            prefixes=tuple(islice(self._prefixes, RANGES_MAX)),
            wanted=tuple(islice(self._wanted, ROWS_MAX)),
            tasks=tuple(islice(self._tasks, ROWS_MAX)),
        )
        return self._asked

    def heed(self, told: "Told") -> bool:
        """Take the answer to what was asked last. False if it makes no sense, or there is no end to it: give up."""
        asked = self._asked
        if told.equal:
            self._prefixes = {}
            return bool(asked.root)
        served = (len(told.ranges), told.wants_served, told.tasks_served)
        asked_for = (len(asked.prefixes), len(asked.wanted), len(asked.tasks))
        if not any(served) or any(done > want for done, want in zip(served, asked_for, strict=True)):
            return False
        if not (set(told.absent) <= set(asked.tasks) and set(told.stale) <= {prefix for prefix, _ in asked.wanted}):
            return False
        for task in asked.tasks[: told.tasks_served]:
            del self._tasks[task]
        for want in asked.wanted[: told.wants_served]:
            del self._wanted[want]
        self.absent |= dict.fromkeys(told.absent)
        for prefix, (leaf, data) in zip(asked.prefixes, told.ranges, strict=False):
            del self._prefixes[prefix]
            if not (self._heed_leaf(prefix, data) if leaf else self._heed_parts(prefix, data)):
                return False
        self._prefixes |= dict.fromkeys(told.stale)
        open_now = len(self._prefixes) + len(self._wanted) + len(self._tasks)
        return open_now <= OPEN_MAX and self._questions < QUESTIONS_MAX

    def _heed_parts(self, prefix: str, data: bytes) -> bool:
        if len(data) != WAYS * PRINT_BYTES or len(prefix) >= DIGITS:
            return False
        for place, (part, mine) in enumerate(zip(below(prefix), self._mine.parts(prefix), strict=True)):
            if int.from_bytes(data[place * PRINT_BYTES : (place + 1) * PRINT_BYTES]) != mine:
                self._prefixes[part] = None
        return True

    def _heed_leaf(self, prefix: str, data: bytes) -> bool:
        if len(data) % SHORT_BYTES:
            return False
        theirs = {data[at : at + SHORT_BYTES]: None for at in range(0, len(data), SHORT_BYTES)}
        mine = self._mine.shorts(prefix)
        self._wanted |= {(prefix, short): None for short in theirs if short not in mine}
        self._tasks |= {task: None for short, task in mine.items() if short not in theirs}
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Inquiry:
    """What the asker wants to know next; the fields are those of `effects.SyncCompare`."""

    root: bytes = b""
    prefixes: tuple[str, ...] = ()
    wanted: tuple[tuple[str, bytes], ...] = ()
    tasks: tuple[TaskId, ...] = ()


class Told(Protocol):
    """What the asker must know of an answer; `effects.SyncRanges` says what the fields mean."""

    @property
    def equal(self) -> bool: ...
    @property
    def ranges(self) -> tuple[tuple[bool, bytes], ...]: ...
    @property
    def wants_served(self) -> int: ...
    @property
    def tasks_served(self) -> int: ...
    @property
    def stale(self) -> tuple[str, ...]: ...
    @property
    def absent(self) -> tuple[TaskId, ...]: ...
