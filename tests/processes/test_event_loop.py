"""The event loop of an agent never waits for the disk: what touches it runs in threads."""

from pathlib import Path

import pytest

from tests.processes.mesh import PROGRAMS, Mesh

pytestmark = pytest.mark.xdist_group("processes")


def test_after_its_start_the_event_loop_opens_no_file_of_the_home(mesh: Mesh) -> None:
    """What is found: opened, made, renamed and deleted files, and SQLite. Not: `stat`, and writes to what is open."""
    ada, bob = mesh.add("ada"), mesh.add("bob")
    found = mesh.folder / "found"
    bob.variables |= {"PYTHONPATH": str(PROGRAMS / "audit"), "DISK_AUDIT": str(found)}
    ada.join("--new", "--label", "who=ada")
    bob.join("--seed", ada.seed, "--label", "who=bob", key=mesh.key())
    mesh.wait_until_whole(ada, bob)
    before = len(lines(found))
    assert before > 0, "the start reads keys and the ledger, so the audit works"

    gate = mesh.gate("gate")
    gate.open()
    program = mesh.program("hold.py")
    here = bob.submit("--label", "who=bob", program, str(gate.folder), "0")
    there = bob.submit("--label", "who=ada", program, str(gate.folder), "0")
    for task in (here, there):
        bob.wait_until(task, "succeeded")
        for agent in (ada, bob):
            assert agent.log(task)
            assert agent.run("fetch", task, "--to", str(mesh.folder / f"{agent.name}-{task}")).code == 0
    for command in (("status",), ("tasks",), ("peers",), ("doctor",), ("show", here), ("queue", "list"), ("retry", here)):
        bob.run(*command)
    assert lines(found)[before:] == []


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []
