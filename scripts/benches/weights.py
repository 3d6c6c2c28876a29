"""What agents use: memory, CPU, and the traffic of the machines that they have for themselves."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benches.fleets import Runner
from tests.processes.netns import Machine

INTERFACE = "lan"


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Of one agent since its start: seconds of CPU, and bytes and packets of its machine's interface, frames as they are."""

    cpu: float
    cpu_helpers: float
    sent: int
    received: int
    packets: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """Of one agent: MiB of memory; over a while, percent of a core, kB/s and packets/s."""

    memory: float
    memory_helpers: float
    unshared: float  # of the agent and its helpers: what would be free without them
    cpu: float
    cpu_helpers: float
    sent: float
    received: float
    packets: float


def weigh(runners: Sequence[Runner], seconds: float) -> list[Weight]:
    """What each uses over that time. Nobody is asked anything meanwhile."""
    before = [_totals(runner) for runner in runners]
    begun = time.monotonic()
    time.sleep(seconds)
    passed = time.monotonic() - begun
    return [_weight(runner, earlier, passed) for runner, earlier in zip(runners, before, strict=True)]


def _totals(runner: Runner) -> Totals:
    cpu, *helpers = [sum(process.cpu_times()[:2]) for process in runner.family()]
    received, sent, packets = _interface(runner.pid)
    return Totals(cpu=cpu, cpu_helpers=sum(helpers), sent=sent, received=received, packets=packets)


def _weight(runner: Runner, before: Totals, seconds: float) -> Weight:
    after = _totals(runner)
    memory = [process.memory_full_info() for process in runner.family()]
    agent, *helpers = [each.rss / 2**20 for each in memory]
    return Weight(
        memory=agent,
        memory_helpers=sum(helpers),
        unshared=sum(each.uss for each in memory) / 2**20,
        cpu=100 * (after.cpu - before.cpu) / seconds,
        cpu_helpers=100 * (after.cpu_helpers - before.cpu_helpers) / seconds,
        sent=(after.sent - before.sent) / seconds / 1e3,
        received=(after.received - before.received) / seconds / 1e3,
        packets=(after.packets - before.packets) / seconds,
    )


def _interface(pid: int) -> tuple[int, int, int]:
    """Bytes received and sent, and packets of both, by the process's machine."""
    lines = Path(f"/proc/{pid}/net/dev").read_text().splitlines()
    [columns] = [line.split(":")[1].split() for line in lines if line.strip().startswith(f"{INTERFACE}:")]
    return int(columns[0]), int(columns[8]), int(columns[1]) + int(columns[9])


class LossyNetwork:
    """From now on each machine loses this share of what comes in from the LAN, UDP and TCP alike."""

    def __init__(self, runners: Sequence[Runner], share: float) -> None:
        self._machines = [runner.machine for runner in runners]
        for machine in self._machines:
            machine.run("iptables", "-w", "-A", "INPUT", "!", "-i", "lo")  # counts what comes
            machine.lose(share)

    def dropped(self) -> tuple[int, int]:
        """Packets that were dropped, of how many that came."""
        counts = [self._counts(machine) for machine in self._machines]
        return sum(dropped for _, dropped in counts), sum(came for came, _ in counts)

    def mend(self) -> None:
        for machine in self._machines:
            machine.forgive()

    def _counts(self, machine: Machine) -> tuple[int, int]:
        rules = machine.run("iptables", "-w", "-L", "INPUT", "-v", "-x", "-n").splitlines()[2:]
        came, dropped = [int(rule.split()[0]) for rule in rules]
        return came, dropped
