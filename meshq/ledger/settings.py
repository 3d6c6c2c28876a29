"""What the mesh as a whole was told: paused queues, created queues, how long ended tasks are kept. One map of names to texts.

Problem. A pause must hold at every peer, also at one that joins tomorrow, and two people may say different things at once, in
different parts of a mesh that is cut in two. There is no server to ask which of them counts.

Invariant. Peers that have seen the same writes hold the same map, in whatever order the writes came. The vector covers every
write that made the map.

Algorithm. For each name the last write wins: the greatest (revision, actor, value), where revision is 1 + the highest that
the writer had seen for the name. So whoever has seen a value can replace it, and of two who have not seen each other one wins
everywhere. The map travels whole, with its version vector, as a row does: writes are named by dots of their peer's actor, and
rules R1 to R3 of `replica.py` hold for them. Nothing is ever removed: deleted is a value, the empty text. Names that this
version does not know are kept and passed on.

Limits. SETTINGS_MAX names, each of at most NAME_CHARS_MAX characters with a value of at most VALUE_BYTES_MAX bytes. A peer
writes no name beyond that; if two parts of a mesh have both filled the map, the names that come first in order are kept, which
is a lattice, too: a name that was dropped has SETTINGS_MAX names before it for ever.

Reading order: `merge_settings`, `changed`, `broken`, then what the names mean.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from meshq.errors import TaskFailed, UsageError
from meshq.ids import Dot, is_actor_id
from meshq.ledger.row import REGISTER_MAX, TextRegister, Vector, merge_vectors

SETTINGS_MAX: Final = 1_000
NAME_CHARS_MAX: Final = 128  # a queue's name has at most 63
VALUE_BYTES_MAX: Final = 256
ACTORS_MAX: Final = 4_096  # that have ever changed a setting; with everything else at its most the map still fits a page
KEPT_DAYS_DEFAULT: Final = 7.0
KEPT_TASKS_DEFAULT: Final = 50_000
KEPT_TASKS_MAX: Final = 100_000
KEPT_DAYS_MAX: Final = 3_650.0
KEPT_DAYS_MIN: Final = 0.1  # who waits for a task must still find its end
KEPT_TASKS_MIN: Final = 100
DELETED: Final = ""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")


@dataclass(frozen=True, slots=True)
class Settings:
    """The whole map. `vector` covers every write that made it."""

    entries: Mapping[str, TextRegister] = field(default_factory=dict)
    vector: Vector = field(default_factory=dict)

    def value(self, name: str) -> str:
        """Empty if nobody has set it, or it was deleted."""
        register = self.entries.get(name)
        return DELETED if register is None else register.value


NOTHING_SET: Final = Settings()


def merge_settings(mine: Settings, theirs: Settings) -> Settings:
    """The lattice join."""
    if mine == theirs:
        return mine
    entries = dict(mine.entries)
    for name, register in theirs.entries.items():
        entries[name] = max(entries.get(name, register), register)
    return Settings({name: entries[name] for name in sorted(entries)[:SETTINGS_MAX]}, merge_vectors(mine.vector, theirs.vector))


def changed(settings: Settings, dot: Dot, values: Mapping[str, str]) -> Settings:
    """The map after the one write `dot`, which sets all of these."""
    entries = dict(settings.entries)
    for name, value in values.items():
        before = entries.get(name)
        revision = 1 if before is None else min(REGISTER_MAX, before.revision + 1)
        entries[name] = TextRegister(revision, dot.actor, value)
    return Settings(entries, merge_vectors(settings.vector, {dot.actor: dot.seq}))


def check_change(settings: Settings, values: Mapping[str, str]) -> None:
    """UsageError if a name or value is none, TaskFailed if there is no room for the new names."""
    for name, value in values.items():
        if not _is_name(name) or not _is_value(value):
            raise UsageError(
                f"setting {name[:NAME_CHARS_MAX]!r} to {value[:VALUE_BYTES_MAX]!r}: that is no name, or its value is too long",
                f"a value has at most {VALUE_BYTES_MAX} bytes",
            )
    new = [name for name in values if name not in settings.entries]
    if new and len(settings.entries) + len(new) > SETTINGS_MAX:
        raise TaskFailed(
            f"setting {new[0]!r}: the mesh keeps at most {SETTINGS_MAX} settings, those of deleted queues included",
            "use the name of a queue that there was before",
        )


def broken(settings: Settings) -> str:
    """Why such a map can't be taken over, in one word; empty if it can."""
    if len(settings.entries) > SETTINGS_MAX or len(settings.vector) > ACTORS_MAX:
        return "too_large"
    if not all(is_actor_id(actor) and 0 < seq <= REGISTER_MAX for actor, seq in settings.vector.items()):
        return "malformed"
    sound = all(
        _is_name(name)
        and _is_value(register.value)
        and 0 < register.revision <= REGISTER_MAX
        and register.actor in settings.vector  # somebody wrote it
        for name, register in settings.entries.items()
    )
    return "" if sound else "malformed"


def _is_name(text: str) -> bool:
    return len(text) <= NAME_CHARS_MAX and _NAME.fullmatch(text) is not None


def _is_value(text: str) -> bool:
    return len(text.encode("utf-8", "replace")) <= VALUE_BYTES_MAX


# ---- what the names mean


def short(text: str) -> str:
    """As much of the text as a value may hold."""
    return text.encode("utf-8", "replace")[:VALUE_BYTES_MAX].decode("utf-8", "ignore")


def paused(queue: str) -> str:
    """The name under which stands who paused the queue."""
    return f"queue/{queue}/paused"


def created(queue: str) -> str:
    """The name under which stands who created the queue; deleted if somebody deleted it."""
    return f"queue/{queue}/created"


def queues_with(settings: Settings, what: str) -> Mapping[str, str]:
    """For each queue of which this was ever said ("paused", "created") the value, which may be DELETED."""
    found = {}
    for name, register in settings.entries.items():
        match name.split("/"):
            case ["queue", queue, word] if word == what:
                found[queue] = register.value
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """How long tasks are kept that are over: until they are older, or more than so many."""

    seconds: float = KEPT_DAYS_DEFAULT * 86_400
    tasks: int = KEPT_TASKS_DEFAULT


def retention(settings: Settings) -> Retention:
    """What `retention/days` and `retention/tasks` say; the defaults where they say nothing, or nothing that makes sense."""
    return Retention(
        seconds=86_400 * _number(settings.value("retention/days"), KEPT_DAYS_MAX, KEPT_DAYS_DEFAULT),
        tasks=int(_number(settings.value("retention/tasks"), KEPT_TASKS_MAX, KEPT_TASKS_DEFAULT)),
    )


def keeping(days: float | None, tasks: int | None) -> dict[str, str]:
    """What to set so that ended tasks are kept for so many days, and so many; None: as it is. UsageError if out of range."""
    for number, low, high, what in (
        (days, KEPT_DAYS_MIN, KEPT_DAYS_MAX, "days"),
        (tasks, KEPT_TASKS_MIN, KEPT_TASKS_MAX, "tasks"),
    ):
        if number is not None and not low <= number <= high:
            raise UsageError(f"--{what}: {number:g} is out of range", f"choose a number from {low:g} to {high:,g}")
    said = {} if days is None else {"retention/days": f"{days:.6g}"}
    return said if tasks is None else said | {"retention/tasks": str(tasks)}


def _number(text: str, most: float, default: float) -> float:
    try:
        number = float(text)
    except ValueError:
        return default
    return number if 0 <= number <= most else default
