"""A token bucket: how often something may happen, counted in events or bytes, on a clock that is passed in."""


class Allowance:
    """`burst` at once, `rate` a second in the long run."""

    __slots__ = ("_at", "_burst", "_rate", "_tokens")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = burst
        self._tokens = burst
        self._at = now

    def left(self, now: float, amount: float = 1.0) -> bool:
        """May it happen now? Takes nothing."""
        self._tokens = min(self._burst, self._tokens + max(0.0, now - self._at) * self._rate)
        self._at = now
        return self._tokens >= amount

    def take(self, now: float, amount: float = 1.0) -> bool:
        """One event (or so much of what is counted), if it may happen now."""
        if not self.left(now, amount):
            return False
        self._tokens -= amount
        return True
