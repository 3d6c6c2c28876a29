"""A checkout writes what was submitted, and nothing anywhere else whoever submitted it."""

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshq import config
from meshq.exec.checkout import checkout
from meshq.exec.objects import ObjectStore
from meshq.exec.preparation import PreparationFailed
from meshq.gitobjects import (
    BLOB,
    COMMIT,
    MODE_EXECUTABLE,
    MODE_FILE,
    MODE_FOLDER,
    MODE_REPOSITORY,
    MODE_SYMLINK,
    TREE,
    encode_commit,
    object_id,
    symlink_stays,
)
from meshq.ids import ObjectId
from meshq.submit.snapshot import snapshot
from tests.submit.repositories import write


class Source:
    """Makes trees that no honest client makes: entries are written as given, unsorted, twice, with any name."""

    def __init__(self, folder: Path) -> None:
        self.store = ObjectStore(folder / "objects.git")

    def blob(self, content: bytes = b"x") -> ObjectId:
        self.store.put([(BLOB, content)])
        return object_id(BLOB, content)

    def tree(self, *entries: tuple[int, bytes, ObjectId]) -> ObjectId:
        content = b"".join(b"%o %s\0%s" % (mode, name, bytes.fromhex(each)) for mode, name, each in entries)
        self.store.put([(TREE, content)])
        return object_id(TREE, content)

    def commit(self, *entries: tuple[int, bytes, ObjectId]) -> ObjectId:
        content = encode_commit(self.tree(*entries))
        self.store.put([(COMMIT, content)])
        return object_id(COMMIT, content)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tmp_path)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "attempt" / "work"


def test_a_snapshot_comes_out_as_it_went_in(source: Source, target: Path, tmp_path: Path) -> None:
    top = tmp_path / "top"
    write(top / "a.py", "print('a')\n")
    write(top / "run.sh", "#!/bin/sh\n", executable=True)
    write(top / "deep" / "er" / "data.txt", "x" * 100_000)
    (top / "deep" / "link").symlink_to("../a.py")
    (top / "to-folder").symlink_to("deep/er")
    taken = snapshot(None, top, cache=tmp_path / "cache")
    assert taken.commit is not None
    source.store.put(taken.read(taken.objects))
    assert checkout(source.store, taken.commit, target) == 7  # five files and links, two folders

    def listing(folder: Path) -> dict[str, tuple[int, bytes]]:
        found: dict[str, tuple[int, bytes]] = {}
        for path in sorted(folder.rglob("*")):
            status = path.lstat()
            content = os.fsencode(os.readlink(path)) if path.is_symlink() else path.read_bytes() if path.is_file() else b""
            mode = 0 if path.is_symlink() else status.st_mode & stat.S_IXUSR
            found[str(path.relative_to(folder))] = (mode, content)
        return found

    assert listing(target) == listing(top)
    again = snapshot(None, target, cache=tmp_path / "cache")
    assert again.commit == taken.commit


def test_another_repository_is_an_empty_folder(source: Source, target: Path) -> None:
    checkout(source.store, source.commit((MODE_REPOSITORY, b"inner", ObjectId("0" * 40))), target)
    assert list((target / "inner").iterdir()) == []


@pytest.mark.parametrize(
    "name", [b"..", b".", b"", b"a/b", b"/etc/x", b".git", b".GIT", b".Git", b"x" * 256, b"../../escape"], ids=repr
)
def test_a_hostile_name_is_refused_as_a_file_and_as_a_folder(source: Source, target: Path, name: bytes) -> None:
    inner = source.tree((MODE_FILE, b"ok", source.blob()))
    for commit in (
        source.commit((MODE_FILE, name, source.blob())),
        source.commit((MODE_FOLDER, name, inner)),
        source.commit((MODE_FOLDER, b"fine", source.tree((MODE_FILE, name, source.blob())))),
    ):
        with pytest.raises(PreparationFailed, match="the source is refused") as caught:
            checkout(source.store, commit, target / commit)
        assert not caught.value.retryable
    assert sorted(path.name for path in target.parent.iterdir()) == ["work"]


@pytest.mark.parametrize("link", [b"/etc/passwd", b"..", b"../x", b"a/../../x", b"a/..", b"", b"./../x", b"x" * 5000, b"a\0b"])
def test_a_link_that_could_leave_the_folder_is_refused(source: Source, target: Path, link: bytes) -> None:
    with pytest.raises(PreparationFailed, match="leaves the folder") as caught:
        checkout(source.store, source.commit((MODE_SYMLINK, b"link", source.blob(link))), target)
    assert not caught.value.retryable
    assert list(target.iterdir()) == []


def test_nothing_is_written_through_a_link_of_the_tree(source: Source, target: Path) -> None:
    real = source.tree((MODE_FILE, b"kept", source.blob()))
    through = source.tree((MODE_FILE, b"new", source.blob(b"written")))
    commit = source.commit(
        (MODE_FOLDER, b"real", real), (MODE_SYMLINK, b"alias", source.blob(b"real")), (MODE_FOLDER, b"alias", through)
    )
    with pytest.raises(PreparationFailed, match="stands twice"):
        checkout(source.store, commit, target)
    (target / "link").symlink_to(target.parent)
    with pytest.raises(PreparationFailed, match="File exists"):
        checkout(source.store, source.commit((MODE_FOLDER, b"link", through)), target)
    with pytest.raises(PreparationFailed, match="File exists"):
        checkout(source.store, source.commit((MODE_FILE, b"link", source.blob())), target)
    assert sorted(path.name for path in target.parent.iterdir()) == ["work"]


def test_the_target_itself_must_not_be_a_link(source: Source, target: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    target.parent.mkdir()
    target.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PreparationFailed):
        checkout(source.store, source.commit((MODE_FILE, b"a", source.blob())), target)
    assert list((tmp_path / "elsewhere").iterdir()) == []


@given(st.lists(st.sampled_from([b"..", b".", b"a", b"b", b""]), min_size=1, max_size=6), st.integers(0, 3))
def test_a_link_that_stays_stays_even_if_the_names_are_links_to_the_top(parts: list[bytes], depth: int) -> None:
    """The model: every name is a link to the top, the worst that an allowed link can be."""
    target = b"/".join(parts)
    place: int | None = depth
    for part in target.split(b"/") if not target.startswith(b"/") else [b".."] * 9:
        if place is not None and part == b"..":
            place = place - 1 if place > 0 else None
        elif place is not None and part not in (b".", b""):
            place = 0
    if target and symlink_stays(target, depth):
        assert place is not None


def test_modes_depth_and_sums_have_limits(source: Source, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PreparationFailed, match="has the mode 60000"):
        checkout(source.store, source.commit((0o060000, b"device", source.blob())), target / "1")
    deep = source.tree((MODE_FILE, b"a", source.blob()))
    for _ in range(130):
        deep = source.tree((MODE_FOLDER, b"d", deep))
    with pytest.raises(PreparationFailed, match="more than 128 folders"):
        checkout(source.store, source.commit((MODE_FOLDER, b"d", deep)), target / "2")
    blob = source.blob(b"x" * 1000)
    many = source.commit(*((MODE_FILE, b"%d" % number, blob) for number in range(20)))
    monkeypatch.setattr(config, "SOURCE_BYTES_MAX", 10_000)
    with pytest.raises(PreparationFailed, match="more than 10000 bytes"):
        checkout(source.store, many, target / "3")
    monkeypatch.setattr(config, "SOURCE_FILES_MAX", 10)
    with pytest.raises(PreparationFailed, match="more than 10 files"):
        checkout(source.store, many, target / "4")


def test_a_missing_object_may_be_had_elsewhere(source: Source, target: Path) -> None:
    commit = source.commit((MODE_EXECUTABLE, b"a", ObjectId("0" * 40)))
    with pytest.raises(PreparationFailed, match="is not in") as caught:
        checkout(source.store, commit, target)
    assert caught.value.retryable
