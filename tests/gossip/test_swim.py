"""What one core does to find out who is alive: probes, suspicions, refutations, stalls."""

from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest

from meshq.config import MEMBERS_MAX
from meshq.gossip import wire
from meshq.gossip.beliefs import SUSPICIONS_MIN
from meshq.gossip.effects import MemberChanged, ProbeFailed, Refuted, Send
from meshq.gossip.member import Address, Member
from meshq.gossip.probing import Probe
from meshq.gossip.roster import KnownPeer
from meshq.gossip.swim import PROFILES, Swim
from meshq.gossip.wire import Ack, GossipOnly, Nack, Ping, PingRequest, Record, Rumor
from meshq.ids import Epoch
from tests.gossip.builders import (
    ALIVE,
    DEAD,
    LEFT,
    SUSPECT,
    Sent,
    address,
    answer_all,
    first_ping,
    member,
    number_of,
    packet,
    peer,
    readable,
    run_until,
    said_of,
    sent,
    sync_request,
)
from tests.gossip.builders import swim as build

Build = Callable[..., Swim]


# Pings and acks


def test_a_ping_for_me_is_acked_to_where_it_came_from(swim: Build) -> None:
    core = swim("a", member("b"))
    elsewhere = Address("10.9.9.9", 1)
    effects = core.handle_packet(0, packet("b", Ping(5, peer("a"))), elsewhere)
    assert readable(effects) == [Sent(elsewhere, Ack(5))]


def test_a_ping_for_somebody_else_is_not_answered(swim: Build) -> None:
    core = swim("a", member("b"))
    assert core.handle_packet(0, packet("b", Ping(5, peer("c"))), address("b")) == []
    assert core.counters["pings_for_another"] == 1


def test_an_ack_corrects_what_the_ping_said_wrongly(swim: Build) -> None:
    core = swim("a", member("b"), member("c", incarnation=4))
    effects = core.handle_packet(0, packet("b", Ping(5, peer("a")), rumors=(Rumor(member("c", DEAD)),)), address("b"))
    assert readable(effects) == [Sent(address("b"), Ack(5), (Rumor(member("c", incarnation=4)),))]


def test_whoever_is_held_dead_and_pings_is_told_so(swim: Build) -> None:
    core = swim("a", member("b"), member("c"))
    core.handle_packet(1, packet("c", rumors=(Rumor(member("b", DEAD)),)), address("c"))
    effects = core.handle_packet(1, packet("b", Ping(5, peer("a"))), address("b"))
    assert readable(effects) == [Sent(address("b"), Ack(5), (Rumor(member("b", DEAD)),))]


def test_a_packet_of_an_old_run_is_told_of_the_newer_one(swim: Build) -> None:
    core = swim("a", member("b", epoch=4))
    effects = core.handle_packet(0, packet("b", Ping(5, peer("a")), epoch=2), address("b"))
    assert readable(effects) == [Sent(address("b"), Ack(5), (Rumor(member("b", epoch=4)),))]


def test_a_probe_that_is_acked_makes_me_feel_better(swim: Build) -> None:
    core = swim("a", member("b"))
    core.handle_stall(0, 0.5)
    now, ping = first_ping(core)
    assert core.health == 1
    assert core.handle_packet(now + 0.1, packet("b", Ack(number_of(ping))), address("b")) == []
    assert core.health == 0


def test_a_probe_without_an_ack_pings_again_asks_helpers_and_then_suspects(swim: Build) -> None:
    core = swim("a", member("b"), member("c"), member("d"), member("e"), member("f"))
    now, ping = first_ping(core)
    assert isinstance(ping.message, Ping)
    target = ping.message.target
    indirect = [each for each in sent(run_until(core, now + 0.5)) if not isinstance(each.message, GossipOnly)]
    assert indirect[0] == ping
    assert [each.message for each in indirect[1:]] == [PingRequest(ping.message.number, target)] * 3
    assert len({each.address for each in indirect[1:]} - {ping.address}) == 3

    effects = [effect for effect in run_until(core, now + 1.0) if not isinstance(effect, Send)]
    before = next(each for each in map(member, "bcdef") if each.peer == target)
    assert effects == [ProbeFailed(target), MemberChanged(before, replace(before, liveness=SUSPECT))]


def test_a_new_suspicion_is_told_to_everybody_at_once_the_suspect_included(swim: Build) -> None:
    core = swim("a", member("b"), member("c"))
    now, ping = first_ping(core)
    assert isinstance(ping.message, Ping)
    effects = run_until(core, now + 1.0)
    suspect = next(each for each in map(member, "bc") if each.peer == ping.message.target)
    told = [each for each in sent(effects) if each.rumors and each.message == GossipOnly()]
    assert [each.address for each in told] == [address("b"), address("c")]
    rumor = Rumor(replace(suspect, liveness=SUSPECT), (wire.observer(peer("a")),), 0)
    assert all(each.rumors == (rumor,) for each in told)


def test_a_suspect_is_told_so_by_every_ping_that_it_gets(swim: Build) -> None:
    core = swim("a", member("b"))
    core.handle_packet(0, packet("b", rumors=(Rumor(member("b", SUSPECT)),)), address("b"))
    pings = 0
    for _ in range(30):
        for each in sent(core.handle_timeout(core.deadline())):
            if isinstance(each.message, Ping):
                assert [rumor.member for rumor in each.rumors] == [member("b", SUSPECT)]
                pings += 1
        if core.member(peer("b")) != member("b", SUSPECT):
            break
    assert pings > 2
    assert core.member(peer("b")) == member("b", DEAD)


def test_an_ack_that_comes_by_a_helper_counts(swim: Build) -> None:
    core = swim("a", member("b"), member("c"))
    now, ping = first_ping(core)
    run_until(core, now + 0.6)
    core.handle_packet(now + 0.7, packet("c" if ping.address == address("b") else "b", Ack(number_of(ping))), address("c"))
    effects = run_until(core, now + 1.0)
    assert not [effect for effect in effects if isinstance(effect, ProbeFailed)]


def test_who_reached_a_member_for_me_last_is_asked_again_and_who_was_not_heard_lately_is_not(swim: Build) -> None:
    core = swim("a", *map(member, "bcdefghij"))
    asked: list[set[object]] = []
    for now in (100.0, 120.0, 140.0, 160.0):
        for name in "cdefg":
            core.handle_packet(now, packet(name), address(name))
        core.handle_packet(now, packet("h"), address("h"))
        probe = Probe(int(now), peer("b"), now, now, now + 1)
        core._detector._sent = {probe.number: probe}
        requests = sent(core._detector._ask_for_help(now, probe))
        asked.append({each.address for each in requests if isinstance(each.message, PingRequest)})
        core.handle_packet(now, packet("g", Ack(probe.number)), address("g"))
    assert all(address("g") in each for each in asked[1:])
    assert not {address(name) for name in "ij"} & set().union(*asked)


def test_an_ack_after_the_verdict_is_counted_and_changes_nothing(swim: Build) -> None:
    core = swim("a", member("b"))
    now, ping = first_ping(core)
    run_until(core, now + 1.2)
    assert core.handle_packet(now + 1.3, packet("b", Ack(number_of(ping))), address("b")) == []
    assert core.counters["acks_late"] == 1
    assert core.member(peer("b")) == member("b", SUSPECT)


def test_a_nack_of_another_probe_does_not_count(swim: Build) -> None:
    core = swim("a", member("b"), member("c"), member("d"))
    now, ping = first_ping(core)
    run_until(core, now + 0.5)
    core.handle_packet(now + 0.9, packet("c", Nack(number_of(ping) + 9)), address("c"))
    run_until(core, now + 1.0)
    assert core.health == 2


def test_a_probe_that_fails_where_nobody_could_help_lowers_my_health(swim: Build) -> None:
    core = swim("a", member("b"))
    now, _ = first_ping(core)
    run_until(core, now + 1.0)
    assert core.counters["probes_failed"] == 1 and core.health == 1


def test_missing_nacks_lower_my_health_and_nacks_keep_it(swim: Build) -> None:
    for nacked, health in ((True, 0), (False, 2)):
        core = swim("a", member("b"), member("c"), member("d"))
        now, ping = first_ping(core)
        helpers = [each for each in sent(run_until(core, now + 0.5)) if isinstance(each.message, PingRequest)]
        assert len(helpers) == 2
        for _ in helpers if nacked else ():
            core.handle_packet(now + 0.9, packet("c", Nack(number_of(ping))), address("c"))
        run_until(core, now + 1.0)
        assert core.health == health


def test_bad_health_makes_probes_rarer(swim: Build) -> None:
    core = swim("a", member("b"))
    for _ in range(20):
        core.handle_stall(0, 0.5)
        core._stalled_at = -1.0
    assert core.health == 7
    now, _ = first_ping(core)
    pings = [each for each in sent(run_until(core, now + 7.9)) if isinstance(each.message, Ping)]
    assert len(pings) == 1, "only the second ping of the same probe"


def test_a_ping_request_is_carried_out_and_its_ack_handed_back(swim: Build) -> None:
    core = swim("a", member("b"), member("c"))
    [ping] = sent(core.handle_packet(0, packet("b", PingRequest(77, peer("c"))), address("b")))
    assert ping == Sent(address("c"), Ping(number_of(ping), peer("c")))
    effects = core.handle_packet(0.1, packet("c", Ack(number_of(ping))), address("c"))
    assert readable(effects) == [Sent(address("b"), Ack(77))]


def test_a_ping_request_without_an_ack_is_nacked_before_the_asker_gives_up(swim: Build) -> None:
    core = swim("a", member("b"), member("c"))
    core.handle_packet(0, packet("b", PingRequest(77, peer("c"))), address("b"))
    nacks = [each for each in sent(run_until(core, 0.45)) if isinstance(each.message, Nack)]
    assert nacks == [Sent(address("b"), Nack(77))]


def test_a_ping_request_for_a_stranger_pings_nobody(swim: Build) -> None:
    core = swim("a", member("b"))
    effects = core.handle_packet(0, packet("b", PingRequest(77, peer("x"))), address("b"))
    assert readable(effects) == [Sent(address("b"), Nack(77))]
    assert core.counters["ping_requests_unknown"] == 1


def test_ping_requests_beyond_the_limit_are_refused_and_counted(swim: Build) -> None:
    core = swim("a", member("b"), member("c"))
    for number in range(300):
        core.handle_packet(0, packet("b", PingRequest(number, peer("c"))), address("b"))
    assert core.counters["relays_refused"] == 300 - 256


# Suspicion, death, refutation


def test_an_unrefuted_suspicion_ends_in_death_within_its_bounds(swim: Build) -> None:
    core = swim("a", *map(member, "bcd"))
    core.handle_packet(10, packet("b", rumors=(Rumor(member("d", SUSPECT), observers("b")),)), address("b"))
    answer_all(core, 33.9)
    assert core.member(peer("d")) == member("d", SUSPECT)
    answer_all(core, 34.1)
    assert core.member(peer("d")) == member("d", DEAD)


def observers(names: str) -> tuple[str, ...]:
    return tuple(wire.observer(peer(name)) for name in names)


def test_among_five_and_more_nobody_dies_on_the_word_of_one(swim: Build) -> None:
    core = swim("a", *map(member, "bcde"))
    core.handle_packet(10, packet("b", rumors=(Rumor(member("e", SUSPECT), observers("b")),)), address("b"))
    answer_all(core, 100)
    assert core.member(peer("e")) == member("e", SUSPECT) and core.counters["deaths_unconfirmed"] == 3
    core.handle_packet(100, packet("c", rumors=(Rumor(member("e", SUSPECT), observers("c")),)), address("c"))
    answer_all(core, 124)
    assert core.member(peer("e")) == member("e", DEAD)


def test_who_is_cut_off_from_everybody_needs_no_second_observer(swim: Build) -> None:
    core = swim("a", *map(member, "bcde"))
    run_until(core, 200)
    assert {core.member(peer(name)) for name in "bcde"} == {member(name, DEAD) for name in "bcde"}


def test_a_death_is_believed_if_two_observers_stand_behind_it_and_else_is_a_suspicion(swim: Build) -> None:
    for told, liveness in (("b", SUSPECT), ("bb", SUSPECT), ("bc", DEAD), ("", SUSPECT)):
        core = swim("a", *map(member, "bcde"))
        core.handle_packet(0, packet("b", rumors=(Rumor(member("e", DEAD), observers(told)),)), address("b"))
        assert core.member(peer("e")) == member("e", liveness), told


def test_an_old_death_is_a_suspicion_first_whose_observers_no_longer_count(swim: Build) -> None:
    core = swim("a", *map(member, "bcde"))
    old = Rumor(member("e", DEAD), observers("bc"), 16)
    core.handle_packet(0, packet("b", rumors=(old,)), address("b"))
    core.handle_packet(0, packet("c", rumors=(old,)), address("c"))
    answer_all(core, 60)
    assert core.member(peer("e")) == member("e", SUSPECT)
    core.handle_packet(60, packet("d", rumors=(Rumor(member("e", SUSPECT), observers("d")),)), address("d"))
    core.handle_packet(60, packet("b", rumors=(old,)), address("b"))
    answer_all(core, 65)
    assert core.member(peer("e")) == member("e", DEAD), "one saw it now, and others then"


def test_a_suspicion_that_confirmations_end_at_once_is_no_stall(swim: Build) -> None:
    core = swim("a", *map(member, "bcdef"))
    core.handle_packet(0, packet("b", rumors=(Rumor(member("f", SUSPECT), observers("b")),)), address("b"))
    answer_all(core, 15)
    for name in "cd":
        core.handle_packet(15, packet(name, rumors=(Rumor(member("f", SUSPECT), observers(name)),)), address(name))
    assert core.deadline() < 15 - 1
    core.handle_timeout(15)
    assert core.member(peer("f")) == member("f", DEAD) and core.counters["stalls"] == 0


def test_a_death_carries_the_names_of_those_who_observed_it(swim: Build) -> None:
    core = swim("a", *map(member, "bcde"))
    for name in "bc":
        core.handle_packet(0, packet(name, rumors=(Rumor(member("e", SUSPECT), observers(name)),)), address(name))
    effects = answer_all(core, 30)
    [rumor] = {rumor for each in sent(effects) for rumor in each.rumors if rumor.member == member("e", DEAD)}
    assert rumor.observers == observers("bc")


def test_a_suspicion_of_a_small_mesh_finds_its_second_observer_when_the_mesh_has_grown(swim: Build) -> None:
    core = swim("a", member("b"), member("c"))
    core.handle_packet(0, packet("b", rumors=(Rumor(member("c", SUSPECT), observers("b")),)), address("b"))
    core.handle_packet(1, packet("b", rumors=tuple(Rumor(member(name)) for name in "def")), address("b"))
    core.handle_packet(2, packet("d", rumors=(Rumor(member("c", SUSPECT), observers("d")),)), address("d"))
    answer_all(core, 30)
    assert core.member(peer("c")) == member("c", DEAD)


def test_whoever_suspects_too_many_within_a_minute_takes_itself_to_be_ill(swim: Build) -> None:
    core = swim("a", *map(member, "bcdefghi"))
    while core.counters["probes_failed"] < 6:
        now = core.deadline()
        for each in sent(core.handle_timeout(now)):
            if isinstance(each.message, PingRequest):
                core.handle_packet(now, packet("b", Nack(each.message.number)), address("b"))
    suspects = [each for each in core.members() if each.liveness is SUSPECT]
    assert len(suspects) == 5 and core.counters["suspicions_withheld"] == 1 and core.health == 7


def test_the_ration_of_suspicions_is_a_tenth_of_a_large_mesh_and_renewed_within_a_minute() -> None:
    names = [chr(0x100 + number) for number in range(99)]
    others = [replace(member(name, addresses=(Address("10.1.0.1", 1),)), name="x") for name in names]
    core = build("a", *others)
    for other in others:
        core._beliefs.suspect(10.0, other.peer)
    assert core.counters["suspicions_withheld"] == 99 - 10
    core._beliefs.suspect(69.9, others[50].peer)
    assert core.counters["suspicions_withheld"] == 99 - 10 + 1
    core._beliefs.suspect(70.1, others[50].peer)
    assert core.counters["suspicions_withheld"] == 99 - 10 + 1


def test_one_member_that_is_suspected_again_and_again_does_not_use_up_the_ration(swim: Build) -> None:
    core = swim("a", member("b"), member("c"))
    for incarnation in range(2 * SUSPICIONS_MIN):
        core._beliefs.suspect(float(incarnation), peer("b"))
        refuted = Rumor(member("b", incarnation=incarnation + 1))
        core.handle_packet(float(incarnation), packet("b", rumors=(refuted,)), address("b"))
    core._beliefs.suspect(2.0 * SUSPICIONS_MIN, peer("c"))
    assert core.member(peer("c")) == member("c", SUSPECT) and not core.counters["suspicions_withheld"]


def test_who_has_used_up_its_ration_may_still_suspect_the_same_members_again(swim: Build) -> None:
    core = swim("a", *map(member, "bcdefgh"))
    for name in "bcdef":
        core._beliefs.suspect(1.0, peer(name))
    core.handle_packet(2.0, packet("b", rumors=(Rumor(member("b", incarnation=1)),)), address("b"))
    core._beliefs.suspect(3.0, peer("b"))
    core._beliefs.suspect(3.0, peer("g"))
    assert core.member(peer("b")) == member("b", SUSPECT, incarnation=1)
    assert core.member(peer("g")) == member("g") and core.counters["suspicions_withheld"] == 1


def test_two_confirmations_shorten_a_suspicion_to_its_minimum(swim: Build) -> None:
    core = swim("a", *map(member, "bcdef"))
    for observer in "bcd":
        rumor = Rumor(member("f", SUSPECT), (wire.observer(peer(observer)),))
        core.handle_packet(10, packet(observer, rumors=(rumor,)), address(observer))
    answer_all(core, 13.9)
    assert core.member(peer("f")) == member("f", SUSPECT)
    answer_all(core, 14.1)
    assert core.member(peer("f")) == member("f", DEAD)


def test_the_same_observer_twice_is_no_confirmation(swim: Build) -> None:
    core = swim("a", *map(member, "bcdef"))
    for carrier in "bcd":
        rumor = Rumor(member("f", SUSPECT), (wire.observer(peer("b")),))
        core.handle_packet(10, packet(carrier, rumors=(rumor,)), address(carrier))
    answer_all(core, 30)
    assert core.member(peer("f")) == member("f", SUSPECT)


def test_a_death_is_told_to_everybody_at_once_the_dead_included(swim: Build) -> None:
    core = swim("a", member("b"), member("c"))
    core.handle_packet(0, packet("b", rumors=(Rumor(member("c", SUSPECT)),)), address("b"))
    deadline = 4.0
    run_until(core, deadline - 0.01)
    effects = core.handle_timeout(deadline)
    assert MemberChanged(member("c", SUSPECT), member("c", DEAD)) in effects
    told = [each.address for each in sent(effects) if member("c", DEAD) in [rumor.member for rumor in each.rumors]]
    assert sorted(told) == [address("b"), address("c")]


def test_a_refutation_ends_a_suspicion(swim: Build) -> None:
    core = swim("a", member("b"), member("c"))
    core.handle_packet(0, packet("b", rumors=(Rumor(member("c", SUSPECT)),)), address("b"))
    effects = core.handle_packet(1, packet("c", rumors=(Rumor(member("c", incarnation=1)),)), address("c"))
    assert effects == [MemberChanged(member("c", SUSPECT), member("c", incarnation=1))]
    answer_all(core, 60)
    assert core.member(peer("c")) == member("c", incarnation=1)


@pytest.mark.parametrize("statement", [member("a", SUSPECT, incarnation=3), member("a", DEAD, incarnation=3)])
def test_i_refute_by_raising_my_incarnation_above_the_statement(swim: Build, statement: Member) -> None:
    core = swim("a", member("b"), member("c"))
    effects = core.handle_packet(0, packet("b", rumors=(Rumor(statement),)), address("b"))
    me = member("a", incarnation=4)
    assert readable(effects) == [
        MemberChanged(member("a"), me),
        Refuted(statement),
        Sent(address("b"), GossipOnly(), (Rumor(me),)),
        Sent(address("c"), GossipOnly(), (Rumor(me),)),
    ]
    assert core.me == me and core.health == 1


def test_an_old_statement_is_not_refuted_again(swim: Build) -> None:
    core = swim("a", member("b"))
    core.handle_packet(0, packet("b", rumors=(Rumor(member("a", SUSPECT)),)), address("b"))
    assert core.handle_packet(1, packet("b", rumors=(Rumor(member("a", SUSPECT)),)), address("b")) == []
    assert core.me.incarnation == 1


def test_a_later_run_of_me_is_outbid_by_epoch(swim: Build) -> None:
    core = swim("a", member("b"))
    theirs = member("a", epoch=7, incarnation=3)
    effects = core.handle_packet(0, packet("b", rumors=(Rumor(theirs),)), address("b"))
    assert effects[:2] == [MemberChanged(member("a"), member("a", epoch=8)), Refuted(theirs)]
    assert core.health == 0, "that was no slowness of mine"


def test_an_earlier_run_of_me_is_ignored() -> None:
    core = Swim(member("a", epoch=5), PROFILES["lan"], Random(0), 0.0)
    rumors = (Rumor(member("b")), Rumor(member("a", DEAD, epoch=4)))
    assert core.handle_packet(0, packet("b", rumors=rumors), address("b")) == [MemberChanged(None, member("b"))]
    assert core.me == member("a", epoch=5)


def test_two_copies_of_one_home_do_not_outbid_each_other_without_end(swim: Build) -> None:
    core = swim("a", member("b"))
    for number in range(100):
        core.handle_packet(1.0, packet("b", rumors=(Rumor(member("a", epoch=10 + 2 * number)),)), address("b"))
    assert core.counters["refutations"] == 10
    assert core.counters["refutations_refused"] == 90


def test_a_higher_epoch_replaces_the_old_run_whatever_became_of_it(swim: Build) -> None:
    core = swim("a", member("b"), member("c"))
    core.handle_packet(0, packet("b", rumors=(Rumor(member("c", LEFT, incarnation=9)),)), address("b"))
    effects = core.handle_packet(1, packet("c", rumors=(Rumor(member("c", epoch=2)),), epoch=2), address("c"))
    assert effects == [MemberChanged(member("c", LEFT, incarnation=9), member("c", epoch=2))]


def test_a_death_heard_by_push_pull_is_a_suspicion_first(swim: Build) -> None:
    core = swim("a", member("b"), member("c"))
    _, effects = core.handle_sync_request(1, peer("b"), sync_request("b", Rumor(member("c", DEAD), (), 500)))
    assert [effect for effect in effects if isinstance(effect, MemberChanged)] == [
        MemberChanged(member("c"), member("c", SUSPECT))
    ]


def test_a_death_heard_by_push_pull_of_somebody_unknown_is_kept_with_its_age(swim: Build) -> None:
    core = swim("a", member("b"))
    core.handle_sync_request(1, peer("b"), sync_request("b", Rumor(member("x", DEAD), (), 500)))
    assert core.member(peer("x")) == member("x", DEAD)
    [known] = [each for each in core.known_peers(1) if each.peer == peer("x")]
    assert known == KnownPeer(peer=peer("x"), name="x", addresses=(address("x"),), unseen_for=500)


def test_the_dead_are_forgotten_after_a_week_and_the_left_after_a_day(swim: Build) -> None:
    core = swim("a")
    for name, liveness in (("b", DEAD), ("c", LEFT)):
        core.handle_packet(0, packet("d", rumors=(Rumor(member(name, liveness)), Rumor(member("d")))), address("d"))
    core.handle_packet(0, packet("d", rumors=(Rumor(member("d", LEFT, incarnation=1)),)), address("d"))
    day = 86_400.0
    core.handle_timeout(day - 1)
    assert core.member(peer("c")) is not None
    core.handle_timeout(day + 61)
    assert core.member(peer("c")) is None and core.member(peer("b")) is not None
    core.handle_timeout(7 * day + 61)
    assert core.members() == (member("a"),)


def test_a_forgotten_member_leaves_no_trace(swim: Build) -> None:
    core = swim("a")
    record = Record(peer("b"), Epoch(1), 1, 0, b"record")
    core.handle_packet(0, packet("b", rumors=(Rumor(member("b")),), records=(record,)), address("b"))
    core.handle_packet(1, packet("b", rumors=(Rumor(member("b", LEFT, incarnation=1)),)), address("b"))
    core.handle_timeout(86_400.0 * 2)
    assert core.member(peer("b")) is None and core.record(peer("b")) is None and core.addresses(peer("b")) == ()
    assert peer("b") not in core._detector._order._order
    core.handle_packet(86_400.0 * 2, packet("c", rumors=(Rumor(member("c")),)), address("c"))
    assert said_of(run_until(core, 86_400.0 * 2 + 5), "b") == []


def test_a_member_that_came_back_from_the_dead_is_probed_again(swim: Build) -> None:
    core = swim("a", member("b"), member("c"))
    core.handle_packet(0, packet("b", rumors=(Rumor(member("c", DEAD)),)), address("b"))
    answer_all(core, 20)
    core.handle_packet(20, packet("c", rumors=(Rumor(member("c", incarnation=1)),)), address("c"))
    pinged = [each.address for each in sent(answer_all(core, 30)) if isinstance(each.message, Ping)]
    assert pinged.count(address("c")) >= 4


def test_a_death_that_is_older_than_anybody_remembers_is_not_learnt(swim: Build) -> None:
    core = swim("a", member("b"))
    core.handle_packet(0, packet("b", rumors=(Rumor(member("x", DEAD), (), 8 * 86_400),)), address("b"))
    assert core.member(peer("x")) is None
    assert core.counters["rumors_expired"] == 1


def test_members_beyond_the_limit_are_refused_and_the_longest_gone_make_room(swim: Build) -> None:
    core = swim("a")
    for number in range(MEMBERS_MAX - 1):
        liveness = DEAD if number < 2 else ALIVE
        rumor = Rumor(replace(member(chr(0x100 + number), liveness, addresses=(address("x"),)), name="x"), (), 5 - number % 3)
        core.handle_packet(10, packet("b", rumors=(rumor,)), address("b"))
    assert len(core.members()) == MEMBERS_MAX
    core.handle_packet(11, packet("b", rumors=(Rumor(member("late", DEAD)),)), address("b"))
    assert core.counters["members_refused"] == 1
    for name in ("new", "newer"):
        core.handle_packet(11, packet("b", rumors=(Rumor(member(name)),)), address("b"))
        assert core.member(peer(name)) == member(name)
    assert not [each for each in core.members() if each.liveness is DEAD]
    core.handle_packet(11, packet("b", rumors=(Rumor(member("newest")),)), address("b"))
    assert core.counters["members_refused"] == 2 and len(core.members()) == MEMBERS_MAX


# Stalls


def test_after_a_long_stall_suspicions_start_anew(swim: Build) -> None:
    core = swim("a", member("b"), member("c"))
    core.handle_packet(0, packet("b", rumors=(Rumor(member("c", SUSPECT)),)), address("b"))
    run_until(core, 3.0)
    core.handle_timeout(30.0)
    assert core.member(peer("c")) == member("c", SUSPECT)
    assert core.counters["stalls"] == 1 and core.health >= 2
    run_until(core, 33.9)
    assert core.member(peer("c")) == member("c", SUSPECT)
    run_until(core, 34.1)
    assert core.member(peer("c")) == member("c", DEAD)


def test_a_probe_that_a_stall_interrupted_has_no_verdict(swim: Build) -> None:
    core = swim("a", member("b"))
    now, _ = first_ping(core)
    effects = core.handle_timeout(now + 20)
    assert not [effect for effect in effects if isinstance(effect, ProbeFailed)]
    assert core.member(peer("b")) == member("b")
    assert core.counters["probes_abandoned"] == 1


def test_a_short_lag_costs_health_and_nothing_else_and_a_blink_costs_nothing(swim: Build) -> None:
    core = swim("a", member("b"), member("c"))
    core.handle_packet(0, packet("b", rumors=(Rumor(member("c", SUSPECT)),)), address("b"))
    assert core.handle_stall(1, 0.05) == [] and core.health == 0
    assert core.handle_stall(1, 0.5) == [] and core.health == 1
    run_until(core, 4.1)
    assert core.member(peer("c")) == member("c", DEAD)


def test_a_stall_that_is_reported_too_short_first_counts_all_the_same(swim: Build) -> None:
    core = swim("a", member("b"), member("c"))
    core.handle_packet(0, packet("b", rumors=(Rumor(member("c", SUSPECT)),)), address("b"))
    core.handle_stall(3.99, 0.9)
    core.handle_stall(4.0, 1.2)
    run_until(core, 5.0)
    assert core.member(peer("c")) == member("c", SUSPECT)


def test_a_stall_forgets_the_confirmations_that_were_heard(swim: Build) -> None:
    core = swim("a", *map(member, "bcdef"))
    for by in "bcd":
        core.handle_packet(1, packet(by, rumors=(Rumor(member("f", SUSPECT), observers(by)),)), address(by))
    core.handle_stall(2, 1.5)
    answer_all(core, 20)
    assert core.member(peer("f")) == member("f", SUSPECT)


def test_one_stall_that_is_reported_twice_counts_once(swim: Build) -> None:
    core = swim("a", member("b"))
    core.handle_stall(10.0, 3.0)
    core.handle_stall(10.05, 3.0)
    assert core.counters["stalls"] == 1 and core.health == 2
