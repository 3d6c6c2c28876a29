"""Named places at which a process of meshq can be told to die, for tests of what survives that.

`MESHQ_FAILPOINT=started:1,stored:p2.5,seed:7` when an agent is started: it, its zygote or one of its shims sends itself SIGKILL
when it passes `started` for the first time, and at each passage of `stored` with 2.5 % (drawn from the seed, the name and the
number of the passage). The variable is read once at the start and forgotten with all others that begin with MESHQ_, so no
task and no remote can reach any of this. The first zygote of an agent gets it as an argument; later ones don't, or a zygote
that dies at its first request would do so for ever. Passages are counted in memory that all forks share: the third shim of a
zygote passes `started` for the third time.

Who dies here says so first, as a line "NAME PID CLOCK_BOOTTIME" in the file that `arm` was given.

Off, a failpoint costs one comparison. Only the standard library, and of that only what shims have anyway.
"""

import os
import signal
import time
from collections.abc import Mapping, Sequence

POINTS: Mapping[str, str] = {
    # In the agent, where a task is submitted
    "submitted": "the request has arrived",
    "committed": "the task is stored here",
    "replicated": "it is stored elsewhere too, the answer is not given yet",
    # In the agent, at each commit and each push that comes in
    "storing": "in the commit thread, before the commit",
    "stored": "in the commit thread, after the commit: nothing that follows from it is done yet",
    "offered": "another peer's push has arrived",
    "merged": "it is merged and stored, its reply is not sent yet",
    "purged": "rows of tasks that were over are deleted",
    # In the agent, where it claims and runs
    "claimed": "the claim is stored, nothing is prepared yet",
    "prepared": "source and environment are there",
    "starting": "that it starts is stored, no shim is asked for yet",
    "launched": "the zygote has answered",
    "reported": "the end of the attempt is known here, and not stored yet",
    "acked": "the end is stored, the attempt's folder does not say so yet",
    "discarded": "what only the running task needed is removed",
    # In the zygote
    "forking": "a shim is asked for",
    # In the shim
    "spawned": "it has been forked",
    "started": "the attempt is its for ever, no user code runs yet",
    "running": "the task runs",
    "exiting": "the task has ended, nothing says so yet",
    "exit-written": "exit.json is in its place",
}


class _Rule:
    """When to die at one point: at the `nth` passage, or at each with a probability of `percent`."""

    def __init__(self, name: str, when: str) -> None:
        self.name = name
        self.percent = float(when[1:]) if when.startswith("p") else 0.0
        self.nth = 0 if when.startswith("p") else int(when)
        if name not in POINTS or self.nth < 0 or not (self.nth or 0 < self.percent <= 100):
            raise ValueError(f"{name}:{when}")


class _Armed:
    def __init__(self, text: str, deaths: str) -> None:
        import mmap

        self.text = text
        self.deaths = deaths
        self.handed_down = False
        self.rules, self.seed = parse(text)
        self._places = {name: place for place, name in enumerate(sorted({rule.name for rule in self.rules}))}
        self._passages = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")  # shared with all forks

    def passes(self, name: str) -> bool:
        """Count the passage; whether it is a last one."""
        import random

        if name not in self._places:
            return False
        self._passages[self._places[name]] += 1
        number = self._passages[self._places[name]]
        draw = 100 * random.Random(f"{self.seed} {name} {number}").random()
        return any(rule.nth == number or draw < rule.percent for rule in self.rules if rule.name == name)


_armed: _Armed | None = None


def parse(text: str) -> tuple[tuple[_Rule, ...], int]:
    """The rules and the seed. ValueError, with the part that makes no sense, if there is one."""
    rules, seed = [], 0
    for part in text.split(",") if text else ():
        name, _, when = part.strip().partition(":")
        try:
            if name == "seed":
                seed = int(when)
            else:
                rules.append(_Rule(name, when))
        except ValueError:
            raise ValueError(part) from None
    return tuple(rules), seed


def arm(text: str, deaths: str) -> None:
    """From now on this process, and what it forks, dies where `text` says; who dies leaves a line in the file `deaths`."""
    global _armed
    _armed = _Armed(text, deaths) if text else None


def disarm() -> None:
    arm("", "")


def hand_down() -> Sequence[str]:
    """The arguments of `arm` for the first process that is started from this one; nothing for a later one, or if unarmed."""
    if _armed is None or _armed.handed_down:
        return ()
    _armed.handed_down = True
    return _armed.text, _armed.deaths


def reach(name: str) -> None:
    """This process passes the point of this name."""
    if _armed is not None and _armed.passes(name):
        _die(name, _armed.deaths)


def _die(name: str, deaths: str) -> None:
    line = f"{name} {os.getpid()} {time.clock_gettime(time.CLOCK_BOOTTIME):.6f}\n"
    file = os.open(deaths, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    os.write(file, line.encode())
    os.kill(os.getpid(), signal.SIGKILL)
