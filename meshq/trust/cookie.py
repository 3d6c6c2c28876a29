"""The home's folders and the control cookie: who of this machine may talk to the agent.

Normally that is the agent's own user. With `join --group G` it is also the members of G, who can then run code as the
agent's user; `join` says so. The cookie is new at each start.
"""

import grp
import hmac
import os
import secrets
import stat
from typing import Final

from meshq.config import Home
from meshq.errors import StoreError, UsageError
from meshq.trust import secret_file

COOKIE_BYTES: Final = 32


def prepare_home(home: Home, group: str | None = None) -> int | None:
    """Make the folders that need care, or check them: ours alone, except for what `group` must enter.

    Returns the group's id. UsageError if the group or the home can't be used, and says why.
    """
    gid = None if group is None else _group_id(group)
    try:
        home.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        root = os.open(home.root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise _unusable(home, error) from None
    try:
        _check_ours(os.fstat(root), home)
        _set_mode(root, 0o710, 0o700, gid)  # the group passes through but can't list
        _make_folder(root, home.socket.parent.name, home, 0o750, gid)
        for folder in (home.key.parent, home.attempts, home.kept):
            _make_folder(root, folder.name, home, 0o700, None)
    finally:
        os.close(root)
    return gid


def mend_modes(home: Home, group: int | None = None) -> list[str]:
    """Take back what was opened to others since `prepare_home`; what it was, in words.

    Landlock keeps a task from reading or replacing these files, but not from a `chmod`: no rule of it covers that. So the
    agent looks after each attempt. It narrows the time in which another user of the machine could read the key.
    """
    own, shared = 0o700, 0o750 if group is not None else 0o700
    wanted = {
        home.root: 0o710 if group is not None else own,
        home.key.parent: own,
        home.socket.parent: shared,
        home.attempts: own,
        home.kept: own,
        home.key: secret_file.OWNER_ONLY,
        home.identity: secret_file.OWNER_ONLY,
        home.cookie: secret_file.OWNER_ONLY if group is None else secret_file.OWNER_AND_GROUP,
    }
    mended = []
    for path, mode in wanted.items():
        try:
            found = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue  # the next start of the agent says what is wrong with it
        try:
            now = stat.S_IMODE(os.fstat(found).st_mode)
            if now != mode:
                os.fchmod(found, mode)
                mended.append(f"{path} had mode {now:04o}")
        finally:
            os.close(found)
    return mended


def make_cookie(home: Home, group: int | None = None) -> str:
    """A new cookie, written where the command line finds it. With `group` (a gid) its members may read it."""
    cookie = secrets.token_hex(COOKIE_BYTES)
    secret_file.replace(home.cookie, cookie.encode("ascii"), group)
    return cookie


def same_cookie(given: str, expected: str) -> bool:
    """Whether they are equal, in a time that says nothing about where they differ."""
    return hmac.compare_digest(given.encode("utf-8", "replace"), expected.encode("utf-8"))


def _make_folder(root: int, name: str, home: Home, mode: int, gid: int | None) -> None:
    try:
        os.mkdir(name, 0o700, dir_fd=root)
    except FileExistsError:
        pass
    except OSError as error:
        raise _unusable(home, error) from None
    try:
        folder = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=root)
    except OSError as error:
        raise _unusable(home, error, name) from None
    try:
        _check_ours(os.fstat(folder), home, name)
        _set_mode(folder, mode, 0o700, gid)
    finally:
        os.close(folder)


def _check_ours(status: os.stat_result, home: Home, name: str = "") -> None:
    folder = home.root / name
    if status.st_uid != os.geteuid():
        raise UsageError(f"{folder} belongs to user id {status.st_uid}, not to you", "set MESHQ_HOME to a folder of your own")
    if status.st_mode & 0o022:
        raise UsageError(
            f"others may write to {folder} (mode {stat.S_IMODE(status.st_mode):04o})",
            f"check what is in it, then: chmod go-w {folder}",
        )


def _set_mode(folder: int, shared: int, private: int, gid: int | None) -> None:
    if gid is None:
        os.fchmod(folder, private)
        return
    try:
        os.fchown(folder, -1, gid)
    except PermissionError:
        raise UsageError(f"you are no member of the group with id {gid}", "name a group that you are in (see `id`)") from None
    os.fchmod(folder, shared)


def _group_id(name: str) -> int:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise UsageError(f"there is no group {name!r} on this machine", "see `getent group`; `groupadd` makes one") from None


def _unusable(home: Home, error: OSError, name: str = "") -> UsageError | StoreError:
    folder = home.root / name
    if folder.is_symlink():
        return UsageError(f"{folder} is a symlink", f"set MESHQ_HOME to the folder itself: {os.path.realpath(folder)}")
    return StoreError(f"cannot use {folder} as a folder of the agent: {error.strerror}", "set MESHQ_HOME to another folder")
