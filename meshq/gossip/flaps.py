"""Whether this peer flaps: it is suspected again and again, and each time comes back to refute.

Such a peer is no good place for a new task: its next suspicion may not be refuted in time, and then the task starts somewhere
else a second time. It stays a member and goes on with what it has, but claims nothing new for a while, which doubles each time
that it flaps again. It knows so itself from its refutations, so no vote is needed, and everybody can be told why.

What one other peer says counts for nothing in a mesh of three or more: that one may be the sick one.
"""

import math
from collections import deque
from typing import Final

WINDOW: Final = 60.0
REFUTATIONS: Final = 3  # within the window
OBSERVERS: Final = 2  # different ones, in a mesh where there can be two
DAMPED_MIN: Final = 120.0
DAMPED_MAX: Final = 3600.0
CALM: Final = 1800.0  # after which the doubling begins anew


class Flaps:
    """The refutations of one peer, and what follows from them."""

    def __init__(self) -> None:
        self._recent: deque[tuple[float, tuple[str, ...]]] = deque(maxlen=REFUTATIONS)
        self._seconds = DAMPED_MIN
        self._until = -math.inf

    def refuted(self, now: float, observers: tuple[str, ...]) -> None:
        """I had to refute a suspicion that these stand behind."""
        self._recent.append((now, observers))
        many = len(self._recent) == REFUTATIONS and now - self._recent[0][0] <= WINDOW
        different = {each for _, each_observers in self._recent for each in each_observers}
        if not many or len(different) < OBSERVERS:
            return
        self._seconds = DAMPED_MIN if now - self._until > CALM else min(DAMPED_MAX, 2 * self._seconds)
        self._until = now + self._seconds
        self._recent.clear()

    def left(self, now: float) -> float:
        """For how many seconds more nothing new is to be claimed."""
        return max(0.0, self._until - now)
