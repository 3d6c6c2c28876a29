"""Submitting (promise P1): the answer comes when task and code are durable here and on other peers, and says where they are.

The order makes that whoever dies between two steps leaves a whole task or none: the client uploads the objects of the source;
they are brought to other peers; only then the row is written, here with an fsync, and pushed to everybody; who acks it has
committed it with an fsync, too. So a row is never anywhere before its source is complete here and at the peers that count.
A client that got no answer sends the same request again, by the same token: see `ledger/requests.py`.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from meshq import config, failpoints
from meshq.errors import UsageError
from meshq.exec.objects import ObjectStore
from meshq.ids import ObjectId, PeerId, TaskId
from meshq.ledger import placement
from meshq.ledger.rendezvous import claimants
from meshq.ledger.shell import LedgerShell
from meshq.peers import Peers
from meshq.task import TaskSpec
from meshq.web.changes import Changes
from meshq.web.documents import Document
from meshq.web.transfer import Transfers

COPIES_USUAL: Final = 3  # other peers that a source is brought to, however few must have it before the answer
ACK_SECONDS: Final = 3.0  # for a live peer to confirm; after it the answer says where the task is so far
MORE_SECONDS: Final = 30.0  # the same where more than one copy is asked for
OTHERS_SECONDS: Final = 0.5  # once there are as many as asked for: who takes longer is named, too
TOLD_SECONDS: Final = 3.0  # for who has only just come to say what it has: it may be the one that can run the task, or a voter
TOLD_PAUSE: Final = 0.05
ON_ITS_WAY: Final = "the code is still on its way"

Copies = int | Literal["all"]
"""On how many other peers, of those that are alive, a task must be before its submit is answered."""


def parse_copies(given: object) -> Copies:
    """UsageError unless it is a number from 1 on, or `all`."""
    if given == "all":
        return "all"
    if type(given) is not int or not 1 <= given <= config.MEMBERS_MAX:
        raise UsageError(f"--copies: {str(given)[:64]!r} is neither a number of machines nor `all`", "1 is the default")
    return given


@dataclass(frozen=True, slots=True)
class _Placed:
    """Who has every source, and why others that should don't."""

    having: Sequence[PeerId]
    lacking: Mapping[PeerId, str]


class Submitting:
    """One for an agent. `failure`: why the last request to this peer got no answer; empty if it got one."""

    def __init__(
        self, *, home: Path, peers: Peers, ledger: LedgerShell, objects: ObjectStore, transfers: Transfers, changes: Changes,
        failure: Callable[[PeerId], str], on_acked: Callable[[Sequence[TaskId], Sequence[str]], None],
        clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self._home = home
        self._peers = peers
        self._ledger = ledger
        self._objects = objects
        self._transfers = transfers
        self._changes = changes
        self._failure = failure
        self._on_acked = on_acked
        self._clock = clock  # that of `Peers`

    async def store(self, specs: Sequence[TaskSpec], *, hold: bool, copies: Copies = 1) -> Document:
        """Store the tasks, here and elsewhere, and say where. Nothing is stored if any of them is refused."""
        failpoints.reach("submitted")
        await asyncio.to_thread(config.check_room, self._home, "submitting")
        await self._until_newcomers_told()
        if not hold:  # before the source travels; the ledger checks again when it stores
            for spec in specs:
                placement.check_placeable(spec, self._peers.views().values())
        commits = list(dict.fromkeys(spec.source.commit for spec in specs if spec.source.commit is not None))
        for commit in commits:
            if not await asyncio.to_thread(self._objects.complete, commit):
                raise UsageError(f"the source {commit[:8]} is not complete", "upload its objects before the task")
        wanted = len(self._peers.others_alive()) if copies == "all" else copies
        placed = await self._push_sources(commits, wanted)
        ids = await self._ledger.submit(specs, hold)
        failpoints.reach("committed")
        holders, late = await self._wait_for_copies(ids, placed.having, wanted)
        names = [self._peers.name(peer) for peer in (self._peers.me, *holders)]
        self._on_acked(ids, names)
        failpoints.reach("replicated")
        document: Document = {"id": ids[0], "ids": list(ids), "name": specs[0].name, "queue": specs[0].queue}
        document |= {"stored_on": names, "not_stored_on": self._without(placed, holders, late), "copies": wanted}
        if voters := self._ledger.core.voters(ids[0]):
            document["voters"] = list(voters)
        return document

    async def _until_newcomers_told(self) -> None:
        """A peer is known for a moment, without loss one `digest_interval` at most, before what it has is known."""
        for _ in range(round(TOLD_SECONDS / TOLD_PAUSE)):
            if not self._peers.newcomers(self._clock() - TOLD_SECONDS):
                return
            await asyncio.sleep(TOLD_PAUSE)

    def _without(self, placed: _Placed, holders: Sequence[PeerId], late: str) -> list[Document]:
        """The live peers that should have a copy and have none, and why."""
        silent = {peer: why for peer in placed.having if peer not in holders and (why := self._failure(peer) or late)}
        alive = self._peers.others_alive()
        missing = {**placed.lacking, **silent}
        return [{"name": self._peers.name(peer), "reason": why} for peer, why in missing.items() if peer in alive]

    async def _push_sources(self, commits: Sequence[ObjectId], wanted: int) -> _Placed:
        """Bring the sources to enough peers; without sources all that are alive have them."""
        others = self._peers.others_alive()
        if not commits:
            return _Placed(others, {})
        targets = claimants(TaskId(commits[0]), 1, others)[: max(wanted, COPIES_USUAL)]
        having, failed = list(targets), dict[PeerId, str]()
        for commit in commits:
            reached, missed = await self._transfers.push_source(commit, targets, wanted)
            having, failed = [peer for peer in having if peer in reached], failed | missed
        without = [peer for peer in targets if peer not in having]
        return _Placed(having, {peer: failed.get(peer) or self._failure(peer) or ON_ITS_WAY for peer in without})

    async def _wait_for_copies(self, ids: Sequence[TaskId], having: Sequence[PeerId], wanted: int) -> tuple[list[PeerId], str]:
        """Wait until as many of the peers that have the source confirmed the row, too, and a moment for more; all that did.
        Also what is wrong with the others, if no more is known than that they took too long."""
        enough, usual = min(wanted, len(having)), min(len(having), max(wanted, COPIES_USUAL))
        deadline = time.monotonic() + (ACK_SECONDS if wanted <= 1 else MORE_SECONDS)
        first = True
        while True:
            stored = [peer for peer in having if all(peer in self._ledger.core.stored_on(task) for task in ids)]
            if len(stored) >= enough and first:
                first, deadline = False, min(deadline, time.monotonic() + OTHERS_SECONDS)
            left = deadline - time.monotonic()
            if len(stored) >= usual:
                return stored, ""
            if left <= 0:
                return stored, "no answer yet"
            await self._changes.wait(ids[0], left)
