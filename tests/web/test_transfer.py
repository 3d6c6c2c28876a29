"""Bringing a source to others, of which one hangs."""

import asyncio
from typing import Any, cast

import pytest

from meshq.ids import ObjectId, PeerId
from meshq.web import transfer
from meshq.web.transfer import Transfers
from tests.gossip.builders import peer

COMMIT = ObjectId("c" * 40)
LIMIT = 20.0


class Half:
    """A client and a store of one object, of which one peer never answers."""

    def __init__(self, hangs: PeerId) -> None:
        self._hangs = hangs

    def reachable(self, commit: ObjectId) -> list[ObjectId]:
        return [commit]

    def get(self, ids: Any) -> list[tuple[str, bytes]]:
        return [("commit", b"x") for _ in ids]

    def failure(self, who: PeerId) -> str:
        return ""

    async def post(self, who: PeerId, *_: Any, **__: Any) -> bytes:
        if who == self._hangs:
            await asyncio.Event().wait()
        return b""


def test_who_dies_while_it_is_given_a_source_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection stays open: nothing but gossip says that it froze."""
    monkeypatch.setattr(transfer, "LOOK_AGAIN_SECONDS", 0.01)
    monkeypatch.setattr(transfer, "encode_frame", lambda kind, data: data)
    b, c = peer("b"), peer("c")
    alive = [b, c]

    async def story() -> None:
        half = cast(Any, Half(hangs=c))
        transfers = Transfers(half, half, half, lambda: alive)
        asyncio.get_running_loop().call_later(0.05, alive.remove, c)
        async with asyncio.timeout(LIMIT):
            assert await transfers.push_source(COMMIT, (b, c), enough=2) == ([b], {})
        await transfers.close()

    asyncio.run(story())
