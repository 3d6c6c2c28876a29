"""The keys of the mesh in the home: one file, replaced in one step, readable for its owner alone.

Its first line is the key in use, which people may copy. As long as a mesh has never changed its key that is all, and the
file is the one that meshq 0.1 writes and reads. After that a second line holds the whole ring, and counts. A file that cannot
be read, or whose lines contradict each other, is never replaced by the agent: it says so and does not start.
"""

import base64
import binascii
from pathlib import Path
from typing import Final

from meshq.errors import MalformedData, StoreError, TaskFailed, UsageError
from meshq.trust import keyring, keys, secret_file
from meshq.trust.keyring import RING_BYTES_MAX, Keyring

FILE_BYTES_MAX: Final = 2 * RING_BYTES_MAX  # base64 takes a third more
_RING: Final = "ring1 "


def load(path: Path) -> Keyring:
    """The ring in a file, of one line or two. FileNotFoundError if there is none; UsageError if others may read it or it holds
    no key, StoreError if it is damaged."""
    data = secret_file.read(path, "key file", FILE_BYTES_MAX)
    try:
        first, *rest = [line for line in data.decode("utf-8").splitlines() if line.strip()] or [""]
        key = keys.parse(first)
    except UnicodeDecodeError:
        raise UsageError(f"the key file {path} holds no text", keys.HINT) from None
    except UsageError as error:
        raise UsageError(f"key file {path}: {error.message}", error.hint) from None
    if not rest:
        return keyring.ring_of(key)
    if rest[0].startswith(_RING[:-2]) and not rest[0].startswith(_RING):
        raise UsageError(f"the key file {path} was written by a newer meshq", "upgrade meshq on this machine")
    try:
        ring = keyring.decode(base64.b64decode(rest[0].removeprefix(_RING), validate=True))
    except (MalformedData, binascii.Error):
        raise _damaged(path) from None
    if len(rest) > 1 or not rest[0].startswith(_RING) or ring.current.key != key:
        raise _damaged(path)
    return ring


def save(path: Path, ring: Keyring) -> None:
    """Replace the file. StoreError if the disk refuses, TaskFailed if the ring has outgrown its limit: it is as before then."""
    lines = [ring.current.key.text]
    if not ring.plain:
        data = keyring.encode(ring)
        if len(data) > RING_BYTES_MAX:
            raise TaskFailed(f"the ring of keys takes {len(data)} bytes, at most {RING_BYTES_MAX} are possible", "remove keys")
        lines.append(_RING + base64.b64encode(data).decode("ascii"))
    secret_file.replace(path, "".join(f"{line}\n" for line in lines).encode())


def _damaged(path: Path) -> StoreError:
    return StoreError(
        f"the key file {path} is damaged",
        "restore it; or leave the first line alone in it, with the key that `meshq key` prints on another machine",
    )
