"""The doctor on machines behind real firewalls: what it says at `join`, and who is told to open which port."""

from typing import Any

import pytest

from tests.processes.mesh import Agent, Mesh, wait_for
from tests.processes.netns import lan

pytestmark = [pytest.mark.xdist_group("processes"), pytest.mark.netns]

PORT = 7733
UDP = ("-p", "udp", "--dport", str(PORT))
MULTICAST = ("-p", "udp", "--dport", "5353")


def check(agent: Agent, name: str) -> Any:
    """One check of `meshq doctor` at this machine."""
    return next(each for each in agent.run("doctor", "--json").json()["checks"] if each["name"] == name)


def transports(agent: Agent) -> dict[str, Any]:
    return {peer["name"]: peer["connectivity"] and peer["connectivity"]["transport"] for peer in agent.ask("peers")}


def test_a_firewall_against_udp_is_found_and_each_side_is_told_where_to_open_the_port(mesh: Mesh) -> None:
    with lan(3) as net:
        ada, bob, cyd = [
            mesh.add(name, address=machine.address, port=PORT, netns=machine.netns)
            for name, machine in zip(("ada", "bob", "cyd"), net.machines, strict=True)
        ]
        net.machines[2].drop("INPUT", *UDP)
        ada.join("--new")
        for agent in (bob, cyd):
            agent.join("--seed", ada.seed, key=mesh.key())
        mesh.wait_until_whole(ada, bob, cyd)

        wait_for(lambda: transports(cyd) == {"ada": "tcp", "bob": "tcp", "cyd": None}, 90, "cyd is served by TCP alone")
        wait_for(lambda: transports(ada) == {"ada": None, "bob": "udp", "cyd": "tcp"}, 90, "ada serves cyd by TCP alone")
        inside, outside = check(cyd, "udp"), check(ada, "udp")
        assert not inside["ok"] and inside["detail"].startswith("no UDP packet ever got here, though TCP does")
        assert "`ufw allow 7733/udp`" in inside["fix"]
        assert not outside["ok"] and outside["detail"].startswith("UDP does not get to cyd and back")
        assert "port 7733 in the firewall there" in outside["fix"]
        assert check(ada, "tcp")["ok"] and check(cyd, "tcp")["ok"]

        shown = ada.run("peers").out
        assert next(line for line in shown.splitlines() if line.startswith("cyd")).split()[2:4] == ["TCP", "only"]
        assert "UDP does not get to cyd and back: `meshq doctor` says what to do" in shown

        net.machines[2].forgive()
        wait_for(lambda: check(cyd, "udp")["ok"] and check(ada, "udp")["ok"], 90, "the doctor sees that the port is open")


@pytest.mark.parametrize("options", [(), ("--detach",)], ids=["foreground", "background"])
def test_join_says_what_the_doctor_found(mesh: Mesh, options: tuple[str, ...]) -> None:
    with lan(1) as net:
        [machine] = net.machines
        machine.drop("INPUT", *MULTICAST)
        ada = mesh.add("ada", address=machine.address, port=PORT, netns=machine.netns)
        ada.spawn("--new", *options, mdns=True)
        wait_for(lambda: "is in mesh" in ada.output.read_text(), 40, "ada has joined")
        said = ada.output.read_text().splitlines()
        assert [line for line in said if line.startswith("warning: discovery: multicast does not work on lan (10.77.0.1)")]
        assert [line for line in said if line.startswith("warning: peers")] == [], "the founder of a mesh is alone"
        assert ada.run("leave").code == 0
