"""The names of things: every identifier of meshq has one type, one spelling and one place where it is made.

All of them are plain strings or integers at run time, so that they travel, sort and print without ceremony. Their
alphabets are chosen so that each is safe as a file name, a DNS label and a word of a shell command.
"""

import base64
import hashlib
import re
from dataclasses import dataclass
from typing import NewType

PeerId = NewType("PeerId", str)
"""52 characters of lower-case base32: the SHA-256 of a peer's public key. It persists as long as the key does."""

Epoch = NewType("Epoch", int)
"""Counts the starts of one peer; a higher epoch replaces an older run at once."""

ActorId = NewType("ActorId", str)
"""`<first 26 characters of the PeerId>.<ledger epoch>`: who writes in the ledger. As old as its database file."""

TaskId = NewType("TaskId", str)
"""16 characters of lower-case base32, derived from the dot that submitted the task."""

Fence = NewType("Fence", str)
"""`<attempt>.<actor>.<seq>`: the token of one claim, unique for ever; also the name of the attempt's folder."""

ObjectId = NewType("ObjectId", str)
"""40 hex digits: the id of a git object (blob, tree or commit)."""

LEDGER_EPOCH_MAX = 10**9 - 1
ACTOR_PEER_CHARS = 26  # 130 bits of the peer's hash: as hard to forge as the peer id itself

_PEER = re.compile(r"[a-z2-7]{52}")
_TASK = re.compile(r"[a-z2-7]{16}")
_ACTOR = re.compile(r"[a-z2-7]{26}\.[0-9]{1,9}")
_FENCE = re.compile(r"([1-9][0-9]{0,5})\.([a-z2-7]{26}\.[0-9]{1,9})\.([1-9][0-9]{0,17})")
_OBJECT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True, order=True)
class Dot:
    """One write, named for ever: the `seq`-th of `actor`."""

    actor: ActorId
    seq: int


def base32(data: bytes) -> str:
    """Lower-case base32 without padding."""
    return base64.b32encode(data).decode("ascii").rstrip("=").lower()


def peer_id(public_key: bytes) -> PeerId:
    """The peer that owns this raw 32-byte Ed25519 public key. The prefix keeps other uses of the hash apart."""
    return PeerId(base32(hashlib.sha256(b"meshq-peer-v1" + public_key).digest()))


def actor_id(peer: PeerId, ledger_epoch: int) -> ActorId:
    """The ledger's name for this peer as long as it keeps the database of this ledger epoch."""
    return ActorId(f"{peer[:ACTOR_PEER_CHARS]}.{ledger_epoch}")


def actor_peer_prefix(actor: ActorId) -> str:
    """The part of the actor that says which peer writes: compare with `peer[:ACTOR_PEER_CHARS]`."""
    return actor[:ACTOR_PEER_CHARS]


def actor_ledger_epoch(actor: ActorId) -> int:
    return int(actor[ACTOR_PEER_CHARS + 1 :])


def task_id(birth: Dot) -> TaskId:
    """The task that was submitted by this write. 80 bits: a mesh of 10^9 tasks has a collision with p < 10^-6."""
    digest = hashlib.sha256(f"meshq-task-v1 {birth.actor} {birth.seq}".encode()).digest()
    return TaskId(base32(digest[:10]))


def fence(attempt: int, claim: Dot) -> Fence:
    return Fence(f"{attempt}.{claim.actor}.{claim.seq}")


def split_fence(text: str) -> tuple[int, Dot]:
    """The attempt number and the claim's dot. ValueError if the text is no fence."""
    match = _FENCE.fullmatch(text)
    if match is None:
        raise ValueError(f"not a fence: {text!r}")
    return int(match[1]), Dot(ActorId(match[2]), int(match[3]))


def is_peer_id(text: str) -> bool:
    return _PEER.fullmatch(text) is not None


def is_task_id(text: str) -> bool:
    return _TASK.fullmatch(text) is not None


def is_actor_id(text: str) -> bool:
    return _ACTOR.fullmatch(text) is not None


def is_fence(text: str) -> bool:
    return _FENCE.fullmatch(text) is not None


def is_object_id(text: str) -> bool:
    return _OBJECT.fullmatch(text) is not None
