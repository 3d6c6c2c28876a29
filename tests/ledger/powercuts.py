"""Power cuts: what was acknowledged must be there afterwards. `python -m tests.ledger.powercuts --cuts 100 [--seed S]`

The real store writes to a disk that forgets (`forgetful.py`), and the power fails at any step of it: in the middle of opening,
of a commit, of a checkpoint, of minting an epoch. The next life must find everything that was acknowledged and nothing damaged,
and must not write an (actor, seq) a second time. `--unsynced` lets SQLite sync nothing, and then tasks must get lost: a test
that would not see that sees nothing.
"""

import argparse
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

from meshq.config import Home
from meshq.ids import ActorId, Dot, TaskId, actor_id
from meshq.ledger.effects import Persist
from meshq.ledger.row import Cancel, Row, merge_vectors
from meshq.ledger.store import Store, Stored
from tests.ledger.builders import actor, peer, row
from tests.ledger.forgetful import ForgetfulConnection, ForgetfulDisk, PowerCut

ME = peer("a")
STEPS_MAX = (15, 60, 300)  # before the next cut; opening takes 15, a commit about 10
CHECKPOINT_PAGES = 50  # instead of 1,000, so that cuts hit checkpoints
DAMAGE = ("rows_quarantined", "databases_damaged", "tables_damaged", "databases_copied")


@dataclass
class Report:
    """What happened, and what should not have."""

    cuts: int = 0
    acknowledged: int = 0
    forgotten: int = 0  # writes that were not acknowledged, and gone: the cuts did something
    lost: list[str] = field(default_factory=list)
    corrupt: list[str] = field(default_factory=list)
    during: Counter[str] = field(default_factory=Counter)


class PowerCuts:
    """One machine, again and again."""

    def __init__(self, folder: Path, seed: int, honest: bool = True) -> None:
        self._rng = Random(seed)
        self._home = Home(folder)
        self._disk = ForgetfulDisk(folder, self._rng, honest)
        self._rows: dict[TaskId, Row] = {}  # as acknowledged
        self._purged: dict[TaskId, None] = {}
        self._vector: dict[ActorId, int] = {}
        self._loose: dict[TaskId, Row] = {}  # committed, and not yet durable
        self._loose_vector: dict[ActorId, int] = {}
        self._written: dict[Dot, TaskId] = {}
        self._unsure: dict[Dot, TaskId] = {}  # being written when the power failed
        self._epoch = 0
        self.report = Report()

    def run(self, cuts: int) -> Report:
        with self._disk.watching():
            while self.report.cuts < cuts:
                self._live()
        return self.report

    def _live(self) -> None:
        """From one cut to the next."""
        self._disk.steps_left = self._rng.randrange(self._rng.choice(STEPS_MAX))
        self._doing = "opening"
        try:
            store = Store.open(self._home, ME, self._connect)
            stored = store.load()
            self._check(store, stored)
            self._resume(stored)
            while True:
                self._work(store)
        except PowerCut:
            self.report.during[self._doing] += 1
        self._disk.cut()
        self.report.cuts += 1
        self._loose, self._loose_vector = {}, {}

    def _connect(self, file: Path) -> ForgetfulConnection:
        connection = self._disk.connect(file)
        connection.execute(f"PRAGMA wal_autocheckpoint={CHECKPOINT_PAGES}")
        return connection

    def _check(self, store: Store, stored: Stored) -> None:
        report, found = self.report, {each.task: each for each in stored.rows}
        for task, wanted in self._rows.items():
            if task not in found:
                report.lost.append(f"cut {report.cuts}: {task} is gone")
            elif merge_vectors(found[task].vector, wanted.vector) != found[task].vector:
                report.lost.append(f"cut {report.cuts}: {task} is an older one")
        report.lost += [f"cut {report.cuts}: {task} is back after it was purged" for task in self._purged if task in found]
        for each, seq in self._vector.items():
            if stored.vector.get(each, 0) < seq:
                report.lost.append(f"cut {report.cuts}: the vector knows less of {each} than it did")
        if stored.ledger_epoch < self._epoch:
            report.lost.append(f"cut {report.cuts}: the ledger epoch fell from {self._epoch} to {stored.ledger_epoch}")
        report.corrupt += [f"cut {report.cuts}: {name}" for name in DAMAGE if store.counters[name]]
        report.forgotten += sum(task not in found for task in self._unsure.values())

    def _resume(self, stored: Stored) -> None:
        self._epoch = stored.ledger_epoch
        self._rows = {each.task: each for each in stored.rows}
        self._vector = dict(stored.vector)
        self._unsure = {}

    def _work(self, store: Store) -> None:
        self._doing = self._rng.choices(
            ("submitting", "writing", "taking over", "confirming", "purging", "minting", "checking"), (6, 4, 4, 2, 1, 0.3, 1)
        )[0]
        match self._doing:
            case "submitting":
                self._commit(store, [self._new_row() for _ in range(self._rng.choice((1, 1, 3, 20)))])
            case "writing":
                self._commit(store, [self._changed(self._rng.choice(list(self._rows.values())))] if self._rows else [])
            case "taking over":
                seq = max(self._vector.get(actor("b"), 0), self._loose_vector.get(actor("b"), 0)) + 1
                birth = Dot(actor("b"), seq)
                self._commit_loosely(store, row(birth=birth, env={"X": "x" * self._rng.choice((10, 10_000))}), birth)
            case "confirming":
                store.commit(Persist((), {}, {}, durable=True))
                self._acknowledge({})
            case "purging":
                self._purge(store)
            case "minting":
                store.mint(self._epoch + 1 + self._rng.randrange(1000))
                self._epoch = store.load().ledger_epoch
            case _:
                assert store.check(list(self._rows)) == (), "a row on disk is damaged"
                store.check_seals()

    def _new_row(self) -> Row:
        birth = self._next()
        return row(birth=birth, env={"X": "x" * self._rng.choice((10, 10, 1_000, 30_000))})

    def _changed(self, before: Row) -> Row:
        dot = self._next()
        facts = tuple(sorted((*before.facts, (dot, Cancel(by=f"ann {dot.seq}"))), key=lambda item: item[0]))
        return replace(before, facts=facts, vector=merge_vectors(before.vector, {dot.actor: dot.seq}))

    def _next(self) -> Dot:
        me = actor_id(ME, self._epoch)
        self._loose_vector[me] = max(self._vector.get(me, 0), self._loose_vector.get(me, 0)) + 1
        return Dot(me, self._loose_vector[me])

    def _commit(self, store: Store, rows: list[Row]) -> None:
        me = actor_id(ME, self._epoch)
        vector: dict[str, int] = {me: self._loose_vector[me]} if me in self._loose_vector else {}
        self._unsure = {Dot(me, each.vector[me]): each.task for each in rows}
        store.commit(Persist(tuple(rows), vector, {}, durable=True))
        for dot, task in self._unsure.items():
            if self._written.setdefault(dot, task) != task:
                self.report.lost.append(f"cut {self.report.cuts}: {dot} names two writes")
        self._unsure = {}
        self._acknowledge({each.task: each for each in rows})

    def _commit_loosely(self, store: Store, other: Row, birth: Dot) -> None:
        store.commit(Persist((other,), {birth.actor: birth.seq}, {}, durable=False))
        self._loose[other.task] = other
        self._loose_vector[birth.actor] = birth.seq

    def _purge(self, store: Store) -> None:
        task = self._rng.choice(list(self._rows)) if self._rows else None
        if task is not None and task not in self._loose:
            purged = self._rows.pop(task)  # whether or not the commit succeeds, nobody waits for it any more
            store.commit(Persist((), {}, {str(each): seq for each, seq in purged.vector.items()}, durable=True, purged=(task,)))
            self._acknowledge({})
            self._purged[task] = None

    def _acknowledge(self, rows: dict[TaskId, Row]) -> None:
        """What a durable commit holds is safe, and all that was committed before it."""
        self._rows |= self._loose | rows
        self._vector |= self._loose_vector
        self._loose, self._loose_vector = {}, {}
        self.report.acknowledged += len(rows)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ledger.powercuts", description="Cut the power of a ledger's store.")
    parser.add_argument("--cuts", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--unsynced", action="store_true", help="let SQLite sync nothing: tasks must get lost")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        report = PowerCuts(Path(folder), options.seed, honest=not options.unsynced).run(options.cuts)
    during = ", ".join(f"{count} while {what}" for what, count in sorted(report.during.items()))
    print(f"{report.cuts} cuts (seed {options.seed}): {during}")
    print(
        f"{report.acknowledged} tasks and changes acknowledged, {len(report.lost)} lost, {len(report.corrupt)} corrupt;"
        f" {report.forgotten} that were not acknowledged are gone"
    )
    for line in (report.lost + report.corrupt)[:20]:
        print(line)
    return 1 if report.lost or report.corrupt else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
