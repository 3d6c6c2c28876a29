"""What it costs to find the rows in which two ledgers differ: 100,000 rows, of which 0 to 10,000 are others.

Counted are the bytes of all questions and answers without the rows themselves; a list of all ids and hashes would be 2.4 MB.
"""

from collections.abc import Iterable
from dataclasses import replace
from random import Random
from time import process_time
from typing import Final

from benches.measured import Figure, milliseconds
from meshq import codec
from meshq.ids import PeerId, TaskId
from meshq.ledger.donor import Donor
from meshq.ledger.effects import SyncCompare, SyncRanges
from meshq.ledger.reconcile import Inquiry, Reconciliation
from meshq.ledger.replica import Replica
from meshq.ledger.row import Cancel
from tests.ledger.builders import peer, spec

ROWS: Final = 100_000
GOALS: Final = {0: 68, 1: 1_800, 10: 9_900, 100: 63_000, 1_000: 308_000, 10_000: 902_000}  # bytes: measured with a prototype
GOAL_FACTOR: Final = 1.5


def measure() -> list[Figure]:
    figures = []
    mine = Replica(peer("a"), 1, (), {}, {})
    tasks = [mine.create(spec(f"task {number}"), number)[1].task for number in range(ROWS)]
    theirs = Replica(peer("b"), 1, mine.rows(), mine.vector, {})
    Random(1).shuffle(tasks)
    done = 0
    for differing, goal in GOALS.items():
        _change(theirs, tasks[done:differing])
        done = differing
        before = process_time()
        control, questions, longest, rows = _reconcile(mine, theirs)
        assert rows == differing, f"{rows} rows were found, not {differing}"
        seconds = process_time() - before
        figures.append(
            Figure(
                f"{differing} of {ROWS} rows differ: control bytes",
                f"{control}, {questions} questions, {milliseconds(seconds)} of CPU, longest answer {milliseconds(longest)}",
                f"{goal * GOAL_FACTOR:.0f} bytes",
            )
        )
    return figures


def _change(replica: Replica, tasks: Iterable[TaskId]) -> None:
    for task in tasks:
        replica.add(task, Cancel(by="x"))


def _reconcile(mine: Replica, theirs: Replica) -> tuple[int, int, float, int]:
    """Control bytes, questions, seconds of the longest answer, rows that came."""
    donor, asker = Donor(theirs, run=1), PeerId(peer("a"))
    ranges = Reconciliation(mine.fingerprints)
    control, questions, longest, rows = 0, 0, 0.0, 0
    ask: Inquiry | None = ranges.ask()
    while ask is not None:
        questions += 1
        question = SyncCompare(
            number=questions, run=1, root=ask.root, prefixes=ask.prefixes, wanted=ask.wanted, tasks=ask.tasks
        )
        before = process_time()
        answer = donor.answer(0.0, asker, question)
        longest = max(longest, process_time() - before)
        assert isinstance(answer, SyncRanges) and ranges.heed(answer)
        rows += len(answer.rows)
        control += len(codec.encode(question)) + len(codec.encode(replace(answer, rows=())))
        ask = ranges.ask()
    return control, questions, longest, rows


if __name__ == "__main__":
    for figure in measure():
        print(f"  {figure.what:<55} {figure.value}   goal: {figure.goal}")
