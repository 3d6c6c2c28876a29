"""A home that was copied: two agents with one identity, as real processes."""

import shutil

from tests.processes.mesh import Agent, Mesh, alive_at, wait_for


def test_the_newer_agent_of_a_copied_home_takes_no_part_and_what_it_says_makes_it_a_peer_of_its_own(mesh: Mesh) -> None:
    ada, bob = mesh.start("ada", "bob")
    copy = mesh.add("copy")
    shutil.copytree(bob.home, copy.home, ignore=shutil.ignore_patterns("agent.lock", "control", "settings.json"))
    copy.join("--seed", ada.seed)

    def check(agent: Agent, name: str) -> dict[str, object]:
        [found] = [each for each in agent.run("doctor", "--json").json()["checks"] if each["name"] == name]
        return dict(found)

    wait_for(lambda: check(copy, "identity")["ok"] is False, 30, "the copy knows what it is")
    assert "identity.key" in str(check(copy, "identity")["fix"])
    wait_for(lambda: check(bob, "identity")["ok"] is False, 30, "the older one knows it, too")
    assert not check(copy, "claims")["ok"]
    wait_for(lambda: alive_at(ada) == {"ada", "bob"}, 30, "the others see one of them, the older")
    [seen] = [peer for peer in ada.ask("peers") if peer["name"] == "bob"]
    assert seen["address"] == bob.seed
    task = ada.submit("--", "true")
    assert ada.wait_until(task, "succeeded")["attempts"][0]["peer"] in ("ada", "bob")

    copy.kill()
    (copy.home / "trust" / "identity.key").unlink()
    copy.join("--seed", ada.seed)
    wait_for(lambda: alive_at(ada) == {"ada", "bob", "copy"}, 30, "it is a peer of its own")
    assert check(copy, "identity")["ok"] and check(copy, "claims")["ok"]
