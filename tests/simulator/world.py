"""A deterministic world for the cores: virtual time, seeded randomness, and a network that misbehaves on request.

Everything that happens is a call at a time in one heap; calls of one instant happen in the order in which they were made. All
randomness comes from the seed, through generators named after who uses them, so that one part drawing more numbers does not
change another part's. Whoever runs in the world tells it what happened (`trace`); two runs of one seed must have the same
`trace_hash`, in any process. Nothing here looks at a real clock, iterates a set or asks for a `hash()`.
"""

import hashlib
import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any


class Handle:
    """One call that is due. Cancelling a call that was made already, or cancelling twice, does nothing."""

    __slots__ = ("_call", "when")

    def __init__(self, when: float, call: Callable[[], object]) -> None:
        self.when = when
        self._call: Callable[[], object] | None = call

    def cancel(self) -> None:
        self._call = None

    def take(self) -> Callable[[], object] | None:
        """The call, if it was not cancelled; it is given out once. For the world only."""
        call, self._call = self._call, None
        return call


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
        handle = Handle(max(when, self.now), lambda: call(*args))
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

    def trace_hash(self) -> str:
        """Of all that was traced so far."""
        return self._trace.hexdigest()

    def _step(self, limit: float) -> bool:
        while self._heap and self._heap[0][0] <= limit:
            when, _, handle = heapq.heappop(self._heap)
            call = handle.take()
            if call is not None:
                self.now = when
                self.calls += 1
                call()
                return True
        return False


@dataclass(slots=True)
class Traffic:
    """What became of what was sent: a run asserts here that its faults really happened."""

    sent: int = 0
    delivered: int = 0
    dropped: int = 0  # by chance
    duplicated: int = 0
    cut: int = 0  # by a cut between the two


class Network:
    """Carries calls between named places. Loss, duplication, delay and cuts may be changed at any time.

    A message that is under way when its direction is cut is lost too. Delays are drawn for each message, so messages
    overtake each other. A `reliable` message stands for one on a TCP connection: chance neither loses nor doubles it (a
    loss only delays it, as a retransmission would), a cut still stops it.
    """

    RETRANSMIT_SECONDS = 0.2  # TCP's usual minimum

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
        self._rng = world.rng_for("net")
        self._cuts: dict[tuple[str, str], None] = {}
        self._group_of: dict[str, int] = {}

    def cut(self, source: str, destination: str) -> None:
        """Nothing gets from `source` to `destination` any more; the other direction is another cut."""
        self._cuts[source, destination] = None

    def partition(self, groups: Sequence[Sequence[str]]) -> None:
        """Only members of the same group hear each other; a place in no group is its own."""
        self._group_of = {place: number for number, group in enumerate(groups) for place in group}

    def heal(self) -> None:
        """Undo every cut and partition."""
        self._cuts.clear()
        self._group_of.clear()

    def connected(self, source: str, destination: str) -> bool:
        """Does anything get from `source` to `destination` now?"""
        if (source, destination) in self._cuts:
            return False
        if source == destination or not self._group_of:
            return True
        group = self._group_of.get(source)
        return group is not None and group == self._group_of.get(destination)

    def send(self, source: str, destination: str, deliver: Callable[..., object], *args: Any, reliable: bool = False) -> bool:
        """Call `deliver(*args)` after a delay, unless it gets lost. False if the direction is cut now."""
        self.traffic.sent += 1
        if not self.connected(source, destination):
            self.traffic.cut += 1
            return False
        lost = self._rng.random() < self.loss
        if lost and not reliable:
            self.traffic.dropped += 1
            return True
        self._carry(source, destination, self.RETRANSMIT_SECONDS if lost else 0.0, deliver, args)
        if not reliable and self._rng.random() < self.duplication:
            self.traffic.duplicated += 1
            self._carry(source, destination, 0.0, deliver, args)
        return True

    def _carry(
        self, source: str, destination: str, extra: float, deliver: Callable[..., object], args: tuple[Any, ...]
    ) -> None:
        def arrive() -> None:
            if not self.connected(source, destination):
                self.traffic.cut += 1
                return
            self.traffic.delivered += 1
            deliver(*args)

        self.world.call_later(extra + self._rng.uniform(*self.delay), arrive)
