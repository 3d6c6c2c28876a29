"""What this agent did and when, line by line, for those who want to prove something about a whole mesh afterwards.

Written only with MESHQ_EVENTS set: `events.jsonl` in the home, one JSON object a line with `at` (CLOCK_BOOTTIME, so the agents
of one machine can be compared) and `event`. The words, in the order of a task's life:

    up                 the agent is a member; `peer`, `name`
    acked              a submit is about to be answered; `tasks`, `stored_on`
    claimed            a claim of this peer is stored; `task`, `fence`
    started            that it starts is stored, and a shim is asked for; `fence`
    stopping           the ledger wants it stopped; `fence`, `reason`
    exited             exec reports its end; `fence`, `kind`, `exit_code`
    ended              that end is stored; `fence`
    result             this peer sees how the task has ended; `task`, `status`, `fence` of the success that counts
    alive              whom this peer believes alive has changed; `peers`

A line is written by one call, without fsync: it survives every death of the process, but not of the machine. A line that a
SIGKILL tore is cut off at the next start. The file is bounded: the older half goes when it is full.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

FILE_BYTES_MAX: Final = 32 * 2**20
TAIL_BYTES: Final = 64 * 1024  # more than the longest line


class EventLog:
    """For one writer. Without a file it does nothing."""

    def __init__(self, file: Path | None, clock: Callable[[], float]) -> None:
        self._file = file
        self._clock = clock
        self._bytes = 0
        self._descriptor = -1
        if file is not None:
            self._open(file)

    @property
    def on(self) -> bool:
        return self._file is not None

    def note(self, event: str, **facts: object) -> None:
        """Append one line."""
        if self._file is None:
            return
        line = json.dumps({"at": round(self._clock(), 6), "event": event, **facts}, separators=(",", ":")).encode() + b"\n"
        if self._bytes + len(line) > FILE_BYTES_MAX // 2:
            os.replace(self._file, older(self._file))
            self.close()
            self._open(self._file)
        self._bytes += os.write(self._descriptor, line)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _open(self, file: Path) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(file, flags, 0o600)
        size = os.fstat(self._descriptor).st_size
        tail = os.pread(self._descriptor, TAIL_BYTES, max(0, size - TAIL_BYTES))
        self._bytes = size - (len(tail) - tail.rfind(b"\n") - 1)
        os.ftruncate(self._descriptor, self._bytes)


def older(file: Path) -> Path:
    """Where the older half is."""
    return file.with_name(file.name + ".1")


def read(file: Path) -> Iterator[dict[str, Any]]:
    """All lines that there are, in order. The last one may be torn, if its writer lives or was killed: it is left out."""
    for each in (older(file), file):
        if each.exists():
            with each.open("rb") as lines:
                yield from (json.loads(line) for line in lines if line.endswith(b"\n"))
