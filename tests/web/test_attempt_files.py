"""Logs and outputs on this disk: own attempts, and copies that come into being whole or not at all."""

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from meshq.config import Home
from meshq.errors import PeerError, StoreError, TaskFailed
from meshq.exec.logs import Chunk
from meshq.ids import Fence
from meshq.task import OutputFile
from meshq.web.attempt_files import AttemptFiles
from meshq.web.wire import Manifest

FENCE = Fence("1." + "a" * 26 + ".1.7")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path)
    home.attempts.mkdir()
    return home


@pytest.fixture
def own(home: Home) -> AttemptFiles:
    folder = home.attempts / FENCE
    (folder / "outputs").mkdir(parents=True)
    (folder / "log").write_bytes(b"one\ntwo\n")
    (folder / "outputs" / "model").write_bytes(b"weights")
    (folder / "exit.json").write_text("{}")
    return AttemptFiles(home)


async def joined(chunks: AsyncIterator[bytes]) -> bytes:
    return b"".join([chunk async for chunk in chunks])


async def text(chunks: AsyncIterator[Chunk]) -> bytes:
    return b"".join([chunk.data async for chunk in chunks])


def file(path: str, data: bytes) -> OutputFile:
    return OutputFile(path=path, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


async def chunks_of(data: bytes) -> AsyncIterator[bytes]:
    yield data


def test_the_log_is_read_whole_or_from_its_last_lines(own: AttemptFiles) -> None:
    assert asyncio.run(text(own.log(FENCE, tail=None, follow=True))) == b"one\ntwo\n"
    assert asyncio.run(text(own.log(FENCE, tail=1, follow=False))) == b"two\n"
    assert asyncio.run(text(own.log(FENCE, offset=2, tail=None, follow=False))) == b"e\ntwo\n"


def test_the_first_chunk_is_empty_and_says_where_the_log_begins(own: AttemptFiles) -> None:
    async def first() -> Chunk:
        return await anext(aiter(own.log(FENCE, tail=1, follow=True)))

    assert asyncio.run(first()) == Chunk(b"", 4)


def test_a_log_that_is_not_there_yet_is_followed_until_the_attempt_is_reported(home: Home) -> None:
    folder = home.attempts / FENCE
    folder.mkdir()
    files = AttemptFiles(home)

    async def scenario() -> bytes:
        following = asyncio.ensure_future(text(files.log(FENCE, tail=None, follow=True)))
        await asyncio.sleep(0)
        (folder / "log").write_bytes(b"late\n")
        (folder / "reported").touch()
        return await following

    assert asyncio.run(scenario()) == b"late\n"


def test_outputs_are_listed_with_their_hashes_and_read(own: AttemptFiles) -> None:
    assert own.manifest(FENCE) == Manifest(files=(file("model", b"weights"),))
    assert asyncio.run(joined(own.output(FENCE, "model"))) == b"weights"


def test_paths_and_links_that_leave_the_outputs_are_refused(own: AttemptFiles, home: Home) -> None:
    os.symlink("/etc/hostname", home.attempts / FENCE / "outputs" / "link")
    for path in ("../log", "/etc/hostname", "link", "", "a/../../log"):
        with pytest.raises(TaskFailed):
            asyncio.run(joined(own.output(FENCE, path)))
    assert own.manifest(FENCE).skipped == 1


def test_a_fence_that_is_none_is_nowhere(home: Home) -> None:
    files = AttemptFiles(home)
    for name in ("..", "../x", FENCE):
        assert files.folder(Fence(name)) is None
    with pytest.raises(TaskFailed, match="nothing of attempt"):
        files.manifest(FENCE)


def test_a_copy_serves_like_the_original(home: Home) -> None:
    files = AttemptFiles(home)
    manifest = Manifest(files=(file("a/b", b"x"),), skipped=2)

    async def keep() -> None:
        async with files.new_copy(FENCE, manifest) as copy:
            copy.write_log(Chunk(b"hello\n", 0))
            await copy.write_output(manifest.files[0], chunks_of(b"x"))

    asyncio.run(keep())
    assert files.folder(FENCE) is not None
    assert files.manifest(FENCE) == manifest
    assert asyncio.run(text(files.log(FENCE, tail=None, follow=True))) == b"hello\n"
    assert asyncio.run(joined(files.output(FENCE, "a/b"))) == b"x"


def test_in_a_copy_a_hole_stays_a_hole_so_that_offsets_mean_the_same(home: Home) -> None:
    files = AttemptFiles(home)
    original = [Chunk(b"", 0), Chunk(b"head\n".ljust(4096), 0), Chunk(b"tail\n", 2**20)]

    async def keep() -> list[Chunk]:
        async with files.new_copy(FENCE, Manifest(files=())) as copy:
            for chunk in original:
                copy.write_log(chunk)
        return [chunk async for chunk in files.log(FENCE, tail=None, follow=False)]

    assert asyncio.run(keep()) == original


@pytest.mark.parametrize(
    ("listed", "sent"),
    [(file("a", b"x"), b"y"), (file("a", b"x"), b"xx"), (file("../../a", b"x"), b"x")],
)
def test_a_copy_that_is_not_what_its_manifest_says_leaves_nothing(home: Home, listed: OutputFile, sent: bytes) -> None:
    files = AttemptFiles(home)

    async def keep() -> None:
        async with files.new_copy(FENCE, Manifest(files=(listed,))) as copy:
            await copy.write_output(listed, chunks_of(sent))

    with pytest.raises(PeerError):
        asyncio.run(keep())
    assert files.folder(FENCE) is None
    assert list(home.kept.iterdir()) == []


def test_copies_are_removed_when_they_were_kept_long_enough(home: Home) -> None:
    files = AttemptFiles(home)

    async def keep() -> None:
        async with files.new_copy(FENCE, Manifest(files=())) as copy:
            copy.write_log(Chunk(b"", 0))

    asyncio.run(keep())
    kept_at = (home.kept / FENCE).stat().st_mtime
    assert files.expire(kept_at + 6 * 86_400) == 0
    assert files.expire(kept_at + 8 * 86_400) == 1
    assert files.folder(FENCE) is None


def test_a_copy_for_which_there_is_no_room_is_refused_before_it_begins(home: Home) -> None:
    files = AttemptFiles(home)
    huge = OutputFile(path="a", bytes=2**60, sha256="0" * 64)

    async def keep() -> None:
        async with files.new_copy(FENCE, Manifest(files=(huge,))):
            raise AssertionError("begun")

    with pytest.raises(StoreError, match="nearly full"):
        asyncio.run(keep())
    assert list(home.kept.iterdir()) == []
