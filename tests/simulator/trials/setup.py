"""What one trial is, as values: what goes in (`Setup`) and what comes out (`Result`). Both travel between processes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from meshq.gossip.swim import PROFILES, SwimConfig


class Scenario(StrEnum):
    """What happens to the mesh."""

    CRASH = "crash"  # one peer is gone without a word
    CHANGE = "change"  # one leaves, one takes another name, one is new
    COLD = "cold"  # all start at once and know only the first
    IDLE = "idle"  # nothing but telemetry
    LOSS = "loss"  # a share of all packets is lost, for long
    STARVED = "starved"  # some peers are stopped for 0.5 to 2 s at random times
    ONE_WAY = "one-way"  # some peers are deaf, or mute
    PARTITION = "partition"  # two halves do not reach each other for longer than anything is remembered
    FLAPPING = "flapping"  # some peers come and go, each with its network cable
    BRIDGE = "bridge"  # two sides reach each other only through one peer
    UDP_BLOCKED = "udp-blocked"  # between some pairs only TCP works


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """One trial. `seconds` is how long the part lasts that is measured; `share`: of the peers, or of the pairs, that the
    scenario strikes. 0 is the scenario's own."""

    scenario: Scenario
    peers: int = 10
    seed: int = 0
    loss: float = 0.0
    profile: str = "lan"
    seconds: float = 0.0
    share: float = 0.0
    record_bytes: int = 250  # telemetry of one peer; 0: none is published
    change_seconds: float = 60.0  # between changes of a peer's free slots, in the mean: each is published at once
    config: tuple[tuple[str, float], ...] = ()  # what differs from the profile
    discovery: bool = True  # does mDNS show everybody the addresses of all the time, as on one network?

    def swim_config(self) -> SwimConfig:
        profile = PROFILES[self.profile]
        return replace(profile, **{name: type(getattr(profile, name))(value) for name, value in self.config})


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrongs:
    """What was believed of peers that ran. Harmed are those that the trial made look dead. A death is of one incarnation."""

    suspicions: int  # of healthy peers by healthy peers
    suspicions_harmed: int  # all others
    deaths: int
    deaths_healthy: int  # of these: of healthy peers
    deaths_believed: int  # of these: in the view of any healthy peer
    views_max: int  # so many healthy peers believed in one of these
    words_min: int  # so few had made a probe that failed, of all who might have


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What one trial measured. A sample is of one event, one peer or one pair, as its figure's name says."""

    setup: Setup
    figures: Mapping[str, tuple[float, ...]]
    wrongs: Wrongs
    counts: Mapping[str, int]  # of effects, by kind, and of what else happened
    happened: Mapping[str, int]  # the faults, which are asserted to have happened
    peer_hours: float
    real_seconds: float
    trace_hash: str


@dataclass(frozen=True, slots=True)
class Spread:
    """Of samples: the smallest value that at least so many of them do not exceed."""

    samples: int
    median: float
    p99: float
    max: float

    def shown(self) -> str:
        return f"{_number(self.median)} (p99 {_number(self.p99)}, max {_number(self.max)})"


def spread(samples: Sequence[float]) -> Spread:
    ordered = sorted(samples)
    assert ordered, "nothing was measured"

    def quantile(share: float) -> float:
        return ordered[max(0, math.ceil(share * len(ordered)) - 1)]

    return Spread(len(ordered), quantile(0.5), quantile(0.99), ordered[-1])


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


SECONDS_MAX: Final = 600.0  # of virtual time for anything that should have happened long before
