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
from meshq.ledger.database import StoreDamaged
from meshq.ledger.effects import Answer, Grant, GrantReply, GrantRequest, PeerView, Persist, Push, PushReply, Question
from meshq.ledger.holder import read, status
from meshq.ledger.row import Row
from meshq.ledger.shell import Hooks, LedgerShell, merge_persists
from meshq.ledger.store import Store
from meshq.ledger.timing import FAST
from meshq.task import Claimed, EndKind, Needs, Status
from tests.ledger.builders import actor, dot, outcome, peer, row, spec, telemetry, view, views

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
        core = Ledger(
            self.id,
            stored.ledger_epoch,
            QUICK,
            stored.rows,
            stored.vector,
            stored.floors,
            rng,
            now,
            stored.settings,
            stored.grants,
        )
        self.notes: list[bytes] = []
        hooks = Hooks(
            send_push=self.send_push, send_sync=self.send_sync, send_grants=self.send_grants, on_prepare=self.prepare,
            on_keep=lambda fence, until: self.kept.append((fence, until)), on_start=self.start,
            on_stop=lambda fence, reason: self.stops.append((fence, reason)), on_change=lambda task: self.changed.set(),
            on_note=self.notes.append,
        )  # fmt: skip
        self.shell = LedgerShell(core, self.store, hooks, time.monotonic)
        self.starts: list[tuple[Fence, Row]] = []
        self.kept: list[tuple[Fence, float]] = []
        self.stops: list[tuple[Fence, str]] = []
        self.tasks: dict[Fence, TaskId] = {}
        self.changed = asyncio.Event()

    async def send_push(self, to: PeerId, push: Push) -> PushReply:
        if to not in self.nodes:
            raise Unreachable(f"{to} is not there")
        return await self.nodes[to].shell.push(self.id, push)

    async def send_sync(self, to: PeerId, question: Question) -> Answer:
        if to not in self.nodes:
            raise Unreachable(f"{to} is not there")
        return await self.nodes[to].shell.sync(self.id, question)

    async def send_grants(self, to: PeerId, request: GrantRequest) -> GrantReply:
        return await self.nodes[to].shell.grant(self.id, request)

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
        await a.until(lambda: any(node.starts for node in nodes.values()))  # its runner may tell before it is told
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


def test_a_task_that_must_not_run_twice_starts_with_votes_that_are_on_the_voters_disks(tmp_path: Path) -> None:
    async def work(nodes: dict[str, Node]) -> None:
        a = nodes["a"]
        told = {name: telemetry(ledger_epoch=node.shell.core.ledger_epoch) for name, node in nodes.items()}
        for node in nodes.values():
            node.shell.peers(views(*(view(name, told[name]) for name in "abc")))
        [task] = await a.shell.submit([spec(isolation="stop")], hold=False)
        await a.until(lambda: status(found(a, task)) is Status.RUNNING)
        [(fence, _)] = [start for node in nodes.values() for start in node.starts]
        runner = next(node for node in nodes.values() if node.starts)
        assert [kept for kept, _ in runner.kept] == [fence] * len(runner.kept) and runner.kept, "before it was started"
        votes = 0
        for node in nodes.values():
            reader = Store.open(node.home, node.id)
            votes += reader.load().grants == {task: Grant(fence=fence, seconds=QUICK.grant_ttl)}
            reader.close()
        assert votes >= 2

    on_nodes(tmp_path, "abc", work, THREE)


def test_who_reports_the_end_of_an_attempt_waits_until_it_is_recorded_however_long_that_is_held_back(tmp_path: Path) -> None:
    async def work(nodes: dict[str, Node]) -> None:
        a, b = nodes["a"], nodes["b"]
        await a.shell.submit([spec(), spec()], hold=False)
        await a.until(lambda: bool(a.starts or b.starts))
        runner = a if a.starts else b
        other = b if a.starts else a
        [(fence, on_disk), *_] = runner.starts
        runner.nodes.pop(other.id)  # nobody answers it
        runner.shell.stalled(100.0)
        report = asyncio.create_task(runner.shell.ended(fence, outcome()))
        await asyncio.sleep(0)
        assert runner.shell.core.holds_back(fence) and not report.done()
        await report  # it goes on unvalidated in the end
        assert status(found(runner, on_disk.task)) is Status.SUCCEEDED

    on_nodes(tmp_path, "ab", work, views(view("a"), view("b")))


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
        await asyncio.to_thread(node.store._opened.connection.execute, "PRAGMA query_only=1")
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


def test_a_commit_that_met_damage_is_not_made_again_over_the_new_file_which_may_hold_later_writes(tmp_path: Path) -> None:
    async def work(nodes: dict[str, Node]) -> None:
        a, commits = nodes["a"], list[Persist]()
        real = a.store.commit

        def commit(persist: Persist) -> None:
            commits.append(persist)
            if len(commits) == 1:
                raise StoreDamaged("it is damaged")
            real(persist)

        a.store.commit = commit  # type: ignore[method-assign]  # the only way to meet damage at this very moment
        [task] = await a.shell.submit([spec(needs=Needs(labels={"who": "nobody"}))], hold=True)
        assert len(commits) == 1
        assert [each.task for each in a.store.load().rows] == [task]

    on_nodes(tmp_path, "a", work, views(view("a")))
