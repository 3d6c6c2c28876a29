"""What is planned for one run: how large the mesh is, how bad its network, what its users do and what breaks when.

Everything is drawn before the run begins, so that a run can assert in the end that what was planned has happened, and so that a
plan of a run that failed can be made smaller piece by piece (`shrink.py`). `plan_for` draws small meshes of a few tasks, in
which most mistakes show within half a second; `swarm.py` draws those of a lab.
"""

from dataclasses import dataclass
from enum import StrEnum
from random import Random

from meshq.task import Isolation


class Weather(StrEnum):
    """What may happen in a run, and so what may be asked of it."""

    FAIR = "fair"  # nothing breaks: one claim and one start for each task
    GENTLE = "gentle"  # loss, crashes and restarts, but nobody is cut off, stopped or without its agent for long: P3 holds
    STORMY = "stormy"  # everything


class FaultKind(StrEnum):
    KILL = "kill"  # SIGKILL of the agent
    KILL_ALL = "kill-all"  # of the agent, its shims and their tasks
    POWER = "power"  # the machine goes down, and comes back
    GONE = "gone"  # the machine goes down for good
    LEAVE = "leave"  # the agent leaves; it may join again
    STOP = "stop"  # the agent is stopped (SIGSTOP) or starved for a while
    PARTITION = "partition"
    DEAF = "deaf"  # one direction between two machines is cut
    SLOW = "slow"  # delays of up to half a second
    BRIDGE = "bridge"  # two groups that hear each other only through one peer between them
    OUTAGE = "outage"  # every machine goes down at once, and all come back within seconds of each other
    SLEEP = "sleep"  # the machine is suspended with all that runs on it; its clock goes on
    FREEZE = "freeze"  # the tasks of one machine are stopped, its agent is not
    CLOCK = "clock"  # the wall clock of one machine jumps
    WIPE = "wipe"  # its agent is killed, and its database is gone
    RESTORE = "restore"  # its agent is killed, and its database is what it was a while ago
    LIE = "lie"  # a member lies for a while (`liar.py`)
    CLONE = "clone"  # a copy of a machine runs beside it for a while, with the same identity and disk


CLASSIC = (
    FaultKind.KILL, FaultKind.KILL_ALL, FaultKind.POWER, FaultKind.GONE, FaultKind.LEAVE, FaultKind.STOP,
    FaultKind.PARTITION, FaultKind.DEAF, FaultKind.SLOW,
)  # fmt: skip
DESTRUCTIVE = (FaultKind.GONE, FaultKind.LEAVE, FaultKind.WIPE, FaultKind.RESTORE)
"""After which a copy of a task may be gone for good: one of them in a run, for an acknowledged task has two copies."""
GENTLE = (FaultKind.KILL, FaultKind.KILL_ALL, FaultKind.POWER, FaultKind.LEAVE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """`victim` is drawn among those that it can hit; `seconds`: until it is over."""

    at: float
    kind: FaultKind
    seconds: float
    effects: int | None = None  # strike between two effects of the victim, after so many more; None: at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    at: float
    name: str
    gpus: int
    retries: int
    priority: int
    time_limit: float | None
    lease: float | None
    source: int | None  # tasks of the same number share a source
    cancelled_after: float | None  # its user has its id
    cancelled_at_start: bool = False  # just while its user code is being started
    isolation: str = Isolation.CONTINUE.value


class Mode(StrEnum):
    """What a run asks for."""

    SAFETY = "safety"  # nothing forbidden ever happens; after all faults have ended everything is equal and done
    LIVENESS = "liveness"  # the same for a majority, while the rest stays ill for ever


class Illness(StrEnum):
    """What some machines have for ever in a liveness run."""

    GONE = "gone"  # it has no power
    HALF_DEAF = "half-deaf"  # nothing gets to it, and all hear it
    MUTE = "mute"  # it hears all, and nothing comes from it
    SLOW = "slow"  # all that it sends and gets is late, and much of it is lost
    APART = "apart"  # cut off


class ActionKind(StrEnum):
    """What users do besides submitting and cancelling."""

    MOVE = "move"
    MOVE_TO = "move-to"  # into another queue
    PAUSE = "pause"  # a queue; the same user resumes it
    CLEAR = "clear"
    KEEP = "keep"  # the mesh shall keep only so many tasks that are over


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    at: float
    kind: ActionKind
    number: int  # which task of those that wait, which place, or how many to keep
    seconds: float = 0.0  # until the queue is resumed


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    seed: int
    weather: Weather
    profile: str  # of gossip and ledger
    slots: tuple[int, ...]  # of each peer
    gpus: tuple[int, ...]  # of each peer
    loss: float
    duplication: float
    delay: tuple[float, float]
    reliable: bool  # requests travel as on TCP connections; otherwise they are lost and doubled as packets are
    release_chance: float
    build_seconds: float
    page_rows: int  # in one page of a sync, at most
    run_seconds: float  # of a task, at most
    seconds: float  # until the faults end
    submissions: tuple[Submission, ...]
    faults: tuple[Fault, ...]
    actions: tuple[Action, ...] = ()
    mode: Mode = Mode.SAFETY
    ill: tuple[tuple[int, Illness], ...] = ()  # by number of the peer: in a liveness run, from the calm on
    rates: tuple[float, ...] = ()  # of the machines' clocks; all 1 if empty
    flips: float = 0.0  # share of datagrams in which a bit flips
    replays: bool = False  # whoever starts anew gets old packets once more

    @property
    def fair(self) -> bool:
        return self.weather is Weather.FAIR


DETECTION = {"lan": 8.0, "fast": 2.0}
"""Roughly how long a death goes unnoticed, in seconds: the unit of a run's length."""


def plan_for(seed: int, peers: int | None = None, weather: Weather | None = None) -> Plan:
    rng = Random(f"{seed}/plan")
    weather = weather or rng.choices(list(Weather), (1, 3, 6))[0]
    profile = rng.choice(("lan", "fast"))
    count = rng.choice((3, 3, 4, 5, 5, 6, 7))
    count = peers or count
    unit = DETECTION[profile]
    seconds = 4.5 * unit
    fair = weather is Weather.FAIR
    faults = () if fair else _faults(rng, weather, unit, seconds)
    gpus = tuple(rng.choice((0, 0, 1, 2)) for _ in range(count))
    return Plan(
        seed=seed,
        weather=weather,
        profile=profile,
        slots=tuple(rng.choice((1, 2, 2, 3)) for _ in range(count)),
        gpus=gpus,
        loss=0.0 if fair else rng.choice((0.0, 0.05, 0.1, 0.2)),
        duplication=0.0 if fair else rng.choice((0.0, 0.05)),
        delay=rng.choice(((0.0005, 0.003), (0.002, 0.02))),
        reliable=weather is not Weather.STORMY or rng.random() < 0.5,
        release_chance=0.0 if fair else 0.05,
        build_seconds=rng.choice((0.2, 3.0)),
        page_rows=rng.choice((1, 2, 1_000)),
        run_seconds=3.0 * unit,
        seconds=seconds,
        submissions=tuple(submission(rng, number, seconds, any(gpus), fair) for number in range(rng.randint(6, 16))),
        faults=faults,
    )


def submission(rng: Random, number: int, seconds: float, gpus: bool, fair: bool) -> Submission:
    return Submission(
        at=2.0 + rng.uniform(0.0, seconds - 2.0),
        name=f"t{number}",
        gpus=rng.choice((0, 0, 0, 1)) if gpus else 0,
        retries=rng.choice((0, 0, 2)),
        priority=rng.choice((0, 0, 5)),
        time_limit=rng.choice((None, None, 100.0)),
        lease=None if fair else rng.choice((None, None, None, 20.0)),
        source=rng.choice((None, number // 3)),
        cancelled_after=rng.uniform(0.0, seconds / 3) if rng.random() < 0.12 else None,
        cancelled_at_start=rng.random() < 0.05,
    )


def _faults(rng: Random, weather: Weather, unit: float, seconds: float) -> tuple[Fault, ...]:
    kinds = list(CLASSIC) if weather is Weather.STORMY else list(GENTLE)
    drawn = [rng.choice(kinds) for _ in range(rng.randint(3, 9))]
    once = (FaultKind.GONE, FaultKind.LEAVE)
    chosen = [kind for number, kind in enumerate(drawn) if kind not in once or kind not in drawn[:number]]
    if FaultKind.GONE in chosen and FaultKind.LEAVE in chosen:
        chosen.remove(FaultKind.LEAVE)  # a task with two copies must survive what goes for good
    faults = [fault(rng, kind, weather, unit, seconds) for kind in chosen]
    return tuple(sorted(faults, key=lambda fault: fault.at))


def fault(rng: Random, kind: FaultKind, weather: Weather, unit: float, seconds: float) -> Fault:
    deadly = kind in (FaultKind.KILL, FaultKind.KILL_ALL, FaultKind.POWER, FaultKind.GONE)
    return Fault(
        at=3.0 + rng.uniform(0.0, seconds - 3.0),
        kind=kind,
        seconds=_seconds(rng, kind, weather, unit),
        effects=rng.randint(0, 12) if deadly and rng.random() < 0.6 else None,
    )


def _seconds(rng: Random, kind: FaultKind, weather: Weather, unit: float) -> float:
    """In gentle weather an agent is back before anybody could hold its machine dead and its lease over."""
    if kind is FaultKind.KILL and weather is Weather.GENTLE:
        return rng.uniform(0.02, 1.0) * unit
    if kind is FaultKind.OUTAGE:
        return rng.uniform(0.5, 5.0)
    if kind in (FaultKind.PARTITION, FaultKind.DEAF, FaultKind.BRIDGE):
        return 1.5 + rng.choice((rng.uniform(0.0, 0.5), rng.uniform(2.0, 4.0))) * unit
    if kind in (FaultKind.STOP, FaultKind.SLEEP, FaultKind.FREEZE):
        return rng.choice((rng.uniform(0.05, 0.3), rng.uniform(0.3, 2.5))) * unit
    return rng.choice((rng.uniform(0.02, 0.5), rng.uniform(0.5, 3.0))) * unit
