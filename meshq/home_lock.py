"""Two agents never share a home: who runs in it, or changes what an agent would read only once, holds its lock."""

import fcntl
import os

from meshq.config import Home
from meshq.errors import StoreError


def take(home: Home) -> int | None:
    """A descriptor that keeps the lock, also in a process that inherits it; None if somebody else has it."""
    try:
        descriptor = os.open(home.lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StoreError(f"cannot open {home.lock}: {error.strerror}", "check free space and permissions of the home") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
