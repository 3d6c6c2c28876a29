"""What the agent does to its own process before it trusts anybody, and what it asks of those who connect.

`PR_SET_DUMPABLE 0` makes `/proc/<agent>/environ`, `mem` and `fd` root's, so no other process of the same user (a task is
one) reads the mesh key there. It has to come before the key is read. Removing `MESHQ_KEY` from `os.environ` keeps it from
children; the block of memory that the kernel gave the process still holds it, which is why the first step matters.
"""

import ctypes
import functools
import os
import pwd
import resource
import socket
import struct
import time
from collections.abc import MutableMapping
from typing import Final, Protocol

FILES_WANTED: Final = 65_536  # more than any limit in config needs; a kernel may offer 10^9
_PR_SET_DUMPABLE: Final = 4
_CREDENTIALS: Final = struct.Struct("=iII")  # struct ucred: pid, uid, gid
_GROUPS_KEPT_SECONDS: Final = 60.0


class _HasOptions(Protocol):
    """A socket, or asyncio's view of one."""

    def getsockopt(self, level: int, option: int, size: int, /) -> bytes: ...


def harden() -> list[str]:
    """Close this process to others of its user and let it have many files. Returns warnings for people."""
    warnings = []
    if not hide_process():
        warnings.append("this kernel lets tasks look into the agent's memory (PR_SET_DUMPABLE failed)")
    raise_file_limit()
    if os.geteuid() == 0:
        warnings.append("the agent runs as root: so does every task that any member submits; better join as a plain user")
    return warnings


def hide_process() -> bool:
    """Make this process undumpable; whether that worked. A program that it starts is dumpable again."""
    result: int = ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    return result == 0


def raise_file_limit() -> int:
    """Raise the limit of open files as far as it may be raised; returns what it is then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES_WANTED if hard == resource.RLIM_INFINITY else min(hard, FILES_WANTED)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def forget_settings(environ: MutableMapping[str, str] = os.environ) -> None:
    """Remove every `MESHQ_*` once it has been read: no child inherits the key or the home."""
    for name in [name for name in environ if name.startswith("MESHQ_")]:
        del environ[name]


def peer_credentials(connection: _HasOptions) -> tuple[int, int, int]:
    """(pid, uid, gid) of the process that connected to our Unix socket, as the kernel noted them."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(raw)
    return pid, uid, gid


def may_connect(uid: int, own_uid: int, group: int | None) -> bool:
    """Whether this user may use the agent of `own_uid`: itself, root, and the members of `group` (a gid)."""
    if uid in (own_uid, 0):
        return True
    return group is not None and group in _groups_of(uid, int(time.monotonic() / _GROUPS_KEPT_SECONDS))


@functools.lru_cache(maxsize=256)
def _groups_of(uid: int, _minute: int) -> frozenset[int]:
    """Kept for a minute, since this may ask a directory server."""
    try:
        user = pwd.getpwuid(uid)
        return frozenset(os.getgrouplist(user.pw_name, user.pw_gid))
    except (KeyError, OSError):
        return frozenset()


@functools.lru_cache(maxsize=256)
def user_name(uid: int) -> str:
    """The user's name for `submitted_by`; the number where it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
