"""Write a submitted source to a folder, whatever its author had in mind.

The tree was made by another member, so its names, links and modes are data, not facts. Nothing is ever opened by a path:
each folder is opened relative to its parent's descriptor without following links, each file must be new. So a
link in the tree can't redirect a later write, and two entries of one name are an error instead of a surprise.
Links that would leave the folder are refused before anything is written through them (`gitobjects.symlink_stays`).
"""

import os
from pathlib import Path
from typing import Final

from meshq import config
from meshq.errors import MalformedData, StoreError
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
    Entry,
    check_name,
    decode_commit,
    decode_tree,
    symlink_stays,
)
from meshq.ids import ObjectId

DEPTH_MAX: Final = 128  # folders inside each other; a path of the kernel has at most 4,096 bytes
LINK_BYTES_MAX: Final = 4095
MODE_GROUP_WRITABLE: Final = 0o100664  # written by git before 2005; some importers still do
NEW_FILE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def checkout(store: ObjectStore, commit: ObjectId, folder: Path) -> int:
    """Write the files of `commit` into `folder`, which must be empty and is made if it is not there.

    The answer is the number of files. PreparationFailed if an object is missing (retryable) or the tree is hostile (not);
    the folder then holds a part of it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _Writer(store).write(decode_commit(store.read(commit, COMMIT)), folder)
    except StoreError as error:
        raise PreparationFailed(f"the source {commit[:8]} can't be checked out: {error}", True) from None
    except MalformedData as error:
        raise PreparationFailed(f"the source {commit[:8]} is damaged: {error}", False) from None
    except OSError as error:
        raise PreparationFailed(f"writing the source {commit[:8]} to {folder}: {error.strerror or error}", True) from None


class _Writer:
    """One checkout: counts what it writes, so that a small tree can't become a large one by naming one blob often."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._files = 0
        self._bytes = 0

    def write(self, tree: ObjectId, folder: Path) -> int:
        descriptor = os.open(folder, FOLDER)
        try:
            self._write_folder(tree, descriptor, 0)
        finally:
            os.close(descriptor)
        return self._files

    def _write_folder(self, tree: ObjectId, parent: int, depth: int) -> None:
        if depth > DEPTH_MAX:
            raise _refused(f"more than {DEPTH_MAX} folders inside each other")
        entries = decode_tree(self._store.read(tree, TREE))
        if len({entry.name for entry in entries}) < len(entries):
            raise _refused("a name that stands twice in one folder")
        for entry in entries:
            if reason := check_name(entry.name):
                raise _refused(f"{entry.name[:80]!r} {reason}")
            self._write_entry(entry, parent, depth)

    def _write_entry(self, entry: Entry, parent: int, depth: int) -> None:
        self._files += 1  # folders count, too
        if self._files > config.SOURCE_FILES_MAX:
            raise _refused(f"more than {config.SOURCE_FILES_MAX} files")
        match entry.mode:
            case _ if entry.mode in (MODE_FILE, MODE_EXECUTABLE, MODE_GROUP_WRITABLE):
                self._write_file(entry, parent)
            case _ if entry.mode == MODE_SYMLINK:
                self._write_symlink(entry, parent, depth)
            case _ if entry.mode == MODE_FOLDER:
                os.mkdir(entry.name, 0o755, dir_fd=parent)
                descriptor = os.open(entry.name, FOLDER, dir_fd=parent)
                try:
                    self._write_folder(entry.id, descriptor, depth + 1)
                finally:
                    os.close(descriptor)
            case _ if entry.mode == MODE_REPOSITORY:
                os.mkdir(entry.name, 0o755, dir_fd=parent)  # as git does for a submodule that is not checked out
            case _:
                raise _refused(f"{entry.name[:80]!r} has the mode {entry.mode:o}")

    def _write_file(self, entry: Entry, parent: int) -> None:
        content = self._content(entry)
        descriptor = os.open(entry.name, NEW_FILE, 0o755 if entry.mode == MODE_EXECUTABLE else 0o644, dir_fd=parent)
        with open(descriptor, "wb", buffering=0) as file:
            written = 0
            while written < len(content):
                written += file.write(memoryview(content)[written:])

    def _write_symlink(self, entry: Entry, parent: int, depth: int) -> None:
        target = self._content(entry)
        if len(target) > LINK_BYTES_MAX or b"\0" in target or not symlink_stays(target, depth):
            raise _refused(f"the link {entry.name[:80]!r} leaves the folder")
        os.symlink(target, entry.name, dir_fd=parent)

    def _content(self, entry: Entry) -> bytes:
        content = self._store.read(entry.id, BLOB)
        self._bytes += len(content)
        if self._bytes > config.SOURCE_BYTES_MAX:
            raise _refused(f"more than {config.SOURCE_BYTES_MAX} bytes")
        return content


def _refused(what: str) -> PreparationFailed:
    return PreparationFailed(f"the source is refused: {what}", False)
