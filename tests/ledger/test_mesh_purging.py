"""Whole cores that keep hardly any task that is over: what was purged is never executed again, whoever was away meanwhile."""

import pytest

from meshq.ids import TaskId
from meshq.ledger.holder import read
from meshq.task import Claimed
from tests.ledger.builders import spec
from tests.ledger.mesh import Mesh, SimPeer

KEPT = 3


class Forgetful(Mesh):
    """A mesh that keeps three tasks that are over, and whose watcher notes what was purged."""

    def __init__(self, seed: int, count: int) -> None:
        self.purged: dict[TaskId, str] = {}
        super().__init__(seed, count, slots=2)
        first = next(iter(self.peers.values()))
        self.world.call_later(1.5, self.keep_few, first)

    def keep_few(self, at: SimPeer) -> None:
        assert at.core is not None
        at.feed(at.core.change_settings(self.world.now, {"retention/tasks": str(KEPT)}))

    def trace(self, at: SimPeer, *parts: object) -> None:
        """Of a purge the row is gone, and the task is told to have changed."""
        if parts[0] == "changed" and at.core is not None and at.core.row(TaskId(str(parts[1]))) is None:
            self.purged.setdefault(TaskId(str(parts[1])), at.name)
        super().trace(at, *parts)

    def note_start(self, at: SimPeer, claimed: Claimed) -> None:
        assert claimed.task not in self.purged, f"I7: {at.name} starts {claimed.task}, which {self.purged[claimed.task]} purged"
        super().note_start(at, claimed)


@pytest.mark.parametrize("seed", range(6))
def test_machines_that_were_down_while_tasks_ended_and_were_purged_don_t_run_them_again(seed: int) -> None:
    mesh = Forgetful(seed, 3 + seed % 3)
    rng, peers = mesh.world.rng_for("users"), list(mesh.peers.values())
    for number in range(40):
        mesh.world.call_later(rng.uniform(2.0, 60.0), mesh.submit, rng.choice(peers), spec(f"t{number}"))
    for at in range(5, 60, 6):
        victim = rng.choice(peers)
        mesh.world.call_later(at, crash, victim, rng.random() < 0.5)
        mesh.world.call_later(at + rng.uniform(0.5, 25.0), start, victim)
    mesh.world.run_until(90.0)
    for one in peers:
        start(one)
    end = mesh.world.now + 900.0
    while not at_rest(mesh):
        assert mesh.world.now < end, "not equal in time"
        mesh.world.run_until(mesh.world.now + 5.0)
    assert mesh.starts >= 15 and len(mesh.purged) >= 10
    for one in peers:
        assert one.core is not None
        one.core.check()
        assert not any(name.startswith("bug") for name in one.core.counters), one.core.counters
        assert {row.task for row in one.core.tasks()} == set(one.disk.rows)


def crash(one: SimPeer, power: bool) -> None:
    if one.core is not None:
        one.crash(power=power)


def start(one: SimPeer) -> None:
    if one.core is None:
        one.start()


def at_rest(mesh: Mesh) -> bool:
    """All have seen the same writes, keep as many tasks as they should, and of each task that several keep the same."""
    cores = [one.core for one in mesh.peers.values() if one.core is not None]
    rows = [{row.task: row for row in core.tasks()} for core in cores]
    same = all(each[task] == row for each in rows for task, row in rows[0].items() if task in each)
    few = all(len(each) <= KEPT for each in rows)
    final = all(read(row).status.final for each in rows for row in each.values())
    return same and few and final and all(core.vector == cores[0].vector for core in cores)
