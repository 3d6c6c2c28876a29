"""What becomes of a belief: how rumors change what this peer thinks of others, and what it says when they are wrong about it.

Problem. Everybody hears of everybody by rumors that are late, doubled, reordered and sometimes mistaken, and all must end
with the same view, in which a peer that lives is not dead.

Invariant. The belief about a peer only grows in the order of `Member.precedence`, and nobody but the peer itself raises its
epoch or incarnation. So all who heard the same rumors hold the same belief, and a peer can always outbid what is said of it.

Algorithm. A greater belief replaces the held one and is passed on; an equal suspicion by somebody else confirms it; all else
is ignored. A suspicion has a timer (`suspicion`), at whose end the suspect is dead, if it has enough observers. A death
that comes without enough of them, or through push/pull and so may be old, starts as a suspicion, so that whoever is alive
can object. Whatever is said of me and is greater than what I say of myself, I outbid: by incarnation against a suspicion,
by epoch against another run of me (a home that was restored; if that run lives, `clones` decides).

Limits. `MEMBERS_MAX` members: the longest gone make room for the living. Suspicions that I raise are rationed: who suspects
a tenth of the mesh within a minute is likelier ill itself, and slows down (hashicorp/consul#5567). Refutations are rationed,
as two runs of one home would otherwise outbid each other as fast as the network carries it (caio/foca#25).

Reading: Das, Gupta, Motivala: SWIM, 2002, section 4; Dadgar et al.: Lifeguard, arXiv:1707.00788.
"""

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from meshq import codec
from meshq.gossip import suspicion
from meshq.gossip.allowance import Allowance
from meshq.gossip.clones import OtherRuns, is_newer
from meshq.gossip.effects import Cloned, Effect, MemberChanged, Refuted
from meshq.gossip.flaps import Flaps
from meshq.gossip.member import Liveness, Member, merge
from meshq.gossip.profile import SwimConfig
from meshq.gossip.roster import Roster
from meshq.gossip.rumors import RumorQueue
from meshq.gossip.suspicion import Suspicion
from meshq.gossip.wire import COUNT_MAX, OBSERVERS_MAX, VIEW_BYTES, Rumor, observer
from meshq.ids import Epoch, PeerId

REFUTATIONS_BURST: Final = 10
REFUTATIONS_PER_SECOND: Final = 1.0
NEWS_SECONDS: Final = 15  # an older death is of a partition that has just healed, or of the time before
CLONE_KNOWN: Final = 300.0
SUSPICIONS_WINDOW: Final = 60.0
SUSPICIONS_MIN: Final = 5  # different members within the window, or a tenth of all if that is more


class Beliefs:
    """Changes are queued for gossip; those that must be told at once are given out by `take_urgent`."""

    def __init__(self, me: Member, config: SwimConfig, now: float, counters: Counter[str]) -> None:
        assert me.liveness is Liveness.ALIVE
        self.roster = Roster(me)
        self.queue = RumorQueue()
        self.health = 0
        self._config = config
        self._counters = counters
        self._suspicions: dict[PeerId, Suspicion] = {}
        self._observed_by: dict[PeerId, tuple[str, ...]] = {}  # of the dead: who observed it
        self._raised: dict[PeerId, float] = {}  # whom I suspected by myself, and when last
        self.flaps = Flaps()
        self.clone: Member | None = None
        self.silent = False
        self._other_runs = OtherRuns()
        self._cloned_at = now
        self._urgent: dict[PeerId, None] = {}
        self._forgotten: list[PeerId] = []
        self._refutations = Allowance(REFUTATIONS_PER_SECOND, REFUTATIONS_BURST, now)

    @property
    def size(self) -> int:
        """N of the formulas: the members that take part, me included."""
        return len(self.roster.live()) + 1

    @property
    def quiet(self) -> bool:
        """Do I take no part any more: because I left, or because I am the newer of two clones?"""
        return self.silent or self.roster.me.liveness is Liveness.LEFT

    def hear(self, now: float, rumor: Rumor, *, synced: bool = False, urgent: bool = False) -> list[Effect]:
        """Somebody tells a rumor; `synced` if by push/pull, `urgent` if nobody else may know it yet."""
        theirs = rumor.member
        if theirs.peer == self.roster.me.peer:
            return self._hear_of_me(now, rumor)
        before = self.roster.get(theirs.peer)
        if before is None:
            return self._meet(now, rumor, urgent)
        observers = rumor.observers
        if theirs.liveness is Liveness.DEAD and before.liveness <= Liveness.SUSPECT:
            old = synced or rumor.gone_seconds > NEWS_SECONDS
            if old and not self._is_observed(theirs.peer):
                observers = ()  # what they saw then says nothing of now, until somebody sees it now, too
            if old or not self._has_observers(rumor):
                theirs = replace(theirs, liveness=Liveness.SUSPECT)
        if merge(before, theirs) is not before:
            return self._adopt(now, theirs, now - rumor.gone_seconds, observers, urgent=urgent)
        if theirs == before and theirs.liveness is Liveness.SUSPECT:
            self._confirm(now, theirs.peer, observers, urgent=False)
        return []

    def suspect(self, now: float, peer: PeerId) -> list[Effect]:
        """My probe of a live member failed."""
        member = self.roster.get(peer)
        assert member is not None
        mark = (observer(self.roster.me.peer),)
        if member.liveness is Liveness.ALIVE and self._may_suspect(now, peer):
            return self._adopt(now, replace(member, liveness=Liveness.SUSPECT), now, mark, urgent=True)
        if member.liveness is Liveness.SUSPECT:
            self._confirm(now, peer, mark, urgent=True)
        return []

    def bury(self, now: float, heard_at: Callable[[PeerId], float]) -> list[Effect]:
        """The suspects whose time is over are dead, unless somebody else who could have seen it has not.

        `heard_at`: when anything came from a peer last. Who has nobody to ask must believe its own eyes.
        """
        effects: list[Effect] = []
        for peer in [peer for peer, held in self._suspicions.items() if held.deadline <= now]:
            member, held = self.roster.get(peer), self._suspicions[peer]
            assert member is not None
            if len(held.observers) < suspicion.observers_needed(self.size) and self._can_be_confirmed(held.since, heard_at):
                self._counters["deaths_unconfirmed"] += 1
                self._suspicions[peer] = replace(held, since=now)
                self._tell(now, peer, urgent=True)  # with its observers: somebody may hold another one
                continue
            effects += self._adopt(now, replace(member, liveness=Liveness.DEAD), now, held.observers, urgent=True)
        return effects

    def introduce(self, now: float, said: Member) -> list[Effect]:
        """Say something new about myself, under an incarnation of its own; nothing if it is not new."""
        me = self.roster.me
        if self.quiet or said == me:
            return []
        if me.incarnation >= COUNT_MAX:
            self._counters["refutations_refused"] += 1
            return []
        return self._speak(now, replace(said, incarnation=me.incarnation + 1))

    def distrust(self, now: float) -> None:
        """I was deaf: every suspect gets its full time again, without the confirmations that I heard of."""
        for peer in self._suspicions:
            self._suspicions[peer] = suspicion.begin(self._config, self.size, now, ())

    def forget_expired(self, now: float) -> None:
        if not self.silent and now - self._cloned_at > CLONE_KNOWN:
            self.clone = None  # it fell silent, or somebody has mended it
        for peer in self.roster.expired(now, self._config.dead_kept, self._config.left_kept):
            self._forget(peer)

    def rumor(self, now: float, peer: PeerId) -> Rumor:
        """What I would tell of a known member now."""
        member = self.roster.get(peer)
        assert member is not None
        held = self._suspicions.get(peer)
        observers = held.observers if held is not None else self._observed_by.get(peer, ())
        gone = self.roster.gone_for(now, peer) or 0.0
        return Rumor(member, observers[:OBSERVERS_MAX], int(gone))

    def view(self, now: float) -> bytes:
        """A hash of all that I believe: two peers with equal hashes have nothing to tell each other.

        The dead and the left are forgotten at slightly different times, so those that are gone for half of it are not in it.
        """
        half = {Liveness.DEAD: self._config.dead_kept / 2, Liveness.LEFT: self._config.left_kept / 2}
        told = (
            member
            for member in self.roster.members()
            if (self.roster.gone_for(now, member.peer) or 0.0) < half.get(member.liveness, float("inf"))
        )
        return hashlib.blake2b(b"".join(sorted(map(codec.encode, told))), digest_size=VIEW_BYTES).digest()

    def meet_clone(self, now: float, other: Member) -> list[Effect]:
        """Another run of me is alive: the newer of us falls silent."""
        self._cloned_at = now
        if self.clone is not None and self.clone.boot == other.boot:
            return []
        self.clone = other
        self.silent = self.silent or is_newer(self.roster.me, other)
        return [Cloned(other, self.silent)]

    def take_urgent(self, now: float) -> list[Rumor]:
        """What changed by my own doing, or was told to me alone, since this was asked last."""
        urgent = [self.rumor(now, peer) for peer in self._urgent if self.roster.get(peer) is not None]
        self._urgent.clear()
        return urgent

    def take_forgotten(self) -> list[PeerId]:
        forgotten, self._forgotten = self._forgotten, []
        return forgotten

    def feel(self, change: int) -> None:
        """Raise or lower the local health score: 0 is well, each point slows my probes down."""
        self.health = min(self._config.health_max, max(0, self.health + change))

    def deadline(self) -> float:
        return min((held.deadline for held in self._suspicions.values()), default=float("inf"))

    def check(self) -> None:
        self.roster.check()
        self.queue.check()
        assert all(self.roster.get(peer) is not None for peer in self.queue.subjects())
        assert 0 <= self.health <= self._config.health_max
        suspects = [member.peer for member in self.roster.members() if member.liveness is Liveness.SUSPECT]
        assert sorted(suspects) == sorted(self._suspicions)
        dead = [member.peer for member in self.roster.members() if member.liveness is Liveness.DEAD]
        assert sorted(dead) == sorted(self._observed_by)
        assert self.roster.me.liveness in (Liveness.ALIVE, Liveness.LEFT)

    def _hear_of_me(self, now: float, rumor: Rumor) -> list[Effect]:
        me, theirs = self.roster.me, rumor.member
        if self.quiet or theirs.precedence <= me.precedence:
            return []
        effects: list[Effect] = []
        if theirs.boot not in (0, me.boot) and self._other_runs.is_alive(theirs):
            effects += self.meet_clone(now, theirs)  # what I say below may be my last word: by it the other run knows, too
        if theirs.epoch >= COUNT_MAX or not self._refutations.take(now):
            self._counters["refutations_refused"] += 1
            return effects
        if theirs.epoch == me.epoch and theirs.liveness is not Liveness.ALIVE:
            self.feel(+1)  # I was too slow to answer somebody
            self.flaps.refuted(now, rumor.observers)
        self._counters["refutations"] += 1
        return [*effects, *self._speak(now, _above(me, theirs)), Refuted(theirs)]

    def _is_observed(self, peer: PeerId) -> bool:
        """Does anybody stand behind my suspicion of this peer?"""
        held = self._suspicions.get(peer)
        return held is not None and bool(held.observers)

    def _has_observers(self, rumor: Rumor) -> bool:
        """Do enough observers stand behind this death?"""
        return len(set(rumor.observers)) >= suspicion.observers_needed(self.size)

    def _can_be_confirmed(self, since: float, heard_at: Callable[[PeerId], float]) -> bool:
        """Is there anybody whom I hear and don't suspect, and who so could confirm a death? Who is cut off has nobody."""
        members = (self.roster.get(peer) for peer in self.roster.live() if heard_at(peer) >= since)
        return any(member is not None and member.liveness is Liveness.ALIVE for member in members)

    def _may_suspect(self, now: float, peer: PeerId) -> bool:
        """Within the ration of suspects; beyond it I take myself to be ill. One of them again and again counts once: with loss
        in a small mesh the ration would be gone in seconds, and a real crash unnoticed for the rest of the minute."""
        self._raised = {suspect: when for suspect, when in self._raised.items() if when > now - SUSPICIONS_WINDOW}
        if peer not in self._raised and len(self._raised) >= max(SUSPICIONS_MIN, self.size // 10):
            self._counters["suspicions_withheld"] += 1
            self.feel(self._config.health_max)
            return False
        self._raised[peer] = now
        return True

    def _speak(self, now: float, me: Member) -> list[Effect]:
        """A new belief about myself."""
        before = self.roster.me
        self.roster.put(me, now)
        self._tell(now, me.peer, urgent=True, news=_is_news(before, me))
        return [MemberChanged(before, me)]

    def _meet(self, now: float, rumor: Rumor, urgent: bool) -> list[Effect]:
        member = rumor.member
        kept = {Liveness.DEAD: self._config.dead_kept, Liveness.LEFT: self._config.left_kept}
        if rumor.gone_seconds >= kept.get(member.liveness, float("inf")):
            self._counters["rumors_expired"] += 1
            return []
        room, longest_gone = self.roster.make_room(member.liveness)
        if not room:
            self._counters["members_refused"] += 1
            return []
        if longest_gone is not None:
            self._forget(longest_gone)
        return self._adopt(now, member, now - rumor.gone_seconds, rumor.observers, urgent=urgent)

    def _adopt(
        self, now: float, member: Member, gone_since: float, observers: tuple[str, ...], *, urgent: bool
    ) -> list[Effect]:
        before = self.roster.get(member.peer)
        self.roster.put(member, gone_since)
        self._suspicions.pop(member.peer, None)
        self._observed_by.pop(member.peer, None)
        if member.liveness is Liveness.SUSPECT:
            self._suspicions[member.peer] = suspicion.begin(self._config, self.size, now, observers)
        elif member.liveness is Liveness.DEAD:
            self._observed_by[member.peer] = observers[:OBSERVERS_MAX]
        self._tell(now, member.peer, urgent=urgent, news=_is_news(before, member))
        return [MemberChanged(before, member)]

    def _confirm(self, now: float, peer: PeerId, observers: tuple[str, ...], *, urgent: bool) -> None:
        confirmed = self._suspicions[peer].confirmed(observers)
        if confirmed is not self._suspicions[peer]:
            self._suspicions[peer] = confirmed
            self._tell(now, peer, urgent=urgent)

    def _tell(self, now: float, peer: PeerId, *, urgent: bool, news: bool = False) -> None:
        self.queue.put(self.rumor(now, peer), news=news)
        if urgent:
            self._urgent[peer] = None

    def _forget(self, peer: PeerId) -> None:
        self.roster.forget(peer)
        self.queue.discard(peer)
        self._observed_by.pop(peer, None)
        self._urgent.pop(peer, None)
        self._forgotten.append(peer)


def _is_news(before: Member | None, after: Member) -> bool:
    """Is it more than a suspicion of somebody known, or its refutation?"""
    if before is None or max(before.liveness, after.liveness) > Liveness.SUSPECT:
        return True
    return replace(before, liveness=after.liveness, incarnation=after.incarnation) != after


def _above(me: Member, theirs: Member) -> Member:
    """Me, outbidding what is said of me."""
    if theirs.epoch > me.epoch or theirs.incarnation >= COUNT_MAX:
        return replace(me, epoch=Epoch(theirs.epoch + 1), incarnation=0)
    return replace(me, incarnation=theirs.incarnation + 1)
