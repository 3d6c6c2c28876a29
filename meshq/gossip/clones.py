"""Two agents with one identity: how each of them finds out, and which of them gives way.

A home that is copied to a second machine, or restored while the first copy lives, makes a second peer of the same `PeerId`.
Each then hears statements about itself that it never made and outbids them, without end. A restored home alone does not: the
run that it outbids is over, and answers nothing. So the other run is alive if it outbids this peer again and
again; or if it answers on a connection, where the key proves the identity.

The newer of the two falls silent, by the time at which each began and, if that is equal, by their random numbers: both
compare the same two pairs, so exactly one of them gives way, whatever their clocks say.
"""

from typing import Final

from meshq.gossip.member import Member

RISES_NEEDED: Final = 3  # late rumors of a run that is over may rise once or twice; two that live reach it at once
RUNS_MAX: Final = 8  # other runs that are remembered; more at a time is not a mistake but an attack


class OtherRuns:
    """Statements about me that runs other than this one made: the greatest of each, and how often it rose."""

    def __init__(self) -> None:
        self._heard: dict[int, tuple[tuple[int, int], int]] = {}

    def is_alive(self, statement: Member) -> bool:
        """Another run's statement that outbids mine: does it prove that this run lives?"""
        said = (statement.epoch, statement.incarnation)
        if statement.boot not in self._heard and len(self._heard) >= RUNS_MAX:
            return False
        before, rises = self._heard.get(statement.boot, (said, 0))
        rises += said > before
        self._heard[statement.boot] = (max(said, before), rises)
        return rises >= RISES_NEEDED


def is_newer(me: Member, other: Member) -> bool:
    """Am I the one that gives way?"""
    return (me.started_at, me.boot) > (other.started_at, other.boot)
