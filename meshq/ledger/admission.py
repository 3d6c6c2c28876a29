"""Which submits the ledger takes in: pure checks, all of them before anything is stored."""

from collections.abc import Iterable, Sequence

from meshq import codec
from meshq.config import SPEC_BYTES_MAX, TASKS_LIVE_MAX
from meshq.errors import TaskFailed, UsageError
from meshq.ledger.effects import PeerView
from meshq.ledger.placement import check_placeable
from meshq.task import TaskSpec


def admit(specs: Sequence[TaskSpec], hold: bool, views: Iterable[PeerView], *, live: int, room: int) -> None:
    """Pass if all of these tasks may be stored, where `live` wait or run already and there is `room` for so many rows.

    Raises Unplaceable (unless `hold`), UsageError (one is too large) or TaskFailed (they are too many).
    """
    known = tuple(views)
    for spec in specs:
        if len(codec.encode(spec)) > SPEC_BYTES_MAX:
            raise UsageError(
                f"submitting {spec.name!r}: its description is larger than {SPEC_BYTES_MAX // 1024} KiB",
                "shorten its arguments and environment, or put them into a file beside the script",
            )
        if not hold:
            check_placeable(spec, known)
    if live + len(specs) > TASKS_LIVE_MAX:
        raise TaskFailed(
            f"submitting {len(specs)} tasks: {live} of at most {TASKS_LIVE_MAX} tasks wait or run already",
            "wait for some of them to end, or cancel some",
        )
    if len(specs) > room:
        raise TaskFailed(f"submitting {len(specs)} tasks: the ledger holds all the tasks that it can, ended ones included")
