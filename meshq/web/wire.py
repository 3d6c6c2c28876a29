"""What peers say to each other over HTTPS, apart from gossip's and the ledger's own messages: object ids, manifests, logs."""

from dataclasses import dataclass
from typing import Final

from meshq import pieces
from meshq.exec.logs import Chunk
from meshq.ids import ObjectId, is_object_id
from meshq.task import OutputFile

MANIFEST_BYTES_MAX: Final = 2**26  # OUTPUT_FILES_MAX files with long names


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectIds:
    """A set of objects that is asked for or offered, in order."""

    ids: tuple[ObjectId, ...]

    def __post_init__(self) -> None:
        """ValueError, which the decoder makes MalformedData, if one is no id: they become file names."""
        if not all(map(is_object_id, self.ids)):
            raise ValueError("not an object id")


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitRequest:
    """Which objects does this commit consist of?"""

    commit: ObjectId

    def __post_init__(self) -> None:
        if not is_object_id(self.commit):
            raise ValueError("not an object id")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """All output files of one attempt, by path; `skipped` counts what is no plain file."""

    files: tuple[OutputFile, ...]
    skipped: int = 0


def encode_chunk(chunk: Chunk) -> bytes:
    """A piece of a log, for a peer that knows which log: framed as `meshq.pieces` says."""
    return pieces.frame({"offset": chunk.offset}, chunk.data)


def decode_chunk(header: pieces.Header, data: bytes) -> Chunk:
    """MalformedData if the header lacks a sensible offset."""
    return Chunk(data, pieces.number(header, "offset", pieces.OFFSET_MAX))
