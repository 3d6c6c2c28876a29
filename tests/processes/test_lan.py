"""Three machines on one LAN that know nothing of each other but the key: the issue's own story."""

import shutil

import pytest

from tests.processes.mesh import ROOT, Agent, Mesh, alive_at, temporary_mesh, wait_for
from tests.processes.netns import Lan, lan

pytestmark = [pytest.mark.xdist_group("processes"), pytest.mark.netns]

EXAMPLE = ROOT / "examples" / "train_digits.py"
PORT = 7733


def join_by_mdns(mesh: Mesh, net: Lan) -> list[Agent]:
    """ada starts a mesh; bob and cyd find it with nothing but the key. Only these two run tasks that ask for `role=runner`."""
    ada, bob, cyd = [
        mesh.add(name, address=machine.address, port=PORT, netns=machine.netns)
        for name, machine in zip(("ada", "bob", "cyd"), net.machines, strict=False)
    ]
    ada.join(mdns=True)
    for agent in (bob, cyd):
        agent.variables["UV_OFFLINE"] = "1"
        agent.join("--label", "role=runner", key=mesh.key(), mdns=True)
    mesh.wait_until_whole(ada, bob, cyd, limit=60)
    return [ada, bob, cyd]


def fill_package_caches(agents: list[Agent]) -> None:
    """The LAN has no way out: what the example needs is downloaded by an agent that stands outside of it.

    The environments are still built here, by uv without network.
    """
    with temporary_mesh() as outside:
        [loader] = outside.start("loader")
        task = loader.submit(str(EXAMPLE), "--epochs", "1")
        loader.wait_until(task, "succeeded", limit=300)
        for agent in agents:
            shutil.copytree(loader.home / "packages", agent.home / "packages", symlinks=True, dirs_exist_ok=True)


def test_three_machines_find_each_other_by_mdns_and_outlive_the_one_that_runs_the_task(mesh: Mesh) -> None:
    with lan(3) as net:
        ada, bob, cyd = join_by_mdns(mesh, net)
        fill_package_caches([bob, cyd])

        task = ada.submit("--label", "role=runner", str(EXAMPLE), "--epochs", "15", "--slow", "0.4")
        wait_for(lambda: "epoch   2/15" in ada.log(task), 120, "the training is under way")
        [first] = ada.show(task)["attempts"]
        runner, other = (bob, cyd) if first["peer"] == "bob" else (cyd, bob)
        runner.lose_the_machine()

        for agent in (ada, other):
            document = agent.wait_until(task, "succeeded", "failed", limit=180)
            assert document["status"] == "succeeded"
            assert [(attempt["peer"], attempt["status"]) for attempt in document["attempts"]] == [
                (runner.name, "lost"),
                (other.name, "succeeded"),
            ]
        folder = mesh.folder / "fetched"
        assert ada.run("fetch", task, "--to", str(folder)).code == 0
        fetched = {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
        assert fetched == {each["path"]: each["bytes"] for each in document["outputs"]}
        assert set(fetched) == {"model.npz", "training.png"}


def test_without_the_key_a_machine_is_told_that_a_mesh_is_there(mesh: Mesh) -> None:
    with lan(2) as net:
        first, second = net.machines
        ada = mesh.add("ada", address=first.address, port=PORT, netns=first.netns)
        ada.join(mdns=True)
        eve = mesh.add("eve", address=second.address, port=PORT, netns=second.netns)
        eve.spawn(mdns=True)
        assert eve.wait_until_ended() == 2
        said = eve.output.read_text()
        assert "key" in said and "Traceback" not in said
        assert alive_at(ada) == {"ada"}


def test_a_cable_that_is_unplugged_and_plugged_in_again_heals(mesh: Mesh) -> None:
    with lan(3) as net:
        ada, bob, cyd = join_by_mdns(mesh, net)
        net.unplug(net.machines[2])
        wait_for(lambda: alive_at(ada) == {"ada", "bob"}, 60, "ada sees cyd dead")
        task = ada.submit("--label", "role=runner", "--", "true")
        assert ada.wait_until(task, "succeeded")["attempts"][0]["peer"] == "bob"
        net.plug_in(net.machines[2])
        mesh.wait_until_whole(ada, bob, cyd, limit=120)
        assert cyd.wait_until(task, "succeeded")["id"] == task
