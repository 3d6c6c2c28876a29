"""How many gossip packets a second one core gets through: sealed, opened, parsed, handled, and answered.

The traffic is that of an idle mesh of a hundred peers with telemetry: it is simulated, and all that some of its peers
receive, and when their timers run out, is recorded. What is measured is the same peers living through that again: each packet
is opened and handled, each timer handled, and whatever they send is packed and sealed. Sockets are left out. What counts is the
time of the processor.
"""

import copy
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Final

from benches.measured import Figure
from meshq.gossip import wire
from meshq.gossip.effects import Send
from meshq.gossip.member import Address
from meshq.gossip.swim import Swim
from meshq.trust.seal import Opener, Sealer, key_id
from tests.simulator.gossip_peer import GossipPeer
from tests.simulator.trials.setup import Scenario, Setup
from tests.simulator.trials.trial import Trial

PEERS: Final = 100
WATCHED: Final = 30  # of them
SECONDS: Final = 20.0  # that are recorded: two periods of telemetry
ROUNDS: Final = 7
GOAL: Final = 20_000.0
KEY: Final = bytes(32)
TIMER: Final = "timer"


@dataclass(slots=True)
class Recording:
    """What happens to one peer: `core` as it is before, then packets (sealed, and where they are from) and timers, by time."""

    core: Swim
    events: list[tuple[float, bytes | None, Address | None, str]] = field(default_factory=list)


def measure() -> list[Figure]:
    recordings, kinds = record()
    rounds = [live_again(recordings) for _ in range(ROUNDS)]
    packets = sum(kinds.values())
    rates = [packets / seconds for seconds, _ in rounds]
    shares = ", ".join(f"{name} {count / packets:.0%}" for name, count in sorted(kinds.items()))
    seconds, best = min(rounds, key=lambda each: each[0])
    awake = seconds / sum(best.values())  # the share of the wall's time in which this process had a core
    each = [Figure(f"… {kind}: one takes", f"{awake * best[kind] / kinds[kind] * 1e6:.0f} µs") for kind in sorted(kinds)]
    return [
        Figure("packets a second: opened, handled, what follows packed and sealed", f"{median(rates):,.0f}", f"≥ {GOAL:,.0f}"),
        Figure(f"… in the slowest and the fastest of {ROUNDS} rounds", f"{min(rates):,.0f} to {max(rates):,.0f}"),
        Figure("… what they were", shares),
        *each,
        Figure("… timers (probes, digests, gossip), for each packet", f"{awake * best[TIMER] / packets * 1e6:.0f} µs"),
    ]


def record() -> tuple[list[Recording], Mapping[str, int]]:
    """The recordings, and how many packets of each kind are in them."""
    trial = Trial(Setup(scenario=Scenario.IDLE, peers=PEERS, seed=1))
    trial.begin()
    sealers = {peer.address: Sealer(KEY, number.to_bytes(16, "big")) for number, peer in enumerate(trial.peers)}
    recordings: list[Recording] = []
    kinds: dict[str, int] = defaultdict(int)
    for peer in trial.peers[:WATCHED]:
        recordings.append(_watch(trial, peer, sealers, kinds))
    trial.run(SECONDS)
    return recordings, dict(kinds)


def _watch(trial: Trial, peer: GossipPeer, sealers: Mapping[Address, Sealer], kinds: dict[str, int]) -> Recording:
    """Record what the peer's core is given from now on."""
    core = peer.core
    recording = Recording(copy.deepcopy(core))

    class Recorder:
        """The core, with ears."""

        def __getattr__(self, name: str) -> object:
            return getattr(core, name)

        def handle_packet(self, now: float, data: bytes, source: Address) -> object:
            kind = _kind(data)
            kinds[kind] += 1
            recording.events.append((now, sealers[source].seal(data), source, kind))
            return core.handle_packet(now, data, source)

        def handle_timeout(self, now: float) -> object:
            recording.events.append((now, None, None, TIMER))
            return core.handle_timeout(now)

    peer.swim = Recorder()  # type: ignore[assignment]  # it is the core in all but name
    return recording


def _kind(data: bytes) -> str:
    packet = wire.read_packet(data)
    if packet.records:
        return "records"
    if packet.digest:
        return "digest"
    return type(packet.message).__name__.lower() + (" with rumors" if packet.rumors else "")


def live_again(recordings: list[Recording]) -> tuple[float, dict[str, float]]:
    """Seconds of this process's processor for all of it, and by the wall for each kind of event."""
    spent: dict[str, float] = defaultdict(float)
    lives = [
        (copy.deepcopy(each.core), Opener({key_id(KEY): KEY}), Sealer(KEY, bytes(15) + b"\xff"), each.events)
        for each in recordings
    ]
    clock, began_all = time.perf_counter, time.process_time()
    for core, opener, sealer, events in lives:
        for now, sealed, source, kind in events:
            began = clock()
            if sealed is None or source is None:
                effects = core.handle_timeout(now)
            else:
                plain = opener.open(sealed)
                assert plain is not None
                effects = core.handle_packet(now, plain, source)
            for effect in effects:
                if isinstance(effect, Send):
                    sealer.seal(effect.packet)
            core.deadline()
            spent[kind] += clock() - began
    return time.process_time() - began_all, spent
