"""A token bucket: how often something may happen, counted in events, on a clock that is passed in."""


class Allowance:
    """`burst` at once, `rate` a second in the long run."""

    __slots__ = ("_at", "_burst", "_rate", "_tokens")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = burst
        self._tokens = burst
        self._at = now

    def left(self, now: float) -> bool:
        """May it happen now? Takes nothing."""
        self._tokens = min(self._burst, self._tokens + max(0.0, now - self._at) * self._rate)
        self._at = now
        return self._tokens >= 1.0

    def take(self, now: float) -> bool:
        """One event, if it may happen now."""
        if not self.left(now):
            return False
        self._tokens -= 1.0
        return True
