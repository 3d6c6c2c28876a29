"""Rings of keys: however peers tell each other, they end with the same; and no step hands a key to who may not have it."""

import contextlib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshq.errors import MalformedData, MeshqError, TaskFailed, UsageError
from meshq.ids import PeerId
from meshq.trust import keyring
from meshq.trust.keyring import KEYS_MAX, RING_KEYS_MAX, Keyring, Offer, RingKey, Use, ring_of
from meshq.trust.keys import MeshKey

KEYS = [MeshKey(bytes([number] * 16)) for number in range(20)]
K0, K1, K2, K3, K4 = KEYS[:5]
ADA, BOB, CYD, EVE = (PeerId(letter * 52) for letter in "abcd")


def installed(ring: Keyring, key: MeshKey, *holders: PeerId, barred: tuple[PeerId, ...] = ()) -> Keyring:
    return keyring.install(ring, ADA, key, holders, barred, K4)[0]


def ring(*keys: MeshKey) -> Keyring:
    """A mesh that was founded with the first of them and installed the others, for ada, bob and cyd."""
    found = ring_of(keys[0])
    for key in keys[1:]:
        found = installed(found, key, ADA, BOB, CYD)
    return found


# --- merging --------------------------------------------------------------------------------------------------------

IDS = st.sampled_from([keyring.short(peer) for peer in (ADA, BOB, CYD, EVE)])
ENTRIES = st.builds(
    lambda key, number, holders, barred: RingKey(
        id=key.id, secret=key.secret, number=number, holders=tuple(sorted(holders)), barred=tuple(sorted(barred))
    ),
    st.sampled_from(KEYS[:6]), st.integers(0, 3), st.sets(IDS, max_size=3), st.sets(IDS, max_size=2),
)  # fmt: skip
USES = st.builds(
    lambda revision, peer, key, mesh: Use(revision=revision, peer=peer if revision else "", key=key.id, mesh=mesh.mesh_id),
    st.integers(0, 3), IDS, st.sampled_from(KEYS[:6]), st.sampled_from(KEYS[:2]),
)  # fmt: skip


@st.composite
def rings(draw: st.DrawFn) -> Keyring:
    """Any ring that has K0, so that a merge is never left with nothing."""
    entries = {each.id: each for each in draw(st.lists(ENTRIES, max_size=4))}
    entries.setdefault(K0.id, RingKey(id=K0.id, secret=K0.secret))
    removed = draw(st.sets(st.sampled_from([key.id for key in KEYS[1:8]]), max_size=3)) - set(entries)
    keys = tuple(entries[key] for key in sorted(entries))
    return Keyring(keys=keys, removed=tuple(sorted(removed)), use=draw(USES))


@given(rings(), rings(), rings())
def test_merging_is_associative_commutative_and_idempotent(a: Keyring, b: Keyring, c: Keyring) -> None:
    assert keyring.merge(a, b) == keyring.merge(b, a)
    assert keyring.merge(keyring.merge(a, b), c) == keyring.merge(a, keyring.merge(b, c))
    assert keyring.merge(a, a) == a
    assert keyring.merge(keyring.merge(a, b), b) == keyring.merge(a, b)


@given(rings(), rings())
def test_equal_digests_mean_equal_rings(a: Keyring, b: Keyring) -> None:
    assert (a.digest == b.digest) == (a == b)


@given(rings(), rings())
def test_a_ring_survives_its_stored_form_and_an_offer_its_form_on_the_wire(a: Keyring, b: Keyring) -> None:
    assert keyring.decode(keyring.encode(a)) == a
    offer = keyring.offer(b, CYD, (K1.id,))
    assert keyring.decode_offer(keyring.encode(offer)) == offer


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["install", "use", "remove", "tell", "tell"]), st.integers(0, 2), st.integers(0, 2), st.integers(0, 4)
    ),
    max_size=30,
)


@settings(max_examples=300)
@given(STEPS)
def test_whatever_people_do_on_three_machines_at_once_they_agree_once_all_have_told_all(
    steps: list[tuple[str, int, int, int]],
) -> None:
    """No step here asks whether the others are ready: what the commands refuse is done all the same."""
    peers = [ADA, BOB, CYD]
    held = [ring(K0)] * 3
    for what, at, other, which in steps:
        try:
            match what:
                case "install":
                    held[at] = keyring.install(held[at], peers[at], KEYS[which], peers, (), K4)[0]
                case "use":
                    held[at] = keyring.use(held[at], peers[at], KEYS[which].id)
                case "remove":
                    held[at] = keyring.remove(held[at], [KEYS[which].id])
                case _:
                    tell(held, peers, at, other)
        except (UsageError, TaskFailed):
            continue
    shared = set(held[0].ids_sorted) & set(held[1].ids_sorted) & set(held[2].ids_sorted)
    if not shared - {gone for each in held for gone in each.removed}:
        return  # they have cut themselves off from each other: no key is common to all
    for _ in range(3):
        for at in range(3):
            for other in range(3):
                tell(held, peers, at, other)
    founding = [[key for key in each.keys if key.id != K0.id] for each in held]
    assert founding[0] == founding[1] == founding[2]
    assert held[0].removed == held[1].removed == held[2].removed
    assert held[0].use == held[1].use == held[2].use
    assert {each.use.mesh for each in held} == {K0.mesh_id}


def tell(held: list[Keyring], peers: list[PeerId], at: int, other: int) -> None:
    """One exchange, of what each may have."""
    if not set(held[at].ids_sorted) & set(held[other].ids_sorted):
        return  # no handshake
    try:
        told = keyring.absorb(held[other], keyring.offer(held[at], peers[other]))
    except MalformedData:
        return
    held[other] = told
    held[at] = keyring.absorb(held[at], keyring.offer(told, peers[at]))


# --- the three steps ------------------------------------------------------------------------------------------------


def test_a_new_key_is_beside_the_old_one_until_it_is_used_and_the_old_one_removed() -> None:
    first = ring(K0)
    second = installed(first, K1, ADA, BOB)
    assert [each.id for each in second.ordered] == [K0.id, K1.id]
    third = keyring.use(second, BOB, K1.id)
    assert [each.id for each in third.ordered] == [K1.id, K0.id]
    fourth = keyring.remove(third, [K0.id])
    assert (fourth.ids_sorted, fourth.removed) == ((K1.id,), (K0.id,))
    assert [each.use.mesh for each in (first, second, third, fourth)] == [K0.mesh_id] * 4
    assert [each.use.revision for each in (first, second, third, fourth)] == [0, 1, 2, 2]


def test_each_step_repeated_changes_nothing() -> None:
    second = installed(ring(K0), K1, ADA)
    assert installed(second, K1, ADA) == second
    third = keyring.use(second, ADA, K1.id)
    assert keyring.use(third, BOB, K1.id) == third
    fourth = keyring.remove(third, [K0.id])
    assert keyring.remove(fourth, [K0.id]) == fourth


def test_an_install_without_a_key_takes_the_one_that_waits_and_else_a_new_one() -> None:
    once, first = keyring.install(ring(K0), ADA, None, (ADA,), (), K1)
    twice, second = keyring.install(once, ADA, None, (ADA, BOB), (), K2)
    assert (first, second) == (K1.id, K1.id)
    assert [entry.holders for entry in twice.keys if entry.id == K1.id] == [(keyring.short(ADA), keyring.short(BOB))]
    third, after_use = keyring.install(keyring.use(twice, ADA, K1.id), ADA, None, (ADA,), (), K2)
    assert (after_use, len(third.keys)) == (K2.id, 3)


def test_a_ring_that_is_full_takes_no_more_and_says_what_to_remove() -> None:
    full = ring(K0, K1, K2, K3)
    assert len(full.keys) == KEYS_MAX
    with pytest.raises(TaskFailed, match="at most 4") as caught:
        installed(full, K4, ADA)
    assert K1.id in caught.value.hint and K0.id not in caught.value.hint
    assert installed(full, K1, EVE) != full  # to hand out a key that is there is no new one


def test_the_key_in_use_is_never_removed_and_a_removed_one_never_comes_back() -> None:
    both = ring(K0, K1)
    with pytest.raises(UsageError, match="in use"):
        keyring.remove(both, [K0.id])
    left = keyring.remove(both, [K1.id])
    with pytest.raises(UsageError, match="never accepted again"):
        installed(left, K1, ADA)
    with pytest.raises(UsageError, match="never accepted again"):
        keyring.use(left, ADA, K1.id)
    assert keyring.merge(left, both) == left


def test_a_key_that_is_not_there_can_be_neither_used_nor_removed() -> None:
    with pytest.raises(UsageError, match=f"no key {K1.id}") as caught:
        keyring.use(ring(K0), ADA, K1.id)
    assert K0.id in caught.value.hint
    with pytest.raises(UsageError, match=f"no key {K1.id}"):
        keyring.remove(ring(K0), [K1.id])


def test_a_register_that_cannot_count_on_says_so() -> None:
    both = ring(K0, K1)
    last = replace(both, use=replace(both.use, revision=keyring.REVISION_MAX))
    with pytest.raises(TaskFailed, match="can't be counted"):
        keyring.use(last, ADA, K1.id)


def test_an_install_that_cannot_count_on_says_so() -> None:
    entry = RingKey(id=K0.id, secret=K0.secret, number=keyring.REVISION_MAX)
    with pytest.raises(TaskFailed, match="full"):
        installed(replace(ring(K0), keys=(entry,)), K1, ADA)


# --- who may have what ----------------------------------------------------------------------------------------------


def test_a_key_is_handed_to_its_holders_alone() -> None:
    both = installed(ring(K0), K1, ADA, BOB)
    assert [each.id for each in keyring.offer(both, BOB).keys] == [K1.id]
    assert keyring.offer(both, EVE).keys == ()
    assert keyring.offer(both, EVE).held == (K0.id, K1.id)  # ids are public


def test_who_proves_to_have_one_key_is_told_of_that_one_and_gets_no_other() -> None:
    both = installed(ring(K0), K1, ADA, BOB)
    assert [each.id for each in keyring.offer(both, EVE, (K0.id,)).keys] == [K0.id]
    assert [each.id for each in keyring.offer(both, EVE, (K1.id,)).keys] == [K1.id]


def test_who_is_barred_gets_nothing_even_if_a_later_install_names_it() -> None:
    without = installed(ring(K0), K1, ADA, BOB, barred=(EVE,))
    again = installed(without, K1, ADA, BOB, EVE)
    assert keyring.offer(again, EVE).keys == ()


def test_a_key_that_was_handed_out_is_not_taken_for_one_that_somebody_goes_without() -> None:
    handed = installed(ring(K0), K1, ADA, EVE)
    _, chosen = keyring.install(handed, ADA, None, (ADA,), (EVE,), K2)
    assert chosen == K2.id
    with pytest.raises(UsageError, match="handed to a machine that is to go without"):
        installed(handed, K1, ADA, barred=(EVE,))


def test_a_member_cannot_name_itself_a_holder_of_a_key_that_it_does_not_have() -> None:
    mine = installed(ring(K0), K1, ADA)
    with pytest.raises(ValueError, match="does not fit"):
        RingKey(id=K1.id, secret=bytes(16), holders=(keyring.short(EVE),))
    told = keyring.offer(ring_of(K0), ADA, (K0.id,))  # what eve, who has K0, can say
    assert keyring.offer(keyring.absorb(mine, told), EVE, (K0.id,)).keys == keyring.offer(mine, EVE, (K0.id,)).keys


# --- newcomers, those who were away, partitions ---------------------------------------------------------------------


def test_a_newcomer_with_a_later_key_learns_what_the_mesh_is_called() -> None:
    mesh = keyring.use(ring(K0, K1), ADA, K1.id)
    newcomer = keyring.absorb(ring_of(K1), keyring.offer(mesh, EVE, (K1.id,)))
    assert (newcomer.use.mesh, newcomer.current.id) == (K0.mesh_id, K1.id)
    assert keyring.merge(mesh, newcomer) == mesh


def test_a_newcomer_with_a_key_that_is_not_in_use_yet_turns_nobody_over() -> None:
    for newcomer in (ring_of(K1), ring_of(KEYS[7])):
        mesh = installed(ring(K0), newcomer.current.key, ADA)
        told = keyring.absorb(mesh, keyring.offer(newcomer, ADA, (newcomer.current.id,)))
        assert told == mesh


def test_who_lacks_the_key_in_use_goes_on_with_the_newest_that_it_has() -> None:
    mesh = keyring.use(installed(ring(K0, K1), K2, ADA), ADA, K2.id)
    left_out = keyring.absorb(ring(K0, K1), keyring.offer(mesh, BOB))
    assert (left_out.use.key, left_out.current.id) == (K2.id, K1.id)


def test_a_home_that_comes_back_claims_nothing_for_its_mesh() -> None:
    mesh = keyring.use(ring(K0, K1), BOB, K1.id)
    back = keyring.choose(installed(ring(K0), K1), K1.id)
    assert (back.current.id, back.use.mesh) == (K1.id, K0.mesh_id)
    assert keyring.merge(mesh, back).use == mesh.use
    mistaken = keyring.choose(installed(ring(K0, K1), K2), K2.id)  # K2 waits in the mesh: it is not in use there
    assert keyring.merge(ring(K0, K1), mistaken).current.id == K0.id


def test_where_one_side_uses_a_key_and_the_other_removes_it_all_go_on_with_what_is_left() -> None:
    both = ring(K0, K1)
    used, removed = keyring.use(both, ADA, K1.id), keyring.remove(both, [K1.id])
    healed = keyring.merge(used, removed)
    assert (healed.current.id, healed.ids_sorted) == (K0.id, (K0.id,))
    assert keyring.use(healed, ADA, K0.id).use.key == K0.id


# --- bad input ------------------------------------------------------------------------------------------------------


def test_an_offer_that_would_leave_no_key_is_refused_and_changes_nothing() -> None:
    evil = Offer(held=(K0.id,), keys=(), removed=(K0.id,), use=ring(K0).use)
    with pytest.raises(MalformedData, match="0 keys"):
        keyring.absorb(ring(K0), evil)


def test_an_offer_with_more_keys_than_people_make_is_refused() -> None:
    many = tuple(RingKey(id=key.id, secret=key.secret) for key in KEYS)
    with pytest.raises(ValueError, match="too many"):
        Offer(held=(K0.id,), keys=many, removed=(), use=ring(K0).use)
    some = many[:RING_KEYS_MAX]
    with pytest.raises(MalformedData, match="17 keys"):
        keyring.absorb(ring_of(KEYS[19]), Offer(held=(K0.id,), keys=some, removed=(), use=ring(K0).use))


@given(st.binary(max_size=300))
def test_garbage_is_no_ring_and_no_offer(data: bytes) -> None:
    for decode in (keyring.decode, keyring.decode_offer):
        with pytest.raises(MalformedData):
            decode(data)


@given(st.data())
def test_a_ring_with_any_byte_changed_decodes_to_a_ring_or_is_refused(data: st.DataObject) -> None:
    stored = bytearray(keyring.encode(ring(K0, K1)))
    stored[data.draw(st.integers(0, len(stored) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(MalformedData):
        assert isinstance(keyring.decode(bytes(stored)), Keyring)


@pytest.mark.parametrize(
    ("keys", "removed"),
    [
        ((), ()),
        (ring(K0, K1).keys, (K0.id,)),
        (ring(K0, K1).keys, ("zz",)),
        (ring(K0, K1).keys, (K2.id, K2.id)),
        (tuple(reversed(ring(K0, K1).keys)), ()),
        (ring(K0, K1).keys * 2, ()),
    ],
)
def test_a_ring_that_contradicts_itself_cannot_be_made(keys: tuple[RingKey, ...], removed: tuple[str, ...]) -> None:
    with pytest.raises(ValueError):
        Keyring(keys=keys, removed=removed, use=ring(K0).use)


@pytest.mark.parametrize(
    ("revision", "peer", "key", "mesh"),
    [(-1, "", K0.id, K0.mesh_id), (0, "x", K0.id, K0.mesh_id), (0, "", "K0", K0.mesh_id), (0, "", K0.id, "../mesh")],
)
def test_a_register_of_another_form_cannot_be_made(revision: int, peer: str, key: str, mesh: str) -> None:
    with pytest.raises(ValueError):
        Use(revision=revision, peer=peer, key=key, mesh=mesh)


# --- naming keys ----------------------------------------------------------------------------------------------------


def test_a_key_is_named_by_its_id_or_the_beginning_of_it() -> None:
    both = keyring.remove(ring(K0, K1, K2), [K2.id])
    assert keyring.resolve(both, f" {K1.id[:3].upper()} ") == K1.id
    assert keyring.resolve(both, K2.id) == K2.id
    for reference in ("", "zz", "12345678"):
        with pytest.raises(UsageError, match="no key"):
            keyring.resolve(both, reference)


def test_a_beginning_that_means_several_keys_is_refused_with_their_ids() -> None:
    alike = next((a, b) for a in KEYS for b in KEYS if a != b and a.id[0] == b.id[0])
    with pytest.raises(UsageError, match="means 2 keys") as caught:
        keyring.resolve(ring(*alike), alike[0].id[0])
    assert alike[1].id in caught.value.message


def test_a_key_given_in_place_of_its_id_is_not_repeated() -> None:
    with pytest.raises(UsageError) as caught:
        keyring.resolve(ring(K0), K1.text)
    assert K1.text[8:] not in caught.value.message + caught.value.hint


def test_nothing_of_a_ring_shows_its_secrets_in_logs() -> None:
    shown = repr(ring(K0, K1)) + repr(keyring.offer(ring(K0, K1), BOB)) + str(ring(K0, K1))
    for key in (K0, K1):
        assert key.text not in shown and key.secret.hex() not in shown and repr(key.secret) not in shown


def test_errors_that_people_see_name_no_secret() -> None:
    full = ring(K0, K1, K2, K3)
    with pytest.raises(MeshqError) as caught:
        installed(full, K4, ADA)
    assert not [key for key in KEYS if key.text in caught.value.message + caught.value.hint]
