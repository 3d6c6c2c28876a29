"""Which seeds to ask, and when: an address in a `join` is all that a peer has where mDNS does not reach.

A seed may start later than this peer, its name may mean another address tomorrow, and a mesh that was split heals through its
seeds. So it is never enough that they were asked once.

- As long as nobody else is there, all are asked, after 1, 2, 4 … 30 s.
- As long as more than half are missing, one of them is, every 30 s; gossip itself tries one of the missing then.
- And however well the mesh is, each that was not asked for about five minutes is: two sides that were cut off from each other
  for longer than the dead are remembered (`dead_kept`) are both well, and neither knows any more that there is another one.

Whoever asks resolves the name each time, and leaves out the addresses of live members.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from random import Random

PAUSE_MIN: Final = 1.0
PAUSE_MAX: Final = 30.0
REST: Final = 300.0  # give or take a quarter, so that a lab that was started at once does not ask at once


class Seeds:
    """When each is asked. Before the first call of `due` none was."""

    def __init__(self, seeds: Sequence[str], rng: "Random", now: float) -> None:
        self._seeds = tuple(dict.fromkeys(seeds))
        self._rng = rng
        self._pause = PAUSE_MIN
        self._all_at = now  # as long as nobody is there
        self._one_at = now  # as long as more than half are missing
        self._rested_at = dict.fromkeys(self._seeds, now)

    def due(self, now: float, alive: int, missed: int) -> tuple[str, ...]:
        """Those to ask now, where so many others are alive, and so many are known that are not and have not left."""
        due = self._due(now, alive, missed)
        for seed in due:
            self._rested_at[seed] = now + self._rng.uniform(0.75, 1.25) * REST
        return due

    def _due(self, now: float, alive: int, missed: int) -> tuple[str, ...]:
        if not alive:
            if now < self._all_at:
                return ()
            self._all_at, self._pause = now + self._pause, min(PAUSE_MAX, 2 * self._pause)
            return self._seeds
        self._all_at, self._pause = now + PAUSE_MIN, PAUSE_MIN
        if self._seeds and alive < missed and now >= self._one_at:
            self._one_at = now + PAUSE_MAX
            return (self._rng.choice(self._seeds),)
        return tuple(seed for seed in self._seeds if now >= self._rested_at[seed])
