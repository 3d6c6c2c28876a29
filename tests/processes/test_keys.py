"""A mesh changes its key while it works: nobody is lost on the way, and whoever has the old one alone is out at the end."""

import os
import signal
import socket
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meshq.trust import keys
from meshq.trust.certificates import Credentials
from meshq.trust.identity import Identity
from meshq.trust.seal import Sealer
from tests.processes.mesh import Agent, Mesh, alive_at, wait_for

pytestmark = pytest.mark.xdist_group("processes")

FAST = ("--profile", "fast")
CATCH_UP = 30.0


def key_of(agent: Agent) -> str:
    return agent.run("key").out.strip()


def ids_at(agent: Agent) -> list[str]:
    """All keys that the machine accepts, the one in use first."""
    return [each["id"] for each in agent.ask("key", "list")["keys"]]


def all_have(agent: Agent, key: str) -> bool:
    """As far as that machine has heard."""
    return [each["lacking"] for each in agent.ask("key", "list")["keys"] if each["id"] == key] == [[]]


def mesh_id_at(agent: Agent) -> str:
    return str(agent.ask("status")["mesh"]["id"])


def installed(agent: Agent, *options: str) -> str:
    return str(agent.ask("key", "install", *options)["id"])


def change_the_key(agent: Agent, *, remove: bool) -> str:
    """All steps at one machine; the new key's id."""
    [old] = ids_at(agent)
    new = installed(agent)
    agent.ask("key", "use", new)
    if remove:
        agent.ask("key", "remove", old)
    return new


def wait_until_dead(gone: Agent, *agents: Agent) -> None:
    """Each of the agents holds it dead: a suspect counts as alive still."""
    for agent in agents:
        wait_for(partial(is_dead_at, agent, gone), CATCH_UP, f"{agent.name} holds {gone.name} dead")


def is_dead_at(agent: Agent, gone: Agent) -> bool:
    return [peer["liveness"] for peer in agent.ask("peers") if peer["name"] == gone.name] == ["dead"]


def counted(agent: Agent, counter: str) -> int:
    return int(agent.run("doctor", "--json").json()["counters"].get(counter, 0))


def failed_checks(agent: Agent) -> dict[str, str]:
    found = agent.run("doctor", "--json").json()["checks"]
    return {check["name"]: f"{check['detail']}: {check.get('fix')}" for check in found if not check["ok"]}


def says(file: Path, text: str) -> bool:
    return text in file.read_text()


def key_file(folder: Path, text: str) -> str:
    path = folder / "new.key"
    path.touch(0o600)
    path.write_text(text + "\n")
    return str(path)


def test_a_mesh_changes_its_key_while_a_task_runs(mesh: Mesh) -> None:
    ada, bob, cyd = mesh.start("ada", "bob", "cyd", options=FAST)
    gate = mesh.gate("one")
    task = ada.submit(mesh.program("hold.py"), str(gate.folder))
    gate.wait_for_starts(1)
    [old], name, old_key = ids_at(ada), mesh_id_at(ada), key_of(ada)

    new = installed(ada)
    for agent in (ada, bob, cyd):
        wait_for(partial(all_have, agent, new), CATCH_UP, f"{agent.name} hears that all have {new}")
        assert ids_at(agent) == [old, new]
        assert key_of(agent) == old_key
    assert installed(bob) == new  # the one that waits to be used, not another one

    assert bob.ask("key", "use", new[:4]) == {"id": new, "peers": ["ada", "bob", "cyd"], "failed": []}
    new_key = key_of(ada)
    assert keys.parse(new_key).id == new
    assert [key_of(agent) for agent in (bob, cyd)] == [new_key, new_key]
    assert bob.run("key", "remove", new).code == 2

    assert cyd.ask("key", "remove", old)["peers"] == ["ada", "bob", "cyd"]
    assert [ids_at(agent) for agent in (ada, bob, cyd)] == [[new]] * 3
    assert [mesh_id_at(agent) for agent in (ada, bob, cyd)] == [name] * 3
    assert ada.run("key", "use", old).code == 2

    ada.kill()
    ada.join()
    assert key_of(ada) == new_key
    mesh.wait_until_whole(ada, bob, cyd)
    gate.open()
    assert len(ada.wait_until(task, "succeeded")["attempts"]) == 1
    assert_out(ada, old_key)


def assert_out(agent: Agent, old_key: str) -> None:
    """Who has this key alone is refused by UDP and by TLS."""
    before = counted(agent, "packets: unknown_key")
    packet = Sealer(keys.parse(old_key).gossip_key, os.urandom(16)).seal(b"let me in")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(packet, (agent.address, agent.port))
    wait_for(lambda: counted(agent, "packets: unknown_key") > before, 10.0, "the packet was counted")

    stranger = Identity(Ed25519PrivateKey.generate())
    context = Credentials(keys.parse(old_key), stranger, [keys.parse(key_of(agent))]).seed_context()  # it knows all but the key
    with (
        socket.create_connection((agent.address, agent.port), timeout=10) as connection,
        pytest.raises(OSError),
        context.wrap_socket(connection, server_hostname="seed") as tls,
    ):
        tls.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        if not tls.recv(100):
            raise ConnectionError("the agent closed")


def test_using_a_key_is_refused_while_a_machine_does_not_answer(mesh: Mesh) -> None:
    ada, bob, cyd = mesh.start("ada", "bob", "cyd", options=("--profile", "wan"))  # slow to be held dead
    old_key, new = key_of(ada), installed(ada)
    os.kill(cyd.pid, signal.SIGSTOP)
    try:
        refused = ada.run("key", "use", new)
        assert refused.code == 1
        assert "cyd does not answer" in refused.err and "--without" in refused.err
    finally:
        os.kill(cyd.pid, signal.SIGCONT)
    assert [key_of(agent) for agent in (ada, bob, cyd)] == [old_key] * 3
    mesh.wait_until_whole(ada, bob, cyd)
    ada.ask("key", "use", new)


def test_a_machine_that_was_off_meanwhile_comes_in_by_itself_as_long_as_its_key_is_accepted(mesh: Mesh) -> None:
    ada, bob, cyd = mesh.start("ada", "bob", "cyd", options=FAST)
    cyd.terminate()
    wait_until_dead(cyd, ada)
    new = change_the_key(ada, remove=False)

    cyd.join()
    wait_for(lambda: ids_at(cyd)[0] == new, CATCH_UP, "cyd uses the new key")
    assert key_of(cyd) == key_of(bob)
    mesh.wait_until_whole(ada, bob, cyd)


def test_a_machine_that_was_off_all_the_time_says_so_and_is_given_the_new_key(mesh: Mesh) -> None:
    ada, bob, cyd = mesh.start("ada", "bob", "cyd", options=FAST)
    task = cyd.submit("--queue", "nobody", "--hold", "--", "true")
    name = mesh_id_at(cyd)
    wait_for(lambda: task in tasks_of(ada), CATCH_UP, "the task is everywhere")
    cyd.terminate()
    wait_until_dead(cyd, ada)
    new = change_the_key(ada, remove=True)

    cyd.join()
    wait_for(lambda: "keys" in failed_checks(cyd), CATCH_UP, "cyd knows why it is alone")
    assert "meshq key install --key-file" in failed_checks(cyd)["keys"]
    for file in (cyd.home / "agent.log", cyd.output):
        wait_for(partial(says, file, "changed its key"), CATCH_UP, f"{file.name} says so")
    assert "cyd" not in alive_at(ada)
    cyd.terminate()

    cyd.output.write_text("")
    cyd.spawn(key=key_of(ada))
    assert cyd.wait_until_ended() == 1
    assert "meshq key install --key-file" in cyd.output.read_text()

    assert cyd.ask("key", "install", "--key-file", key_file(mesh.folder, key_of(ada)))["id"] == new
    cyd.ask("key", "use", new)
    cyd.join()
    mesh.wait_until_whole(ada, bob, cyd)
    assert (mesh_id_at(cyd), task in tasks_of(cyd)) == (name, True)
    wait_for(lambda: ids_at(cyd) == [new], CATCH_UP, "cyd has heard that its old key was removed")


def tasks_of(agent: Agent) -> list[Any]:
    return [task["id"] for task in agent.ask("tasks")]


def test_who_is_off_is_named_before_the_old_key_is_removed_and_a_running_agent_takes_the_new_one(mesh: Mesh) -> None:
    ada, bob, cyd, dan = mesh.start("ada", "bob", "cyd", "dan", options=FAST)
    cyd.terminate()
    assert dan.run("leave").code == 0
    wait_until_dead(cyd, ada)
    [old], new = ids_at(ada), change_the_key(ada, remove=False)
    assert f"off, and not known to have {new}: cyd, dan\n" in ada.run("key", "list").out
    assert "locked out now, as far as is known: cyd, dan\n" in bob.run("key", "remove", old).err

    dan.wait_until_ended()
    dan.join()
    dan.ask("key", "install", "--key-file", key_file(mesh.folder, key_of(ada)))
    dan.ask("key", "use", new)
    mesh.wait_until_whole(ada, bob, dan)
    wait_for(lambda: ids_at(dan) == [new], CATCH_UP, "dan has heard that its old key was removed")
    assert f"off, and not known to have {new}: cyd\n" in ada.run("key", "list").out


def test_who_comes_with_a_leaked_key_is_never_handed_the_new_one_and_is_out_in_the_end(mesh: Mesh) -> None:
    ada, bob = mesh.start("ada", "bob", options=FAST)
    leaked, [old] = key_of(ada), ids_at(ada)
    new = installed(ada)
    eve = mesh.add("eve")
    eve.join("--seed", ada.seed, *FAST, key=leaked)
    mesh.wait_until_whole(ada, bob, eve)

    refused = ada.run("key", "use", new)
    assert refused.code == 1
    assert "eve was not there when it was installed" in refused.err
    ada.ask("key", "use", new, "--without", "eve")
    assert ids_at(eve) == [old]
    refused = bob.run("key", "remove", old)
    assert refused.code == 1
    assert "eve uses" in refused.err
    bob.ask("key", "remove", old, "--without", "eve")

    wait_until_dead(eve, ada, bob)
    wait_for(lambda: alive_at(eve) == {"eve"}, CATCH_UP, "eve is alone")
    assert (ids_at(eve), key_of(eve)) == ([old], leaked)
    assert_out(ada, leaked)
    late = mesh.add("late")
    late.spawn("--seed", ada.seed, key=leaked)
    assert late.wait_until_ended() == 1
    assert "changed its key" in late.output.read_text()


def test_a_newcomer_with_a_later_key_learns_what_the_mesh_is_called(mesh: Mesh) -> None:
    ada, bob = mesh.start("ada", "bob", options=FAST)
    name = mesh_id_at(ada)
    change_the_key(ada, remove=True)
    cyd = mesh.add("cyd")
    cyd.join("--seed", bob.seed, *FAST, key=key_of(bob))
    mesh.wait_until_whole(ada, bob, cyd)
    assert mesh_id_at(cyd) == name
    assert name in cyd.output.read_text()
