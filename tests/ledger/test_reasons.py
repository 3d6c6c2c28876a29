"""Why a task that somebody holds does not go on: nobody should wait without knowing why."""

from meshq.ledger.row import Claim, Started
from tests.ledger.builders import dot, ledger, peer, row, view, views

HELD = row(
    (dot("b", 1), Claim(attempt=1, peer=peer("b"), seen={dot("a", 1).actor: 1})),
    (dot("b", 2), Started(claim=dot("b", 1))),
)


def test_of_a_task_whose_machine_is_silent_the_reason_says_so_and_what_comes_next() -> None:
    core = ledger("c", [HELD])
    core.handle_peers(1.0, views(view("a"), view("b"), view("c")))
    assert core.waiting_reason(1.0, HELD.task) == ""
    core.handle_peers(2.0, views(view("a"), view("b", alive=False, changed_at=2.0), view("c")))
    assert core.waiting_reason(3.0, HELD.task) == (
        "b does not answer: when its lease is over, the task is given to another peer"
    )


def test_who_sees_fewer_than_half_says_that_it_gives_nothing_away_and_for_how_long() -> None:
    core = ledger("c", [HELD])
    gone = [view(name, alive=False, changed_at=2.0) for name in "ab"]
    core.handle_peers(2.0, views(*gone, view("c")))
    assert core.waiting_reason(12.0, HELD.task) == (
        "b does not answer, and this peer sees fewer than half of those that were there: for 590 s more, or until they are "
        "back, it gives their tasks to nobody"
    )
