"""What peers say to each other over HTTPS, apart from gossip's and the ledger's own messages: object ids and manifests."""

from dataclasses import dataclass

from meshq.ids import ObjectId
from meshq.task import OutputFile


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectIds:
    """A set of objects that is asked for or offered, in order."""

    ids: tuple[ObjectId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitRequest:
    """Which objects does this commit consist of?"""

    commit: ObjectId


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """All output files of one attempt, by path; `skipped` counts what is no plain file."""

    files: tuple[OutputFile, ...]
    skipped: int = 0
