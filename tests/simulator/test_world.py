"""The world itself: if it lies, every simulation does."""

from collections import deque

import pytest

from tests.simulator.world import Ailment, Clock, Network, World


def test_calls_happen_in_the_order_of_time_and_then_of_asking() -> None:
    world, made = World(1), list[tuple[float, str]]()
    for when, name in ((2.0, "c"), (1.0, "a"), (1.0, "b"), (9.0, "late")):
        world.call_at(when, lambda name=name: made.append((world.now, name)))
    cancelled = world.call_later(1.5, made.append, (0.0, "never"))
    cancelled.cancel()
    world.run_until(5.0)
    assert made == [(1.0, "a"), (1.0, "b"), (2.0, "c")] and world.now == 5.0
    world.call_at(3.0, lambda: made.append((world.now, "past")))
    world.run_until(5.0)
    assert made[-1] == (5.0, "past"), "what is overdue happens now, never in the past"


def test_waiting_for_a_condition_stops_at_the_call_that_makes_it_true_or_at_the_limit() -> None:
    world, made = World(1), list[int]()
    for when in range(1, 6):
        world.call_at(float(when), made.append, when)
    assert world.run_until_true(lambda: 3 in made, 10.0) and world.now == 3.0
    assert not world.run_until_true(lambda: 9 in made, 10.0)
    assert world.now == 10.0 and made == [1, 2, 3, 4, 5]


def test_each_name_has_random_numbers_of_its_own() -> None:
    one, other = World(1), World(1)
    one.rng_for("x").random()
    assert one.rng_for("net").random() == other.rng_for("net").random() != World(2).rng_for("net").random()
    assert one.rng_for("a").random() != one.rng_for("b").random()


def test_the_trace_depends_on_what_when_and_in_which_order() -> None:
    def traced(*events: tuple[float, str]) -> str:
        world = World(1)
        for when, what in events:
            world.run_until(when)
            world.trace(what)
        return world.trace_hash()

    assert traced((1, "a"), (2, "b")) == traced((1, "a"), (2, "b"))
    assert len({traced((1, "a"), (2, "b")), traced((1, "b"), (2, "a")), traced((1, "a"), (3, "b")), traced((1, "a"))}) == 4


@pytest.mark.parametrize(("loss", "duplication"), [(0.0, 0.0), (0.3, 0.0), (0.0, 0.3), (0.2, 0.2)])
def test_the_network_loses_and_doubles_as_often_as_it_is_told(loss: float, duplication: float) -> None:
    world, arrived = World(3), list[int]()
    network = Network(world, loss=loss, duplication=duplication)
    for number in range(2000):
        network.send("a", "b", arrived.append, number)
    world.run_until(1.0)
    traffic = network.traffic
    assert abs(traffic.dropped / 2000 - loss) < 0.05
    assert abs(traffic.duplicated / (2000 - traffic.dropped) - duplication) < 0.05
    assert len(arrived) == traffic.delivered == 2000 - traffic.dropped + traffic.duplicated
    assert arrived != sorted(arrived), "messages overtake each other"


def test_a_reliable_message_is_late_instead_of_lost() -> None:
    world, arrived = World(3), list[float]()
    network = Network(world, loss=0.5, duplication=0.5)
    for _ in range(100):
        network.send("a", "b", lambda: arrived.append(world.now), reliable=True)
    world.run_until(0.1)
    assert 30 < len(arrived) < 70, "about half of them are not lost at all"
    world.run_until(100.0)
    assert len(arrived) == 100 and max(arrived) > 7 * Network.RETRANSMIT_SECONDS, "some are lost three times in a row"
    assert network.traffic.dropped == network.traffic.duplicated == 0


def test_a_connection_takes_longer_to_come_about_than_to_be_used() -> None:
    world, arrived = World(3), list[float]()
    network = Network(world, loss=0.5)
    for _ in range(100):
        network.send("a", "b", lambda: arrived.append(world.now), reliable=True, connecting=True)
    world.run_until(0.9)
    early = len(arrived)
    world.run_until(1.1)
    assert 30 < early < 70 and len(arrived) > early


def test_a_cut_has_one_direction_and_stops_what_is_under_way() -> None:
    world, arrived = World(3), list[str]()
    network = Network(world)
    network.send("a", "b", arrived.append, "under way")
    network.cut("a", "b")
    assert not network.send("a", "b", arrived.append, "cut", reliable=True)
    assert network.send("b", "a", arrived.append, "back")
    world.run_until(1.0)
    assert arrived == ["back"] and network.traffic.cut == 2
    network.heal()
    assert network.send("a", "b", arrived.append, "healed")
    world.run_until(2.0)
    assert arrived == ["back", "healed"]


def test_a_partition_separates_groups_and_leaves_who_is_in_none_alone() -> None:
    network = Network(World(3))
    network.partition([["a", "b"], ["c"]])
    pairs = [(one, other) for one in "abcd" for other in "abcd" if network.connected(one, other)]
    assert pairs == [("a", "a"), ("a", "b"), ("b", "a"), ("b", "b"), ("c", "c"), ("d", "d")]


@pytest.mark.parametrize("rate", [0.95, 0.99, 1.0, 1.05])
def test_a_deadline_by_a_clock_that_runs_wrong_is_never_called_early(rate: float) -> None:
    world = World(1)
    clock = Clock(world, rate=rate, shows=123_456.789)
    for number in range(1, 200):
        deadline = clock.now + number / 7
        world.run_until(clock.when(deadline))
        assert deadline <= clock.now < deadline + 1e-6
    clock.restart(5.0)
    assert clock.now == 5.0
    world.run_until(world.now + 10.0)
    assert clock.now == pytest.approx(5.0 + 10.0 * rate)


def test_a_bit_that_flips_is_a_packet_less_and_an_ill_link_loses_and_delays() -> None:
    world, arrived = World(3), list[float]()
    network = Network(world)
    network.corruption = 0.5
    for _ in range(200):
        network.send("a", "b", lambda: arrived.append(world.now))
    world.run_until(1.0)
    assert network.traffic.flipped == 200 - len(arrived) and 60 < len(arrived) < 140
    network.corruption = 0.0
    network.ailments["b"] = Ailment(loss=1.0)
    assert network.send("a", "b", arrived.append, -1.0) and network.traffic.dropped == 1
    network.ailments["b"] = Ailment(lag=2.0)
    network.send("b", "a", lambda: arrived.append(world.now))
    world.run_until(10.0)
    assert 2.0 <= arrived[-1] <= 3.1


def test_what_was_recorded_can_be_delivered_again_to_whoever_had_it() -> None:
    world, arrived = World(3), list[str]()
    network = Network(world)
    network.recorded = deque(maxlen=10)
    network.send("a", "b", arrived.append, "to b")
    network.send("a", "c", arrived.append, "to c")
    world.run_until(1.0)
    assert network.replay("b", 5) == network.traffic.replayed == 1
    world.run_until(5.0)
    assert arrived[2:] == ["to b"]


def test_over_a_bridge_only_who_is_in_neither_group_hears_both() -> None:
    network = Network(World(3))
    network.bridge(["a"], ["c"])
    pairs = [(one, other) for one in "abc" for other in "abc" if one != other and network.connected(one, other)]
    assert pairs == [("a", "b"), ("b", "a"), ("b", "c"), ("c", "b")]
