"""What one peer believes of another, and the one rule by which two beliefs become one.

A belief is replaced only by a greater one, under a total order that uses every field: (epoch, incarnation, liveness, then
the rest). So `merge` is `max`: commutative, associative, idempotent, whatever the order of arrival. The published
precedence of SWIM's descendants, stored as it stands, is not (two rumors of one death at different incarnations differ by
order of arrival).
"""

from dataclasses import dataclass
from enum import IntEnum

from meshq.ids import Epoch, PeerId


class Liveness(IntEnum):
    """SWIM's claim about a member; at equal incarnation the greater one wins."""

    ALIVE = 0
    SUSPECT = 1
    DEAD = 2
    LEFT = 3


@dataclass(frozen=True, slots=True, order=True)
class Address:
    """A numeric IP address (IPv4 or IPv6, no name) and a port that serves both UDP and TCP."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One belief about one peer. `incarnation` is raised by its owner alone.

    `boot` is drawn at random at each start, so that two agents with one identity (a home that was copied) can be told apart;
    `started_at`, in wall-clock seconds, says which of them is the newer, and is for nothing else but display. `named` says for
    how long the peer has had its name, as a step of `names.STEPS`.
    """

    peer: PeerId
    epoch: Epoch
    incarnation: int
    liveness: Liveness
    name: str
    addresses: tuple[Address, ...]
    version: str = ""
    started_at: int = 0
    boot: int = 0
    named: int = 0

    @property
    def precedence(self) -> tuple[object, ...]:
        """The total order of beliefs about one peer."""
        told = (self.name, self.addresses, self.version, self.started_at, self.boot, self.named)
        return (self.epoch, self.incarnation, self.liveness, *told)


def merge(mine: Member, theirs: Member) -> Member:
    """The greater of two beliefs about the same peer."""
    assert mine.peer == theirs.peer
    return mine if mine.precedence >= theirs.precedence else theirs
