"""The log and the outputs of attempts that lie on this disk: those that ran here, and copies kept for others.

User code wrote below `outputs/`, so every open there refuses links and paths that leave the folder. A copy is built
aside and renamed into place when it is whole.
"""

import asyncio
import hashlib
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final

from meshq import codec, config
from meshq.config import Home
from meshq.errors import PeerError, TaskFailed
from meshq.exec import logs, outputs
from meshq.exec.logs import Chunk
from meshq.ids import Fence, is_fence
from meshq.task import OutputFile
from meshq.web.wire import MANIFEST_BYTES_MAX, Manifest

KEPT_SECONDS: Final = 7 * 86_400.0  # as long as the attempts that ran here


class Copy:
    """One copy while it arrives; written blockingly, so in a thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._log = (folder / "log").open("wb")
        self._log_bytes = 0

    def write_log(self, chunk: Chunk) -> None:
        """Where it stands in the original: a hole stays a hole, and an offset means the same here and there."""
        self._log_bytes += len(chunk.data)
        if self._log_bytes > 2 * config.LOG_BYTES_MAX:
            raise PeerError("the log is longer than a log may be")
        self._log.seek(chunk.offset)
        self._log.write(chunk.data)

    async def write_output(self, file: OutputFile, chunks: AsyncIterator[bytes]) -> None:
        """Write one output file; PeerError if it is not what the manifest says."""
        digest = hashlib.sha256()
        size = 0
        with await asyncio.to_thread(self._open_output, file.path) as out:
            async for chunk in chunks:
                size += len(chunk)
                if size > file.bytes:
                    raise PeerError(f"the output {file.path!r} is longer than its manifest says")
                digest.update(chunk)
                await asyncio.to_thread(out.write, chunk)
            await asyncio.to_thread(_sync, out)
        if digest.hexdigest() != file.sha256:
            raise PeerError(f"the output {file.path!r} is not what its manifest says")

    def _open_output(self, path: str) -> BinaryIO:
        target = self._folder / "outputs" / path
        if not target.resolve().is_relative_to(self._folder.resolve()):
            raise PeerError(f"the output {path!r} would leave its folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        return target.open("xb")

    def finish(self, place: Path) -> None:
        """It is whole: bring it to the disk and to its place."""
        _sync(self._log)
        self._log.close()
        self._folder.rename(place)

    def abandon(self) -> None:
        self._log.close()
        shutil.rmtree(self._folder, ignore_errors=True)


class AttemptFiles:
    """Finds the folder of an attempt: its own, or the copy that is kept here."""

    def __init__(self, home: Home) -> None:
        self._home = home

    def folder(self, fence: Fence) -> Path | None:
        """The folder with `log` and `outputs/`, or None. Of an attempt that is being started the log may not be there yet."""
        if not is_fence(fence):
            return None
        folders = (parent / fence for parent in (self._home.attempts, self._home.kept))
        return next((folder for folder in folders if folder.is_dir()), None)

    async def has(self, fence: Fence) -> bool:
        return await asyncio.to_thread(self.folder, fence) is not None

    def _require(self, fence: Fence) -> Path:
        folder = self.folder(fence)
        if folder is None:
            raise TaskFailed(f"nothing of attempt {fence} lies on this disk")
        return folder

    def _over(self, folder: Path) -> bool:
        """Nothing more will be written. An attempt that vanished has no exit, but its end was reported."""
        return folder.parent == self._home.kept or any((folder / name).exists() for name in ("exit.json", "reported"))

    async def log(self, fence: Fence, *, offset: int = 0, tail: int | None, follow: bool) -> AsyncIterator[Chunk]:
        """The log, from `tail` lines before its end or else from `offset` on; with `follow` until the attempt is over.

        The first chunk is empty and comes at once: it says where the log begins, and that it is here.
        """
        folder = await asyncio.to_thread(self._require, fence)
        path = folder / "log"
        if tail is not None:
            offset = await asyncio.to_thread(logs.tail_offset, path, tail)
        done = (lambda: self._over(folder)) if follow else (lambda: True)
        yield Chunk(b"", offset)
        async for chunk in logs.follow(path, offset, done):
            yield chunk

    def manifest(self, fence: Fence) -> Manifest:
        """All output files. Blocking: it reads and hashes them, unless this is a copy, which has its manifest."""
        folder = self._require(fence)
        stored = folder / "manifest"
        if stored.exists():
            manifest: Manifest = codec.decode(
                Manifest, stored.read_bytes(), bytes_max=MANIFEST_BYTES_MAX, items_max=config.OUTPUT_FILES_MAX
            )
            return manifest
        listed = outputs.list_outputs(folder / "outputs")
        return Manifest(files=listed.files, skipped=listed.skipped)

    async def output(self, fence: Fence, path: str) -> AsyncIterator[bytes]:
        """The bytes of one output. TaskFailed if there is no such plain file inside the outputs folder."""
        folder = await asyncio.to_thread(self._require, fence)
        descriptor = await asyncio.to_thread(outputs.open_output, folder / "outputs", path)
        with os.fdopen(descriptor, "rb") as file:
            while chunk := await asyncio.to_thread(file.read, 2**20):
                yield chunk

    @asynccontextmanager
    async def new_copy(self, fence: Fence, manifest: Manifest) -> AsyncIterator[Copy]:
        """A copy that comes into being whole or not at all. StoreError if there is no room for it."""
        if not is_fence(fence):
            raise PeerError(f"not a fence: {fence!r}")
        copy = await asyncio.to_thread(self._begin_copy, fence, manifest)
        try:
            yield copy
            await asyncio.to_thread(copy.finish, self._home.kept / fence)
        except BaseException:
            await asyncio.shield(asyncio.to_thread(copy.abandon))
            raise

    def _begin_copy(self, fence: Fence, manifest: Manifest) -> Copy:
        self._home.kept.mkdir(mode=0o700, exist_ok=True)
        wanted = config.LOG_BYTES_MAX + sum(max(0, file.bytes) for file in manifest.files)
        config.check_room(self._home.kept, f"keeping a copy of attempt {fence}", wanted)
        arriving = self._home.kept / f".{fence}"
        shutil.rmtree(arriving, ignore_errors=True)
        (arriving / "outputs").mkdir(parents=True, mode=0o700)
        (arriving / "manifest").write_bytes(codec.encode(manifest))
        return Copy(arriving)

    def expire(self, wall: float) -> int:
        """Remove copies that were kept long enough, or that never became whole; the answer is how many. Blocking."""
        removed = 0
        for folder in sorted(self._home.kept.iterdir()) if self._home.kept.is_dir() else []:
            with suppress(FileNotFoundError):  # one that has just become whole has another name now
                if wall - folder.stat().st_mtime > KEPT_SECONDS:
                    shutil.rmtree(folder, ignore_errors=True)
                    removed += 1
        return removed


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
