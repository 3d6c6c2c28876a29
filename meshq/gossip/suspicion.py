"""How long a suspect has to refute: Lifeguard's shrinking timeout, as functions of numbers.

A suspicion starts with the longest timeout, because its observer (whose own probes failed) may be the one who is slow. Each
further observer of the same incarnation confirms it and so shortens it, down to the shortest at `needed` confirmations. So one
sick observer can do little, and a real crash, which everybody notices, is settled soon. (Dadgar et al., "Lifeguard",
arXiv:1707.00788.)
"""

import math
from dataclasses import dataclass, replace

from meshq.gossip.profile import SwimConfig

MEMBERS_FOR_CONFIRMATIONS = 4  # with fewer there are not enough others to confirm anything: the shortest timeout at once
MEMBERS_FOR_OBSERVERS = 5
OBSERVERS = 2


def timeout_min(config: SwimConfig, members: int) -> float:
    """The shortest suspicion in a mesh of `members`: long enough for a rumor to travel there and back."""
    return config.suspicion_multiplier * max(1.0, math.log10(max(1, members))) * config.probe_interval


def confirmations_needed(config: SwimConfig, members: int) -> int:
    return 0 if members < MEMBERS_FOR_CONFIRMATIONS else config.confirmations


def observers_needed(members: int) -> int:
    """How many different observers a death needs to be believed; none are counted where there are too few members."""
    return OBSERVERS if members >= MEMBERS_FOR_OBSERVERS else 0


def timeout(shortest: float, longest: float, needed: int, confirmations: int) -> float:
    """Falls from `longest` to `shortest` with the logarithm of the confirmations: the first counts most."""
    if needed <= 0 or confirmations >= needed:
        return shortest
    return longest - (longest - shortest) * math.log(confirmations + 1) / math.log(needed + 1)


@dataclass(frozen=True, slots=True)
class Suspicion:
    """One suspect's timer at this peer. `observers` are distinct; the first is no confirmation of itself."""

    since: float
    shortest: float
    longest: float
    needed: int
    observers: tuple[str, ...]

    @property
    def deadline(self) -> float:
        confirmations = max(0, len(self.observers) - 1)
        return self.since + timeout(self.shortest, self.longest, self.needed, confirmations)

    def confirmed(self, observers: tuple[str, ...]) -> "Suspicion":
        """With those of `observers` that are new, as far as they still count; the same suspicion if none does."""
        new = [observer for observer in dict.fromkeys(observers) if observer not in self.observers]
        merged = (*self.observers, *new)[: _observers_max(self.needed)]
        return replace(self, observers=merged) if len(merged) > len(self.observers) else self


def begin(config: SwimConfig, members: int, now: float, observers: tuple[str, ...]) -> Suspicion:
    shortest = timeout_min(config, members)
    needed = confirmations_needed(config, members)
    first = tuple(dict.fromkeys(observers))[: _observers_max(needed)]
    return Suspicion(now, shortest, shortest * config.suspicion_max_multiplier, needed, first)


def _observers_max(needed: int) -> int:
    """More say nothing new. A mesh that grows meanwhile may need observers where it needed no confirmations."""
    return max(needed + 1, OBSERVERS)
