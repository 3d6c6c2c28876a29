"""`scripts/soak kills`: agents, zygotes, shims, tasks and whole machines are killed at random, and at failpoints.

Each round kills something that is alive with SIGKILL, after a random pause. Agents come back after a moment, some only after
their lease; most come back with a failpoint, at which they, their zygote or one of their shims dies sooner or later.
"""

import os
import signal
from collections import Counter
from contextlib import suppress

from meshq.exec import shim
from soaks.field import Field
from soaks.place import Place, now
from tests.processes.mesh import Agent, Mesh, end_processes_of

ARMED = 0.8  # the share of agents that start with a failpoint
VICTIMS = {"agent": 15, "attempt": 15, "shim": 20, "task": 20, "zygote": 10, "machine": 4}


def run(place: Place, *, seconds: tuple[float, float] = (2.0, 40.0), pause: float = 1.2, slots: int = 4) -> None:
    """Kill until enough were killed and all tasks were handed in. `pause`: the longest between two kills."""
    mesh = Mesh(place.folder)
    ports = place.ports()
    agents = [mesh.add(name, port=ports.get(name, 0)) for name in place.names()]
    field = Field(place, mesh, agents, seconds, slots)
    try:
        field.start()
        due, total = now(), killed(place).total()
        while total < place.options.kills or field.acked < place.options.tasks:
            field.tend(armed=ARMED)
            field.feed(place.options.tasks, open_most=2 * slots * len(agents))
            if now() > due:
                due = now() + field.rng.uniform(0, pause)
                total = killed(place).total()
                if total * place.options.tasks < place.options.kills * (field.acked + slots):  # spread over all tasks
                    _kill_one(field)
        place.note("finishing")
        field.finish()
        field.end()
    finally:
        mesh.stop()


def killed(place: Place) -> Counter[str]:
    """How many processes were killed so far, by what they were."""
    by_hand = Counter(entry["what"] for entry in place.record() if entry["event"] == "killed")
    return by_hand + Counter(f"at {point}" for _, _, point in place.failpoint_deaths())


def _kill_one(field: Field) -> None:
    """A kind of victim at random; if there is none of it just now, none is killed."""
    what = field.rng.choices(list(VICTIMS), list(VICTIMS.values()))[0]
    if what in ("agent", "zygote", "machine"):
        alive = field.alive()
        if alive:
            _kill_at(field, field.rng.choice(alive), what)
        return
    running = field.running()
    if not running:
        return
    agent, fence, supervisor, process = field.rng.choice(running)
    victims = {"task": [process.pid], "shim": [supervisor], "attempt": [supervisor, process.pid]}[what]
    field.place.note("killed", what=what, peer=agent.name, fence=fence)
    for pid in victims:
        with suppress(ProcessLookupError):  # the task dies with its shim
            os.kill(pid, signal.SIGKILL)


def _kill_at(field: Field, agent: Agent, what: str) -> None:
    if what == "zygote":
        zygotes = [each.pid for each in shim.processes() if each.parent == agent.pid and _name(each.pid) == "meshq-zygote"]
        if not zygotes:
            return
        field.place.note("killed", what=what, peer=agent.name)
        with suppress(ProcessLookupError):
            os.kill(zygotes[0], signal.SIGKILL)
        return
    field.place.note("killed", what=what, peer=agent.name)
    field.kill_agent(agent, field.absence())
    if what == "machine":
        end_processes_of(agent.home)


def _name(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="ascii", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""
