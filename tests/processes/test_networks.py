"""Real agents on the networks that labs have: docker bridges, tunnels, IPv6, no DHCP, two switches, bad cables, firewalls.

Nobody binds to an address here unless the test is about that: what an agent makes of the interfaces that it finds is the point.
"""

import re
import time
from collections.abc import Iterator
from functools import partial

import pytest

from tests.processes.mesh import Agent, Mesh, alive_at, temporary_mesh, wait_for
from tests.processes.netns import Lan, Machine, lan, link_local, listeners, unnumbered, v6

pytestmark = [pytest.mark.xdist_group("processes"), pytest.mark.netns]

PORT = 7733
SPLIT_SECONDS = 60.0


def add(mesh: Mesh, name: str, machine: Machine, *, address: str = "") -> Agent:
    return mesh.add(name, address=address, port=PORT, netns=machine.netns)


def meet_by_mdns(mesh: Mesh, net: Lan, names: str, *options: str) -> list[Agent]:
    """The first makes the mesh, the others find it with nothing but the key."""
    agents = [add(mesh, name, machine) for name, machine in zip(names.split(), net.machines, strict=True)]
    agents[0].join("--new", *options, mdns=True)
    key = mesh.key()
    for agent in agents[1:]:
        agent.spawn(*options, key=key, mdns=True)
    for agent in agents[1:]:
        agent.wait_until_up()
    mesh.wait_until_whole(*agents)
    return agents


def reaches(agent: Agent, expected: dict[str, str]) -> bool:
    """By name, where it reaches each peer."""
    found = {peer["name"]: peer["address"] for peer in agent.ask("peers")}
    return all(found.get(name) == address for name, address in expected.items())


def wait_until_all_reach(agents: list[Agent], expected: dict[str, str], limit: float = 20) -> None:
    for agent in agents:
        wait_for(partial(reaches, agent, expected), limit, f"{agent.name} reaches {expected}")


def wait_until_alive_are(agents: list[Agent], names: set[str], limit: float) -> None:
    for agent in agents:
        wait_for(partial(sees_only, agent, names), limit, f"{agent.name} sees {sorted(names)} alive and nobody else")


def sees_only(agent: Agent, names: set[str]) -> bool:
    return alive_at(agent) == names


def said(agent: Agent, text: str) -> list[str]:
    """The lines of its log with this text; there is no log as long as nothing happened."""
    file = agent.home / "agent.log"
    return [line for line in file.read_text().splitlines() if text in line] if file.exists() else []


def printed(agent: Agent, text: str) -> bool:
    return text in agent.output.read_text()


def deaths_seen(agents: list[Agent]) -> list[str]:
    return [line for agent in agents for line in said(agent, "is dead")]


def test_docker_tunnels_a_renewed_lease_and_a_common_host_name_do_no_harm(mesh: Mesh) -> None:
    with lan(3) as net:
        for number, machine in enumerate(net.machines, 1):
            machine.add_docker_bridge()
            machine.add_docker_bridge("br-0a1b2c3d4e5f", "172.18.0.1/16")
            machine.add_tunnel(f"10.8.0.{number}/24")
        _, bob, _ = agents = meet_by_mdns(mesh, net, "ada bob cyd")
        wait_until_all_reach(agents, {name: f"10.77.0.{number}:{PORT}" for number, name in enumerate(("ada", "bob", "cyd"), 1)})

        net.machines[1].take("10.77.0.2/24")
        net.machines[1].give("10.77.0.102/24")
        wait_until_all_reach(agents, {"bob": f"10.77.0.102:{PORT}"})
        mesh.wait_until_whole(*agents, limit=10)
        assert deaths_seen(agents) == []

        for _ in range(2):
            assert bob.terminate() == 0
            bob.join("--name", "ada", mdns=True)
            wait_until_alive_are(agents, {"ada", "ada-2", "cyd"}, 30)
            wait_until_all_reach(agents, {"ada": f"10.77.0.1:{PORT}", "ada-2": f"10.77.0.102:{PORT}"})
        assert [line for agent in (agents[0], agents[2]) for line in said(agent, "another peer is called")] == []


def test_machines_with_ipv6_alone_meet_by_mdns_and_one_whose_network_comes_late_joins_them(mesh: Mesh) -> None:
    """bob has both families; docker gives everybody an IPv4 address that leads nowhere."""
    with lan(3, v6) as net:
        first, second, third = net.machines
        second.give("10.77.0.2/24")
        third.take("fd77::3/64")
        for machine in net.machines:
            machine.add_docker_bridge()
        agents = [add(mesh, name, machine) for name, machine in zip(("ada", "bob", "cyd"), net.machines, strict=True)]
        agents[0].join("--new", mdns=True)
        for agent in agents[1:]:
            agent.spawn(key=mesh.key(), mdns=True)
        for agent in agents[1:]:
            agent.wait_until_up()
        mesh.wait_until_whole(*agents[:2])
        assert alive_at(agents[2]) == {"cyd"}
        third.give("fd77::3/64")
        mesh.wait_until_whole(*agents, limit=15)
        wait_until_all_reach(agents, {"ada": f"[fd77::1]:{PORT}", "cyd": f"[fd77::3]:{PORT}"})
        wait_until_all_reach([agents[0], agents[2]], {"bob": f"[fd77::2]:{PORT}"})
        assert first.address == "fd77::1"


def test_who_is_alone_says_how_to_join_it_and_switches_that_are_connected_later_are_noticed(mesh: Mesh) -> None:
    """No DHCP server: everybody has an address of 169.254. bob's switch stands alone until he is alone for long, too."""
    with lan(3, link_local) as net:
        net.move(net.machines[1], "upstairs")
        ada, bob, cyd = (add(mesh, name, machine) for name, machine in zip(("ada", "bob", "cyd"), net.machines, strict=True))
        ada.join("--new", mdns=True)
        bob.join(key=mesh.key(), mdns=True)
        command, other = (f"meshq join --key-file KEY --seed 169.254.7.{number}:{PORT}" for number in (1, 2))
        for agent, words in ((ada, command), (bob, other)):
            wait_for(partial(printed, agent, words), 30, f"{agent.name} says {words}")
            wait_for(partial(said, agent, words), 5, f"it is in the log of {agent.name}")
        net.join_bridges("bridge", "upstairs")
        mesh.wait_until_whole(ada, bob, limit=40)

        key_file = mesh.folder / "KEY"
        key_file.write_text(mesh.key())
        [options] = re.findall(r"meshq join --key-file KEY (.*)$", ada.output.read_text(), re.MULTILINE)
        cyd.join("--key-file", str(key_file), *options.split())
        mesh.wait_until_whole(ada, bob, cyd, limit=20)
        assert len(said(ada, command)) == 1, "it is said once"


def test_who_began_a_mesh_of_its_own_beside_another_one_is_told_how_to_move_over(mesh: Mesh) -> None:
    with lan(2) as net:
        net.machines[0].add_docker_bridge()
        ada, bob = (add(mesh, name, machine) for name, machine in zip(("ada", "bob"), net.machines, strict=True))
        ada.join("--new", mdns=True)
        bob.join("--new", mdns=True)
        words = f"A mesh is in sight at 10.77.0.1:{PORT}, but its key is another than this machine's"
        wait_for(partial(printed, bob, words), 40, "bob says so")
        [command] = re.findall(r"meshq leave; meshq join (.*?)\. To add", bob.output.read_text())
        [check] = [each for each in bob.run("doctor", "--json").json()["checks"] if each["name"] == "peers"]
        assert command.replace("KEY", "F") in check["fix"]

        key_file = bob.here / "KEY"
        key_file.write_text(mesh.key())
        key_file.chmod(0o600)
        assert bob.run("leave").code == 0 and bob.wait_until_ended() == 0
        bob.join(*command.replace("KEY", str(key_file)).split(), mdns=True)
        mesh.wait_until_whole(ada, bob)


@pytest.mark.parametrize(("mine", "other"), [("10.77.0.{}", "10.78.0.{}"), ("fd77::{}", "fd78::{}")], ids=["IPv4", "IPv6"])
def test_bind_keeps_an_agent_to_the_network_of_that_address(mesh: Mesh, mine: str, other: str) -> None:
    length = 24 if "." in mine else 64
    with lan(2, lambda number: (f"{mine.format(number)}/{length}",)) as net:
        first, second = net.machines
        net.connect(first, "annex", "other", f"{other.format(1)}/{length}")
        ada = add(mesh, "ada", first, address=mine.format(1))
        bob = add(mesh, "bob", second, address=mine.format(2))
        ada.join("--new", mdns=True)
        bob.join(key=mesh.key(), mdns=True)
        mesh.wait_until_whole(ada, bob)
        assert listeners(first) == {"lan"}
        sockets = first.run("ss", "-Hlntu", f"sport = :{PORT}").split()
        bound = f"[{ada.address}]:{PORT}" if ":" in ada.address else f"{ada.address}:{PORT}"
        assert [word for word in sockets if word.endswith(f":{PORT}")] == [bound] * 2  # UDP and TCP


def test_an_address_that_the_machine_lacks_is_one_clear_error(mesh: Mesh) -> None:
    with lan(1) as net:
        [machine] = net.machines
        for address, message in (
            ("10.99.0.1", "does not have the address 10.99.0.1"),
            ("fd99::1", "does not have the address"),
        ):
            eve = add(mesh, f"eve-{len(address)}", machine, address=address)
            eve.spawn("--new")
            assert eve.wait_until_ended() == 2
            lines = eve.output.read_text().splitlines()
            assert lines == [f"error: --bind: this machine {message}" if "." in address else lines[0], lines[1]]
            assert message in lines[0] and "10.77.0.1" in lines[1]
            assert not eve.home.exists()


def test_a_mesh_forms_and_works_where_udp_is_blocked_and_says_so(mesh: Mesh) -> None:
    with lan(3) as net:
        for machine in net.machines:
            machine.drop("INPUT", "!", "-i", "lo", "-p", "udp")
        ada, bob, cyd = agents = [add(mesh, name, each) for name, each in zip(("ada", "bob", "cyd"), net.machines, strict=True)]
        ada.join("--new", "--slots", "0")
        seed = f"10.77.0.1:{PORT}"
        for agent in (bob, cyd):
            agent.spawn("--seed", seed, key=mesh.key())
        for agent in (bob, cyd):
            agent.wait_until_up()
        mesh.wait_until_whole(*agents)
        wait_for(lambda: all(peer["queues"] for peer in ada.ask("peers")), 30, "telemetry gets through")
        task = ada.submit("--", "true")
        assert ada.wait_until(task, "succeeded", "failed")["status"] == "succeeded"
        for agent in agents:
            wait_for(partial(finds_udp_blocked, agent), 30, f"the doctor of {agent.name} finds it")
        assert any("WARNING" in line for agent in agents for line in said(agent, "TCP only"))
        time.sleep(8)  # longer than a suspicion lasts: nothing may come of it
        mesh.wait_until_whole(*agents, limit=1)
        assert deaths_seen(agents) == []


def finds_udp_blocked(agent: Agent) -> bool:
    checks = agent.run("doctor", "--json").json()["checks"]
    return any(check["name"] == "udp" and not check["ok"] for check in checks)


def test_where_tcp_is_blocked_and_udp_is_not_a_submit_names_the_machine_and_so_do_peers_and_doctor(mesh: Mesh) -> None:
    with lan(3) as net:
        ada, bob, cyd = agents = [add(mesh, name, each) for name, each in zip(("ada", "bob", "cyd"), net.machines, strict=True)]
        ada.join("--new")
        for agent in (bob, cyd):
            agent.join("--seed", f"10.77.0.1:{PORT}", key=mesh.key())
        mesh.wait_until_whole(*agents)
        wait_for(partial(says_of_tcp, ada, {"bob": True, "cyd": True}), 30, "ada has reached both by TCP")
        net.machines[2].drop("INPUT", "!", "-i", "lo", "-p", "tcp")
        done = ada.run("submit", "--json", "--", "true")
        assert (done.code, done.json()["stored_on"]) == (0, ["ada", "bob"])
        assert [each["name"] for each in done.json()["not_stored_on"]] == ["cyd"]
        assert "note: cyd is alive but did not take a copy: no answer" in done.err
        wait_for(partial(says_of_tcp, ada, {"bob": True, "cyd": False}), 15, "ada knows that TCP does not get to cyd")
        [check] = [each for each in ada.run("doctor", "--json").json()["checks"] if each["name"] == "tcp"]
        assert not check["ok"] and check["detail"].startswith("TCP does not get to cyd, though UDP does")
        assert "UDP only" in ada.run("peers").out
        assert net.machines[2].forgive() > 5, "the fault happened"
        wait_for(partial(says_of_tcp, ada, {"bob": True, "cyd": True}), 60, "it works again")
        wait_for(partial(everybody_takes_a_copy, ada), 20, "all take copies again")
        assert deaths_seen(agents) == []


def everybody_takes_a_copy(agent: Agent) -> bool:
    document = agent.run("submit", "--json", "--", "true").json()
    return document["not_stored_on"] == [] and set(document["stored_on"]) == {"ada", "bob", "cyd"}


def says_of_tcp(agent: Agent, expected: dict[str, bool]) -> bool:
    links = {peer["name"]: peer["connectivity"] for peer in agent.ask("peers")}
    return all(links[name]["tcp"] is works and links[name]["udp"] for name, works in expected.items())


def test_two_machines_that_only_a_third_one_reaches_see_each_other_alive_and_share_the_queue(mesh: Mesh) -> None:
    """ada and cyd are on different switches, bob is on both, and nobody routes."""
    with lan(3, unnumbered) as net:
        first, second, third = net.machines
        first.give("10.77.0.1/24")
        second.give("10.77.0.2/24")
        net.move(third, "upstairs")
        third.give("10.78.0.3/24")
        net.connect(second, "upstairs", "other", "10.78.0.2/24")
        ada, _, cyd = agents = meet_by_mdns(mesh, net, "ada bob cyd")
        tasks = [ada.submit("--", "true"), cyd.submit("--", "true")]
        for task in tasks:
            for agent in agents:
                wait_for(partial(finished, agent, task), 60, f"{task} has succeeded, says {agent.name}")
        mesh.wait_until_whole(*agents, limit=1)
        assert deaths_seen(agents) == []


def knows(agent: Agent, task: str) -> bool:
    return agent.run("show", task).code == 0


def finished(agent: Agent, task: str) -> bool:
    done = agent.run("show", task, "--json")
    return done.code == 0 and done.json()["status"] == "succeeded"


# --- five machines ---------------------------------------------------------------------------------------------------------


def test_loss_and_a_link_that_works_one_way_kill_nobody(five: tuple[Mesh, Lan, list[Agent]]) -> None:
    mesh, net, agents = five
    for machine in net.machines:
        machine.lose(0.25)
    time.sleep(10)
    assert all(machine.forgive() > 10 for machine in net.machines), "the faults happened"
    net.machines[1].drop("INPUT", "-s", net.machines[0].address)
    time.sleep(12)
    assert net.machines[1].forgive() > 10, "the fault happened"
    assert deaths_seen(agents) == []
    mesh.wait_until_whole(*agents, limit=20)


def test_a_cable_that_flaps_ends_in_one_view(five: tuple[Mesh, Lan, list[Agent]]) -> None:
    mesh, net, agents = five
    for down, up in ((0.5, 1.0), (2.0, 0.5), (1.0, 2.0), (7.0, 0.2), (0.2, 0.2)):
        net.unplug(net.machines[4])
        time.sleep(down)
        net.plug_in(net.machines[4])
        time.sleep(up)
    mesh.wait_until_whole(*agents, limit=30)


def test_a_mesh_that_was_split_for_a_minute_heals_to_equal_views(five: tuple[Mesh, Lan, list[Agent]]) -> None:
    mesh, net, agents = five
    net.part(net.machines[:3], net.machines[3:])
    split_at = time.monotonic()
    wait_until_alive_are(agents[:3], {"ada", "bob", "cyd"}, 40)
    wait_until_alive_are(agents[3:], {"dan", "eve"}, 40)
    tasks = [agent.submit("--label", "who=nobody", "--hold", "--", "true") for agent in (agents[0], agents[4])]
    time.sleep(max(0.0, split_at + SPLIT_SECONDS - time.monotonic()))
    assert all(machine.forgive() > 10 for machine in net.machines), "the faults happened"
    mesh.wait_until_whole(*agents, limit=60)
    views = [sorted((peer["name"], peer["liveness"], peer["address"]) for peer in agent.ask("peers")) for agent in agents]
    assert all(view == views[0] for view in views)
    for task in tasks:
        for agent in agents:
            wait_for(partial(knows, agent, task), 30, f"{agent.name} knows {task}")


@pytest.fixture(scope="module")
def five() -> Iterator[tuple[Mesh, Lan, list[Agent]]]:
    """Five machines that met by mDNS, for tests that leave them whole."""
    with temporary_mesh() as mesh, lan(5) as net:
        yield mesh, net, meet_by_mdns(mesh, net, "ada bob cyd dan eve")
