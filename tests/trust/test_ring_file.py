"""The key file of a home: one line as in meshq 0.1 until the mesh changes its key, two afterwards, whole or not at all."""

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given

from meshq.errors import StoreError, UsageError
from meshq.trust import keyring, keys, ring_file
from meshq.trust.keyring import Keyring, ring_of
from tests.trust.test_keyring import ADA, BOB, K0, K1, ring, rings


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "mesh.key"


def write(path: Path, text: str | bytes) -> None:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(0o600)


def test_the_one_line_of_an_old_home_is_a_ring_of_one_key(path: Path) -> None:
    write(path, "meshq1-000410-61050r-3gg28a-1c60t3-gfchsn\n")
    assert ring_file.load(path) == ring_of(keys.MeshKey(bytes(range(16))))


def test_a_mesh_that_never_changed_its_key_keeps_the_old_form(path: Path) -> None:
    ring_file.save(path, ring(K0))
    assert path.read_text() == f"{K0.text}\n"
    assert keys.read(path) == K0  # what meshq 0.1 calls


def test_the_form_of_two_lines_never_changes(path: Path) -> None:
    """Written by the first version that could change keys."""
    write(path, TWO_LINES)
    found = ring_file.load(path)
    assert (found.current.key, [each.id for each in found.ordered]) == (K1, [K1.id, K0.id])
    assert (found.use.mesh, found.use.revision, found.removed) == (K0.mesh_id, 2, ("22222222",))
    assert found.ordered[0].holders == (keyring.short(ADA), keyring.short(BOB))


TWO_LINES = (Path(__file__).parent.parent / "golden" / "trust" / "mesh.key").read_text()


def test_its_first_line_is_the_key_in_use_for_people_to_copy(path: Path) -> None:
    ring_file.save(path, keyring.use(ring(K0, K1), ADA, K1.id))
    assert path.read_text().splitlines()[0] == K1.text


@given(rings())
def test_every_ring_survives_the_file(tmp_path_factory: pytest.TempPathFactory, held: Keyring) -> None:
    path = tmp_path_factory.mktemp("home") / "mesh.key"
    ring_file.save(path, held)
    assert ring_file.load(path) == held


def test_the_file_is_for_its_owner_alone_and_leaves_nothing_beside_it(path: Path) -> None:
    ring_file.save(path, ring(K0))
    ring_file.save(path, ring(K0, K1))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [each.name for each in path.parent.iterdir()] == ["mesh.key"]


def test_a_disk_that_refuses_leaves_the_old_keys(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ring_file.save(path, ring(K0))

    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StoreError, match="No space left"):
        ring_file.save(path, ring(K0, K1))
    assert ring_file.load(path) == ring(K0)
    assert [each.name for each in path.parent.iterdir()] == ["mesh.key"]


def test_a_file_that_others_can_read_is_refused(path: Path) -> None:
    ring_file.save(path, ring(K0, K1))
    path.chmod(0o640)
    with pytest.raises(UsageError, match="0640"):
        ring_file.load(path)


def test_a_missing_file_is_told_apart_from_a_bad_one(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ring_file.load(path)


def two(first: str, second: str) -> str:
    return f"{first}\n{second}\n"


SECOND = TWO_LINES.splitlines()[1]
DAMAGED = {
    "another key first": two(K0.text, SECOND),
    "cut off": two(K1.text, SECOND[:-8]),
    "a character changed": two(K1.text, SECOND[:40] + ("A" if SECOND[40] != "A" else "B") + SECOND[41:]),
    "no base64": two(K1.text, "ring1 ****"),
    "three lines": two(K1.text, SECOND) + "more\n",
    "not a ring": two(K1.text, "hunter2"),
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_never_taken_for_another_ring(path: Path, text: str) -> None:
    write(path, text)
    with pytest.raises(StoreError, match="damaged") as caught:
        ring_file.load(path)
    assert "hunter2" not in caught.value.message and K1.text not in caught.value.message
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\xff\xfe", "no text"),
        (b"x" * (ring_file.FILE_BYTES_MAX + 1), "longer than"),
        (b"hunter2\n", "passphrase"),
        (b"", "empty"),
        (f"{K0.text}\nring2 AAAA\n".encode(), "newer"),
    ],
)
def test_a_file_with_something_else_in_it_is_refused(path: Path, content: bytes, says: str) -> None:
    write(path, content)
    with pytest.raises(UsageError, match=says) as caught:
        ring_file.load(path)
    assert str(path) in caught.value.message and "hunter2" not in caught.value.message
