"""Outputs of a task, copied to this machine: safe paths, whole files, verified digests, nothing overwritten."""

import contextlib
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from meshq.client import Client
from meshq.config import NAME_CHARS_MAX, OUTPUT_FILES_MAX, check_name
from meshq.documents import FileDocument, OutputsDocument, TaskDocument
from meshq.errors import PeerError, StoreError, TaskFailed, UsageError
from meshq.terminal import harmless


def default_folder(task: TaskDocument) -> Path:
    """`./<name>-outputs`; the id where the name is not fit for a folder."""
    try:
        name = check_name(task["name"], "name")
    except UsageError:
        name = task["id"][:NAME_CHARS_MAX]
    return Path(f"{name}-outputs")


def download(client: Client, task: str, folder: Path, report: Callable[[str], None] = lambda message: None) -> OutputsDocument:
    """Copy all outputs of the task into the folder. Files that are there already with the same content stay.

    TaskFailed, before anything is copied, if a file is in the way that differs. `report` hears what is being done.
    """
    outputs = client.outputs(task)
    files = outputs["files"]
    if len(files) > OUTPUT_FILES_MAX:
        raise TaskFailed(f"the task has {len(files)} outputs, at most {OUTPUT_FILES_MAX} can be fetched")
    places = [(file, _place(folder, file["path"])) for file in files]
    with _disk(folder):
        wanted = [(file, place) for file, place in places if not _is_there(file, place, folder)]
        for number, (file, place) in enumerate(wanted, 1):
            report(f"Fetching {harmless(file['path'])} ({number} of {len(wanted)})")
            _copy(client, task, file, place, folder)
    return outputs


def _place(folder: Path, path: str) -> Path:
    """Where the file goes. The path was made on another machine: it must not leave the folder."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or "\0" in path or any(part in ("..", ".") for part in path.split("/")):
        raise PeerError(f"refused the output `{harmless(path)}`: its path would leave the folder")
    return folder.joinpath(*parts)


def _is_there(file: FileDocument, place: Path, folder: Path) -> bool:
    """Whether the very file exists. Links inside the folder are never followed: who made them could lead us out."""
    for parent in [*place.parents][: len(place.relative_to(folder).parts) - 1]:
        if parent.is_symlink() or (parent.exists() and not parent.is_dir()):
            raise TaskFailed(f"cannot write `{place}`: `{parent}` is in the way", "give another folder with `--to`")
    if not os.path.lexists(place):
        return False
    if place.is_file() and not place.is_symlink() and _digest(place) == file["sha256"]:
        return True
    raise TaskFailed(
        f"cannot write `{place}`: something else is there already", "move it away, or give another folder with `--to`"
    )


def _digest(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _copy(client: Client, task: str, file: FileDocument, place: Path, folder: Path) -> None:
    """Write beside its place, verify, then rename: a file is there whole or not at all."""
    place.parent.mkdir(parents=True, exist_ok=True)
    part = place.parent / f".{secrets.token_hex(8)}.part"
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        digest, count = hashlib.sha256(), 0
        with os.fdopen(descriptor, "wb") as opened:
            for chunk in client.output(task, file["path"]):
                count += len(chunk)
                if count > file["bytes"]:
                    break
                digest.update(chunk)
                opened.write(chunk)
        if count != file["bytes"] or digest.hexdigest() != file["sha256"]:
            raise TaskFailed(
                f"the output `{harmless(file['path'])}` arrived damaged: {count} of {file['bytes']} bytes",
                "run the command again: other machines may have it too",
            )
        part.rename(place)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"cannot write into `{folder}`: {error.strerror or error}", "give another folder with `--to`"
        ) from None
