"""Who is in the mesh, as far as this peer knows: gossip and its shell, the names of peers, how they meet, and what follows.

The agent's gossip side. It makes the core and its shell, keeps `Peers` as new as the beliefs, gives this peer a name of its
own, and tells the agent, by `Hooks`, whatever the ledger must know. No rules of gossip are here.
"""

import asyncio
import logging
import os
import random
import socket
import time
from collections.abc import Callable, Collection, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Final, assert_never

from meshq import config
from meshq.config import Home
from meshq.errors import StoreError
from meshq.gossip import effects as does
from meshq.gossip import streams
from meshq.gossip.addresses import own_addresses
from meshq.gossip.member import Address, Liveness, Member
from meshq.gossip.profile import PROFILES
from meshq.gossip.swim import Swim
from meshq.gossip.transport import GossipShell
from meshq.ids import Epoch, PeerId
from meshq.machine import load_name, next_epoch, store_epoch, store_name
from meshq.meeting import Meeting
from meshq.names import STEPS, HeldName, first_name, free_name
from meshq.peers import Peers
from meshq.settings import Settings, default_name
from meshq.task import Telemetry
from meshq.telemetry import is_urgent
from meshq.web.documents import UNKNOWN_LINK, PeerFacts
from meshq.web.peer_client import PeerClient, Share

log = logging.getLogger("meshq.agent")

BOOT_BITS: Final = 63
FIGURES_SECONDS: Final = 1.0  # until the agent hears of new telemetry in which nothing is new for placement


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """What the agent is told. The callbacks must return at once."""

    on_views: Callable[[], None]  # who is alive, or what somebody has, is another now
    on_note: Callable[[PeerId, bytes], None]  # what a peer's ledger says
    on_stall: Callable[[float], None]  # this process stood still for so many seconds
    on_capacity: Callable[[], None]  # `problem` is another now
    track: Callable[[Coroutine[Any, Any, Any], str], object]  # run this as long as the agent lives


class Membership:
    """One for an agent, made inside a running event loop. `seal` and `open` are those of the key holder."""

    def __init__(
        self, *, home: Home, settings: Settings, me: PeerId, udp: socket.socket, port: int, telemetry: Telemetry,
        seal: Callable[[bytes], bytes], open: Callable[[bytes], bytes | None], client: Callable[[], PeerClient],
        hooks: Hooks, clock: Callable[[], float], strangers: Callable[[], Collection[str]] = tuple,
    ) -> None:  # fmt: skip
        """`strangers`: see `Meeting`."""
        self._home = home
        self._settings = settings
        self._port = port
        self._client = client
        self._hooks = hooks
        self._clock = clock
        self._views_due = False
        self._figures_due: asyncio.TimerHandle | None = None
        self._wanted_name = settings.name or default_name()
        self._held_name = load_name(home.name, me, self._wanted_name)
        self._renamed = asyncio.Event()
        now = clock()
        member = self._first_member(me)
        self.peers = Peers(member, telemetry, now)
        core = Swim(member, PROFILES[settings.profile], random.Random(os.urandom(16)), now)
        self.gossip = GossipShell(
            core, udp, seal=seal, open=open, sync=self._sync, stream=self._stream,
            on_effect=self._effect, clock=clock, on_stall=hooks.on_stall,
        )  # fmt: skip
        self.meeting = Meeting(
            settings=settings, path=home.known_peers, gossip=self.gossip, peers=self.peers,
            addresses=self.addresses, clock=clock, rng=random.Random(os.urandom(16)), strangers=strangers,
            on_forgotten=self._views_changed,
        )  # fmt: skip

    def _first_member(self, me: PeerId) -> Member:
        held = self._held_name
        return Member(
            peer=me,
            epoch=next_epoch(self._home.epoch),
            incarnation=0,
            liveness=Liveness.ALIVE,
            name=self._wanted_name if held is None else held.name,
            addresses=self.addresses(),
            version=version("meshq"),
            started_at=int(time.time()),
            boot=random.SystemRandom().getrandbits(BOOT_BITS),
            named=0 if held is None else held.named,
        )

    def recall(self) -> None:
        """Read who was known when the agent ran last, and take no name of theirs. Blocking, and before all else."""
        self.meeting.recall()
        name = first_name(self._wanted_name, self._held_name, self.peers.remembered())
        if name != self.core.me.name:
            self._rename(name)

    async def keep_name(self) -> None:
        """Have the name for longer and longer, and again after the next start. It begins when others were looked for."""
        while True:
            me = self.core.me
            await self._store_name(HeldName(peer=me.peer, wanted=self._wanted_name, name=me.name, named=me.named))
            with suppress(TimeoutError):
                async with asyncio.timeout(self._step_pause()):
                    await self._renamed.wait()
            if self._renamed.is_set():
                self._renamed.clear()
            else:
                self.gossip.rename(me.name, me.named + 1)

    def _step_pause(self) -> float | None:
        """Seconds until the next step; None if there is none, or nobody may hear of it."""
        me = self.core.me
        ended = self.core.silent or me.liveness is Liveness.LEFT or me.named >= len(STEPS)
        return None if ended else STEPS[me.named]

    async def leave(self) -> None:
        """Say left, and give up the name: who comes back is a newcomer."""
        await self.gossip.leave()
        with suppress(OSError):
            self._home.name.unlink(missing_ok=True)

    @property
    def core(self) -> Swim:
        """For views only; inputs go through the shell."""
        return self.gossip.core

    def addresses(self) -> tuple[Address, ...]:
        """Where others may reach this machine now."""
        return own_addresses(self._port, self._settings.bind or "")

    def facts(self) -> list[PeerFacts]:
        """All peers that are known, for people; those of an earlier run that have not shown up are among them."""
        now, me = self._clock(), self.core.me
        facts = []
        for member in (*self.peers.members(), *self.peers.remembered()):
            mine = member.peer == me.peer
            addresses = self.addresses() if mine else self.core.addresses(member.peer) or member.addresses
            facts.append(
                PeerFacts(
                    member=me if mine else member,
                    address=next(iter(addresses), None),
                    telemetry=self.peers.telemetry(member.peer),
                    age=0.0 if mine else self.core.record_age(now, member.peer),
                    connectivity=None if mine else self.core.connectivity(now, member.peer) or UNKNOWN_LINK,
                )
            )
        return facts

    @property
    def damped(self) -> bool:
        """Is that this peer flaps all that gossip has against it?"""
        return not (self.core.silent and self.core.clone is not None) and self.core.damped(self._clock()) > 0

    @property
    def problem(self) -> str:
        """Why this peer must claim nothing, in words; empty if gossip has nothing against it."""
        if self.core.silent and self.core.clone is not None:
            return f"another agent, {_where(self.core.clone)}, runs with the identity of this one"
        seconds = self.core.damped(self._clock())
        if self.damped:
            return f"others took it for dead several times within a minute; it claims again in {seconds:.0f} s if that stops"
        return ""

    def refused(self, peer: PeerId) -> None:
        """A connection to the peer was refused: gossip may want to know why."""
        self.gossip.refused(peer)

    def asked_by_tcp(self, peer: PeerId, answered: bool) -> None:
        """A request to the peer was answered, or got nowhere: people want to know."""
        self.gossip.asked_by_tcp(peer, answered)

    def tell_views(self) -> None:
        """Have the agent look at the views now."""
        self._views_due = False
        if self._figures_due is not None:
            self._figures_due.cancel()
            self._figures_due = None
        self._check_name()  # here, and not while gossip still carries out the effects that brought the other name
        self._hooks.on_views()

    def _views_changed(self) -> None:
        """Tell the agent once for all that this turn of the loop brings."""
        if not self._views_due:
            self._views_due = True
            asyncio.get_running_loop().call_soon(self.tell_views)

    def _check_name(self) -> None:
        me = self.core.me
        name = free_name(self._wanted_name, me, (*self.peers.members(), *self.peers.remembered()))
        if name != me.name:
            log.warning("another peer is called %s, too: this one is %s now", me.name, name)
            self._rename(name)

    def _rename(self, name: str) -> None:
        self.gossip.rename(name)
        self._renamed.set()

    def _effect(self, effect: does.Effect) -> None:
        match effect:
            case does.MemberChanged(before, after):
                self._handle_member(before, after)
            case does.RecordChanged(peer, record):
                self._handle_record(peer, record)
            case does.NoteHeard(peer, note):
                self._hooks.on_note(peer, note)
            case does.ProbeFailed(peer):
                log.info("%s does not answer probes", self.peers.name(peer))
            case does.Refuted(statement):
                self._handle_refuted(statement)
            case does.TransportChanged(peer, udp):
                self._handle_transport(peer, udp)
            case does.Cloned(other, newer):
                self._handle_clone(other, newer)
            case does.Send() | does.Stream() | does.Answer() | does.Sync():
                pass  # the shell's own
            case _:
                assert_never(effect)

    def _handle_member(self, before: Member | None, after: Member) -> None:
        if before is not None and after.peer == self.core.me.peer and before.addresses != after.addresses:
            self._hooks.track(self._client().renew(), "connections from elsewhere")
        if before is None or (before.liveness, before.epoch) != (after.liveness, after.epoch):
            log.info("%s (%s) is %s", after.name, after.peer[:8], after.liveness.name.lower())
        self.peers.handle_member(self._clock(), after)
        self.meeting.handle_change()
        self._views_changed()

    def _handle_record(self, peer: PeerId, record: bytes) -> None:
        """What placement reads counts at once. Figures may wait for others: in a mesh of 600 there are 50 records a second, and
        all views are told anew each time."""
        before = self.peers.telemetry(peer)
        self.peers.handle_record(peer, record)
        if is_urgent(before, self.peers.telemetry(peer)):
            self._views_changed()
        elif self._figures_due is None:
            self._figures_due = asyncio.get_running_loop().call_later(FIGURES_SECONDS, self._views_changed)

    def _handle_refuted(self, statement: Member) -> None:
        if statement.liveness is Liveness.ALIVE:
            log.warning("another run of this peer, epoch %d, is known; outbid", statement.epoch)
        else:
            log.warning("this peer was held %s; refuted", statement.liveness.name.lower())
        self._hooks.track(self._store_epoch(self.core.me.epoch), "epoch")
        if self.core.damped(self._clock()) > 0:
            log.warning("%s", self.problem)
            self._hooks.on_capacity()

    async def _store_name(self, held: HeldName) -> None:
        """If the disk refuses, the next start may be as a newcomer."""
        try:
            await asyncio.to_thread(store_name, self._home.name, held)
        except StoreError as error:
            log.warning("%s", error)

    async def _store_epoch(self, epoch: Epoch) -> None:
        """Above the other run's, if there was one. If the disk refuses, the next start is refuted once more."""
        try:
            await asyncio.to_thread(store_epoch, self._home.epoch, epoch)
        except StoreError as error:
            log.warning("%s", error)

    def _handle_transport(self, peer: PeerId, udp: bool) -> None:
        name = self.peers.name(peer)
        if udp:
            log.info("%s is reached by UDP", name)
            return
        log.warning(
            "%s is reached over TCP only: UDP packets are lost on the way. The mesh works, more slowly; open UDP port %d in "
            "the firewalls of both machines (`meshq doctor` tells more)", name, self._port,
        )  # fmt: skip

    def _handle_clone(self, other: Member, newer: bool) -> None:
        """A home was copied, or restored while its first copy lives. Both say so; the newer of the two must go."""
        if not newer:
            log.warning(
                "another agent, %s, runs with a copy of this home and so with its identity; it was told to stop", _where(other)
            )
            return
        log.error(
            "this home is a copy: another agent, %s, runs with the same identity and for longer. This one takes no part and "
            "claims no task. To make it a peer of its own: stop it, remove %s, and join again",
            _where(other), self._home.identity,
        )  # fmt: skip
        self._hooks.on_capacity()

    async def _sync(self, sync: does.Sync) -> tuple[PeerId, bytes]:
        path, limit, client = "/gossip/sync", config.SYNC_BYTES_MAX, self._client()
        if sync.peer is None:
            return await client.post_seed(sync.address, path, sync.request, answer_bytes_max=limit)
        extra = (sync.address,)
        answer = await client.post(sync.peer, path, sync.request, answer_bytes_max=limit, extra=extra, share=Share.GOSSIP)
        return sync.peer, answer

    async def _stream(self, peer: PeerId, packet: bytes) -> tuple[bytes, ...]:
        answer = await self._client().post(
            peer, streams.PATH, packet,
            answer_bytes_max=streams.ANSWER_BYTES_MAX, seconds=streams.STREAM_SECONDS, share=Share.GOSSIP,
        )  # fmt: skip
        return streams.read_answer(answer)


def _where(member: Member) -> str:
    place = f" at {member.addresses[0]}" if member.addresses else ""
    return f"{member.name}{place}"
