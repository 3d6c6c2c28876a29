"""Machines on one LAN, as network namespaces on a bridge.

The bridge lives in a namespace of its own, so nothing of the machine's own network is touched; deleting the namespaces
takes every interface with it. There is no way out: what a task installs must be in the package cache before.
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

_numbers = count(1)


@dataclass(frozen=True)
class Machine:
    """A namespace with one interface on the LAN."""

    netns: str
    address: str
    switch: str  # the namespace of the bridge
    port: str  # its end of the cable


@dataclass(frozen=True)
class Lan:
    machines: tuple[Machine, ...]

    def unplug(self, machine: Machine) -> None:
        _ip("-n", machine.switch, "link", "set", machine.port, "down")

    def plug_in(self, machine: Machine) -> None:
        _ip("-n", machine.switch, "link", "set", machine.port, "up")


def _ip(*args: str) -> None:
    done = subprocess.run(["ip", *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(args)}: {done.stderr.strip()}"


@contextmanager
def lan(machines: int) -> Iterator[Lan]:
    """A bridge with so many machines, 10.77.0.1 and on, multicast included."""
    prefix = f"meshq-{os.getpid()}-{next(_numbers)}"
    switch = f"{prefix}-switch"
    made: list[str] = []
    try:
        _add_namespace(switch, made)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        yield Lan(tuple(_add_machine(switch, f"{prefix}-{number}", number, made) for number in range(1, machines + 1)))
    finally:
        for name in reversed(made):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _add_namespace(name: str, made: list[str]) -> None:
    _ip("netns", "add", name)
    made.append(name)
    _ip("-n", name, "link", "set", "lo", "up")


def _add_machine(switch: str, name: str, number: int, made: list[str]) -> Machine:
    address = f"10.77.0.{number}"
    port = f"port{number}"
    _add_namespace(name, made)
    _ip("link", "add", "lan", "netns", name, "type", "veth", "peer", "name", port, "netns", switch)
    _ip("-n", switch, "link", "set", port, "master", "bridge", "up")
    _ip("-n", name, "address", "add", f"{address}/24", "dev", "lan")
    _ip("-n", name, "link", "set", "lan", "up")
    _ip("-n", name, "route", "add", "224.0.0.0/4", "dev", "lan")
    return Machine(name, address, switch, port)
