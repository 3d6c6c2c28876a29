"""Packets over TCP: what waits for what, and what is dropped."""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from meshq.errors import MeshqError, Unreachable
from meshq.gossip import streams
from meshq.gossip.effects import Stream
from meshq.gossip.streams import STREAMS_MAX, WAITING_MAX, WAITING_TOTAL_MAX, Streams
from meshq.gossip.wire import GossipOnly, Ping
from meshq.ids import PeerId
from tests.gossip.builders import packet, peer


def ping(number: int) -> bytes:
    return packet("a", Ping(number, peer("b")))


def gossip(number: int) -> bytes:
    return packet("a", GossipOnly(), epoch=number)


class Desk:
    """Asks are answered when the test says so."""

    def __init__(self) -> None:
        self.counters: Counter[str] = Counter()
        self.asked: list[tuple[PeerId, bytes]] = []
        self.answers: dict[bytes, asyncio.Future[tuple[bytes, ...]]] = {}
        self.ended: list[tuple[PeerId, tuple[bytes, ...] | None]] = []
        self.streams = Streams(
            self.ask, lambda who, packets: self.ended.append((who, packets)),
            lambda who: self.ended.append((who, None)), self.counters,
        )  # fmt: skip

    async def ask(self, who: PeerId, data: bytes) -> tuple[bytes, ...]:
        self.asked.append((who, data))
        self.answers[data] = asyncio.get_running_loop().create_future()
        return await self.answers[data]

    async def send(self, who: str, *packets: bytes) -> None:
        for data in packets:
            self.streams.send(Stream(peer(who), data))
        await settle()

    async def answer(self, data: bytes, *packets: bytes) -> None:
        self.answers[data].set_result(packets)
        await settle()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def at_a_desk(story: Callable[[Desk], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        desk = Desk()
        try:
            await story(desk)
        finally:
            await desk.streams.stop()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())


def test_packets_of_one_lane_go_one_after_the_other_and_answers_come_back() -> None:
    async def story(desk: Desk) -> None:
        await desk.send("b", gossip(1), gossip(2))
        assert desk.asked == [(peer("b"), gossip(1))]
        await desk.answer(gossip(1), b"one", b"two")
        assert desk.asked == [(peer("b"), gossip(1)), (peer("b"), gossip(2))]
        assert desk.ended == [(peer("b"), (b"one", b"two"))]

    at_a_desk(story)


def test_a_ping_does_not_wait_behind_gossip_nor_gossip_behind_a_ping() -> None:
    async def story(desk: Desk) -> None:
        await desk.send("b", gossip(1), ping(1))
        await desk.send("c", ping(2), gossip(2))
        assert [data for _, data in desk.asked] == [gossip(1), ping(1), ping(2), gossip(2)]

    at_a_desk(story)


def test_the_oldest_that_waits_makes_room_and_is_counted() -> None:
    async def story(desk: Desk) -> None:
        await desk.send("b", *(ping(number) for number in range(WAITING_MAX + 3)))
        assert desk.counters["streams_dropped"] == 2
        for _ in range(WAITING_MAX + 1):
            await desk.answer(desk.asked[-1][1])
        assert [data for _, data in desk.asked] == [ping(0), *(ping(number) for number in range(3, WAITING_MAX + 3))]

    at_a_desk(story)


def test_so_many_at_once_and_then_pings_first() -> None:
    async def story(desk: Desk) -> None:
        for number in range(STREAMS_MAX):
            await desk.send(f"peer {number}", gossip(number))
        await desk.send("b", gossip(1_000))
        await desk.send("c", ping(1))
        assert len(desk.asked) == STREAMS_MAX
        await desk.answer(gossip(0))
        assert desk.asked[-1] == (peer("c"), ping(1))
        await desk.answer(gossip(1))
        assert desk.asked[-1] == (peer("b"), gossip(1_000))

    at_a_desk(story)


def test_what_waits_is_bounded_however_many_peers_there_are() -> None:
    async def story(desk: Desk) -> None:
        for number in range(STREAMS_MAX + WAITING_TOTAL_MAX + 10):
            desk.streams.send(Stream(peer(f"peer {number}"), gossip(number)))
        assert desk.counters["streams_dropped"] == 10
        assert sum(map(len, desk.streams._waiting.values())) == desk.streams._waiting_total == WAITING_TOTAL_MAX

    at_a_desk(story)


@pytest.mark.parametrize("error", [Unreachable("nobody there"), MeshqError("refused"), ZeroDivisionError()])
def test_a_stream_without_an_answer_failed_and_the_next_one_goes(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    async def story(desk: Desk) -> None:
        await desk.send("b", ping(1), ping(2))
        desk.answers[ping(1)].set_exception(error)
        await settle()
        assert desk.ended == [(peer("b"), None)] and desk.counters["streams_failed"] == 1
        assert desk.asked[-1] == (peer("b"), ping(2))

    with caplog.at_level(logging.ERROR, "meshq.gossip"):
        at_a_desk(story)
    assert ("bug: packet over TCP" in caplog.text) is isinstance(error, ZeroDivisionError)


def test_a_peer_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "STREAM_SECONDS", 0.01)

    async def story(desk: Desk) -> None:
        await desk.send("b", ping(1))
        async with asyncio.timeout(20):
            while not desk.ended:  # noqa: ASYNC110 what ends is a list that the test reads
                await asyncio.sleep(0.001)
        assert desk.ended == [(peer("b"), None)]

    at_a_desk(story)


def test_after_the_end_nothing_goes_on() -> None:
    async def story(desk: Desk) -> None:
        await desk.send("b", ping(1), ping(2))
        await desk.streams.stop()
        await settle()
        assert desk.asked == [(peer("b"), ping(1))] and desk.ended == []

    at_a_desk(story)
