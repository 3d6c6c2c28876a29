"""The small cores that `Swim` is made of."""

from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshq.gossip import suspicion, wire
from meshq.gossip.allowance import Allowance
from meshq.gossip.probing import ProbeOrder, RoundTrips
from meshq.gossip.profile import PROFILES
from meshq.gossip.rumors import PACKET_RUMORS_MAX, RumorQueue, retransmit_limit
from meshq.gossip.swim import FORGET_INTERVAL, Swim
from meshq.gossip.telemetry import DIGEST_PEERS_MAX, RecordTable
from meshq.gossip.wire import Record, Rumor, short_id
from meshq.ids import Epoch
from tests.gossip.builders import LEFT, SUSPECT, address, member, packet, peer

LAN = PROFILES["lan"]


@pytest.mark.parametrize(("members", "shortest"), [(1, 4.0), (3, 4.0), (10, 4.0), (100, 8.0), (1000, 12.0)])
def test_the_shortest_suspicion_grows_with_the_logarithm_of_the_mesh(members: int, shortest: float) -> None:
    assert suspicion.timeout_min(LAN, members) == pytest.approx(shortest)


def test_confirmations_shrink_a_suspicion_by_their_logarithm() -> None:
    assert [round(suspicion.timeout(4, 24, 2, n), 2) for n in range(4)] == [24, 11.38, 4, 4]


def test_a_mesh_too_small_to_confirm_uses_the_shortest_suspicion() -> None:
    assert suspicion.begin(LAN, 3, 10.0, ()).deadline == 14.0
    assert suspicion.begin(LAN, 4, 10.0, ()).deadline == 34.0


@given(st.lists(st.lists(st.sampled_from(["p", "q", "r", "s"]), max_size=3).map(tuple), max_size=6))
def test_confirmations_only_ever_shorten_and_never_below_the_minimum(heard: list[tuple[str, ...]]) -> None:
    held = suspicion.begin(LAN, 10, 0.0, ("p",))
    for observers in heard:
        confirmed = held.confirmed(observers)
        assert 4.0 <= confirmed.deadline <= held.deadline
        assert (confirmed is held) == (confirmed.observers == held.observers)
        held = confirmed
    distinct = {observer for observers in heard for observer in observers} | {"p"}
    assert set(held.observers) <= distinct and len(held.observers) == min(3, len(distinct))


@pytest.mark.parametrize(("members", "limit"), [(1, 6), (9, 8), (10, 9), (99, 12), (100, 13), (999, 16), (1000, 17)])
def test_the_number_of_retransmissions_grows_with_the_logarithm(members: int, limit: int) -> None:
    assert retransmit_limit(4, members) == limit


def told(queue: RumorQueue) -> list[Rumor]:
    return [rumor for rumor, _ in queue.next()]


def test_the_queue_tells_what_was_told_least_and_of_that_the_newest() -> None:
    queue = RumorQueue()
    a, b, c = (Rumor(member(name)) for name in "abc")
    for rumor in (a, b, c):
        queue.put(rumor, news=False)
    assert told(queue) == [c, b, a]
    queue.told([c], 2)
    assert told(queue) == [b, a, c]
    queue.told([c, b], 2)
    assert told(queue) == [a, b]
    newer = Rumor(member("b", incarnation=1))
    queue.put(newer, news=False)
    assert told(queue) == [newer, a]
    queue.told([b], 1)
    assert told(queue) == [newer, a], "what was told of an older belief does not count for the newer one"


def test_news_and_doubts_take_turns_however_many_of_the_others_wait() -> None:
    """Doubts alone filled every packet of a large mesh with losses, and a leave took 6 s to reach the last."""
    queue = RumorQueue()
    doubts = [Rumor(member(name, SUSPECT)) for name in "abcdefghijklmnopqrstuvwxyz"]
    left = Rumor(member("0", LEFT))
    queue.put(left, news=True)
    queue.told([left], 9)
    for doubt in doubts:
        queue.put(doubt, news=False)
    assert told(queue)[:3] == [left, doubts[-1], doubts[-2]] and len(told(queue)) == PACKET_RUMORS_MAX
    for name in "123456789":
        queue.put(Rumor(member(name, LEFT)), news=True)
    assert [rumor.member.liveness for rumor in told(queue)[:20:2]] == [LEFT] * 10
    assert [rumor.member.liveness for rumor in told(queue)[1:20:2]] == [SUSPECT] * 10


def test_news_is_told_oftener_than_doubts() -> None:
    queue = RumorQueue()
    doubt, left = Rumor(member("a", SUSPECT)), Rumor(member("b", LEFT))
    queue.put(doubt, news=False)
    queue.put(left, news=True)
    rounds = []
    while len(queue):
        rounds.append(set(told(queue)))
        queue.told(told(queue), 4)
    assert [doubt in each for each in rounds] == [True] * 4 + [False] * 2
    assert all(left in each for each in rounds)


def test_what_is_more_than_a_suspicion_or_its_refutation_is_news(swim: Callable[..., Swim]) -> None:
    core = swim("a")
    queue = core._beliefs.queue
    core.handle_packet(0, packet("b", rumors=(Rumor(member("b")), Rumor(member("c")), Rumor(member("d")))), address("b"))
    assert news(queue) == {"b", "c", "d"}
    doubts = (Rumor(member("c", SUSPECT), observers=("x",)), Rumor(member("d", incarnation=1)))
    core.handle_packet(0, packet("b", rumors=doubts), address("b"))
    assert news(queue) == {"b"}
    changes = (Rumor(member("c", LEFT)), Rumor(replace(member("d", incarnation=2), name="other")))
    core.handle_packet(0, packet("b", rumors=changes), address("b"))
    assert news(queue) == {"b", "c", "other"}
    core.rename(0, "me")
    assert news(queue) == {"b", "c", "other", "me"}


def news(queue: RumorQueue) -> set[str]:
    return {entry.coded[0].member.name for entry in queue._entries.values() if entry.news}


def test_a_member_that_is_forgotten_leaves_no_rumor_behind_and_each_has_one_at_most(swim: Callable[..., Swim]) -> None:
    core = swim("a")
    for incarnation in range(3):
        rumors = tuple(Rumor(member(name, LEFT, incarnation=incarnation)) for name in "bcdefg")
        core.handle_packet(0, packet("b", rumors=rumors), address("b"))
        assert len(core._beliefs.queue) == 6
    core.handle_timeout(LAN.left_kept)
    core.handle_timeout(LAN.left_kept + FORGET_INTERVAL)
    assert [each.name for each in core.members()] == ["a"] and len(core._beliefs.queue) == 0


@given(st.integers(0, 1000), st.integers(1, 20))
def test_every_round_probes_everybody_once(seed: int, count: int) -> None:
    order = ProbeOrder(Random(seed))
    peers = [peer(str(number)) for number in range(count)]
    for each in peers:
        order.insert(each)
    for _ in range(3):
        assert sorted(str(order.next(peers)) for _ in peers) == sorted(peers)


def test_rounds_are_shuffled_anew() -> None:
    order = ProbeOrder(Random(0))
    peers = [peer(str(number)) for number in range(10)]
    for each in peers:
        order.insert(each)
    rounds = [tuple(order.next(peers) for _ in peers) for _ in range(5)]
    assert len(set(rounds)) == 5


@given(st.integers(0, 1000))
def test_a_newcomer_is_probed_within_two_rounds_and_nobody_twice_for_it(seed: int) -> None:
    rng = Random(seed)
    order = ProbeOrder(rng)
    peers = [peer(str(number)) for number in range(5)]
    for each in peers:
        order.insert(each)
    before = [order.next(peers) for _ in range(rng.randint(0, 4))]
    order.insert(peer("new"))
    everybody = [*peers, peer("new")]
    rest = [order.next(everybody) for _ in range(len(peers) - len(before))]
    assert len(set(before + rest) - {peer("new")}) >= len(peers) - 1
    assert peer("new") in rest + [order.next(everybody) for _ in range(len(everybody))]


def test_nobody_is_probed_in_an_empty_mesh_and_the_dead_are_skipped() -> None:
    order = ProbeOrder(Random(0))
    assert order.next([]) is None
    order.insert(peer("a"))
    order.insert(peer("b"))
    assert [order.next([peer("b")]) for _ in range(3)] == [peer("b")] * 3
    assert order.next([]) is None


def test_the_ack_timeout_follows_the_slowest_round_trips_within_its_limits() -> None:
    trips = RoundTrips()
    assert trips.ack_timeout(0.2, 0.5) == 0.5, "nothing is known yet"
    for _ in range(20):
        trips.add(0.001)
    assert trips.ack_timeout(0.2, 0.5) == 0.2
    trips.add(0.1)
    assert trips.ack_timeout(0.2, 0.5) == pytest.approx(0.3)
    trips.add(2.0)
    assert trips.ack_timeout(0.2, 0.5) == 0.5


def test_an_allowance_gives_a_burst_and_then_its_rate() -> None:
    allowance = Allowance(rate=2.0, burst=3.0, now=10.0)
    assert [allowance.take(10.0) for _ in range(4)] == [True, True, True, False]
    assert [allowance.take(10.5), allowance.take(10.5)] == [True, False]
    assert [allowance.take(100.0) for _ in range(4)] == [True, True, True, False]
    assert allowance.take(50.0) is False, "a clock that goes back gives nothing"


RECORDS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.binary(max_size=3)), max_size=12)


@given(RECORDS, st.randoms(use_true_random=False))
def test_records_converge_to_the_newest_in_whatever_order_they_come(records: list[tuple[int, int, bytes]], rng: Random) -> None:
    by_stamp = {(epoch, version): data for epoch, version, data in records}
    offers = [Record(peer("b"), Epoch(epoch), version, 0, data) for (epoch, version), data in by_stamp.items()]
    table, other = RecordTable(peer("a")), RecordTable(peer("a"))
    for record in offers:
        table.offer(0, record)
    rng.shuffle(offers)
    for record in offers:
        other.offer(0, record)
    assert table.get(peer("b")) == other.get(peer("b"))
    newest = table.get(peer("b"))
    assert (newest.stamp if newest else None) == max(by_stamp, default=None)


def test_a_digest_holds_a_random_slice_of_a_large_mesh() -> None:
    table = RecordTable(peer("a"))
    peers = [peer(str(number)) for number in range(500)]
    digest = [wire.read_entry(entry) for entry in table.digest(Random(1), peers)]
    assert len({entry.short for entry in digest}) == DIGEST_PEERS_MAX
    assert {entry.short for entry in digest} <= {short_id(each) for each in peers}
    assert digest != [wire.read_entry(entry) for entry in table.digest(Random(2), peers)]


def test_the_versions_of_a_restarted_peer_begin_anew_above_its_old_ones() -> None:
    table = RecordTable(peer("a"))
    first = table.publish(0, Epoch(1), b"1")
    second = table.publish(0, Epoch(1), b"2")
    third = table.publish(0, Epoch(2), b"3")
    stamps = [(each.epoch, each.version) for each in (first, second, third)]
    assert stamps == [(1, 1), (1, 2), (2, 1)]


def test_the_age_of_a_record_grows_wherever_it_is_kept() -> None:
    one, other = RecordTable(peer("x")), RecordTable(peer("y"))
    one.offer(10.0, Record(peer("a"), Epoch(1), 1, 2_500, b"data"))
    [carried] = one.records(14.0, [peer("a")])
    assert carried.age_ms == 6_500
    other.offer(1_000.0, carried)
    held = other.get(peer("a"))
    assert held is not None and held.published_at == 993.5


def test_who_is_forgotten_leaves_the_probe_order_and_the_others_keep_their_turns() -> None:
    order = ProbeOrder(Random(0))
    for name in "abcdef":
        order.insert(peer(name))
    everybody = [peer(name) for name in "abcdef"]
    first = [order.next(everybody) for _ in range(3)]
    assert first[0] is not None
    order.forget(first[0])
    rest = [order.next(everybody) for _ in range(3)]
    assert sorted(map(str, [*first, *rest])) == sorted(everybody)
    assert len(order._order) == 5
