"""A disk that forgets what was not synced when the power fails: SQLite's files by a VFS of apsw, all others by `os.fsync`.

The files are real ones, and say what a running process sees. Beside them the disk remembers what of them is durable, and what
was written since. At the cut, of each file either nothing of that survives, or a part of it in the order of writing, or any
part; the last write of what survives may be torn in its middle. A name that was made, changed or deleted since its folder was
synced may be the old or the new one. So the disk does all that a file system may do, and more than one that orders its writes.
"""

import os
import sqlite3
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import apsw

_SYNCED_WITH_THEIR_FOLDER = apsw.SQLITE_OPEN_WAL | apsw.SQLITE_OPEN_MAIN_JOURNAL  # by SQLite's own VFS, at the first sync
_NAMES = iter(range(2**31))


class PowerCut(BaseException):
    """The process is gone: no `except Exception` may see this."""


@dataclass(slots=True)
class _File:
    """What is durable of a file, and the writes (where, what) and truncations (to where) since, in their order."""

    durable: bytes = b""
    pending: list[tuple[int, bytes] | int] = field(default_factory=list)

    def sync(self) -> None:
        self.durable, self.pending = _after(self.durable, self.pending), []

    def survive(self, rng: Random) -> None:
        """Forget some of what is not durable, or nothing, or all."""
        kept = list(self.pending)
        match rng.choice(("nothing", "beginning", "any", "all")):
            case "nothing":
                kept = []
            case "beginning":
                kept = kept[: rng.randint(0, len(kept))]
            case "any":
                kept = [each for each in kept if rng.random() < 0.5]
            case _:
                pass
        if kept and isinstance(last := kept[-1], tuple) and rng.random() < 0.5:
            kept[-1] = (last[0], last[1][: rng.randrange(len(last[1]) + 1)])
        self.durable, self.pending = _after(self.durable, kept), []


def _after(content: bytes, changes: Iterable[tuple[int, bytes] | int]) -> bytes:
    data = bytearray(content)
    for change in changes:
        if isinstance(change, int):
            del data[change:]
            data.extend(bytes(change - len(data)))
        else:
            offset, written = change
            data.extend(bytes(max(0, offset - len(data))))
            data[offset : offset + len(written)] = written
    return bytes(data)


class ForgetfulDisk:
    """One folder. `steps` counts whatever may be interrupted; the power fails after `steps_left` more of them."""

    def __init__(self, folder: Path, rng: Random, honest: bool = True) -> None:
        """Not `honest`: SQLite never asks for a sync."""
        self.folder = folder
        self.steps = 0
        self.steps_left: int | None = None
        self.dark = False
        self._rng = rng
        self._honest = honest
        self._names: dict[str, _File] = {}
        self._durable_names: dict[str, _File] = {}
        self._connections: list[apsw.Connection] = []
        self._vfs = _Vfs(self)

    def connect(self, file: Path) -> "ForgetfulConnection":
        """For `Store.open`."""
        self.check()
        connection = apsw.Connection(str(file), vfs=self._vfs.vfs_name)
        self._connections.append(connection)
        return ForgetfulConnection(self, connection, honest=self._honest)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Also what Python itself does to files of the folder."""
        fsync, replace = os.fsync, os.replace

        def watched_fsync(descriptor: int) -> None:
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            if self.folder not in (path, path.parent):
                fsync(descriptor)
            elif stat.S_ISDIR(os.fstat(descriptor).st_mode):
                self.step(self.sync_names)
            else:
                self._see_strangers()
                self.step(self.file(path.name).sync)

        def watched_replace(source: Any, target: Any) -> None:
            if Path(target).parent != self.folder:
                return replace(source, target)

            def rename() -> None:
                replace(source, target)
                self._names[Path(target).name] = self._names.pop(Path(source).name)

            self._see_strangers()
            return self.step(rename)

        with mock.patch("os.fsync", watched_fsync), mock.patch("os.replace", watched_replace):
            yield

    def cut(self) -> None:
        """The power is gone, and comes back."""
        self.dark = True
        for connection in self._connections:
            with suppress(apsw.Error):  # it would like to write something at the end
                connection.close(True)
        self._connections = []
        self._see_strangers()
        names = dict(self._durable_names)
        for name in {**self._names, **self._durable_names}:
            if self._names.get(name) is not self._durable_names.get(name) and self._rng.random() < 0.5:
                names.pop(name, None)
                if name in self._names:
                    names[name] = self._names[name]
        for file in {id(file): file for file in names.values()}.values():
            file.survive(self._rng)
        self._names, self._durable_names = dict(names), dict(names)
        for path in list(self.folder.iterdir()):
            if path.name not in names:
                path.unlink()
        for name, file in names.items():
            with (self.folder / name).open("r+b" if (self.folder / name).exists() else "wb") as real:  # the inode stays
                real.truncate(0)
                real.write(file.durable)
        self.dark, self.steps_left = False, None

    # ---- for the VFS

    def check(self) -> None:
        if self.dark:
            raise PowerCut

    def step(self, work: Callable[[], None]) -> None:
        """Do something that may be the last."""
        self.check()
        self.steps += 1
        if self.steps_left is not None:
            self.steps_left -= 1
            if self.steps_left < 0:
                self.dark = True
                raise PowerCut
        work()

    def file(self, name: str) -> _File:
        return self._names.setdefault(name, _File())

    def forget(self, name: str) -> None:
        self._names.pop(name, None)

    def sync_names(self) -> None:
        self._see_strangers()
        self._durable_names = dict(self._names)

    # ---- inside

    def _see_strangers(self) -> None:
        """Files that Python has written, which tell nobody of it. Nothing of them is durable unless they are synced."""
        for path in self.folder.iterdir():
            if path.name not in self._names and not path.name.endswith("-shm"):
                self._names[path.name] = _File(pending=[(0, path.read_bytes())])
            elif path.suffix == ".new" and not (known := self._names[path.name]).pending and known.durable != path.read_bytes():
                known.pending = [0, (0, path.read_bytes())]


class _Vfs(apsw.VFS):
    def __init__(self, disk: ForgetfulDisk) -> None:
        self._disk = disk
        self.vfs_name = f"forgetful-{next(_NAMES)}"
        super().__init__(self.vfs_name, "unix")

    def xOpen(self, name: Any, flags: list[int]) -> Any:
        return _VfsFile(self._disk, name, flags)

    def xDelete(self, filename: str, syncdir: bool) -> None:
        def delete() -> None:
            self._disk.forget(Path(filename).name)
            if syncdir:
                self._disk.sync_names()

        _or_fail(lambda: self._disk.step(delete))
        super().xDelete(filename, False)


class _VfsFile(apsw.VFSFile):
    def __init__(self, disk: ForgetfulDisk, name: Any, flags: list[int]) -> None:
        self._disk = disk
        super().__init__("unix", name, flags)
        path = name.filename() if isinstance(name, apsw.URIFilename) else str(name)
        self._file = disk.file(Path(path).name)
        self._with_folder = bool(flags[0] & _SYNCED_WITH_THEIR_FOLDER)

    def xWrite(self, data: Any, offset: int) -> None:
        content = bytes(data)
        _or_fail(lambda: self._disk.step(lambda: self._file.pending.append((offset, content))))
        super().xWrite(content, offset)

    def xTruncate(self, newsize: int) -> None:
        _or_fail(lambda: self._disk.step(lambda: self._file.pending.append(newsize)))
        super().xTruncate(newsize)

    def xSync(self, flags: int) -> None:
        _or_fail(lambda: self._disk.step(self._file.sync))
        if self._with_folder:
            self._disk.sync_names()
            self._with_folder = False


def _or_fail(work: Callable[[], None]) -> None:
    """SQLite must hear of a cut as of any other error; the connection turns it back."""
    try:
        work()
    except PowerCut:
        raise apsw.IOError from None


class ForgetfulConnection:
    """As `sqlite3.Connection`, as far as a `Database` needs it."""

    def __init__(self, disk: ForgetfulDisk, connection: apsw.Connection, *, honest: bool) -> None:
        self._disk = disk
        self._connection = connection
        self._honest = honest

    @property
    def in_transaction(self) -> bool:
        return bool(self._connection.in_transaction)

    def execute(self, sql: str, parameters: Any = (), /) -> Any:
        if not self._honest and sql.startswith("PRAGMA synchronous="):
            sql = "PRAGMA synchronous=OFF"
        with self._errors():
            return _Cursor(list(self._connection.execute(sql, parameters)))

    def executemany(self, sql: str, parameters: Iterable[Any], /) -> None:
        with self._errors():
            list(self._connection.executemany(sql, [tuple(each) for each in parameters]))

    def close(self) -> None:
        with suppress(apsw.Error):
            self._connection.close(True)
        self._disk.check()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        self._disk.check()
        try:
            yield
        except apsw.Error as error:
            self._disk.check()
            translated = sqlite3.OperationalError(str(error))
            translated.sqlite_errorcode = getattr(error, "extendedresult", sqlite3.SQLITE_ERROR)
            raise translated from error
        self._disk.check()


class _Cursor(list[Any]):
    def fetchall(self) -> list[Any]:
        return self

    def fetchone(self) -> Any:
        return self[0] if self else None
