"""What a soak leaves behind, as the history that `tests/history.py` judges."""

import hashlib
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from meshq import codec, eventlog
from meshq.ids import fence
from meshq.ledger import holder
from meshq.ledger.row import Row
from soaks.place import Place
from tests.history import Event, Fault, Final, History, Ledger, Run

ROW_BYTES_MAX = 2**24


def digest(ledger: Path) -> str | None:
    """A hash of all rows as they are on disk; None if it can't be read just now. The agent may run."""
    found = hashlib.sha256()
    try:
        for task, data in _rows(ledger):
            found.update(task.encode() + len(data).to_bytes(4, "big") + data)
    except sqlite3.Error:
        return None
    return found.hexdigest()


def open_tasks(ledger: Path) -> int | None:
    """How many tasks are not over, says this ledger."""
    try:
        rows = list(_rows(ledger))
    except sqlite3.Error:
        return None
    return sum(not holder.status(codec.decode(Row, data, bytes_max=ROW_BYTES_MAX)).final for _, data in rows)


def _rows(ledger: Path) -> Iterator[tuple[str, bytes]]:
    connection = sqlite3.connect(f"file:{ledger}?mode=ro", uri=True, timeout=1.0)
    try:
        for task, data in connection.execute("SELECT task, data FROM rows ORDER BY task"):
            yield str(task), bytes(data)
    finally:
        connection.close()


def read_history(place: Place) -> History:
    record = place.record()
    events = tuple(sorted(_events(place), key=lambda event: event.at))
    names = {str(event.facts["peer"]): event.peer for event in events if event.event == "up"}
    return History(
        events=events,
        runs=tuple(run for file in sorted(place.marks.iterdir()) if (run := _run(file)) is not None),
        faults=(*_cuts(record), *_agentless(record, events)),
        acked=tuple(task for entry in record if entry["event"] == "acked" for task in entry["tasks"]),
        ledgers={name: _ledger(place.home(name).ledger, names) for name in place.names()},
    )


def _events(place: Place) -> Iterator[Event]:
    for name in place.names():
        for line in eventlog.read(place.home(name).events):
            facts = {key: value for key, value in line.items() if key not in ("at", "event")}
            yield Event(at=line["at"], peer=name, event=line["event"], facts=facts)


def _run(mark: Path) -> Run | None:
    """See `programs/pulse.py`. A line that a SIGKILL tore is the last one, and says nothing. None if there is no other."""
    lines = [line.split() for line in mark.read_text().splitlines(keepends=True) if line.endswith("\n")]
    begins = [line for line in lines if line[0] == "began"]
    if not begins:
        return None
    last = float(lines[-1][1] if lines[-1][0] in ("began", "ended") else lines[-1][0])
    _, _, peer, task = begins[0]
    ended = lines[-1][0] == "ended"
    return Run(fence=mark.name, task=task, peer=peer, begins=tuple(float(line[1]) for line in begins), last=last, ended=ended)


def _cuts(record: Sequence[dict[str, Any]]) -> Iterator[Fault]:
    """A cut ends when it is healed, or when the soak was interrupted and began again."""
    for place, entry in enumerate(record):
        if entry["event"] == "cut":
            later = record[place + 1 :]
            until = next((each["at"] for each in later if each["event"] in ("healed", "began")), float("inf"))
            number = entry["number"]
            equal = next((each["seconds"] for each in later if each["event"] == "equal" and each["number"] == number), None)
            yield Fault(
                kind="cut", one=frozenset(entry["one"]), other=frozenset(entry["other"]), since=entry["at"], until=until,
                equal_after=equal,
            )  # fmt: skip


def _agentless(record: Sequence[dict[str, Any]], events: Sequence[Event]) -> Iterator[Fault]:
    ups = [event for event in events if event.event == "up"]
    for entry in record:
        if entry["event"] == "down":
            until = next((up.at for up in ups if up.peer == entry["peer"] and up.at > entry["at"]), float("inf"))
            yield Fault(kind="agentless", one=frozenset({entry["peer"]}), since=entry["at"], until=until)


def _ledger(file: Path, names: dict[str, str]) -> Ledger:
    rows = [codec.decode(Row, data, bytes_max=ROW_BYTES_MAX) for _, data in _rows(file)]
    return Ledger(tasks={row.task: _final(row, names) for row in rows}, digest=digest(file) or "")


def _final(row: Row, names: dict[str, str]) -> Final:
    reading = holder.read(row)
    result = "" if reading.result is None else fence(reading.claims[reading.result[0]].attempt, reading.result[0])
    return Final(
        status=reading.status.value,
        result=result,
        isolation=row.spec.isolation,
        claims={fence(claim.attempt, dot): names.get(claim.peer, claim.peer) for dot, claim in reading.claims.items()},
        reason=holder.reason(row),
    )
