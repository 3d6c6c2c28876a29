"""What `status` says below the table of machines: what keeps tasks away, who computes beside the mesh, what is old."""

from typing import Any

import pytest

from meshq.cli.layouts import machine_lines
from meshq.documents import GpuDocument, PeerDocument
from tests.cli.builders import TASK, gpu, peer


def plain(text: str, style: str) -> str:
    return text


def below(*peers: PeerDocument, width: int = 80) -> list[str]:
    """The lines below the table."""
    return machine_lines(peers, {}, width, plain)[len(peers) + 1 :]


def used_by(*users: str | None, index: int = 0, **more: Any) -> GpuDocument:
    processes = [{"pid": 7, "user": user, "task": None, "memory_bytes": None, "graphics": False} | more for user in users]
    return gpu(index, foreign_pids=[7] if not more else [], processes=processes)


def test_a_machine_in_order_says_nothing() -> None:
    assert below(peer("lab-1", gpus=[gpu(0), gpu(1, task=TASK)]), peer("lab-2")) == []


def test_each_problem_is_said_once_with_the_gpus_that_have_it() -> None:
    hangs = "the NVIDIA driver has not answered for 40 s"
    assert below(peer("lab-1", gpu_problem=hangs, gpus=[gpu(n, problem=hangs) for n in range(4)])) == [f"lab-1: {hangs}"]
    lost = [gpu(n, problem="it is lost" if n % 2 else None) for n in range(4)]
    assert below(peer("lab-1", gpus=lost)) == ["lab-1, GPUs 1, 3: it is lost"]
    both = [gpu(0, problem="it is lost"), gpu(1, problem="in MIG mode")]
    assert below(peer("lab-1", problem="its disk is full", gpus=both)) == [
        "lab-1 takes no tasks: its disk is full", "lab-1, GPU 0: it is lost", "lab-1, GPU 1: in MIG mode",
    ]  # fmt: skip


def test_a_gpu_with_a_problem_is_not_free() -> None:
    [_, row] = machine_lines([peer("lab-1", gpus=[gpu(0), gpu(1, problem="it is lost")])], {}, 200, plain)[:2]
    assert "1/2" in row.split()


def test_people_who_compute_beside_the_mesh_are_named() -> None:
    gpus = [used_by("ann", "bob"), used_by("bob", "ann", index=1), used_by(None, index=2)]
    assert below(peer("lab-1", gpus=gpus)) == ["lab-1, GPUs 0, 1: used by ann, bob", "lab-1, GPU 2: used by somebody"]
    assert below(peer("lab-1", gpus=[used_by("ann", task=TASK), used_by("ann", index=1, graphics=True)])) == []


@pytest.mark.parametrize(("age", "count", "old"), [(30.0, 1, ""), (31.0, 1, "31s"), (55.0, 1000, ""), (61.0, 1000, "1m 1s")])
def test_figures_that_were_not_refreshed_three_times_are_called_old(age: float, count: int, old: str) -> None:
    lines = below(peer("lab-1", telemetry_age_seconds=age), *[peer("lab-2")] * (count - 1))
    assert lines == ([f"lab-1 last told of itself {old} ago: its figures are old"] if old else [])


def test_of_a_machine_that_is_gone_nothing_is_said_but_that() -> None:
    gone: dict[str, Any] = {"telemetry_age_seconds": 900.0, "gpu_problem": "lost", "problem": "full", "gpus": [used_by("ann")]}
    assert below(peer("lab-1", liveness="dead", **gone), peer("lab-2", liveness="left", **gone)) == []
    assert len(below(peer("lab-1", liveness="suspect", **gone))) == 4


def test_long_words_are_folded_and_what_machines_say_can_not_steer_the_terminal() -> None:
    evil = "\x1b[2J\nroot"
    lines = below(peer(evil, gpu_problem="x " * 90, gpus=[used_by(evil), gpu(1, problem=evil)]))
    assert max(map(len, lines)) <= 80
    assert [each for each in lines if "\x1b" in each or "\n" in each] == []
    assert len(lines) >= 5
