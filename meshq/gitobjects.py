"""Git's objects as values: how submitted files are named, stored and sent, on the client's side and the agent's alike.

An object is a kind and its content; its id is the SHA-1 of both, so whoever receives one checks it by naming it again.
A frame is how objects travel: one byte of kind, four bytes of length (big-endian), the content. Only the three kinds
below exist here: an annotated tag never belongs to a submitted source.

Everything read here was written by somebody else: any departure from the format is MalformedData.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from meshq import config
from meshq.errors import MalformedData
from meshq.ids import ObjectId

COMMIT: Final = 1
TREE: Final = 2
BLOB: Final = 3
KIND_NAMES: Final = {COMMIT: b"commit", TREE: b"tree", BLOB: b"blob"}

MODE_FOLDER: Final = 0o040000
MODE_FILE: Final = 0o100644
MODE_EXECUTABLE: Final = 0o100755
MODE_SYMLINK: Final = 0o120000
MODE_REPOSITORY: Final = 0o160000  # git's "gitlink": a repository inside, of which only the commit is named

HEADER_BYTES: Final = 5
AUTHOR: Final = "meshq <meshq@localhost> 0 +0000"  # the same for everybody and always: equal files give an equal commit
_TREE_LINE: Final = re.compile(rb"tree ([0-9a-f]{40})\n")
_MODE: Final = re.compile(rb"[0-7]{5,6}")


@dataclass(frozen=True, slots=True)
class Entry:
    """One name in a folder."""

    mode: int
    name: bytes
    id: ObjectId


def object_id(kind: int, content: bytes) -> ObjectId:
    """The id that git gives to this object."""
    digest = hashlib.sha1(b"%s %d\0" % (KIND_NAMES[kind], len(content)), usedforsecurity=False)
    digest.update(content)
    return ObjectId(digest.hexdigest())


def encode_tree(entries: Iterable[Entry]) -> bytes:
    """The content of a tree object. Git sorts folders as if their names ended in `/`."""
    ordered = sorted(entries, key=lambda entry: entry.name + (b"/" if entry.mode == MODE_FOLDER else b""))
    return b"".join(b"%o %s\0%s" % (entry.mode, entry.name, bytes.fromhex(entry.id)) for entry in ordered)


def decode_tree(content: bytes) -> tuple[Entry, ...]:
    """The entries of a tree; MalformedData if it is none. Names may still be hostile: `check_name` says."""
    entries: list[Entry] = []
    start = 0
    while start < len(content):
        space = content.find(b" ", start, start + 7)
        end = content.find(b"\0", space) if space > 0 else -1
        if end < 0 or len(content) < end + 21 or _MODE.fullmatch(content, start, space) is None:
            raise MalformedData("a tree object is damaged")
        digest = content[end + 1 : end + 21]
        entries.append(Entry(int(content[start:space], 8), content[space + 1 : end], ObjectId(digest.hex())))
        start = end + 21
    return tuple(entries)


def encode_commit(tree: ObjectId) -> bytes:
    """A commit of this tree without parents, author or time of its own."""
    return f"tree {tree}\nauthor {AUTHOR}\ncommitter {AUTHOR}\n\nmeshq snapshot\n".encode()


def decode_commit(content: bytes) -> ObjectId:
    """The id of the commit's tree; MalformedData if it is no commit."""
    match = _TREE_LINE.match(content)
    if match is None:
        raise MalformedData("a commit object names no tree")
    return ObjectId(match[1].decode("ascii"))


def check_name(name: bytes) -> str:
    """Why a file of this name must not be written; empty if it may."""
    if name in (b"", b".", b".."):
        return "is no file name"
    if b"/" in name or b"\0" in name:
        return "is a path, not a name"
    if name.lower() == b".git":
        return "would be a repository that git trusts"
    return "is too long" if len(name) > 255 else ""


def symlink_stays(target: bytes, depth: int) -> bool:
    """Does a symlink `depth` folders below the top stay below the top, whatever other links lie there?

    Folders up to the link are real, so leading `..` go where they seem to. A `..` after a name may follow another link
    and go anywhere; such targets are refused instead of followed.
    """
    parts = [part for part in target.split(b"/") if part not in (b"", b".")]
    ups = next((index for index, part in enumerate(parts) if part != b".."), len(parts))
    return bool(target) and not target.startswith(b"/") and ups <= depth and b".." not in parts[ups:]


def encode_frame(kind: int, content: bytes) -> bytes:
    """One object as it travels."""
    return bytes((kind,)) + len(content).to_bytes(4, "big") + content


class FrameDecoder:
    """Takes frames apart as they arrive. MalformedData leaves it unusable: the rest of the stream has no beginning."""

    def __init__(self, object_bytes_max: int = config.SOURCE_FILE_BYTES_MAX) -> None:
        self._object_bytes_max = object_bytes_max
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """The objects that are complete now. The size is refused as soon as it is claimed, before its bytes come."""
        self._buffer += data
        frames: list[tuple[int, bytes]] = []
        start = 0
        while len(self._buffer) >= start + HEADER_BYTES:
            end = start + HEADER_BYTES + self._checked_size(start)
            if len(self._buffer) < end:
                break
            frames.append((self._buffer[start], bytes(memoryview(self._buffer)[start + HEADER_BYTES : end])))
            start = end
        del self._buffer[:start]
        return frames

    def finish(self) -> None:
        """Say that no more data comes: MalformedData if that cuts an object."""
        if self._buffer:
            raise MalformedData("the objects end in the middle of one")

    def _checked_size(self, start: int) -> int:
        if self._buffer[start] not in KIND_NAMES:
            raise MalformedData(f"an object of kind {self._buffer[start]}, which does not exist")
        size = int.from_bytes(self._buffer[start + 1 : start + HEADER_BYTES], "big")
        if size > self._object_bytes_max:
            raise MalformedData(f"an object of {size} bytes where at most {self._object_bytes_max} are allowed")
        return size


def decode_frames(data: bytes, object_bytes_max: int = config.SOURCE_FILE_BYTES_MAX) -> Iterator[tuple[int, bytes]]:
    """The objects in one complete body."""
    decoder = FrameDecoder(object_bytes_max)
    yield from decoder.feed(data)
    decoder.finish()
