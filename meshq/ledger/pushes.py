"""Rows on their way to other peers, until each has acknowledged them or is left to anti-entropy.

A push that fails, or is not answered within a second, is sent again after 50, 150 and 450 ms; then the syncs bring what it
carried (`antientropy.py`). Claims wait for these acks, hence the statistics of how long they take.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, inf, log10
from typing import TYPE_CHECKING

from meshq.config import SYNC_BYTES_MAX, SYNC_ROWS_MAX
from meshq.errors import PeerError
from meshq.ids import Dot, PeerId, TaskId
from meshq.ledger.effects import Push, SendPush
from meshq.ledger.row import Row
from meshq.ledger.settings import Settings
from meshq.ledger.table import row_bytes

if TYPE_CHECKING:
    from random import Random

RETRY_SECONDS = (0.050, 0.150, 0.450)
REPLY_SECONDS = 1.0  # a reply that takes longer may still come: it is then as good as an early one
PUSH_ALL_MAX = 256  # alive peers: with more of them a write is not pushed to everybody
PUSH_DOTS_MAX = 8 * SYNC_ROWS_MAX  # one input writes a birth, a claim and what follows to a row, and seldom so much
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

    def check_limits(self, push: Push) -> None:
        """PeerError if a push that came in has more than `parts` and `batches` ever put into one; it is counted."""
        if len(push.rows) > SYNC_ROWS_MAX or len(push.dots) > PUSH_DOTS_MAX:
            self.counters["pushes_refused_too_large"] += 1
            raise PeerError(f"a push of {len(push.rows)} rows and {len(push.dots)} writes: that is too much")

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


def audience(rng: "Random", alive: Sequence[PeerId]) -> Sequence[PeerId]:
    """To whom this peer's writes are pushed: everybody, or in a large mesh 3 log10 N random peers, and gossip names the writes.

    So many reach nearly everybody in two steps, those that hear of the writes asking for them.
    """
    if len(alive) <= PUSH_ALL_MAX:
        return alive
    return rng.sample(alive, ceil(3 * log10(len(alive))))


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


def parts(
    writes: Mapping[Dot, TaskId], row_of: Callable[[TaskId], Row], settings: Settings, settings_dots: tuple[Dot, ...]
) -> Iterator[Push]:
    """Pushes, not numbered yet, that carry the rows of these writes; the first one the settings, if they were written, too."""
    dots_of: dict[TaskId, list[Dot]] = {}
    for dot, task in writes.items():
        dots_of.setdefault(task, []).append(dot)
    for rows in batches(map(row_of, dots_of)):
        dots = tuple(sorted((*settings_dots, *(dot for row in rows for dot in dots_of[row.task]))))
        yield Push(number=0, rows=rows, dots=dots, settings=settings if settings_dots else None)
        settings_dots = ()
    if settings_dots:
        yield Push(number=0, rows=(), dots=settings_dots, settings=settings)
