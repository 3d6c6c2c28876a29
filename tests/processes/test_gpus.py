"""The literal command of the mission, `meshq submit script.py --queue gpu`, on machines whose GPU driver is pretended.

And what such a driver does to an agent: it shows who else computes, is sliced, missing, hanging, back again.
"""

import os
import pwd
from collections.abc import Callable
from typing import Any

import pytest

from tests.exec.driver import build
from tests.processes.mesh import Agent, Mesh, wait_for

pytestmark = pytest.mark.xdist_group("processes")

SCRIPT = (
    'import os\nprint("gpu", os.environ["CUDA_VISIBLE_DEVICES"], os.environ["CUDA_DEVICE_ORDER"], os.environ["MESHQ_PEER"])\n'
)
MIB, GIB = 2**20, 2**30
ME = pwd.getpwuid(os.geteuid()).pw_name
TOLD_SECONDS = 30.0  # a look at the GPUs, the driver's retry, and a refresh of telemetry


class Driver:
    """What the driver of one agent shows; changed in one step."""

    def __init__(self, mesh: Mesh, agent: Agent, uuids: tuple[str, ...]) -> None:
        folder = mesh.folder / f"driver-{agent.name}"
        folder.mkdir()
        build(folder)
        self._state = folder / "state"
        self.gpus = "".join(f"gpu {uuid} NVIDIA_H100 81920 10 5 40 90000\n" for uuid in uuids)
        self.show()
        agent.variables = {"LD_LIBRARY_PATH": str(folder), "FAKE_NVML": str(self._state)}

    def show(self, *lines: str) -> None:
        """The GPUs, and these lines."""
        partial = self._state.with_suffix(".new")
        partial.write_text(self.gpus + "".join(f"{line}\n" for line in lines))
        partial.replace(self._state)


def with_gpus(mesh: Mesh, agent: Agent, *uuids: str) -> Driver:
    return Driver(mesh, agent, tuple(f"{uuid}-{mesh.folder.name}" for uuid in uuids))


def told(agent: Agent, name: str, what: Callable[[Any], bool]) -> Any:
    """The document of that peer at this agent, as soon as it says so."""

    def seen() -> Any:
        [peer] = [peer for peer in agent.ask("status")["peers"] if peer["name"] == name]
        return peer if what(peer) else None

    return wait_for(seen, TOLD_SECONDS, f"{agent.name} is told of {name}: {agent.ask('status')['peers']}")


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

    shown = told(ada, "bob", lambda peer: len(peer["gpus"]) == 2)
    assert [(gpu["index"], gpu["uuid"][:7], gpu["name"], gpu["memory_bytes"]) for gpu in shown["gpus"]] == [
        (0, "GPU-one", "NVIDIA H100", 80 * GIB),
        (1, "GPU-two", "NVIDIA H100", 80 * GIB),
    ]
    assert (shown["slots"]["total"], shown["queues"]) == (2, ["default", "gpu"])
    assert (shown["versions"]["driver"], shown["versions"]["cuda"]) == ("570.00", "12.8")


def test_two_agents_of_one_machine_never_give_one_gpu_to_two_tasks(mesh: Mesh) -> None:
    """As two users of one machine have them: each agent sees the same GPU."""
    ada, bob = mesh.add("ada"), mesh.add("bob")
    for agent in (ada, bob):
        with_gpus(mesh, agent, "GPU-shared")
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


def test_everybody_sees_which_task_has_a_gpu_and_who_computes_beside_the_mesh(mesh: Mesh) -> None:
    ada, bob = mesh.add("ada"), mesh.add("bob")
    driver = with_gpus(mesh, bob, "GPU-one", "GPU-two")
    person = f"process 0 {os.getpid()} 500"
    driver.show(person)
    ada.join("--new")
    bob.join("--seed", ada.seed, key=mesh.key())
    mesh.wait_until_whole(ada, bob)
    gate = mesh.gate("gate")
    task = ada.submit("--queue", "gpu", mesh.program("hold.py"), str(gate.folder))
    gate.wait_for_starts(1)
    [attempt] = bob.attempts_running()
    driver.show(person, f"process 1 {attempt['pid']} 900", f"graphics 1 {os.getpid()} 30")

    shown = told(ada, "bob", lambda peer: len(peer["gpus"]) == 2 and len(peer["gpus"][1]["processes"]) == 2)
    first, second = shown["gpus"]
    foreign = {"pid": os.getpid(), "user": ME, "task": None, "memory_bytes": 500 * MIB, "graphics": False}
    assert (first["task"], first["foreign_pids"], first["processes"]) == (None, [os.getpid()], [foreign])
    assert (second["task"], second["foreign_pids"]) == (task, [])
    assert second["processes"] == [
        {"pid": attempt["pid"], "user": ME, "task": task, "memory_bytes": 900 * MIB, "graphics": False},
        {**foreign, "memory_bytes": 30 * MIB, "graphics": True},
    ]
    assert f"bob, GPU 0: used by {ME}" in ada.run("status").out
    other = ada.submit("--queue", "gpu", mesh.program("hold.py"), str(gate.folder))
    wait_for(lambda: ada.show(other)["reason"], 30, "ada says why the second one waits")
    driver.show(f"process 1 {attempt['pid']} 900")
    gate.wait_for_starts(2)  # the person's process has ended
    gate.open()
    ada.wait_until(other, "succeeded")


def test_a_gpu_in_mig_mode_is_shown_with_its_instances_and_given_to_nobody(mesh: Mesh) -> None:
    ada = mesh.add("ada")
    driver = with_gpus(mesh, ada, "GPU-sliced", "GPU-whole")
    driver.show("mig 0 MIG-one 1g.10gb 9728 5", "mig 0 MIG-two 2g.20gb 19968 5")
    ada.join("--new")
    shown = told(ada, "ada", lambda peer: len(peer["gpus"]) == 2)
    assert [(each["parent"], each["uuid"], each["profile"]) for each in shown["gpus"][0]["mig"]] == [
        (0, "MIG-one", "1g.10gb"), (0, "MIG-two", "2g.20gb"),
    ]  # fmt: skip
    assert "MIG mode" in shown["gpus"][0]["problem"] and shown["gpus"][1]["problem"] is None
    assert shown["slots"]["total"] == 1
    (ada.here / "script.py").write_text(SCRIPT)
    assert ada.run("submit", "script.py", "--queue", "gpu", "--wait", "--json").code == 0
    assert ada.log(ada.ask("tasks")[0]["id"]).startswith("gpu 1 ")
    refused = ada.run("submit", "script.py", "--gpus", "2")
    assert refused.code == 75 and "ada has 1 GPUs and 1 in MIG mode where 2 are needed" in refused.err


def test_a_driver_that_hangs_is_shown_and_holds_nothing_up_but_its_gpus(mesh: Mesh) -> None:
    ada = mesh.add("ada")
    driver = with_gpus(mesh, ada, "GPU-one")
    ada.join("--new")
    told(ada, "ada", lambda peer: len(peer["gpus"]) == 1)
    driver.show("hang nvmlDeviceGetTemperature 0")
    shown = told(ada, "ada", lambda peer: peer["gpu_problem"])
    assert shown["gpu_problem"].startswith("the NVIDIA driver has not answered for ")
    assert shown["gpus"][0]["problem"] == shown["gpu_problem"]
    assert shown["queues"] == ["default", "gpu"], "tasks wait for it instead of being refused"
    assert shown["usage"]["cpu_percent"] is not None and shown["problem"] is None
    assert "ada: the NVIDIA driver has not answered for " in ada.run("status").out

    waiting = ada.submit("--queue", "gpu", "--", "true")
    assert ada.run("submit", "--wait", "--", "true").code == 0, "what needs no GPU runs"
    assert ada.status_of(waiting) == "queued"
    driver.show()
    ada.wait_until(waiting, "succeeded")
    assert told(ada, "ada", lambda peer: peer["gpu_problem"] is None)["gpus"][0]["problem"] is None


def test_a_driver_that_is_loaded_after_the_agent_started_brings_its_gpus_their_queue_and_slots(mesh: Mesh) -> None:
    ada = mesh.add("ada")
    driver = with_gpus(mesh, ada, "GPU-one", "GPU-two")
    driver.show("fail nvmlInitWithFlags 9")
    ada.join("--new")
    before = told(ada, "ada", lambda peer: peer["gpu_problem"])
    assert before["gpu_problem"] == "the NVIDIA driver does not work: the NVIDIA driver is not loaded"
    assert (before["gpus"], before["queues"], before["slots"]["total"]) == ([], ["default"], 1)
    driver.show()
    after = told(ada, "ada", lambda peer: len(peer["gpus"]) == 2)
    assert (after["gpu_problem"], after["queues"], after["slots"]["total"]) == (None, ["default", "gpu"], 2)
    driver.show("fail * 15 1")
    lost = told(ada, "ada", lambda peer: peer["gpus"][1]["problem"])["gpus"]
    assert (lost[1]["problem"], lost[1]["uuid"][:7]) == ("it is lost; the machine must be restarted", "GPU-two")
    assert lost[0]["problem"] is None and lost[0]["temperature_c"] == 40


def test_an_agent_starts_though_the_driver_hangs(mesh: Mesh) -> None:
    ada = mesh.add("ada")
    with_gpus(mesh, ada, "GPU-one").show("hang nvmlInitWithFlags")
    ada.join("--new")
    assert ada.run("submit", "--wait", "--", "true").code == 0
    assert told(ada, "ada", lambda peer: peer["gpu_problem"])["gpus"] == []
