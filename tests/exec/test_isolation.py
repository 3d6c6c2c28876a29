"""What runs only as long as `valid` says: the shim ends it in time, whatever becomes of the agent."""

import asyncio
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from meshq.errors import StoreError
from meshq.exec import shim, worker
from meshq.exec.attempts import Attempts, Unstarted
from meshq.exec.launch import launch_for
from meshq.exec.launcher import SpawnFailed
from meshq.exec.worker import Exited, outcome_of
from meshq.ids import Fence
from meshq.task import EndKind, Isolation
from tests.exec.bench import Bench, claimed, fence_of

BEFORE = shim.ISOLATED_GRACE_SECONDS + shim.ISOLATED_KILL_SECONDS
SLEEP = "import signal; print('ready', flush=True); signal.pause()"
DEAF = "import signal; signal.signal(15, signal.SIG_IGN); print('ready', flush=True)\nwhile True: signal.pause()"
POLITE = "import os, signal; signal.signal(15, lambda *_: os._exit(0)); print('ready', flush=True)\nwhile True: signal.pause()"


async def passed(moment: float) -> None:
    while shim.now() < moment:  # noqa: ASYNC110 -- a moment of the shim's clock has no event
        await asyncio.sleep(0.01)


async def start(bench: Bench, code: str, until: float) -> Fence:
    """An attempt that may run until then, and has begun."""
    fence = bench.prepare(1, code, until_valid=True)
    bench.attempts.keep(fence, until)
    await bench.spawn(fence)
    await bench.line(fence, "ready")
    return fence


@pytest.mark.parametrize(("code", "exit_code"), [(SLEEP, 143), (POLITE, 0), (DEAF, 137)], ids=["plain", "polite", "deaf"])
def test_it_is_dead_before_the_moment_with_its_reason_and_nobody_told_the_shim(
    tmp_path: Path, code: str, exit_code: int
) -> None:
    async def story() -> None:
        async with Bench(tmp_path) as bench:
            until = shim.now() + BEFORE + 0.5
            fence = await start(bench, code, until)
            ended = await bench.end(fence)
            assert isinstance(ended, Exited)
            assert (ended.exit_code, ended.stopped) == (exit_code, shim.ISOLATED)
            assert ended.ended_at <= time.time() - shim.now() + until, "it lived too long"

    asyncio.run(story())


def test_it_goes_on_as_long_as_the_moment_is_moved_on(tmp_path: Path) -> None:
    async def story() -> None:
        async with Bench(tmp_path) as bench:
            first = shim.now() + BEFORE + 0.5
            fence = await start(bench, SLEEP, first)
            bench.attempts.keep(fence, shim.now() + 1000)
            await passed(first - BEFORE + 2 * shim.VALID_CHECK_SECONDS)
            bench.attempts.signal(fence, b"stop cancelled")
            ended = await bench.end(fence)
            assert isinstance(ended, Exited)
            assert ended.stopped == "cancelled"

    asyncio.run(story())


def test_who_was_stopped_for_something_else_is_dead_by_then_all_the_same(tmp_path: Path) -> None:
    async def story() -> None:
        async with Bench(tmp_path) as bench:
            until = shim.now() + BEFORE + 0.3
            fence = await start(bench, DEAF, until)
            bench.attempts.signal(fence, b"stop cancelled")  # with ten seconds to do so
            ended = await bench.end(fence)
            assert isinstance(ended, Exited)
            assert (ended.exit_code, ended.stopped) == (137, "cancelled")
            assert ended.ended_at <= time.time() - shim.now() + until

    asyncio.run(story())


def test_a_shim_that_was_frozen_past_the_moment_kills_at_its_first_look(tmp_path: Path) -> None:
    """As after a suspend: all of the machine stands still, and goes on too late."""

    async def story() -> None:
        async with Bench(tmp_path) as bench:
            until = shim.now() + BEFORE + 0.3
            fence = await start(bench, DEAF, until)
            pid = bench.attempts.shim_pid(fence)
            assert pid is not None
            os.kill(pid, signal.SIGSTOP)
            await passed(until + 0.2)
            os.kill(pid, signal.SIGCONT)
            ended = await bench.end(fence)
            assert isinstance(ended, Exited)
            assert (ended.exit_code, ended.stopped) == (137, shim.ISOLATED)
            assert ended.ended_at < time.time() - shim.now() + until + shim.ISOLATED_GRACE_SECONDS, "it was given time"

    asyncio.run(story())


@pytest.mark.parametrize("text", [None, b"", b"12", b"soon soon", shim.valid_text(0.0), b"99999999 99999998"])
def test_nothing_starts_that_no_moment_allows(tmp_path: Path, text: bytes | None) -> None:
    async def story() -> None:
        async with Bench(tmp_path) as bench:
            fence = bench.prepare(1, SLEEP, until_valid=True)
            if text is not None:
                (bench.attempts.folder(fence) / shim.VALID).write_bytes(text)
            with pytest.raises(SpawnFailed, match="has run out"):
                await bench.spawn(fence)
            assert bench.attempts.inspect(fence) == Unstarted()

    asyncio.run(story())


def test_the_moment_is_written_in_place_and_through_no_link(tmp_path: Path) -> None:
    files = Attempts(tmp_path / "attempts")
    files.keep(fence_of(1), 5.0)  # its folder is gone: nothing to keep
    folder = files.create(claimed(1))
    files.keep(fence_of(1), 5.0)
    before = (folder / shim.VALID).stat()
    files.keep(fence_of(1), 123456.789)
    after = (folder / shim.VALID).stat()
    assert (before.st_ino, before.st_size) == (after.st_ino, after.st_size)
    assert (folder / shim.VALID).read_bytes() == shim.valid_text(123456.789)
    (folder / shim.VALID).unlink()
    (folder / shim.VALID).symlink_to(tmp_path / "victim")
    with pytest.raises(StoreError):
        files.keep(fence_of(1), 5.0)
    assert not (tmp_path / "victim").exists()


@pytest.mark.parametrize("isolation", Isolation)
def test_only_a_task_that_asks_for_it_is_watched_so(tmp_path: Path, isolation: Isolation) -> None:
    claim = claimed(1, isolation=isolation.value)
    launch = launch_for(
        claim, Attempts(tmp_path), python="", gpus=(), home=tmp_path, peer_name="ada", environ={}
    )  # fmt: skip
    assert launch.until_valid == (isolation is Isolation.STOP)


def test_a_task_stopped_for_want_of_grants_was_released_and_is_not_to_blame() -> None:
    assert worker.ISOLATED == shim.ISOLATED
    ended = Exited(exit_code=143, signal=15, stopped=shim.ISOLATED, started_at=1.0, ended_at=2.0)
    outcome = outcome_of(claimed(1), ended, "")
    assert (outcome.kind, outcome.blameless) == (EndKind.RELEASED, True)
    assert outcome.reason == "stopped: its machine was cut off from the majority of its voters"
    told = outcome_of(claimed(1), replace(ended, exit_code=0), "cancelled")
    assert told.kind is EndKind.CANCELLED, "the agent knew a better reason"
