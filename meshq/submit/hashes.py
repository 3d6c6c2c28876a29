"""Naming files by content without reading those that have not changed since the last submit.

What is remembered for a file holds as long as its size, times, inode and device do. As in git, a file that changed
within the last two seconds is not remembered: a later write in the same tick of the clock would not show.
"""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Final

from meshq.errors import UsageError
from meshq.gitobjects import BLOB, object_id
from meshq.ids import ObjectId
from meshq.submit.cache import remember

REMEMBERED_FILES_MIN: Final = 200  # below this, hashing everything takes less time than reading what is remembered
REMEMBERED_BYTES_MIN: Final = 16 * 2**20
RACY_NS: Final = 2_000_000_000  # FAT has the coarsest clock

Known = tuple[str, int, int, int, int, int]


class Hashes:
    """The ids of the files below `top`; `save` keeps them for the next time."""

    def __init__(self, top: Path, cache: Path) -> None:
        self._file = cache / "hashes" / f"{hashlib.sha256(os.fsencode(top)).hexdigest()[:32]}.json"
        self._known: dict[str, Known] = _load(self._file)
        self._next: dict[str, Known] = {}
        self._bytes = 0

    def id_of(self, path: bytes, relative: bytes, stat: os.stat_result) -> ObjectId:
        """The id of the file's content. UsageError if it can't be read."""
        name = os.fsdecode(relative)
        facts = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev)
        known = self._known.get(name)
        self._bytes += stat.st_size
        found = known[0] if known is not None and tuple(known[1:]) == facts else object_id(BLOB, read_file(path, stat.st_size))
        if max(stat.st_mtime_ns, stat.st_ctime_ns) < time.time_ns() - RACY_NS:
            self._next[name] = (found, *facts)
        return ObjectId(found)

    def save(self) -> None:
        worth = len(self._next) >= REMEMBERED_FILES_MIN or self._bytes >= REMEMBERED_BYTES_MIN
        if worth and self._next != self._known:
            remember(self._file, json.dumps(self._next, separators=(",", ":")))


def read_file(path: bytes, size: int) -> bytes:
    """The whole file, which must have `size` bytes. UsageError if it can't be read or is just being written."""
    shown = os.fsdecode(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            data = file.read(size + 1)
    except OSError as error:
        raise UsageError(
            f"reading {shown}: {error.strerror}", "make it readable, or name it in .gitignore or .meshqignore"
        ) from None
    if len(data) != size:
        raise changed(shown)
    return data


def changed(shown: str) -> UsageError:
    return UsageError(f"{shown} changed while it was read", "submit again when nothing writes to it, or ignore it")


def _load(file: Path) -> dict[str, Known]:
    try:
        loaded = json.loads(file.read_bytes())
        return {str(name): (str(known[0]), *map(int, known[1:6])) for name, known in loaded.items()}  # type: ignore[misc]  # six
    except (OSError, ValueError, TypeError, AttributeError, IndexError):
        return {}
