"""Anti-entropy by notes: a hash of what a peer has comes by gossip, and a sync only follows if it keeps differing."""

from meshq.ledger.core import Ledger
from meshq.ledger.effects import SendSync
from tests.ledger.builders import nothing_new, row
from tests.ledger.test_core import THREE, B, C, among, only, run_until


def test_a_peer_whose_note_still_differs_after_what_was_on_its_way_is_asked() -> None:
    core = among(THREE, row())
    answer_syncs_until(core, 1.0, 40.0)  # idle: the next routine sync is far
    core.handle_note(40.0, B, core.note)
    core.handle_note(40.0, C, b"something else!!")
    asked = [effect.peer for effect in only(run_until(core, 40.0, 42.1), SendSync)]
    assert asked.count(C) == 1 and asked.count(B) == 0


def answer_syncs_until(core: Ledger, now: float, until: float) -> None:
    while (due := core.deadline()) < until:
        now = max(now, due)
        for sync in only(core.handle_timeout(now), SendSync):
            core.handle_sync_answer(now, sync.peer, nothing_new(sync))
