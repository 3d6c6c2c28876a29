"""Real agents as real processes: what the tests of whole meshes, and the benches, are written with.

Nothing here knows how an agent works inside: it is started by `meshq join`, asked by `meshq ... --json`, and killed by
its pid. All state is below one temporary folder; `Mesh.stop` ends every process that came from it.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil

T = TypeVar("T")

ROOT = Path(__file__).parent.parent.parent
PROGRAMS = Path(__file__).parent / "programs"
MESHQ = (sys.executable, "-m", "meshq")
POLL_SECONDS = 0.05
JOIN_LIMIT = 30.0
COMMAND_LIMIT = 120.0


def wait_for(condition: Callable[[], T], limit: float, what: str) -> T:
    """The first true value of `condition`; fails after `limit` seconds with the last value that it had."""
    deadline = time.monotonic() + limit
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {limit:g} s in vain: {what}; at last: {value!r}")
        time.sleep(POLL_SECONDS)


def free_port(address: str = "127.0.0.1") -> int:
    """A port of which both the TCP and the UDP side are free."""
    while True:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tcp, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            tcp.bind((address, 0))
            port = int(tcp.getsockname()[1])
            try:
                udp.bind((address, port))
            except OSError:
                continue
            return port


@dataclass(frozen=True)
class Done:
    """A command that ended."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


class Agent:
    """One machine of the mesh: a home, and the agent that serves it when it runs."""

    def __init__(self, folder: Path, name: str, *, address: str = "127.0.0.1", port: int = 0, netns: str = "") -> None:
        self.name = name
        self.home = folder / name
        self.address = address
        self.port = port or free_port(address if not netns else "127.0.0.1")
        self.output = folder / f"{name}.output"  # what `join` prints
        self.here = folder / "here"  # where commands are given: an empty folder, since a submit takes its folder along
        self.here.mkdir(exist_ok=True)
        self.variables: dict[str, str] = {}  # that its agent and its commands have besides ours
        self._prefix = ("ip", "netns", "exec", netns) if netns else ()
        self._process: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        return f"Agent({self.name})"

    @property
    def seed(self) -> str:
        return f"{self.address}:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid  # `ip netns exec` becomes the agent, so it has the same pid

    def environment(self, **more: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MESHQ_")}
        return kept | {"MESHQ_HOME": str(self.home), "NO_COLOR": "1", "COLUMNS": "80"} | self.variables | more

    def join(self, *options: str, key: str = "", mdns: bool = False) -> None:
        """Start the agent and wait until it answers."""
        self.spawn(*options, key=key, mdns=mdns)
        self.wait_until_up()

    def spawn(self, *options: str, key: str = "", mdns: bool = False) -> None:
        assert self._process is None or self._process.poll() is not None, f"{self.name} runs already"
        bind = ("--bind", self.address) if self.address else ()  # without an address it listens on all that there are
        where = ("--name", self.name, *bind, "--port", str(self.port))
        command = (*self._prefix, *MESHQ, "join", *where, *(() if mdns else ("--no-mdns",)), *options)
        with self.output.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                env=self.environment(**({"MESHQ_KEY": key} if key else {})),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def wait_until_up(self) -> None:
        def answers() -> bool:
            assert self._process is not None
            assert self._process.poll() is None, f"join of {self.name} ended:\n{self.output.read_text()}"
            return self.run("peers", "--json").code == 0

        wait_for(answers, JOIN_LIMIT, f"the agent of {self.name} answers")

    def run(self, *args: str, cwd: Path | None = None, text: str | None = None, **environment: str) -> Done:
        """A meshq command at this machine."""
        done = subprocess.run(
            (*MESHQ, *args),
            env=self.environment(**environment),
            cwd=cwd or self.here,
            input=text or "",
            capture_output=True,
            text=True,
            timeout=COMMAND_LIMIT,
            check=False,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def ask(self, *args: str, cwd: Path | None = None) -> Any:
        """The document that a command prints with `--json`; it must succeed."""
        done = self.run(*args, "--json", cwd=cwd)
        assert done.code == 0, f"meshq {' '.join(args)} at {self.name}: exit {done.code}\n{done.out}\n{done.err}"
        return done.json()

    def submit(self, *args: str, cwd: Path | None = None) -> str:
        """Submit and return the task's id. `--json` stands first, since the script's arguments are its own."""
        done = self.run("submit", "--json", *args, cwd=cwd)
        assert done.code == 0, f"submit at {self.name}: exit {done.code}\n{done.out}\n{done.err}"
        return str(done.json()["id"])

    def show(self, task: str) -> Any:
        return self.ask("show", task)

    def status_of(self, task: str) -> str:
        return str(self.show(task)["status"])

    def wait_until(self, task: str, *statuses: str, limit: float = 60.0) -> Any:
        """Wait for the task to have one of the statuses, as this machine sees it; its `show` document."""

        def reached() -> Any:
            document = self.show(task)
            return document if document["status"] in statuses else None

        return wait_for(reached, limit, f"{task} is {' or '.join(statuses)} at {self.name} ({self.show(task)})")

    def log(self, task: str) -> str:
        return self.run("logs", task).out

    def attempts_running(self) -> list[dict[str, Any]]:
        """The `run.json` of each attempt of this home that has no `exit.json`."""
        folders = sorted(self.home.glob("attempts/*/run.json"))
        return [json.loads(file.read_text()) for file in folders if not (file.parent / "exit.json").exists()]

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL the agent alone; what it started goes on."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def terminate(self) -> int:
        """SIGTERM the agent; its exit code."""
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(timeout=JOIN_LIMIT)

    def wait_until_ended(self, limit: float = JOIN_LIMIT) -> int:
        assert self._process is not None
        return self._process.wait(timeout=limit)

    def lose_the_machine(self) -> None:
        """SIGKILL the agent and all that came from its home: zygote, shims, tasks."""
        self.kill()
        end_processes_of(self.home)


@dataclass(frozen=True)
class Gate:
    """What `hold.py` waits for, and where it says that it has started."""

    folder: Path

    def open(self) -> None:
        (self.folder / "go").touch()

    def starts(self) -> dict[str, str]:
        """The peer that ran each claim which started, by fence."""
        return {file.name.removeprefix("started-"): file.read_text() for file in sorted(self.folder.glob("started-*"))}

    def wait_for_starts(self, number: int, limit: float = 60.0) -> dict[str, str]:
        def enough() -> dict[str, str] | None:
            starts = self.starts()
            return starts if len(starts) >= number and all(starts.values()) else None

        return wait_for(enough, limit, f"{number} starts in {self.folder}") or {}


class Mesh:
    """Agents in one temporary folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.agents: list[Agent] = []

    def add(self, name: str, *, address: str = "127.0.0.1", port: int = 0, netns: str = "") -> Agent:
        agent = Agent(self.folder, name, address=address, port=port, netns=netns)
        self.agents.append(agent)
        return agent

    def start(self, *names: str, options: tuple[str, ...] = ()) -> list[Agent]:
        """Agents on loopback that know each other: the first makes the mesh, the others join it by seed and key."""
        agents = [self.add(name) for name in names]
        first = agents[0]
        first.join("--new", *options)
        for agent in agents[1:]:
            agent.join("--seed", first.seed, *options, key=self.key())
        self.wait_until_whole(*agents)
        return agents

    def key(self) -> str:
        """The mesh key, as a person would copy it."""
        return next(agent for agent in self.agents if agent.alive()).run("key").out.strip()

    def wait_until_whole(self, *agents: Agent, limit: float = 30.0) -> None:
        """Each of the agents sees all of them alive."""
        names = {agent.name for agent in agents}
        for agent in agents:
            wait_for(partial(_sees, agent, names), limit, f"{agent.name} sees {sorted(names)} alive")

    def program(self, name: str) -> str:
        """A copy of a program of ours, alone in a folder outside of any repository."""
        folder = self.folder / "programs" / name.removesuffix(".py")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(PROGRAMS / name, folder)
        return str(folder / name)

    def gate(self, name: str) -> "Gate":
        """A folder for `hold.py`."""
        folder = self.folder / "gates" / name
        folder.mkdir(parents=True)
        return Gate(folder)

    def by_name(self, name: str) -> Agent:
        return next(agent for agent in self.agents if agent.name == name)

    def stop(self) -> None:
        for agent in self.agents:
            if agent.alive():
                agent.kill()
        end_processes_of(self.folder)

    def report(self) -> str:
        """What the agents said, for a test that failed."""
        texts = [file.read_text(errors="replace")[-3_000:] for file in self._logs()]
        return "\n".join(f"--- {file.relative_to(self.folder)}\n{text}" for file, text in zip(self._logs(), texts, strict=True))

    def _logs(self) -> list[Path]:
        return sorted([*self.folder.glob("*.output"), *self.folder.glob("*/agent.log"), *self.folder.glob("*/attempts/*/log")])


def _sees(agent: Agent, names: set[str]) -> bool:
    return names <= alive_at(agent)


def alive_at(agent: Agent) -> set[str]:
    return {peer["name"] for peer in agent.ask("peers") if peer["liveness"] == "alive"}


@contextmanager
def temporary_mesh() -> Iterator[Mesh]:
    """A mesh without agents yet, in a folder whose path is short enough for a Unix socket."""
    folder = Path(tempfile.mkdtemp(prefix="meshq-"))
    mesh = Mesh(folder)
    try:
        yield mesh
    finally:
        mesh.stop()
        shutil.rmtree(folder, ignore_errors=True)


def end_processes_of(folder: Path) -> None:
    """SIGKILL every process whose command, environment or current folder lies below `folder`, until none is left."""
    mine = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}

    def end_all() -> bool:
        found = [process for process in psutil.process_iter() if process.pid not in mine and _came_from(process, str(folder))]
        for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped first, so that nobody sees another one die
            for process in found:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
        return not found

    wait_for(end_all, 10.0, f"processes of {folder} end")


def _came_from(process: psutil.Process, folder: str) -> bool:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        texts = [process.cwd(), *process.cmdline(), *process.environ().values()]
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False
    return any(text == folder or text.startswith(f"{folder}/") for text in texts)
