"""Read the log of an attempt: a piece, the last lines, or everything as it is written.

The task writes the file itself, so a reader never meets a writer's lock, and offsets are simply offsets. Where a log grew past
its limit the shim punched a hole into its middle; a reader steps over it, and the offsets show that it did. A reader that
follows sleeps in inotify on the attempt's folder, which also wakes it when the file appears and when `exit.json` does.
"""

import asyncio
import contextlib
import ctypes
import errno
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from meshq import config

WAKE_SECONDS: Final = 0.5  # how long `done` may be true without a change in the folder before it is asked again
POLL_SECONDS: Final = 0.1  # where inotify is exhausted (128 instances of a user by default)

_IN_MODIFY, _IN_MOVED_TO, _IN_CREATE = 0x02, 0x80, 0x100
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes of a log, and the offset where they stand in it. Empty at the end of what there is."""

    data: bytes
    offset: int

    @property
    def end(self) -> int:
        return self.offset + len(self.data)


def read_chunk(path: Path, offset: int, limit: int = config.LOG_CHUNK_BYTES) -> Chunk:
    """At most `limit` bytes from `offset` on. A log that is not there yet is empty; one that became shorter starts again."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return Chunk(b"", offset)
    try:
        size = os.fstat(descriptor).st_size
        if size < offset:
            offset = 0  # the task truncated its own log
        if size == offset:
            return Chunk(b"", offset)
        start = _seek(descriptor, offset, os.SEEK_DATA, size)
        end = min(_seek(descriptor, start, os.SEEK_HOLE, size), start + limit)
        return Chunk(os.pread(descriptor, end - start, start), start)
    finally:
        os.close(descriptor)


def tail_offset(path: Path, lines: int) -> int:
    """Where the last `lines` lines begin; not before a hole."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return 0
    try:
        end = os.fstat(descriptor).st_size
        if lines <= 0:
            return end
        missing = lines + (end > 0 and os.pread(descriptor, 1, end - 1) == b"\n")
        while end > 0:
            start = max(0, end - config.LOG_CHUNK_BYTES)
            block = os.pread(descriptor, end - start, start)
            if (found := block.count(b"\n")) >= missing:
                return start + _nth_last(block, missing) + 1
            missing -= found
            if (data := _seek(descriptor, start, os.SEEK_DATA, end)) > start:
                return data
            end = start
        return 0
    finally:
        os.close(descriptor)


async def follow(path: Path, offset: int, done: Callable[[], bool]) -> AsyncIterator[Chunk]:
    """All that is in the log from `offset` on and all that will be, until `done()` and the end is reached."""
    with _Watch(path.parent) as watch:
        while True:
            over = done()  # asked before reading: what is written before the end is not missed
            chunk = await asyncio.to_thread(read_chunk, path, offset)
            offset = chunk.end
            if chunk.data:
                yield chunk
            elif over:
                return
            else:
                await watch.wait()


class _Watch:
    """Wakes when something in one folder is written, made or renamed."""

    def __init__(self, folder: Path) -> None:
        self._descriptor = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._descriptor >= 0:
            mask = ctypes.c_uint32(_IN_MODIFY | _IN_MOVED_TO | _IN_CREATE)
            if _libc.inotify_add_watch(ctypes.c_int(self._descriptor), os.fsencode(folder), mask) < 0:
                os.close(self._descriptor)
                self._descriptor = -1

    def __enter__(self) -> "_Watch":
        self._woken = asyncio.Event()
        if self._descriptor >= 0:
            asyncio.get_running_loop().add_reader(self._descriptor, self._drain)
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor >= 0:
            asyncio.get_running_loop().remove_reader(self._descriptor)
            os.close(self._descriptor)

    async def wait(self) -> None:
        """Until something changed since the last wait, or for a moment."""
        seconds = WAKE_SECONDS if self._descriptor >= 0 else POLL_SECONDS
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._woken.wait(), seconds)
        self._woken.clear()

    def _drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._descriptor, 65_536)
        self._woken.set()


def _seek(descriptor: int, offset: int, whence: int, size: int) -> int:
    try:
        return os.lseek(descriptor, offset, whence)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return size  # no data, or no hole, from here to the end
        return offset if whence == os.SEEK_DATA else size  # a file system without holes


def _nth_last(block: bytes, count: int) -> int:
    position = len(block)
    for _ in range(count):
        position = block.rindex(b"\n", 0, position)
    return position
