"""A followed log is complete, and nothing comes twice, whatever happens to the agents between the task and its reader."""

import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.processes.mesh import MESHQ, Agent, Mesh, wait_for

pytestmark = pytest.mark.xdist_group("processes")

SIGNALS = pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)


class Reader:
    """A command that prints a log, with its two streams in files."""

    def __init__(self, process: "subprocess.Popen[bytes]", out: Path, err: Path) -> None:
        self.process = process
        self._out, self._err = out, err

    def lines(self) -> list[str]:
        return self._out.read_text().splitlines()

    def remarks(self) -> list[str]:
        return [line for line in self._err.read_text().splitlines() if line.startswith("---")]

    def wait_for_more(self, count: int = 20) -> None:
        seen = len(self.lines())
        wait_for(lambda: len(self.lines()) >= seen + count, 30, f"{count} lines more than {seen}")

    def ends(self) -> int:
        return self.process.wait(60)


@contextmanager
def reading(agent: Agent, *command: str) -> Iterator[Reader]:
    out, err = agent.home.parent / "reader.out", agent.home.parent / "reader.err"
    with out.open("wb") as stdout, err.open("wb") as stderr:
        process = subprocess.Popen(
            (*MESHQ, *command), env=agent.environment(), cwd=agent.here, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr
        )
    try:
        yield Reader(process, out, err)
    finally:
        process.kill()
        process.wait()


def counted(attempt: int, lines: list[str]) -> list[str]:
    return [f"{attempt}: {number}" for number in range(len(lines))]


def start(mesh: Mesh, *names: str) -> list[Agent]:
    """Agents of which the first runs nothing itself that asks for `role=runner`."""
    first, *runners = [mesh.add(name) for name in names]
    first.join("--new", "--profile", "fast")
    for agent in runners:
        agent.join("--seed", first.seed, "--profile", "fast", "--label", "role=runner", key=mesh.key())
    mesh.wait_until_whole(first, *runners)
    return [first, *runners]


def stop(agent: Agent, number: signal.Signals) -> None:
    if number is signal.SIGKILL:
        agent.kill()
    else:
        agent.terminate()


@SIGNALS
def test_a_follower_misses_nothing_when_the_agent_of_the_runner_is_restarted(mesh: Mesh, number: signal.Signals) -> None:
    ada, bob = start(mesh, "ada", "bob")
    gate = mesh.gate("gate")
    task = ada.submit("--label", "role=runner", mesh.program("count.py"), str(gate.folder))
    with reading(ada, "logs", task, "--follow") as reader:
        reader.wait_for_more()
        stop(bob, number)
        bob.join()
        reader.wait_for_more()  # it goes on while the task does
        gate.open()
        assert reader.ends() == 0
    *lines, end = reader.lines()
    assert (lines, end) == (counted(1, lines), "the end")
    assert reader.remarks() == []
    assert len(gate.starts()) == 1


def test_a_follower_that_comes_while_the_agent_of_the_runner_is_away_waits_for_it(mesh: Mesh) -> None:
    ada, bob = start(mesh, "ada", "bob")
    gate = mesh.gate("gate")
    task = ada.submit("--label", "role=runner", mesh.program("count.py"), str(gate.folder))
    gate.wait_for_starts(1)
    ada.wait_until(task, "running")
    bob.kill()
    with reading(ada, "logs", task, "--follow") as reader:
        time.sleep(1.5)  # it has asked in vain
        bob.join()
        reader.wait_for_more()
        gate.open()
        assert reader.ends() == 0
    *lines, end = reader.lines()
    assert (lines, end, reader.remarks()) == (counted(1, lines), "the end", [])


def test_a_follower_is_told_of_a_lost_machine_and_sees_the_whole_next_attempt(mesh: Mesh) -> None:
    ada, bob, cyd = start(mesh, "ada", "bob", "cyd")
    gate = mesh.gate("gate")
    task = ada.submit("--label", "role=runner", mesh.program("count.py"), str(gate.folder))
    [(_, lost)] = gate.wait_for_starts(1).items()
    other = {"bob": cyd, "cyd": bob}[lost]
    with reading(ada, "logs", task, "--follow") as reader:
        reader.wait_for_more()
        mesh.by_name(lost).lose_the_machine()
        gate.wait_for_starts(2)
        wait_for(lambda: "2: 5" in reader.lines(), 60, "the second attempt is followed")
        gate.open()
        assert reader.ends() == 0
    *lines, end = reader.lines()
    second = lines.index("2: 0")
    assert lines[:second] == counted(1, lines[:second])
    assert (lines[second:], end) == (counted(2, lines[second:]), "the end")
    assert reader.remarks() == [f"--- the log of attempt 1 on {lost} broke off ---", f"--- attempt 2 on {other.name} ---"]


@SIGNALS
def test_nothing_comes_twice_when_the_own_agent_is_restarted(mesh: Mesh, number: signal.Signals) -> None:
    ada, _ = start(mesh, "ada", "bob")
    gate = mesh.gate("gate")
    program = mesh.program("count.py")
    with reading(ada, "submit", "--follow", "--label", "role=runner", program, str(gate.folder), "7") as reader:
        reader.wait_for_more()
        stop(ada, number)
        ada.join()
        reader.wait_for_more()
        gate.open()
        assert reader.ends() == 7
    *lines, end = reader.lines()
    assert (lines, end, reader.remarks()) == (counted(1, lines), "the end", [])


BIG = """
import os, sys, time
line = b"x" * 1023 + b"\\n"
for number in range(100 * 1024):
    os.write(1, b"%07d" % number + line[7:])
"""


def test_a_log_without_its_middle_is_the_same_at_the_runner_and_in_its_copy(mesh: Mesh, tmp_path: Path) -> None:
    ada, bob = start(mesh, "ada", "bob")
    (tmp_path / "big.py").write_text(BIG)
    task = ada.submit("--label", "role=runner", str(tmp_path / "big.py"))
    ada.wait_until(task, "succeeded")
    wait_for(lambda: list(ada.home.glob("kept/*/log")), 60, "the submitter keeps a copy")
    texts = []
    for agent in (ada, bob):
        with reading(agent, "logs", task, "--follow") as reader:
            assert reader.ends() == 0
        texts.append(reader.lines())
        assert len(reader.remarks()) == 1 and "left out here" in reader.remarks()[0]
        assert int(texts[-1][-1][:7]) == 100 * 1024 - 1
    assert texts[0] == texts[1]
    [copy] = ada.home.glob("kept/*/log")
    assert copy.stat().st_blocks * 512 < 80 * 2**20 < copy.stat().st_size
