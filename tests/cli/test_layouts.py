"""What people read, at 80 columns, compared with golden files.

`MESHQ_GOLDEN=write pytest tests/cli/test_layouts.py` writes them anew; look at the difference before you keep it.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from meshq.cli import layouts
from meshq.documents import ConnectivityDocument, DoctorDocument
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


def a_lab(width: int = WIDTH) -> list[str]:
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
    return layouts.status_lines(status(peers, queues), active, NOW, width, plain)


def an_empty_mesh(width: int = WIDTH) -> list[str]:
    return layouts.status_lines(status([peer("lab-1")], [queue("default")]), [], NOW, width, plain)


def some_tasks(width: int = WIDTH) -> list[str]:
    tasks = [
        task("train", "aaaaaaaaaaaaaaaa", "queued", position=3, submitted_at=before(seconds=4)),
        task("train", "aaaaaaaabbbbbbbb", "running", started_at=before(hours=3), attempts=[attempt(1, "lab-2", "running")]),
        task("eval", "cccccccccccccccc", "running", started_at=before(hours=3), reason="cancelling",
             submitted_at=before(days=2, hours=3), attempts=[attempt(1, "lab-2", "running")]),
        task("sweep", "dddddddddddddddd", "failed", exit_code=137, started_at=before(hours=1), ended_at=before(minutes=50),
             queue="default", attempts=[attempt(1, "lab-1", "lost"), attempt(2, "lab-3", "failed", exit_code=137)]),
    ]  # fmt: skip
    return layouts.task_lines(tasks, NOW, width, plain)


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


def link(
    transport: str | None = "udp",
    *,
    udp: bool | None = True,
    tcp: bool | None = True,
    rtt: float | None = 0.31,
    heard: float = 0.8,
) -> ConnectivityDocument:
    return {"transport": transport, "udp": udp, "tcp": tcp, "rtt_ms": rtt, "last_heard_seconds": heard}


SEVERAL_PEERS = [
    peer("lab-1", gpus=[gpu(0), gpu(1)], queues=["default", "gpu"], labels={"room": "b12", "cuda": "12.4"}, connectivity=None),
    peer("lab-2", liveness="left", address=None, cpus=None, connectivity=link(None, heard=90_000.0)),
    peer("lab-3", connectivity=link("tcp", udp=False, rtt=24.6), address="192.168.1.103:7733"),
    peer("lab-4", liveness="dead", connectivity=link(None, udp=False, tcp=False, rtt=None, heard=754.0)),
    peer("lab-5", liveness="suspect", connectivity=link(None, udp=False, tcp=False, rtt=None, heard=12.0)),
    peer("lab-6", connectivity=link(None, udp=None, tcp=None, rtt=None), address="[fd00:12:34:56:78:9a:bc:de]:7733"),
    peer("lab-7", connectivity=link(rtt=1_240.0), epoch=12),
    peer("lab-8", connectivity=link(tcp=False)),
    peer("lab-9", connectivity=link(None, heard=44.0) | {"silent": True}),
]


def some_peers(width: int = WIDTH) -> list[str]:
    return layouts.peer_lines(SEVERAL_PEERS, width, plain)


def some_peers_on_a_wide_terminal() -> list[str]:
    return layouts.peer_lines(SEVERAL_PEERS, 160, plain)


def a_check_up() -> list[str]:
    return layouts.doctor_lines(CHECK_UP, WIDTH, plain)


def a_check_up_in_a_pipe() -> list[str]:
    return layouts.doctor_lines(CHECK_UP, 10_000, plain)


CHECK_UP: DoctorDocument = {
    "checks": [
        {"name": "clock", "ok": True, "detail": "within 0.1 s of the others", "fix": None},
        {
            "name": "udp", "ok": False,
            "detail": "UDP from here gets to nobody and back, though TCP does: "
            "failures are noticed later and gossip costs more",
            "fix": "open UDP port 7733 in the firewall (`ufw allow 7733/udp`, or "
            "`firewall-cmd --permanent --add-port=7733/udp`)",
        },
        {"name": "isolation", "ok": False, "detail": "of an older agent, which says no fix"},
    ],
    "counters": {"packets.replayed": 3, "packets.unsealed": 0, "log.lines.cut": 12},
}  # fmt: skip

SCREENS = (
    a_lab, an_empty_mesh, some_tasks, no_tasks, a_task_that_moved, a_task_that_waits, some_peers,
    some_peers_on_a_wide_terminal, a_check_up, a_check_up_in_a_pipe,
)  # fmt: skip
SCREEN_WIDTHS = {"some_peers_on_a_wide_terminal": 160, "a_check_up_in_a_pipe": 10_000}


@pytest.mark.parametrize("screen", SCREENS, ids=lambda screen: screen.__name__)
def test_the_screen_is_as_in_its_golden_file(screen: Callable[[], list[str]]) -> None:
    lines = screen()
    golden = GOLDEN / f"{screen.__name__}.txt"
    if os.environ.get("MESHQ_GOLDEN") == "write":
        golden.write_text("\n".join(lines) + "\n", "utf-8")
    assert lines == golden.read_text("utf-8").splitlines()
    assert max(map(len, lines)) <= SCREEN_WIDTHS.get(screen.__name__, WIDTH)


@pytest.mark.parametrize("screen", [a_lab, an_empty_mesh, some_tasks, some_peers], ids=lambda screen: screen.__name__)
def test_a_narrow_terminal_is_never_overrun_down_to_60_columns(screen: Callable[[int], list[str]]) -> None:
    for width in range(60, WIDTH):
        assert max(map(len, screen(width))) <= width


def test_where_there_is_no_room_the_figures_that_matter_least_are_left_out() -> None:
    def titles(width: int) -> set[str]:
        shown = {each.strip() for line in a_lab(width) for each in line.split("  ")}
        return {"CPU", "MEMORY", "GPU USE", "SUCCEEDED", "CANCELLED", "MACHINES", "BY"} & shown

    assert titles(80) == {"CPU", "MEMORY", "GPU USE", "SUCCEEDED", "CANCELLED", "MACHINES", "BY"}
    assert titles(72) == titles(80) - {"GPU USE"}
    assert titles(60) == {"CPU", "MACHINES"}
    assert titles(30) == set(), "and what is left stays"


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


def test_of_three_hundred_peers_each_has_one_line_that_fits() -> None:
    peers = [peer(f"lab-{n}-{'x' * 50}", address=f"[{'fd00:' * 7}{n:x}]:7733", connectivity=link("tcp")) for n in range(300)]
    for width in (80, 100, 300):
        lines = layouts.peer_lines(peers, width, plain)
        assert len([each for each in lines if "alive" in each]) == 300
        assert max(map(len, lines)) <= width
    narrow = layouts.peer_lines(peers, 80, plain)
    assert narrow[1].split()[-2].endswith(":7733"), "of a long address its end is kept"
    assert "and 295 more" in " ".join(narrow[-10:])


def test_columns_are_left_out_before_any_is_shortened() -> None:
    peers = [peer("lab-1", queues=["default", "gpu", "night"], labels={"room": "b12"}, connectivity=link())]
    titles = {width: layouts.peer_lines(peers, width, plain)[0].split() for width in (20, 80, 100, 130)}
    assert titles[20] == ["MACHINE", "STATE", "VIA", "RTT", "HEARD", "ADDRESS", "VERSION"]
    assert titles[80] == [*titles[20], "QUEUES"]
    assert titles[100] == [*titles[80], "LABELS", "CORES"]
    assert titles[130] == [*titles[100], "GPUS", "EPOCH"]
    assert "…" not in "".join(layouts.peer_lines(peers, 80, plain))


def test_an_agent_that_says_nothing_of_connectivity_marks_no_machine_as_its_own() -> None:
    assert layouts.peer_lines([peer("lab-1")], 80, plain)[1].split()[2:5] == ["-", "-", "-"]


def test_a_finding_is_one_line_in_a_pipe_and_never_cut_on_a_terminal() -> None:
    whole = layouts.doctor_lines(CHECK_UP, 10_000, plain)
    assert whole[1].startswith("FAIL  udp") and whole[1].endswith("--add-port=7733/udp`)")
    for width in (20, 40, 80, 120):
        lines = layouts.doctor_lines(CHECK_UP, width, plain)
        assert " ".join(lines).split() == " ".join(whole).replace("more; open", "more open").split()
        assert max(map(len, lines)) <= max(width, 60)


def test_a_path_is_never_broken_in_two() -> None:
    path = "/home/" + "x" * 70
    report: DoctorDocument = {
        "checks": [{"name": "disk", "ok": False, "detail": f"{path} is full", "fix": "x"}],
        "counters": {},
    }
    assert any(path in each for each in layouts.doctor_lines(report, 60, plain))


def test_who_was_never_heard_here_was_heard_by_others() -> None:
    unheard = peer(
        "lab-2", liveness="dead", connectivity={**link(None), "last_heard_seconds": None}, telemetry_age_seconds=60.0
    )
    assert layouts.peer_lines([unheard], 80, plain)[1].split()[1:3] == ["dead", "1m"]


def test_a_check_up_without_a_finding_counts_none() -> None:
    well: DoctorDocument = {"checks": [{"name": "clock", "ok": True, "detail": "well", "fix": None}], "counters": {}}
    assert layouts.doctor_lines(well, 80, plain) == ["ok    clock  well"]


def test_the_verdict_alone_is_coloured_and_so_is_what_is_amiss_with_a_peer() -> None:
    def marked(text: str, style: str) -> str:
        return f"<{style}:{text}>" if style else text

    lines = layouts.doctor_lines(CHECK_UP, 80, marked)
    assert lines[0] == "<green:ok>    clock      within 0.1 s of the others"
    assert lines[1].startswith("<red:FAIL>  udp        UDP from here")
    table = layouts.peer_lines(SEVERAL_PEERS, 80, marked)
    assert "<bold:here>" in table[1] and "<yellow:TCP only>" in table[3] and "<red:dead 12m>" in table[4]


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


def test_the_machine_of_a_task_is_that_of_the_attempt_which_its_status_is_of() -> None:
    """Two attempts of one number, of which one was superseded, stand in no order that means anything."""
    won, gave_up = attempt(1, "cyd", "succeeded"), attempt(1, "bob", "superseded")
    assert layouts.machine(task(status="succeeded", attempts=[won, gave_up])) == "cyd"
    assert layouts.machine(task(status="failed", attempts=[attempt(1, "ada", "failed"), attempt(2, "bob", "failed")])) == "bob"
    assert layouts.machine(task(status="cancelled", attempts=[gave_up])) == "bob"
    assert layouts.machine(task(status="queued", position=1, attempts=[attempt(1, "cyd", "lost")])) == "-"
