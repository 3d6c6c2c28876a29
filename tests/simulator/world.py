"""A deterministic world for the cores: virtual time, seeded randomness, and a network that misbehaves on request.

Everything that happens is a call at a time in one heap; calls of one instant happen in the order in which they were made. All
randomness comes from the seed, through generators named after who uses them, so that one part drawing more numbers does not
change another part's. Whoever runs in the world tells it what happened (`trace`); two runs of one seed must have the same
`trace_hash`, in any process. Nothing here looks at a real clock, iterates a set or asks for a `hash()`.
"""

import hashlib
import heapq
import itertools
import math
import struct
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Final

_TIME: Final = struct.Struct("<d")


class Handle:
    """One call that is due. Cancelling a call that was made already, or cancelling twice, does nothing."""

    __slots__ = ("args", "call", "when")

    def __init__(self, when: float, call: Callable[..., object], args: tuple[Any, ...]) -> None:
        self.when = when
        self.call: Callable[..., object] | None = call
        self.args = args

    def cancel(self) -> None:
        self.call = None
        self.args = ()


class World:
    """Virtual time. `now` never goes back; it moves only inside `run_until` and `run_until_true`."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.now = 0.0
        self.rng = self.rng_for("world")
        self.calls = 0
        self._heap: list[tuple[float, int, Handle]] = []
        self._sequence = itertools.count()
        self._trace = hashlib.sha256()

    def rng_for(self, name: str) -> Random:
        """A generator of its own for `name`: the same for the same seed and name, whoever else draws."""
        return Random(f"{self.seed}/{name}")

    def call_at(self, when: float, call: Callable[..., object], *args: Any) -> Handle:
        """Call once at `when` (at once, in turn, if that has passed)."""
        handle = Handle(max(when, self.now), call, args)
        heapq.heappush(self._heap, (handle.when, next(self._sequence), handle))
        return handle

    def call_later(self, delay: float, call: Callable[..., object], *args: Any) -> Handle:
        return self.call_at(self.now + delay, call, *args)

    def run_until(self, time: float) -> None:
        """Make every call that is due up to and including `time`; afterwards `now` is `time`."""
        while self._step(time):
            pass
        self.now = max(self.now, time)

    def run_until_true(self, predicate: Callable[[], bool], limit: float) -> bool:
        """Run until `predicate()` holds, asked after every call; False if it does not by the time `limit`."""
        while not predicate():
            if not self._step(limit):
                self.now = max(self.now, limit)
                return predicate()
        return True

    def trace(self, *parts: object) -> None:
        """Record that something happened now. `parts`: what has the same `repr` in every process."""
        self._trace.update(repr((self.now, parts)).encode())

    def trace_bytes(self, who: bytes, data: bytes) -> None:
        """The same for what is bytes anyway, at a fraction of the cost: every packet of a thousand peers is traced."""
        self._trace.update(b"".join((_TIME.pack(self.now), who, data)))

    def trace_hash(self) -> str:
        """Of all that was traced so far."""
        return self._trace.hexdigest()

    def _step(self, limit: float) -> bool:
        while self._heap and self._heap[0][0] <= limit:
            when, _, handle = heapq.heappop(self._heap)
            call, args = handle.call, handle.args
            if call is not None:
                handle.cancel()  # it is made once
                self.now = when
                self.calls += 1
                call(*args)
                return True
        return False


class Clock:
    """What one machine's monotonic clock shows. It began sometime, and runs a little fast or slow; nobody else can read it."""

    def __init__(self, world: World, *, rate: float = 1.0, shows: float = 0.0) -> None:
        """`rate`: its seconds in one of the world's; `shows`: what it shows now."""
        self._world = world
        self._rate = rate
        self._exact = rate == 1.0 and shows == world.now  # it is the world's own: no rounding
        self._began = world.now
        self._first = shows

    @property
    def now(self) -> float:
        return self._world.now if self._exact else self._first + (self._world.now - self._began) * self._rate

    def when(self, shows: float) -> float:
        """At what time of the world it shows this, or a moment later: a deadline that is called early is called again."""
        if self._exact or shows == math.inf:
            return shows
        when = self._began + (shows - self._first) / self._rate
        while self._first + (when - self._began) * self._rate < shows:
            when = math.nextafter(when, math.inf)
        return when

    def span(self, seconds: float) -> float:
        """How long the world takes while this clock counts so many seconds."""
        return seconds if self._exact else seconds / self._rate

    def restart(self, shows: float) -> None:
        """The machine was off."""
        self._began, self._first, self._exact = self._world.now, shows, False


@dataclass(slots=True)
class Traffic:
    """What became of what was sent: a run asserts here that its faults really happened."""

    sent: int = 0
    delivered: int = 0
    dropped: int = 0  # by chance
    duplicated: int = 0
    cut: int = 0  # by a cut between the two
    flipped: int = 0  # a bit of it changed under way, so the receiver's seal dropped it
    replayed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ailment:
    """What is wrong with one place's link, whoever it talks to."""

    loss: float = 0.0  # of what is sent to it
    lag: float = 0.0  # seconds more for everything to it and from it, at most


HEALTHY: Final = Ailment()
RECORDED_MAX: Final = 400


class Network:
    """Carries calls between named places. Loss, duplication, delay and cuts may be changed at any time.

    A message that is under way when its direction is cut is lost too. Delays are drawn for each message, so messages
    overtake each other. A `reliable` message stands for one on a TCP connection: chance neither loses nor doubles it, each
    loss only delays it by a retransmission, of which the next waits twice as long. It needs both directions, since no
    connection comes about without answers; and it passes where only datagrams are blocked, as by a firewall that knows
    nothing of UDP.
    """

    RETRANSMIT_SECONDS = 0.2  # TCP's usual minimum
    CONNECT_SECONDS = 1.0  # until the first packet of a connection is sent again
    RETRANSMISSIONS_MAX = 8  # by then everybody has given up

    def __init__(
        self,
        world: World,
        *,
        loss: float = 0.0,
        duplication: float = 0.0,
        delay: tuple[float, float] = (0.0005, 0.003),
    ) -> None:
        self.world = world
        self.loss = loss
        self.duplication = duplication
        self.delay = delay
        self.traffic = Traffic()
        self.corruption = 0.0  # share of the datagrams of which a bit flips
        self.ailments: dict[str, Ailment] = {}
        self.recorded: deque[tuple[str, str, Callable[..., object], tuple[Any, ...]]] | None = None  # by an eavesdropper
        self._rng = world.rng_for("net")
        self._cuts: dict[tuple[str, str], None] = {}
        self._datagram_cuts: dict[tuple[str, str], None] = {}
        self._group_of: dict[str, int] = {}

    def cut(self, source: str, destination: str) -> None:
        """Nothing gets from `source` to `destination` any more; the other direction is another cut."""
        self._cuts[source, destination] = None

    def cut_datagrams(self, source: str, destination: str) -> None:
        """As `cut`, but reliable messages pass."""
        self._datagram_cuts[source, destination] = None

    def mend(self, source: str, destination: str) -> None:
        """Undo the cuts of this direction."""
        self._cuts.pop((source, destination), None)
        self._datagram_cuts.pop((source, destination), None)

    def partition(self, groups: Sequence[Sequence[str]]) -> None:
        """Only members of the same group hear each other; a place in no group is its own."""
        self._group_of = {place: number for number, group in enumerate(groups) for place in group}

    def heal(self) -> None:
        """Undo every cut and partition."""
        self._cuts.clear()
        self._datagram_cuts.clear()
        self._group_of.clear()

    def bridge(self, one: Sequence[str], other: Sequence[str]) -> None:
        """Nothing passes between the two groups; whoever is in neither hears both."""
        for first in one:
            for second in other:
                self.cut(first, second)
                self.cut(second, first)

    def connected(self, source: str, destination: str, *, reliable: bool = False) -> bool:
        """Does anything get from `source` to `destination` now? A reliable message needs the way back too."""
        cuts = self._cuts
        if cuts and ((source, destination) in cuts or (reliable and (destination, source) in cuts)):
            return False
        if self._datagram_cuts and not reliable and (source, destination) in self._datagram_cuts:
            return False
        if source == destination or not self._group_of:
            return True
        group = self._group_of.get(source)
        return group is not None and group == self._group_of.get(destination)

    def send(
        self, source: str, destination: str, deliver: Callable[..., object], *args: Any,
        reliable: bool = False, connecting: bool = False,
    ) -> bool:  # fmt: skip
        """Call `deliver(*args)` after a delay, unless it gets lost. False if the direction is cut now.

        `connecting`: a reliable message that opens its connection.
        """
        self.traffic.sent += 1
        if not self.connected(source, destination, reliable=reliable):
            self.traffic.cut += 1
            return False
        if reliable:
            pause = self.CONNECT_SECONDS if connecting else self.RETRANSMIT_SECONDS
            self._carry(source, destination, self._retransmissions(pause, destination), True, deliver, args)
            return True
        if self._rng.random() < self.loss or self._ails(destination):
            self.traffic.dropped += 1
            return True
        if self.corruption and self._rng.random() < self.corruption:
            self.traffic.flipped += 1
            return True
        self._carry(source, destination, 0.0, False, deliver, args)
        if self._rng.random() < self.duplication:
            self.traffic.duplicated += 1
            self._carry(source, destination, 0.0, False, deliver, args)
        return True

    def replay(self, destination: str, most: int) -> int:
        """Deliver again some of the datagrams that this place has had, as who recorded them may do; how many."""
        had = [each for each in self.recorded or () if each[1] == destination]
        chosen = self._rng.sample(had, min(most, len(had)))
        for source, _, deliver, args in chosen:
            self._carry(source, destination, self._rng.uniform(0.0, 2.0), False, deliver, args)
        self.traffic.replayed += len(chosen)
        return len(chosen)

    def _ails(self, destination: str) -> bool:
        """Whether a datagram is lost at the link of its destination."""
        loss = self.ailments.get(destination, HEALTHY).loss if self.ailments else 0.0
        return loss > 0.0 and self._rng.random() < loss

    def _retransmissions(self, pause: float, destination: str) -> float:
        """Seconds that they take."""
        losses = 0
        while losses < self.RETRANSMISSIONS_MAX and (self._rng.random() < self.loss or self._ails(destination)):
            losses += 1
        return pause * ((1 << losses) - 1)

    def _carry(
        self, source: str, destination: str, extra: float, reliable: bool,
        deliver: Callable[..., object], args: tuple[Any, ...],
    ) -> None:  # fmt: skip
        delay = extra + self._rng.uniform(*self.delay)
        if self.ailments:
            lag = self.ailments.get(source, HEALTHY).lag + self.ailments.get(destination, HEALTHY).lag
            delay += self._rng.uniform(0.5 * lag, lag)
        self.world.call_later(delay, self._arrive, source, destination, reliable, deliver, args)

    def _arrive(
        self, source: str, destination: str, reliable: bool, deliver: Callable[..., object], args: tuple[Any, ...]
    ) -> None:
        if not self.connected(source, destination, reliable=reliable):
            self.traffic.cut += 1
            return
        self.traffic.delivered += 1
        if self.recorded is not None and not reliable:
            self.recorded.append((source, destination, deliver, args))
        deliver(*args)
