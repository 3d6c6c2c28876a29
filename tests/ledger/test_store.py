"""The database on a real disk: what it gives back, and what it does when it was damaged, filled up, deleted or copied."""

import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from meshq.config import RESERVE_BYTES, Home
from meshq.errors import StoreError
from meshq.ledger.database import StoreDamaged
from meshq.ledger.effects import Contents, Persist
from meshq.ledger.holder import status
from meshq.ledger.row import Row
from meshq.ledger.schema import SCHEMA_VERSION
from meshq.ledger.store import Store
from tests.golden import ledger_database
from tests.ledger.builders import actor, dot, peer, row

ME = peer("a")


def persist(*rows: Row, durable: bool = True, vector: Mapping[str, int] | None = None) -> Persist:
    covered: dict[str, int] = {actor("a"): max(each.birth.seq for each in rows)}
    return Persist(rows, covered if vector is None else vector, {}, durable)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def reopened(home: Home, name: str = "a") -> Store:
    return Store.open(home, peer(name))


def test_what_was_committed_is_there_after_reopening(home: Home) -> None:
    first, second = row(), row(birth=dot("a", 2))
    store = reopened(home)
    store.commit(persist(first, second))
    store.commit(Persist((), {actor("b"): 7}, {actor("c"): 3}, False))
    store.close()
    store = reopened(home)
    stored = store.load()
    store.close()
    assert {each.task: each for each in stored.rows} == {first.task: first, second.task: second}
    assert (stored.vector, stored.floors) == ({actor("a"): 2, actor("b"): 7}, {actor("c"): 3})


def test_only_the_run_that_draws_the_ledger_epoch_is_a_new_actor(home: Home) -> None:
    seen = []
    for _ in range(2):
        store = reopened(home)
        seen.append(store.load().new_actor)
        store.close()
    home.ledger.unlink()
    store = reopened(home)
    seen.append(store.load().new_actor)
    store.close()
    assert seen == [True, False, True]


def test_a_row_is_replaced_by_its_later_form(home: Home) -> None:
    store = reopened(home)
    store.commit(persist(row()))
    later = row(retries=3)
    store.commit(persist(later))
    assert store.load().rows == (later,)
    store.close()


def test_durable_commits_are_synchronized_and_others_are_not(home: Home) -> None:
    store = reopened(home)
    levels = []
    for durable in (True, False, True):
        store.commit(persist(row(), durable=durable))
        levels.append(store._opened.connection.execute("PRAGMA synchronous").fetchone()[0])
    store.close()
    assert levels == [2, 1, 2]  # FULL, NORMAL, FULL


def test_a_flipped_bit_in_a_row_sets_it_aside_and_asks_for_everything_as_a_new_actor(home: Home) -> None:
    good, bad = row(), row(birth=dot("a", 2))
    store = reopened(home)
    store.commit(persist(good, bad))
    before = store.load().ledger_epoch
    store.close()
    with sqlite3.connect(home.ledger) as connection:
        [[data]] = connection.execute("SELECT data FROM rows WHERE task = ?", (bad.task,))
        flipped = bytes([*data[:40], data[40] ^ 1, *data[41:]])
        connection.execute("UPDATE rows SET data = ? WHERE task = ?", (flipped, bad.task))
    connection.close()
    store = reopened(home)
    stored = store.load()
    assert (stored.rows, stored.vector) == ((good,), {})
    assert stored.ledger_epoch > before
    assert store.counters["rows_quarantined"] == 1
    [[task, kept, reason]] = store._opened.connection.execute("SELECT task, data, reason FROM quarantine")
    assert (task, kept, reason) == (bad.task, flipped, "its hash is another than when it was written")
    again = store.load()
    store.close()
    assert (again.rows, again.ledger_epoch) == ((good,), stored.ledger_epoch)


def test_a_file_that_is_no_database_is_kept_aside_and_a_new_one_begins_a_new_epoch(home: Home) -> None:
    store = reopened(home)
    before = store.load().ledger_epoch
    store.close()
    for part in home.root.glob("ledger.sqlite-*"):
        part.unlink()
    home.ledger.write_bytes(b"not a database" * 1000)
    store = reopened(home)
    stored = store.load()
    store.close()
    assert (stored.rows, store.counters["databases_damaged"]) == ((), 1)
    assert stored.ledger_epoch > before
    assert home.ledger.with_name("ledger.sqlite.damaged-1").read_bytes() == b"not a database" * 1000


def test_a_newer_schema_is_refused_and_left_untouched(home: Home) -> None:
    reopened(home).close()
    with sqlite3.connect(home.ledger) as connection:
        connection.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
        connection.execute("UPDATE meta SET value = ? WHERE name = 'schema'", (str(SCHEMA_VERSION + 1),))
    connection.close()
    before = home.ledger.read_bytes()
    with pytest.raises(StoreError, match="a newer meshq wrote it") as caught:
        reopened(home)
    assert caught.value.hint == "upgrade meshq on this machine; nothing was changed"
    assert home.ledger.read_bytes() == before


@pytest.mark.parametrize("file", sorted(ledger_database.FOLDER.glob("*.sqlite")), ids=lambda file: str(file.stem))
def test_a_database_of_every_schema_that_ever_was_opens_with_all_that_is_in_it(home: Home, file: Path) -> None:
    home.root.mkdir()
    shutil.copy(file, home.ledger)
    schema = int(file.stem.removeprefix("schema-"))
    home.ledger_epoch.write_text("1" if schema == 1 else "1 1")
    for _ in range(2):  # the second time there is nothing left to be made
        store = reopened(home)
        stored = store.load()
        assert [each.spec.name for each in sorted(stored.rows, key=lambda each: each.birth)] == ["train", "done", "cancelled"]
        assert [status(each).value for each in sorted(stored.rows, key=lambda each: each.birth)] == [
            "queued", "succeeded", "cancelled",
        ]  # fmt: skip
        assert stored.vector[actor("b")] == 3 and stored.floors == {actor("c"): 9}
        assert store._opened.version == SCHEMA_VERSION
        assert (store.counters["tables_damaged"], store.counters["rows_quarantined"]) == (0, 0)
        if schema >= 2:
            assert list(stored.settings.entries) == [ledger_database.SETTING] and len(stored.grants) == 1
        else:
            assert stored.ledger_epoch == 1, "nothing showed that it was copied"
        store.close()


def test_there_is_a_database_of_the_present_schema() -> None:
    names = {file.stem for file in ledger_database.FOLDER.glob("*.sqlite")}
    assert names == {f"schema-{number}" for number in range(1, SCHEMA_VERSION + 1)}


def test_a_deleted_database_never_uses_its_epoch_again(home: Home) -> None:
    epochs = []
    for _ in range(3):
        store = reopened(home)
        epochs.append(store.load().ledger_epoch)
        store.close()
        for part in home.root.glob("ledger.sqlite*"):
            part.unlink()
    assert epochs == sorted(set(epochs))


def test_two_homes_that_lost_everything_take_different_epochs(home: Home) -> None:
    """Also the counter: a home of which only the identity is left must not write again what it once wrote."""
    epochs = set()
    for _ in range(3):
        store = reopened(home)
        epochs.add(store.load().ledger_epoch)
        store.close()
        shutil.rmtree(home.root)
    assert len(epochs) == 3


def test_an_older_copy_of_the_database_gets_a_new_epoch(home: Home, tmp_path: Path) -> None:
    store = reopened(home)
    epoch = store.load().ledger_epoch
    store.close()
    shutil.copy(home.ledger, tmp_path / "copy")
    store = reopened(home)
    store.mint(epoch + 1)
    store.close()
    shutil.copy(tmp_path / "copy", home.ledger)  # into the same file: only the counter shows it
    store = reopened(home)
    assert store.load().ledger_epoch > epoch + 1
    assert store.counters["databases_copied"] == 0
    store.close()


def test_a_home_that_was_copied_as_a_whole_takes_a_new_epoch_and_the_original_keeps_its_own(home: Home, tmp_path: Path) -> None:
    store = reopened(home)
    store.commit(persist(row()))
    epoch = store.load().ledger_epoch
    store.close()
    clones = [Home(tmp_path / name) for name in ("one", "two")]
    epochs = [epoch]
    for clone in clones:
        shutil.copytree(home.root, clone.root)
        store = reopened(clone)
        epochs.append(store.load().ledger_epoch)
        assert (store.load().rows, store.counters["databases_copied"]) == ((row(),), 1)
        store.close()
        store = reopened(clone)
        assert store.load().ledger_epoch == epochs[-1], "once is enough"
        store.close()
    assert len(set(epochs)) == 3
    store = reopened(home)
    assert store.load().ledger_epoch == epoch
    store.close()


def test_the_database_of_another_peer_is_continued_as_a_new_actor(home: Home) -> None:
    store = reopened(home)
    store.commit(persist(row()))
    epoch = store.load().ledger_epoch
    store.close()
    store = reopened(home, "b")
    assert store.load().rows == (row(),)
    assert store.load().ledger_epoch > epoch
    store.close()


@pytest.mark.parametrize("text", ["12 13", "x", "", "\xe9"])
def test_a_damaged_counter_costs_an_epoch_and_nothing_else(home: Home, text: str) -> None:
    store = reopened(home)
    store.commit(persist(row()))
    epoch = store.load().ledger_epoch
    store.close()
    home.ledger_epoch.write_text(text, "latin-1")
    store = reopened(home)
    assert (store.load().rows, store.load().vector) == ((row(),), {actor("a"): 1})
    assert store.load().ledger_epoch > epoch
    store.close()


def test_a_row_that_a_damaged_page_hides_is_no_purged_one(home: Home) -> None:
    """The vector must not go on covering it: whoever believed that would delete its own."""
    good, hidden = row(), row(birth=dot("a", 2))
    store = reopened(home)
    store.commit(persist(good, hidden))
    epoch = store.load().ledger_epoch
    store._opened.connection.execute("DELETE FROM rows WHERE task = ?", (hidden.task,))
    store.close()
    store = reopened(home)
    stored = store.load()
    assert (stored.rows, stored.vector) == ((good,), {})
    assert stored.ledger_epoch > epoch
    assert store.counters["tables_damaged"] == 1
    store.close()


def test_a_damaged_vector_is_forgotten_and_damaged_floors_go_with_it(home: Home) -> None:
    for table in ("vector", "floors"):
        store = reopened(home)
        store.commit(Persist((row(),), {actor("a"): 1, actor("b"): 7}, {actor("c"): 3}, True))
        store._opened.connection.execute(f"UPDATE {table} SET seq = seq + 1")
        store.close()
        store = reopened(home)
        stored = store.load()
        assert (stored.rows, stored.vector) == ((row(),), {})
        assert stored.floors == ({} if table == "floors" else {actor("c"): 3})
        store.close()


def test_what_is_damaged_while_the_agent_runs_is_found_and_kept_aside(home: Home) -> None:
    good, bad, missing = (row(birth=dot("a", seq)) for seq in (1, 2, 3))
    store = reopened(home)
    store.commit(persist(good, bad, missing))
    tasks = (good.task, bad.task, missing.task)
    assert store.check(tasks) == ()
    store._opened.connection.execute("UPDATE rows SET data = x'00' WHERE task = ?", (bad.task,))
    store._opened.connection.execute("DELETE FROM rows WHERE task = ?", (missing.task,))
    assert store.check(tasks) == (bad.task, missing.task)
    assert store.counters["rows_quarantined"] == 1
    store.commit(persist(bad, missing))
    assert store.check(tasks) == ()
    store.check_seals()
    store._opened.connection.execute("UPDATE vector SET seq = 99")
    with pytest.raises(StoreDamaged, match="damaged are vector"):
        store.check_seals()
    store.close()


def test_a_damaged_file_is_replaced_by_what_is_in_memory(home: Home) -> None:
    store = reopened(home)
    store.commit(persist(row(), row(birth=dot("a", 2))))
    epoch = store.load().ledger_epoch
    rows = {each.task: each.wire for each in store.load().rows}
    contents = Contents(ledger_epoch=epoch, packed=rows, vector={actor("a"): 2}, floors={actor("c"): 3})
    store.replace(contents)
    store.commit(persist(row(birth=dot("a", 3))))
    store.close()
    store = reopened(home)
    stored = store.load()
    assert (len(stored.rows), stored.vector, stored.floors) == (3, {actor("a"): 3}, {actor("c"): 3})
    assert stored.ledger_epoch == epoch
    assert not [name for name in ("tables_damaged", "rows_quarantined", "databases_copied") if store.counters[name]]
    assert home.ledger.with_name("ledger.sqlite.damaged-1").exists()
    store.close()


def test_a_damaged_file_that_cannot_be_replaced_now_can_be_replaced_later(home: Home) -> None:
    refusals = [sqlite3.OperationalError("disk I/O error")]
    refusals[0].sqlite_errorcode = sqlite3.SQLITE_IOERR

    def connect(file: Path) -> sqlite3.Connection:
        if file.name.endswith(".new") and refusals:
            raise refusals.pop()
        return sqlite3.connect(file, isolation_level=None, check_same_thread=False)

    store = Store.open(home, ME, connect)
    contents = Contents(ledger_epoch=store.load().ledger_epoch, packed={row().task: row().wire})
    with pytest.raises(StoreError, match="disk I/O error"):
        store.replace(contents)
    with pytest.raises(StoreDamaged, match="not yet replaced"):
        store.commit(persist(row()))
    store.replace(contents)
    store.commit(persist(row(birth=dot("a", 2))))
    assert len(store.load().rows) == 2
    store.close()


def test_a_durable_commit_of_nothing_still_makes_durable_what_was_committed_before(home: Home) -> None:
    store = reopened(home)
    store.commit(persist(row(), durable=False))
    log = home.ledger.with_name("ledger.sqlite-wal")
    before = log.read_bytes()
    store.commit(Persist((), {}, {}, durable=True))
    assert log.read_bytes() != before, "SQLite syncs its log only when it writes to it"
    store.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 20 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(tmp_path)], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.strip()}")
    try:
        yield tmp_path
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_on_a_full_disk_the_reserve_saves_one_more_commit_and_then_it_says_so(small_disk: Path) -> None:
    home = Home(small_disk / "home")
    store = reopened(home)
    assert home.reserve.stat().st_size == RESERVE_BYTES
    rows = [row(birth=dot("a", seq), env={"X": "x" * 60_000}) for seq in range(1, 40)]
    store.commit(persist(rows[0]))
    fill(small_disk / "filler")
    store.commit(persist(*rows[1:10]))
    assert (store.counters["reserve_used"], home.reserve.exists()) == (1, False)
    fill(small_disk / "rest")
    with pytest.raises(StoreError, match="the disk is full"):
        store.commit(persist(*rows[10:]))
    assert {each.task for each in store.load().rows} == {each.task for each in rows[:10]}, "a refused commit left something"
    for filler in ("filler", "rest"):
        (small_disk / filler).unlink()
    for _ in range(70):
        store.commit(persist(rows[0], vector={}))
    assert home.reserve.exists(), "there is room again"
    store.close()


def fill(file: Path) -> None:
    with file.open("wb", buffering=0) as filler, pytest.raises(OSError, match="No space left"):
        while True:
            filler.write(b"\0" * 4096)
