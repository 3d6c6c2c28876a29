"""Agents of one gossip system, one on each machine of a LAN of network namespaces: started, lost and started again.

Everything is done to meshq and to serf in the same way: the first agent is the seed of all others; never more agents start
at once than the machine has cores; what an agent believes is read from its log. A system brings only how its agent is
started, how its log talks, and how it is asked.
"""

import base64
import json
import os
import re
import secrets
import subprocess
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import psutil

from benches.views import Views, Words
from meshq.client import Client
from meshq.config import Home
from meshq.trust import keys
from tests.processes.mesh import Agent, end_processes_of
from tests.processes.netns import Lan, Machine

PORT = 7733
STARTS_AT_ONCE = os.cpu_count() or 1
START_LIMIT = 60.0  # for one agent, on a machine that starts others, too
VIEW_LIMIT = 120.0
VERDICT_LIMIT = 120.0


class Runner(ABC):
    """An agent on a machine: what is done to it is the same for every system."""

    words: ClassVar[Words]
    logs: tuple[Path, ...]

    def __init__(self, name: str, machine: Machine) -> None:
        self.name = name
        self.machine = machine

    @staticmethod
    @abstractmethod
    def new_secret() -> str:
        """The key of a new mesh."""

    @property
    @abstractmethod
    def pid(self) -> int: ...

    @abstractmethod
    def spawn(self) -> None: ...

    @abstractmethod
    def alive(self) -> bool: ...

    @abstractmethod
    def reap(self) -> None:
        """It was killed: leave neither a zombie nor anything that it started."""

    @abstractmethod
    def sees(self) -> set[str]:
        """Whom it holds alive, itself included, when it is asked as a person would ask it."""

    def family(self) -> list[psutil.Process]:
        """The agent, which must run, and its helper processes."""
        agent = psutil.Process(self.pid)
        return [agent, *agent.children(recursive=True)]

    def kill(self) -> None:
        """SIGKILL the agent and all its helpers."""
        for process in self.family():
            with suppress(psutil.NoSuchProcess):
                process.kill()


class MeshqRunner(Runner):
    """`meshq join` by seed and key, without mDNS."""

    words: ClassVar[Words] = {
        "ready": re.compile(r" is in mesh "),
        "alive": re.compile(r" (?P<whom>\S+) \(\w{8}\) is alive"),
        "suspect": re.compile(r" (?P<whom>\S+) \(\w{8}\) is suspect"),
        "dead": re.compile(r" (?P<whom>\S+) \(\w{8}\) is dead"),
        "left": re.compile(r" (?P<whom>\S+) \(\w{8}\) is left"),
        "unanswered": re.compile(r" (?P<whom>\S+) does not answer probes"),
        "refuted": re.compile(r"this peer was held \w+; refuted"),
        "tcp_only": re.compile(r" (?P<whom>\S+) is reached over TCP only"),
    }

    def __init__(self, folder: Path, name: str, machine: Machine, seed: str, secret: str) -> None:
        super().__init__(name, machine)
        self._agent = Agent(folder, name, address=machine.address, port=PORT, netns=machine.netns)
        self._options = ("--seed", f"{seed}:{PORT}") if seed else ()
        self._secret = secret
        self.logs = (self._agent.output, Home(self._agent.home).log)

    @staticmethod
    def new_secret() -> str:
        return keys.generate().text

    @property
    def pid(self) -> int:
        return self._agent.pid

    def spawn(self) -> None:
        self._agent.spawn(*self._options, key=self._secret)

    def alive(self) -> bool:
        return self._agent.alive()

    def reap(self) -> None:
        self._agent.kill()
        end_processes_of(self._agent.home)

    def sees(self) -> set[str]:
        with Client(Home(self._agent.home)) as client:
            return {peer["name"] for peer in client.peers() if peer["liveness"] == "alive"}


class SerfRunner(Runner):
    """`serf agent` with profile lan and an encrypted wire, as meshq's is."""

    words: ClassVar[Words] = {
        "ready": re.compile(r"Serf agent running!"),
        "alive": re.compile(r"serf: EventMember(Join|Update): (?P<whom>\S+)"),
        "dead": re.compile(r"serf: EventMemberFailed: (?P<whom>\S+)"),
        "left": re.compile(r"serf: EventMember(Leave|Reap): (?P<whom>\S+)"),
        "unanswered": re.compile(r"memberlist: Suspect (?P<whom>\S+) has failed, no acks received"),
        "refuted": re.compile(r"memberlist: Refuting a \w+ message"),
    }

    def __init__(self, folder: Path, name: str, machine: Machine, seed: str, secret: str) -> None:
        super().__init__(name, machine)
        self._folder = folder / name
        self._folder.mkdir()
        self._process: subprocess.Popen[bytes] | None = None
        self._config = self._folder / "serf.json"  # so the key does not stand in the arguments
        settings = {
            "node_name": name, "bind": f"{machine.address}:{PORT}", "rpc_addr": "127.0.0.1:7373", "profile": "lan",
            "encrypt_key": secret, "start_join": [f"{seed}:{PORT}"] if seed else [],
        }  # fmt: skip
        self._config.write_text(json.dumps(settings))
        self.logs = (folder / f"{name}.output",)

    @staticmethod
    def new_secret() -> str:
        """What `serf keygen` prints."""
        return base64.b64encode(secrets.token_bytes(32)).decode()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def spawn(self) -> None:
        with self.logs[0].open("ab") as output:
            self._process = subprocess.Popen(
                self._command("agent", f"-config-file={self._config}"),
                cwd=self._folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip

    def _command(self, *args: str) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.machine.netns, "serf", *args)

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def reap(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def sees(self) -> set[str]:
        command = self._command("members", "-rpc-addr=127.0.0.1:7373", "-format=json")
        done = subprocess.run(command, capture_output=True, check=True, timeout=START_LIMIT)
        return {member["name"] for member in json.loads(done.stdout)["members"] if member["status"] == "alive"}


SYSTEMS: dict[str, type[MeshqRunner] | type[SerfRunner]] = {"meshq": MeshqRunner, "serf": SerfRunner}


@dataclass(frozen=True, slots=True, kw_only=True)
class ColdStart:
    """Seconds until everybody held everybody alive, since the first and since the last process was started."""

    from_first: float
    from_last: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """Seconds from its loss until the first and all of the others held it dead; from its restart until all held it alive."""

    first: float
    all: float
    back: float


class Fleet:
    """One agent of a system on each machine."""

    def __init__(self, system: str, net: Lan, folder: Path) -> None:
        self._net = net
        runner = SYSTEMS[system]
        secret = runner.new_secret()
        seed = net.machines[0].address
        self.runners: list[Runner] = [
            runner(folder, f"peer{number:02}", machine, seed if number > 1 else "", secret)
            for number, machine in enumerate(net.machines, 1)
        ]
        self.views = Views(runner.words)
        self._started: list[Runner] = []

    def start(self) -> ColdStart:
        """The seed first; then the others, as many at once as there are cores, the next when one is ready."""
        begun = last = time.monotonic()
        for runner in self.runners:
            self._wait_until_few_start(STARTS_AT_ONCE if len(self._started) > 1 else 1)
            last = time.monotonic()
            self.views.follow(runner.name, *runner.logs)
            runner.spawn()
            self._started.append(runner)
        full = self._full_at()
        return ColdStart(from_first=full - begun, from_last=full - last)

    def _wait_until_few_start(self, at_once: int) -> None:
        def few() -> bool:
            for runner in self._started:
                assert runner.alive(), f"{runner.name} ended by itself:\n{runner.logs[0].read_text()[-2_000:]}"
            return len(self._started) - len(self.views.ready) < at_once

        self.views.wait(few, START_LIMIT, lambda: "an agent gets ready")

    def wait_until_full(self) -> float:
        """For everybody to hold everybody alive; how long that took."""
        begun = time.monotonic()
        return self._full_at() - begun

    def _full_at(self) -> float:
        return self.views.wait(self.views.is_full, VIEW_LIMIT, self.views.gaps)

    def lose_and_restart(self, lost: Runner, *, machine: bool) -> Loss:
        """By SIGKILL, whereupon its machine refuses connections; with `machine` its cable is pulled first: nothing answers."""
        others = len(self.runners) - 1
        begun = time.monotonic()
        if machine:
            self._net.unplug(lost.machine)
        lost.kill()
        first = self._wait_until_dead(lost, 1)
        last = self._wait_until_dead(lost, others)
        lost.reap()
        if machine:
            self._net.plug_in(lost.machine)
        self.views.forget(lost.name)
        again = time.monotonic()
        lost.spawn()
        back = self._full_at()
        return Loss(first=first - begun, all=last - begun, back=back - again)

    def _wait_until_dead(self, lost: Runner, holders: int) -> float:
        def held() -> bool:
            return self.views.holding(lost.name, "dead") >= holders

        return self.views.wait(
            held, VERDICT_LIMIT, lambda: f"{self.views.holding(lost.name, 'dead')} of {holders} hold {lost.name} dead"
        )

    def check_views(self) -> None:
        """What the logs told is what the agents say when they are asked. They have work with it: not while they are weighed.

        A belief may change between the two looks, a suspicion above all: asked again, they must say the same.
        """
        for runner in self.runners:
            agrees = partial(self._agrees, runner)
            self.views.wait(agrees, VIEW_LIMIT, lambda: "an agent says of others what its log does not tell")

    def _agrees(self, runner: Runner) -> bool:
        return runner.sees() == self.views.seen_by(runner.name)

    def stop(self) -> None:
        for runner in self._started:
            if runner.alive():  # a pid that was waited for may be somebody else's by now
                runner.kill()
        for runner in self._started:
            runner.reap()
