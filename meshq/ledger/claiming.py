"""Which tasks this peer should bid for now, and when to look again. A pure function of the queues and of everybody's capacity.

Problem. All peers see the same queue and the same free slots. If each bids for the first task there are as many bids as peers;
if one peer is in charge it may be dead.

Algorithm. Every peer deals the waiting tasks, in running order, to the free capacities that it knows of: each task goes to the
first of its contenders by rendezvous, and what it needs is taken off that peer's capacity. Peers that know the same deal the
same. A task that falls to this peer is claimed at once; one for which this peer is the r-th contender is claimed r slots after
it could be claimed first, if it still waits then: so a contender that is dead or deaf delays a task by 150 ms and not for ever.
Ranks other than 0 add jitter. The rest (two bids after all) is settled by the rules of `holder.py`.

Dealing ends when this peer's capacity is used up, so its cost follows the free slots of the mesh, not the length of the queues.

Rejected: ranking each task by itself. With two free slots and two tasks, both often go to the same peer first, and the other
peer idles for a slot.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from math import inf

from meshq.ids import PeerId, TaskId
from meshq.ledger.effects import PeerView
from meshq.ledger.placement import Capacity, eligible, fits_now
from meshq.ledger.rendezvous import claimants
from meshq.ledger.timing import LedgerConfig
from meshq.task import Needs

DEALS_MAX = 4_096  # reached only when as many tasks wait for the end of their back-off, or for another peer than this one
DEAL_AGAIN_SECONDS = 1.0
JITTER_BYTES = 4
JITTERS = 1 << (8 * JITTER_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A waiting task."""

    task: TaskId
    queue: str
    needs: Needs
    attempt: int
    since: float  # when this peer saw first that it could be claimed
    not_before: float  # the back-off after earlier attempts
    released_by: tuple[PeerId, ...] = ()  # peers that gave up an attempt at it: others go first


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    claims: tuple[tuple[TaskId, int], ...]
    look_again_at: float


@dataclass(slots=True)
class Deal:
    """The capacities that are left while tasks are dealt."""

    me: PeerId
    views: Mapping[PeerId, PeerView]
    free: dict[PeerId, Capacity]
    capacity_since: float  # when this peer's own capacity last grew
    config: LedgerConfig

    def wanted(self, queue: str) -> Callable[[Needs], bool]:
        """Whether this peer may run such tasks of the queue, as far as its capacity went at the beginning."""
        mine = self.views[self.me]
        return lambda needs: eligible(needs, queue, mine) and fits_now(needs, mine.telemetry, self.free[self.me])

    def plan(self, now: float, candidates: Iterator[Candidate]) -> Plan:
        """Deal until this peer has nothing left to give."""
        claims: list[tuple[TaskId, int]] = []
        look_again_at = inf
        for count, candidate in enumerate(candidates):
            if count == DEALS_MAX:
                look_again_at = min(look_again_at, now + DEAL_AGAIN_SECONDS)
                break
            if len(claims) == self.config.claims_per_batch:
                look_again_at = min(look_again_at, now + self.config.claim_slot)
                break
            if candidate.not_before > now:
                look_again_at = min(look_again_at, candidate.not_before)
                continue
            task = candidate.task
            order = claimants(task, candidate.attempt, self._contenders(candidate))
            due = self._due(candidate, order)
            winner = self.me if due <= now else order[0] if order else None
            if due <= now:
                claims.append((task, candidate.attempt))
            look_again_at = look_again_at if due <= now else min(look_again_at, due)
            if winner is not None:
                self.free[winner] = self.free[winner].minus(candidate.needs)
            if self.free[self.me].slots < 1:
                break
        return Plan(claims=tuple(claims), look_again_at=look_again_at)

    def _due(self, candidate: Candidate, order: tuple[PeerId, ...]) -> float:
        if self.me not in order:
            return inf
        rank = order.index(self.me)
        first = max(candidate.since, candidate.not_before, self.capacity_since)
        return first + rank * self.config.claim_slot + (self._jitter(candidate) if rank else 0.0)

    def _jitter(self, candidate: Candidate) -> float:
        """A part of `claim_jitter`, another one for each bid of each peer. A hash, so that nothing is kept for who waits."""
        subject = f"jitter|{candidate.task}|{candidate.attempt}|{self.me}"
        drawn = int.from_bytes(blake2b(subject.encode(), digest_size=JITTER_BYTES).digest())
        return self.config.claim_jitter * drawn / JITTERS

    def _contenders(self, candidate: Candidate) -> Iterable[PeerId]:
        """Who could take the task now; those that gave it up before only if nobody else is eligible at all.

        A peer whose telemetry lists this very task has claimed it: gossip overtook the push of its claim. It keeps its rank,
        or the next one would believe that it is first and bid at once.
        """
        needs, queue = candidate.needs, candidate.queue
        able = [peer for peer, view in self.views.items() if eligible(needs, queue, view)]
        fresh = [peer for peer in able if peer not in candidate.released_by]
        return [peer for peer in fresh or able if self._has_room(peer, candidate.task, needs)]

    def _has_room(self, peer: PeerId, task: TaskId, needs: Needs) -> bool:
        told = self.views[peer].telemetry
        return fits_now(needs, told, self.free[peer]) or (peer != self.me and task in told.running)
