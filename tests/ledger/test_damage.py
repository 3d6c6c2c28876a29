"""A disk that damages what was written: bits that flip, pages of zeros, files that end too early.

Whatever happens to the files of one peer, it must start, must not say of any row something else than was written, must not say
that it has seen what it does not have (the others would delete theirs), and must have everything again after a sync.
"""

import asyncio
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

from meshq.config import Home
from meshq.ids import TaskId, actor_id
from meshq.ledger import shell as shell_module
from meshq.ledger.effects import Persist
from meshq.ledger.store import Store, Stored
from meshq.task import Needs
from tests.ledger.builders import peer, spec, view, views
from tests.ledger.mesh import Disk, Mesh
from tests.ledger.test_shell import LIMIT, Node, on_nodes

A, B = peer("a"), peer("b")
PAGE = 4_096
NOBODY = Needs(labels={"who": "nobody"})
DAMAGE = ("rows_quarantined", "databases_damaged", "tables_damaged", "databases_copied", "ledger_epochs_minted")


@dataclass(frozen=True)
class Written:
    """What two peers had in the end, and the files of the first, before and after SQLite tidied up."""

    disk: Disk
    other: Disk
    home: Home
    tidy: Path
    untidy: Path


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    mesh = Mesh(7, 2)
    a, b = mesh.peers[A], mesh.peers[B]
    for number in range(40):
        at, task = (a, b)[number % 2], spec(env={"X": "x" * (number % 5) * 1_000})
        mesh.world.call_later(number * 0.5, mesh.submit, at, task)
    mesh.world.run_until(30.0)
    assert mesh.world.run_until_true(mesh.settled, 600.0)
    mesh.world.run_until(mesh.world.now + 1.0)  # until all is committed
    assert len(a.disk.rows) == 40 and a.disk.rows == b.disk.rows
    folder = tmp_path_factory.mktemp("written")
    store = Store.open(Home(folder / "home"), A)
    store.mint(1)
    rows = list(a.disk.rows.values())
    for start in range(0, 40, 8):
        some = tuple(rows[start : start + 8])
        store.commit(Persist(some, {}, a.disk.floors, durable=True))
    store.commit(Persist((), a.disk.vector, a.disk.floors, True, a.disk.settings))
    shutil.copytree(folder / "home", folder / "untidy")
    store.close()
    shutil.copytree(folder / "home", folder / "tidy")
    return Written(a.disk, b.disk, Home(folder / "home"), folder / "tidy", folder / "untidy")


def damage(home: Home, rng: Random) -> str:
    """Damage one of the files that matter; what was done."""
    files = [file for file in home.root.glob("ledger.*") if not file.name.endswith("-shm") and file.stat().st_size]
    file = rng.choices(files, [file.stat().st_size + 2_000 for file in files])[0]
    data = bytearray(file.read_bytes())
    kind, place = rng.choices(("flip", "page", "end"), (8, 1, 1))[0], rng.randrange(len(data))
    match kind:
        case "flip":
            data[place] ^= 1 << rng.randrange(8)
        case "page":
            place -= place % PAGE
            data[place : place + PAGE] = bytes(min(PAGE, len(data) - place))
        case _:
            del data[place:]
    file.write_bytes(data)
    return f"{kind} at {place} of {file.name}"


def put_back(source: Path, home: Home) -> None:
    """Into the same files: an inode tells nothing then."""
    for file in home.root.iterdir():
        if not (source / file.name).exists():
            file.unlink()
    for file in source.iterdir():
        (home.root / file.name).write_bytes(file.read_bytes())


def check_truthful(stored: Stored, was: Disk) -> None:
    """No row is another one, and whatever the vector covers is there."""
    found = {each.task: each for each in stored.rows}
    for task, each in found.items():
        assert each == was.rows[task]
    for task, each in was.rows.items():
        known = found[task].vector if task in found else {}
        for actor, seq in each.vector.items():
            assert known.get(actor, 0) >= min(seq, stored.vector.get(actor, 0)), f"{task} is taken for known"
    assert all(was.floors.get(actor, 0) >= seq for actor, seq in stored.floors.items())


@pytest.mark.parametrize("seed", range(10))
def test_damaged_files_are_noticed_or_harmless_and_a_sync_brings_everything_back(written: Written, seed: int) -> None:
    rng, home = Random(seed), written.home
    noticed = 0
    for number in range(20):
        source = rng.choice((written.tidy, written.untidy))
        put_back(source, home)
        what = damage(home, rng)
        store = Store.open(home, A)
        stored = store.load()
        store.close()
        check_truthful(stored, written.disk)
        noticed += any(store.counters[name] for name in DAMAGE)
        check_recovery(stored, written, 100 * seed + number, what)
    assert noticed > 2


def check_recovery(stored: Stored, written: Written, seed: int, what: str) -> None:
    """Together with a peer that has everything."""
    mesh = Mesh(seed, 2)
    a, b = mesh.peers[A], mesh.peers[B]
    for one in (a, b):
        one.crash(power=False)
    rows = {each.task: each for each in stored.rows}
    vector = {str(actor): seq for actor, seq in stored.vector.items()}
    floors = {str(actor): seq for actor, seq in stored.floors.items()}
    a.disk = Disk(stored.ledger_epoch, rows, vector, floors, stored.settings)
    b.disk = written.other.copy()
    a.start()
    b.start()
    assert mesh.world.run_until_true(mesh.settled, 120.0), what
    assert a.core is not None and b.core is not None
    for one in (a, b):
        assert one.core is not None
        assert {each.task: each for each in one.core.tasks()} == written.disk.rows, what
    mine = actor_id(A, 1)
    if stored.vector.get(mine, 0) < written.disk.vector[mine]:
        assert a.core.ledger_epoch > 1, f"{what}: it would write again what it has written"


async def until(node: Node, condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT):
        while not condition():
            await node.shell._in_thread(int)  # a turn of the thread in which all this happens


@pytest.fixture
def busy_scrub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shell_module, "SCRUB_SECONDS", 0.01)
    monkeypatch.setattr(shell_module, "SCRUB_PAUSE", 0.01)


@pytest.mark.usefixtures("busy_scrub")
def test_a_row_that_is_damaged_while_the_agent_runs_is_written_again(tmp_path: Path) -> None:
    async def work(nodes: dict[str, Node]) -> None:
        node = nodes["a"]
        tasks = await node.shell.submit([spec(needs=NOBODY) for _ in range(5)], hold=True)

        def harm() -> None:
            execute = node.store._opened.connection.execute
            execute("UPDATE rows SET data = x'00' WHERE task = ?", (tasks[0],))
            execute("DELETE FROM rows WHERE task = ?", (tasks[1],))

        await node.shell._in_thread(harm)
        await until(node, lambda: node.shell.core.counters["rows_written_again"] == 2)
        await node.shell.flush()
        assert node.store.counters["rows_quarantined"] == 1
        assert await node.shell._in_thread(node.store.check, tasks) == ()

    on_nodes(tmp_path, "a", work, views(view("a")))


@pytest.mark.usefixtures("busy_scrub")
@pytest.mark.parametrize("scrubbed", [False, True])
def test_a_file_that_is_ruined_while_the_agent_runs_is_written_anew(
    tmp_path: Path, scrubbed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not scrubbed:
        monkeypatch.setattr(shell_module, "SCRUB_PAUSE", 1_000.0)
    tasks: list[TaskId] = []

    async def work(nodes: dict[str, Node]) -> None:
        node = nodes["a"]
        tasks.extend(await node.shell.submit([spec(needs=NOBODY, env={"X": "x" * 10_000}) for _ in range(400)], hold=True))
        home = node.home

        def harm() -> None:
            node.store._opened.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            node.store._opened.connection.execute("PRAGMA cache_size=0")
            size = home.ledger.stat().st_size
            with home.ledger.open("r+b") as file:
                file.seek(PAGE)
                file.write(b"\xff" * (size - PAGE))

        await node.shell._in_thread(harm)
        if not scrubbed:
            tasks.extend(await node.shell.submit([spec(needs=NOBODY)], hold=True))
        await until(node, lambda: node.store.counters["databases_damaged"] > 0)
        tasks.extend(await node.shell.submit([spec(needs=NOBODY)], hold=True))

    on_nodes(tmp_path, "a", work, views(view("a")))
    store = Store.open(Home(tmp_path / "a"), A)
    assert {each.task for each in store.load().rows} == set(tasks)
    assert store.counters["ledger_epochs_minted"] == 0
    store.close()
