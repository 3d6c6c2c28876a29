"""How the peers of a mesh come to have the same ring of keys.

Two peers tell each other, over mutual TLS, what each may know of the other's ring, and both merge (`keyring.py`). Whoever
missed a step of a change catches up by itself: each peer says in its telemetry which keys it has, and by a digest how its
ring stands; whoever sees another digest asks for the difference, one exchange a second, with growing pauses for who has
nothing new.

Secrets stand in the bodies of these exchanges and nowhere else: not in answers to people, not in telemetry, not in logs.
"""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import Final

from aiohttp import web

from meshq.errors import MeshqError
from meshq.ids import PeerId
from meshq.peers import Peers
from meshq.trust import keyring
from meshq.trust.certificates import server_name
from meshq.trust.keyholder import KeyHolder
from meshq.trust.keyring import RING_BYTES_MAX, Offer
from meshq.web.gate import peer_of_request, read_capped

log = logging.getLogger("meshq.web")

RING_PATH: Final = "/trust/ring"
EXCHANGE_SECONDS: Final = 5.0  # for one peer to answer
AT_ONCE: Final = 32  # exchanges under way for one command
LOOK_SECONDS: Final = 1.0
PAUSE_MIN: Final = 2.0
PAUSE_MAX: Final = 300.0
SETTLE_PEERS: Final = 3  # that a newcomer asks what the mesh is called
NAMES_SHOWN: Final = 8

Ask = Callable[[PeerId, bytes], Awaitable[bytes]]
"""POST the body to the peer's RING_PATH, within EXCHANGE_SECONDS; its answer. MeshqError if there is none."""

Answer = Offer | MeshqError


@dataclass(slots=True)
class _Pause:
    """Until when a peer whose ring stood so is left alone."""

    stood: tuple[str, str]  # its digest and mine
    seconds: float
    until: float


class KeyExchange:
    """One for an agent."""

    def __init__(self, *, holder: KeyHolder, peers: Peers, ask: Ask) -> None:
        self.holder = holder
        self.counters: Counter[str] = Counter()
        self._peers = peers
        self._ask = ask
        self._pauses: dict[PeerId, _Pause] = {}
        self._complained = ""

    async def handle_request(self, request: web.Request) -> web.Response:
        """`POST RING_PATH` of the peer port."""
        peer = PeerId(peer_of_request(request))
        body = await read_capped(request, RING_BYTES_MAX)
        connection = request.transport.get_extra_info("ssl_object") if request.transport is not None else None
        return web.Response(body=await self.answer(peer, self.holder.proven_by(connection), body))

    async def answer(self, peer: PeerId, proven: str, body: bytes) -> bytes:
        """What this peer may know of the ring, after its own offer was taken over; `proven` is the id of the key that its
        certificate is of. MalformedData: nothing has changed."""
        await self._learn(peer, keyring.decode_offer(body))
        return keyring.encode(self.holder.offer(peer, proven))

    async def exchange(self, peer: PeerId) -> Offer:
        """Tell each other; what the other said. MeshqError if it does not answer, or with something else."""
        answer = keyring.decode_offer(await self._ask(peer, keyring.encode(self.holder.offer(peer))))
        await self._learn(peer, answer)
        self.counters["exchanges"] += 1
        return answer

    async def exchange_with_all(self, peers: Collection[PeerId]) -> dict[PeerId, Answer]:
        """What each of them answered, or why it did not."""
        turns = asyncio.Semaphore(AT_ONCE)

        async def exchange(peer: PeerId) -> Answer:
            async with turns:
                try:
                    return await self.exchange(peer)
                except MeshqError as error:
                    return error

        answers = await asyncio.gather(*(exchange(peer) for peer in peers))
        return dict(zip(peers, answers, strict=True))

    async def settle(self) -> None:
        """For a peer that has just met others: learn what the mesh is called, if it has ever changed its key."""
        if self.holder.ring.use.revision == 0:
            await self.exchange_with_all(self._peers.others_alive()[:SETTLE_PEERS])

    async def run(self) -> None:
        """Catch up, and let others catch up, for as long as the agent lives."""
        clock = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            self._complain()
            if (peer := self.due(clock())) is None:
                continue
            try:
                await self.exchange(peer)
            except MeshqError as error:
                self.counters["exchanges failed"] += 1
                log.debug("no exchange of keys with %s: %s", self._peers.name(peer), error)

    def due(self, now: float) -> PeerId | None:
        """Whom to ask now: one of those whose ring is another than mine, and who were not asked about just that."""
        alive = self._peers.others_alive()
        self._pauses = {peer: pause for peer, pause in self._pauses.items() if peer in alive}
        candidates = [peer for peer in alive if self._differs(peer) and self._may(now, peer)]
        if not candidates:
            return None
        peer = random.choice(candidates)
        stood, pause = self._stand(peer), self._pauses.get(peer)
        seconds = min(PAUSE_MAX, 2 * pause.seconds) if pause is not None and pause.stood == stood else PAUSE_MIN
        self._pauses[peer] = _Pause(stood, seconds, now + seconds)
        return peer

    @property
    def refusing(self) -> tuple[str, ...]:
        """Names of the machines at whose addresses somebody answered with a key that is unknown here, while nobody is alive."""
        if self._peers.others_alive():
            return ()
        strangers = self.holder.strangers
        members = (*self._peers.members(), *self._peers.remembered())
        return tuple(sorted(each.name for each in members if server_name(each.peer) in strangers))

    @property
    def problem(self) -> str:
        """Why nobody accepts this peer, as far as that can be known; empty if somebody does, or nobody was there to refuse."""
        refusing = self.refusing
        if not refusing:
            return ""
        return (
            f"at the addresses of {listed(refusing)} somebody answers with a key that is unknown here: this mesh has changed "
            "its key while this machine was away, or others have these addresses now; `meshq key` on a machine of the mesh "
            "prints its key, and here `meshq key install --key-file F` and `meshq key use ID` take it over"
        )

    async def _learn(self, peer: PeerId, offer: Offer) -> None:
        if await self.holder.absorb(offer):
            log.info("the ring of keys has changed by what %s told", self._peers.name(peer))

    def _complain(self) -> None:
        """Once for each thing that there is to say."""
        if (problem := self.problem) != self._complained:
            self._complained = problem
            if problem:
                log.warning("%s", problem)

    def _stand(self, peer: PeerId) -> tuple[str, str]:
        return self._peers.telemetry(peer).ring, self.holder.digest

    def _differs(self, peer: PeerId) -> bool:
        theirs, mine = self._stand(peer)
        return theirs not in ("", mine)

    def _may(self, now: float, peer: PeerId) -> bool:
        pause = self._pauses.get(peer)
        return pause is None or now >= pause.until or pause.stood != self._stand(peer)


def listed(words: Collection[str]) -> str:
    """With commas, as many as a line of text can take."""
    shown = list(words)[:NAMES_SHOWN]
    return ", ".join(shown + ([f"{len(words) - NAMES_SHOWN} more"] if len(words) > NAMES_SHOWN else []))
