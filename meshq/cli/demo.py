"""`meshq demo`: a mesh of three agents on this machine, real work on it, and the loss of the machine that does the work.

Every step is a real command, run as a person would run it and printed before it runs; only what a person would look up in
between (ids, who runs what, process ids) is asked through the client. Each "machine" is a folder of its own with an agent
of its own on 127.0.0.1. Whatever was started is ended and the folder removed, whether the demo comes to its end, fails, or
is stopped by Ctrl-C, SIGTERM or a closed terminal: everything that runs for it is known by the name of that folder.
"""

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn, TypeVar

import psutil

import meshq
from meshq.cli import screen
from meshq.client import Client
from meshq.config import Home
from meshq.documents import TaskDocument
from meshq.errors import TaskFailed, UsageError

T = TypeVar("T")

MACHINES: Final = ("lab-1", "lab-2", "lab-3")
SCRIPT: Final = "train_digits.py"
LONGER: Final = ("--epochs", "20", "--slow", "0.4")
STATE_SECONDS: Final = 180.0  # building an environment on a slow line takes this long, nothing else does
KILL_ROUNDS: Final = 20
DEATH_SECONDS: Final = 10.0
SHOWN_KEY: Final = "mesh.key"
STOPS: Final = (signal.SIGTERM, signal.SIGHUP)  # handled like Ctrl-C


def run_demo(wanted: Path | None) -> None:
    """Play the whole demo; MeshqError if a step does not go as it must."""
    outputs = _outputs_folder(wanted)
    with _stopped_like_ctrl_c(), _told_when_stopped(), _folder() as folder:
        shutil.copy(_example(), folder / "project" / SCRIPT)
        demo = Demo(folder)
        demo.start_mesh()
        demo.train(outputs)
        demo.lose_a_machine()
        demo.leave()
    screen.say("", screen.paint(f"Done. The outputs of the training are in {outputs}; everything else is gone.", "bold"))


class Demo:
    """The mesh in `folder`; `self._at` is the machine at which the person sits."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._at = MACHINES[0]
        self._alive = list(MACHINES)

    def start_mesh(self) -> None:
        self._tell("Three machines become a mesh. Each is a folder with an agent of its own; the first makes the key.")
        ports = _free_ports(len(MACHINES))
        common = ("--bind", "127.0.0.1", "--no-mdns", "--detach")
        for machine, port in zip(MACHINES, ports, strict=True):
            self._at = machine
            if machine == MACHINES[0]:
                self._run("join", "--new", "--port", str(port), *common)
                self._write_key()
            else:
                seed = ("--seed", f"127.0.0.1:{ports[0]}", "--key-file", SHOWN_KEY)
                self._run("join", *seed, "--port", str(port), *common)
        self._at = MACHINES[0]
        self._until(
            "all machines see each other", lambda: self._ask(lambda c: c.status()["mesh"]["peers_alive"]) == len(MACHINES)
        )
        self._run("status")

    def train(self, outputs: Path) -> None:
        self._tell("A script with its requirements goes to whichever machine is free. Its log comes back live.")
        self._run("submit", "--name", "digits", "--follow", SCRIPT)
        self._tell("What it wrote into $MESHQ_OUTPUT_DIR is fetched from the machine that ran it.")
        self._run("fetch", "digits", "--to", str(outputs))

    def lose_a_machine(self) -> None:
        self._tell("A longer run, and the machine that runs it is lost: agent, supervisor and task get SIGKILL at once.")
        self._run("submit", "--name", "longer", SCRIPT, *LONGER)
        task = self._until("the longer run trains", self._running)
        victim = task["attempts"][-1]["peer"]
        self._run("status")
        self._alive.remove(victim)
        if self._at == victim:
            self._at = self._alive[0]
        killed = self._kill(victim)
        self._tell(f"Lost: {victim} ({len(killed)} processes killed). The others must notice that by themselves.")
        began = time.monotonic()
        self._run("wait", "longer")
        self._run("show", "longer")
        self._check_finished_elsewhere(victim)
        self._tell(f"It finished elsewhere, {time.monotonic() - began:.0f} s after the loss, and nobody did anything.")
        self._run("status")

    def leave(self) -> None:
        self._tell("The machines that are left leave the mesh.")
        for machine in list(self._alive):
            self._at = machine
            self._run("leave")

    # ---- steps

    def _run(self, *arguments: str) -> None:
        """Print the command, run it, let it write to our streams; TaskFailed if it fails."""
        shown = shlex.join(("meshq", *arguments))
        screen.say(f"{screen.paint(f'{self._at} $', 'dim')} {screen.paint(shown, 'cyan')}")
        code = subprocess.run(self._command(*arguments), env=self._environment(), cwd=self._project).returncode
        screen.say("")
        if code != 0:
            raise TaskFailed(f"the demo stopped: `{shown}` at {self._at} exited with {code}", self._logs_hint())

    def _write_key(self) -> None:
        """`meshq key > mesh.key`, readable by its owner only."""
        screen.say(f"{screen.paint(f'{self._at} $', 'dim')} {screen.paint(f'meshq key > {SHOWN_KEY}', 'cyan')}", "")
        descriptor = os.open(self._project / SHOWN_KEY, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            subprocess.run(self._command("key"), env=self._environment(), cwd=self._project, stdout=file, check=True)

    def _running(self) -> TaskDocument | None:
        """The longer task, once it has written something."""
        task = self._ask(lambda client: client.show("longer"))
        if task["status"] == "failed":
            raise TaskFailed(f"the demo stopped: the longer run failed: {task['reason']}", self._logs_hint())
        if task["status"] != "running":
            return None
        return task if self._ask(lambda client: b"".join(client.log(task["id"]))) else None

    def _kill(self, victim: str) -> list[int]:
        """SIGKILL for the agent, then its zygote, its shims and their tasks, before any of them can react."""
        home = self._home(victim)
        with Client(home) as client:
            roots = [client.me()["pid"]]
        for path in sorted(home.attempts.glob("*/run.json")):
            if not (path.parent / "exit.json").exists():  # the ids of one that is over may be somebody else's by now
                run = json.loads(path.read_text("utf-8"))
                roots += [run["shim"], run["pid"]]
        return _kill_trees(roots)

    def _check_finished_elsewhere(self, victim: str) -> None:
        attempts = self._ask(lambda client: client.show("longer"))["attempts"]
        results = [(each["peer"], each["status"]) for each in attempts]
        if (victim, "lost") not in results or not any(p != victim and s == "succeeded" for p, s in results):
            raise TaskFailed(f"the demo failed: the attempts are {results}", self._logs_hint())

    # ---- plumbing

    @property
    def _project(self) -> Path:
        return self._folder / "project"

    def _home(self, machine: str) -> Home:
        return Home(self._folder / machine)

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MESHQ_")}
        return kept | {"MESHQ_HOME": str(self._home(self._at).root)}

    def _command(self, *arguments: str) -> list[str]:
        name = ("--name", self._at) if arguments[0] == "join" else ()
        return [sys.executable, "-m", "meshq", arguments[0], *name, *arguments[1:]]

    def _ask(self, question: Callable[[Client], T]) -> T:
        with Client(self._home(self._at)) as client:
            return question(client)

    def _until(self, what: str, condition: Callable[[], T | None]) -> T:
        deadline = time.monotonic() + STATE_SECONDS
        while time.monotonic() < deadline:
            if found := condition():
                return found
            time.sleep(0.1)
        raise TaskFailed(f"the demo stopped: waited {STATE_SECONDS:.0f} s until {what}", self._logs_hint())

    def _logs_hint(self) -> str:
        """The ends of the agents' logs: the folder is gone when people read this."""
        tails = []
        for machine in MACHINES:
            with contextlib.suppress(OSError):
                lines = self._home(machine).log.read_text("utf-8", "replace").splitlines()[-10:]
                tails.append(f"end of the log of {machine}:\n" + "\n".join(f"  {line}" for line in lines))
        return "\n".join(tails) or "no agent wrote a log"

    def _tell(self, text: str) -> None:
        screen.say(screen.paint(f"# {text}", "bold"))


def _outputs_folder(wanted: Path | None) -> Path:
    """The folder that was asked for, which must be new or empty; else the first free one with the default name."""
    if wanted is not None:
        if wanted.exists() and (not wanted.is_dir() or any(wanted.iterdir())):
            raise UsageError(f"--to: `{wanted}` exists and is not empty", "give a folder that does not exist")
        return _writable(wanted.absolute())
    default = Path("meshq-demo-outputs").absolute()
    names = (default, *(default.with_name(f"{default.name}-{n}") for n in range(2, 10_000)))
    return _writable(next(path for path in names if not path.exists()))


def _writable(outputs: Path) -> Path:
    """The folder, if it can be made: to find that out after a minute of demo would be late."""
    nearest = next(path for path in (outputs, *outputs.parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UsageError(f"the outputs cannot go into `{outputs}`: `{nearest}` is not writable", "give another folder by --to")
    return outputs


def _example() -> Path:
    """The training script: at the root of the repository, or inside an installed package."""
    package = Path(meshq.__file__).parent
    for folder in (package.parent / "examples", package / "examples"):
        if (folder / SCRIPT).is_file():
            return folder / SCRIPT
    raise TaskFailed(f"cannot find examples/{SCRIPT}", "run the demo from a checkout of meshq: `scripts/demo`")


def _free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that are free for both UDP and TCP right now."""
    with contextlib.ExitStack() as held:
        ports: list[int] = []
        while len(ports) < count:
            stream = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            datagram = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            stream.bind(("127.0.0.1", 0))
            with contextlib.suppress(OSError):
                datagram.bind(stream.getsockname())
                ports.append(stream.getsockname()[1])
        return ports


@contextlib.contextmanager
def _stopped_like_ctrl_c() -> Iterator[None]:
    """STOPS raise KeyboardInterrupt, except those that whoever started us wants to be ignored (nohup)."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    with _handled_by(interrupt, [number for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN]):
        yield


@contextlib.contextmanager
def _told_when_stopped() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):  # the terminal may be gone
            screen.note("the demo was stopped, and everything that it had started is gone")
        raise


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """A new private folder; in the end all that runs for it is killed and it is removed."""
    folder = Path(tempfile.mkdtemp(prefix="meshq-demo-"))
    (folder / "project").mkdir()
    try:
        yield folder
    finally:
        with _handled_by(signal.SIG_IGN, (signal.SIGINT, *STOPS)):  # a second Ctrl-C must not leave agents behind
            _kill_all(folder)
            with contextlib.suppress(OSError):  # the terminal may be gone
                screen.progress("Removing the three machines")  # tens of thousands of files: seconds on a slow disk
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _handled_by(
    handler: Callable[[int, FrameType | None], NoReturn] | signal.Handlers, numbers: Sequence[int]
) -> Iterator[None]:
    before = [(number, signal.signal(number, handler)) for number in numbers]
    try:
        yield
    finally:
        for number, earlier in before:
            signal.signal(number, earlier)


def _kill_all(folder: Path) -> None:
    """SIGKILL for every process that has the folder in its command line or works in it, until there is none."""
    for _ in range(KILL_ROUNDS):
        found = [process.pid for process in psutil.process_iter() if process.pid != os.getpid() and _belongs(process, folder)]
        if not found:
            return
        _kill_trees(found)


def _belongs(process: psutil.Process, folder: Path) -> bool:
    try:
        if any(str(folder) in part for part in process.cmdline()):
            return True
        return Path(process.cwd()).is_relative_to(folder)
    except (psutil.Error, OSError):
        return False  # gone, or of somebody else


def _kill_trees(roots: Sequence[int]) -> list[int]:
    """SIGKILL for these processes and all that descend from them; the ids of those that were there."""
    processes: dict[int, psutil.Process] = {}
    for root in roots:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(root)
            processes |= {each.pid: each for each in (process, *process.children(recursive=True))}
    for process in processes.values():
        with contextlib.suppress(psutil.Error):
            process.kill()
    deadline = time.monotonic() + DEATH_SECONDS
    while any(map(_lives, processes.values())) and time.monotonic() < deadline:
        time.sleep(0.02)
    return sorted(processes)


def _lives(process: psutil.Process) -> bool:
    """Whether it can still do something: a zombie that nobody collects can't."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
