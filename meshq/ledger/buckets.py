"""What two peers have in common, told in few bytes: a version vector cut into 64 parts, each with its hash.

A vector of 1,000 actors is 35 kB; of two peers that differ in the writes of three actors, each must learn what the other has of
those three. So the peer that asks sends the 64 hashes (512 bytes), and only the parts whose hashes differ are exchanged. The
note, which gossip carries, is the hash of the 64: peers whose notes are equal have nothing to ask each other.

A part's hash is the sum of the hashes of its entries, so that a write changes it without a look at the other entries.
"""

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from typing import Final

from meshq.ids import ActorId, Dot
from meshq.ledger.row import Vector

BUCKETS: Final = 64
HASH_BYTES: Final = 8
BUCKETS_BYTES: Final = BUCKETS * HASH_BYTES
NOTE_BYTES: Final = 16
RECENT_MAX: Final = 3  # writes that a note may name: with 16 bytes of hash they fit the 64 that gossip gives it
_SEQ_BYTES: Final = 6
_MASK: Final = 2 ** (8 * HASH_BYTES) - 1


def bucket_of(actor: ActorId) -> int:
    return _hash_actor(actor)[0] % BUCKETS


class Buckets:
    """The hashes of one vector's parts. Mutable."""

    def __init__(self, vector: Vector) -> None:
        self._sums = [0] * BUCKETS
        self._actors: dict[bytes, ActorId] = {}  # by their hashes, as notes name them
        for actor, seq in vector.items():
            self.change(actor, 0, seq)

    def change(self, actor: ActorId, before: int, after: int) -> None:
        """An entry of the vector has become another."""
        self._actors[_hash_actor(actor)] = actor
        place = bucket_of(actor)
        self._sums[place] = (self._sums[place] + _hash_entry(actor, after) - _hash_entry(actor, before)) & _MASK

    def names_news(self, note: bytes, vector: Vector) -> bool:
        """Whether the note names a write that this vector does not cover. A malformed note names nothing."""
        size = HASH_BYTES + _SEQ_BYTES
        named = note[NOTE_BYTES:]
        if len(named) % size or len(named) > RECENT_MAX * size:
            return False
        for entry in (named[at : at + size] for at in range(0, len(named), size)):
            actor = self._actors.get(entry[:HASH_BYTES])
            if actor is None or vector.get(actor, 0) < int.from_bytes(entry[HASH_BYTES:]):
                return True
        return False

    def pack(self) -> bytes:
        return b"".join(each.to_bytes(HASH_BYTES) for each in self._sums)

    def note(self) -> bytes:
        """What two peers have in common that have the same rows, as far as they know."""
        return hashlib.blake2b(self.pack(), digest_size=NOTE_BYTES).digest()


def differing(mine: bytes, theirs: bytes) -> frozenset[int]:
    """Which parts are not the same."""
    parts = range(0, BUCKETS_BYTES, HASH_BYTES)
    return frozenset(at // HASH_BYTES for at in parts if mine[at : at + HASH_BYTES] != theirs[at : at + HASH_BYTES])


def part(vector: Vector, buckets: frozenset[int]) -> dict[ActorId, int]:
    """The entries of these parts."""
    return {actor: seq for actor, seq in vector.items() if bucket_of(actor) in buckets} if buckets else {}


def note_with(note: bytes, recent: Iterable[Dot]) -> bytes:
    """The note of a mesh too large to push to everybody: it also names the latest writes (Plumtree's IHAVE)."""
    return note + b"".join(_hash_actor(dot.actor) + dot.seq.to_bytes(_SEQ_BYTES) for dot in recent)


@lru_cache(maxsize=16_384)
def _hash_actor(actor: ActorId) -> bytes:
    return hashlib.blake2b(actor.encode(), digest_size=HASH_BYTES).digest()


def _hash_entry(actor: ActorId, seq: int) -> int:
    """0 for an entry that says nothing: an absent one is the same."""
    return int.from_bytes(hashlib.blake2b(f"{actor} {seq}".encode(), digest_size=HASH_BYTES).digest()) if seq else 0
