"""The lock of a GPU: one task of the machine has it, whichever agent started it."""

import os
from pathlib import Path

import pytest

from meshq.exec import gpulock


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, ...]:
    return (str(tmp_path / "missing"), str(tmp_path))


def test_who_has_the_lock_keeps_everybody_else_out_until_it_is_closed(folders: tuple[str, ...]) -> None:
    held = gpulock.take("GPU-1", folders)
    assert held is not None
    assert not gpulock.is_free("GPU-1", folders)
    assert gpulock.is_free("GPU-2", folders)
    with pytest.raises(BlockingIOError):
        gpulock.take("GPU-1", folders)
    os.close(held)
    assert gpulock.is_free("GPU-1", folders)


def test_looking_takes_nothing(folders: tuple[str, ...]) -> None:
    assert gpulock.is_free("GPU-1", folders)
    held = gpulock.take("GPU-1", folders)
    assert held is not None
    os.close(held)


def test_the_lock_goes_with_the_process_that_has_it(folders: tuple[str, ...]) -> None:
    pid = os.fork()
    if pid == 0:
        gpulock.take("GPU-1", folders)
        os.kill(os.getpid(), 9)
    os.waitpid(pid, 0)
    assert gpulock.is_free("GPU-1", folders)


def test_a_link_in_its_place_is_not_followed_and_odd_names_stay_inside(tmp_path: Path) -> None:
    (tmp_path / "meshq-gpu-GPU-1.lock").symlink_to(tmp_path / "victim")
    assert gpulock.take("GPU-1", (str(tmp_path),)) is None
    held = gpulock.take("../x/y", (str(tmp_path),))
    assert held is not None
    os.close(held)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meshq-gpu----x-y.lock", "meshq-gpu-GPU-1.lock"]


def test_without_a_place_for_locks_every_gpu_is_free(tmp_path: Path) -> None:
    assert gpulock.take("GPU-1", (str(tmp_path / "missing"),)) is None
    assert gpulock.is_free("GPU-1", (str(tmp_path / "missing"),))
