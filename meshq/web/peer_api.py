"""What peers may ask of each other: HTTPS with mutual TLS, bodies in MessagePack, every one with its cap.

The peer on the other side is who its certificate says (`certificates.peer_of`); handlers get that, never a claimed name.
A request that breaks the rules is answered with 400 and counted; none changes anything before it decodes.
"""

import asyncio
import logging
from collections import Counter
from typing import Final

from aiohttp import web

from meshq import codec, config
from meshq.errors import MalformedData, MeshqError, PeerError, TaskFailed
from meshq.exec.objects import ObjectStore
from meshq.gitobjects import decode_frames, encode_frame
from meshq.gossip import streams
from meshq.gossip.transport import GossipShell
from meshq.gossip.wire import PACKET_PLAIN_BYTES_MAX
from meshq.ids import ACTOR_PEER_CHARS, Fence, PeerId, actor_peer_prefix, is_fence, split_fence
from meshq.ledger.effects import GrantRequest, Push
from meshq.ledger.grants import ASKS_MAX
from meshq.ledger.shell import LedgerShell
from meshq.ledger.transfer import QUESTION_BYTES_MAX, decode_question
from meshq.pieces import CONTENT_TYPE
from meshq.web.attempt_files import AttemptFiles
from meshq.web.gate import Handler, RequestLimiter, peer_of_request, read_capped
from meshq.web.key_exchange import RING_PATH, KeyExchange
from meshq.web.streams import answer_in_chunks
from meshq.web.transfer import FRAMES_BYTES_MAX, IDS_BYTES_MAX, Transfers
from meshq.web.wire import CommitRequest, ObjectIds, encode_chunk

log = logging.getLogger("meshq.web")

PUSH_BYTES_MAX: Final = 4 * config.SYNC_BYTES_MAX  # a batch of submits; each spec has its own cap
GRANTS_BYTES_MAX: Final = 256 * ASKS_MAX  # a task's id, a fence, a number
_PEER = web.RequestKey("peer", str)


class PeerApi:
    """The routes of the peer port."""

    def __init__(
        self, *, gossip: GossipShell, ledger: LedgerShell, objects: ObjectStore, files: AttemptFiles, transfers: Transfers,
        keys: KeyExchange,
    ) -> None:  # fmt: skip
        self._gossip = gossip
        self._ledger = ledger
        self._objects = objects
        self._files = files
        self._transfers = transfers
        self._keys = keys
        self._counters: Counter[str] = Counter()

    @property
    def counters(self) -> dict[str, int]:
        """Requests that were refused, by reason."""
        return dict(self._counters)

    def application(self, limiter: RequestLimiter) -> web.Application:
        app = web.Application(middlewares=[self._identify, limiter.middleware], client_max_size=config.SYNC_BYTES_MAX)
        app.add_routes(
            [
                web.post("/gossip/sync", self._gossip_sync),
                web.post(streams.PATH, self._gossip_packet),
                web.post(RING_PATH, self._keys.handle_request),
                web.post("/ledger/push", self._push),
                web.post("/ledger/sync", self._sync),
                web.post("/ledger/grants", self._grants),
                web.post("/objects/of", self._objects_of),
                web.post("/objects/missing", self._objects_missing),
                web.post("/objects/put", self._objects_put),
                web.post("/objects/get", self._objects_get),
                web.get("/attempts/{fence}/log", self._log),
                web.get("/attempts/{fence}/outputs", self._outputs),
                web.get("/attempts/{fence}/outputs/{path:[\\s\\S]+}", self._output),
                web.post("/attempts/{fence}/keep", self._keep),
            ]
        )
        return app

    @web.middleware
    async def _identify(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            request[_PEER] = peer_of_request(request)
            return await handler(request)
        except web.HTTPException as error:
            self._counters[f"refused {_part_of(request)}: {error.status} {error.reason}"] += 1
            raise
        except (MalformedData, PeerError) as error:
            self._counters[f"refused {_part_of(request)}: {type(error).__name__}"] += 1
            return web.Response(status=400, text=error.message)
        except TaskFailed as error:
            return web.Response(status=404, text=error.message)
        except (MeshqError, OSError) as error:
            self._counters[f"failed {_part_of(request)}: {type(error).__name__}"] += 1
            log.warning("%s %s: %s", request.method, request.path, error)
            return web.Response(status=503, text=str(error))

    async def _gossip_sync(self, request: web.Request) -> web.Response:
        body = await read_capped(request, config.SYNC_BYTES_MAX)
        return web.Response(body=self._gossip.handle_sync_request(PeerId(request[_PEER]), body))

    async def _gossip_packet(self, request: web.Request) -> web.Response:
        packet = await read_capped(request, PACKET_PLAIN_BYTES_MAX)
        return web.Response(body=self._gossip.handle_stream(PeerId(request[_PEER]), packet))

    async def _push(self, request: web.Request) -> web.Response:
        body = await read_capped(request, PUSH_BYTES_MAX)
        push = codec.decode(Push, body, bytes_max=PUSH_BYTES_MAX)
        reply = await self._ledger.push(PeerId(request[_PEER]), push)
        return web.Response(body=codec.encode(reply))

    async def _sync(self, request: web.Request) -> web.Response:
        question = decode_question(await read_capped(request, QUESTION_BYTES_MAX))
        answer = await self._ledger.sync(PeerId(request[_PEER]), question)
        return web.Response(body=await asyncio.to_thread(codec.encode, answer))

    async def _grants(self, request: web.Request) -> web.Response:
        body = await read_capped(request, GRANTS_BYTES_MAX)
        question = codec.decode(GrantRequest, body, bytes_max=GRANTS_BYTES_MAX)
        reply = await self._ledger.grant(PeerId(request[_PEER]), question)
        return web.Response(body=codec.encode(reply))

    async def _objects_of(self, request: web.Request) -> web.Response:
        question = codec.decode(CommitRequest, await read_capped(request, 256), bytes_max=256)
        complete = await asyncio.to_thread(self._objects.complete, question.commit)
        if not complete:
            raise TaskFailed(f"the source {question.commit[:8]} is not here")
        ids = await asyncio.to_thread(self._objects.reachable, question.commit)
        return web.Response(body=codec.encode(ObjectIds(ids=tuple(ids))))

    async def _objects_missing(self, request: web.Request) -> web.Response:
        question = await self._read_ids(request)
        missing = await asyncio.to_thread(self._objects.missing, question.ids)
        return web.Response(body=codec.encode(ObjectIds(ids=tuple(missing))))

    async def _objects_put(self, request: web.Request) -> web.Response:
        body = await read_capped(request, FRAMES_BYTES_MAX)
        await asyncio.to_thread(lambda: self._objects.put(decode_frames(body)))
        return web.Response(body=b"")

    async def _objects_get(self, request: web.Request) -> web.Response:
        question = await self._read_ids(request)
        return web.Response(body=await asyncio.to_thread(self._first_frames, question))

    def _first_frames(self, question: ObjectIds) -> bytes:
        """As many of the objects, from the front, as one batch holds; one at least."""
        batch = bytearray()
        for kind, data in self._objects.get(question.ids):
            if batch and len(batch) + len(data) > config.OBJECTS_BATCH_BYTES:
                break
            batch += encode_frame(kind, data)
        return bytes(batch)

    async def _read_ids(self, request: web.Request) -> ObjectIds:
        body = await read_capped(request, IDS_BYTES_MAX)
        ids: ObjectIds = codec.decode(ObjectIds, body, bytes_max=IDS_BYTES_MAX, items_max=config.SOURCE_FILES_MAX * 2)
        return ids

    async def _log(self, request: web.Request) -> web.StreamResponse:
        fence = await self._local_fence(request)
        tail = request.query.get("tail")
        if tail is not None and not (tail.isdecimal() and len(tail) < 10):
            raise PeerError("`tail` is no number")
        offset = request.query.get("offset", "0")
        if not (offset.isdecimal() and len(offset) < 19):
            raise PeerError("`offset` is no number")
        follow = request.query.get("follow") == "1"
        chunks = self._files.log(fence, offset=int(offset), tail=int(tail) if tail else None, follow=follow)
        return await answer_in_chunks(request, (encode_chunk(chunk) async for chunk in chunks), kind=CONTENT_TYPE)

    async def _outputs(self, request: web.Request) -> web.Response:
        manifest = await asyncio.to_thread(self._files.manifest, await self._local_fence(request))
        return web.Response(body=codec.encode(manifest))

    async def _output(self, request: web.Request) -> web.StreamResponse:
        return await answer_in_chunks(request, self._files.output(await self._local_fence(request), request.match_info["path"]))

    async def _keep(self, request: web.Request) -> web.Response:
        fence = request.match_info["fence"]
        if not is_fence(fence):
            raise PeerError("not a fence")
        runner = PeerId(request[_PEER])
        if actor_peer_prefix(split_fence(fence)[1].actor) != runner[:ACTOR_PEER_CHARS]:
            raise PeerError("this attempt is another peer's")  # a copy is believed where its runner does not answer
        if not await self._files.has(Fence(fence)):
            await self._transfers.keep_copy(Fence(fence), runner)
        return web.Response(body=b"")

    async def _local_fence(self, request: web.Request) -> Fence:
        """The fence in the path; 404 if nothing of it is here, so that the asker goes on to the next peer."""
        fence = request.match_info["fence"]
        if not is_fence(fence) or not await self._files.has(Fence(fence)):
            raise TaskFailed("no such attempt here")
        return Fence(fence)


def _part_of(request: web.Request) -> str:
    """For counters, of which there must not be more than the asker's fantasy has paths."""
    resource = request.match_info.route.resource
    return "nothing that there is" if resource is None else resource.canonical.split("/")[1]


def share_of(request: web.Request) -> str:
    """Whose share of requests this one takes: the peer's. Its logs, which may be followed for days, have a share of their own,
    so that many followers don't keep the ledger out."""
    return peer_of_request(request) + (" logs" if request.path.endswith("/log") else "")
