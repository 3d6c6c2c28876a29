"""Known peers on disk."""

import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest

from meshq.config import MEMBERS_MAX
from meshq.errors import StoreError
from meshq.gossip import snapshot
from meshq.gossip.member import Address
from meshq.gossip.roster import KnownPeer
from tests.gossip.builders import peer

ALIVE = KnownPeer(peer=peer("a"), name="a", addresses=(Address("10.0.0.1", 1), Address("fd00::1", 2)), unseen_for=0)
FAILED = KnownPeer(peer=peer("b"), name="b", addresses=(Address("10.0.0.2", 1),), unseen_for=600, record=b"what it had")


def test_alive_and_failed_peers_come_back_with_the_time_that_passed(tmp_path: Path) -> None:
    path = tmp_path / "peers.snapshot"
    snapshot.save(path, [FAILED, ALIVE], wall_now=1_000_000.0)
    assert snapshot.load(path, wall_now=1_000_300.0) == [replace(ALIVE, unseen_for=300), replace(FAILED, unseen_for=900)]
    assert list(tmp_path.iterdir()) == [path]


def test_the_new_file_is_on_disk_and_so_is_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    really = os.fsync

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").resolve()
        synced.append(f"{path.name}, {sorted(each.name for each in tmp_path.iterdir())}")
        really(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    snapshot.save(tmp_path / "peers.snapshot", [ALIVE], wall_now=0.0)
    assert synced == ["peers.snapshot.new, ['peers.snapshot.new']", f"{tmp_path.name}, ['peers.snapshot']"]


def test_a_clock_that_went_back_makes_nobody_seen_in_the_future(tmp_path: Path) -> None:
    path = tmp_path / "peers.snapshot"
    snapshot.save(path, [ALIVE], wall_now=1_000_000.0)
    assert snapshot.load(path, wall_now=5.0) == [ALIVE]


def test_no_snapshot_means_nobody_is_known(tmp_path: Path) -> None:
    assert snapshot.load(tmp_path / "peers.snapshot", 0.0) == []


@pytest.mark.parametrize("damage", [b"", b"\xc1", b"rubbish" * 100, bytes(2**20 + 1)])
def test_a_damaged_snapshot_is_put_aside_with_a_warning(
    tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "peers.snapshot"
    path.write_bytes(damage)
    with caplog.at_level(logging.WARNING, "meshq.gossip"):
        assert snapshot.load(path, 0.0) == []
    assert "damaged" in caplog.text
    assert not path.exists() and (tmp_path / "peers.snapshot.damaged").read_bytes() == damage


def test_a_truncated_snapshot_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "peers.snapshot"
    snapshot.save(path, [ALIVE, FAILED], 0.0)
    path.write_bytes(path.read_bytes()[:-3])
    assert snapshot.load(path, 0.0) == []


def test_the_most_recently_seen_are_kept_when_there_are_too_many(tmp_path: Path) -> None:
    path = tmp_path / "peers.snapshot"
    many = [replace(ALIVE, peer=peer(str(number)), unseen_for=float(number)) for number in range(MEMBERS_MAX + 50)]
    snapshot.save(path, list(reversed(many)), 1e6)
    assert snapshot.load(path, 1e6) == many[:MEMBERS_MAX]


def test_a_disk_that_refuses_leaves_the_old_snapshot(tmp_path: Path) -> None:
    path = tmp_path / "peers.snapshot"
    snapshot.save(path, [ALIVE], 0.0)
    (tmp_path / "peers.snapshot.new").mkdir()
    with pytest.raises(StoreError, match="cannot save the known peers"):
        snapshot.save(path, [FAILED], 0.0)
    assert snapshot.load(path, 0.0) == [ALIVE]


def test_a_damaged_snapshot_that_cannot_even_be_put_aside_is_not_fatal(tmp_path: Path) -> None:
    (tmp_path / "peers").write_bytes(b"rubbish")
    (tmp_path / "peers.damaged").mkdir()
    assert snapshot.load(tmp_path / "peers", 0.0) == []
