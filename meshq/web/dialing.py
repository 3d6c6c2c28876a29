"""Connecting to whoever answers first, of several addresses that are said to lead to one peer.

A lab machine has many addresses, and most are wrong for somebody: a docker bridge that every host has, a VPN that is off,
an IPv6 prefix of last week. Some refuse at once, some lead to another agent, some swallow every packet, and some take the
connection and then say nothing. So the candidates race (happy eyeballs, RFC 8305): the next one starts when the one before
it failed, or 250 ms after it; the first to finish wins, where to finish means that its TLS handshake has proved the
identity that was wanted, not just that somebody took the connection. All others are closed.

aiohttp's own race ends with the TCP connection. Its winner may be a stranger, or an agent that is stopped, and then it
waits for that one's handshake alone until the time for connecting is over, and drops the first address of its list,
whichever had won.
"""

import asyncio
import os
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Final, Generic, TypeVar

from meshq.gossip.member import Address

T = TypeVar("T")

DELAY_SECONDS: Final = 0.25  # RFC 8305 section 5: long enough for any LAN, too short for a person to notice
CONNECT_SECONDS: Final = 4.0  # for all of them: the last of 8 starts after 1.75 s at the latest, and still has 2

FAILURES: Final = (OSError, asyncio.TimeoutError)  # ssl.SSLError is an OSError, too


class NobodyAnswers(Exception):
    """No candidate led to the one who was wanted. State: no connection is left."""

    def __init__(self, failures: Sequence[tuple[Address, str]], *, refused: bool = False, foreign: bool = False) -> None:
        super().__init__("; ".join(f"{address}: {why}" for address, why in failures) or "any address: none is known")
        self.failures = tuple(failures)
        self.refused = refused  # behind one of the addresses is a machine on which nobody listens
        self.foreign = foreign  # behind one of them somebody else listens


async def race(
    candidates: Sequence[Address], dial: Callable[[Address], Awaitable[T]], discard: Callable[[T], None],
    *, delay: float = DELAY_SECONDS, seconds: float = CONNECT_SECONDS,
) -> tuple[Address, T]:  # fmt: skip
    """The first connection that `dial` makes, and where to. `discard` closes one that came second.

    `dial` raises OSError if it can't. NobodyAnswers: all failed, or none was done in `seconds`.
    """
    contest = _Race(dial, discard)
    waiting = deque(dict.fromkeys(candidates))
    try:
        async with asyncio.timeout(seconds):
            while waiting or contest.running:
                if waiting:
                    contest.start(waiting.popleft())
                if (won := await contest.wait(delay if waiting else None)) is not None:
                    return won
    except TimeoutError:
        contest.give_up(waiting)
    finally:
        await contest.end()
    raise NobodyAnswers(contest.failures, refused=contest.refused, foreign=contest.foreign)


class _Race(Generic[T]):
    """What is under way. Made by `race` alone, which ends it."""

    def __init__(self, dial: Callable[[Address], Awaitable[T]], discard: Callable[[T], None]) -> None:
        self._dial = dial
        self._discard = discard
        self.running: dict[asyncio.Future[T], Address] = {}
        self.failures: list[tuple[Address, str]] = []
        self.refused = False
        self.foreign = False

    def start(self, address: Address) -> None:
        self.running[asyncio.ensure_future(self._dial(address))] = address

    async def wait(self, seconds: float | None) -> tuple[Address, T] | None:
        """Until one is done, or it is the next one's turn; the winner, if there is one."""
        done, _ = await asyncio.wait(self.running, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for attempt in [attempt for attempt in self.running if attempt in done]:  # in the order of preference
            error = attempt.exception()
            if error is None:
                return self.running.pop(attempt), attempt.result()
            address = self.running.pop(attempt)
            if not isinstance(error, FAILURES):
                raise error
            self.refused |= isinstance(error, ConnectionRefusedError | ConnectionResetError)
            self.foreign |= isinstance(error, ssl.SSLError)
            self.failures.append((address, why(error)))
        return None

    def give_up(self, waiting: Sequence[Address]) -> None:
        self.failures += [(address, "no answer in time") for address in self.running.values()]
        self.failures += [(address, "not tried in time") for address in waiting]

    async def end(self) -> None:
        """Nothing that was begun is left: what is under way is given up, what came second is closed."""
        for attempt in self.running:
            attempt.cancel()
        for result in await asyncio.gather(*self.running, return_exceptions=True):
            if not isinstance(result, BaseException):
                with suppress(OSError):
                    self._discard(result)
        self.running.clear()


def why(error: BaseException) -> str:
    """For people: why a connection was not made, or did not last."""
    match error:
        case ssl.SSLCertVerificationError():
            return "somebody else answers there, or another mesh"
        case ssl.SSLError():
            return f"no peer answers there ({error.reason or error})"
        case TimeoutError():
            return "no answer in time"
        case OSError(errno=int(number)):
            return os.strerror(number)
        case _:
            return str(error) or type(error).__name__
