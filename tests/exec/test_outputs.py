"""Outputs are listed and opened without following anything that user code may have planted."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from meshq import config
from meshq.errors import TaskFailed
from meshq.exec import outputs
from meshq.task import OutputFile


def file_of(path: str, data: bytes) -> OutputFile:
    return OutputFile(path=path, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def test_plain_files_are_listed_by_path_with_size_and_hash(tmp_path: Path) -> None:
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / "b" / "c" / "deep").write_bytes(b"deep")
    (tmp_path / "b.txt").write_bytes(b"")
    (tmp_path / "a").write_bytes(b"model")
    listing = outputs.list_outputs(tmp_path)
    assert listing.files == (file_of("a", b"model"), file_of("b.txt", b""), file_of("b/c/deep", b"deep"))
    assert listing.skipped == 0


def test_links_special_files_and_odd_names_are_skipped_and_counted(tmp_path: Path) -> None:
    inside = tmp_path / "outputs"
    inside.mkdir()
    (tmp_path / "secret").write_text("SECRET")
    (inside / "file").write_bytes(b"x")
    (inside / "link").symlink_to(tmp_path / "secret")
    (inside / "folder").symlink_to(tmp_path)
    os.mkfifo(inside / "fifo")
    Path(os.fsdecode(os.fsencode(inside) + b"/\xff")).write_bytes(b"x")
    listing = outputs.list_outputs(inside)
    assert listing.files == (file_of("file", b"x"),)
    assert listing.skipped == 4


def test_a_folder_that_is_a_link_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "outputs").symlink_to(tmp_path / "real")
    with pytest.raises(OSError, match=r"Not a directory|symbolic"):
        outputs.list_outputs(tmp_path / "outputs")
    with pytest.raises(TaskFailed):
        outputs.open_output(tmp_path / "outputs", "x")


def test_more_files_or_deeper_folders_than_allowed_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "OUTPUT_FILES_MAX", 3)
    for number in range(5):
        (tmp_path / str(number)).touch()
    deep = tmp_path / "/".join(["d"] * (outputs.DEPTH_MAX + 1))
    deep.mkdir(parents=True)
    (deep / "file").touch()
    listing = outputs.list_outputs(tmp_path)
    assert len(listing.files) == 3
    assert listing.skipped == 3


def by_steps(folder: Path, path: str) -> int:
    """As on a kernel without openat2."""
    root = os.open(folder, os.O_RDONLY)
    try:
        return outputs._open_by_steps(root, path)
    finally:
        os.close(root)


@pytest.mark.parametrize("open_output", [outputs.open_output, by_steps])
def test_an_output_is_opened_by_its_path(tmp_path: Path, open_output: Callable[[Path, str], int]) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_bytes(b"data")
    with open(open_output(tmp_path, "a/b/c"), "rb") as file:
        assert file.read() == b"data"


@pytest.mark.parametrize("open_output", [outputs.open_output, by_steps])
@pytest.mark.parametrize("path", ["link", "folder/secret", "missing", "plain/x"])
def test_no_link_is_followed_anywhere_on_the_way(tmp_path: Path, open_output: Callable[[Path, str], int], path: str) -> None:
    inside = tmp_path / "outputs"
    inside.mkdir()
    (tmp_path / "secret").write_text("SECRET")
    (inside / "plain").touch()
    (inside / "link").symlink_to("../secret")
    (inside / "folder").symlink_to("..")
    with pytest.raises((TaskFailed, OSError)):
        open_output(inside, path)


@pytest.mark.parametrize("path", ["", "/etc/passwd", "..", "../secret", "a/../../secret", "a\0b", "fifo", "folder"])
def test_a_path_that_names_no_plain_file_inside_is_refused(tmp_path: Path, path: str) -> None:
    inside = tmp_path / "outputs"
    (inside / "folder").mkdir(parents=True)
    (tmp_path / "secret").write_text("SECRET")
    os.mkfifo(inside / "fifo")
    with pytest.raises(TaskFailed):
        outputs.open_output(inside, path)
