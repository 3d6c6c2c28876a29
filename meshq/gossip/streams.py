"""Packets over TCP: to peers whom UDP does not reach, and for the probe that tells a blocked UDP from a dead peer.

A packet is the body of one request to the peer, over mutual TLS, and what the peer wants to say at once is the answer: zero or
more packets. Nothing is sealed, since TLS is better than the seal: it proves which member speaks.

A peer that does not answer takes seconds to be given up, and what is for it must neither wait for ever nor hold up what is for
others. So each peer has two lanes: one for pings and what answers them, where waiting is worthless, and one for gossip. A lane
has one request under way and a few packets that wait; one more, and the oldest is dropped and counted, as UDP would have done.
All lanes together have STREAMS_MAX requests under way. Of the lanes that have to wait for that, those with pings go first.
"""

import asyncio
import functools
import logging
from collections import Counter, OrderedDict, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from meshq import codec
from meshq.errors import MalformedData, MeshqError
from meshq.gossip import wire
from meshq.gossip.effects import Stream
from meshq.gossip.wire import GossipOnly
from meshq.ids import PeerId

log = logging.getLogger("meshq.gossip")

PATH: Final = "/gossip/packet"
STREAM_SECONDS: Final = 5.0  # a second more than connecting may take; by then the prober has long made up its mind
STREAMS_MAX: Final = 64  # under way; each is a connection at first
WAITING_MAX: Final = 4  # packets of one lane
WAITING_TOTAL_MAX: Final = 1_024  # packets of all lanes: a megabyte
ANSWERS_MAX: Final = 8  # packets: an ack, corrections, telemetry that was asked for
ANSWER_BYTES_MAX: Final = ANSWERS_MAX * (wire.PACKET_PLAIN_BYTES_MAX + 3) + 8

COUNTERS: Final = ("streams", "streams_failed", "streams_dropped", "answers_dropped", "answers_refused")

Ask = Callable[[PeerId, bytes], Awaitable[tuple[bytes, ...]]]
Lane = tuple[PeerId, bool]


@dataclass(frozen=True, slots=True)
class _Answers:
    """The body of an answer."""

    packets: tuple[bytes, ...]


def write_answer(packets: Sequence[bytes]) -> bytes:
    """At most ANSWERS_MAX packets, as the other side's `read_answer` takes them."""
    assert len(packets) <= ANSWERS_MAX
    return codec.encode(_Answers(tuple(packets)))


def read_answer(data: bytes) -> tuple[bytes, ...]:
    """The packets in an answer. MalformedData if it is none, or more than an answer may hold."""
    packets = codec.decode(_Answers, data, bytes_max=ANSWER_BYTES_MAX, items_max=ANSWERS_MAX).packets
    if any(len(packet) > wire.PACKET_PLAIN_BYTES_MAX for packet in packets):
        raise MalformedData("gossip: a packet in an answer is too long")
    return packets


class Streams:
    """What is under way and what waits. `answered` and `failed` are called for each stream that ends while this runs."""

    def __init__(
        self,
        ask: Ask,
        answered: Callable[[PeerId, tuple[bytes, ...]], None],
        failed: Callable[[PeerId], None],
        counters: Counter[str],
    ) -> None:
        """`ask` raises MeshqError if nobody answers."""
        self._ask = ask
        self._answered = answered
        self._failed = failed
        self._counters = counters
        self._waiting: dict[Lane, deque[bytes]] = {}
        self._waiting_total = 0
        self._ready: dict[bool, OrderedDict[Lane, None]] = {True: OrderedDict(), False: OrderedDict()}  # free, with packets
        self._under_way: dict[Lane, asyncio.Task[None]] = {}

    def send(self, stream: Stream) -> None:
        """Now, or when the lane is free."""
        lane = (stream.peer, _is_urgent(stream.packet))
        if len(self._waiting.get(lane, ())) >= WAITING_MAX:
            self._counters["streams_dropped"] += 1
            self._take(lane)  # the oldest: what is new says more
        elif self._waiting_total >= WAITING_TOTAL_MAX:
            self._counters["streams_dropped"] += 1
            return
        self._waiting.setdefault(lane, deque()).append(stream.packet)
        self._waiting_total += 1
        self._pump(lane)

    async def stop(self) -> None:
        """End what is under way, forget what waits."""
        self._waiting.clear()
        self._waiting_total = 0
        for ready in self._ready.values():
            ready.clear()
        under_way = list(self._under_way.values())
        for loop_task in under_way:
            loop_task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)

    def _take(self, lane: Lane) -> bytes:
        waiting = self._waiting[lane]
        packet = waiting.popleft()
        self._waiting_total -= 1
        if not waiting:
            del self._waiting[lane]
        return packet

    def _pump(self, lane: Lane) -> None:
        """Start what may start, now that something about this lane changed."""
        if lane in self._waiting and lane not in self._under_way:
            self._ready[lane[1]].setdefault(lane)
        while len(self._under_way) < STREAMS_MAX and (ready := self._ready[True] or self._ready[False]):
            chosen, _ = ready.popitem(last=False)
            work = self._ask_peer(chosen[0], self._take(chosen))
            loop_task = asyncio.get_running_loop().create_task(work, name=f"gossip stream {chosen[0][:8]}")
            self._under_way[chosen] = loop_task
            loop_task.add_done_callback(functools.partial(self._end, chosen))

    def _end(self, lane: Lane, ended: asyncio.Task[None]) -> None:
        del self._under_way[lane]
        self._pump(lane)

    async def _ask_peer(self, peer: PeerId, packet: bytes) -> None:
        self._counters["streams"] += 1
        try:
            async with asyncio.timeout(STREAM_SECONDS):
                packets = await self._ask(peer, packet)
            self._answered(peer, packets)
            return
        except (MeshqError, TimeoutError) as error:
            log.debug("packet over TCP to %s: %s", peer[:8], str(error) or "no answer in time")
        except Exception:
            log.exception("bug: packet over TCP to %s", peer[:8])
        self._counters["streams_failed"] += 1
        self._failed(peer)


def _is_urgent(packet: bytes) -> bool:
    """Does somebody wait for it, or for the answer to it?"""
    return not isinstance(wire.read_packet(packet).message, GossipOnly)
