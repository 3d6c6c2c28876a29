"""Files that are on the disk when a function returns, whatever becomes of the power a moment later.

A file is written beside its place and then takes it in one step, so after a crash it is the old or the new one, and whole. A
name is lost with the power until its folder is on the disk, too. Secrets need more: see `trust/secret_file.py`.
"""

import os
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the file, which only its owner may read. OSError: the old one is still there, and maybe a `….new` beside it."""
    beside = path.with_name(path.name + ".new")
    write_synced(beside, data)
    beside.replace(path)
    sync_folder(path.parent)


def write_synced(path: Path, data: bytes) -> None:
    """The content is on the disk; the name is not yet."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """The names in it are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
