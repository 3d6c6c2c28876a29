"""The UDP socket in networks of all kinds: one namespace with nothing but its loopback interface, and what a lab does to it."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

pytestmark = [pytest.mark.netns, pytest.mark.slow]

_numbers = itertools.count()


@pytest.fixture
def network() -> Iterator["Network"]:
    made = Network(f"meshq-lone-{os.getpid()}-{next(_numbers)}")
    try:
        yield made
    finally:
        made.delete()


class Network:
    def __init__(self, name: str) -> None:
        self.name = name
        self._call("ip", "netns", "add", name)
        self.run("ip", "link", "set", "lo", "up")

    def delete(self) -> None:
        subprocess.run(["ip", "netns", "delete", self.name], check=False)

    def run(self, *command: str) -> str:
        return self._call("ip", "netns", "exec", self.name, *command)

    def shell(self, bind: str, *targets: str) -> dict[str, int]:
        """The counters of a shell that sent one packet of full size to each target."""
        stats: dict[str, int] = json.loads(self.run(sys.executable, "-m", "tests.gossip.lone_shell", bind, *targets))
        return stats

    @staticmethod
    def _call(*command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout


def test_both_families_with_one_socket(network: Network) -> None:
    stats = network.shell("", "127.0.0.1", "::1")
    assert (stats["sent"], stats["received"], stats["send_failed"]) == (2, 2, 0)


def test_no_ipv6_because_an_administrator_turned_it_off(network: Network) -> None:
    network.run("sysctl", "-q", "net.ipv6.conf.all.disable_ipv6=1", "net.ipv6.conf.lo.disable_ipv6=1")
    stats = network.shell("", "127.0.0.1", "::1")
    assert (stats["sent"], stats["received"], stats["send_failed"]) == (1, 1, 1)
    assert sum(stats[name] for name in stats if name.startswith("send_failed ")) == 1


def test_no_ipv4_at_all(network: Network) -> None:
    network.run("ip", "-4", "address", "flush", "dev", "lo")
    stats = network.shell("", "::1")
    assert (stats["sent"], stats["received"]) == (1, 1)


@pytest.mark.parametrize(("bind", "other"), [("127.0.0.1", "::1"), ("::1", "127.0.0.1")])
def test_bound_to_one_address_it_does_not_reach_the_other_family_and_says_so(network: Network, bind: str, other: str) -> None:
    stats = network.shell(bind, bind, other)
    assert (stats["sent"], stats["received"], stats["send_failed"]) == (1, 1, 1)


@pytest.mark.parametrize("bind", ["", "127.0.0.1"])
def test_a_packet_that_does_not_fit_is_never_cut_to_pieces(network: Network, bind: str) -> None:
    network.run("ip", "link", "set", "lo", "mtu", "1000")
    stats = network.shell(bind, "127.0.0.1")
    assert (stats["sent"], stats["received"], stats["send_failed EMSGSIZE"]) == (0, 0, 1)


def test_a_packet_of_full_size_fits_the_smallest_network_that_ipv6_permits(network: Network) -> None:
    network.run("ip", "link", "set", "lo", "mtu", "1280")
    stats = network.shell("", "127.0.0.1", "::1")
    assert (stats["sent"], stats["received"]) == (2, 2)


def test_each_kind_of_refusal_has_its_counter(network: Network) -> None:
    network.run("iptables", "-A", "OUTPUT", "-p", "udp", "-d", "127.0.0.9", "-j", "DROP")
    stats = network.shell("", "192.0.2.1", "127.0.0.9", "127.0.0.1")
    assert (stats["send_failed"], stats["send_failed ENETUNREACH"], stats["send_failed EPERM"], stats["sent"]) == (2, 1, 1, 1)
