"""The door between the command line and its agent: a Unix socket and a cookie, both in `$MESHQ_HOME/control`.

The folder's permissions keep other users out. They don't keep a task out, which runs as the same user; what does is the
cookie, which Landlock hides from tasks. Standard library only: the command line imports this and must start fast.

An address of a Unix socket has room for 107 bytes, a home may be deeper than that. Then the socket is reached through
`/proc/self/fd/<its folder>/socket`, which is short, works for every user who may enter the folder, and needs no second
place for the socket. The socket never stands in the abstract namespace, which has no permissions.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from meshq.config import Home

SOCKET_PATH_BYTES_MAX: Final = 107  # sun_path without its final zero
COOKIE_BYTES_MAX: Final = 256
BACKLOG: Final = 128


def connect(home: Home, seconds: float | None = None) -> socket.socket:
    """A connection to the agent of this home, with this time limit for every operation.

    FileNotFoundError or ConnectionRefusedError: no agent runs. PermissionError: it is another user's.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(seconds)
        with _short_path(home) as path:
            connection.connect(path)
    except OSError:
        connection.close()
        raise
    return connection


def listen(home: Home, group: int | None = None) -> socket.socket:
    """The agent's end. Replaces what an earlier run left: call it under the home's lock only, after `prepare_home`.

    With `group` (a gid) its members may connect, too.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        home.socket.unlink(missing_ok=True)
        with _short_path(home) as path:
            listener.bind(path)
        if group is not None:
            os.chown(home.socket, -1, group, follow_symlinks=False)
        home.socket.chmod(0o600 if group is None else 0o660)
        listener.listen(BACKLOG)  # last: nobody gets in before the permissions are right
    except OSError:
        listener.close()
        raise
    return listener


def read_cookie(home: Home) -> str:
    """What to show to the agent of this home, as `Authorization: Bearer COOKIE`. The errors of `connect`."""
    fd = os.open(home.cookie, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        return file.read(COOKIE_BYTES_MAX).decode("ascii", "replace").strip()


@contextmanager
def _short_path(home: Home) -> Iterator[str]:
    path = os.fspath(home.socket)
    if len(os.fsencode(path)) <= SOCKET_PATH_BYTES_MAX:
        yield path
        return
    folder = os.open(home.socket.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{home.socket.name}"
    finally:
        os.close(folder)
