"""Everything that a person at this peer may ask for, in plain documents; the control API is its only caller.

The desk turns references into tasks, specs into stored and replicated tasks (promise P1), and rows into documents. It
decides nothing about placement or claims: that is the ledger's.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from meshq import codec
from meshq.errors import MalformedData, TaskFailed, UsageError
from meshq.exec.objects import ObjectStore
from meshq.ids import Fence, ObjectId, PeerId, TaskId, is_object_id, is_task_id
from meshq.ledger import holder
from meshq.ledger.row import Row
from meshq.ledger.settings import keeping, retention
from meshq.ledger.shell import LedgerShell
from meshq.peers import Peers, is_alive
from meshq.pieces import Piece, left_out
from meshq.task import Status, TaskSpec
from meshq.trust.hardening import user_name
from meshq.web import documents
from meshq.web.changes import Changes
from meshq.web.documents import Document, PeerFacts
from meshq.web.following import Follower, Position, first_attempt
from meshq.web.key_steps import KeySteps
from meshq.web.queues import QueueSteps
from meshq.web.spec_check import check_spec
from meshq.web.submitting import Copies, Submitting
from meshq.web.transfer import Transfers

log = logging.getLogger("meshq.web")


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshFacts:
    """What does not change while the agent runs."""

    version: str
    port: int
    home: str
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentHooks:
    """What the desk needs of the agent as a whole."""

    peer_facts: Callable[[], list[PeerFacts]]
    doctor: Callable[[], Any]  # awaitable document
    leave: Callable[[bool, float | None], Any]  # awaitable
    failure: Callable[[PeerId], str]  # why the last request to this peer got no answer; empty if it got one
    on_acked: Callable[[Sequence[TaskId], Sequence[str]], None]  # these tasks are stored at the peers of these names


class Desk:
    """One for an agent."""

    def __init__(
        self, *, facts: MeshFacts, peers: Peers, ledger: LedgerShell, objects: ObjectStore, transfers: Transfers,
        changes: Changes, keys: KeySteps, hooks: AgentHooks, clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self._facts = facts
        self._peers = peers
        self._ledger = ledger
        self._objects = objects
        self._transfers = transfers
        self._changes = changes
        self.keys = keys
        self._hooks = hooks
        self._clock = clock
        self._submitting = Submitting(
            home=Path(facts.home), peers=peers, ledger=ledger, objects=objects, transfers=transfers, changes=changes,
            failure=hooks.failure, on_acked=hooks.on_acked, clock=clock,
        )  # fmt: skip
        self.queues = QueueSteps(
            peers=peers, ledger=ledger, documents=self._queue_documents, resolve=self._resolve, shown=self._summary,
        )  # fmt: skip

    # -- views ------------------------------------------------------------------------------------------------------

    def me(self) -> Document:
        member = self._peers.member(self._peers.me)
        assert member is not None
        return {
            "id": member.peer,
            "name": member.name,
            "mesh": self._mesh(),
            "version": self._facts.version,
            "pid": self._facts.pid,
            "home": self._facts.home,
            "port": self._facts.port,
            "addresses": [str(address) for address in member.addresses],
            "queues": list(self._peers.telemetry(member.peer).queues),
            "peers_alive": len(self._peers.others_alive()) + 1,
        }

    def _mesh(self) -> Document:
        return {"id": self.keys.holder.mesh_id, "name": self.keys.holder.mesh_id}

    def peers(self) -> list[Document]:
        facts = sorted(self._hooks.peer_facts(), key=lambda each: (each.member.name, each.member.peer))
        return [documents.peer_document(each) for each in facts]

    def status(self) -> Document:
        facts = self._hooks.peer_facts()
        alive = [each for each in facts if is_alive(each.member)]
        return {
            "mesh": self._mesh() | {"peers_alive": len(alive), "peers_known": len(facts)},
            "peers": self.peers(),
            "queues": self._queue_documents(),
        }

    def _queue_documents(self) -> list[Document]:
        serving = Counter(queue for each in self._peers.members() if is_alive(each) for queue in self._queues_of(each.peer))
        return documents.queue_documents(self._ledger.core.catalog, serving, time.time(), self._ledger.core.settings)

    def _queues_of(self, peer: PeerId) -> tuple[str, ...]:
        return self._peers.telemetry(peer).queues

    def tasks(self, *, queue: str | None, status: str | None, user: str | None, limit: int) -> list[Document]:
        if status is not None and status not in {each.value for each in Status}:
            raise UsageError(f"--status: {status!r} is none of {', '.join(each.value for each in Status)}")
        asked = Status(status) if status is not None else None
        newest = self._ledger.core.catalog.newest(limit, queue=queue, status=asked, user=user)
        return [self._summary(self._row(task)) for task in newest]

    def _summary(self, row: Row) -> Document:
        return documents.task_summary(row, self._peers.name, **self._place(row))

    def show(self, reference: str) -> Document:
        row = self._resolve(reference)
        return documents.task_document(row, self._peers.name, **self._place(row))

    def _place(self, row: Row) -> dict[str, Any]:
        return {"position": self._ledger.core.position(row.task), "reason": self._reason(row)}

    def _reason(self, row: Row) -> str | None:
        return self._ledger.core.waiting_reason(self._clock(), row.task) or None

    def key(self) -> str:
        return self.keys.holder.text

    async def doctor(self) -> Document:
        document: Document = await self._hooks.doctor()
        return document

    # -- submitting -------------------------------------------------------------------------------------------------

    async def missing_objects(self, ids: Sequence[str]) -> list[ObjectId]:
        for each in ids:
            if not is_object_id(each):
                raise UsageError(f"{each[:64]!r} is no object id")
        return await asyncio.to_thread(self._objects.missing, [ObjectId(each) for each in ids])

    async def put_objects(self, frames: Any) -> int:
        return await asyncio.to_thread(self._objects.put, frames)

    async def submit(self, uid: int, plain_specs: Sequence[object], *, hold: bool, copies: Copies = 1) -> Document:
        """Store the tasks, here and elsewhere, and say where. Nothing is stored if any of them is refused."""
        specs = [self._complete_spec(uid, plain) for plain in plain_specs]
        if not specs:
            raise UsageError("nothing to submit")
        return await self._submitting.store(specs, hold=hold, copies=copies)

    def _complete_spec(self, uid: int, plain: object) -> TaskSpec:
        try:
            spec: TaskSpec = codec.from_plain(TaskSpec, plain)
        except MalformedData as error:
            raise UsageError(f"the task is not understood: {error}") from None
        me = self._peers.me
        return check_spec(
            replace(
                spec,
                submitted_by=f"{user_name(uid)}@{self._peers.name(me)}",
                submitted_at=time.time(),
                submitted_peer=me,
            )
        )

    def retention(self) -> Document:
        """How long tasks are kept that are over, in the whole mesh."""
        kept = retention(self._ledger.core.settings)
        return {"days": kept.seconds / 86_400, "tasks": kept.tasks}

    async def keep(self, days: float | None, tasks: int | None) -> Document:
        """Change it, at once and everywhere."""
        await self._ledger.change_settings(keeping(days, tasks))
        return self.retention()

    async def retry(self, uid: int, reference: str) -> Document:
        """A new task with the same spec."""
        row = self._resolve(reference)
        if not holder.status(row).final:
            raise TaskFailed(f"task {row.task} is {holder.status(row)}, so there is nothing to retry", "wait for its end")
        commit = row.spec.source.commit
        if commit is not None:
            await self._transfers.fetch_source(commit, row.spec.submitted_peer)
        me = self._peers.me
        spec = replace(
            row.spec,
            submitted_by=f"{user_name(uid)}@{self._peers.name(me)}",
            submitted_at=time.time(),
            submitted_peer=me,
            retry_of=row.task,
            request="",
        )
        return await self._submitting.store([spec], hold=False)

    async def cancel(self, uid: int, reference: str) -> Document:
        row = self._resolve(reference)
        if not holder.status(row).final:
            await self._ledger.cancel(row.task, f"{user_name(uid)}@{self._peers.name(self._peers.me)}")
        return self.show(row.task)

    # -- following --------------------------------------------------------------------------------------------------

    async def wait(self, reference: str, seconds: float) -> Document:
        """Answer when the task is final, or after that time."""
        row = self._resolve(reference)
        deadline = time.monotonic() + seconds
        while not holder.status(row).final and (left := deadline - time.monotonic()) > 0:
            await self._changes.wait(row.task, left)
            row = self._row(row.task)
        return documents.wait_document(row, self._peers.name, self._reason(row))

    async def log(self, reference: str, *, attempt: int | None, tail: int | None) -> AsyncIterator[bytes]:
        """What there is of the log of one attempt, with a line where its middle was left out."""
        row = self._resolve(reference)
        view = first_attempt(row, attempt)
        if view is None and attempt is not None:
            raise UsageError(f"task {row.task} has no started attempt {attempt}")
        if view is None:
            return
        reached: int | None = None
        async for chunk in self._transfers.log(view.fence, view.peer, tail=tail, follow=False):
            if reached is not None and chunk.offset > reached:
                yield f"\n[meshq: {left_out(chunk.offset - reached)}]\n".encode()
            if chunk.data:
                yield chunk.data
            reached = chunk.end

    async def follow_log(
        self, reference: str, *, attempt: int | None, tail: int | None, start: Position | None
    ) -> AsyncIterator[Piece]:
        """The log of one attempt and of those that come after it, until the task is final; with `attempt` of that one alone."""
        task = self._resolve(reference).task
        follower = Follower(row=lambda: self._row(task), logs=self._transfers, names=self._peers.name, changes=self._changes)
        async for piece in follower.pieces(number=attempt, tail=tail, start=start):
            yield piece

    async def outputs(self, reference: str) -> Document:
        fence, runner = self._result(reference)
        manifest = await self._transfers.manifest(fence, runner)
        return {"fence": fence, "files": codec.to_plain(manifest.files), "skipped": manifest.skipped}

    @asynccontextmanager
    async def output(self, reference: str, path: str) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
        """Size and bytes of one output file."""
        fence, runner = self._result(reference)
        manifest = await self._transfers.manifest(fence, runner)
        size = next((file.bytes for file in manifest.files if file.path == path), None)
        if size is None:
            raise UsageError(f"the task has no output {path!r}")
        async with self._transfers.output(fence, runner, path) as chunks:
            yield size, chunks

    def _result(self, reference: str) -> tuple[Fence, PeerId]:
        """The attempt whose outputs are the task's: the result, else the last one that ended with its own code."""
        row = self._resolve(reference)
        view = documents.attempt_with_outputs(row)
        if view is None:
            raise TaskFailed(f"task {row.task} has no finished attempt, so there are no outputs yet")
        return view.fence, view.peer

    async def leave(self, *, drain: bool, seconds: float | None) -> list[TaskId]:
        """The tasks of which processes still run."""
        return list(await self._hooks.leave(drain, seconds))

    # -- references -------------------------------------------------------------------------------------------------

    def _row(self, task: TaskId) -> Row:
        row: Row | None = self._ledger.core.row(task)
        if row is None:
            raise UsageError(f"task {task} is gone")
        return row

    def _resolve(self, reference: str) -> Row:
        """The task with this id, name or unique prefix of an id."""
        if is_task_id(reference) and (exact := self._ledger.core.row(TaskId(reference))) is not None:
            found: Row = exact
            return found
        core = self._ledger.core
        matching = core.catalog.named(reference) or tuple(core.starting_with(reference) if reference else ())
        if not matching:
            raise UsageError(f"there is no task {reference!r}", "`meshq tasks` lists them")
        if len(matching) > 1:
            ids = ", ".join(matching[:10])
            raise UsageError(f"{reference!r} means {len(matching)} tasks: {ids}", "give more of the id")
        return self._row(matching[0])
