"""What people read, at 80 columns, compared with golden files.

`MESHQ_GOLDEN=write pytest tests/cli/test_layouts.py` writes them anew; look at the difference before you keep it.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from meshq.cli import layouts
from tests.cli.builders import (
    GIB,
    NOW,
    OTHER,
    TASK,
    attempt,
    before,
    gpu,
    peer,
    queue,
    status,
    task,
)

GOLDEN = Path(__file__).parent / "golden"
WIDTH = 80


def plain(text: str, style: str) -> str:
    return text


def a_lab() -> list[str]:
    """A busy machine, one that shares its GPUs with a person, one that drains, one that is gone, one just heard of."""
    peers = [
        peer(
            "lab-1", cpu=87.4, used=14.2, free=0, slots=2, running=[TASK, OTHER],
            gpus=[gpu(0, utilization_percent=98.0, task=TASK), gpu(1, utilization_percent=91.0, task=OTHER)],
        ),
        peer("lab-2", free=2, slots=2, gpus=[gpu(0), gpu(1, utilization_percent=40.0, foreign_pids=[4711])]),
        peer("lab-3", draining=True),
        peer("workstation-of-the-third-floor", liveness="suspect", cpu=None, used=None, free=1, slots=1),
        peer("lab-5", liveness="dead", telemetry_age_seconds=754.0),
        peer("lab-6", problem="the disk is full", free=4, slots=4, gpus=[gpu(0)]),
        peer("lab-7", cpu=None, used=None, memory_bytes=None, free=None, slots=None),  # type: ignore[arg-type]  # not heard yet
    ]  # fmt: skip
    queues = [
        queue("default", succeeded=12, failed=1, peers=3),
        queue("gpu", queued=4, running=2, succeeded=31, cancelled=1, peers=2, oldest_wait_seconds=734.0),
        queue("night", queued=1, peers=0, paused=True, oldest_wait_seconds=40_000.0),
    ]
    active = [
        task("train", TASK, started_at=before(minutes=12, seconds=3), attempts=[attempt(1, "lab-1", "running")]),
        task(
            "a-name-that-is-much-too-long-for-a-table", OTHER, attempts=[attempt(1, "lab-1", "preparing")], status="preparing"
        ),
    ]
    return layouts.status_lines(status(peers, queues), active, NOW, WIDTH, plain)


def an_empty_mesh() -> list[str]:
    return layouts.status_lines(status([peer("lab-1")], [queue("default")]), [], NOW, WIDTH, plain)


def some_tasks() -> list[str]:
    tasks = [
        task("train", "aaaaaaaaaaaaaaaa", "queued", position=3, submitted_at=before(seconds=4)),
        task("train", "aaaaaaaabbbbbbbb", "running", started_at=before(hours=3), attempts=[attempt(1, "lab-2", "running")]),
        task("eval", "cccccccccccccccc", "running", started_at=before(hours=3), reason="cancelling",
             submitted_at=before(days=2, hours=3), attempts=[attempt(1, "lab-2", "running")]),
        task("sweep", "dddddddddddddddd", "failed", exit_code=137, started_at=before(hours=1), ended_at=before(minutes=50),
             queue="default", attempts=[attempt(1, "lab-1", "lost"), attempt(2, "lab-3", "failed", exit_code=137)]),
    ]  # fmt: skip
    return layouts.task_lines(tasks, NOW, WIDTH, plain)


def no_tasks() -> list[str]:
    return layouts.task_lines([], NOW, WIDTH, plain)


def a_task_that_moved() -> list[str]:
    document = task(
        "train", TASK, "succeeded", priority=5, exit_code=0, started_at=before(minutes=5), ended_at=before(seconds=30),
        retry_of=OTHER, outputs=[{"path": "model.npz", "bytes": 3 * 2**20}, {"path": "plots/loss.png", "bytes": 81_234},
                             {"path": f"{'a-very-long-name-' * 15}.csv", "bytes": 5}],
        outputs_total=113,
        attempts=[
            attempt(1, "lab-1", "lost", started_at=before(minutes=20), ended_at=before(minutes=6),
                    reason="lab-1 died and was silent for 8 s"),
            attempt(2, "lab-2", "succeeded", ended_at=before(seconds=30), exit_code=0),
        ],
    )  # fmt: skip
    document["spec"]["retries"] = 2
    document["spec"]["time_limit"] = 7200.0
    document["spec"]["isolation"] = "stop"
    return layouts.show_lines(document, NOW, WIDTH, plain)


def a_task_that_waits() -> list[str]:
    return layouts.show_lines(task("train", TASK, "queued", position=1, reason="no machine has 8 free GPUs"), NOW, WIDTH, plain)


def some_peers() -> list[str]:
    peers = [
        peer("lab-1", gpus=[gpu(0), gpu(1)], queues=["default", "gpu"], labels={"room": "b12", "cuda": "12.4"}),
        peer("lab-2", liveness="left", address=None, cpus=None),
    ]
    return layouts.peer_lines(peers, WIDTH, plain)


def a_check_up() -> list[str]:
    return layouts.doctor_lines(
        {
            "checks": [
                {"name": "clock", "ok": True, "detail": "0.1 s from the others"},
                {"name": "landlock", "ok": False, "detail": "this kernel has none: tasks can read the mesh key"},
            ],
            "counters": {"packets.replayed": 3, "packets.unsealed": 0, "log.lines.cut": 12},
        },
        WIDTH,
        plain,
    )


SCREENS = (a_lab, an_empty_mesh, some_tasks, no_tasks, a_task_that_moved, a_task_that_waits, some_peers, a_check_up)


@pytest.mark.parametrize("screen", SCREENS, ids=lambda screen: screen.__name__)
def test_the_screen_is_as_in_its_golden_file(screen: Callable[[], list[str]]) -> None:
    lines = screen()
    golden = GOLDEN / f"{screen.__name__}.txt"
    if os.environ.get("MESHQ_GOLDEN") == "write":
        golden.write_text("\n".join(lines) + "\n", "utf-8")
    assert lines == golden.read_text("utf-8").splitlines()
    assert max(map(len, lines)) <= WIDTH


def test_what_other_machines_say_can_not_steer_the_terminal() -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\nroot"
    document = task(evil, reason=evil, submitted_by=evil, attempts=[attempt(1, evil, "running", reason=evil)])
    document["outputs"] = [{"path": evil, "bytes": 1}]
    document["spec"]["argv"] = [evil]
    document["spec"]["needs"]["labels"] = {"room": evil}
    lines = [
        *layouts.show_lines(document, NOW, 200, plain),
        *layouts.task_lines([document], NOW, 200, plain),
        *layouts.peer_lines([peer(evil, labels={"a": evil}, queues=[evil], version=evil)], 200, plain),
        *layouts.status_lines(
            status([peer(evil, problem=evil)], [queue(evil, queued=1, peers=0)]), [document], NOW, 200, plain
        ),
        *layouts.doctor_lines({"checks": [{"name": evil, "ok": True, "detail": evil}], "counters": {evil: 1}}, 200, plain),
    ]
    assert [line for line in lines if "\x1b" in line or "\x07" in line] == []


def test_in_a_pipe_the_name_of_an_output_is_whole_and_ends_its_line() -> None:
    name = "x" * 250
    lines = layouts.show_lines(task(outputs=[{"path": name, "bytes": 5}]), NOW, 10_000, plain)
    assert lines[-2:] == ["SIZE  OUTPUT", f"  5B  {name}"]


def test_names_and_ids_are_whole_where_there_is_room() -> None:
    name = "a-name-that-is-much-too-long-for-a-table"
    lines = layouts.task_lines([task(name)], NOW, 10_000, plain)
    assert name in lines[1]


def test_short_ids_are_as_long_as_it_takes_to_tell_them_apart() -> None:
    ids = layouts.short_ids([task(id="aaaaaaaabbbbbbbb"), task(id="aaaaaaaabbcccccc"), task(id="z" * 16)])
    assert list(ids.values()) == ["aaaaaaaabbb", "aaaaaaaabbc", "z" * 11]
    assert layouts.short_ids([task(id=TASK)]) == {TASK: TASK[:8]}
    assert layouts.short_ids([]) == {}


def test_memory_is_shown_in_the_unit_of_the_machine() -> None:
    from meshq.cli import figures

    assert figures.share(512 * 2**20, 16 * GIB) == "0.5/16.0G"
    assert figures.share(None, 16 * GIB) == "-/16.0G"
    assert figures.share(None, None) == "-"
