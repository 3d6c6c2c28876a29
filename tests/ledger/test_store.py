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
from meshq.ledger.effects import Persist
from meshq.ledger.row import Row
from meshq.ledger.store import SCHEMA_VERSION, Store
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
    assert (stored.ledger_epoch, set(each.task for each in stored.rows)) == (1, {first.task, second.task})
    assert {each.task: each for each in stored.rows} == {first.task: first, second.task: second}
    assert (stored.vector, stored.floors) == ({actor("a"): 2, actor("b"): 7}, {actor("c"): 3})


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
        levels.append(store._connection.execute("PRAGMA synchronous").fetchone()[0])
    store.close()
    assert levels == [2, 1, 2]  # FULL, NORMAL, FULL


def test_a_flipped_bit_in_a_row_sets_it_aside_and_asks_for_everything_as_a_new_actor(home: Home) -> None:
    good, bad = row(), row(birth=dot("a", 2))
    store = reopened(home)
    store.commit(persist(good, bad))
    store.close()
    with sqlite3.connect(home.ledger) as connection:
        [[data]] = connection.execute("SELECT data FROM rows WHERE task = ?", (bad.task,))
        flipped = bytes([*data[:40], data[40] ^ 1, *data[41:]])
        connection.execute("UPDATE rows SET data = ? WHERE task = ?", (flipped, bad.task))
    connection.close()
    store = reopened(home)
    stored = store.load()
    assert (stored.rows, stored.vector, stored.ledger_epoch) == ((good,), {}, 2)
    assert store.counters["rows_quarantined"] == 1
    [[task, kept, reason]] = store._connection.execute("SELECT task, data, reason FROM quarantine")
    assert (task, kept, reason) == (bad.task, flipped, "its hash is another than when it was written")
    again = store.load()
    store.close()
    assert (again.rows, again.ledger_epoch) == ((good,), 2)


def test_a_file_that_is_no_database_is_kept_aside_and_a_new_one_begins_a_new_epoch(home: Home) -> None:
    reopened(home).close()
    for part in home.root.glob("ledger.sqlite-*"):
        part.unlink()
    home.ledger.write_bytes(b"not a database" * 1000)
    store = reopened(home)
    stored = store.load()
    store.close()
    assert (stored.rows, stored.ledger_epoch, store.counters["databases_damaged"]) == ((), 2, 1)
    assert home.ledger.with_name("ledger.sqlite.damaged-1").read_bytes() == b"not a database" * 1000


def test_a_newer_schema_is_refused_and_left_untouched(home: Home) -> None:
    reopened(home).close()
    with sqlite3.connect(home.ledger) as connection:
        connection.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
    connection.close()
    before = home.ledger.read_bytes()
    with pytest.raises(StoreError, match="a newer meshq wrote it") as caught:
        reopened(home)
    assert caught.value.hint == "upgrade meshq on this machine; nothing was changed"
    assert home.ledger.read_bytes() == before


def test_a_deleted_database_never_uses_its_epoch_again(home: Home) -> None:
    for epoch in (1, 2, 3):
        store = reopened(home)
        assert store.load().ledger_epoch == epoch
        store.close()
        for part in home.root.glob("ledger.sqlite*"):
            part.unlink()


def test_an_older_copy_that_was_put_back_gets_a_new_epoch(home: Home, tmp_path: Path) -> None:
    store = reopened(home)
    store.close()
    shutil.copy(home.ledger, tmp_path / "copy")
    store = reopened(home)
    store.mint(2)
    store.close()
    shutil.copy(tmp_path / "copy", home.ledger)
    store = reopened(home)
    assert store.load().ledger_epoch == 3
    store.close()


def test_the_database_of_another_peer_is_continued_as_a_new_actor(home: Home) -> None:
    store = reopened(home)
    store.commit(persist(row()))
    store.close()
    store = reopened(home, "b")
    assert (store.load().rows, store.load().ledger_epoch) == ((row(),), 2)
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
