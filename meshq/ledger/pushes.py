"""Rows on their way to other peers, until each has acknowledged them or is left to anti-entropy.

A push that fails, or is not answered within a second, is sent again after 50, 150 and 450 ms; then the syncs bring what it
carried (`antientropy.py`). Claims wait for these acks, hence the statistics of how long they take.
"""

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import inf

from meshq.config import SYNC_BYTES_MAX, SYNC_ROWS_MAX
from meshq.ids import PeerId
from meshq.ledger.effects import Push, SendPush
from meshq.ledger.row import Row
from meshq.ledger.table import row_bytes

RETRY_SECONDS = (0.050, 0.150, 0.450)
REPLY_SECONDS = 1.0  # a reply that takes longer may still come: it is then as good as an early one
OUTGOING_PER_PEER_MAX = 64  # a peer so far behind is better served by one sync
SAMPLES_MAX = 128
SAMPLES_MIN = 8  # fewer say nothing about the slowest hundredth


@dataclass(frozen=True, slots=True, kw_only=True)
class InFlight:
    """Sent; `due` is when it counts as lost."""

    push: Push
    sent_at: float
    due: float
    failures: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pausing:
    """Failed; `due` is when it is sent again."""

    push: Push
    sent_at: float
    due: float
    failures: int


@dataclass(frozen=True, slots=True)
class Acked:
    """What a reply acknowledges. `sent_at` is when the push was sent first."""

    push: Push
    sent_at: float


class Pushes:
    def __init__(self) -> None:
        self._outgoing: dict[PeerId, dict[int, InFlight | Pausing]] = {}
        self._seconds: deque[float] = deque(maxlen=SAMPLES_MAX)
        self.counters: Counter[str] = Counter()

    def send(self, now: float, peers: Iterable[PeerId], push: Push) -> list[SendPush]:
        sends = []
        for peer in peers:
            waiting = self._outgoing.setdefault(peer, {})
            if len(waiting) >= OUTGOING_PER_PEER_MAX:
                self.counters["pushes_left_to_sync"] += 1
                continue
            waiting[push.number] = InFlight(push=push, sent_at=now, due=now + REPLY_SECONDS)
            sends.append(SendPush(peer, push))
        return sends

    def replied(self, now: float, peer: PeerId, number: int) -> Acked | None:
        """None if this peer owed no reply of that number."""
        outgoing = self._outgoing.get(peer, {}).pop(number, None)
        if outgoing is None:
            return None
        if outgoing.failures == 0:  # of a push that was repeated nobody knows which one was answered (Karn's rule)
            self._seconds.append(now - outgoing.sent_at)
        return Acked(outgoing.push, outgoing.sent_at)

    def failed(self, now: float, peer: PeerId, number: int) -> None:
        outgoing = self._outgoing.get(peer, {}).get(number)
        if isinstance(outgoing, InFlight):
            self._pause(now, peer, outgoing)

    def forget(self, peer: PeerId) -> None:
        """The peer is not alive any more: anti-entropy serves it when it comes back."""
        self._outgoing.pop(peer, None)

    def deadline(self) -> float:
        return min((item.due for waiting in self._outgoing.values() for item in waiting.values()), default=inf)

    def handle_timeout(self, now: float) -> list[SendPush]:
        """Give up waiting for late replies; send again what has paused long enough."""
        sends = []
        for peer in sorted(self._outgoing):
            for number, outgoing in list(self._outgoing[peer].items()):
                if outgoing.due > now:
                    continue
                match outgoing:
                    case InFlight():
                        self._pause(now, peer, outgoing)
                    case Pausing():
                        again = InFlight(
                            push=outgoing.push,
                            sent_at=outgoing.sent_at,
                            due=now + REPLY_SECONDS,
                            failures=outgoing.failures,
                        )
                        self._outgoing[peer][number] = again
                        sends.append(SendPush(peer, outgoing.push))
        return sends

    def ack_patience(self, least: float) -> float:
        """How long to wait for acks: `least`, or four times what the slowest hundredth took."""
        if len(self._seconds) < SAMPLES_MIN:
            return least
        ranked = sorted(self._seconds)
        return max(least, 4 * ranked[min(len(ranked) - 1, len(ranked) * 99 // 100)])

    def _pause(self, now: float, peer: PeerId, outgoing: InFlight) -> None:
        waiting = self._outgoing[peer]
        if outgoing.failures == len(RETRY_SECONDS):
            del waiting[outgoing.push.number]
            self.counters["pushes_left_to_sync"] += 1
            return
        waiting[outgoing.push.number] = Pausing(
            push=outgoing.push,
            sent_at=outgoing.sent_at,
            due=now + RETRY_SECONDS[outgoing.failures],
            failures=outgoing.failures + 1,
        )


def batches(rows: Iterable[Row]) -> Iterator[tuple[Row, ...]]:
    """The rows in order, in parts that fit one message."""
    batch: list[Row] = []
    size = 0
    for row in rows:
        size += row_bytes(row)
        if batch and (len(batch) == SYNC_ROWS_MAX or size > SYNC_BYTES_MAX):
            yield tuple(batch)
            batch, size = [], row_bytes(row)
        batch.append(row)
    if batch:
        yield tuple(batch)
