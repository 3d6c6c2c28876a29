"""The ledger with a real clock, real databases and real threads; only the network is a function call."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from meshq.config import Home
from meshq.errors import StoreError, Unreachable
from meshq.ids import Fence, PeerId, TaskId, split_fence
from meshq.ledger import shell as module
from meshq.ledger.core import Ledger
from meshq.ledger.effects import PeerView, Persist, Push, PushReply, SyncPage, SyncRequest
from meshq.ledger.holder import read, status
from meshq.ledger.row import Row
from meshq.ledger.shell import Hooks, LedgerShell, merge_persists
from meshq.ledger.store import Store
from meshq.ledger.timing import FAST
from meshq.task import Claimed, EndKind, Status
from tests.ledger.builders import actor, dot, outcome, peer, row, spec, view, views

LIMIT = 20.0
QUICK = replace(FAST, validation_max=0.3)
Work = Callable[[dict[str, "Node"]], Awaitable[None]]


class Node:
    """One shell, and what it was asked to do."""

    def __init__(self, name: str, home: Home, nodes: dict[PeerId, "Node"]) -> None:
        self.nodes, self.id, self.home = nodes, peer(name), home
        self.store = Store.open(home, self.id)
        stored = self.store.load()
        now, rng = time.monotonic(), Random(name)
        core = Ledger(self.id, stored.ledger_epoch, QUICK, stored.rows, stored.vector, stored.floors, rng, now)
        self.notes: list[bytes] = []
        hooks = Hooks(
            send_push=self.send_push, send_sync=self.send_sync, on_prepare=self.prepare, on_start=self.start,
            on_stop=lambda fence, reason: self.stops.append((fence, reason)), on_change=lambda task: self.changed.set(),
            on_note=self.notes.append,
        )  # fmt: skip
        self.shell = LedgerShell(core, self.store, hooks, time.monotonic)
        self.starts: list[tuple[Fence, Row]] = []
        self.stops: list[tuple[Fence, str]] = []
        self.tasks: dict[Fence, TaskId] = {}
        self.changed = asyncio.Event()

    async def send_push(self, to: PeerId, push: Push) -> PushReply:
        if to not in self.nodes:
            raise Unreachable(f"{to} is not there")
        return await self.nodes[to].shell.push(self.id, push)

    async def send_sync(self, to: PeerId, request: SyncRequest) -> SyncPage:
        if to not in self.nodes:
            raise Unreachable(f"{to} is not there")
        return await self.nodes[to].shell.sync(self.id, request)

    def prepare(self, claimed: Claimed) -> None:
        self.tasks[claimed.fence] = claimed.task
        self.shell.ready(claimed.fence)

    def start(self, fence: Fence) -> None:
        """What another process would find on the disk at this moment."""
        reader = Store.open(self.home, self.id)
        [on_disk] = [each for each in reader.load().rows if each.task == self.tasks[fence]]
        reader.close()
        self.starts.append((fence, on_disk))

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(LIMIT):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


def on_nodes(tmp_path: Path, names: str, work: Work, seen: Mapping[PeerId, PeerView]) -> None:
    """Run `work` while the shells of these nodes run."""

    async def main() -> None:
        nodes: dict[PeerId, Node] = {}
        by_name = {name: Node(name, Home(tmp_path / name), nodes) for name in names}
        nodes |= {node.id: node for node in by_name.values()}
        loops = [asyncio.create_task(node.shell.run()) for node in by_name.values()]
        try:
            await asyncio.sleep(0)
            for node in by_name.values():
                node.shell.peers(seen)
                await node.shell.adopt([])
            await work(by_name)
        finally:
            for loop in loops:
                loop.cancel()
            await asyncio.gather(*loops, return_exceptions=True)
            for node in by_name.values():
                node.store.close()

    asyncio.run(main())


THREE = views(view("a"), view("b"), view("c"))


def test_a_task_starts_at_one_of_three_peers_after_everything_is_on_disk(tmp_path: Path) -> None:
    async def work(nodes: dict[str, Node]) -> None:
        a = nodes["a"]
        [task] = await a.shell.submit([spec()], hold=False)
        await a.until(lambda: len(a.shell.core.stored_on(task)) >= 1)
        await a.until(lambda: status(found(a, task)) is Status.RUNNING)
        [(fence, on_disk)] = [start for node in nodes.values() for start in node.starts]
        _, claim = split_fence(fence)
        assert claim in read(on_disk).started, "Start came before its commit"
        runner = next(node for node in nodes.values() if node.starts)
        await runner.shell.ended(fence, outcome())
        for node in nodes.values():
            await node.until(lambda node=node: status(found(node, task)) is Status.SUCCEEDED)  # type: ignore[misc]  # bound now

    on_nodes(tmp_path, "abc", work, THREE)


def found(node: Node, task: TaskId) -> Row:
    known = node.shell.core.row(task)
    return known if known is not None else row(birth=dot("z", 1))


def test_many_tasks_each_run_once_and_everything_survives_on_every_disk(tmp_path: Path) -> None:
    tasks: list[TaskId] = []

    async def work(nodes: dict[str, Node]) -> None:
        a = nodes["a"]
        for _ in range(5):
            tasks.extend(await a.shell.submit([spec(), spec()], hold=False))
        ended: dict[Fence, None] = {}
        async with asyncio.timeout(LIMIT):
            while not all(status(found(a, task)).final for task in tasks):
                for node in nodes.values():
                    for fence, _ in node.starts:
                        if fence not in ended:
                            ended[fence] = None
                            await node.shell.ended(fence, outcome())
                await asyncio.sleep(0.005)  # nothing is timed by it: the condition is asked again
        assert len(ended) == len(tasks)
        for node in nodes.values():
            await node.until(lambda node=node: all(status(found(node, task)).final for task in tasks))  # type: ignore[misc]  # bound now
            await node.shell.flush()

    on_nodes(tmp_path, "abc", work, THREE)
    for name in "abc":
        store = Store.open(Home(tmp_path / name), peer(name))
        kept = {each.task: status(each) for each in store.load().rows}
        store.close()
        assert kept == dict.fromkeys(tasks, Status.SUCCEEDED)


def test_a_peer_that_cannot_be_reached_delays_a_task_and_does_not_stop_it(tmp_path: Path) -> None:
    async def work(nodes: dict[str, Node]) -> None:
        a = nodes["a"]
        [task] = await a.shell.submit([spec()], hold=False)
        await a.until(lambda: len(a.starts) == 1)
        assert a.shell.core.stored_on(task) == ()

    on_nodes(tmp_path, "a", work, views(view("a"), view("b")))


def test_cancelling_reaches_the_peer_that_runs_it(tmp_path: Path) -> None:
    async def work(nodes: dict[str, Node]) -> None:
        a = nodes["a"]
        [task] = await a.shell.submit([spec()], hold=False)
        await a.until(lambda: status(found(a, task)) is Status.RUNNING)
        runner = next(node for node in nodes.values() if node.starts)
        other = next(node for node in nodes.values() if not node.starts)
        await other.until(lambda: status(found(other, task)) is Status.RUNNING)
        await other.shell.cancel(task, "bob@b")
        await runner.until(lambda: bool(runner.stops))
        assert runner.stops == [(runner.starts[0][0], "cancelled")]
        await runner.shell.ended(runner.starts[0][0], outcome(EndKind.CANCELLED, exit_code=143))
        await other.until(lambda: status(found(other, task)) is Status.CANCELLED)

    on_nodes(tmp_path, "ab", work, views(view("a"), view("b")))


def test_a_disk_that_refuses_for_too_long_ends_the_agent_and_tells_who_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "COMMIT_PATIENCE", 0.0)
    monkeypatch.setattr(module, "COMMIT_AGAIN", 0.0)

    async def main() -> None:
        node = Node("a", Home(tmp_path / "a"), {})
        loop = asyncio.create_task(node.shell.run())
        await asyncio.sleep(0)
        node.shell.peers(views(view("a")))
        await node.shell.adopt([])
        await asyncio.to_thread(node.store._connection.execute, "PRAGMA query_only=1")
        with pytest.raises(StoreError, match="has stopped before"):
            await node.shell.submit([spec()], hold=False)
        with pytest.raises(StoreError, match="readonly"):
            await loop
        with pytest.raises(StoreError, match="has stopped before"):
            await node.shell.cancel(next(node.shell.core.tasks()).task, "ann@a")
        assert node.starts == []
        node.store.close()

    asyncio.run(main())


def test_commits_that_gathered_become_one_that_leaves_the_same() -> None:
    early, late, other = row(), row(retries=1), row(birth=dot("a", 2))
    first: dict[str, int] = {actor("a"): 1, actor("b"): 4}
    last: dict[str, int] = {actor("a"): 2}
    merged = merge_persists([Persist((early, other), first, {}, False), Persist((late,), last, {"x": 1}, True)])
    assert merged == Persist((late, other), {actor("a"): 2, actor("b"): 4}, {"x": 1}, True)
