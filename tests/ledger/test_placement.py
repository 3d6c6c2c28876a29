"""Who could run a task, who can run it now, why not; and in which order tasks wait."""

from dataclasses import replace
from hashlib import blake2b

import pytest

from meshq.errors import Unplaceable
from meshq.ids import TaskId
from meshq.ledger import rendezvous
from meshq.ledger.effects import PeerView
from meshq.ledger.placement import check_placeable, could_ever, eligible, fits_now, free_capacity, why_not
from meshq.ledger.queues import Queues
from meshq.ledger.rendezvous import claimants, mourners
from meshq.ledger.row import NumberRegister
from meshq.task import Gpu, Needs
from tests.ledger.builders import actor, dot, peer, row, spec, telemetry, view

GIB = 2**30
CARD = Gpu(index=0, uuid="GPU-1", name="A100", memory_bytes=40 * GIB)
MACHINE = telemetry(gpus=(CARD,), gpus_free=1, labels={"zone": "a"})


@pytest.mark.parametrize(
    ("needs", "queue", "sentence"),
    [
        (Needs(), "default", ""),
        (Needs(cpus=8, memory_bytes=16 * GIB, gpus=1, gpu_memory_bytes=40 * GIB, labels={"zone": "a"}), "default", ""),
        (Needs(), "gpu", "m does not serve the queue 'gpu' (it serves default)"),
        (Needs(labels={"zone": "b"}), "default", "m is not labelled zone=b (it has zone=a)"),
        (Needs(labels={"disk": "ssd"}), "default", "m is not labelled disk=ssd (it has no such label)"),
        (Needs(gpus=2), "default", "m has 1 GPUs where 2 are needed"),
        (Needs(gpu_memory_bytes=80 * GIB), "default", "m has too few GPUs with 80.0 GiB of memory"),
        (Needs(cpus=9), "default", "m has 8 CPUs where 9 are needed"),
        (Needs(memory_bytes=17 * GIB), "default", "m has 16.0 GiB of memory where 17.0 GiB are needed"),
    ],
)
def test_a_peer_says_why_it_could_never_run_a_task(needs: Needs, queue: str, sentence: str) -> None:
    machine = view("m", MACHINE)
    assert why_not(needs, queue, machine) == sentence
    assert could_ever(needs, queue, MACHINE) == eligible(needs, queue, machine) == (sentence == "")


@pytest.mark.parametrize(
    ("machine", "sentence"),
    [
        (view("m", replace(MACHINE, draining=True)), "m is draining"),
        (view("m", replace(MACHINE, problem="the disk is full")), "m takes no tasks: the disk is full"),
        (view("m", MACHINE, alive=False), "m does not answer"),
        (view("m", MACHINE, alive=False, left=True), "m left the mesh"),
    ],
)
def test_a_peer_that_could_run_a_task_may_not_take_it_now(machine: PeerView, sentence: str) -> None:
    assert why_not(Needs(), "default", machine) == sentence
    assert could_ever(Needs(), "default", machine.telemetry)
    assert not eligible(Needs(), "default", machine)


def test_who_has_not_said_yet_what_it_has_takes_nothing_and_is_no_reason_to_refuse_a_task() -> None:
    newcomer = PeerView(peer=peer("n"), name="n", alive=True, told=False)
    gone = replace(newcomer, alive=False)
    assert not eligible(Needs(), "default", newcomer)
    assert why_not(Needs(), "default", newcomer) == "n has only just come, and has not said yet what it has"
    assert why_not(Needs(), "default", gone) == "n does not answer"
    elsewhere = spec(queue="gpu")
    check_placeable(elsewhere, [view("m", MACHINE), newcomer])
    with pytest.raises(Unplaceable, match="none of the 2 peers"):
        check_placeable(elsewhere, [view("m", MACHINE), gone])


def test_what_fits_now_depends_on_what_is_free() -> None:
    free = free_capacity(MACHINE)
    assert fits_now(Needs(cpus=8, gpus=1), MACHINE, free)
    assert not fits_now(Needs(cpus=1), MACHINE, free.minus(Needs(cpus=8)))
    assert not fits_now(Needs(), MACHINE, free.minus(Needs()))
    assert not fits_now(Needs(gpus=1), MACHINE, replace(free, slots=2).minus(Needs(gpu_memory_bytes=GIB)))
    used = replace(MACHINE, gpus=(replace(CARD, foreign_pids=(77,)),))
    assert not fits_now(Needs(gpu_memory_bytes=GIB), used, free)


def test_everybody_ranks_alike_and_a_peer_that_goes_moves_nobody_else() -> None:
    peers = [peer(name) for name in "abcdef"]
    task = TaskId("a" * 16)
    order = claimants(task, 1, peers)
    assert claimants(task, 1, reversed(peers)) == order
    assert claimants(task, 1, [each for each in peers if each != order[2]]) == order[:2] + order[3:]
    firsts = {claimants(TaskId(f"{number:a>16}"), 1, peers)[0] for number in range(100)}
    assert firsts == set(peers)


def test_mourners_take_turns_and_cost_one_hash_for_a_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a rack that goes dark in a large mesh everybody asks this for hundreds of claims, at each word of gossip."""
    peers = [peer(f"p{number}") for number in range(50)]
    task, hashed = TaskId("a" * 16), list[bytes]()

    def counted(data: bytes, *, digest_size: int) -> object:
        hashed.append(data)
        return blake2b(data, digest_size=digest_size)

    monkeypatch.setattr(rendezvous, "blake2b", counted)
    orders = [mourners(task, dot("a", seq), peers) for seq in range(200)]
    assert len(hashed) == 200 and all(sorted(order) == sorted(peers) for order in orders)
    assert len({order[0] for order in orders}) > 25
    assert mourners(task, dot("a", 1), reversed(peers)) == orders[1]
    gone = orders[1][3]
    assert mourners(task, dot("a", 1), [each for each in peers if each != gone]) == (*orders[1][:3], *orders[1][4:])


def test_tasks_wait_by_priority_then_position_then_birth_and_only_wanted_ones_are_seen() -> None:
    queues = Queues()
    rows = {
        "late": row(birth=dot("a", 1)),
        "urgent": row(birth=dot("a", 2), priority=9),
        "early": row(birth=dot("a", 3)),
        "needy": row(birth=dot("a", 4), needs=Needs(gpus=1)),
    }
    rows["early"] = replace(rows["early"], position=NumberRegister(2, actor("a"), 0))
    for each in rows.values():
        assert queues.put(each.task, each)
    assert not queues.put(rows["late"].task, rows["late"])
    names = {each.task: name for name, each in rows.items()}
    assert [names[task] for task in queues.in_order("default", lambda _: True)] == ["urgent", "early", "late", "needy"]
    assert [names[task] for task in queues.in_order("default", lambda needs: needs.gpus > 0)] == ["needy"]
    assert [queues.position(rows[name].task) for name in ("urgent", "early", "late", "needy")] == [1, 2, 3, 4]
    queues.remove(rows["early"].task)
    assert (queues.position(rows["late"].task), queues.position(rows["early"].task), len(queues)) == (2, None, 3)


def test_a_gpu_in_mig_mode_is_none_for_tasks() -> None:
    sliced = replace(CARD, index=1, mig_mode=True, memory_bytes=80 * GIB)
    mixed = view("m", replace(MACHINE, gpus=(CARD, sliced)))
    assert why_not(Needs(gpus=1), "default", mixed) == ""
    assert why_not(Needs(gpus=2), "default", mixed) == "m has 1 GPUs and 1 in MIG mode where 2 are needed"
    assert why_not(Needs(gpu_memory_bytes=80 * GIB), "default", mixed) == "m has too few GPUs with 80.0 GiB of memory"


def test_a_task_waits_for_a_gpu_that_has_a_problem() -> None:
    lost = replace(MACHINE, gpus=(replace(CARD, problem="it is lost"),))
    needs = Needs(gpus=1, gpu_memory_bytes=40 * GIB)
    assert could_ever(needs, "default", lost)
    assert not fits_now(needs, lost, free_capacity(lost))
