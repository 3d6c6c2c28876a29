"""Meshes as large as a lab's: 5 to 20 peers and 50 to 200 tasks, of which each seed draws what may go wrong at all.

Swarm testing (Groce and others, "Swarm Testing", ISSTA 2012): a run in which everything is possible at the same rate rarely
gets deep into anything, since faults mask each other. So each seed first draws which kinds of faults there are in its run and
how much of each, and which things users do; some runs have no loss at all, some nothing but partitions.
"""

from random import Random
from typing import Final

from meshq.task import Isolation
from tests.simulator.plan import (
    CLASSIC,
    DESTRUCTIVE,
    DETECTION,
    Action,
    ActionKind,
    Fault,
    FaultKind,
    Illness,
    Mode,
    Plan,
    Submission,
    Weather,
    fault,
    submission,
)

PEERS: Final = (5, 20)
TASKS: Final = (50, 200)
MEAN_RUN: Final = 0.24  # of a task, of the longest that a run allows: see `Machine.spawn`
KIND_CHANCE: Final = 0.4
LONG_CHANCE: Final = 0.06  # of a partition, that it lasts for minutes
LONG_SECONDS: Final = (60.0, 240.0)
DELAYS: Final = ((0.0005, 0.003), (0.0005, 0.003), (0.002, 0.02), (0.1, 0.3))
FAR_SECONDS: Final = 0.1  # over such distances a page for each row would take longer than anything that is promised
STORM: Final = tuple(kind for kind in FaultKind if kind not in (FaultKind.LIE, FaultKind.CLONE))
MORE: Final = ((FaultKind.LIE, 0.15), (FaultKind.CLONE, 0.15))  # in how many of the storms there is one
HOUR_CHANCE: Final = 0.02  # of a storm over a small mesh, that it is cut in two for an hour
HOUR: Final = 3_600.0
HOUR_PEERS_MAX: Final = 6
RATES: Final = ((1.0, 1.0), (1.0, 1.0), (0.99, 1.01), (0.95, 1.05))
STOP_TASKS_RATES: Final = (0.99, 1.01)  # more than that is not promised for them (`grants.py`)


def swarm_plan(seed: int, mode: Mode | None = None) -> Plan:
    """The plan of this seed; the mode, too, is the seed's unless it is given."""
    rng = Random(f"{seed}/swarm")
    mode = mode or rng.choices(list(Mode), (3, 2))[0]
    profile = rng.choice(("lan", "fast"))
    weather = Weather.STORMY if mode is Mode.LIVENESS else rng.choices(list(Weather), (1, 2, 7))[0]
    fair = weather is Weather.FAIR
    unit = DETECTION[profile]
    seconds = rng.uniform(2.5, 5.0) * unit
    count, tasks = _between(rng, PEERS), _between(rng, TASKS)
    slots = tuple(rng.choice((1, 2, 2, 3)) for _ in range(count))
    gpus = tuple(rng.choice((0, 0, 1, 2)) for _ in range(count))
    stop_share = rng.choice((0.0, 0.0, 0.15, 0.4))
    faults = () if fair else _faults(rng, weather, unit, seconds)
    more = _more_faults(Random(f"{seed}/swarm/later"), count, unit, seconds) if weather is Weather.STORMY else ()
    low, high = rng.choice(RATES if not stop_share else (*RATES[:2], STOP_TASKS_RATES))
    return Plan(
        seed=seed,
        weather=weather,
        profile=profile,
        slots=slots,
        gpus=gpus,
        loss=0.0 if fair else rng.choice((0.0, 0.05, 0.1, 0.2, 0.3)),
        duplication=0.0 if fair else rng.choice((0.0, 0.05, 0.2)),
        delay=(delay := DELAYS[0] if fair else rng.choice(DELAYS[:3] if weather is Weather.GENTLE else DELAYS)),
        reliable=weather is not Weather.STORMY or rng.random() < 0.5 or mode is Mode.LIVENESS,  # who is deaf has no TCP
        release_chance=0.0 if fair else rng.choice((0.0, 0.05)),
        build_seconds=rng.choice((0.2, 3.0)),
        page_rows=max(rng.choice((1, 10, 1_000)), 20 if delay[0] >= FAR_SECONDS else 1),
        run_seconds=min(3.0 * unit, seconds * sum(slots) / tasks / MEAN_RUN),
        seconds=seconds,
        submissions=tuple(_submission(rng, number, seconds, any(gpus), fair, stop_share) for number in range(tasks)),
        faults=tuple(sorted((*faults, *more), key=lambda each: each.at)),
        actions=_actions(rng, seconds),
        mode=mode,
        ill=_ill(rng, count, faults) if mode is Mode.LIVENESS else (),
        rates=tuple(rng.uniform(low, high) for _ in range(count)),
        flips=0.0 if fair else rng.choice((0.0, 0.0, 0.01)),
        replays=weather is Weather.STORMY and rng.random() < 0.3,
    )


def _submission(rng: Random, number: int, seconds: float, gpus: bool, fair: bool, stop_share: float) -> Submission:
    drawn = submission(rng, number, seconds, gpus, fair)
    stop = rng.random() < stop_share
    return drawn if not stop else _stopping(drawn)


def _stopping(drawn: Submission) -> Submission:
    return Submission(
        at=drawn.at, name=drawn.name, gpus=drawn.gpus, retries=drawn.retries, priority=drawn.priority,
        time_limit=drawn.time_limit, lease=drawn.lease, source=drawn.source, cancelled_after=drawn.cancelled_after,
        cancelled_at_start=drawn.cancelled_at_start, isolation=Isolation.STOP.value,
    )  # fmt: skip


def _faults(rng: Random, weather: Weather, unit: float, seconds: float) -> tuple[Fault, ...]:
    """Of the kinds that this seed has; of those that destroy a copy of a task at most one."""
    gentle = (FaultKind.KILL, FaultKind.KILL_ALL, FaultKind.POWER, FaultKind.LEAVE, FaultKind.CLOCK)
    kinds = [kind for kind in (gentle if weather is Weather.GENTLE else STORM) if rng.random() < KIND_CHANCE]
    kinds = kinds or [rng.choice(gentle if weather is Weather.GENTLE else CLASSIC)]
    drawn = [rng.choice(kinds) for _ in range(rng.randint(3, 14))]
    destructive = [number for number, kind in enumerate(drawn) if kind in DESTRUCTIVE][:1]
    outages = [number for number, kind in enumerate(drawn) if kind is FaultKind.OUTAGE][:1]
    once = (*DESTRUCTIVE, FaultKind.OUTAGE)
    chosen = [kind for number, kind in enumerate(drawn) if kind not in once or number in (*destructive, *outages)]
    faults = [_fault(rng, kind, weather, unit, seconds) for kind in chosen or [FaultKind.KILL]]
    return tuple(sorted(faults, key=lambda each: each.at))


def _more_faults(rng: Random, count: int, unit: float, seconds: float) -> tuple[Fault, ...]:
    """What was added later. It is drawn apart from all else, so that every seed keeps the rest of its plan."""
    kinds = [kind for kind, chance in MORE if rng.random() < chance]
    times = [(3.0 + rng.uniform(0.0, seconds - 3.0), rng.uniform(0.5, 3.0) * unit) for _ in kinds]
    faults = [Fault(at=at, kind=kind, seconds=lasts) for kind, (at, lasts) in zip(kinds, times, strict=True)]
    if count <= HOUR_PEERS_MAX and rng.random() < HOUR_CHANCE:
        faults.append(Fault(at=rng.uniform(3.0, seconds), kind=FaultKind.PARTITION, seconds=HOUR))
    return tuple(faults)


def _fault(rng: Random, kind: FaultKind, weather: Weather, unit: float, seconds: float) -> Fault:
    drawn = fault(rng, kind, weather, unit, seconds)
    if kind in (FaultKind.PARTITION, FaultKind.DEAF) and rng.random() < LONG_CHANCE:
        return Fault(at=drawn.at, kind=kind, seconds=rng.uniform(*LONG_SECONDS))
    return drawn


def _actions(rng: Random, seconds: float) -> tuple[Action, ...]:
    kinds = [kind for kind in ActionKind if rng.random() < KIND_CHANCE]
    if not kinds:
        return ()
    actions = []
    for _ in range(rng.randint(1, 12)):
        kind = rng.choice(kinds)
        number = rng.choice((5, 20)) if kind is ActionKind.KEEP else rng.randrange(1_000)
        actions.append(
            Action(at=2.5 + rng.uniform(0.0, seconds - 2.5), kind=kind, number=number, seconds=rng.uniform(0.5, 5.0))
        )
    return tuple(sorted(actions, key=lambda action: action.at))


def _ill(rng: Random, count: int, faults: tuple[Fault, ...]) -> tuple[tuple[int, Illness], ...]:
    """Fewer than half of the peers, with whoever is gone for good: only a majority may hold others lost."""
    kinds = [kind for kind in Illness if rng.random() < 0.5] or list(Illness)
    if any(each.kind in DESTRUCTIVE for each in faults):
        kinds = [kind for kind in kinds if kind is not Illness.GONE] or [Illness.HALF_DEAF]
    lost = sum(each.kind in (FaultKind.GONE, FaultKind.LEAVE) for each in faults)
    victims = rng.sample(range(count), rng.randint(1, (count - 1) // 2 - lost))
    drawn = [(victim, rng.choice(kinds)) for victim in sorted(victims)]
    gone = [victim for victim, kind in drawn if kind is Illness.GONE][1:]
    return tuple((victim, Illness.APART if victim in gone else kind) for victim, kind in drawn)


def _between(rng: Random, limits: tuple[int, int]) -> int:
    """Small ones as often as large ones: there are as many from 5 to 10 as from 10 to 20."""
    low, high = limits
    return min(high, int(low * ((high + 1) / low) ** rng.random()))
