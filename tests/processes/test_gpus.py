"""The literal command of the mission, `meshq submit script.py --queue gpu`, on machines whose GPU driver is pretended."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.processes.mesh import Agent, Mesh, wait_for

pytestmark = pytest.mark.xdist_group("processes")

SOURCE = Path(__file__).parent.parent / "exec" / "fake_nvml.c"
SCRIPT = (
    'import os\nprint("gpu", os.environ["CUDA_VISIBLE_DEVICES"], os.environ["CUDA_DEVICE_ORDER"], os.environ["MESHQ_PEER"])\n'
)


def with_gpus(mesh: Mesh, agent: Agent, *uuids: str) -> Path:
    """Give the agent a driver that shows these GPUs; the file that says what it shows."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to build the pretended driver (Debian: apt-get install gcc)")
    folder = mesh.folder / f"driver-{agent.name}"
    folder.mkdir()
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "libnvidia-ml.so.1", SOURCE], check=True)
    state = folder / "state"
    state.write_text("".join(f"gpu {uuid} H100 81920 10 5 40 90000\n" for uuid in uuids))
    agent.variables = {"LD_LIBRARY_PATH": str(folder), "FAKE_NVML": str(state)}
    return state


def test_a_task_of_the_gpu_queue_gets_one_gpu_on_the_machine_that_has_some(mesh: Mesh) -> None:
    ada, bob = mesh.add("ada"), mesh.add("bob")
    with_gpus(mesh, bob, "GPU-one", "GPU-two")
    ada.join("--new")
    bob.join("--seed", ada.seed, key=mesh.key())
    mesh.wait_until_whole(ada, bob)
    (ada.here / "script.py").write_text(SCRIPT)

    done = ada.run("submit", "script.py", "--queue", "gpu", "--wait", "--json")
    assert done.code == 0, done.err
    [task] = ada.ask("tasks")
    assert task["attempts"][-1]["peer"] == "bob"
    assert ada.log(task["id"]) == "gpu 0 PCI_BUS_ID bob\n"

    [shown] = [peer for peer in ada.ask("status")["peers"] if peer["name"] == "bob"]
    assert [(gpu["index"], gpu["uuid"], gpu["memory_bytes"]) for gpu in shown["gpus"]] == [
        (0, "GPU-one", 80 << 30),
        (1, "GPU-two", 80 << 30),
    ]
    assert (shown["slots"]["total"], shown["queues"]) == (2, ["default", "gpu"])


def test_two_agents_of_one_machine_never_give_one_gpu_to_two_tasks(mesh: Mesh) -> None:
    """As two users of one machine have them: each agent sees the same GPU."""
    uuid = f"GPU-{mesh.folder.name}"
    ada, bob = mesh.add("ada"), mesh.add("bob")
    for agent in (ada, bob):
        with_gpus(mesh, agent, uuid)
        agent.join("--new")
    gate = mesh.gate("gate")
    first = ada.submit("--queue", "gpu", mesh.program("hold.py"), str(gate.folder))
    gate.wait_for_starts(1)
    second = bob.submit("--queue", "gpu", mesh.program("hold.py"), str(gate.folder))
    wait_for(lambda: bob.show(second)["reason"], 30, "bob says why the second one waits")
    assert bob.show(second)["status"] in ("queued", "claimed")
    assert len(gate.starts()) == 1
    gate.open()
    ada.wait_until(first, "succeeded")
    bob.wait_until(second, "succeeded")
    assert len(gate.starts()) == 2
