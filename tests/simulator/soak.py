"""A large mesh for many hours of virtual time: `scripts/simulate soak --peers 100 --hours 24`.

Tasks are submitted all the time at a lab's rate, faults are spread over the time, all rules of `invariants.py` are checked, and
what the cores hold must stay bounded: the mesh keeps KEPT ended tasks for each peer, and forgets the others. It prints a line
for every hour, and in the end what happened.
"""

import argparse
import resource
import sys
import time
from collections.abc import Sequence
from random import Random
from typing import Final

from meshq.config import MEMBERS_MAX
from tests.simulator.mesh import describe, seed_from
from tests.simulator.plan import DETECTION, Action, ActionKind, Fault, FaultKind, Plan, Submission, Weather, fault, submission
from tests.simulator.simulation import Simulation

HOUR: Final = 3_600.0
TASKS_PER_PEER_HOUR: Final = 12
RUN_SECONDS: Final = 900.0  # at most; a third of the tasks runs so long, on average for half of it
KEPT: Final = 10  # ended tasks for each peer, that the mesh is told to keep
LATE: Final = 200  # ended ones that may wait to be forgotten: retention looks now and then, and whoever is cut off later
FAULT_EVERY: Final = (120.0, 600.0)
LOOK_EVERY: Final = 10.0
KINDS: Final = (
    FaultKind.KILL, FaultKind.KILL_ALL, FaultKind.POWER, FaultKind.STOP, FaultKind.PARTITION, FaultKind.DEAF, FaultKind.SLOW,
    FaultKind.BRIDGE, FaultKind.SLEEP, FaultKind.FREEZE, FaultKind.CLOCK, FaultKind.CLONE,
)  # fmt: skip


def soak_plan(seed: int, peers: int, hours: float) -> Plan:
    rng = Random(f"{seed}/soak")
    seconds = hours * HOUR
    gpus = tuple(rng.choice((0, 0, 1, 2)) for _ in range(peers))
    tasks = max(1, round(peers * hours * TASKS_PER_PEER_HOUR))
    return Plan(
        seed=seed,
        weather=Weather.STORMY,
        profile="lan",
        slots=tuple(rng.choice((1, 2, 2, 3)) for _ in range(peers)),
        gpus=gpus,
        loss=0.02,
        duplication=0.01,
        delay=(0.0005, 0.003),
        reliable=True,
        release_chance=0.01,
        build_seconds=3.0,
        page_rows=500,
        run_seconds=RUN_SECONDS,
        seconds=seconds,
        submissions=tuple(_submission(rng, number, seconds, any(gpus)) for number in range(tasks)),
        faults=_faults(rng, seconds),
        actions=(Action(at=10.0, kind=ActionKind.KEEP, number=KEPT * peers),),
        rates=tuple(rng.uniform(0.99, 1.01) for _ in range(peers)),
    )


def _submission(rng: Random, number: int, seconds: float, gpus: bool) -> Submission:
    return submission(rng, number, seconds, gpus, False)


def _faults(rng: Random, seconds: float) -> tuple[Fault, ...]:
    """One after the other, and one power cut of everything."""
    faults, at = [], rng.uniform(*FAULT_EVERY) / 4
    while at < seconds:
        drawn = fault(rng, rng.choice(KINDS), Weather.STORMY, DETECTION["lan"], HOUR)
        faults.append(Fault(at=at, kind=drawn.kind, seconds=drawn.seconds, effects=drawn.effects))
        at += rng.uniform(*FAULT_EVERY)
    faults.append(Fault(at=rng.uniform(0.3, 0.9) * seconds, kind=FaultKind.OUTAGE, seconds=3.0))
    return tuple(sorted(faults, key=lambda each: each.at))


class Soak(Simulation):
    """A run that looks at what it holds, and says every hour how it goes."""

    look_every = LOOK_EVERY
    calm_limit = 4 * RUN_SECONDS

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self._hour = 0
        self._most = 0
        self._kept_since = plan.actions[0].at + HOUR / 4

    def _look(self) -> None:
        super()._look()
        for peer in self.running():
            core = peer.core
            rows = len(core._replica)
            self._most = max(self._most, rows)
            limit = KEPT * len(self.peers) + len(core._board) + LATE
            if self.world.now > self._kept_since and rows > limit and peer.doors_open:
                self.watcher.fail(f"F39: {peer.name} holds {rows} rows, {len(core._board)} of which wait or run")
            if len(peer.gossip.mesh.peers) > MEMBERS_MAX or len(core.vector) > len(core._replica._table.actors) + MEMBERS_MAX:
                self.watcher.fail(f"F39: {peer.name} holds {len(core.vector)} actors")
        if self.world.now >= (self._hour + 1) * HOUR:
            self._hour += 1
            print(f"hour {self._hour}: {self._told()}", flush=True)

    def _told(self) -> str:
        counts, memory = self.watcher.counts, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        broken = sum(self.happened[kind] for kind in FaultKind)
        return (
            f"{self.happened['submitted']} tasks submitted, {counts['starts']} starts, {counts['purged']} forgotten, "
            f"{broken} faults; at most {self._most} rows in a peer, {memory} MB in all, {time.process_time():.0f} s of CPU"
        )


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/simulate soak", description=__doc__)
    parser.add_argument("--peers", type=int, default=100)
    parser.add_argument("--hours", type=float, default=24.0, help="of virtual time")
    parser.add_argument("--seed", type=seed_from, default=1, help="a number, or a commit's id")
    options = parser.parse_args(arguments)
    run = Soak(soak_plan(options.seed, options.peers, options.hours))
    try:
        report = run.run()
    except AssertionError as error:
        print(f"{options.seed} VIOLATED  {error}")
        return 1
    print(describe(report))
    print(f"in all: {run._told()}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
