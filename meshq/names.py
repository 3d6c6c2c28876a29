"""What a peer is called: the name that was wanted, or the first one like it that nobody else has.

Problem. Names are for people, and unique: by them tasks, machines and copies are told apart. But nobody gives them out. Two
machines that want the same name may start at the same moment, or meet after weeks in which each had it for itself.

Invariant. Who is there keeps its name, and who comes takes another one. Each peer tells with its name for how long it has had
it (`Member.named`, a step of STEPS): that only grows as long as it has the name, and survives a restart. Of two with one name
the one with the higher step keeps it, of two on one step the one with the smaller id. No clock is compared with another one.

So there is no flapping. What others know of a step is never more than what is so; if both gave way, each would have been told
of a better claim than its own, and that of the other cannot be better than mine and worse. And once both have heard each other,
one of the two sees the better claim.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Final

from meshq.config import NAME_CHARS_MAX
from meshq.gossip.member import Liveness, Member
from meshq.ids import PeerId

STEPS: Final = (0.0, 5.0, 30.0, 300.0, 86_400.0)
"""Seconds until each next step of `Member.named`, from when the peer has looked for others: who comes is on step 0, who is
there on a higher one. Few, since each is told to all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldName:
    """What a home remembers: this peer wanted the one name, and had got the other, on that step. In a copy of the home it means
    nothing."""

    peer: PeerId
    wanted: str
    name: str
    named: int = 0


def free_name(wanted: str, me: Member | None, others: Iterable[Member]) -> str:
    """The name that I have (`me`; None if I have none yet), unless another peer has it too and has a better claim; then
    `wanted`, or with the first suffix that nobody else has.

    Who is dead is expected back, so its name is taken. Who left gave it up.
    """
    there = [other for other in others if other.liveness is not Liveness.LEFT and (me is None or other.peer != me.peer)]
    if me is not None and not any(other.name == me.name and _claim(other) < _claim(me) for other in there):
        return me.name
    taken = {other.name for other in there}
    return next(name for name in _like(wanted) if name not in taken)


def first_name(wanted: str, held: HeldName | None, remembered: Iterable[Member]) -> str:
    """The name to start with, where `remembered` are known from an earlier run: the one of the last run, if there was one,
    unless that had a suffix which is no longer needed."""
    free = free_name(wanted, None, remembered)
    return free if held is None or free == wanted else held.name


def _claim(member: Member) -> tuple[object, ...]:
    """The smaller, the better."""
    return (-member.named, member.peer)


def _like(wanted: str) -> Iterator[str]:
    """`lab`, `lab-2`, `lab-3` and so on."""
    yield wanted
    for number in count(2):
        suffix = f"-{number}"
        yield wanted[: NAME_CHARS_MAX - len(suffix)] + suffix
