"""Push/pull: two peers tell each other all that they believe, over TCP. It repairs what rumors missed, and lets newcomers in.

Most of the time there is nothing to repair. So a routine exchange begins with a question: a hash of what I believe. Who
believes the same says so, and that is all; who does not answers with everything, and is then told everything. Newcomers,
those who come back, and whoever tries to reach somebody who failed tell everything at once.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Final

from meshq.errors import PeerError
from meshq.gossip import wire
from meshq.gossip.beliefs import Beliefs
from meshq.gossip.effects import Effect, RecordChanged, Sync
from meshq.gossip.member import Member
from meshq.gossip.profile import SwimConfig
from meshq.gossip.telemetry import RecordTable
from meshq.gossip.wire import Record, Rumor, SyncReply, SyncRequest
from meshq.ids import PeerId

ASKED_MAX: Final = 64  # questions that wait for their answer; a forgotten one costs a push at the next exchange


class PushPull:
    """What is heard goes to `beliefs` and `records`, just as if it had come by gossip."""

    def __init__(self, beliefs: Beliefs, records: RecordTable, config: SwimConfig, counters: Counter[str]) -> None:
        self._beliefs = beliefs
        self._roster = beliefs.roster
        self._records = records
        self._config = config
        self._counters = counters
        self._asked: dict[PeerId, None] = {}

    def everything(self, now: float) -> bytes:
        """A request that tells all that I believe."""
        return wire.fill_sync(SyncRequest, self._roster.me, self._rumors(now), self._told_records(now))

    def ask(self, now: float, peer: PeerId) -> list[Effect]:
        """Do we believe the same?"""
        address = self._roster.next_address(peer)
        if address is None:
            return []
        self._asked[peer] = None
        if len(self._asked) > ASKED_MAX:
            del self._asked[next(iter(self._asked))]
        question = wire.encode_sync(SyncRequest(self._roster.me, (), (), self._beliefs.view(now)))
        return [Sync(peer, address, question)]

    def tell(self, now: float, peer: PeerId) -> list[Effect]:
        """Everything, to one peer."""
        address = self._roster.next_address(peer)
        return [] if address is None else [Sync(peer, address, self.everything(now))]

    def handle_request(self, now: float, peer: PeerId, data: bytes) -> tuple[bytes, list[Effect]]:
        """The reply, and what follows. PeerError: state unchanged."""
        request = wire.read_sync_request(data)
        _check_sender(request.sender, peer)
        if self._beliefs.silent:
            raise PeerError("this peer is silent: another one runs with its identity")
        me = self._roster.me
        if request.sender.peer == me.peer:
            return wire.encode_sync(SyncReply(me, (), (), same=True)), self._meet_myself(now, request.sender)
        effects = self._take(now, request)
        me = self._roster.me  # the request may have had me refute
        if request.view and request.view == self._beliefs.view(now):
            return wire.encode_sync(SyncReply(me, (), (), same=True)), effects
        return wire.fill_sync(SyncReply, me, self._rumors(now), self._told_records(now)), effects

    def handle_reply(self, now: float, peer: PeerId, data: bytes) -> list[Effect]:
        """PeerError: state unchanged."""
        reply = wire.read_sync_reply(data)
        _check_sender(reply.sender, peer)
        if reply.sender.peer == self._roster.me.peer:
            return self._meet_myself(now, reply.sender)
        asked = reply.sender.peer in self._asked
        self._asked.pop(reply.sender.peer, None)
        effects = self._take(now, reply)
        if asked and not reply.same:
            self._counters["views_differed"] += 1
            effects += self.tell(now, reply.sender.peer)
        return effects

    def take_records(self, now: float, records: Iterable[Record]) -> list[Effect]:
        """Keep those that are newer than what is held, of peers that are known."""
        effects: list[Effect] = []
        for record in records:
            if self._roster.get(record.peer) is None:
                self._counters["records_unknown"] += 1
            elif self._records.offer(now, record):
                effects.append(RecordChanged(record.peer, record.data))
            else:
                self._counters["records_stale"] += 1
        return effects

    def _take(self, now: float, message: SyncRequest | SyncReply) -> list[Effect]:
        effects = self._beliefs.hear(now, Rumor(message.sender), urgent=True)
        for rumor in message.rumors:
            effects += self._beliefs.hear(now, rumor, synced=True)
        return effects + self.take_records(now, message.records)

    def _meet_myself(self, now: float, sender: Member) -> list[Effect]:
        """By an address of mine that I did not know as mine; or this identity runs a second time, which TLS has just proved."""
        if sender.boot == self._roster.me.boot:
            self._counters["syncs_own"] += 1
            return []
        return self._beliefs.meet_clone(now, sender)

    def _rumors(self, now: float) -> list[Rumor]:
        others = [member for member in self._roster.members() if member.peer != self._roster.me.peer]
        others.sort(key=lambda member: member.liveness)
        return [self._beliefs.rumor(now, member.peer) for member in others]

    def _told_records(self, now: float) -> list[Record]:
        """Those of the dead, too: whoever comes next must know what a machine that is off could run."""
        return self._records.records(now, [member.peer for member in self._roster.members()])


def _check_sender(sender: Member, peer: PeerId) -> None:
    """Who speaks for somebody else is not listened to: it could have me fall silent as a clone."""
    if sender.peer != peer:
        raise PeerError("a push/pull names another sender than its certificate")
