"""Answers that come in chunks, for as long as somebody writes and somebody reads.

A log may be silent for hours, so silence says nothing about the other side. Whoever waits for the next chunk therefore asks
now and then whether there is still anybody: the server whether its reader is there (a reader that went away would otherwise
hold its place among the peer's requests until the task writes again), the reader whether gossip holds the server alive.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Final, TypeVar

from aiohttp import web

from meshq.errors import MeshqError

log = logging.getLogger("meshq.web")

T = TypeVar("T")

CHECK_SECONDS: Final = 5.0


async def while_checked(
    chunks: AsyncIterator[T], check: Callable[[], None], seconds: float = CHECK_SECONDS
) -> AsyncIterator[T]:
    """The chunks as they come; `check` is called each time that none came for so long, and raises to end it."""
    while True:
        coming = asyncio.create_task(_next(chunks), name="next chunk")
        try:
            while not (await asyncio.wait({coming}, timeout=seconds))[0]:
                check()
        except BaseException:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
            raise
        if (chunk := coming.result()) is None:
            return
        yield chunk


async def _next(chunks: AsyncIterator[T]) -> T | None:
    return await anext(chunks, None)


async def answer_in_chunks(
    request: web.Request, chunks: AsyncIterator[bytes], size: int | None = None, kind: str = "application/octet-stream"
) -> web.StreamResponse:
    """Send the chunks; `size` bytes in all, if that is known.

    The first one is awaited before the status goes out, so that a failure still has one. A later failure cuts the connection,
    so that nobody takes what came for the whole.
    """

    def check() -> None:
        if request.transport is None or request.transport.is_closing():
            raise ConnectionResetError("the reader has gone")

    checked = while_checked(chunks, check)
    try:
        first = await anext(checked, b"")
    except ConnectionResetError:
        return web.Response()  # which nobody reads
    response = web.StreamResponse(headers={"Content-Type": kind})
    if size is None:
        response.enable_chunked_encoding()
    else:
        response.content_length = size
    await response.prepare(request)
    try:
        await response.write(first)
        async for chunk in checked:
            await response.write(chunk)
        await response.write_eof()
    except (MeshqError, OSError) as error:
        log.info("%s broke off: %s", request.path, error)
        if request.transport is not None:
            request.transport.abort()
    return response
