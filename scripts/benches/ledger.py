"""What a ledger of 100,000 waiting tasks costs: memory, submits, bids, starts, views, and a peer that joins with nothing.

Each part runs in a process of its own, for memory is told by difference: what the process has with the ledger, less what it
had before, when all modules were loaded. CPU is the time of the process, so what else the machine does counts less; where a
disk is waited for, the wall's clock counts. The tasks are those of a sweep: one script, other arguments for each.
"""

import gc
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from statistics import mean, median
from typing import TYPE_CHECKING, Final, TypeVar

import psutil

from benches.measured import Figure, milliseconds
from meshq import codec
from meshq.config import TASKS_LIVE_MAX, Home
from meshq.ids import ObjectId, PeerId, TaskId
from meshq.ledger.core import Ledger
from meshq.ledger.effects import Effect, PeerView, Persist, Prepare, PushReply, SendPush, SendSync
from meshq.ledger.store import Store, Stored
from meshq.ledger.timing import LAN
from meshq.ledger.transfer import decode_answer, decode_question, rows_of
from meshq.task import Environment, Needs, Source, Status, TaskSpec, Telemetry
from meshq.web import documents
from tests.ledger.builders import peer

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

TASKS: Final = TASKS_LIVE_MAX
BATCH: Final = 1_000  # tasks of one submit
PEERS: Final = 10  # that the bidding peer knows
DECISIONS: Final = 200
LISTED: Final = 50  # tasks, the newest: what `meshq tasks` shows unless told otherwise
LOOKS: Final = 20
ME: Final = peer("bench")
DONOR: Final = peer("donor")
SOURCE: Final = ObjectId("0123456789abcdef0123456789abcdef01234567")
TELEMETRY: Final = Telemetry(
    queues=("default",),
    slots_total=1_024,
    cpus=1_024,
    cpus_free=1_024,
    memory_bytes=2**42,
    memory_free_bytes=2**42,
    ledger_epoch=1,
)

T = TypeVar("T")
Numbers = dict[str, float]


def measure() -> list[Figure]:
    with tempfile.TemporaryDirectory(prefix="meshq-bench-") as name:
        told: Numbers = {}
        for part in PARTS:
            told |= _run(part, Path(name))
    return [
        Figure("tasks, and bytes of a row on the wire", f"{TASKS:,}, {told['row_bytes']:.0f} B"),
        Figure(f"submit in batches of {BATCH:,}, core and commit", f"{told['submit_rate']:,.0f} tasks/s", "≥ 3,000 tasks/s"),
        Figure("… of that, seconds of CPU for all", f"{told['submit_cpu']:.1f} s"),
        Figure("memory for each queued task, after submits", f"{told['submit_rss']:,.0f} B", "≤ 1,200 B"),
        Figure("… after a start from the disk", f"{told['start_rss']:,.0f} B", "≤ 1,200 B"),
        Figure("… after a cold join", f"{told['join_rss']:,.0f} B", "≤ 1,200 B"),
        Figure(f"one bid, {PEERS} peers known, median of {DECISIONS}", milliseconds(told["bid"]), "≤ 5 ms"),
        Figure("… the slowest", milliseconds(told["bid_max"])),
        Figure("… a capacity change without a free slot", milliseconds(told["no_bid"])),
        Figure("start from the disk until all is indexed, CPU", f"{told['start_cpu']:.1f} s"),
        Figure("`status` of the queues, CPU", milliseconds(told["status"])),
        Figure(f"`tasks`: the newest {LISTED} that wait, with position and reason, CPU", milliseconds(told["tasks"])),
        Figure(
            "a task by its name; by the beginning of its id", f"{milliseconds(told['by_name'])}; {milliseconds(told['by_id'])}"
        ),
        Figure("cold join: the joining peer's CPU, commits included", f"{told['join_cpu']:.1f} s", "≤ 15 s"),
        Figure("… the donor's CPU", f"{told['donor_cpu']:.1f} s"),
        Figure("… the joining peer's longest block of its event loop", milliseconds(told["join_block"])),
    ]


def _run(part: str, folder: Path) -> Numbers:
    command = (sys.executable, "-m", "benches.ledger", part, str(folder))
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    told: Numbers = json.loads(done.stdout)
    return told


def submit(folder: Path) -> Numbers:
    """100,000 tasks into an empty ledger, whose database the other parts use; then bids for them."""
    store, core = _open(folder / "donor", DONOR)
    _meet(core, DONOR)
    before, cpu, begun = _rss(), time.process_time(), time.monotonic()
    for specs in _sweep():
        _, effects = core.submit(5.0, specs, hold=False)
        _commit(store, effects)
        for send in effects:
            if isinstance(send, SendPush):
                _commit(store, core.handle_push_reply(5.0, send.peer, PushReply(number=send.push.number)))
    wall, cpu = time.monotonic() - begun, time.process_time() - cpu
    memory = (_rss() - before) / TASKS
    row_bytes = mean(len(codec.encode(row)) for row, _ in zip(core.tasks(), range(BATCH), strict=False))
    return {"row_bytes": row_bytes, "submit_rate": TASKS / wall, "submit_cpu": cpu, "submit_rss": memory} | _bids(core)


def _bids(core: Ledger) -> Numbers:
    """How long this peer takes to claim a task when a slot becomes free, and to see that none is."""
    core.handle_capacity(100.0, replace(TELEMETRY, slots_free=0))
    core.adopt(100.0, ())
    bids, others = [], []
    for number in range(DECISIONS):
        full = replace(TELEMETRY, slots_free=number)  # its claims so far are not among what it says is running
        others.append(_timed(partial(core.handle_capacity, 110.0 + number, full))[0])
        seconds, effects = _timed(partial(core.handle_capacity, 110.5 + number, replace(full, slots_free=number + 1)))
        assert sum(1 for effect in effects if isinstance(effect, Prepare)) == 1, "one slot, one claim"
        bids.append(seconds)
    return {"bid": median(bids), "bid_max": max(bids), "no_bid": median(others)}


def start(folder: Path) -> Numbers:
    """A ledger from its database, until it could serve."""
    before, cpu = _rss(), time.process_time()
    _, core = _open(folder / "donor", DONOR)
    _meet(core, DONOR)
    core.adopt(1.0, ())
    cpu = time.process_time() - cpu
    memory = (_rss() - before) / TASKS
    assert len(core.catalog) == TASKS, "the database is not the one that was written"
    return {"start_cpu": cpu, "start_rss": memory} | _views(core)


def _views(core: Ledger) -> Numbers:
    """What `status` and `tasks` ask of the ledger, and how a task is found by its name and by the beginning of its id."""
    some = core.catalog.newest(1)[0]
    asked: dict[str, Callable[[], object]] = {
        "status": lambda: documents.queue_documents(core.catalog, {"default": PEERS}, time.time(), core.settings),
        "tasks": lambda: [_summary(core, task) for task in core.catalog.newest(LISTED, status=Status.QUEUED)],
        "by_name": lambda: core.catalog.named("sweep-7"),
        "by_id": lambda: list(core.starting_with(some[:4])),
    }
    return {name: median(_timed(look)[0] for _ in range(LOOKS)) for name, look in asked.items()}


def _summary(core: Ledger, task: TaskId) -> documents.Document:
    row = core.row(task)
    assert row is not None
    return documents.task_summary(row, str, position=core.position(task), reason=core.waiting_reason(1.0, task))


def join(folder: Path) -> Numbers:
    """A peer with nothing asks another one, in a process of its own, for everything. Pages are decoded as on the way."""
    context = multiprocessing.get_context("spawn")
    line, other_end = context.Pipe()
    donor = context.Process(target=_donate, args=(folder, other_end))
    donor.start()
    told: Mapping[str, int] = line.recv()
    store, core = _open(folder / "joining", ME)
    before, blocks, spent, given = _rss(), [0.0], 0.0, 0.0
    effects = core.handle_peers(1.0, {DONOR: _view(DONOR, "donor"), ME: _view(ME, "me")})
    while core.vector != told:
        questions = [effect.question for effect in effects if isinstance(effect, SendSync)]
        if not questions:
            effects = core.handle_timeout(core.deadline())
            continue
        line.send(codec.encode(questions[0]))
        seconds, data = line.recv()
        given += seconds
        seconds, answer = _timed(partial(decode_answer, data))
        read, parts = _timed(partial(rows_of, answer))
        spent += seconds + read
        blocks.append(seconds)
        for part in parts:
            seconds, effects = _timed(partial(core.handle_sync_rows, 1.0, DONOR, answer.number, part))
            blocks.append(seconds)
            spent += seconds + _timed(partial(_commit, store, effects))[0]
        seconds, effects = _timed(partial(core.handle_sync_answer, 1.0, DONOR, answer))
        blocks.append(seconds)
        spent += seconds + _timed(partial(_commit, store, effects))[0]
    line.send(None)
    donor.join()
    assert sum(1 for _ in core.tasks()) == TASKS, "rows are missing"
    memory = (_rss() - before) / TASKS
    return {"donor_cpu": given, "join_cpu": spent, "join_rss": memory, "join_block": max(blocks)}


def _donate(folder: Path, line: "Connection") -> None:
    _, core = _open(folder / "donor", DONOR)
    line.send(dict(core.vector))
    while (question := line.recv()) is not None:
        line.send(_timed(partial(_answer, core, question)))


def _answer(core: Ledger, question: bytes) -> bytes:
    return codec.encode(core.handle_sync_request(2.0, ME, decode_question(question)))


# ---- what the parts share


def _open(root: Path, owner: PeerId) -> tuple[Store, Ledger]:
    store = Store.open(Home(root), owner)
    return store, _ledger(store.load(), owner)


def _ledger(stored: Stored, owner: PeerId) -> Ledger:
    return Ledger(owner, stored.ledger_epoch, LAN, stored.rows, stored.vector, stored.floors, Random(1), 0.0)


def _meet(core: Ledger, owner: PeerId) -> None:
    """Others are there, each with slots for itself."""
    views = {peer(str(number)): _view(peer(str(number)), str(number)) for number in range(PEERS)}
    core.handle_peers(0.0, views | {owner: _view(owner, "me")})


def _view(owner: PeerId, name: str) -> PeerView:
    return PeerView(peer=owner, name=name, alive=True, telemetry=TELEMETRY)


def _sweep() -> Iterator[list[TaskSpec]]:
    """The tasks in batches, as `submit` of many scripts makes them."""
    for first in range(0, TASKS, BATCH):
        yield [_spec(number) for number in range(first, first + BATCH)]


def _spec(number: int) -> TaskSpec:
    return TaskSpec(
        name=f"sweep-{number}", argv=("train.py", "--lr", f"{number / TASKS:.5f}"),
        submitted_by="somebody@workstation", submitted_at=1.7e9 + number / 1_000, submitted_peer=DONOR,
        needs=Needs(cpus=1, memory_bytes=2**30), source=Source(commit=SOURCE), environment=Environment(python="3.12"),
    )  # fmt: skip


def _commit(store: Store, effects: Sequence[Effect]) -> None:
    """What the shell does with the effects before it sends anything."""
    for effect in effects:
        if isinstance(effect, Persist):
            store.commit(effect)


def _timed(work: Callable[[], T]) -> tuple[float, T]:
    """Seconds of CPU, and what came of it."""
    begun = time.process_time()
    result = work()
    return time.process_time() - begun, result


def _rss() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


PARTS: Final[dict[str, Callable[[Path], Numbers]]] = {"submit": submit, "start": start, "join": join}


if __name__ == "__main__":
    print(json.dumps(PARTS[sys.argv[1]](Path(sys.argv[2]))))
