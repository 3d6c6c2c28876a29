"""Failpoints: off they do nothing, on they kill at exactly the passage that was asked for, and no task can reach them."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from meshq import config, failpoints
from meshq.errors import UsageError
from meshq.trust import hardening

SIGKILLED = -9


@pytest.fixture(autouse=True)
def unarmed() -> Iterator[None]:
    yield
    failpoints.disarm()


def killed_after(passages: Sequence[str], rules: str, deaths: Path) -> tuple[int, int]:
    """In a process of its own that passes these points: its exit code, and how many it passed."""
    program = f"""
import sys
from meshq import failpoints
failpoints.arm({rules!r}, {str(deaths)!r})
for name in {list(passages)!r}:
    failpoints.reach(name)
    print(name, flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    return done.returncode, len(done.stdout.split())


@pytest.mark.parametrize(
    ("rules", "passed"),
    [("started:1", 1), ("started:2", 3), ("started:3", None), ("stored:1,started:2", 0), ("", None), ("purged:1", None)],
)
def test_a_process_dies_at_the_passage_that_was_asked_for(tmp_path: Path, rules: str, passed: int | None) -> None:
    points = ["stored", "started", "stored", "started"]
    code, count = killed_after(points, rules, tmp_path / "deaths")
    assert (code, count) == ((0, 4) if passed is None else (SIGKILLED, passed))
    lines = (tmp_path / "deaths").read_text().split() if (tmp_path / "deaths").exists() else []
    assert lines[:1] == ([] if passed is None else [points[passed]])


def test_a_probability_is_drawn_from_the_seed(tmp_path: Path) -> None:
    def passed(seed: int, percent: int) -> int:
        return killed_after(["merged"] * 200, f"merged:p{percent},seed:{seed}", tmp_path / "deaths")[1]

    assert [passed(seed, 5) for seed in (1, 2, 3)] == [passed(seed, 5) for seed in (1, 2, 3)]
    assert len({passed(seed, 5) for seed in (1, 2, 3)}) > 1
    assert passed(1, 100) == 0


def test_passages_are_counted_across_forks(tmp_path: Path) -> None:
    failpoints.arm("started:3", str(tmp_path / "deaths"))
    codes = []
    for _ in range(4):
        pid = os.fork()
        if pid == 0:
            failpoints.reach("started")
            os._exit(0)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    assert codes == [0, 0, SIGKILLED, 0]


def test_unarmed_nothing_is_counted_and_nothing_dies() -> None:
    for name in failpoints.POINTS:
        failpoints.reach(name)
    assert failpoints.hand_down() == ()


def test_the_first_process_that_is_started_gets_the_rules_and_no_other(tmp_path: Path) -> None:
    failpoints.arm("forking:1", str(tmp_path / "deaths"))
    assert [failpoints.hand_down(), failpoints.hand_down()] == [("forking:1", str(tmp_path / "deaths")), ()]


@pytest.mark.parametrize(
    "text", ["started", "started:0", "started:-1", "started:x", "nowhere:1", "started:p0", "started:p101", "seed:x", "a:1,,"]
)
def test_what_makes_no_sense_is_one_clear_error(text: str) -> None:
    with pytest.raises(UsageError, match="is no failpoint") as error:
        config.switches_from_environment({"MESHQ_FAILPOINT": text})
    assert "started" in error.value.hint


@pytest.mark.parametrize(("environ", "expected"), [
    ({}, config.Switches()),
    ({"MESHQ_EVENTS": "0"}, config.Switches()),
    ({"MESHQ_EVENTS": "1", "MESHQ_FAILPOINT": "acked:2"}, config.Switches(failpoints="acked:2", events=True)),
])  # fmt: skip
def test_the_switches_are_read_from_the_environment(environ: dict[str, str], expected: config.Switches) -> None:
    assert config.switches_from_environment(environ) == expected


def test_no_child_inherits_the_switches() -> None:
    environ = {"MESHQ_FAILPOINT": "acked:1", "MESHQ_EVENTS": "1", "PATH": "/bin"}
    hardening.forget_settings(environ)
    assert environ == {"PATH": "/bin"}
    assert not {"MESHQ_FAILPOINT", "MESHQ_EVENTS"} & set(config.TASK_VARIABLES)


def test_each_point_is_passed_exactly_where_the_table_says() -> None:
    """One place each; a point that nobody passes would be a promise of a test that tests nothing."""
    package = Path(config.__file__).parent
    places: dict[str, list[str]] = {}
    for file in sorted(package.rglob("*.py")):
        for name in re.findall(r"failpoints\.reach\(\"([a-z-]+)\"\)", file.read_text()):
            places.setdefault(name, []).append(file.name)
    assert {name: len(files) for name, files in places.items()} == dict.fromkeys(failpoints.POINTS, 1)


def test_a_process_that_is_to_die_says_so_first(tmp_path: Path) -> None:
    deaths = tmp_path / "deaths"
    assert killed_after(["acked"], "acked:1", deaths)[0] == SIGKILLED
    [line] = deaths.read_text().splitlines()
    name, pid, at = line.split()
    assert name == "acked" and int(pid) > 0 and float(at) > 0
