"""The rows on disk: one SQLite file that may be damaged, full, deleted or replaced, and never makes the ledger lie.

What must never happen is that an (actor, seq) names two different writes. So the ledger epoch stands in the file and in a
small counter beside it, which is written first. A file that is missing, a copy (its inode is another), one of another peer,
one whose epoch is not the counter's, or one that holds anything damaged gets a new ledger epoch before the first write. That
is above all that are known here by a random step: of two copies of one home, each of which counted up by one, both would have
the same actor. What shows nothing of all this (a file system that was set back as a whole, a log whose end was lost) is found
by asking the other peers: see `authorship.py`.

Every row carries its own SHA-256, since SQLite's integrity check sees damaged pages and not damaged content, and each table a
seal (`seals.py`), since a damaged page may hide rows. On a start a damaged row is set aside and the vector forgotten, so that
the next sync brings back whatever is missing, and nobody takes for purged what was only lost here; of a file that SQLite
cannot read, what can be read is saved. While the agent runs it has every row in memory: then what is damaged is written again.

Commits of own writes are durable (`synchronous=FULL`), with all commits before them; rows of others may be lost with the power,
for they come again.

All methods block; the shell calls them in one thread.
"""

import hashlib
import os
import secrets
import sqlite3
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, TypeVar

from meshq import codec
from meshq.config import SYNC_BYTES_MAX, Home
from meshq.durable import write_atomically
from meshq.errors import MalformedData, StoreError
from meshq.ids import LEDGER_EPOCH_MAX, ActorId, PeerId, TaskId, is_actor_id
from meshq.ledger import database
from meshq.ledger.database import Connect, Database, StoreDamaged, refusal, set_aside
from meshq.ledger.effects import Contents, Grant, Persist
from meshq.ledger.replica import EPOCH_STEP_MAX, ROW_BYTES_MAX
from meshq.ledger.row import Row, Vector
from meshq.ledger.schema import MIGRATIONS, SCHEMA_VERSION, SEALED
from meshq.ledger.seals import Seals, sum_of, sum_on_disk
from meshq.ledger.settings import NOTHING_SET, Settings
from meshq.ledger.table import PackedRows

T = TypeVar("T")

GRANT_BYTES_MAX: Final = 1_024
QUARANTINE_MAX: Final = 1_000  # damaged rows that are kept for whoever wants to know what happened; the others are counted
_SETTINGS: Final = "settings"  # the name of the one map that holds them all, also in quarantine
_WRITE_ROW: Final = """
INSERT INTO rows VALUES (?, ?, ?) ON CONFLICT (task) DO UPDATE SET data=excluded.data, sha256=excluded.sha256
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """All that the ledger core starts from."""

    ledger_epoch: int
    rows: Sequence[Row]
    vector: Vector
    floors: Vector
    settings: Settings = NOTHING_SET
    grants: Mapping[TaskId, Grant] = field(default_factory=dict)
    new_actor: bool = False  # its ledger epoch was drawn since the store was opened: nobody ever wrote or voted as this actor


@dataclass(frozen=True, slots=True)
class _Damage:
    """An entry that is not what was written."""

    table: str
    key: object
    data: object
    reason: str


class Store:
    """One peer's database. `open` makes it."""

    def __init__(self, home: Home, peer: PeerId, connect: Connect) -> None:
        self._home = home
        self._peer = peer
        self._connect = connect
        self._database: Database | None = None
        self._drawn = False  # a ledger epoch
        self.counters: Counter[str] = Counter()

    @classmethod
    def open(cls, home: Home, peer: PeerId, connect: Connect = database.connect) -> "Store":
        """Open the database of this home, or make one.

        StoreError if a newer meshq wrote it (it is left untouched) or the disk refuses.
        """
        home.root.mkdir(parents=True, exist_ok=True)
        store = cls(home, peer, connect)
        try:
            store._begin()
        except StoreDamaged:
            store._start_over(Contents(ledger_epoch=store._new_epoch()))
        store._opened.make_reserve()
        return store

    def load(self) -> Stored:
        """Everything, checked. What is damaged is set aside, and then all is asked for anew by a new actor."""
        try:
            return self._load()
        except sqlite3.Error as error:
            trouble = refusal("reading", self._home.ledger, error)
            if not isinstance(trouble, StoreDamaged):
                raise trouble from error
        self._start_over(Contents(ledger_epoch=self._new_epoch(), packed=self._salvage()))
        try:
            return self._load()
        except sqlite3.Error as error:
            raise refusal("reading", self._home.ledger, error) from error

    def commit(self, persist: Persist) -> None:
        """All of it or nothing; fsync if it is durable. StoreError if the disk refuses, or StoreDamaged."""
        self._opened.write(lambda: self._write(persist), durable=persist.durable)

    def mint(self, ledger_epoch: int) -> None:
        """From now on this peer writes as the actor of this ledger epoch."""
        self._write_counter(ledger_epoch)
        self._opened.write(lambda: self._name_myself(ledger_epoch), durable=True)
        self.counters["ledger_epochs_minted"] += 1

    def check(self, tasks: Iterable[TaskId]) -> tuple[TaskId, ...]:
        """Those of these whose rows are not on disk as they were written. StoreDamaged if they can't be read."""
        wrong: list[TaskId] = []
        damaged: list[_Damage] = []
        with self._reading():
            for task in tasks:
                found = self._execute("SELECT data, sha256 FROM rows WHERE task = ?", (task,)).fetchone()
                if found is None:
                    wrong.append(task)
                    continue
                try:
                    _intact(*found)
                except MalformedData as error:
                    wrong.append(task)
                    damaged.append(_Damage("rows", task, found[0], error.message))
        if damaged:
            self._opened.write(lambda: self._quarantine(damaged), durable=False)
        return tuple(wrong)

    def check_seals(self) -> None:
        """StoreDamaged if a table does not hold what it must, rows apart, which `check` looks at one by one."""
        with self._reading():
            seals = Seals(self._opened.connection)
            seals.load()
            wrong = [table for table in SEALED if table != "rows" and not seals.fits(table, self._sum_on_disk(table))]
        if wrong:
            raise StoreDamaged(f"reading the ledger {self._home.ledger}: damaged are {', '.join(wrong)}", database.LOOK_AT_DISK)

    def replace(self, contents: Contents) -> None:
        """Set the damaged file aside, and write a new one with all that is known. StoreError if the disk refuses."""
        self._start_over(contents)

    def close(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None

    # ---- opening

    @property
    def _opened(self) -> Database:
        if self._database is None:  # `replace` has failed, and may be tried again
            raise StoreDamaged(
                f"opening the ledger {self._home.ledger}: it is damaged and not yet replaced", database.LOOK_AT_DISK
            )
        return self._database

    def _execute(self, sql: str, parameters: Sequence[object] = ()) -> sqlite3.Cursor:
        found: sqlite3.Cursor = self._opened.connection.execute(sql, parameters)
        return found

    def _begin(self) -> None:
        self._database = Database.open(self._home, self._home.ledger, self._connect, self.counters)
        try:
            with self._reading():
                version = self._check_version()
            self._database.make_ready()
            self._prepare(version)
        except BaseException:
            self.close()
            raise

    def _check_version(self) -> int:
        """The schema; 0 of an empty file. It is recorded twice: a bit may have flipped in SQLite's own header."""
        version = self._opened.version
        if version == 0 and not self._execute("SELECT name FROM sqlite_master").fetchall():
            return 0
        recorded = _number(self._meta("schema"), 1)
        if version > SCHEMA_VERSION and recorded > SCHEMA_VERSION:
            raise StoreError(
                f"opening the ledger {self._home.ledger}: a newer meshq wrote it (schema {version}, not {SCHEMA_VERSION})",
                "upgrade meshq on this machine; nothing was changed",
            )
        if version != recorded:
            raise StoreDamaged(f"opening the ledger {self._home.ledger}: it is damaged (schema {version} or {recorded})")
        return version

    def _prepare(self, version: int) -> None:
        """Create the tables that there are not yet, and see to it that no write of an earlier database is named again."""
        if version == 0:
            ledger_epoch = self._new_epoch()
            self._write_counter(ledger_epoch)
            self._opened.write(lambda: self._create(ledger_epoch), durable=True)
            return
        if version < SCHEMA_VERSION:
            self._opened.write(lambda: self._migrate(version), durable=True)
        counted = _read_counter(self._home)
        recorded, owner, inode = _number(self._meta("ledger_epoch"), 0), self._meta("peer"), self._meta("inode")
        if recorded != counted or owner != self._peer or inode != self._inode():
            self.counters["databases_copied"] += inode != self._inode()
            self.mint(self._new_epoch(recorded))

    def _create(self, ledger_epoch: int) -> None:
        self._migrate(0)
        self._name_myself(ledger_epoch)

    def _name_myself(self, ledger_epoch: int) -> None:
        self._set_meta(ledger_epoch=str(ledger_epoch), peer=self._peer, inode=self._inode())

    def _migrate(self, version: int) -> None:
        """From this schema to the present one. In a transaction: a crash leaves the database as it was."""
        for older in range(version, SCHEMA_VERSION):
            for statement in MIGRATIONS[older].split(";"):
                self._execute(statement)
        seals = Seals(self._opened.connection)
        for table in SEALED:
            seals.make(table)
        seals.save()
        self._set_meta(schema=str(SCHEMA_VERSION), inode=self._inode())
        self._execute(f"PRAGMA user_version={SCHEMA_VERSION}")

    def _start_over(self, contents: Contents) -> None:
        """Write all this into a new file, which takes the place of the damaged one in one step."""
        self.counters["databases_damaged"] += 1
        self.close()
        home, beside = self._home, self._home.ledger.with_name(self._home.ledger.name + ".new")
        for suffix in ("", "-wal", "-shm"):
            beside.with_name(beside.name + suffix).unlink(missing_ok=True)
        self._write_counter(contents.ledger_epoch)
        self._database = Database.open(home, beside, self._connect, self.counters)
        try:
            self._database.make_ready()
            self._database.write(lambda: self._create(contents.ledger_epoch), durable=True)
            self._database.write(lambda: self._write_everything(contents), durable=True)
            self._set_meta(inode=str(os.stat(beside).st_ino))
            self._execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except sqlite3.Error as error:
            raise refusal("making a new", home.ledger, error) from error
        finally:
            self.close()
        try:
            set_aside(home.ledger, beside)
        except OSError as error:
            raise StoreError(f"setting aside the damaged ledger {home.ledger}: {error}", database.LOOK_AT_DISK) from error
        self._begin()

    def _salvage(self) -> dict[TaskId, bytes]:
        """The rows that can be read, from both ends of the table, and are intact."""
        found: dict[TaskId, bytes] = {}
        for direction in ("ASC", "DESC"):
            with suppress(sqlite3.Error):
                for task, data, digest in self._execute(f"SELECT task, data, sha256 FROM rows ORDER BY task {direction}"):
                    with suppress(MalformedData):
                        found[_check_row(task, data, digest).task] = data
        self.counters["rows_salvaged"] += len(found)
        return found

    # ---- reading

    def _load(self) -> Stored:
        seals = Seals(self._opened.connection)
        seals.load()
        damaged: list[_Damage] = []
        digests: list[tuple[object, object]] = []
        rows: list[bytes] = []  # as objects they would take ten times as much
        for task, data, digest in self._execute("SELECT task, data, sha256 FROM rows ORDER BY task"):
            try:
                rows.append(_check_row(task, data, digest).wire)
                digests.append((task, digest))
            except MalformedData as error:
                damaged.append(_Damage("rows", task, data, error.message))
        settings = self._decode_all("settings", "name", Settings, SYNC_BYTES_MAX, damaged)
        grants = self._decode_all("grants", "task", Grant, GRANT_BYTES_MAX, damaged)
        sums = {table: sum_of("rows", digests) if table == "rows" else self._sum_on_disk(table) for table in SEALED}
        wrong = [table for table, total in sums.items() if not seals.fits(table, total)]
        if damaged or wrong:
            self._repair(damaged, wrong)
        return Stored(
            ledger_epoch=_number(self._meta("ledger_epoch"), 0),
            rows=PackedRows(rows),
            vector=self._read_vector("vector"),
            floors=self._read_vector("floors"),
            settings=settings.get(_SETTINGS, NOTHING_SET),
            grants={TaskId(task): grant for task, grant in grants.items()},
            new_actor=self._drawn,
        )

    def _decode_all(self, table: str, key: str, kind: type[T], bytes_max: int, damaged: list[_Damage]) -> dict[str, T]:
        found: dict[str, T] = {}
        for name, data, digest in self._execute(f"SELECT {key}, data, sha256 FROM {table} ORDER BY {key}"):
            try:
                found[str(name)] = codec.decode(kind, _intact(data, digest), bytes_max=bytes_max)
            except MalformedData as error:
                damaged.append(_Damage(table, name, data, error.message))
        return found

    def _repair(self, damaged: Sequence[_Damage], wrong: Sequence[str]) -> None:
        """Nobody can say whose writes are missing: forget what this peer knew, and never use this actor again.

        Floors that are too high would spread to everybody; those that are too low come back with the next sync.
        """

        def repair() -> None:
            self._quarantine(damaged)
            for table in ("vector", "floors") if "floors" in wrong else ("vector",):
                self._execute(f"DELETE FROM {table}")
            seals = Seals(self._opened.connection)
            seals.load()
            for table in SEALED:
                seals.make(table)
            seals.save()

        self.counters["tables_damaged"] += len(wrong)
        self.mint(self._new_epoch(_number(self._meta("ledger_epoch"), 0)))
        self._opened.write(repair, durable=True)

    def _quarantine(self, damaged: Sequence[_Damage]) -> None:
        """Inside a transaction."""
        seals = Seals(self._opened.connection)
        seals.load()
        [kept] = self._execute("SELECT count(*) FROM quarantine").fetchone()
        for number, each in enumerate(damaged):
            entry = (str(each.key), _as_bytes(each.data), each.reason)
            if kept + number < QUARANTINE_MAX:
                self._execute("INSERT INTO quarantine (task, data, reason) VALUES (?, ?, ?)", entry)
            key, _ = SEALED[each.table]
            seals.drop(each.table, (str(each.key),))
            self._execute(f"DELETE FROM {each.table} WHERE {key} = ?", (each.key,))
        seals.save()
        self.counters["rows_quarantined"] += len(damaged)

    def _read_vector(self, table: str) -> Mapping[ActorId, int]:
        entries = self._execute(f"SELECT actor, seq FROM {table} ORDER BY actor")
        return {ActorId(actor): seq for actor, seq in entries if is_actor_id(actor)}

    def _sum_on_disk(self, table: str) -> int:
        return sum_on_disk(self._opened.connection, table)

    def _meta(self, name: str) -> str | None:
        found = self._execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return None if found is None else str(found[0])

    def _reading(self) -> "_Reading":
        return _Reading(self._home)

    # ---- writing

    def _write(self, persist: Persist) -> None:
        """Inside a transaction."""
        seals = Seals(self._opened.connection)
        seals.load()
        self._write_rows(seals, {row.task: row.wire for row in persist.rows})
        if persist.purged:
            seals.drop("rows", persist.purged)
            self._opened.connection.executemany("DELETE FROM rows WHERE task = ?", [(task,) for task in persist.purged])
        self._write_vectors(seals, persist.vector, persist.floors)
        if persist.settings is not None:
            self._write_hashed(seals, "settings", {_SETTINGS: codec.encode(persist.settings)})
        if persist.grants:
            given = {task: codec.encode(grant) for task, grant in persist.grants.items() if grant is not None}
            self._write_hashed(seals, "grants", given)
            forgotten = [task for task, grant in persist.grants.items() if grant is None]
            seals.drop("grants", forgotten)
            self._opened.connection.executemany("DELETE FROM grants WHERE task = ?", [(task,) for task in forgotten])
        seals.save()
        if persist.durable and not (persist.rows or persist.vector or persist.settings or persist.grants):
            self._set_meta(synced="1")  # a transaction that writes nothing would not make durable what was written before

    def _write_everything(self, contents: Contents) -> None:
        seals = Seals(self._opened.connection)
        seals.load()
        self._write_rows(seals, contents.packed)
        self._write_vectors(seals, contents.vector, contents.floors)
        if contents.settings != NOTHING_SET:
            self._write_hashed(seals, "settings", {_SETTINGS: codec.encode(contents.settings)})
        self._write_hashed(seals, "grants", {task: codec.encode(grant) for task, grant in contents.grants.items()})
        seals.save()

    def _write_rows(self, seals: Seals, packed: Mapping[TaskId, bytes]) -> None:
        digests: dict[str, bytes] = {task: _digest(data) for task, data in packed.items()}
        seals.put("rows", digests)
        self._opened.connection.executemany(_WRITE_ROW, ((task, data, digests[task]) for task, data in packed.items()))

    def _write_hashed(self, seals: Seals, table: str, packed: Mapping[str, bytes] | Mapping[TaskId, bytes]) -> None:
        digests: dict[str, bytes] = {key: _digest(data) for key, data in packed.items()}
        seals.put(table, digests)
        entries = ((key, data, digests[key]) for key, data in packed.items())
        self._opened.connection.executemany(f"INSERT OR REPLACE INTO {table} VALUES (?, ?, ?)", entries)

    def _write_vectors(self, seals: Seals, vector: Mapping[str, int], floors: Mapping[str, int]) -> None:
        for table, entries in (("vector", vector), ("floors", floors)):
            seals.put(table, entries)
            self._opened.connection.executemany(f"INSERT OR REPLACE INTO {table} VALUES (?, ?)", sorted(entries.items()))

    def _set_meta(self, **entries: str) -> None:
        self._opened.connection.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", list(entries.items()))

    # ---- the ledger epoch

    def _new_epoch(self, recorded: int = 0) -> int:
        """Above all that this home knows of, by a step that no copy of it will take, too."""
        ledger_epoch = max(recorded, _read_counter(self._home) or 0) + 1 + secrets.randbelow(EPOCH_STEP_MAX)
        if ledger_epoch > LEDGER_EPOCH_MAX:
            raise StoreError(
                f"taking a new ledger epoch in {self._home.root}: this peer has used up all that there are",
                f"remove {self._home.identity}: then this machine joins as a new peer",
            )
        self._drawn = True
        return ledger_epoch

    def _write_counter(self, ledger_epoch: int) -> None:
        try:
            write_atomically(self._home.ledger_epoch, f"{ledger_epoch} {ledger_epoch}\n".encode("ascii"))
        except OSError as error:
            doing = f"counting the ledger epoch in {self._home.ledger_epoch}"
            raise StoreError(f"{doing}: {error}", database.LOOK_AT_DISK) from error

    def _inode(self) -> str:
        """A file that was copied has another. What was set back together with its whole file system has the same."""
        return str(os.stat(self._home.ledger).st_ino)


class _Reading:
    """Turns what SQLite raises into StoreError or StoreDamaged."""

    def __init__(self, home: Home) -> None:
        self._home = home

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, sqlite3.Error):
            raise refusal("reading", self._home.ledger, error) from error


def _read_counter(home: Home) -> int | None:
    """0 if there is none. None if it is damaged: it holds the number twice; an older meshq wrote it once."""
    try:
        numbers = {int(word) for word in home.ledger_epoch.read_text("ascii").split()}
    except FileNotFoundError:
        return 0
    except ValueError:
        return None
    except OSError as error:
        raise StoreError(f"reading the ledger epoch in {home.ledger_epoch}: {error}", database.LOOK_AT_DISK) from error
    return numbers.pop() if len(numbers) == 1 else None


def _check_row(task: object, data: object, digest: object) -> Row:
    """MalformedData if the row is not what was written."""
    intact = _intact(data, digest)
    row = codec.decode(Row, intact, bytes_max=2 * ROW_BYTES_MAX)
    if row.task != task:
        raise MalformedData("it belongs to another task")
    return row  # an older version may have written fewer fields: what travels is made anew, and so equal rows have equal hashes


def _intact(data: object, digest: object) -> bytes:
    """The data, if they are what was written. MalformedData otherwise."""
    if not isinstance(data, bytes) or _digest(data) != digest:
        raise MalformedData("its hash is another than when it was written")
    return data


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _as_bytes(data: object) -> bytes:
    return data if isinstance(data, bytes) else str(data).encode()


def _number(text: str | None, otherwise: int) -> int:
    """`otherwise` if it is none, or no number."""
    try:
        return int(text) if text is not None else otherwise
    except ValueError:
        return otherwise
