"""Logs: pieces, last lines, and following one that is being written."""

import asyncio
import os
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from meshq import config
from meshq.exec import logs
from meshq.exec.logs import Chunk
from tests.exec.bench import LIMIT_SECONDS


def test_a_log_is_read_piece_by_piece(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"abcdef")
    assert logs.read_chunk(path, 0, 4) == Chunk(b"abcd", 0)
    assert logs.read_chunk(path, 4, 4) == Chunk(b"ef", 4)
    assert logs.read_chunk(path, 6, 4) == Chunk(b"", 6)


def test_a_log_that_is_not_there_yet_is_empty(tmp_path: Path) -> None:
    assert logs.read_chunk(tmp_path / "log", 0) == Chunk(b"", 0)
    assert logs.tail_offset(tmp_path / "log", 10) == 0


def test_a_log_that_its_task_truncated_is_read_again_from_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"new")
    assert logs.read_chunk(path, 100) == Chunk(b"new", 0)


def test_a_log_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("SECRET")
    (tmp_path / "log").symlink_to("secret")
    with pytest.raises(OSError, match="symbolic"):
        logs.read_chunk(tmp_path / "log", 0)


@given(
    lines=st.lists(st.binary(max_size=6).map(lambda line: line.replace(b"\n", b"")), max_size=30),
    ended=st.booleans(),
    count=st.integers(0, 40),
    block=st.integers(1, 20),
)
def test_the_last_lines_are_what_splitting_the_whole_would_give(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], ended: bool, count: int, block: int
) -> None:
    text = b"\n".join(lines) + (b"\n" if ended and lines else b"")
    path = tmp_path_factory.getbasetemp() / "tail.log"
    path.write_bytes(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "LOG_CHUNK_BYTES", block)
        offset = logs.tail_offset(path, count)
    whole = text.split(b"\n")
    pieces = [line + b"\n" for line in whole[:-1]] + ([whole[-1]] if whole[-1] else [])
    assert text[offset:] == b"".join(pieces[len(pieces) - count :] if count < len(pieces) else pieces if count else [])


def sparse_log(path: Path) -> int:
    """A log with a hole between its first and its last line; where the last line's block begins."""
    block = 2**20
    with path.open("wb") as file:
        file.write(b"head\n".ljust(4096, b"."))
        file.seek(block)
        file.write(b".\ntail\n")
    return block


def test_a_hole_is_stepped_over_and_the_offsets_show_it(tmp_path: Path) -> None:
    path = tmp_path / "log"
    block = sparse_log(path)
    first = logs.read_chunk(path, 0)
    assert first == Chunk(b"head\n".ljust(4096, b"."), 0)
    for offset in (first.end, first.end + 1, block):
        assert logs.read_chunk(path, offset) == Chunk(b".\ntail\n", block)


def test_the_last_lines_do_not_reach_over_a_hole(tmp_path: Path) -> None:
    path = tmp_path / "log"
    block = sparse_log(path)
    assert logs.tail_offset(path, 1) == block + 2
    assert logs.tail_offset(path, 100) == block


@pytest.mark.parametrize("inotify", [True, False], ids=["inotify", "polling"])
def test_following_shows_each_line_as_it_is_written_and_ends_with_the_attempt(
    tmp_path: Path, inotify: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not inotify:
        monkeypatch.setattr(logs._libc, "inotify_init1", lambda _flags: -1)
    path = tmp_path / "log"

    async def story() -> None:
        following = logs.follow(path, 0, (tmp_path / "exit.json").exists)
        first = asyncio.ensure_future(anext(following))
        await asyncio.sleep(0)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for line in (b"one\n", b"two\n", b"three\n"):
            os.write(descriptor, line)
            chunk = await (first if line == b"one\n" else anext(following))
            assert chunk.data == line
        os.write(descriptor, b"last\n")
        (tmp_path / "exit.tmp").touch()
        (tmp_path / "exit.tmp").rename(tmp_path / "exit.json")
        os.close(descriptor)
        assert [chunk async for chunk in following] == [Chunk(b"last\n", len("one two three "))]

    async def limited() -> None:
        async with asyncio.timeout(LIMIT_SECONDS):
            await story()

    asyncio.run(limited())
