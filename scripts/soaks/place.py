"""The folder of one soak: what it was asked for, what it did so far, and everything that its agents leave.

Whatever happens is a line of `record.jsonl` before or as it happens; a soak that is interrupted reads it and goes on.

    options.json   what was asked for
    record.jsonl   what the soak did to the mesh, and which tasks were acknowledged
    marks/         the signs of life of the tasks, one file for each fence
    <name>/        the home of each agent
    report.md      the result
"""

import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from meshq import eventlog
from meshq.config import Home
from meshq.errors import UsageError

SOCKET_PATH_MAX: Final = 107  # bytes of a Unix socket's path
NAMES: Final = ("ada", "bob", "cyd", "dan", "eve", "fay", "gus", "hal")


def now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a soak was asked for. Which of the numbers count depends on its kind."""

    kind: str  # kills or partitions
    seed: int
    peers: int
    kills: int = 0
    tasks: int = 0
    short: int = 0  # cuts of 2 to 10 s
    long: int = 0  # cuts of 20 to 40 s


class Place:
    """Opened by one soak at a time."""

    def __init__(self, folder: Path, options: Options, *, anew: bool) -> None:
        """UsageError if the folder can't be used for that."""
        self.folder = folder.absolute()
        self.options = options
        if len(str(Home(self.folder / max(NAMES, key=len)).socket)) > SOCKET_PATH_MAX:
            raise UsageError(f"the path of {self.folder} is too long for the sockets of agents", "name a shorter --folder")
        if anew:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._check_options()
        self.marks = self.folder / "marks"
        self.marks.mkdir(parents=True, exist_ok=True)
        self._log = eventlog.EventLog(self.folder / "record.jsonl", now)

    def _check_options(self) -> None:
        file = self.folder / "options.json"
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        wanted = asdict(self.options) | {"boot": boot}
        if not file.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(wanted))
        elif json.loads(file.read_text()) != wanted:
            raise UsageError(
                f"{self.folder} holds a soak that was begun with other options, or before this machine was restarted",
                "add --anew to throw it away, or name another --folder",
            )

    def home(self, name: str) -> Home:
        return Home(self.folder / name)

    def names(self) -> tuple[str, ...]:
        return NAMES[: self.options.peers]

    def note(self, event: str, **facts: object) -> None:
        """Write down that this happens now."""
        self._log.note(event, **facts)

    def record(self) -> list[dict[str, Any]]:
        """Everything that was written down, in order."""
        return list(eventlog.read(self.folder / "record.jsonl"))

    def ports(self) -> dict[str, int]:
        """Of the agents, where an interrupted soak had them: they find each other there again, and nowhere else."""
        return next((entry["ports"] for entry in self.record() if entry["event"] == "began"), {})

    def failpoint_deaths(self) -> list[tuple[float, str, str]]:
        """When, at which peer and at which failpoint processes of the mesh died."""
        deaths = []
        for name in self.names():
            file = self.home(name).deaths
            for line in file.read_text().splitlines() if file.exists() else ():
                point, _, at = line.split()
                deaths.append((float(at), name, point))
        return sorted(deaths)

    def close(self) -> None:
        self._log.close()
