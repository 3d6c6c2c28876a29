"""The kernel's own words: on this machine, and in namespaces where interfaces and addresses are made to come and go."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from meshq.gossip import netlink
from meshq.gossip.netlink import Changes
from tests.processes.netns import Machine, lan

ROOT = Path(__file__).parent.parent.parent

WATCHER = """
import asyncio, json
from meshq.gossip.netlink import Changes

async def watch():
    changes = Changes()
    print("ready", flush=True)
    while True:
        gone = await changes.wait(60.0)
        print(json.dumps(None if gone is None else sorted(gone)), flush=True)

asyncio.run(watch())
"""

LISTER = """
import json
from meshq.gossip.addresses import interfaces
print(json.dumps([[each.name, each.reach.name, each.carrier, each.multicast, list(each.hosts)] for each in interfaces()]))
"""


def test_the_kernel_and_psutil_name_the_same_interfaces_and_addresses() -> None:
    found = {link.name: {address.host for address in link.addresses} for link in netlink.links()}
    other = {
        name: {entry.address.partition("%")[0] for entry in entries if entry.family in (2, 10)}
        for name, entries in psutil.net_if_addrs().items()
    }
    assert {name: hosts for name, hosts in found.items() if hosts} == {name: hosts for name, hosts in other.items() if hosts}
    assert [link.name for link in netlink.links() if link.loopback] == ["lo"]


def test_where_nothing_changes_the_wait_ends_with_its_time() -> None:
    async def story() -> frozenset[str] | None:
        changes = Changes()
        try:
            return await changes.wait(0.01)
        finally:
            changes.close()

    assert asyncio.run(story()) is None


def test_where_the_kernel_does_not_tell_changes_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise PermissionError("not in this sandbox")

    monkeypatch.setattr(netlink, "_subscribe", refuse)
    monkeypatch.setattr(netlink, "POLL_SECONDS", 0.01)
    assert asyncio.run(Changes().wait(1_000.0)) is None


@contextmanager
def watched(machine: Machine) -> Iterator[Iterator[list[str]]]:
    """What `Changes` says on that machine, from now on."""
    command = ["ip", "netns", "exec", machine.netns, sys.executable, "-c", WATCHER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as watcher:
        assert watcher.stdout is not None
        assert watcher.stdout.readline() == "ready\n"
        try:
            yield map(json.loads, watcher.stdout)
        finally:
            watcher.kill()


@pytest.mark.netns
def test_addresses_and_cables_that_come_and_go_are_told_by_the_kernel() -> None:
    with lan(1) as net:
        [machine] = net.machines
        machine.run("sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/lan/disable_ipv6")  # its own addresses come at their own time
        with watched(machine) as told:
            machine.take("10.77.0.1/24")
            assert next(told) == ["10.77.0.1"]
            machine.give("10.77.0.9/24")
            assert next(told) == []
            machine.take("10.77.0.9/24")
            machine.give("10.77.0.9/24")
            told_of = [
                next(told)
            ]  # gone and back, and no group knows it any more: two changes in one, unless this machine is slow
            assert "10.77.0.9" in told_of[0]
            net.unplug(machine)
            assert next(told) == []
            machine.run("sh", "-c", "echo 0 > /proc/sys/net/ipv6/conf/lan/disable_ipv6")
            machine.give("fd77::9/64")
            assert next(told) == []


@pytest.mark.netns
def test_what_the_kernel_says_of_bridges_tunnels_and_cables_is_understood() -> None:
    with lan(1) as net:
        [machine] = net.machines
        machine.give("fd77::1/64")
        machine.add_docker_bridge()
        machine.add_tunnel("10.8.0.1/24")
        machine.run("ip", "address", "add", "10.9.0.1", "peer", "10.9.0.2/32", "dev", "tun0")
        machine.run("ip", "link", "add", "virbr0", "type", "bridge")
        machine.run("ip", "link", "set", "virbr0", "up")
        machine.give("192.168.122.1/24", "virbr0")
        net.connect(machine, "annex", "other", "10.78.0.1/24")
        net.unplug(machine)
        listed = json.loads(machine.run(sys.executable, "-c", LISTER))
    found = {name: (reach, carrier, multicast, [host for host in hosts]) for name, reach, carrier, multicast, hosts in listed}
    assert found.pop("lo")[3] == ["127.0.0.1", "::1"]
    assert found.pop("virbr0", None) in (None, ("INNER", True, True, ["192.168.122.1"])), (
        "some kernels give it a carrier at first"
    )
    assert found == {
        "docker0": ("INNER", True, True, ["172.17.0.1"]),
        "tun0": ("TUNNEL", True, True, ["10.8.0.1", "10.9.0.1"]),
        "lan": ("NETWORK", False, True, ["10.77.0.1", "fd77::1"]),
        "other": ("NETWORK", True, True, ["10.78.0.1"]),
    }
