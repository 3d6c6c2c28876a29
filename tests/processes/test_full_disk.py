"""A disk that fills up at each step of a task's life: nothing acknowledged is lost, and it goes on once there is room."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.processes.mesh import Agent, Mesh, wait_for

pytestmark = pytest.mark.xdist_group("processes")

DISK_MIB = 600  # a peer claims nothing below 512 that are free
AGAIN_SECONDS = 30.0


@pytest.fixture
def disk(mesh: Mesh) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    folder = mesh.folder / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        mesh.stop()
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, leave: int = 0) -> None:
    """To the last byte, or but for so many."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - leave
    with (disk / "filler").open("wb", buffering=0) as file:
        os.posix_fallocate(file.fileno(), 0, max(free, 1))


def check(agent: Agent, name: str) -> dict[str, Any]:
    [found] = [each for each in agent.run("doctor", "--json").json()["checks"] if each["name"] == name]
    return dict(found)


def test_a_disk_that_is_full_to_the_last_byte_loses_nothing_and_goes_on_when_there_is_room(mesh: Mesh, disk: Path) -> None:
    ada, bob = mesh.add("ada"), Agent(disk, "bob")
    mesh.agents.append(bob)
    ada.join("--new", "--label", "who=ada")
    bob.join("--seed", ada.seed, "--label", "who=bob", "--slots", "2", key=mesh.key())
    mesh.wait_until_whole(ada, bob)
    gate = mesh.gate("gate")
    running = ada.submit("--label", "who=bob", mesh.program("hold.py"), str(gate.folder), "7")
    gate.wait_for_starts(1)

    fill(disk)
    wait_for(lambda: not check(bob, "claims")["ok"], AGAIN_SECONDS, "it says that it claims nothing")
    assert "disk" in check(bob, "claims")["detail"]
    refused = bob.run("submit", "--", "true")
    assert refused.code == 1 and "nearly full" in refused.err
    waiting = ada.submit("--label", "who=bob", "--", "true")  # a push to the full disk
    assert ada.show(waiting)["status"] == "queued"
    gate.open()
    ended = ada.wait_until(running, "failed", "queued", "succeeded")
    assert (ended["status"], ended["exit_code"]) == ("failed", 7), "an end is recorded on a full disk, too"
    assert bob.alive()

    (disk / "filler").unlink()
    ada.wait_until(waiting, "succeeded", limit=AGAIN_SECONDS)
    assert check(bob, "claims")["ok"]
    last = bob.submit("--label", "who=bob", "--", "true")
    bob.wait_until(last, "succeeded", limit=AGAIN_SECONDS)
    assert {each["id"] for each in bob.ask("tasks")} == {running, waiting, last}
    assert len(gate.starts()) == 1
