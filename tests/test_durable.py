"""What must survive a power cut is on the disk, and so is its name, before anybody relies on it."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from meshq import durable, machine, settings
from meshq.config import Home
from meshq.errors import StoreError
from meshq.gossip import snapshot
from meshq.ids import Epoch, peer_id
from meshq.ledger.store import Store
from meshq.settings import Settings

WRITERS: dict[str, Callable[[Path], object]] = {
    "settings.json": lambda path: settings.save(path, Settings()),
    "epoch": lambda path: machine.store_epoch(path, Epoch(7)),
    "peers.snapshot": lambda path: snapshot.save(path, [], 0.0),
    "ledger.epoch": lambda path: Store.open(Home(path.parent), peer_id(b"a" * 32)).close(),
}


@pytest.mark.parametrize("name", WRITERS)
def test_the_new_file_is_on_the_disk_before_it_takes_its_place_and_then_its_name_is(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, bool]] = []
    really = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append((Path(f"/proc/self/fd/{descriptor}").resolve().name, (tmp_path / name).exists()))
        really(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    WRITERS[name](tmp_path / name)
    mine = [each for each in synced if each[0] in (f"{name}.new", tmp_path.name)]
    at = mine.index((f"{name}.new", False))  # the database beside it has its folder synced, too
    assert mine[at : at + 2] == [(f"{name}.new", False), (tmp_path.name, True)]
    assert not (tmp_path / f"{name}.new").exists() and (tmp_path / name).stat().st_mode & 0o777 == 0o600


def test_a_disk_that_refuses_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "epoch"
    durable.write_atomically(path, b"1")
    (tmp_path / "epoch.new").mkdir()
    with pytest.raises(OSError):
        durable.write_atomically(path, b"2")
    with pytest.raises(StoreError, match="cannot write"):
        machine.store_epoch(path, Epoch(2))
    assert path.read_bytes() == b"1"


def test_what_lies_beside_is_replaced_and_no_link_is_followed(tmp_path: Path) -> None:
    path = tmp_path / "epoch"
    (tmp_path / "epoch.new").write_bytes(b"half of a longer one that was never finished")
    durable.write_atomically(path, b"1")
    assert path.read_bytes() == b"1"
    (tmp_path / "epoch.new").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError):
        durable.write_atomically(path, b"2")
    assert not (tmp_path / "victim").exists()
