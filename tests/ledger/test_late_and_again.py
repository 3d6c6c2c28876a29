"""What comes late, or again and again, holds nothing up and ends nothing that is newer."""

from meshq.ids import Dot, fence
from meshq.ledger.buckets import bucket_of
from meshq.ledger.effects import Push, SendSync, Start, SyncOffer
from tests.ledger.builders import actor, ledger, view, views
from tests.ledger.test_core import BOTH, THREE, B, C, among, born_where_first, only


def test_a_peer_that_comes_again_and_again_holds_up_a_start_for_four_times_the_patience_only() -> None:
    first = born_where_first("a", "bc")
    core = among()
    core.handle_push(1.0, C, Push(number=1, rows=(first,), dots=(first.birth,)))
    token = fence(1, Dot(actor("a"), 1))
    core.handle_ready(1.1, token)
    started = []
    for half_second in range(1, 10):
        now = 1.0 + half_second / 2
        seen = THREE if half_second % 2 == 0 else views(view("a"), view("b"))
        started += [(now, start.fence) for start in only(core.handle_peers(now, seen) + core.handle_timeout(now), Start)]
    assert started == [(5.0, token)]


def test_a_late_failure_does_not_end_the_newer_sync_with_that_peer() -> None:
    core = ledger()
    core.adopt(0.0, [])
    [old] = only(core.handle_peers(0.0, BOTH), SendSync)
    [new] = only(core.handle_stall(1.0, 99.0), SendSync)
    core.handle_sync_failed(1.1, B, old.question.number)
    offer = SyncOffer(number=new.question.number, run=1, parts=(bucket_of(actor("c")),), vector={actor("c"): 5})
    assert only(core.handle_sync_answer(1.2, B, offer), SendSync) != []
