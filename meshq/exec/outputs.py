"""What a task left in `$MESHQ_OUTPUT_DIR`: listed with hashes, and opened without ever following a link.

The folder was written by user code, so a name in it may be a link to the owner's keys, a FIFO that never answers or a
tree without end. Each step is taken relative to the open folder before it; whatever is no plain file is counted as skipped.
"""

import ctypes
import errno
import hashlib
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from meshq import config
from meshq.errors import TaskFailed
from meshq.task import OutputFile

DEPTH_MAX: Final = 64  # folders inside each other; each holds a descriptor while it is read

_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_OPENAT2: Final = 437  # the same on every architecture
_RESOLVE: Final = 0x02 | 0x04 | 0x08  # no magic links, no symbolic links, beneath

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """All plain files, by path. `skipped`: links, special files, odd names, and what is beyond the limits."""

    files: tuple[OutputFile, ...]
    skipped: int


def list_outputs(folder: Path) -> Listing:
    """Every output with its size and hash. Blocking: it reads everything. OSError if the folder itself can't be read."""
    paths: list[str] = []
    root = os.open(folder, _FOLDER)
    try:
        skipped = _walk(root, "", 0, paths)
        files = [_describe(root, path) for path in sorted(paths)]
    finally:
        os.close(root)
    found = tuple(file for file in files if file is not None)
    return Listing(files=found, skipped=skipped + len(files) - len(found))


def open_output(folder: Path, path: str) -> int:
    """A descriptor of one output, to read. TaskFailed unless `path` names a plain file inside the folder."""
    if not path or path.startswith("/") or "\0" in path or ".." in path.split("/"):
        raise TaskFailed(f"{path!r} is no path inside the outputs")
    try:
        root = os.open(folder, _FOLDER)
        try:
            descriptor = _open_beneath(root, path)
        finally:
            os.close(root)
    except OSError as error:
        reason = (
            "it is, or leads through, a link" if error.errno in (errno.ELOOP, errno.EXDEV) else os.strerror(error.errno or 0)
        )
        raise TaskFailed(f"opening the output {path!r}: {reason}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise TaskFailed(f"the output {path!r} is no plain file")
    return descriptor


def _walk(folder: int, prefix: str, depth: int, paths: list[str]) -> int:
    """Append the paths of plain files below; how many entries were skipped."""
    skipped = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            path = prefix + entry.name
            if entry.is_dir(follow_symlinks=False) and depth < DEPTH_MAX:
                skipped += _walk_into(folder, entry.name, path, depth, paths)
            elif entry.is_file(follow_symlinks=False) and _is_text(path) and len(paths) < config.OUTPUT_FILES_MAX:
                paths.append(path)
            else:
                skipped += 1
    return skipped


def _walk_into(parent: int, name: str, path: str, depth: int, paths: list[str]) -> int:
    try:
        folder = os.open(name, _FOLDER, dir_fd=parent)
    except OSError:
        return 1  # swapped for something else, or closed by its owner
    try:
        return _walk(folder, path + "/", depth + 1, paths)
    finally:
        os.close(folder)


def _is_text(path: str) -> bool:
    """Whether the path has a spelling outside this machine: names that are no UTF-8 don't."""
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _describe(root: int, path: str) -> OutputFile | None:
    try:
        descriptor = _open_beneath(root, path)
    except OSError:
        return None
    with open(descriptor, "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        try:
            digest = hashlib.file_digest(file, "sha256")
        except OSError:
            return None
        return OutputFile(path=path, bytes=file.tell(), sha256=digest.hexdigest())


def _open_beneath(root: int, path: str) -> int:
    """Open for reading, with no link anywhere on the way."""
    how = struct.pack("=QQQ", _FILE, 0, _RESOLVE)
    descriptor = int(
        _libc.syscall(
            ctypes.c_long(_OPENAT2), ctypes.c_int(root), os.fsencode(path), how, ctypes.c_size_t(len(how))
        )
    )  # fmt: skip
    if descriptor >= 0:
        return descriptor
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EPERM):  # Linux before 5.6; a seccomp filter that does not know the call
        return _open_by_steps(root, path)
    raise OSError(number, os.strerror(number))


def _open_by_steps(root: int, path: str) -> int:
    *folders, name = [part for part in path.split("/") if part not in ("", ".")]
    here = os.dup(root)
    try:
        for part in folders:
            below = os.open(part, _FOLDER, dir_fd=here)
            os.close(here)
            here = below
        return os.open(name, _FILE, dir_fd=here)
    finally:
        os.close(here)
