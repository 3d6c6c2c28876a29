"""The one hash by which peers agree on an order without talking: rendezvous (highest random weight) hashing.

Everybody who knows the same subject and the same peers gets the same order, and a peer that joins or goes moves nobody else.
That holds for `mourners`, too, which need no weights.
BLAKE2b and not Python's `hash`, which differs from process to process.
"""

from bisect import bisect_left
from collections.abc import Iterable
from hashlib import blake2b

from meshq.ids import Dot, PeerId, TaskId, base32

WEIGHT_BYTES = 8


def claim_weight(task: TaskId, attempt: int, peer: PeerId) -> bytes:
    """The weight of a peer's bid for one attempt; the lowest wins."""
    return blake2b(f"{task}|{attempt}|{peer}".encode(), digest_size=WEIGHT_BYTES).digest()


def claimants(task: TaskId, attempt: int, peers: Iterable[PeerId]) -> tuple[PeerId, ...]:
    """The peers in the order in which they should bid for this attempt."""
    return tuple(sorted(peers, key=lambda peer: (claim_weight(task, attempt, peer), peer)))


def mourners(task: TaskId, claim: Dot, peers: Iterable[PeerId]) -> tuple[PeerId, ...]:
    """The peers in the order in which they should declare this claim lost: round the ring of their ids, from a place that the
    claim chooses. Another subject than that of `claimants`: otherwise the peer that would run the task next would also always
    be the one that declares the last attempt lost. One hash for a claim and not one for each peer: when a rack of a large mesh
    goes dark, everybody asks this of hundreds of claims at once, again and again until the grace is over."""
    ring = sorted(peers)
    subject = f"lost|{task}|{claim.actor}|{claim.seq}"
    place = bisect_left(ring, base32(blake2b(subject.encode(), digest_size=WEIGHT_BYTES).digest()))
    return (*ring[place:], *ring[:place])


def voters(task: TaskId, peers: Iterable[PeerId]) -> tuple[PeerId, ...]:
    """The peers in the order in which they are drawn as voters of this task."""
    subject = f"vote|{task}|"
    return tuple(sorted(peers, key=lambda peer: (blake2b((subject + peer).encode(), digest_size=WEIGHT_BYTES).digest(), peer)))
