"""Random lives of a few replicas that write, push, sync and purge, and what must hold of them at any time and in the end.

Messages are lost, doubled and reordered; syncs break off, and go on while both sides write and purge; machines lose the power
and with it what was not durable; replicas are away, and come back below the floors of the others.

`python -m tests.ledger.purging --trials 20000 --seed 7` runs more of them than the tests do.
"""

import argparse
from collections import Counter
from dataclasses import dataclass, field
from random import Random
from unittest.mock import patch

from meshq.ids import Dot, TaskId
from meshq.ledger import donor, reconcile
from meshq.ledger.replica import Replica
from meshq.ledger.row import Cancel, Row, Seat, Vector, covers
from tests.ledger.builders import peer, spec
from tests.ledger.syncs import Pull

SPEC = spec()


@dataclass(slots=True)
class Machine:
    """A replica, and what its disk would give back after a power cut."""

    name: str
    replica: Replica
    purged: set[TaskId] = field(default_factory=set)  # and not to be seen here again
    away_until: int = 0
    safe: tuple[tuple[Row, ...], Vector, Vector, frozenset[TaskId]] = ((), {}, {}, frozenset())

    def commit_durably(self) -> None:
        one = self.replica
        self.safe = (tuple(one.rows()), one.vector, one.floors, frozenset(self.purged))

    def cut_power(self) -> None:
        rows, vector, floors, purged = self.safe
        self.replica = Replica(peer(self.name), 1, rows, vector, floors)
        self.purged = set(purged)


class Life:
    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = Random(seed)
        self.machines = [Machine(name, Replica(peer(name), 1, (), {}, {})) for name in "abcde"[: self.rng.randint(2, 5)]]
        self.births: dict[TaskId, Dot] = {}
        self.writes: dict[Dot, TaskId] = {}
        self.purged: set[TaskId] = set()  # by the choice of some machine (R5)
        self.network: list[tuple[Machine, Machine, Row, Dot]] = []
        self.counts: Counter[str] = Counter()
        self.step = 0

    def run(self) -> "Life":
        for step in range(self.rng.randint(20, 120)):
            self.step = step
            self.do_something(self.rng.choice(self.machines))
            if self.rng.random() < 0.05:
                self.check()
        self.end()
        return self

    def do_something(self, machine: Machine, *, syncing: bool = False) -> None:
        kind = self.rng.random()
        if kind < 0.15:
            self.wrote(machine, *machine.replica.create(SPEC, 1))
        elif kind < 0.40:
            self.write(machine)
        elif kind < 0.50:
            self.purge(machine)
        elif kind < 0.72:
            self.deliver()
        elif kind < 0.74:
            machine.away_until = self.step + self.rng.randint(5, 60)
        elif kind < 0.76 and not syncing:
            self.counts["power cuts"] += 1
            machine.cut_power()
        elif not syncing:
            self.sync(machine, self.rng.choice(self.machines))

    def write(self, machine: Machine) -> None:
        """Move a task, or end it."""
        rows = [row for row in machine.replica.rows() if not over(row)]
        if rows:
            row = self.rng.choice(rows)
            ends = self.rng.random() < 0.5
            one = machine.replica
            seat = Seat(queue="q", position=self.step, priority=0)
            dot = one.add(row.task, Cancel(by="x")) if ends else one.move(row.task, seat)
            changed = one.get(row.task)
            assert changed is not None
            self.wrote(machine, dot, changed)

    def wrote(self, machine: Machine, dot: Dot, row: Row) -> None:
        assert dot not in self.writes, f"seed {self.seed}: {dot} names two writes"
        self.writes[dot] = row.task
        self.births.setdefault(row.task, row.birth)
        machine.commit_durably()
        self.network += [(machine, to, row, dot) for to in self.machines if to is not machine and self.rng.random() < 0.7]

    def purge(self, machine: Machine) -> None:
        """R5, of some of what may be purged."""
        for row in list(machine.replica.rows()):
            if over(row) and machine.replica.may_purge(row.task) and self.rng.random() < 0.3:
                self.forget(machine, row.task)
                self.purged.add(row.task)

    def forget(self, machine: Machine, task: TaskId) -> None:
        machine.replica.purge(task)
        machine.purged.add(task)

    def deliver(self) -> None:
        """A push arrives, perhaps not for the last time; and perhaps its answer."""
        if not self.network:
            return
        place = self.rng.randrange(len(self.network))
        source, to, row, dot = self.network[place]
        if self.rng.random() < 0.7:
            self.network.pop(place)
        if max(source.away_until, to.away_until) > self.step:
            return
        accepted = to.replica.absorb(row)
        assert accepted is not None, f"seed {self.seed}: refused: {to.replica.counters}"
        to.replica.cover([dot], [row])
        if not to.replica.has(row.task) and self.rng.random() < 0.5:
            self.counts["pushes of purged tasks"] += 1
            if source.replica.has(row.task) and covers(source.replica.vector, row.birth):
                self.forget(source, row.task)

    def sync(self, machine: Machine, other: Machine) -> None:
        if machine is other or max(machine.away_until, other.away_until) > self.step:
            return
        answers = self.rng.choice((None, None, 1, 2, 3, 5, 9))
        before = set(row.task for row in machine.replica.rows())
        pull = Pull(machine.replica, other.replica, broken_off=self.rng.random() < 0.1)
        eventful = self.rng.random() < 0.5

        def between(number: int) -> None:
            if eventful and self.rng.random() < 0.3:
                self.do_something(self.rng.choice((machine, other)), syncing=True)

        pull.run(answers=answers, between=between)
        self.counts["syncs completed"] += pull.completed
        self.counts["syncs by ranges"] += pull.asks.counters["syncs_comparing_all_rows"]
        after = set(row.task for row in machine.replica.rows())
        machine.purged |= before - after

    # ---- what must hold

    def check(self) -> None:
        for machine in self.machines:
            one = machine.replica
            one.check()
            rows = {row.task: row for row in one.rows()}
            assert not machine.purged & rows.keys(), f"seed {self.seed}: I7: {machine.name} has a task that it had purged"
            assert not any(name.startswith("bug") for name in one.counters), f"seed {self.seed}: {one.counters}"
            vector = one.vector
            for dot, task in self.writes.items():
                if covers(vector, dot) and task in rows:
                    assert covers(rows[task].vector, dot), f"seed {self.seed}: I2: a row of {machine.name} lacks {dot}"
            for task, birth in self.births.items():
                if covers(vector, birth) and task not in rows:
                    assert self.was_purged(task), f"seed {self.seed}: {machine.name} has lost {task}"

    def was_purged(self, task: TaskId) -> bool:
        return task in self.purged

    def end(self) -> None:
        """Honest syncs, until nobody knows more than the others; then everybody purges all that is over."""
        for machine in self.machines:
            machine.away_until = 0
        self.sync_all()
        self.check()
        vectors = [machine.replica.vector for machine in self.machines]
        assert all(vector == vectors[0] for vector in vectors), f"seed {self.seed}: the vectors differ"
        everything = [{row.task: row for row in machine.replica.rows()} for machine in self.machines]
        for task in self.births:
            have = [rows[task] for rows in everything if task in rows]
            assert all(row == have[0] for row in have), f"seed {self.seed}: {task} differs"
            if task in self.purged:
                assert all(map(over, have)), f"seed {self.seed}: a ghost: {task} was purged elsewhere, and goes on"
            else:
                assert len(have) == len(self.machines), f"seed {self.seed}: {task} was lost"
        for machine in self.machines:
            for task in [row.task for row in machine.replica.rows() if over(row)]:
                self.forget(machine, task)
                self.purged.add(task)
        self.sync_all()
        states = [({row.task: row for row in m.replica.rows()}, m.replica.vector) for m in self.machines]
        assert all(state == states[0] for state in states), f"seed {self.seed}: the states differ"
        assert len({m.replica.fingerprints.root() for m in self.machines}) == 1

    def sync_all(self) -> None:
        for _ in range(2 * len(self.machines)):
            for one in self.machines:
                for other in self.machines:
                    if one is not other:
                        pull = Pull(one.replica, other.replica).run()
                        assert pull.completed, f"seed {self.seed}: an honest sync does not end"
                        self.counts["syncs by ranges"] += pull.asks.counters["syncs_comparing_all_rows"]
            if len({machine.replica.note for machine in self.machines}) == 1:
                return


def over(row: Row) -> bool:
    return any(isinstance(fact, Cancel) for _, fact in row.facts)


def lives(seeds: range) -> Counter[str]:
    """So many lives, in a world where messages are small: what happened in them."""
    counts: Counter[str] = Counter()
    with (
        patch.object(donor, "SYNC_ROWS_MAX", 3),
        patch.object(reconcile, "LEAF_ROWS_MAX", 1),
        patch.object(reconcile, "RANGES_MAX", 4),
        patch.object(reconcile, "ROWS_MAX", 2),
    ):
        for seed in seeds:
            counts += Life(seed).run().counts
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description="random lives of replicas that purge")
    parser.add_argument("--trials", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    counts = lives(range(options.seed, options.seed + options.trials))
    print(f"{options.trials} trials, 0 violations: {dict(counts)}")


if __name__ == "__main__":
    main()
