"""The race between addresses, with connections that do just what each test wants. `test_peer_client` has real ones."""

import asyncio
import errno
import ssl
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from meshq.gossip.member import Address
from meshq.web.dialing import NobodyAnswers, race

FIRST, SECOND, THIRD = (Address(f"192.0.2.{number}", 7733) for number in (1, 2, 3))
NEVER = 3600.0


class Network:
    """Each address answers as its coroutine does; what was dialled, given up and closed is noted, in order."""

    def __init__(self, **hosts: Callable[[], Awaitable[None]]) -> None:
        self.hosts = dict(zip((FIRST, SECOND, THIRD), hosts.values(), strict=False))
        self.dialled: list[Address] = []
        self.given_up: list[Address] = []
        self.closed: list[str] = []

    async def dial(self, address: Address) -> str:
        self.dialled.append(address)
        try:
            await self.hosts[address]()
        except asyncio.CancelledError:
            self.given_up.append(address)
            raise
        return f"to {address.host}"

    async def race(self, *, delay: float = NEVER, seconds: float = 20.0) -> tuple[Address, str]:
        return await race(list(self.hosts), self.dial, self.closed.append, delay=delay, seconds=seconds)


async def answers() -> None:
    await asyncio.sleep(0)


async def swallows() -> None:
    await asyncio.Event().wait()


async def refuses() -> None:
    raise ConnectionRefusedError(111, "no")


async def is_a_stranger() -> None:
    raise ssl.SSLCertVerificationError(1, "Hostname mismatch")


async def is_unreachable() -> None:
    raise OSError(errno.EHOSTUNREACH, "no")


async def is_broken() -> None:
    raise ZeroDivisionError


def run(scenario: Coroutine[Any, Any, None]) -> None:
    async def alone() -> None:
        await scenario
        assert asyncio.all_tasks() == {asyncio.current_task()}, "something goes on"

    asyncio.run(alone())


def test_the_first_that_answers_wins_and_nobody_else_is_asked() -> None:
    async def scenario() -> None:
        network = Network(a=answers, b=answers)
        assert await network.race() == (FIRST, "to 192.0.2.1")
        assert network.dialled == [FIRST]

    run(scenario())


def test_one_that_refuses_is_followed_at_once_by_the_next() -> None:
    async def scenario() -> None:
        network = Network(a=refuses, b=refuses, c=answers)
        assert (await network.race(delay=NEVER))[0] == THIRD
        assert network.dialled == [FIRST, SECOND, THIRD]

    run(scenario())


def test_one_that_swallows_everything_is_overtaken_and_given_up() -> None:
    async def scenario() -> None:
        network = Network(a=swallows, b=swallows, c=answers)
        assert (await network.race(delay=0.01))[0] == THIRD
        assert network.given_up == [FIRST, SECOND] and network.closed == []

    run(scenario())


def test_a_slow_one_that_was_overtaken_may_still_win() -> None:
    async def scenario() -> None:
        go = asyncio.Event()

        async def starts_the_other() -> None:
            go.set()
            await swallows()

        async def waits() -> None:
            await go.wait()

        network = Network(a=waits, b=starts_the_other)
        assert (await network.race(delay=0.01))[0] == FIRST
        assert network.given_up == [SECOND]

    run(scenario())


def test_of_two_that_answer_together_the_preferred_one_wins_and_the_other_is_closed() -> None:
    async def scenario() -> None:
        go = asyncio.Event()

        async def together() -> None:
            await go.wait()

        async def last() -> None:
            go.set()

        network = Network(a=together, b=together, c=last)
        winner, _ = await network.race(delay=0.01)
        assert winner in (FIRST, THIRD)
        assert len(network.closed) + len(network.given_up) == 2
        assert f"to {winner.host}" not in network.closed

    run(scenario())


def test_who_fails_is_named_with_the_reason() -> None:
    async def scenario() -> None:
        with pytest.raises(NobodyAnswers) as caught:
            await Network(a=refuses, b=swallows, c=swallows).race(delay=NEVER, seconds=0.05)
        assert str(caught.value) == (
            "192.0.2.1:7733: Connection refused; 192.0.2.2:7733: no answer in time; 192.0.2.3:7733: not tried in time"
        )
        assert caught.value.refused and not caught.value.foreign
        with pytest.raises(NobodyAnswers) as caught:
            await Network(a=swallows, b=is_a_stranger, c=is_unreachable).race(delay=0.001, seconds=0.05)
        assert caught.value.foreign and not caught.value.refused
        with pytest.raises(NobodyAnswers, match="none is known"):
            await race([], Network().dial, print)

    run(scenario())


def test_a_bug_is_not_taken_for_a_dead_address() -> None:
    async def scenario() -> None:
        network = Network(a=swallows, b=is_broken, c=answers)
        with pytest.raises(ZeroDivisionError):
            await network.race(delay=0.01)
        assert network.given_up == [FIRST]

    run(scenario())


def test_a_race_that_nobody_waits_for_any_more_leaves_nothing_behind() -> None:
    async def scenario() -> None:
        both = asyncio.Event()

        async def is_the_second() -> None:
            both.set()
            await swallows()

        network = Network(a=swallows, b=is_the_second)
        racing = asyncio.ensure_future(network.race(delay=0.01))
        await both.wait()
        racing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await racing
        assert network.given_up == [FIRST, SECOND]

    run(scenario())


def test_an_address_that_is_named_twice_is_tried_once() -> None:
    async def scenario() -> None:
        network = Network(a=refuses)
        with pytest.raises(NobodyAnswers):
            await race([FIRST, FIRST], network.dial, print)
        assert network.dialled == [FIRST]

    run(scenario())
