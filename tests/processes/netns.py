"""Machines on one LAN, or on several, as network namespaces on bridges.

The bridges live in a namespace of their own, so nothing of the machine's own network is touched; deleting the namespaces
takes every interface with it. There is no way out: what a task installs must be in the package cache before.
"""

import ipaddress
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count

_numbers = count(1)

Numbering = Callable[[int], tuple[str, ...]]
"""The addresses of the n-th machine, with their prefix lengths."""


def v4(number: int) -> tuple[str, ...]:
    return (f"10.77.0.{number}/24",)


def v6(number: int) -> tuple[str, ...]:
    return (f"fd77::{number}/64",)


def link_local(number: int) -> tuple[str, ...]:
    """What a machine gives itself where no DHCP server answers (RFC 3927)."""
    return (f"169.254.7.{number}/16",)


def unnumbered(_: int) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True)
class Machine:
    """A namespace with an interface `lan`."""

    netns: str
    address: str  # the first one that it has there; empty if it has none
    switch: str  # the namespace of the bridges
    port: str  # its end of the cable

    def run(self, *command: str) -> str:
        """What a command prints that is run on this machine; it must succeed."""
        return _run("ip", "netns", "exec", self.netns, *command)

    def give(self, address: str, interface: str = "lan") -> None:
        """One more address, as `ADDRESS/PREFIX`. IPv6 without the second in which it looks for a duplicate."""
        _run("ip", "-n", self.netns, "address", "add", address, "dev", interface, *(("nodad",) if ":" in address else ()))

    def take(self, address: str, interface: str = "lan") -> None:
        _run("ip", "-n", self.netns, "address", "delete", address, "dev", interface)

    def add_docker_bridge(self, name: str = "docker0", address: str = "172.17.0.1/16") -> None:
        """As docker makes it, with a container on it: the same address on every machine."""
        container = f"veth{next(_numbers)}"
        self._ip("link", "add", name, "type", "bridge")
        self._ip("link", "add", container, "type", "veth", "peer", "name", f"{container}-in")
        self._ip("link", "set", container, "master", name)
        for interface in (name, container, f"{container}-in"):
            self._ip("link", "set", interface, "up")
        self.give(address, name)

    def add_tunnel(self, address: str, name: str = "tun0") -> None:
        """A VPN that is up and swallows what is sent into it, as one does whose server does not answer. It lasts as long as the
        namespace: the process that holds it ends with its interface."""
        self._ip("tuntap", "add", "dev", name, "mode", "tun")
        holder = subprocess.Popen(
            ["ip", "netns", "exec", self.netns, sys.executable, "-c", _HOLD_TUNNEL, name],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"open\n", f"no tunnel in {self.netns}"
        holder.stdout.close()
        _holders.setdefault(self.netns, []).append(holder)
        self._ip("link", "set", name, "up")
        self.give(address, name)

    def drop(self, chain: str, *match: str) -> None:
        """Lose the packets that match, of both families unless an address says which: `drop("INPUT", "-p", "udp")`."""
        versions = {version for word in match if (version := _ip_version(word))} or {4, 6}
        for version in sorted(versions):
            self.run({4: "iptables", 6: "ip6tables"}[version], "-w", "-A", chain, *match, "-j", "DROP")

    def lose(self, share: float) -> None:
        """Lose this share of all packets that come in."""
        self.drop("INPUT", "!", "-i", "lo", "-m", "statistic", "--mode", "random", "--probability", f"{share:.2f}")

    def forgive(self) -> int:
        """Lose nothing any more; how many packets were lost."""
        lost = 0
        for command in ("iptables", "ip6tables"):
            rules = self.run(command, "-w", "-nvxL").splitlines()
            lost += sum(int(words[0]) for line in rules if (words := line.split())[2:3] == ["DROP"])
            self.run(command, "-w", "-F")
        return lost

    def _ip(self, *args: str) -> None:
        _run("ip", "-n", self.netns, *args)


@dataclass(frozen=True)
class Lan:
    machines: tuple[Machine, ...]
    switch: str = ""
    _cables: Iterator[int] = field(default_factory=lambda: count(1))

    def unplug(self, machine: Machine) -> None:
        _run("ip", "-n", machine.switch, "link", "set", machine.port, "down")

    def plug_in(self, machine: Machine) -> None:
        _run("ip", "-n", machine.switch, "link", "set", machine.port, "up")

    def connect(self, machine: Machine, bridge: str, interface: str, *addresses: str) -> None:
        """A second cable of the machine, to another bridge, which is made if it is new."""
        port = f"more{next(self._cables)}"
        self.add_bridge(bridge)
        _add_cable(machine.netns, interface, self.switch, port, bridge)
        for address in addresses:
            machine.give(address, interface)

    def move(self, machine: Machine, bridge: str) -> None:
        """Plug the machine's cable into another bridge."""
        self.add_bridge(bridge)
        _run("ip", "-n", self.switch, "link", "set", machine.port, "master", bridge)

    def join_bridges(self, one: str, other: str) -> None:
        """A cable between two switches: neither's machines notice anything at their own ends."""
        name = f"up{next(self._cables)}"
        _run("ip", "-n", self.switch, "link", "add", name, "type", "veth", "peer", "name", f"{name}x")
        for port, bridge in ((name, one), (f"{name}x", other)):
            _run("ip", "-n", self.switch, "link", "set", port, "master", bridge, "up")

    def add_bridge(self, name: str) -> None:
        made = subprocess.run(["ip", "-n", self.switch, "link", "show", name], capture_output=True, check=False).returncode == 0
        if not made:
            _run("ip", "-n", self.switch, "link", "add", name, "type", "bridge")
            _run("ip", "-n", self.switch, "link", "set", name, "up")

    def part(self, one: tuple[Machine, ...], other: tuple[Machine, ...]) -> None:
        """Nothing gets from these machines to those, or back, until all of them `forgive`."""
        for machine in one:
            for far in other:
                machine.drop("INPUT", "-s", far.address)
                far.drop("INPUT", "-s", machine.address)


def _ip_version(word: str) -> int:
    try:
        return ipaddress.ip_interface(word).version
    except ValueError:
        return 0


_HOLD_TUNNEL = """
import fcntl, os, struct, sys
tunnel = os.open("/dev/net/tun", os.O_RDWR)
fcntl.ioctl(tunnel, 0x400454CA, struct.pack("16sH", sys.argv[1].encode(), 0x1001))
print("open", flush=True)
try:
    while os.read(tunnel, 65536):
        pass
except OSError:
    pass
"""
_holders: dict[str, list["subprocess.Popen[bytes]"]] = {}


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}"
    return done.stdout


@contextmanager
def lan(machines: int, numbering: Numbering = v4) -> Iterator[Lan]:
    """A bridge named `bridge` with so many machines, 10.77.0.1 and on unless `numbering` says otherwise, multicast included."""
    prefix = f"meshq-{os.getpid()}-{next(_numbers)}"
    switch = f"{prefix}-switch"
    made: list[str] = []
    try:
        _add_namespace(switch, made)
        net = Lan((), switch)
        net.add_bridge("bridge")
        numbers = range(1, machines + 1)
        yield Lan(tuple(_add_machine(switch, f"{prefix}-{number}", number, numbering, made) for number in numbers), switch)
    finally:
        for name in reversed(made):
            for holder in _holders.pop(name, []):
                holder.kill()
                holder.wait()
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _add_namespace(name: str, made: list[str]) -> None:
    made.append(name)  # first: an interrupt in between must not leave it behind
    _run("ip", "netns", "add", name)
    _run("ip", "-n", name, "link", "set", "lo", "up")


def _add_machine(switch: str, name: str, number: int, numbering: Numbering, made: list[str]) -> Machine:
    port = f"port{number}"
    addresses = numbering(number)
    _add_namespace(name, made)
    _add_cable(name, "lan", switch, port, "bridge")
    machine = Machine(name, addresses[0].split("/")[0] if addresses else "", switch, port)
    for address in addresses:
        machine.give(address)
    return machine


def _add_cable(netns: str, interface: str, switch: str, port: str, bridge: str) -> None:
    _run("ip", "link", "add", interface, "netns", netns, "type", "veth", "peer", "name", port, "netns", switch)
    _run("ip", "-n", switch, "link", "set", port, "master", bridge, "up")
    _run("ip", "-n", netns, "link", "set", interface, "up")


def listeners(machine: Machine) -> set[str]:
    """The interfaces on which somebody on this machine hears mDNS, by either family."""
    found = set()
    for line in machine.run("cat", "/proc/net/igmp6").splitlines():
        _, interface, group, *_ = line.split()
        if group == "ff0200000000000000000000000000fb":
            found.add(interface)
    interface = ""
    for line in machine.run("cat", "/proc/net/igmp").splitlines()[1:]:
        words = line.split()
        if words[0].isdigit():
            interface = words[1]
        elif words[0] == "FB0000E0":
            found.add(interface)
    return found
