"""What every peer last published about itself: versioned records that travel by sliced scuttlebutt.

A record is replaced only by one of a higher (epoch, version), and only its owner counts the version up. Peers compare what they
have by digests of a random slice of all members: a digest of everybody outgrew its packet at about 500 members elsewhere
(quickwit-oss/quickwit#6653). The reader of a digest sends the records that it has newer, and a digest of those that it has
older. That second digest lists only what the first side has newer, so it is answered by records alone, and the exchange ends.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import TYPE_CHECKING, Final

from meshq.gossip import wire
from meshq.gossip.wire import COUNT_MAX, Record, short_id
from meshq.ids import Epoch, PeerId

if TYPE_CHECKING:
    from random import Random

DIGEST_PEERS_MAX: Final = 90  # what one packet of 1,200 bytes holds, near enough
BACKLOG_SECONDS: Final = 1.0  # after a stall, in which what waited in the sockets is read


@dataclass(frozen=True, slots=True)
class Held:
    """`published_at`: on my clock, when the owner published it, as far as its carriers knew. A record that was read late lay
    in a socket for a time that nobody knows, and may be older by that."""

    epoch: Epoch
    version: int
    published_at: float
    data: bytes
    entry: bytes  # of a digest
    read_at: float
    late: bool

    @property
    def stamp(self) -> tuple[int, int]:
        return (self.epoch, self.version)


class RecordTable:
    """The newest record of each peer that is known here, mine included."""

    def __init__(self, me: PeerId) -> None:
        self._me = me
        self._held: dict[PeerId, Held] = {}
        self._entries: set[bytes] = set()  # of all that is held: most of a digest is the same here
        self._mine = (0, 0)  # the highest stamp of mine that I know of
        self._late_until = -math.inf

    def publish(self, now: float, epoch: Epoch, data: bytes) -> Record:
        """My own new record. Its stamp is above all that anybody showed me as mine."""
        if self._mine[0] < epoch:
            self._mine = (epoch, 0)
        self._mine = (self._mine[0], min(self._mine[1] + 1, COUNT_MAX))
        held = self._hold(self._me, Epoch(self._mine[0]), self._mine[1], now, data, now)
        return self._record(now, self._me, held)

    def offer(self, now: float, record: Record) -> bool:
        """Keep the record if it is newer than what is held; did it replace anything?

        One of mine that is newer than mine was published by a run of me that I do not remember: I raise the stamp of what I
        have above it, so that mine replaces it everywhere.
        """
        held = self._held.get(record.peer)
        if record.peer == self._me:
            self._mine = max(self._mine, (record.epoch, record.version))
            if held is not None and held.stamp < self._mine:
                self.publish(held.published_at, held.epoch, held.data)
            return False
        if held is not None and (record.epoch, record.version) <= held.stamp:
            return False
        self._hold(record.peer, record.epoch, record.version, now - record.age_ms / 1000, record.data, now)
        return True

    def handle_stall(self, now: float, seconds: float) -> None:
        """Nothing was read for so long: what was read since, and what is read in the next moment, was read late."""
        self._late_until = now + BACKLOG_SECONDS
        for peer, held in self._held.items():
            if held.read_at >= now - seconds:
                self._held[peer] = replace(held, late=True)

    def get(self, peer: PeerId) -> Held | None:
        return self._held.get(peer)

    def forget(self, peer: PeerId) -> None:
        if (held := self._held.pop(peer, None)) is not None:
            self._entries.discard(held.entry)

    def peers(self) -> tuple[PeerId, ...]:
        return tuple(self._held)

    def digest(self, rng: "Random", peers: Sequence[PeerId]) -> list[bytes]:
        """What I have of a random slice of `peers`."""
        chosen = rng.sample(peers, min(len(peers), DIGEST_PEERS_MAX))
        return [self._entry(peer) for peer in chosen]

    def compare(
        self, now: float, digest: Iterable[bytes], resolve: Callable[[bytes], PeerId | None], spreading: float = 0.0
    ) -> tuple[list[Record], list[bytes]]:
        """For the sender of `digest`: the records that I have newer; and what I have of those it has newer.

        First come those of which the sender has missed most versions, then the newest: not all may find room, and
        newest first alone would leave the same ones out again and again. `resolve` gives the member with a short id.
        For so many seconds (`spreading`) a record's owner is still telling everybody, who need not hear it twice.
        """
        newer: list[tuple[int, float, PeerId, Held]] = []
        older: list[bytes] = []
        for entry in digest:
            if entry in self._entries:
                continue
            short, *theirs = wire.read_entry(entry)
            peer = resolve(short)
            if peer is None:
                continue
            held = self._held.get(peer)
            mine = held.stamp if held is not None else (0, 0)
            if held is not None and mine > tuple(theirs):
                if now - held.published_at < spreading and theirs != [0, 0]:
                    continue
                missed = held.version - theirs[1] if held.epoch == theirs[0] else COUNT_MAX
                newer.append((-missed, -held.published_at, peer, held))
            elif mine < tuple(theirs):
                older.append(self._entry(peer))
        newer.sort(key=itemgetter(0, 1, 2))
        return [self._record(now, peer, held) for _, _, peer, held in newer], older

    def records(self, now: float, peers: Iterable[PeerId]) -> list[Record]:
        """Those of `peers` that there are."""
        return [self._record(now, peer, held) for peer in peers if (held := self._held.get(peer)) is not None]

    def _hold(self, peer: PeerId, epoch: Epoch, version: int, published_at: float, data: bytes, now: float) -> Held:
        self.forget(peer)
        entry = wire.digest_entry(short_id(peer), epoch, version)
        held = Held(epoch, version, published_at, data, entry, read_at=now, late=now < self._late_until)
        self._held[peer] = held
        self._entries.add(held.entry)
        return held

    def _entry(self, peer: PeerId) -> bytes:
        held = self._held.get(peer)
        return wire.digest_entry(short_id(peer), 0, 0) if held is None else held.entry

    def _record(self, now: float, peer: PeerId, held: Held) -> Record:
        age_ms = max(0, round((now - held.published_at) * 1000))
        return Record(peer, held.epoch, held.version, age_ms, held.data)
