"""The attempts' folders: made once, found again, cleared, expired, and safe against what is planted in them."""

import asyncio
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshq.errors import StoreError
from meshq.exec import attempts as module
from meshq.exec import shim
from meshq.exec.attempts import Attempts, Found, Unstarted, remove
from meshq.exec.worker import Exited, Vanished
from tests.exec.bench import Bench, claimed, fence_of, wait_gone


def test_an_attempt_is_made_once(tmp_path: Path) -> None:
    files = Attempts(tmp_path / "attempts")
    folder = files.create(claimed(1))
    assert folder.stat().st_mode & 0o777 == 0o700
    with pytest.raises(StoreError, match="exists"):
        files.create(claimed(1))


def test_a_name_that_is_no_fence_makes_no_path(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        Attempts(tmp_path).folder("../../etc")  # type: ignore[arg-type]  # what the test is about


def test_the_temporary_folder_leaves_room_for_the_sockets_of_multiprocessing(tmp_path: Path) -> None:
    home = Path("/home/a-user-with-a-long-name/.local/share/meshq")
    socket = Attempts(home / "attempts").tmp(fence_of(10**17)) / "pymp-abcdefgh" / "listener-abcdefgh"
    assert len(str(socket)) <= 107
    assert len({Attempts(tmp_path).tmp(fence_of(number)) for number in range(1, 1000)}) == 999


def test_a_scan_finds_what_was_not_reported(tmp_path: Path) -> None:
    async def story() -> None:
        async with Bench(tmp_path) as bench:
            files = bench.attempts
            for number in (1, 2):
                await bench.run(bench.prepare(number))
            files.mark_reported(fence_of(1))
            files.mark_reported(fence_of(1))
            files.create(claimed(3))
            lost = bench.prepare(4)
            await bench.run(lost)
            (files.folder(lost) / shim.EXIT).unlink()
            second, third, fourth = files.scan()
            assert (second.claimed, type(second.state)) == (claimed(2), Exited)
            assert third == Found(claimed=claimed(3), state=Unstarted())
            assert fourth == Found(claimed=claimed(4), state=Vanished())
            assert files.scan() == [second, third, fourth]

    asyncio.run(story())


def test_nothing_at_all_is_no_error(tmp_path: Path) -> None:
    files = Attempts(tmp_path / "none")
    assert files.scan() == []
    assert files.expire(0.0) == []
    files.mark_reported(fence_of(1))
    files.clear(fence_of(1))


def test_a_folder_whose_claim_is_damaged_is_not_adopted_but_expires(tmp_path: Path) -> None:
    files = Attempts(tmp_path)
    (files.create(claimed(1)) / module.CLAIMED).write_bytes(b"\xc1")
    assert files.scan() == []
    assert files.expire(2.0**40) == [fence_of(1)]


def test_what_runs_under_a_claim_that_cannot_be_read_is_ended_since_nobody_answers_for_it(tmp_path: Path) -> None:
    async def story() -> None:
        async with Bench(tmp_path) as bench:
            fence = bench.prepare(1, "import signal; print('up', flush=True); signal.pause()")
            pid = await bench.spawn(fence)
            await bench.line(fence, "up")
            (bench.attempts.folder(fence) / module.CLAIMED).write_bytes(b"\xc1")
            assert await asyncio.to_thread(bench.attempts.scan) == []
            wait_gone(pid)

    asyncio.run(story())


def test_a_damaged_exit_counts_as_vanished(tmp_path: Path) -> None:
    async def story() -> None:
        async with Bench(tmp_path) as bench:
            fence = bench.prepare(1)
            await bench.run(fence)
            (bench.attempts.folder(fence) / shim.EXIT).write_text("{}")
            assert bench.attempts.inspect(fence) == Vanished()

    asyncio.run(story())


def test_a_pid_of_another_boot_is_never_trusted(tmp_path: Path) -> None:
    async def story() -> None:
        async with Bench(tmp_path) as bench:
            fence = bench.prepare(1, "import signal; signal.pause()")
            await bench.spawn(fence)
            lock = bench.attempts.folder(fence) / shim.LOCK
            mine = lock.read_text()
            lock.write_text(mine.replace(shim.boot_id(), "another-boot"))
            assert bench.attempts.inspect(fence) == Vanished()
            lock.write_text(f"{os.getpid()} 1 {shim.boot_id()}\n")
            assert bench.attempts.shim_pid(fence) is None, "the ticks are another process's"
            lock.write_text(mine)
            bench.attempts.signal(fence, b"kill")
            await bench.end(fence)

    asyncio.run(story())


def test_a_planted_control_file_is_not_written_to(tmp_path: Path) -> None:
    files = Attempts(tmp_path / "attempts")
    folder = files.create(claimed(1))
    (tmp_path / "victim").write_text("x")
    (folder / shim.CTL).symlink_to(tmp_path / "victim")
    assert not files.signal(fence_of(1), b"kill")
    (folder / shim.CTL).unlink()
    (folder / shim.CTL).write_text("")
    assert not files.signal(fence_of(1), b"kill")
    assert (tmp_path / "victim").read_text() == "x"


def test_clearing_keeps_the_log_and_the_outputs(tmp_path: Path) -> None:
    files = Attempts(tmp_path)
    folder = files.create(claimed(1))
    (folder / shim.LOG).write_text("log")
    (files.outputs(fence_of(1)) / "model").touch()
    (files.work(fence_of(1)) / "data").touch()
    files.clear(fence_of(1))
    assert sorted(path.name for path in folder.iterdir()) == [module.CLAIMED, shim.LOG, module.OUTPUTS]
    assert not files.tmp(fence_of(1)).exists()


def test_attempts_expire_by_age_and_by_number_once_they_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEEP_MAX", 2)
    files = Attempts(tmp_path)
    for number, age in ((1, 0.0), (2, 10.0), (3, 20.0), (4, module.KEEP_SECONDS + 1), (5, 10**9)):
        folder = files.create(claimed(number))
        if number != 5:
            files.mark_reported(fence_of(number))
            os.utime(folder / module.REPORTED, (2e9 - age, 2e9 - age))
    assert files.expire(2e9) == [fence_of(3), fence_of(4)]
    assert [path.name for path in sorted(tmp_path.glob("1.*"))] == [fence_of(number) for number in (1, 2, 5)]


@pytest.fixture
def ordinary_folder() -> Iterator[Path]:
    """A folder of an ordinary user, whom permissions bind; the test is that user meanwhile."""
    with tempfile.TemporaryDirectory() as name:
        if os.geteuid() != 0:
            yield Path(name)
            return
        os.chown(name, 65534, 65534)
        os.seteuid(65534)
        try:
            yield Path(name)
        finally:
            os.seteuid(0)


def test_what_a_task_made_unwritable_is_removed_and_links_are_not_followed(ordinary_folder: Path) -> None:
    (ordinary_folder / "outside").mkdir()
    (ordinary_folder / "outside" / "keep").touch()
    inner = ordinary_folder / "work" / "a" / "b"
    inner.mkdir(parents=True)
    (inner / "file").touch()
    (ordinary_folder / "work" / "link").symlink_to(ordinary_folder / "outside")
    inner.chmod(0o500)
    inner.parent.chmod(0o000)
    remove(ordinary_folder / "work")
    assert not (ordinary_folder / "work").exists()
    assert (ordinary_folder / "outside" / "keep").exists()
