"""A simulated machine: what outlives the agent on it, and what outlives the power.

The disk keeps what was committed; a power cut takes back commits that were not made durable, the latest first. Attempts live
in folders, as `meshq/exec/attempts.py` describes them, and their processes run on without an agent; a power cut ends them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from meshq.exec.worker import Adopted, Exited, NeverStarted, StillRunning, Vanished
from meshq.gossip.swim import KnownPeer
from meshq.ids import ActorId, Fence, ObjectId, TaskId
from meshq.ledger.effects import Grant, Persist
from meshq.ledger.row import Row
from meshq.ledger.settings import NOTHING_SET, Settings
from meshq.task import Claimed
from tests.simulator.invariants import Watcher
from tests.simulator.world import Clock, Handle, World

WALL = 1_700_000_000.0  # what the wall clocks show at the beginning; nothing may depend on it


@dataclass(slots=True)
class Disk:
    """The ledger's database, the sources, the snapshot of known peers."""

    ledger_epoch: int = 1
    rows: dict[TaskId, Row] = field(default_factory=dict)
    vector: dict[ActorId, int] = field(default_factory=dict)
    floors: dict[ActorId, int] = field(default_factory=dict)
    settings: Settings = NOTHING_SET
    grants: dict[TaskId, Grant] = field(default_factory=dict)
    sources: dict[ObjectId, None] = field(default_factory=dict)
    known_peers: tuple[KnownPeer, ...] = ()
    new_actor: bool = True  # no agent has run as the actor of this ledger epoch
    _undo: list[Callable[[], None]] = field(default_factory=list)  # of what is not durable, in the order of the commits

    def commit(self, persist: Persist) -> None:
        """One transaction. A durable one makes all before it durable, too, as a write-ahead log does."""
        if not persist.durable:
            self._undo.append(self._undoing(persist))
        self.rows |= {row.task: row for row in persist.rows}
        for task in persist.purged:
            self.rows.pop(task, None)
        self.vector |= {ActorId(actor): seq for actor, seq in persist.vector.items()}
        self.floors |= {ActorId(actor): seq for actor, seq in persist.floors.items()}
        self.settings = persist.settings or self.settings
        for task, grant in persist.grants.items():
            if grant is None:
                self.grants.pop(task, None)
            else:
                self.grants[task] = grant
        if persist.durable:
            self._undo.clear()

    def _undoing(self, persist: Persist) -> Callable[[], None]:
        """What brings back all that this commit changes, if nothing was committed after it."""
        rows = {task: self.rows.get(task) for task in (*(row.task for row in persist.rows), *persist.purged)}
        vector, floors = ({actor: before.get(ActorId(actor)) for actor in changed} for before, changed in (
            (self.vector, persist.vector), (self.floors, persist.floors)))  # fmt: skip
        grants = {task: self.grants.get(task) for task in persist.grants}
        settings = self.settings

        def undo() -> None:
            self.settings = settings
            _put_back(self.rows, rows)
            _put_back(self.vector, vector)
            _put_back(self.floors, floors)
            _put_back(self.grants, grants)

        return undo

    def copy(self) -> "Disk":
        """As a backup would have it: what is committed now."""
        kept = replace(self, rows=dict(self.rows), vector=dict(self.vector), floors=dict(self.floors), grants=dict(self.grants))
        kept._undo, kept.new_actor = [], False
        return kept

    def restore(self, older: "Disk") -> int:
        """The database is this older copy of itself; how many rows are now other ones."""
        changed = sum(1 for task, row in self.rows.items() if older.rows.get(task) != row)
        kept = older.copy()
        self.rows, self.vector, self.floors = kept.rows, kept.vector, kept.floors
        self.settings, self.grants = kept.settings, kept.grants
        self.ledger_epoch = kept.ledger_epoch
        self._undo.clear()
        return changed

    def wipe(self) -> int:
        """The database is gone, and its home knows that it had one; how many rows that were."""
        gone = len(self.rows)
        self.restore(Disk(ledger_epoch=self.ledger_epoch + 1))
        self.new_actor = True
        return gone

    def lose_power(self, rng: Random) -> int:
        """Some or all of what is not durable is gone; how many commits that are."""
        lost = rng.randint(0, len(self._undo))
        for undo in reversed(self._undo[len(self._undo) - lost :]):
            undo()
        self._undo.clear()
        return lost


def _put_back(mapping: dict[Any, Any], before: Mapping[Any, Any]) -> None:
    for key, value in before.items():
        if value is None:
            mapping.pop(key, None)
        else:
            mapping[key] = value


@dataclass(slots=True)
class Folder:
    """One attempt. The same facts as in the real folder decide what became of it."""

    claimed: Claimed
    gpus: tuple[int, ...] = ()
    started: bool = False  # by a shim: user code ran or runs
    never: bool = False  # `started` was made by an agent: no shim may start it any more
    ends: Handle | None = None  # of the process that runs
    stopping: str = ""
    kept: Handle | None = None  # when it is killed unless its lease is renewed
    exit: Exited | None = None
    reported: bool = False


class Machine:
    """The attempts of one machine and the processes of those that run. `watcher` learns of every start and end."""

    def __init__(self, world: World, watcher: Watcher, name: str, seconds_max: float, clock: Clock) -> None:
        """`seconds_max`: how long a task runs at most."""
        self.clock = clock
        self.wall_offset = 0.0  # by which its wall clock is wrong
        self.frozen_until = 0.0  # no process of a task gets on before
        self.world = world
        self._seconds_max = seconds_max
        self.name = name
        self.disk = Disk()
        self.powered = True
        self.folders: dict[Fence, Folder] = {}
        self._watcher = watcher
        self._watches: dict[Fence, Callable[[], None]] = {}

    @property
    def wall(self) -> float:
        """What its wall clock shows."""
        return WALL + self.world.now + self.wall_offset

    # ---- for the agent

    def create(self, claimed: Claimed) -> None:
        assert claimed.fence not in self.folders
        self.folders[claimed.fence] = Folder(claimed)

    def scan(self) -> Mapping[Fence, tuple[Claimed, Adopted]]:
        """All attempts that were not reported; each that was not started is decided hereby."""
        found = {fence: folder for fence, folder in self.folders.items() if not folder.reported}
        return {fence: (folder.claimed, self.inspect(fence)) for fence, folder in found.items()}

    def inspect(self, fence: Fence) -> Adopted:
        folder = self.folders[fence]
        if folder.exit is not None:
            return folder.exit
        if not folder.started:
            folder.never = True
            return NeverStarted()
        return StillRunning() if folder.ends is not None else Vanished()

    def watch(self, fence: Fence, call: Callable[[], None]) -> None:
        """Call once nothing of the attempt runs; forgotten when the agent dies."""
        if self.folders[fence].ends is None:
            call()
        else:
            self._watches[fence] = call

    def spawn(self, fence: Fence) -> None:
        """What the zygote does: at most one of all that try gets to the user's code."""
        folder = self.folders.get(fence)
        if folder is None or folder.started or folder.never:
            return
        folder.started = True
        rng = self.world.rng_for(f"run/{fence}")
        seconds = rng.choice((0.05, 0.5, rng.uniform(0.5, self._seconds_max)))
        code = 0 if rng.random() < 0.8 else rng.choice((1, 3, 137))
        folder.ends = self.world.call_later(self._frozen_for() + seconds, self._exit, fence, code)
        self._watcher.started(self.name, folder.claimed)

    def signal(self, fence: Fence, reason: str) -> None:
        """SIGTERM, SIGKILL after 10 s: most tasks end at once."""
        folder = self.folders[fence]
        if folder.ends is None or folder.stopping:
            return
        folder.stopping = reason
        folder.ends.cancel()
        rng = self.world.rng_for(f"stop/{fence}")
        seconds = self._frozen_for() + rng.choice((0.01, 0.01, 0.1, 10.0))
        folder.ends = self.world.call_later(seconds, self._exit, fence, 143)

    def keep(self, fence: Fence, until: float) -> None:
        """The shim ends the attempt at this time of the world, whatever has become of the agent, unless told of a later one."""
        folder = self.folders.get(fence)
        if folder is None:
            return
        if folder.kept is not None:
            folder.kept.cancel()
        folder.kept = self.world.call_at(until, self._isolated, fence)

    def _isolated(self, fence: Fence) -> None:
        folder = self.folders.get(fence)
        if folder is None or folder.ends is None:
            return
        if self._frozen_for() > 0:
            folder.kept = self.world.call_at(self.frozen_until, self._isolated, fence)
            return
        folder.stopping = folder.stopping or "isolated"
        self._watcher.counts["stopped in isolation"] += 1
        self._exit(fence, 137)

    def running(self) -> list[tuple[Claimed, bool]]:
        """Whose user code runs now, and whether it was told to end."""
        return [(folder.claimed, folder.stopping != "") for folder in self.folders.values() if folder.ends is not None]

    def forget_watches(self) -> None:
        self._watches.clear()

    # ---- faults

    def kill_tasks(self) -> int:
        """Every shim and its task die without a word; how many that were."""
        running = [fence for fence, folder in self.folders.items() if folder.ends is not None]
        for fence in running:
            self._end(fence)
        return len(running)

    def freeze(self, seconds: float) -> int:
        """All tasks and their shims are stopped, and go on afterwards as if nothing had been; how many that are."""
        self.frozen_until = max(self.frozen_until, self.world.now + seconds)
        frozen = [folder for folder in self.folders.values() if folder.ends is not None]
        for folder in frozen:
            assert folder.ends is not None
            due, args = folder.ends.when, folder.ends.args
            folder.ends.cancel()
            folder.ends = self.world.call_at(due + seconds, self._exit, *args)
        self._watcher.freeze(self.name, self.frozen_until)
        return len(frozen)

    def lose_power(self, rng: Random) -> int:
        """Everything stops; how many commits are lost. What no fsync protected may be gone."""
        self.powered = False
        self.clock.restart(rng.uniform(5.0, 100.0))  # it counts from the boot
        self.forget_watches()
        self.kill_tasks()
        for fence in [fence for fence, folder in self.folders.items() if not folder.started and rng.random() < 0.5]:
            del self.folders[fence]
        return self.disk.lose_power(rng)

    # ---- inside

    def _frozen_for(self) -> float:
        return max(0.0, self.frozen_until - self.world.now)

    def _exit(self, fence: Fence, code: int) -> None:
        folder = self.folders[fence]
        folder.exit = Exited(exit_code=code, stopped=folder.stopping, started_at=self.wall, ended_at=self.wall)
        self._end(fence)

    def _end(self, fence: Fence) -> None:
        folder = self.folders[fence]
        if folder.ends is not None:
            folder.ends.cancel()
        folder.ends = None
        self._watcher.ended(self.name, folder.claimed, folder.exit)
        watch = self._watches.pop(fence, None)
        if watch is not None:
            watch()
