"""Bytes that travel between peers: sources before a run, its log while it runs, its outputs afterwards.

Sources are sets of content-addressed objects: whoever lacks some asks for exactly these, so a second submit of a
repository costs what changed. Logs and outputs lie with the peer that ran the attempt and, after the end, with one more
peer that keeps a copy; a reader asks the runner first and then everybody else.
"""

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final
from urllib.parse import quote

from meshq import codec, config
from meshq.errors import MeshqError, PeerError, TaskFailed, Unreachable
from meshq.exec.logs import Chunk
from meshq.exec.objects import ObjectStore
from meshq.exec.preparation import PreparationFailed
from meshq.gitobjects import decode_frames, encode_frame
from meshq.ids import Fence, ObjectId, PeerId
from meshq.pieces import FrameReader
from meshq.web.attempt_files import AttemptFiles
from meshq.web.peer_client import STREAM_QUIET_SECONDS, PeerClient
from meshq.web.streams import while_checked
from meshq.web.wire import MANIFEST_BYTES_MAX, CommitRequest, Manifest, ObjectIds, decode_chunk

log = logging.getLogger("meshq.web")

IDS_BYTES_MAX: Final = config.SOURCE_FILES_MAX * 64
FRAMES_BYTES_MAX: Final = config.SOURCE_FILE_BYTES_MAX + config.OBJECTS_BATCH_BYTES
SMALL_SOURCE_OBJECTS: Final = 16  # sent without asking first what is missing: one round trip less
TRANSFER_SECONDS: Final = 300.0
LOOK_AGAIN_SECONDS: Final = 1.0  # at who is still alive, while sources are brought to others
OTHER_COPIES_SECONDS: Final = 0.2  # how long a submit waits for further copies once one other peer has the source


class Transfers:
    """One for an agent. `others` are the other peers that are alive."""

    def __init__(
        self, client: PeerClient, objects: ObjectStore, files: AttemptFiles, others: Callable[[], Sequence[PeerId]]
    ) -> None:
        self._client = client
        self._objects = objects
        self._files = files
        self._others = others
        self._pushing: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        for loop_task in self._pushing:
            loop_task.cancel()
        await asyncio.gather(*self._pushing, return_exceptions=True)

    async def push_source(
        self, commit: ObjectId, targets: Sequence[PeerId], enough: int = 1
    ) -> tuple[list[PeerId], dict[PeerId, str]]:
        """Bring the commit to these peers; the answer is those that have it durably now, `enough` at least if so many can be
        reached, and those that do not get it, with the reason.

        A peer that hangs does not hold up the answer: it is served beside, for as long as that takes. Nobody waits for one that
        is not alive any more, whatever its connection still promises.
        """
        ids = await asyncio.to_thread(self._objects.reachable, commit)
        having: list[PeerId] = []
        failed: dict[PeerId, str] = {}
        pushing = {target: self._track(self._push_to(target, ids, commit, having, failed)) for target in targets}
        while len(having) < enough and (hopeful := self._still_under_way(pushing)):
            await asyncio.wait(hopeful, timeout=LOOK_AGAIN_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if rest := self._still_under_way(pushing):
            await asyncio.wait(rest, timeout=OTHER_COPIES_SECONDS)
        return list(having), dict(failed)

    def _still_under_way(self, pushing: Mapping[PeerId, asyncio.Task[None]]) -> list[asyncio.Task[None]]:
        """To those that are alive."""
        alive = self._others()
        return [loop_task for target, loop_task in pushing.items() if not loop_task.done() and target in alive]

    def _track(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        loop_task = asyncio.get_running_loop().create_task(work, name="push source")
        self._pushing.add(loop_task)
        loop_task.add_done_callback(self._pushing.discard)
        return loop_task

    async def _push_to(
        self, peer: PeerId, ids: Sequence[ObjectId], commit: ObjectId, having: list[PeerId], failed: dict[PeerId, str]
    ) -> None:
        try:
            await self._push_missing(peer, ids)
        except MeshqError as error:
            log.warning("the source %s did not reach %s: %s", commit[:8], peer[:8], error)
            failed[peer] = self._client.failure(peer) or error.message
        else:
            having.append(peer)

    async def _push_missing(self, peer: PeerId, ids: Sequence[ObjectId]) -> None:
        missing: Sequence[ObjectId] = ids
        if len(ids) > SMALL_SOURCE_OBJECTS:
            missing = await self._ask_ids(peer, "/objects/missing", ObjectIds(ids=tuple(ids)))
        batches = self._batches(missing)  # read one after the other: a source has up to half a gigabyte
        while (batch := await asyncio.to_thread(next, batches, None)) is not None:
            await self._client.post(peer, "/objects/put", batch, answer_bytes_max=64, seconds=TRANSFER_SECONDS)

    def _batches(self, ids: Sequence[ObjectId]) -> Iterator[bytes]:
        """Frames of these objects in bodies of about OBJECTS_BATCH_BYTES."""
        batch = bytearray()
        for kind, data in self._objects.get(ids):
            batch += encode_frame(kind, data)
            if len(batch) >= config.OBJECTS_BATCH_BYTES:
                yield bytes(batch)
                batch.clear()
        if batch:
            yield bytes(batch)

    async def fetch_source(self, commit: ObjectId, first: PeerId) -> None:
        """Have every object of the commit here. PreparationFailed (retryable, blameless) if nobody who answers has it."""
        if await asyncio.to_thread(self._objects.complete, commit):
            return
        failures: list[str] = []
        for peer in sorted(self._others(), key=lambda other: other != first):
            try:
                await self._fetch_from(peer, commit)
                return
            except (PeerError, Unreachable) as error:
                failures.append(str(error))
        why = "; ".join(failures) or "no other is alive"
        raise PreparationFailed(f"no peer that answers has the source {commit[:8]}: {why}", retryable=True, blameless=True)

    async def _fetch_from(self, peer: PeerId, commit: ObjectId) -> None:
        ids = await self._ask_ids(peer, "/objects/of", CommitRequest(commit=commit))
        missing = await asyncio.to_thread(self._objects.missing, ids)
        while missing:
            body = codec.encode(ObjectIds(ids=tuple(missing)))
            frames = await self._client.post(
                peer, "/objects/get", body, answer_bytes_max=FRAMES_BYTES_MAX, seconds=TRANSFER_SECONDS
            )
            await asyncio.to_thread(self._objects.put, decode_frames(frames))
            left = await asyncio.to_thread(self._objects.missing, missing)
            if len(left) == len(missing):
                raise PeerError(f"the peer {peer[:8]} answers with other objects than it was asked for")
            missing = left
        if not await asyncio.to_thread(self._objects.complete, commit):
            raise PeerError(f"the peer {peer[:8]} has only a part of the source {commit[:8]}")

    async def _ask_ids(self, peer: PeerId, path: str, question: ObjectIds | CommitRequest) -> tuple[ObjectId, ...]:
        answer = await self._client.post(
            peer, path, codec.encode(question), answer_bytes_max=IDS_BYTES_MAX, seconds=TRANSFER_SECONDS
        )
        return codec.decode(ObjectIds, answer, bytes_max=IDS_BYTES_MAX, items_max=config.SOURCE_FILES_MAX * 2).ids

    async def log(
        self, fence: Fence, runner: PeerId, *, offset: int = 0, tail: int | None, follow: bool
    ) -> AsyncIterator[Chunk]:
        """The log of an attempt, from `tail` lines before its end or else from `offset` on: what there is, from whoever has it.

        With `follow` from its runner alone, until the attempt ends: as long as it runs nobody else has any of it. TaskFailed if
        that breaks off before the end.
        """
        if await self._files.has(fence):
            async for chunk in self._files.log(fence, offset=offset, tail=tail, follow=follow):
                yield chunk
            return
        for peer in [runner] if follow else [runner, *(each for each in self._others() if each != runner)]:
            try:
                chunks = self._log_at(peer, fence, offset=offset, tail=tail, follow=follow)
                async for chunk in while_checked(chunks, functools.partial(self._check_alive, peer)) if follow else chunks:
                    offset, tail = chunk.end, None
                    yield chunk
                return
            except (PeerError, Unreachable) as error:
                log.info("the log of attempt %s from %s: %s", fence, peer[:8], error)
        raise _nobody_has_it()

    async def _log_at(
        self, peer: PeerId, fence: Fence, *, offset: int = 0, tail: int | None = None, follow: bool = False
    ) -> AsyncIterator[Chunk]:
        """As `log`, from this peer. Only a followed log may be silent for long."""
        query = f"follow={int(follow)}&offset={offset}" + (f"&tail={tail}" if tail is not None else "")
        reader = FrameReader()
        quiet = None if follow else STREAM_QUIET_SECONDS
        async with self._client.stream(peer, f"/attempts/{fence}/log?{query}", quiet=quiet) as chunks:
            async for data in chunks:
                for frame in reader.feed(data):
                    yield decode_chunk(*frame)

    async def manifest(self, fence: Fence, runner: PeerId) -> Manifest:
        """The output files of an attempt that ended."""
        if await self._files.has(fence):
            return await asyncio.to_thread(self._files.manifest, fence)
        async with self._first_that_has(f"/attempts/{fence}/outputs", runner) as chunks:
            data = bytearray()
            async for chunk in chunks:
                data += chunk
                if len(data) > MANIFEST_BYTES_MAX:
                    raise PeerError(f"the manifest of attempt {fence} is longer than {MANIFEST_BYTES_MAX} bytes")
        return codec.decode(Manifest, bytes(data), bytes_max=MANIFEST_BYTES_MAX, items_max=config.OUTPUT_FILES_MAX)

    @asynccontextmanager
    async def output(self, fence: Fence, runner: PeerId, path: str) -> AsyncIterator[AsyncIterator[bytes]]:
        """The bytes of one output file."""
        if await self._files.has(fence):
            yield self._files.output(fence, path)
            return
        async with self._first_that_has(f"/attempts/{fence}/outputs/{quote(path)}", runner) as chunks:
            yield chunks

    @asynccontextmanager
    async def _first_that_has(self, path: str, runner: PeerId) -> AsyncIterator[AsyncIterator[bytes]]:
        """The answer of the first peer that has the attempt: the runner, else a keeper of its copy."""
        others = [peer for peer in self._others() if peer != runner]
        async with AsyncExitStack() as streams:
            for peer in [runner, *others]:
                try:
                    chunks = await streams.enter_async_context(self._client.stream(peer, path))
                except (PeerError, Unreachable) as error:
                    log.info("%s from %s: %s", path, peer[:8], error)
                    continue
                yield chunks
                return
        raise _nobody_has_it()

    def _check_alive(self, peer: PeerId) -> None:
        if peer not in self._others():
            raise Unreachable(f"the peer {peer[:8]} is not alive any more")

    async def offer_copy(self, fence: Fence, keepers: Sequence[PeerId]) -> PeerId | None:
        """Ask peers in turn to keep a copy of log and outputs, until one says that it has it."""
        for peer in keepers:
            try:
                await self._client.post(peer, f"/attempts/{fence}/keep", b"", answer_bytes_max=64, seconds=TRANSFER_SECONDS)
                return peer
            except (PeerError, Unreachable) as error:
                log.info("no copy of attempt %s at %s: %s", fence, peer[:8], error)
        return None

    async def keep_copy(self, fence: Fence, runner: PeerId) -> None:
        """Fetch log and outputs of an attempt of `runner` and keep them."""
        manifest = await self.manifest(fence, runner)
        async with self._files.new_copy(fence, manifest) as copy:
            async for chunk in self._log_at(runner, fence):
                await asyncio.to_thread(copy.write_log, chunk)
            for file in manifest.files:
                async with self._client.stream(runner, f"/attempts/{fence}/outputs/{quote(file.path)}") as chunks:
                    await copy.write_output(file, chunks)


def _nobody_has_it() -> TaskFailed:
    return TaskFailed(
        "the peer that ran this attempt does not answer and nobody keeps a copy",
        "try again when it is back: `meshq peers` shows who is missing",
    )
