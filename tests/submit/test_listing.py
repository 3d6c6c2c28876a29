"""The same files come out of the git command, of dulwich and, as a tree, of git itself, however awkward the repository."""

import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from meshq.errors import UsageError
from meshq.gitobjects import MODE_FOLDER, decode_commit, decode_tree
from meshq.ids import ObjectId
from meshq.submit import listing
from meshq.submit.snapshot import Made, Snapshot, snapshot
from tests.submit.repositories import commit_all, git, repository, tree_that_git_would_write, write

Awkward = Callable[[Path], None]


def dirty(top: Path) -> None:
    write(top / "kept.py", "1")
    write(top / "changed.py", "1")
    write(top / "gone.py", "1")
    write(top / "removed.py", "1")
    commit_all(top)
    write(top / "changed.py", "2")
    (top / "gone.py").unlink()
    git(top, "rm", "-q", "removed.py")
    write(top / "new" / "deep" / "file.txt", "x")


def executables(top: Path) -> None:
    write(top / "run.sh", "#!/bin/sh\n", executable=True)
    write(top / "later.sh", "#!/bin/sh\n")
    commit_all(top)
    (top / "later.sh").chmod(0o755)
    write(top / "new.sh", "#!/bin/sh\n", executable=True)


def symlinks(top: Path) -> None:
    write(top / "data" / "a.txt", "a")
    (top / "tracked").symlink_to("data")
    (top / "dangling").symlink_to("nowhere")
    commit_all(top)
    (top / "untracked-to-folder").symlink_to("data")
    (top / "untracked-to-file").symlink_to("data/a.txt")
    (top / "data" / "up").symlink_to("../data/a.txt")


def nested_ignores(top: Path) -> None:
    write(top / ".gitignore", "*.log\n/build/\n!keep.log\n")
    write(top / "sub" / ".gitignore", "!important.log\n*.tmp\nlogs/\n")
    for name in ("a.log", "keep.log", "build/x", "sub/important.log", "sub/a.tmp", "sub/logs/x", "sub/build/y", "sub/b.log"):
        write(top / name, name)


def excluded_elsewhere(top: Path) -> None:
    write(top / ".git" / "info" / "exclude", "private/\n*.secret\n")
    for name in ("private/x", "a.secret", "b.public"):
        write(top / name, name)


def tracked_though_ignored(top: Path) -> None:
    write(top / "model.bin", "1")
    commit_all(top)
    write(top / ".gitignore", "*.bin\n")
    write(top / "model.bin", "2")
    write(top / "other.bin", "3")


def replaced(top: Path) -> None:
    write(top / "file", "1")
    write(top / "folder" / "x", "1")
    write(top / "linked" / "x", "1")
    write(top / "target" / "x", "other")
    commit_all(top)
    (top / "file").unlink()
    write(top / "file" / "inside", "2")
    (top / "folder" / "x").unlink()
    (top / "folder").rmdir()
    write(top / "folder", "now a file")
    (top / "linked" / "x").unlink()
    (top / "linked").rmdir()
    (top / "linked").symlink_to("target")


def strange_names(top: Path) -> None:
    for name in (b"new\nline", b"caf\xe9", "世界".encode(), b"tab\t", b'quote"', b"-dash", b" space ", b"*star"):
        with open(os.path.join(os.fsencode(top), name), "wb") as file:
            file.write(name)


def never_committed(top: Path) -> None:
    write(top / "first.py", "1")


def intended(top: Path) -> None:
    write(top / "a.py", "a")
    commit_all(top)
    write(top / "b.py", "b")
    git(top, "add", "--intent-to-add", "b.py")


def conflicted(top: Path) -> None:
    write(top / "a.py", "base")
    commit_all(top)
    git(top, "checkout", "-q", "-b", "side")
    write(top / "a.py", "side")
    commit_all(top)
    git(top, "checkout", "-q", "main")
    write(top / "a.py", "main")
    commit_all(top)
    with pytest.raises(AssertionError):
        git(top, "merge", "side")


def no_files(top: Path) -> None:
    pass


AWKWARD = [
    dirty, executables, symlinks, nested_ignores, excluded_elsewhere, tracked_though_ignored, replaced, strange_names,
    never_committed, intended, conflicted, no_files,
]  # fmt: skip


def tree_of(taken: Snapshot) -> str:
    assert taken.commit is not None
    made = taken.objects[taken.commit]
    assert isinstance(made, Made)
    return decode_commit(made.content)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.mark.parametrize("awkward", AWKWARD, ids=lambda each: each.__name__)
def test_git_and_dulwich_and_our_own_hashing_make_the_same_tree(
    awkward: Awkward, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    top = repository(tmp_path / "work")
    awkward(top)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    expected = tree_that_git_would_write(top, scratch)
    before = files_of(top / ".git")

    assert tree_of(snapshot(None, top, cache=cache)) == expected

    def refuse(*_: object) -> list[bytes]:
        raise listing._GitRefuses

    monkeypatch.setattr(listing, "_git", refuse)
    assert tree_of(snapshot(None, top, cache=cache)) == expected
    assert files_of(top / ".git") == before


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_split_index_is_read_by_the_git_command_and_does_not_stop_dulwich(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = repository(tmp_path / "work")
    dirty(top)
    git(top, "update-index", "--split-index")
    expected = {b"kept.py", b"changed.py", b"new/deep/file.txt"}
    assert paths_in(snapshot(None, top, cache=cache)) == expected
    monkeypatch.setenv("PATH", str(tmp_path))  # no git command there
    assert paths_in(snapshot(None, top, cache=cache)) == expected


def test_a_linked_working_tree_is_a_repository_like_any_other(tmp_path: Path, cache: Path) -> None:
    top = repository(tmp_path / "work")
    write(top / "a.py", "1")
    write(top / ".gitignore", "ignored\n")
    commit_all(top)
    git(top, "worktree", "add", "-q", str(tmp_path / "linked"))
    write(tmp_path / "linked" / "b.py", "2")
    write(tmp_path / "linked" / "ignored", "3")
    assert paths_in(snapshot(None, tmp_path / "linked", cache=cache)) == {b".gitignore", b"a.py", b"b.py"}


def test_repositories_inside_come_along_with_their_own_rules(tmp_path: Path, cache: Path) -> None:
    library = repository(tmp_path / "library")
    write(library / "lib.py", "1")
    write(library / ".gitignore", "*.o\n")
    commit_all(library)
    top = repository(tmp_path / "work")
    write(top / "main.py", "import lib")
    git(top, "-c", "protocol.file.allow=always", "submodule", "add", "-q", str(library), "vendored")
    commit_all(top)
    write(top / "vendored" / "lib.py", "changed")
    write(top / "vendored" / "junk.o", "1")
    write(repository(top / "embedded") / "found.py", "1")
    assert paths_in(snapshot(None, top, cache=cache)) == {
        b".gitmodules", b"main.py", b"vendored/.gitignore", b"vendored/lib.py", b"embedded/found.py",
    }  # fmt: skip


def test_a_submodule_that_is_not_checked_out_is_named(tmp_path: Path, cache: Path) -> None:
    library = repository(tmp_path / "library")
    write(library / "lib.py", "1")
    commit_all(library)
    top = repository(tmp_path / "work")
    git(top, "-c", "protocol.file.allow=always", "submodule", "add", "-q", str(library), "vendored")
    commit_all(top)
    git(top, "submodule", "deinit", "-q", "-f", "vendored")
    taken = snapshot(None, top, cache=cache)
    [warning] = taken.warnings
    assert "vendored is not checked out, so it stays behind" in warning
    assert paths_in(taken) == {b".gitmodules"}


def test_filters_of_the_repository_do_not_touch_what_is_sent(tmp_path: Path, cache: Path) -> None:
    top = repository(tmp_path / "work")
    git(top, "config", "filter.lfs.clean", "sed s/content/pointer/")
    git(top, "config", "core.autocrlf", "true")
    write(top / ".gitattributes", "*.bin filter=lfs\n")
    write(top / "big.bin", "content")
    commit_all(top)
    write(top / "windows.txt", "a\r\nb\r\n")
    taken = snapshot(None, top, cache=cache)
    assert git(top, "show", "HEAD:big.bin") == "pointer"
    contents = [content for _, content in taken.read(taken.objects)]
    assert b"content" in contents
    assert b"a\r\nb\r\n" in contents


def test_virtual_environments_and_byte_code_stay_even_if_nobody_ignored_them(tmp_path: Path, cache: Path) -> None:
    top = repository(tmp_path / "work")
    write(top / "main.py", "1")
    write(top / "env" / "pyvenv.cfg", "")
    write(top / "env" / "lib" / "x.py", "1")
    write(top / "__pycache__" / "main.pyc", "1")
    assert paths_in(snapshot(None, top, cache=cache)) == {b"main.py"}


def test_a_plain_folder_goes_without_debris_and_without_what_meshqignore_names(tmp_path: Path, cache: Path) -> None:
    top = tmp_path / "plain"
    for name in ("main.py", "helper.py", "data/big.csv", "data/small.txt", "logs/x.log", "node_modules/x.js", ".venv/lib/y.py"):
        write(top / name, "1")
    write(top / ".meshqignore", "*.csv\nlogs/\n")
    assert paths_in(snapshot(None, top, cache=cache)) == {b"main.py", b"helper.py", b"data/small.txt", b".meshqignore"}


def test_meshqignore_takes_tracked_files_away_too(tmp_path: Path, cache: Path) -> None:
    top = repository(tmp_path / "work")
    write(top / "main.py", "1")
    write(top / "data" / "deep" / "big.csv", "1")
    commit_all(top)
    write(top / ".meshqignore", "data/\n")
    assert paths_in(snapshot(None, top, cache=cache)) == {b"main.py", b".meshqignore"}


def test_pipes_and_sockets_are_left_out_with_a_warning(cache: Path) -> None:
    with tempfile.TemporaryDirectory() as short:  # a socket's path has at most 108 bytes
        top = Path(short)
        write(top / "main.py", "1")
        os.mkfifo(top / "pipe")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(top / "socket"))
            taken = snapshot(None, top, cache=cache)
    assert paths_in(taken) == {b"main.py"}
    assert [warning.split(" ")[0] for warning in taken.warnings] == ["pipe", "socket"]


def test_a_git_file_that_is_none_is_named(tmp_path: Path, cache: Path) -> None:
    for content in ("nonsense\n", ""):
        write(tmp_path / "top" / ".git", content)
        with pytest.raises(UsageError, match="leads to no repository"):
            snapshot(None, tmp_path / "top", cache=cache)


def test_a_submodule_that_was_copied_without_its_repository_is_a_folder_with_ignored_files(tmp_path: Path, cache: Path) -> None:
    write(tmp_path / "top" / ".git", "gitdir: ../.git/modules/gone\n")
    write(tmp_path / "top" / ".gitignore", "*.o\n")
    write(tmp_path / "top" / "a.py")
    write(tmp_path / "top" / "a.o")
    assert paths_in(snapshot(None, tmp_path / "top", cache=cache)) == {b".gitignore", b"a.py"}


def test_a_walk_that_finds_no_end_is_refused(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "FOLDERS_MAX", 3)
    for name in ("a", "b", "c", "d"):
        write(tmp_path / "top" / name / "x", "1")
    with pytest.raises(UsageError, match="more than 3 folders"):
        snapshot(None, tmp_path / "top", cache=cache)


def paths_in(taken: Snapshot) -> set[bytes]:
    assert taken.commit is not None
    found: set[bytes] = set()

    def walk(tree: ObjectId, prefix: bytes) -> None:
        made = taken.objects[tree]
        assert isinstance(made, Made)
        for entry in decode_tree(made.content):
            if entry.mode == MODE_FOLDER:
                walk(entry.id, prefix + entry.name + b"/")
            else:
                found.add(prefix + entry.name)

    walk(ObjectId(tree_of(taken)), b"")
    return found
