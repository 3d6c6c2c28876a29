"""A peer that flaps takes no tasks; but when most of the mesh flaps it is the network, and the queues must move.

Found by a soak: after five cuts in two minutes all five peers were damped, for an hour, and 15 tasks waited for nobody.
"""

import pytest

from meshq.ids import Dot, fence
from meshq.ledger.effects import PeerView, Prepare, Push
from meshq.ledger.sessions import judged
from tests.ledger.builders import actor, peer, telemetry, view, views
from tests.ledger.test_core import among, born_where_first, only

FLAPS = telemetry(problem="others took it for dead", damped=True)


def mesh(*damped: str) -> dict[str, PeerView]:
    return {name: view(name, FLAPS if name in damped else None) for name in "abc"}


@pytest.mark.parametrize(("damped", "claims"), [("", True), ("a", False), ("ab", True), ("abc", True), ("bc", True)])
def test_being_damped_keeps_a_peer_from_claiming_unless_most_are(damped: str, claims: bool) -> None:
    task = born_where_first("a", "bc")
    core = among(views(*mesh(*damped).values()))
    _, effects = core.handle_push(1.0, peer("c"), Push(number=1, rows=(task,), dots=()))
    expected = [fence(1, Dot(actor("a"), 1))] if claims else []
    assert [prepare.claimed.fence for prepare in only(effects, Prepare)] == expected


def test_its_own_damping_counts_at_once() -> None:
    core = among(views(*mesh().values()))
    core.handle_capacity(0.9, FLAPS)
    task = born_where_first("a", "bc")
    _, effects = core.handle_push(1.0, peer("c"), Push(number=1, rows=(task,), dots=()))
    assert only(effects, Prepare) == []


def test_only_live_peers_are_counted_and_no_other_problem_is_excused() -> None:
    full = telemetry(problem="its disk is full")
    dead = view("d", FLAPS, alive=False)
    odd_one = views(view("a", FLAPS), view("b"), dead)
    assert judged(odd_one) == odd_one
    most = views(view("a", FLAPS), view("b", FLAPS), view("c", full), dead)
    told = {one.name: one.telemetry.problem for one in judged(most).values()}
    assert told == {"a": "", "b": "", "c": "its disk is full", "d": ""}
