"""Identifiers: their spelling is part of the contract, since they stand in folders, URLs and people's scripts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshq import ids
from meshq.ids import ActorId, Dot, PeerId

PEER = ids.peer_id(bytes(32))


def test_a_peer_id_is_the_hash_of_its_key_for_ever() -> None:
    assert PEER == "ew24b5f4i2fwkytdfwnknpmnny3oot2fxxhs2q6ljujulph2bsoa"
    assert ids.is_peer_id(PEER) and ids.peer_id(b"\1" * 32) != PEER


@given(st.integers(1, 999_999), st.integers(1, 10**9 - 1), st.integers(1, 10**18 - 1))
def test_a_fence_splits_into_what_made_it(attempt: int, ledger_epoch: int, seq: int) -> None:
    dot = Dot(ids.actor_id(PEER, ledger_epoch), seq)
    fence = ids.fence(attempt, dot)
    assert ids.is_fence(fence) and ids.split_fence(fence) == (attempt, dot)


@pytest.mark.parametrize(
    "text", ["", "1", "0." + "a" * 26 + ".1.1", "1." + "a" * 26 + ".1.0", "../1." + "a" * 26 + ".1.1", "1.x.1.1"]
)
def test_nothing_else_is_a_fence(text: str) -> None:
    assert not ids.is_fence(text)
    with pytest.raises(ValueError, match="not a fence"):
        ids.split_fence(text)


def test_an_actor_says_which_peer_and_which_database() -> None:
    actor = ids.actor_id(PEER, 12)
    assert ids.is_actor_id(actor)
    assert ids.actor_peer_prefix(actor) == PEER[:26]
    assert ids.actor_ledger_epoch(actor) == 12


def test_a_task_is_named_by_the_write_that_submitted_it() -> None:
    one, two = Dot(ActorId("a" * 26 + ".1"), 1), Dot(ActorId("a" * 26 + ".1"), 2)
    assert ids.is_task_id(ids.task_id(one))
    assert ids.task_id(one) == ids.task_id(one) != ids.task_id(two)


def test_words_that_could_leave_a_folder_are_no_ids() -> None:
    for text in ("..", "../a", "A" * 16, "a" * 15, "a" * 17, "a/" + "a" * 14):
        assert not ids.is_task_id(text)
    assert not ids.is_peer_id(PeerId(PEER[:-1]))
    assert not ids.is_object_id("g" * 40) and ids.is_object_id("0" * 40)
