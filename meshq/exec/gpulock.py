"""One GPU, one task, also when several users of a machine each run an agent: a lock for each GPU that all of them see.

The shim takes the locks of its GPUs before it starts anything and holds them until it is gone, so they outlive the agent and
never outlive the task. The file means nothing but its lock: nobody reads or writes it, anybody may open it, and it is gone at
the next boot. An agent looks whether a lock is free before it gives the GPU out (`is_free`); that is a look, the shim decides.

Limits: agents that do not share `/run/lock` (containers) do not see each other's locks; a GPU that is really used shows by its
foreign processes then. Any user of the machine can hold a lock to annoy others, as he can by using the GPU.

Standard library only: the zygote loads this.
"""

import errno
import fcntl
import os
import re
import time

FOLDERS = ("/run/lock", "/dev/shm")  # writable for every user, with the sticky bit, and emptied at boot
TAKE_SECONDS = 0.05  # how long somebody's `is_free` may be mistaken for a task
_ODD = re.compile(r"[^A-Za-z0-9-]")


def take(name: str, folders: tuple[str, ...] = FOLDERS) -> int | None:
    """The descriptor that holds the lock of this GPU until it is closed; None where there is no place for such locks.

    BlockingIOError if another task of this machine has the GPU.
    """
    descriptor = _open(name, folders)
    if descriptor is None:
        return None
    give_up = time.monotonic() + TAKE_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() > give_up:
                os.close(descriptor)
                raise
        time.sleep(0.005)


def is_free(name: str, folders: tuple[str, ...] = FOLDERS) -> bool:
    """Whether no task of this machine has the GPU just now."""
    descriptor = _open(name, folders)
    if descriptor is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _open(name: str, folders: tuple[str, ...]) -> int | None:
    """The file of this GPU. Opened first, made second: in such folders the kernel forbids O_CREAT on somebody else's file."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    for folder in folders:
        path = f"{folder}/meshq-gpu-{_ODD.sub('-', name)}.lock"
        for more in (0, os.O_CREAT | os.O_EXCL, 0):
            try:
                return os.open(path, flags | more, 0o644)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.EEXIST):
                    break
    return None
