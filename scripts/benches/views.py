"""Who holds whom for what, read from the logs that the agents write anyway.

To ask thirty agents twenty times a second would be load that the bench measures as theirs. Their logs say each change of a
belief as it happens, in meshq and in serf alike, and to read what was appended costs the agents nothing. The time of an
event is when it was read, by this process's clock: serf writes whole seconds only.
"""

import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

POLL_SECONDS = 0.05

Kind = Literal["ready", "alive", "suspect", "dead", "left", "unanswered", "refuted", "tcp_only"]
BELIEFS: tuple[Kind, ...] = ("alive", "suspect", "dead", "left")
Words = Mapping[Kind, re.Pattern[str]]
"""How a system's log says each kind of event. A belief has the group `whom`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    at: float  # monotonic
    agent: str  # whose log says it
    kind: Kind
    whom: str


class InVain(Exception):
    """What a bench waited for did not come."""


class _Tail:
    """The lines that were appended to a file since the last look."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0

    def lines(self) -> list[str]:
        try:
            with self._path.open("rb") as file:
                file.seek(self._position)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._position += len(whole)
        return whole.decode(errors="replace").splitlines()


class Views:
    """What each agent holds of each other one, as far as `read` got."""

    def __init__(self, words: Words) -> None:
        self.words = words
        self._tails: dict[str, list[_Tail]] = {}
        self.holds: dict[str, dict[str, Kind]] = {}
        self.counts: defaultdict[str, Counter[Kind]] = defaultdict(Counter)
        self.ready: set[str] = set()

    def follow(self, agent: str, *logs: Path) -> None:
        self._tails[agent] = [_Tail(log) for log in logs]
        self.forget(agent)

    def forget(self, agent: str) -> None:
        """It starts anew and knows nobody."""
        self.read()
        self.holds[agent] = {}
        self.ready.discard(agent)

    def read(self) -> list[Event]:
        """What was written since the last call, the views brought up to date."""
        now = time.monotonic()
        events = [
            event
            for agent, tails in self._tails.items()
            for tail in tails
            for line in tail.lines()
            if (event := self._event(now, agent, line)) is not None
        ]
        for event in events:
            self.counts[event.agent][event.kind] += 1
            if event.kind == "ready":
                self.ready.add(event.agent)
            elif event.kind in BELIEFS and event.whom != event.agent:
                self.holds[event.agent][event.whom] = event.kind
        return events

    def _event(self, now: float, agent: str, line: str) -> Event | None:
        for kind, pattern in self.words.items():
            if (match := pattern.search(line)) is not None:
                return Event(at=now, agent=agent, kind=kind, whom=match.groupdict().get("whom", ""))
        return None

    def wait(self, done: Callable[[], bool], limit: float, what: Callable[[], str]) -> float:
        """Read until `done`; when that was. InVain after `limit` seconds."""
        deadline = time.monotonic() + limit
        while True:
            self.read()
            now = time.monotonic()
            if done():
                return now
            if now > deadline:
                raise InVain(f"waited {limit:g} s in vain: {what()}")
            time.sleep(POLL_SECONDS)

    def is_full(self) -> bool:
        """Everybody holds everybody alive."""
        return all(len(view) == len(self.holds) - 1 and set(view.values()) <= {"alive"} for view in self.holds.values())

    def gaps(self) -> str:
        """For a message: who lacks whom."""
        lacking = {
            agent: sorted(each for each in self.holds if each != agent and view.get(each) != "alive")
            for agent, view in self.holds.items()
        }
        return "; ".join(f"{agent} lacks {', '.join(names)}" for agent, names in lacking.items() if names)

    def seen_by(self, agent: str) -> set[str]:
        """Whom it holds alive by its log, itself included."""
        return {agent, *(whom for whom, kind in self.holds[agent].items() if kind == "alive")}

    def holding(self, whom: str, kind: Kind) -> int:
        """How many others hold it so."""
        return sum(view.get(whom) == kind for agent, view in self.holds.items() if agent != whom)

    def total(self, kind: Kind) -> int:
        return sum(counts[kind] for counts in self.counts.values())
