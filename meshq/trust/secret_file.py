"""Small files that only their owner may read: the mesh key, the identity, the control cookie.

A secret appears whole or not at all (written beside its name, fsynced, then linked or renamed), is never followed through
a symlink, and is refused when others could have read it. Standard library only: the command line reads the cookie with it.
"""

import os
import secrets
import stat
from pathlib import Path

from meshq.durable import sync_folder
from meshq.errors import StoreError, UsageError

OWNER_ONLY = 0o600
OWNER_AND_GROUP = 0o640


def create(path: Path, data: bytes) -> None:
    """Write a secret that must not exist yet. FileExistsError if it does: it is left as it is."""
    beside = _write_beside(path, data, OWNER_ONLY, None)
    try:
        os.link(beside, path)  # unlike rename, this never replaces
    except FileExistsError:
        raise
    except OSError as error:
        raise _cannot_write(path, error) from None
    finally:
        beside.unlink()
    sync_folder(path.parent)


def replace(path: Path, data: bytes, group: int | None = None) -> None:
    """Write a secret, whether or not there was one. With `group` (a gid) its members may read it too."""
    beside = _write_beside(path, data, OWNER_ONLY if group is None else OWNER_AND_GROUP, group)
    try:
        beside.replace(path)
    except OSError as error:
        beside.unlink()
        raise _cannot_write(path, error) from None
    sync_folder(path.parent)


def read(path: Path, what: str, bytes_max: int) -> bytes:
    """The secret. FileNotFoundError if there is none; UsageError if it is not ours alone, no file, or too long."""
    try:
        # O_NONBLOCK: opening a FIFO that somebody put here must not hang.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UsageError(f"cannot read the {what} {path}: {error.strerror}", "name the file itself, no symlink") from None
    with os.fdopen(fd, "rb") as file:
        _check_private(os.fstat(fd), path, what)
        data = file.read(bytes_max + 1)
    if len(data) > bytes_max:
        raise UsageError(f"the {what} {path} is longer than {bytes_max} bytes, so it is something else")
    return data


def _check_private(status: os.stat_result, path: Path, what: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"the {what} {path} is no regular file")
    if status.st_uid not in (os.geteuid(), 0):
        raise UsageError(f"the {what} {path} belongs to user id {status.st_uid}, who may change it", "use a file of your own")
    if status.st_mode & 0o077:
        raise UsageError(
            f"the {what} {path} can be read or changed by others (mode {stat.S_IMODE(status.st_mode):04o})",
            f"chmod 600 {path}   # and if others may have read it, change the key: meshq key install",
        )


def _write_beside(path: Path, data: bytes, mode: int, group: int | None) -> Path:
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, OWNER_ONLY)
    except OSError as error:
        raise _cannot_write(path, error) from None
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            if group is not None:
                os.fchown(fd, -1, group)
            os.fchmod(fd, mode)  # last, so that the group is never given more than the finished file
            file.flush()
            os.fsync(fd)
    except OSError as error:
        beside.unlink()
        raise _cannot_write(path, error) from None
    return beside


def _cannot_write(path: Path, error: OSError) -> StoreError:
    return StoreError(f"cannot write {path}: {error.strerror}", "check free space and permissions of the folder")
