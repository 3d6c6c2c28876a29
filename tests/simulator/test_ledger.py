"""Ledger cores on virtual time: what may never happen under faults, and what must have happened once they stop."""

from collections.abc import Sequence

import pytest

from meshq.ledger.core import Ledger
from meshq.ledger.holder import read
from meshq.task import EndKind, Status
from tests.ledger.builders import spec
from tests.ledger.mesh import Mesh

FAULTY_SECONDS = 60.0
HEAL_LIMIT = 600.0


def plant(mesh: Mesh, count: int, seconds: float) -> None:
    """Submit so many tasks at random peers within that time, and cancel some."""
    rng = mesh.world.rng_for("users")
    peers = list(mesh.peers.values())
    for number in range(count):
        task = spec(f"t{number}", retries=rng.choice((0, 0, 2)), priority=rng.choice((0, 0, 5)))
        mesh.world.call_later(rng.uniform(2.0, seconds), mesh.submit, rng.choice(peers), task)

    def cancel_one() -> None:
        if mesh.submitted:
            mesh.cancel(rng.choice(peers), rng.choice(mesh.submitted))

    for _ in range(count // 6):
        mesh.world.call_later(rng.uniform(2.0, seconds), cancel_one)


def run_to_the_end(mesh: Mesh) -> None:
    """No more faults: everything must become equal, and every task final."""
    mesh.network.heal()
    mesh.network.loss = 0.0
    for one in mesh.peers.values():
        if one.core is None:
            one.start()
    end = mesh.world.now
    while not mesh.settled():
        assert mesh.world.now < end + HEAL_LIMIT, "not equal and final in time: " + describe(mesh)
        mesh.world.run_until(mesh.world.now + 5.0)


def describe(mesh: Mesh) -> str:
    lines = []
    for one in mesh.peers.values():
        assert one.core is not None
        open_tasks = [
            (row.task, str(read(row).status), one.core.waiting_reason(mesh.world.now, row.task))
            for row in one.core.tasks()
            if not read(row).status.final
        ]
        lines.append(
            f"{one.name}: {len(list(one.core.tasks()))} rows, open {open_tasks[:3]}, vector {sorted(one.core.vector.values())}"
        )
    return "\n".join(lines)


def check_results(mesh: Mesh) -> None:
    """P1 and P4: every task that was acknowledged is there, and no success was lost."""
    core = next(iter(mesh.peers.values())).core
    assert core is not None
    for task in mesh.submitted:
        row = core.row(task)
        assert row is not None, "P1: an acknowledged task is gone"
        reading = read(row)
        if any(end.kind is EndKind.SUCCEEDED for end in reading.ended.values()):
            assert reading.status is Status.SUCCEEDED
        else:
            assert reading.status in (Status.FAILED, Status.CANCELLED)


def break_things(mesh: Mesh, kinds: Sequence[str], seconds: float) -> None:
    """Crashes with and without the power, restarts, and partitions, at random."""
    rng = mesh.world.rng_for("faults")
    peers = list(mesh.peers.values())

    def crash() -> None:
        victim = rng.choice(peers)
        if victim.core is not None:
            victim.crash(power=rng.random() < 0.5)
            mesh.world.call_later(rng.uniform(0.5, 25.0), restart, victim.name)

    def restart(name: str) -> None:
        one = next(one for one in peers if one.name == name)
        if one.core is None:
            one.start()

    def partition() -> None:
        names = [one.name for one in peers]
        rng.shuffle(names)
        cut = rng.randrange(1, len(names))
        mesh.network.partition([names[:cut], names[cut:]])
        mesh.world.call_later(rng.uniform(1.0, 20.0), mesh.network.heal)

    actions = {"crash": crash, "partition": partition}
    for _ in range(8):
        mesh.world.call_later(rng.uniform(3.0, seconds), actions[rng.choice(kinds)])


def chaos(seed: int) -> Mesh:
    """One run with every fault."""
    mesh = Mesh(seed, 2 + seed % 4, slots=1 + seed % 3, loss=(seed % 5) * 0.05, reliable=seed % 2 == 0)
    mesh.failure_chance, mesh.release_chance = 0.15, 0.05
    plant(mesh, 18, FAULTY_SECONDS)
    break_things(mesh, ("crash", "partition"), FAULTY_SECONDS)
    mesh.world.run_until(FAULTY_SECONDS)
    run_to_the_end(mesh)
    check_results(mesh)
    return mesh


@pytest.mark.parametrize("seed", range(8))
def test_crashes_partitions_and_loss_lose_nothing_and_start_no_claim_twice(seed: int) -> None:
    mesh = chaos(seed)
    assert mesh.starts >= 5
    assert sum(one.run for one in mesh.peers.values()) > len(mesh.peers) or mesh.network.traffic.cut > 0, "no fault happened"


@pytest.mark.parametrize("seed", range(5))
def test_without_partitions_and_crashes_no_task_ever_runs_twice_at_once(seed: int) -> None:
    mesh = Mesh(seed, 3 + seed % 4, slots=2, loss=0.05 * (seed % 5))
    mesh.failure_chance, mesh.release_chance = 0.1, 0.05
    plant(mesh, 30, 30.0)
    mesh.world.run_until(30.0)
    run_to_the_end(mesh)
    check_results(mesh)
    assert mesh.overlaps == 0, "P3: two attempts of one task were live"
    claims = sum(len(read(row).claims) for row in first_core(mesh).tasks())
    useful = sum(len(read(row).started) for row in first_core(mesh).tasks())
    assert claims <= 1.5 * useful + 5, f"{claims} claims for {useful} starts: peers trip over each other"


@pytest.mark.parametrize("seed", range(3))
def test_on_a_network_slower_than_the_slots_of_the_ranks_the_acks_keep_tasks_from_running_twice(seed: int) -> None:
    mesh = Mesh(seed, 5, slots=2, delay=(0.01, 0.4))
    plant(mesh, 30, 30.0)
    mesh.world.run_until(30.0)
    run_to_the_end(mesh)
    check_results(mesh)
    readings = [read(row) for row in first_core(mesh).tasks()]
    assert any(len(reading.claims) > 1 for reading in readings), "nobody was in anybody's way"
    assert mesh.overlaps == 0, "P3: two attempts of one task were live"


@pytest.mark.parametrize("seed", range(3))
def test_restarting_agents_hurts_no_task(seed: int) -> None:
    mesh = Mesh(seed, 3)
    plant(mesh, 20, 30.0)
    rng, restarts = mesh.world.rng_for("faults"), 0

    def restart(place: int) -> None:
        one = list(mesh.peers.values())[place]
        one.crash(power=False)
        mesh.world.call_later(rng.uniform(0.1, 2.0), one.start)

    for at in range(4, 44, 4):
        mesh.world.call_later(at, restart, rng.randrange(3))
        restarts += 1
    mesh.world.run_until(44.0)
    run_to_the_end(mesh)
    check_results(mesh)
    assert sum(one.run for one in mesh.peers.values()) == 3 + restarts
    assert mesh.overlaps == 0
    assert mesh.unheard == 0, "an attempt ended, and its end was dropped"


def first_core(mesh: Mesh) -> Ledger:
    core = next(iter(mesh.peers.values())).core
    assert core is not None
    return core


def test_the_same_seed_gives_the_same_trace() -> None:
    assert chaos(3).world.trace_hash() == chaos(3).world.trace_hash()
    assert chaos(3).world.trace_hash() != chaos(4).world.trace_hash()
