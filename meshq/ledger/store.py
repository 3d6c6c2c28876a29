"""The rows on disk: one SQLite file that may be damaged, full, deleted or replaced, and never makes the ledger lie.

What must never happen is that an (actor, seq) names two different writes. So the ledger epoch is counted twice: in the file
itself, and in a small counter beside it that is raised first. A file that is missing, was copied from another peer, was
restored from an older copy of another epoch, or holds a damaged row gets a new ledger epoch before the first write.

Every row carries its own SHA-256, since SQLite's integrity check sees damaged pages and not damaged content. A damaged row is
set aside, and the vector forgotten, so that the next sync brings back whatever is missing.

Commits of own writes are durable (`synchronous=FULL`); rows of others may be lost with the power, for they come again. A
reserve file is given back to the file system when it is full, so that the last writes (the ends of what runs) still succeed.

All methods block; the shell calls them in one thread.
"""

import hashlib
import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from meshq import codec
from meshq.config import RESERVE_BYTES, Home
from meshq.durable import write_atomically
from meshq.errors import MalformedData, StoreError
from meshq.ids import ActorId, PeerId, is_actor_id
from meshq.ledger.effects import Persist
from meshq.ledger.replica import ROW_BYTES_MAX
from meshq.ledger.row import Row, Vector

SCHEMA_VERSION = 1
WAL_BYTES_MAX = 16 * 2**20  # what a checkpoint leaves of the write-ahead log
CACHE_KIB = 2_048  # rows live in memory already; SQLite's default of 2 MB a connection is enough
LOOK_AT_DISK = "look at the disk and its permissions"
RESERVE_AGAIN_COMMITS = 64  # a full disk is asked for room again after so many commits

_SCHEMA = """
CREATE TABLE rows (task TEXT PRIMARY KEY, data BLOB NOT NULL, sha256 BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE vector (actor TEXT PRIMARY KEY, seq INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE floors (actor TEXT PRIMARY KEY, seq INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE quarantine (number INTEGER PRIMARY KEY, task TEXT NOT NULL, data BLOB NOT NULL, reason TEXT NOT NULL);
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """All that the ledger core starts from."""

    ledger_epoch: int
    rows: tuple[Row, ...]
    vector: Vector
    floors: Vector


class Store:
    """One peer's database. `open` makes it."""

    def __init__(self, home: Home, peer: PeerId, connection: sqlite3.Connection) -> None:
        self._home = home
        self._peer = peer
        self._connection = connection
        self._commits = 0
        self._synchronous = ""
        self.counters: Counter[str] = Counter()

    @classmethod
    def open(cls, home: Home, peer: PeerId) -> "Store":
        """Open the database of this home, or make one.

        StoreError if a newer meshq wrote it (it is left untouched) or the disk refuses.
        """
        home.root.mkdir(parents=True, exist_ok=True)
        try:
            return cls._open(home, peer)
        except sqlite3.DatabaseError as error:
            if error.sqlite_errorcode not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise StoreError(
                    f"opening the ledger {home.ledger}: {error}", "look at the disk and its permissions"
                ) from error
        _set_aside(home.ledger)
        try:
            store = cls._open(home, peer)
        except sqlite3.DatabaseError as error:
            raise StoreError(f"making a new ledger {home.ledger}: {error}", LOOK_AT_DISK) from error
        store.counters["databases_damaged"] += 1
        return store

    @classmethod
    def _open(cls, home: Home, peer: PeerId) -> "Store":
        # One thread at a time is the shell's business: it opens here and commits in its own thread.
        connection = sqlite3.connect(home.ledger, isolation_level=None, check_same_thread=False)
        try:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version > SCHEMA_VERSION:
                raise StoreError(
                    f"opening the ledger {home.ledger}: a newer meshq wrote it (schema {version}, not {SCHEMA_VERSION})",
                    "upgrade meshq on this machine; nothing was changed",
                )
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute(f"PRAGMA journal_size_limit={WAL_BYTES_MAX}")
            connection.execute(f"PRAGMA cache_size=-{CACHE_KIB}")
            store = cls(home, peer, connection)
            store._prepare(new=version == 0)
        except BaseException:
            connection.close()
            raise
        store._make_reserve()
        return store

    def _prepare(self, *, new: bool) -> None:
        """Create the tables, and see to it that no write of an earlier database is named again."""
        counted = _read_counter(self._home.ledger_epoch)
        if new:
            self._write_counter(counted + 1)
            self._transaction(lambda: self._create(counted + 1))
            return
        recorded, owner = int(self._meta("ledger_epoch")), self._meta("peer")
        if recorded != counted or owner != self._peer:
            self.mint(max(recorded, counted) + 1)

    def _create(self, ledger_epoch: int) -> None:
        for statement in _SCHEMA.split(";"):
            self._connection.execute(statement)
        self._set_meta(ledger_epoch)
        self._connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")

    def load(self) -> Stored:
        """Everything, each row checked. Damaged ones are set aside, and then all is asked for anew by a new actor."""
        rows: list[Row] = []
        damaged: list[tuple[str, bytes, str]] = []
        for task, data, digest in self._connection.execute("SELECT task, data, sha256 FROM rows ORDER BY task"):
            try:
                rows.append(_check_row(task, data, digest))
            except MalformedData as error:
                damaged.append((str(task), bytes(data), error.message))
        if damaged:
            self._quarantine(damaged)
        return Stored(
            ledger_epoch=int(self._meta("ledger_epoch")),
            rows=tuple(rows),
            vector=self._load("vector"),
            floors=self._load("floors"),
        )

    def commit(self, persist: Persist) -> None:
        """All of it or nothing; fsync if it is durable. StoreError if the disk refuses, the reserve given back."""
        self._write_through(lambda: self._write(persist), durable=persist.durable)
        self._commits += 1
        if self._commits % RESERVE_AGAIN_COMMITS == 0:
            self._make_reserve()

    def mint(self, ledger_epoch: int) -> None:
        """From now on this peer writes as the actor of this ledger epoch."""
        self._write_counter(ledger_epoch)
        self._write_through(lambda: self._set_meta(ledger_epoch), durable=True)
        self.counters["ledger_epochs_minted"] += 1

    def close(self) -> None:
        self._connection.close()

    # ---- inside

    def _write(self, persist: Persist) -> None:
        execute = self._connection.executemany
        encoded = ((row.task, codec.encode(row)) for row in persist.rows)
        execute(
            "INSERT INTO rows VALUES (?, ?, ?) ON CONFLICT (task) DO UPDATE SET data=excluded.data, sha256=excluded.sha256",
            ((task, data, hashlib.sha256(data).digest()) for task, data in encoded),
        )
        for table, entries in (("vector", persist.vector), ("floors", persist.floors)):
            execute(
                f"INSERT INTO {table} VALUES (?, ?) ON CONFLICT (actor) DO UPDATE SET seq=excluded.seq", sorted(entries.items())
            )

    def _quarantine(self, damaged: Iterable[tuple[str, bytes, str]]) -> None:
        """Nobody can say whose writes a damaged row held: forget the vector, and never use this actor again."""

        def set_aside() -> None:
            for task, data, reason in damaged:
                self._connection.execute("INSERT INTO quarantine (task, data, reason) VALUES (?, ?, ?)", (task, data, reason))
                self._connection.execute("DELETE FROM rows WHERE task = ?", (task,))
                self.counters["rows_quarantined"] += 1
            self._connection.execute("DELETE FROM vector")

        self.mint(int(self._meta("ledger_epoch")) + 1)
        self._write_through(set_aside, durable=True)

    def _write_through(self, work: Callable[[], None], *, durable: bool) -> None:
        """One transaction; a second time if the disk was full and there was a reserve to give back."""
        self._set_synchronous("FULL" if durable else "NORMAL")
        try:
            self._transaction(work)
        except sqlite3.DatabaseError as error:
            if not self._give_reserve(error):
                raise _refused(self._home.ledger, error) from error
            try:
                self._transaction(work)
            except sqlite3.DatabaseError as again:
                raise _refused(self._home.ledger, again) from again

    def _transaction(self, work: Callable[[], None]) -> None:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            work()
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def _set_synchronous(self, level: str) -> None:
        if level != self._synchronous:
            self._connection.execute(f"PRAGMA synchronous={level}")
            self._synchronous = level

    def _load(self, table: str) -> Mapping[ActorId, int]:
        entries = self._connection.execute(f"SELECT actor, seq FROM {table} ORDER BY actor")
        return {ActorId(actor): seq for actor, seq in entries if is_actor_id(actor)}

    def _meta(self, name: str) -> str:
        found = self._connection.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        if found is None:
            raise StoreError(f"opening the ledger {self._home.ledger}: it has no {name}", "move the file away to start anew")
        return str(found[0])

    def _set_meta(self, ledger_epoch: int) -> None:
        entries = [("ledger_epoch", str(ledger_epoch)), ("peer", self._peer)]
        self._connection.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", entries)

    def _write_counter(self, ledger_epoch: int) -> None:
        try:
            write_atomically(self._home.ledger_epoch, str(ledger_epoch).encode("ascii"))
        except OSError as error:
            raise StoreError(f"counting the ledger epoch in {self._home.ledger_epoch}: {error}") from error

    def _give_reserve(self, error: sqlite3.DatabaseError) -> bool:
        """Whether the failure was a full disk and there was a reserve to give back."""
        if error.sqlite_errorcode != sqlite3.SQLITE_FULL or not self._home.reserve.exists():
            return False
        self._home.reserve.unlink()
        self.counters["reserve_used"] += 1
        return True

    def _make_reserve(self) -> None:
        """Set some room aside, if there is twice as much."""
        if self._home.reserve.exists() or _free_bytes(self._home.root) < 2 * RESERVE_BYTES:
            return
        try:
            with self._home.reserve.open("xb") as file:
                os.posix_fallocate(file.fileno(), 0, RESERVE_BYTES)
        except OSError:
            self._home.reserve.unlink(missing_ok=True)
            self.counters["reserve_refused"] += 1


def _check_row(task: str, data: bytes, digest: bytes) -> Row:
    """MalformedData if the row is not what was written."""
    if hashlib.sha256(data).digest() != digest:
        raise MalformedData("its hash is another than when it was written")
    row = codec.decode(Row, data, bytes_max=2 * ROW_BYTES_MAX)
    if row.task != task:
        raise MalformedData("it belongs to another task")
    return row


def _refused(file: Path, error: sqlite3.DatabaseError) -> StoreError:
    if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
        return StoreError(f"writing the ledger {file}: the disk is full", f"make room on the disk that holds {file.parent}")
    return StoreError(f"writing the ledger {file}: {error}", LOOK_AT_DISK)


def _set_aside(file: Path) -> None:
    """Keep a damaged database under another name. Its log must go with it: SQLite would replay it into the next one."""
    number = 1
    while (target := file.with_name(f"{file.name}.damaged-{number}")).exists():
        number += 1
    for suffix in ("", "-wal", "-shm"):
        part = file.with_name(file.name + suffix)
        if part.exists():
            part.rename(target.with_name(target.name + suffix))


def _read_counter(file: Path) -> int:
    try:
        return int(file.read_text("ascii"))
    except FileNotFoundError:
        return 0
    except (OSError, ValueError) as error:
        raise StoreError(
            f"reading the ledger epoch in {file}: {error}", "write a number into it that is higher than any before"
        ) from error


def _free_bytes(folder: Path) -> int:
    usage = os.statvfs(folder)
    return usage.f_bavail * usage.f_frsize
