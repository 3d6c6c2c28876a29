"""The mesh of a soak: real agents that are kept running, tasks that keep coming, and hands that hurt them.

One thread keeps everything going (`tend`), and a few submit tasks beside it, so that agents die while they answer.
"""

import random
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final

from meshq import codec, failpoints
from meshq.client import Client
from meshq.errors import MeshqError
from meshq.exec import shim
from meshq.exec.attempts import Attempts
from meshq.ids import Fence, PeerId, split_fence
from meshq.task import Environment, Isolation, TaskSpec
from soaks.evidence import digest, open_tasks
from soaks.place import Place, now
from tests.processes.mesh import Agent, Mesh, wait_for

PULSE: Final = Path(__file__).parent / "programs" / "pulse.py"
SUBMITTERS: Final = 3
LOOK_SECONDS: Final = 0.05
COUNT_SECONDS: Final = 1.0  # between two looks at how many tasks are open
RETRIES: Final = 100  # a task that is killed has failed, and is tried again
ATTEMPT_HURT_MAX: Final = 3  # later attempts are left alone: a task that takes its machines down is poisoned, and rightly so
NTH_MAX: Final = {"storing": 20, "stored": 20, "offered": 20, "merged": 20}  # passed far more often than the others
NTH_ELSE: Final = 2
FINISH_LIMIT: Final = 420.0  # a task that failed ten times pauses for 256 s


class Field:
    """`seconds`: how long tasks live, at least and at most. `slots`: of each agent. `stopping`: the share of tasks that are
    submitted with `--on-isolation stop`."""

    def __init__(
        self, place: Place, mesh: Mesh, agents: Sequence[Agent], seconds: tuple[float, float], slots: int, stopping: float = 0.0
    ) -> None:
        self.place = place
        self.mesh = mesh
        self.agents = list(agents)
        record = place.record()
        self.rng = random.Random(f"{place.options.seed} {len(record)}")
        self.acked = sum(len(entry["tasks"]) for entry in record if entry["event"] == "acked")
        self.down: dict[str, float] = {}  # when the agent that is away shall come back
        self._seconds = seconds
        self._slots = slots
        self._stopping = stopping
        self._pool = ThreadPoolExecutor(SUBMITTERS, thread_name_prefix="submit")
        self._submits: list[Future[None]] = []
        self._lock = threading.Lock()
        self._counted_at = 0.0
        self._open = 0

    # ---- agents

    def start(self) -> None:
        """All agents, in a new mesh or in the one that an interrupted soak left."""
        self.place.note("began", ports={agent.name: agent.port for agent in self.agents})
        for agent in self.agents:
            agent.variables["MESHQ_EVENTS"] = "1"
        first, *others = self.agents
        options = ("--slots", str(self._slots))
        if first.home.exists():
            for agent in self.agents:
                agent.spawn()
            for agent in self.agents:
                agent.wait_until_up()
        else:
            first.join("--new", *options)
            for agent in others:
                agent.join("--seed", first.seed, *options, key=self.mesh.key())
        self.mesh.wait_until_whole(*self.agents, limit=60)

    def alive(self) -> list[Agent]:
        return [agent for agent in self.agents if agent.alive()]

    def kill_agent(self, agent: Agent, away: float) -> None:
        self._goes_down(agent, away)
        agent.kill()

    def _goes_down(self, agent: Agent, away: float) -> None:
        self.place.note("down", peer=agent.name)
        self.down[agent.name] = now() + away

    def tend(self, *, armed: float = 0.0) -> None:
        """Notice who died, bring back whose time has come. `armed`: the share of agents that get a failpoint."""
        for agent in self.agents:
            if agent.name not in self.down and not agent.alive():
                self._goes_down(agent, self.absence())
            elif self.down.get(agent.name, float("inf")) <= now():
                del self.down[agent.name]
                self._spawn(agent, armed=self.rng.random() < armed)
        time.sleep(LOOK_SECONDS)

    def absence(self) -> float:
        """How long an agent that was killed stays away: mostly a moment, sometimes longer than a lease."""
        return self.rng.choices((self.rng.uniform(0, 1), self.rng.uniform(1, 6), self.rng.uniform(15, 25)), (80, 15, 5))[0]

    def _spawn(self, agent: Agent, *, armed: bool) -> None:
        agent.variables.pop("MESHQ_FAILPOINT", None)
        if armed:
            point = self.rng.choice([name for name in failpoints.POINTS if name != "purged"])
            agent.variables["MESHQ_FAILPOINT"] = f"{point}:{self.rng.randint(1, NTH_MAX.get(point, NTH_ELSE))}"
        agent.spawn()

    # ---- tasks

    def feed(self, most: int, open_most: int) -> None:
        """Submit at random agents until so many were acknowledged, as long as no more than `open_most` are open."""
        self._submits = [each for each in self._submits if not each.done()]
        if now() > self._counted_at + COUNT_SECONDS:
            self._counted_at = now()
            counts = [count for agent in self.alive() if (count := open_tasks(self.place.home(agent.name).ledger)) is not None]
            self._open = max(counts, default=self._open)
        if self.acked + len(self._submits) < most and self._open + len(self._submits) < open_most and self.alive():
            self._open += 1
            agent = self.rng.choice(self.alive())
            name = f"pulse-{self.acked + len(self._submits)}"
            self._submits.append(self._pool.submit(self._submit, agent, self._spec(name)))

    def _spec(self, name: str) -> TaskSpec:
        seconds = self.rng.uniform(*self._seconds)
        isolation = Isolation.STOP if self.rng.random() < self._stopping else Isolation.CONTINUE
        return TaskSpec(
            name=name, argv=(sys.executable, "-I", "-S", str(PULSE), str(self.place.marks), f"{seconds:.2f}"),
            submitted_by="", submitted_at=0.0, submitted_peer=PeerId(""), environment=Environment(needs_python=False),
            retries=RETRIES, isolation=isolation.value,
        )  # fmt: skip

    def _submit(self, agent: Agent, spec: TaskSpec) -> None:
        """In a thread. Whatever goes wrong: no id was given out, and the task may be there or not."""
        try:
            with Client(self.place.home(agent.name)) as client:
                answer = client.submit([codec.to_plain(spec)])
        except (MeshqError, OSError) as error:
            with self._lock:
                self.place.note("unanswered", peer=agent.name, error=str(error))
            return
        with self._lock:
            self.place.note("acked", peer=agent.name, tasks=answer["ids"], stored_on=answer["stored_on"])
            self.acked += len(answer["ids"])

    # ---- what runs

    def running(self) -> list[tuple[Agent, Fence, int, shim.Process]]:
        """The attempts that run and may be hurt: the pid of the shim, and the task's process."""
        found = []
        for agent in self.agents:
            attempts = Attempts(self.place.home(agent.name).attempts)
            for run in agent.attempts_running():
                process = shim.process(run["pid"])
                if process is not None and process.ticks == run["start_ticks"] and process.state not in "ZX":
                    fence = _fence_of(run["pid"])
                    supervisor = attempts.shim_pid(fence) if fence else None
                    if fence and supervisor is not None and split_fence(fence)[0] <= ATTEMPT_HURT_MAX:
                        found.append((agent, fence, supervisor, process))
        return found

    # ---- the end

    def finish(self) -> None:
        """Let everything end: all agents back and unarmed, until every task is over and all ledgers are equal."""
        for each in self._submits:
            each.result()
        self._pool.shutdown()
        for agent in self.agents:
            if agent.variables.pop("MESHQ_FAILPOINT", None) is not None and agent.alive():
                self.place.note("down", peer=agent.name)
                agent.terminate()
            if not agent.alive():
                agent.spawn()
        self.down.clear()
        for agent in self.agents:
            agent.wait_until_up()
        with suppress(AssertionError):  # what does not end is for the checker to say
            wait_for(self.is_over, FINISH_LIMIT, "every task is over and all ledgers are equal")

    def is_over(self) -> bool:
        return self.equal() and not open_tasks(self.place.home(self.agents[0].name).ledger)

    def equal(self) -> bool:
        digests = [digest(self.place.home(agent.name).ledger) for agent in self.agents]
        return None not in digests and len(set(digests)) == 1

    def end(self) -> None:
        for agent in self.agents:
            if agent.alive():
                agent.terminate()


def _fence_of(pid: int) -> Fence | None:
    try:
        environ = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return None
    prefix = b"MESHQ_FENCE="
    return next((Fence(each[len(prefix) :].decode()) for each in environ.split(b"\0") if each.startswith(prefix)), None)
