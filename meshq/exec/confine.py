"""Hide the mesh's own files from tasks, by Landlock: keys, cookie, ledger, other attempts, agent.

A task runs as the user who runs the agent and may use all that this user may, but not the mesh (design section 8).
Landlock is the only mechanism of Linux that an ordinary user can count on; it also holds for root. It knows grants only:
a process keeps what some rule grants on a file or on a folder above it, and loses the rest. So "all but $MESHQ_HOME" is
written as: in each folder above the home, every entry but the one that leads to the home; then the attempt's own folders
(to write) and its environment (to read).

What is handled, and why exactly this:

- READ_FILE, WRITE_FILE, TRUNCATE (from ABI 3): the contents. Programs are opened for reading too, so EXECUTE adds nothing.
- REMOVE_*, MAKE_REG, MAKE_DIR, MAKE_SYM: otherwise the key, the settings or another attempt's environment could be
  replaced by a link to something of the task's own, which the agent would then read.
- REFER (ABI 2): what doesn't handle it loses every rename and link between two folders. ABI 1 can't handle it (Linux 5.13
  to 5.18) and would break git, uv and `mv`, so there tasks run unconfined and `doctor` says so.
- signals to processes outside the task (from ABI 6): the agent and the shims can't be killed by a task. Landlock by itself
  keeps /proc/PID/{environ,mem,root} of outside processes from it.
- not READ_DIR: listing would have to be granted on `/`, and a grant holds for all that is below, so names can't be hidden.
- not MAKE_SOCK, MAKE_FIFO, IOCTL_DEV, the network: they reach no file of the mesh, and GPUs need their ioctls.

Limits, which `docs/security.md` repeats:

- *Directly inside a folder above the home* (`~`, `~/.local`, `~/.local/share` for the default home) a task can't make or remove
  an entry, and what others make there meanwhile it can't open; its next attempt can. Everything deeper works. A program that
  wants a new `~/.name` gets EACCES from mkdir, which most answer by another folder. A home such as /srv/meshq avoids this.
- Names inside the home can be listed. A home that is reachable by a second mount is not hidden there. Sockets
  can be connected to (the control socket asks for the cookie, which is hidden).
- A task of *root* can read /proc/PID/environ of any process (from Linux 6.14 on, CAP_PERFMON is asked before Landlock): the
  agent's own environment must not hold the mesh key.
- /dev/stdout of a task is its log, which it may open again, and truncate if it writes `>` there, as with any redirection.

Only the standard library is imported: the shim runs `restrict`. Reading: Linux userspace-api/landlock.rst.
"""

import ctypes
import os
import stat
import struct
from collections.abc import Iterable

READ = "read"
WRITE = "write"

ABI_MIN = 2
ENTRIES_MAX = 10_000  # of one folder above the home; each costs a rule (about 10 us) at every start. The rest is not granted

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every architecture
_VERSION_FLAG = 1
_RULE_PATH_BENEATH = 1
_PR_SET_NO_NEW_PRIVS = 38

_WRITE_FILE, _READ_FILE = 1 << 1, 1 << 2
_REMOVE_DIR, _REMOVE_FILE, _MAKE_DIR, _MAKE_REG, _MAKE_SYM = 1 << 4, 1 << 5, 1 << 7, 1 << 8, 1 << 12
_REFER, _TRUNCATE = 1 << 13, 1 << 14
_SCOPE_SIGNAL = 1 << 1
_ABI_TRUNCATE, _ABI_SCOPE_SIGNAL = 3, 6

_libc = ctypes.CDLL(None, use_errno=True)


def landlock_abi() -> int:
    """The version of Landlock in the running kernel; 0 if there is none, it is switched off, or it is too old for us."""
    version = int(_libc.syscall(ctypes.c_long(_CREATE_RULESET), None, ctypes.c_size_t(0), ctypes.c_uint(_VERSION_FLAG)))
    return version if version >= ABI_MIN else 0


def landlock_rules(home: str, read: Iterable[str], write: Iterable[str]) -> list[tuple[str, str]]:
    """(path, READ or WRITE) rules that grant everything but `home`, and of that `read` and `write`."""
    rules: list[tuple[str, str]] = []
    below = os.path.realpath(home)
    while (above := os.path.dirname(below)) != below:
        rules += [(path, WRITE) for path in _entries(above) if path != below]
        below = above
    rules += [(os.path.realpath(path), READ) for path in read]
    rules += [(os.path.realpath(path), WRITE) for path in write]
    return rules


def _entries(folder: str) -> list[str]:
    """All in the folder but symbolic links: what they lead to is granted where it is, or not at all."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.path for entry in entries if not entry.is_symlink())[:ENTRIES_MAX]
    except OSError:
        return []  # a folder that may be passed but not listed, such as /home on some clusters


def restrict(rules: Iterable[tuple[str, str]]) -> None:
    """Confine this process and all that it will start, for ever. OSError if the kernel refuses."""
    abi = landlock_abi()
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    if abi == 0:
        return
    handled = _handled(abi)
    attributes = struct.pack("=QQQ", handled, 0, _SCOPE_SIGNAL if abi >= _ABI_SCOPE_SIGNAL else 0)
    ruleset = _check(
        _libc.syscall(ctypes.c_long(_CREATE_RULESET), attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint(0)),
        "landlock_create_ruleset",
    )
    for path, access in rules:
        _grant(ruleset, path, _READ_FILE if access == READ else handled)
    _check(_libc.syscall(ctypes.c_long(_RESTRICT_SELF), ctypes.c_int(ruleset), ctypes.c_uint(0)), "landlock_restrict_self")
    os.close(ruleset)


def _handled(abi: int) -> int:
    contents = _READ_FILE | _WRITE_FILE | (_TRUNCATE if abi >= _ABI_TRUNCATE else 0)
    return contents | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _MAKE_SYM | _REFER


def _grant(ruleset: int, path: str, access: int) -> None:
    """Add one rule. What is gone by now needs none."""
    try:
        descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return
    if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
        access &= _READ_FILE | _WRITE_FILE | _TRUNCATE  # others make no sense on a file and are refused
    rule = struct.pack("=Qi", access, descriptor)
    result = _libc.syscall(
        ctypes.c_long(_ADD_RULE), ctypes.c_int(ruleset), ctypes.c_int(_RULE_PATH_BENEATH), rule, ctypes.c_uint(0)
    )
    os.close(descriptor)
    _check(result, f"landlock_add_rule for {path}")


def _check(result: int, doing: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{doing}: {os.strerror(number)}")
    return int(result)
