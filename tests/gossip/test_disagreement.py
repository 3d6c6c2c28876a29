"""What becomes of it when two peers believe different things, and of a peer that hears nobody."""

from collections.abc import Callable

from meshq.gossip import wire
from meshq.gossip.effects import Sync
from meshq.gossip.member import Liveness
from meshq.gossip.swim import Swim
from meshq.gossip.wire import Record, Rumor
from meshq.ids import Epoch
from tests.gossip.builders import (
    DEAD,
    LEFT,
    SUSPECT,
    address,
    answer_all,
    member,
    packet,
    peer,
    run_until,
    sent,
    sync_request,
)

Build = Callable[..., Swim]


def observers(names: str) -> tuple[str, ...]:
    return tuple(wire.observer(peer(name)) for name in names)


def liveness(core: Swim, name: str) -> Liveness:
    found = core.member(peer(name))
    assert found is not None
    return found.liveness


def exchange(asker: Swim, name: str, asked: Swim, other: str, now: float) -> int:
    """One routine push/pull, to its end; how many requests it took."""
    todo = asker._pushpull.ask(now, peer(other))
    requests = 0
    while todo:
        sync = todo.pop()
        assert isinstance(sync, Sync)
        requests += 1
        reply, _ = asked.handle_sync_request(now, peer(name), sync.request)
        todo += [each for each in asker.handle_sync_reply(now, peer(other), reply) if isinstance(each, Sync)]
    return requests


def test_push_pull_repairs_a_leave_that_one_took_for_a_death(swim: Build) -> None:
    one, other = swim("a", *map(member, "bc")), swim("b", *map(member, "ac"))
    one.handle_packet(1, packet("c", rumors=(Rumor(member("c", LEFT, incarnation=1)),)), address("c"))
    other.handle_packet(1, packet("a", rumors=(Rumor(member("c", DEAD)),)), address("a"))
    assert liveness(other, "c") is DEAD
    assert exchange(other, "b", one, "a", 7.0) == 2
    assert liveness(other, "c") is LEFT
    assert exchange(other, "b", one, "a", 8.0) == 1, "now they believe the same, and it ends with the question"


def test_who_is_gone_for_half_of_what_it_is_kept_makes_no_difference_any_more(swim: Build) -> None:
    one, other = swim("a", member("b")), swim("b", member("a"))
    one.handle_packet(0, packet("b", rumors=(Rumor(member("c", LEFT)),)), address("b"))
    assert one._beliefs.view(1) != other._beliefs.view(1)
    assert one._beliefs.view(43_201) == other._beliefs.view(43_201)


def test_a_suspicion_that_lacks_an_observer_is_told_again_so_that_two_may_find_each_other(swim: Build) -> None:
    core = swim("a", *map(member, "bcde"))
    core.handle_packet(10, packet("b", rumors=(Rumor(member("e", SUSPECT), observers("b")),)), address("b"))
    answer_all(core, 33)
    again = [each for each in sent(answer_all(core, 36)) if peer("e") in [rumor.member.peer for rumor in each.rumors]]
    assert {address("b"), address("c"), address("d")} <= {each.address for each in again}


def test_who_hears_nobody_believes_it_within_a_minute(swim: Build) -> None:
    core = swim("a", *map(member, "bcdefghij"))
    run_until(core, 60)
    assert DEAD in [each.liveness for each in core.members()]


def test_the_answer_to_a_push_pull_says_what_i_am_after_it(swim: Build) -> None:
    core = swim("a", member("b"))
    reply, _ = core.handle_sync_request(1, peer("b"), sync_request("b", Rumor(member("a", DEAD), observers("bc"))))
    assert core.me == member("a", incarnation=1)
    assert wire.read_sync_reply(reply).sender == core.me


def test_a_newcomer_hears_what_those_that_are_off_could_run(swim: Build) -> None:
    core = swim("a", member("b"), member("c"))
    core.handle_packet(0, packet("c", records=(Record(peer("c"), Epoch(1), 1, 0, b"gpus"),)), address("c"))
    core.handle_packet(0, packet("b", rumors=(Rumor(member("c", DEAD)),)), address("b"))
    answer_all(core, 100)
    assert liveness(core, "c") is DEAD
    reply, _ = core.handle_sync_request(101, peer("x"), sync_request("x"))
    assert [record.data for record in wire.read_sync_reply(reply).records] == [b"gpus"]
