"""One SQLite file: transactions that are durable or not, a reserve for a full disk, and what kind of trouble an error means.

There are two kinds. The disk may refuse (full, no permission, an I/O error): nothing is wrong with what is on it, and trying
again may help (`StoreError`). Or the file is not what was written (`StoreDamaged`): trying again does not help, and whoever
knows better must write a new one. SQLite is believed in neither: an error that is not known to be the disk's is damage.
"""

import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, Protocol

from meshq.config import RESERVE_BYTES, Home
from meshq.durable import sync_folder
from meshq.errors import StoreError

WAL_BYTES_MAX: Final = 16 * 2**20  # what a checkpoint leaves of the write-ahead log
CACHE_KIB: Final = 2_048  # rows live in memory already; SQLite's default of 2 MB a connection is enough
RESERVE_AGAIN_COMMITS: Final = 64  # a full disk is asked for room again after so many commits
LOOK_AT_DISK: Final = "look at the disk and its permissions"
_OF_THE_DISK: Final = frozenset({
    sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH,
    sqlite3.SQLITE_READONLY, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_PROTOCOL,
    sqlite3.SQLITE_NOLFS, sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_INTERRUPT,
})  # fmt: skip
_DAMAGED: Final = frozenset({sqlite3.SQLITE_IOERR_SHORT_READ, sqlite3.SQLITE_IOERR_CORRUPTFS})
_PRIMARY: Final = 0xFF  # of an extended error code


class StoreDamaged(StoreError):
    """The ledger's file holds something else than what was written to it. State: in memory unchanged, on disk lost in part."""


class Connection(Protocol):
    """What is used of `sqlite3.Connection`."""

    @property
    def in_transaction(self) -> bool: ...
    def execute(self, sql: str, parameters: Any = (), /) -> Any: ...
    def executemany(self, sql: str, parameters: Iterable[Any], /) -> Any: ...
    def close(self) -> None: ...


Connect = Callable[[Path], Connection]


def connect(file: Path) -> Connection:
    """Open the file, or make one. One thread at a time is the caller's business."""
    return sqlite3.connect(file, isolation_level=None, check_same_thread=False)


def of_the_disk(error: sqlite3.Error) -> bool:
    """Whether the disk refused, rather than that the file is damaged."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)  # none: text that is no text
    return code not in _DAMAGED and code & _PRIMARY in _OF_THE_DISK


class Database:
    """An open file in a home."""

    def __init__(self, home: Home, file: Path, connection: Connection, counters: Counter[str]) -> None:
        self._home = home
        self._file = file
        self._counters = counters
        self._synchronous = ""
        self._commits = 0
        self.connection = connection

    @classmethod
    def open(cls, home: Home, file: Path, connect: Connect, counters: Counter[str]) -> "Database":
        """StoreError or StoreDamaged; then it is closed again."""
        try:
            connection = connect(file)
        except sqlite3.Error as error:
            raise refusal("opening", file, error) from error
        try:
            connection.execute("PRAGMA cell_size_check=ON")  # looks closer at each page that it reads
            connection.execute(f"PRAGMA cache_size=-{CACHE_KIB}")
            connection.execute("PRAGMA user_version").fetchone()
            connection.execute("PRAGMA synchronous=FULL")
        except sqlite3.Error as error:
            connection.close()
            raise refusal("opening", file, error) from error
        return cls(home, file, connection, counters)

    def make_ready(self) -> None:
        """To be written to. A name is durable when its folder is, of which SQLite takes no care for the database itself."""
        try:
            self.connection.execute("PRAGMA journal_mode=WAL")
            self.connection.execute(f"PRAGMA journal_size_limit={WAL_BYTES_MAX}")
            sync_folder(self._file.parent)
        except sqlite3.Error as error:
            raise refusal("opening", self._file, error) from error
        except OSError as error:
            raise StoreError(f"opening the ledger {self._file}: {error}", LOOK_AT_DISK) from error

    @property
    def version(self) -> int:
        return int(self.connection.execute("PRAGMA user_version").fetchone()[0])

    def write(self, work: Callable[[], None], *, durable: bool) -> None:
        """One transaction; a second time if the disk was full and there was a reserve to give back."""
        self._set_synchronous("FULL" if durable else "NORMAL")
        try:
            self._transaction(work)
        except sqlite3.Error as error:
            if not self._give_reserve(error):
                raise refusal("writing", self._file, error) from error
            try:
                self._transaction(work)
            except sqlite3.Error as again:
                raise refusal("writing", self._file, again) from again
        self._commits += 1
        if self._commits % RESERVE_AGAIN_COMMITS == 0:
            self.make_reserve()

    def close(self) -> None:
        self.connection.close()

    def make_reserve(self) -> None:
        """Set some room aside, if there is twice as much."""
        reserve = self._home.reserve
        if reserve.exists() or _free_bytes(self._home.root) < 2 * RESERVE_BYTES:
            return
        try:
            with reserve.open("xb") as file:
                os.posix_fallocate(file.fileno(), 0, RESERVE_BYTES)
        except OSError:
            reserve.unlink(missing_ok=True)
            self._counters["reserve_refused"] += 1

    # ---- inside

    def _transaction(self, work: Callable[[], None]) -> None:
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            work()
            self.connection.execute("COMMIT")
        except BaseException:
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")
            raise

    def _set_synchronous(self, level: str) -> None:
        if level != self._synchronous:
            self.connection.execute(f"PRAGMA synchronous={level}")
            self._synchronous = level

    def _give_reserve(self, error: sqlite3.Error) -> bool:
        """Whether the failure was a full disk and there was a reserve to give back."""
        if getattr(error, "sqlite_errorcode", 0) != sqlite3.SQLITE_FULL or not self._home.reserve.exists():
            return False
        self._home.reserve.unlink()
        self._counters["reserve_used"] += 1
        return True


def refusal(doing: str, file: Path, error: sqlite3.Error) -> StoreError:
    """What to raise instead of this error; what only a bug can cause is raised at once."""
    if isinstance(error, sqlite3.ProgrammingError):
        raise error
    if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL:
        return StoreError(f"{doing} the ledger {file}: the disk is full", f"make room on the disk that holds {file.parent}")
    if of_the_disk(error):
        return StoreError(f"{doing} the ledger {file}: {error}", LOOK_AT_DISK)
    return StoreDamaged(f"{doing} the ledger {file}: it is damaged ({error})", LOOK_AT_DISK)


def set_aside(file: Path, successor: Path | None = None) -> Path:
    """Keep a damaged database under another name, which is returned, and let `successor` take its place.

    Its log must go first: SQLite would replay it into the next one. At no moment is there no database.
    """
    number = 1
    while (target := file.with_name(f"{file.name}.damaged-{number}")).exists():
        number += 1
    try:
        os.link(file, target)
    except OSError:  # no hard links on this file system
        file.rename(target)
    for suffix in ("-wal", "-shm"):
        part = file.with_name(file.name + suffix)
        if part.exists():
            part.rename(target.with_name(target.name + suffix))
    if successor is None:
        file.unlink(missing_ok=True)
    else:
        successor.replace(file)
    sync_folder(file.parent)
    return target


def _free_bytes(folder: Path) -> int:
    usage = os.statvfs(folder)
    return usage.f_bavail * usage.f_frsize
