"""The store of submitted sources: git objects in a bare repository, durable before anybody is told that they are here.

An object is a file under its own hash, so the same content is stored once, and whatever comes in is checked by naming it
again. `put` returns only when its objects survive a power cut: contents are synced under temporary names, renamed,
and then the folders are synced. Objects become visible in one short locked step, so that `missing` never vouches for a
file whose name is not durable yet.

Loose objects are read and written here, because a submit has three of them and they are in its critical path; if somebody
packs the repository (`git gc`), dulwich reads the packs. dulwich is imported only then: it costs an idle agent 9 MB.
"""

import contextlib
import os
import secrets
import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from meshq import config, gitobjects
from meshq.durable import sync_folder, write_synced
from meshq.errors import MalformedData, StoreError
from meshq.gitobjects import BLOB, COMMIT, KIND_NAMES, TREE, decode_frames, encode_frame, object_id
from meshq.ids import ObjectId, is_object_id

if TYPE_CHECKING:
    from dulwich.object_store import DiskObjectStore
    from dulwich.objects import ObjectID

__all__ = ["BLOB", "COMMIT", "TREE", "ObjectStore", "decode_frames", "encode_frame"]

COMPRESSION: Final = 1  # zlib's fastest: sources are small, and waiting for them costs more than the disk they take
UNUSED_SECONDS_MIN: Final = 24 * 3600.0  # an upload and the task that needs it are minutes apart at most
OPEN_FILES_MAX: Final = 256  # objects that are written before they are synced together
KINDS_BY_NAME: Final = {name: kind for kind, name in KIND_NAMES.items()}


class ObjectStore:
    """The objects below `path`, which is made if it is not there. For any number of threads of one process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._objects = path / "objects"
        self._visible = threading.Lock()  # held while names appear and become durable
        self._complete: set[ObjectId] = set()  # commits known to be here as a whole; emptied by `discard_unused`
        self._packing = threading.Lock()  # dulwich reads packs by seeking in shared files
        self._packed: DiskObjectStore | None = None
        if not (self._path / "config").exists():
            self._create()

    def close(self) -> None:
        """Close the packs; the store stays usable and opens them again."""
        with self._packing:
            if self._packed is not None:
                self._packed.close()
                self._packed = None

    def missing(self, ids: Iterable[ObjectId]) -> list[ObjectId]:
        """Those of `ids` that are not here. The others are kept for a day from now on, so a sender may rely on them."""
        with self._visible:
            return [each for each in ids if not self._touch(each)]

    def put(self, frames: Iterable[tuple[int, bytes]]) -> int:
        """Store these objects durably; the answer is how many came.

        MalformedData if one breaks the format, StoreError if the disk refuses or is nearly full; those before it may be here
        then.
        """
        config.check_room(self._path, "storing files of a task")
        count = 0
        batch: dict[ObjectId, bytes] = {}
        for kind, content in frames:
            count += 1
            each = _checked(kind, content)
            batch[each] = b"%s %d\0%s" % (KIND_NAMES[kind], len(content), content)
            if len(batch) >= OPEN_FILES_MAX:
                self._write(batch)
                batch.clear()
        self._write(batch)
        return count

    def get(self, ids: Iterable[ObjectId]) -> Iterator[tuple[int, bytes]]:
        """Kind and content of those of `ids` that are here, in this order."""
        for each in ids:
            with contextlib.suppress(KeyError):
                yield self._read(each)

    def read(self, wanted: ObjectId, kind: int) -> bytes:
        """The content of one object. StoreError if it is not here or damaged; MalformedData if it is of another kind."""
        try:
            found, content = self._read(wanted)
        except KeyError:
            raise StoreError(f"the object {wanted} is not in {self._path}") from None
        if found != kind:
            raise MalformedData(f"the object {wanted} is no {KIND_NAMES[kind].decode()}")
        return content

    def reachable(self, commit: ObjectId) -> list[ObjectId]:
        """The commit and everything below it, each once, folders before what they hold. StoreError if a folder is missing."""
        return [each for each, _ in self._walk(commit)]

    def wanted(self, commit: ObjectId) -> list[ObjectId]:
        """What is known to belong to the commit and is not here. Empty: the commit is complete."""
        wanted: list[ObjectId] = []
        for each, present in self._walk(commit, tolerant=True):
            if not present:
                wanted.append(each)
        if not wanted:
            self._complete.add(commit)
        return wanted

    def complete(self, commit: ObjectId) -> bool:
        """Is everything that belongs to the commit here?"""
        return commit in self._complete or not self.wanted(commit)

    def discard_unused(self, used: Iterable[ObjectId], now: float | None = None) -> int:
        """Remove loose objects that no commit in `used` needs and that nobody asked for or stored within a day.

        `now` is wall-clock seconds, as file times are. The answer is how many went.
        """
        before = (time.time() if now is None else now) - UNUSED_SECONDS_MIN
        keep = {each for commit in used for each, _ in self._walk(commit, tolerant=True)}
        removed = 0
        with self._visible:
            self._complete.clear()
            for file in self._objects.glob("??/*"):
                name = ObjectId(file.parent.name + file.name)
                if name not in keep and file.stat().st_mtime < before:
                    file.unlink()
                    removed += 1
        return removed

    def _walk(self, commit: ObjectId, tolerant: bool = False) -> Iterator[tuple[ObjectId, bool]]:
        """Each object of the commit with whether it is here; without `tolerant`, a missing folder is a StoreError."""
        seen: set[ObjectId] = set()
        left: list[tuple[ObjectId, int]] = [(commit, COMMIT)]
        while left:
            each, kind = left.pop()
            if each in seen:
                continue
            seen.add(each)
            present = self._has(each)
            yield each, present
            if kind != BLOB and (present or not tolerant):
                left += reversed(_below(kind, self.read(each, kind)))

    def _has(self, wanted: ObjectId) -> bool:
        return self._file(wanted).exists() or self._in_pack(wanted)

    def _touch(self, wanted: ObjectId) -> bool:
        try:
            os.utime(self._file(wanted))
        except FileNotFoundError:
            return self._in_pack(wanted)
        return True

    def _read(self, wanted: ObjectId) -> tuple[int, bytes]:
        """KeyError if it is not here; StoreError if what is here is not what its name says."""
        try:
            data = zlib.decompress(self._file(wanted).read_bytes())
        except FileNotFoundError:
            return self._read_packed(wanted)
        except (OSError, zlib.error) as error:
            raise StoreError(f"cannot read the object {wanted} in {self._path}: {error}") from None
        header, _, content = data.partition(b"\0")
        kind = KINDS_BY_NAME.get(header.split(b" ")[0], 0)
        if kind == 0 or object_id(kind, content) != wanted:
            raise StoreError(f"the object {wanted} in {self._path} is damaged", f"remove {self._file(wanted)}")
        return kind, content

    def _write(self, batch: dict[ObjectId, bytes]) -> None:
        """Write whole objects (header and content) that are not here yet, and make them durable."""
        new = {each: data for each, data in batch.items() if not self._touch(each)}
        written: list[tuple[Path, Path]] = []
        try:
            for each, data in new.items():
                target = self._file(each)
                target.parent.mkdir(exist_ok=True)
                temporary = target.parent / f"new-{secrets.token_hex(8)}"
                written.append((temporary, target))
                write_synced(temporary, zlib.compress(data, COMPRESSION))
            with self._visible:  # also waits until objects that another thread is showing just now are durable
                for temporary, target in written:
                    temporary.replace(target)
                for folder in sorted({target.parent for _, target in written}):
                    sync_folder(folder)
        except OSError as error:
            for temporary, _ in written:
                temporary.unlink(missing_ok=True)
            raise StoreError(f"cannot store objects in {self._path}: {error.strerror or error}") from None

    def _file(self, wanted: ObjectId) -> Path:
        assert is_object_id(wanted), f"not an object id: {wanted!r}"  # ids come from decoders; a path never gets here
        return self._objects / wanted[:2] / wanted[2:]

    def _create(self) -> None:
        """An empty bare repository, with all 256 folders, so that a put never has to sync their parent."""
        for folder in (self._objects / "pack", self._objects / "info", self._path / "refs" / "heads"):
            folder.mkdir(parents=True, exist_ok=True)
        for number in range(256):
            (self._objects / f"{number:02x}").mkdir(exist_ok=True)
        (self._path / "HEAD").write_text("ref: refs/heads/main\n")
        sync_folder(self._objects)
        write_synced(self._path / "config", b"[core]\n\trepositoryformatversion = 0\n\tbare = true\n")
        sync_folder(self._path)
        sync_folder(self._path.parent)

    def _packs(self) -> "DiskObjectStore | None":
        if self._packed is None and any((self._objects / "pack").glob("*.idx")):
            from dulwich.object_store import DiskObjectStore

            self._packed = DiskObjectStore(str(self._objects))
        return self._packed

    def _in_pack(self, wanted: ObjectId) -> bool:
        with self._packing:
            packs = self._packs()
            return packs is not None and packs.contains_packed(_dulwich_id(wanted))

    def _read_packed(self, wanted: ObjectId) -> tuple[int, bytes]:
        with self._packing:
            packs = self._packs()
            if packs is None:
                raise KeyError(wanted)
            number, content = packs.get_raw(_dulwich_id(wanted))  # git's own numbers are 1 commit, 2 tree, 3 blob, too
            return number, bytes(content)


def _below(kind: int, content: bytes) -> list[tuple[ObjectId, int]]:
    """What a commit or tree points at; another repository's commit is not part of it."""
    if kind == COMMIT:
        return [(gitobjects.decode_commit(content), TREE)]
    return [
        (entry.id, TREE if entry.mode == gitobjects.MODE_FOLDER else BLOB)
        for entry in gitobjects.decode_tree(content)
        if entry.mode != gitobjects.MODE_REPOSITORY
    ]


def _checked(kind: int, content: bytes) -> ObjectId:
    """The id of an object that somebody sent. MalformedData if it can't be what it says."""
    if kind not in KIND_NAMES:
        raise MalformedData(f"an object of kind {kind}, which does not exist")
    if len(content) > config.SOURCE_FILE_BYTES_MAX:
        raise MalformedData(f"an object of {len(content)} bytes where at most {config.SOURCE_FILE_BYTES_MAX} are allowed")
    if kind != BLOB:
        _below(kind, content)
    return object_id(kind, content)


def _dulwich_id(wanted: ObjectId) -> "ObjectID":
    from dulwich.objects import ObjectID

    return ObjectID(wanted.encode("ascii"))
