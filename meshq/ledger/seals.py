"""What a table must contain: the sum of the hashes of its entries, written in the transaction that changes them.

A hash beside each row shows that a row was damaged. That one is missing, because a damaged page made SQLite skip it, shows
nowhere: the vector would go on saying that this peer knows the row, and the others would take it for purged and delete theirs.
The seal shows it, and also what happens to the vector itself, whose entries have no hash of their own.
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Final

from meshq.ledger.database import Connection
from meshq.ledger.schema import SEALED

SUM_BYTES: Final = 16
_MASK: Final = 2 ** (8 * SUM_BYTES) - 1


def print_of(table: str, key: object, value: object) -> int:
    """Of one entry, to be summed up. Whatever a damaged entry holds has one, too."""
    content = value if isinstance(value, bytes) else str(value).encode()
    return int.from_bytes(hashlib.blake2b(f"{table}\0{key}\0".encode() + content, digest_size=SUM_BYTES).digest())


def sum_of(table: str, entries: Iterable[tuple[object, object]]) -> int:
    return sum(print_of(table, key, value) for key, value in entries) & _MASK


def sum_on_disk(connection: Connection, table: str) -> int:
    """What the entries of the table that can be read sum up to."""
    key, value = SEALED[table]
    return sum_of(table, connection.execute(f"SELECT {key}, {value} FROM {table}"))


class Seals:
    """The seals of one database. Mutable; inside a transaction it is ahead of the disk until `save`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sums: dict[str, int] = {}
        self._changed: dict[str, None] = {}

    def load(self) -> None:
        """Forget what was not saved."""
        found = self._connection.execute("SELECT name, sum FROM seals").fetchall()
        self._sums = {str(name): int.from_bytes(data) for name, data in found if isinstance(data, bytes)}
        self._changed = {}

    def put(self, table: str, entries: Mapping[str, object]) -> None:
        """These entries are about to be written."""
        self.drop(table, entries)
        self._change(table, sum_of(table, entries.items()))

    def drop(self, table: str, keys: Iterable[str]) -> None:
        """These entries, of which not all need to be there, are about to be deleted."""
        key, value = SEALED[table]
        query = f"SELECT {value} FROM {table} WHERE {key} = ?"
        for each in keys:
            for (old,) in self._connection.execute(query, (each,)):
                self._change(table, -print_of(table, each, old))

    def make(self, table: str) -> None:
        """Whatever the table contains is right."""
        self._change(table, sum_on_disk(self._connection, table) - self._sums.get(table, 0))

    def save(self) -> None:
        """At the end of the transaction."""
        entries = [(table, self._sums[table].to_bytes(SUM_BYTES)) for table in self._changed]
        if entries:
            self._connection.executemany("INSERT OR REPLACE INTO seals VALUES (?, ?)", entries)
        self._changed = {}

    def fits(self, table: str, total: int) -> bool:
        """Whether entries that sum up to this are all that should be there."""
        return self._sums.get(table) == total

    def _change(self, table: str, by: int) -> None:
        self._sums[table] = (self._sums.get(table, 0) + by) & _MASK
        self._changed[table] = None
