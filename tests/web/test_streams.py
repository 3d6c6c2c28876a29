"""Chunks for as long as somebody writes and somebody reads, over a real connection."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web

from meshq.errors import Unreachable
from meshq.web import streams
from meshq.web.streams import answer_in_chunks, while_checked

LIMIT = 10.0


async def some(*chunks: bytes, then: BaseException | None = None, forever: bool = False) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk
    if then is not None:
        raise then
    if forever:
        await asyncio.Event().wait()


@asynccontextmanager
async def serving(handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_get("/", handler)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    listener = socket.create_server(("127.0.0.1", 0))
    await web.SockSite(runner, listener).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    finally:
        await runner.cleanup()


def test_chunks_pass_and_nobody_is_asked_while_they_come() -> None:
    async def scenario() -> list[bytes]:
        def check() -> None:
            raise AssertionError("asked")

        return [chunk async for chunk in while_checked(some(b"a", b"b"), check, LIMIT)]

    assert asyncio.run(scenario()) == [b"a", b"b"]


def test_silence_lasts_until_the_check_ends_it() -> None:
    async def scenario() -> tuple[list[bytes], int]:
        asked = 0

        def check() -> None:
            nonlocal asked
            asked += 1
            if asked == 3:
                raise Unreachable("gone")

        got = []
        with pytest.raises(Unreachable):
            async for chunk in while_checked(some(b"a", forever=True), check, 0.01):
                got.append(chunk)
        return got, asked

    assert asyncio.run(scenario()) == ([b"a"], 3)


def test_a_failure_in_the_middle_cuts_the_answer_instead_of_ending_it() -> None:
    async def scenario() -> None:
        async def handler(request: web.Request) -> web.StreamResponse:
            return await answer_in_chunks(request, some(b"half", then=Unreachable("the runner is gone")))

        async with serving(handler) as url, aiohttp.ClientSession() as session, session.get(url) as response:
            with pytest.raises((aiohttp.ClientError, ConnectionError)):
                await response.read()

    asyncio.run(scenario())


def test_a_failure_before_the_first_chunk_is_the_callers() -> None:
    async def scenario() -> int:
        async def handler(request: web.Request) -> web.StreamResponse:
            try:
                return await answer_in_chunks(request, some(then=Unreachable("nobody has it")))
            except Unreachable:
                return web.Response(status=404)

        async with serving(handler) as url, aiohttp.ClientSession() as session, session.get(url) as response:
            return response.status

    assert asyncio.run(scenario()) == 404


def test_a_reader_that_goes_away_ends_even_a_silent_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams.while_checked, "__defaults__", (0.01,))

    async def scenario() -> None:
        ended = asyncio.Event()

        async def handler(request: web.Request) -> web.StreamResponse:
            try:
                return await answer_in_chunks(request, some(b"first", forever=True))
            finally:
                ended.set()

        async with serving(handler) as url, aiohttp.ClientSession() as session:
            async with session.get(url) as response:
                assert await response.content.readany() == b"first"
                response.close()
            async with asyncio.timeout(LIMIT):
                await ended.wait()

    asyncio.run(scenario())
