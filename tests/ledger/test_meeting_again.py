"""After a restart of the whole lab, an agent starts nothing before it has met everybody who may run it already.

Found by a soak: ada and bob were back first. eve, whose claim had started and was known only to those still on their way, came
two seconds later, and the task ran twice.
"""

from dataclasses import replace

from meshq.ids import Dot, fence
from meshq.ledger.effects import Prepare, Push, Start, Stop
from meshq.ledger.row import Claim, Started, merge
from meshq.ledger.timing import LAN
from tests.ledger.builders import actor, dot, peer, row, view, views
from tests.ledger.test_core import ack, among, born_where_first, only, row_in

B, C = peer("b"), peer("c")
TOKEN = fence(1, Dot(actor("a"), 1))
GONE = view("c", alive=False)  # known from the run before, and not heard of since
TOGETHER = views(view("a"), view("b"), view("c"))


def test_a_claim_waits_for_a_peer_that_was_known_before_the_restart_and_gives_way_to_what_it_runs() -> None:
    task = born_where_first("a", "bc")
    core = among(views(view("a"), view("b"), GONE))
    _, effects = core.handle_push(1.0, B, Push(number=1, rows=(task,), dots=()))
    assert [each.claimed.fence for each in only(effects, Prepare)] == [TOKEN]
    assert only([*core.handle_ready(1.1, TOKEN), *ack(core, 1.2, effects)], Start) == []
    assert only(core.handle_timeout(LAN.grace - 0.1), Start) == []

    core.handle_peers(2.0 + LAN.grace - 2.2, TOGETHER)
    claim = dot("c", 7)
    running = row((claim, Claim(attempt=1, peer=C, seen=task.vector)), (dot("c", 8), Started(claim=claim)), birth=task.birth)
    _, effects = core.handle_push(LAN.grace - 0.1, C, Push(number=1, rows=(running,), dots=(claim, dot("c", 8))))
    assert only(effects, Stop) == [Stop(TOKEN, "superseded")]
    assert only(core.handle_timeout(LAN.grace + 5), Start) == []


def test_who_does_not_come_back_within_the_grace_is_waited_for_no_longer() -> None:
    task = born_where_first("a", "bc")
    core = among(views(view("a"), view("b"), GONE))
    _, effects = core.handle_push(1.0, B, Push(number=1, rows=(task,), dots=()))
    assert only([*core.handle_ready(1.1, TOKEN), *ack(core, 1.2, effects)], Start) == []
    assert core.deadline() <= LAN.grace
    assert only(core.handle_timeout(LAN.grace), Start) == [Start(TOKEN)]


def test_who_left_or_was_met_and_is_gone_again_is_not_waited_for() -> None:
    task = born_where_first("a", "bc")
    for last in (replace(GONE, left=True), GONE):
        core = among(views(view("a"), view("b"), last) if last.left else TOGETHER)
        core.handle_peers(0.5, views(view("a"), view("b"), last))
        _, effects = core.handle_push(1.0, B, Push(number=1, rows=(task,), dots=()))
        assert only([*core.handle_ready(1.1, TOKEN), *ack(core, 1.2, effects)], Start) == [Start(TOKEN)]
        assert merge(row_in(core, task.task), task) == row_in(core, task.task)
