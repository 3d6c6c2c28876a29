"""What one core tells and is told: rumors, push/pull, addresses, telemetry, and data that is bad."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshq.config import RECORD_BYTES_MAX
from meshq.errors import MalformedData
from meshq.gossip import wire
from meshq.gossip.effects import MemberChanged, RecordChanged, Send, Sync
from meshq.gossip.member import Address
from meshq.gossip.roster import KnownPeer
from meshq.gossip.swim import PROFILES, Swim
from meshq.gossip.wire import Ack, DigestEntry, GossipOnly, Ping, Record, Rumor, SyncReply, SyncRequest
from meshq.ids import Epoch
from tests.gossip import builders
from tests.gossip.builders import (
    DEAD,
    LEFT,
    SUSPECT,
    Sent,
    address,
    answer_all,
    first_ping,
    member,
    number_of,
    pack_digest,
    packet,
    peer,
    readable,
    run_until,
    said_of,
    sent,
    sync_request,
    unpack_digest,
)

Build = Callable[..., Swim]


# Rumors


def test_a_rumor_that_is_news_is_passed_on_a_limited_number_of_times(swim: Build) -> None:
    core = swim("a", *map(member, "bcdefg"))
    core.handle_packet(0, packet("b", rumors=(Rumor(member("g", incarnation=1)),)), address("b"))
    assert len(said_of(answer_all(core, 10), "g")) == 8
    assert said_of(answer_all(core, 20), "g") == []


def test_gossip_rests_while_there_is_nothing_to_tell(swim: Build) -> None:
    core = swim("a", member("b"))
    kinds = [each for each in sent(answer_all(core, 20)) if each.message == GossipOnly() and not each.digest]
    assert kinds == []


def test_a_newer_belief_replaces_the_waiting_rumor(swim: Build) -> None:
    core = swim("a", *map(member, "bcd"))
    core.handle_packet(0, packet("b", rumors=(Rumor(member("d", SUSPECT)),)), address("b"))
    core.handle_packet(0, packet("d", rumors=(Rumor(member("d", incarnation=1)),)), address("d"))
    said = said_of(answer_all(core, 10), "d")
    assert said and all(each == member("d", incarnation=1) for each in said)


def test_in_a_large_mesh_changes_go_by_gossip_instead_of_to_everybody(swim: Build) -> None:
    others = [
        member(chr(0x100 + number), addresses=(Address(f"10.1.{number // 200}.{number % 200}", 1),)) for number in range(70)
    ]
    core = swim("a", *(replace(other, name="x") for other in others))
    effects = core.rename(1.0, "a2")
    assert [effect for effect in effects if isinstance(effect, Send)] == []
    assert len(sent(core.handle_timeout(core.deadline()))) == 3


def test_a_rename_and_a_new_address_raise_my_incarnation_and_are_told_at_once(swim: Build) -> None:
    core = swim("a", member("b"))
    renamed = replace(member("a", incarnation=1), name="a2")
    assert readable(core.rename(0, "a2")) == [
        MemberChanged(member("a"), renamed),
        Sent(address("b"), GossipOnly(), (Rumor(renamed),)),
    ]
    moved = replace(renamed, incarnation=2, addresses=(address("q"),))
    assert core.readdress(0, [address("q")])[0] == MemberChanged(renamed, moved)
    assert core.rename(0, "a2") == [], "nothing new"


def test_a_leaver_says_so_to_everybody_and_stays_gone(swim: Build) -> None:
    core = swim("a", member("b"), member("c"))
    gone = member("a", LEFT, incarnation=1)
    assert readable(core.leave(0)) == [
        MemberChanged(member("a"), gone),
        Sent(address("b"), GossipOnly(), (Rumor(gone),)),
        Sent(address("c"), GossipOnly(), (Rumor(gone),)),
    ]
    told = packet("b", Ping(1, peer("a")), rumors=(Rumor(member("a", DEAD, incarnation=1)),))
    [ack] = sent(core.handle_packet(0.1, told, address("b")))
    assert ack.message == Ack(1) and Rumor(gone) in ack.rumors
    assert core.publish(0.2, b"record") == []
    effects = run_until(core, 120)
    assert all(each.message == GossipOnly() and not each.digest for each in sent(effects))
    assert not [effect for effect in effects if isinstance(effect, Sync)]


# Push/pull and reconnecting


def test_joining_asks_every_seed_once_and_not_myself(swim: Build) -> None:
    core = swim("a")
    request = wire.fill_sync(SyncRequest, member("a"), (), ())
    seeds = [address("b"), address("a"), address("b"), address("c")]
    assert core.join(0, seeds) == [Sync(None, address("b"), request), Sync(None, address("c"), request)]


def test_push_pull_tells_both_sides_everything(swim: Build) -> None:
    asked, asker = swim("a", member("b"), member("c")), swim("x", member("y"))
    asked.publish(0, b"record of a")
    [sync] = asker.join(5, [address("a")])
    assert isinstance(sync, Sync)
    reply, effects = asked.handle_sync_request(5, peer("x"), sync.request)
    changes = [effect for effect in effects if isinstance(effect, MemberChanged)]
    assert changes == [MemberChanged(None, member("x")), MemberChanged(None, member("y"))]
    assert said_of(effects, "x"), "the newcomer is announced to all"
    assert wire.read_sync_reply(reply).sender == member("a")
    back = asker.handle_sync_reply(5, peer("a"), reply)
    assert [effect for effect in back if isinstance(effect, MemberChanged | RecordChanged)] == [
        MemberChanged(None, member("a")), MemberChanged(None, member("b")),
        MemberChanged(None, member("c")), RecordChanged(peer("a"), b"record of a"),
    ]  # fmt: skip
    assert sorted(each.name for each in asker.members()) == sorted(each.name for each in asked.members())
    assert asker.record_age(6, peer("a")) == 6


def test_a_newcomer_leads_to_another_push_pull_about_a_second_later(swim: Build) -> None:
    core = swim("a", member("b"))
    core.handle_packet(1, packet("c", rumors=(Rumor(member("c")),)), address("c"))
    syncs = [effect for effect in answer_all(core, 2.5) if isinstance(effect, Sync)]
    assert len(syncs) == 1


def test_an_idle_mesh_pushes_and_pulls_each_half_minute(swim: Build) -> None:
    core = swim("a", member("b"), member("c"))
    syncs = [effect for effect in answer_all(core, 300) if isinstance(effect, Sync)]
    assert 9 <= len(syncs) <= 11
    assert {sync.address for sync in syncs} == {address("b"), address("c")}


def test_a_sync_with_myself_by_an_address_that_i_did_not_know_as_mine_tells_nothing(swim: Build) -> None:
    core = swim("a")
    reply, effects = core.handle_sync_request(0, peer("a"), sync_request("a", Rumor(member("b"))))
    assert effects == [] and core.handle_sync_reply(0, peer("a"), reply) == []
    assert core.members() == (member("a"),) and core.counters["syncs_own"] == 2


def test_the_dead_are_tried_again_at_all_of_their_addresses(swim: Build) -> None:
    places = (address("p"), address("q"))
    core = swim("a", member("b"))
    core.handle_packet(0, packet("b", rumors=(Rumor(member("x", DEAD, addresses=places)),)), address("b"))
    tried = [effect.address for effect in answer_all(core, 100) if isinstance(effect, Sync) and effect.peer == peer("x")]
    assert 8 <= len(tried) <= 10
    assert tried[:4] == [*places, *places]
    assert not [effect for effect in answer_all(core, 120) if isinstance(effect, Send) and effect.address in places]


def test_where_few_have_failed_each_is_tried_at_least_every_half_minute(swim: Build) -> None:
    core = swim("a", *map(member, "bcdefghijklmnopqrstuvw"))
    core.handle_packet(0, packet("b", rumors=(Rumor(member("x", DEAD)),)), address("b"))
    tried = [effect for effect in answer_all(core, 300) if isinstance(effect, Sync) and effect.peer == peer("x")]
    assert 8 <= len(tried) <= 20


def test_who_left_is_not_tried_again(swim: Build) -> None:
    core = swim("a", member("b"))
    core.handle_packet(0, packet("b", rumors=(Rumor(member("x", LEFT)),)), address("b"))
    assert not [effect for effect in answer_all(core, 300) if isinstance(effect, Sync) and effect.peer == peer("x")]


def test_remembered_peers_are_tried_at_once_and_again_until_they_show_up(swim: Build) -> None:
    core = swim("a")
    known = KnownPeer(peer=peer("x"), name="x", addresses=(address("p"), address("q")), unseen_for=100)
    old = KnownPeer(peer=peer("o"), name="o", addresses=(address("o"),), unseen_for=8 * 86_400)
    [sync] = core.remember(0, [old, known])
    assert isinstance(sync, Sync) and (sync.peer, sync.address) == (peer("x"), address("p"))
    core.handle_sync_failed(1, peer("x"))
    tried = [effect for effect in run_until(core, 35) if isinstance(effect, Sync)]
    assert [effect.address for effect in tried[:2]] == [address("q"), address("p")]
    assert core.known_peers(50) == (replace(known, unseen_for=150),), "the next snapshot keeps it"
    core.handle_packet(60, packet("x", rumors=(Rumor(member("x")),)), address("x"))
    assert core.known_peers(60) == (KnownPeer(peer=peer("x"), name="x", addresses=(address("x"),), unseen_for=0),)


def test_a_sender_whom_i_do_not_know_is_asked_who_it_is_but_seldom(swim: Build) -> None:
    core = swim("a")
    effects = readable(core.handle_packet(0, packet("x", Ping(1, peer("a"))), address("x")))
    assert effects[0] == Sent(address("x"), Ack(1))
    assert [(effect.peer, effect.address) for effect in effects if isinstance(effect, Sync)] == [(peer("x"), address("x"))]
    assert readable(core.handle_packet(0.5, packet("x", Ping(2, peer("a"))), address("x"))) == [Sent(address("x"), Ack(2))]
    assert core.counters["senders_unknown"] == 2


# Addresses


def test_a_member_that_was_not_heard_is_pinged_at_all_its_addresses_and_then_where_it_answers(swim: Build) -> None:
    places = (address("d"), address("e"), address("f"))
    core = swim("a")
    core.handle_sync_request(0, peer("b"), wire.fill_sync(SyncRequest, member("b", addresses=places), (), ()))
    now, ping = first_ping(core)
    number = number_of(ping)
    core.handle_packet(now + 0.01, packet("b", Ack(number)), address("e"))
    pings = [each.address for each in sent(answer_all(core, now + 3.5)) if isinstance(each.message, Ping)]
    assert set(pings) == {address("e")}


def test_a_captured_packet_that_is_sent_on_from_elsewhere_does_not_divert_my_packets(swim: Build) -> None:
    core = swim("a", member("b"))
    core.handle_packet(0, packet("b"), address("z"))
    assert core.addresses(peer("b")) == (address("b"),)
    _, ping = first_ping(core)
    assert ping.address == address("b")


def test_a_member_behind_an_address_translator_is_reached_where_its_ack_came_from(swim: Build) -> None:
    core = swim("a", member("b"))
    now, ping = first_ping(core)
    core.handle_packet(now + 0.1, packet("b", Ack(number_of(ping))), address("z"))
    assert core.addresses(peer("b")) == (address("z"), address("b"))


def test_a_member_that_says_that_it_moved_is_no_longer_sent_to_where_it_was_heard(swim: Build) -> None:
    core = swim("a", member("b"))
    assert core.addresses(peer("b"))[0] == address("b")
    moved = member("b", incarnation=1, addresses=(address("q"),))
    core.handle_packet(1, packet("c", rumors=(Rumor(member("c")), Rumor(moved))), address("c"))
    assert core.addresses(peer("b")) == (address("q"),)


def test_a_new_run_may_be_anywhere_and_is_looked_for_where_it_says(swim: Build) -> None:
    core = swim("a", member("b"))
    moved = member("b", epoch=2, addresses=(address("q"),))
    core.handle_packet(0, packet("c", rumors=(Rumor(member("c")), Rumor(moved))), address("c"))
    assert core.addresses(peer("b")) == (address("q"),)


# Telemetry


def test_a_new_record_goes_to_everybody_at_once(swim: Build) -> None:
    core = swim("a", member("b"), member("c"))
    data = b"r" * RECORD_BYTES_MAX
    record = Record(peer("a"), Epoch(1), 1, 0, data)
    assert readable(core.publish(0, data)) == [
        Sent(address("b"), GossipOnly(), (), (record,)),
        Sent(address("c"), GossipOnly(), (), (record,)),
    ]
    [again, _] = sent(core.publish(3, b"newer"))
    assert again.records == (Record(peer("a"), Epoch(1), 2, 0, b"newer"),)
    assert core.record(peer("a")) == b"newer" and core.record_age(5, peer("a")) == 2


def test_only_a_newer_record_counts(swim: Build) -> None:
    core = swim("a", member("b"))
    new, old = Record(peer("b"), Epoch(1), 5, 2_000, b"new"), Record(peer("b"), Epoch(1), 4, 0, b"old")
    assert core.handle_packet(10, packet("b", records=(new,)), address("b")) == [RecordChanged(peer("b"), b"new")]
    assert core.handle_packet(11, packet("b", records=(old, new)), address("b")) == []
    assert core.record(peer("b")) == b"new" and core.record_age(11, peer("b")) == 3
    assert core.counters["records_stale"] == 2
    restarted = Record(peer("b"), Epoch(2), 1, 0, b"restarted")
    assert core.handle_packet(12, packet("b", records=(restarted,)), address("b")) == [RecordChanged(peer("b"), b"restarted")]


def test_a_record_of_a_stranger_is_dropped_and_counted(swim: Build) -> None:
    core = swim("a", member("b"))
    assert core.handle_packet(0, packet("b", records=(Record(peer("x"), Epoch(1), 1, 0, b"?"),)), address("b")) == []
    assert core.record(peer("x")) is None and core.counters["records_unknown"] == 1


def test_a_record_of_mine_that_i_do_not_remember_is_outbid(swim: Build) -> None:
    core = swim("a", member("b"))
    core.publish(0, b"mine")
    core.handle_packet(1, packet("b", records=(Record(peer("a"), Epoch(1), 40, 0, b"forgotten"),)), address("b"))
    assert core.record(peer("a")) == b"mine"
    [told] = sent(core.publish(2, b"mine again"))
    assert told.records[0].version > 40


def test_a_digest_is_answered_with_what_is_newer_and_asks_for_what_is_older(swim: Build) -> None:
    core = swim("a", member("b"), member("c"), member("d"))
    for name, version in (("c", 5), ("d", 2)):
        record = Record(peer(name), Epoch(1), version, 1_000, name.encode())
        core.handle_packet(0, packet("b", records=(record,)), address("b"))
    digest = pack_digest([entry("c", 3), entry("d", 9), entry("b", 0)])
    effects = core.handle_packet(1, packet("b", digest=digest), address("b"))
    assert readable(effects) == [
        Sent(address("b"), GossipOnly(), digest=pack_digest([entry("d", 2)])),
        Sent(address("b"), GossipOnly(), records=(Record(peer("c"), Epoch(1), 5, 2_000, b"c"),)),
    ]


def entry(name: str, version: int) -> DigestEntry:
    return DigestEntry(wire.short_id(peer(name)), 1 if version else 0, version)


def test_large_records_are_sent_one_by_one_even_while_rumors_wait_and_at_most_three(swim: Build) -> None:
    core = swim("a", *map(member, "bcdefg"))
    for name in "cdefg":
        record = Record(peer(name), Epoch(1), 1, 0, b"r" * RECORD_BYTES_MAX)
        core.handle_packet(0, packet("b", records=(record,)), address("b"))
    core.handle_packet(0, packet("b", rumors=(Rumor(member("c", incarnation=1)),)), address("b"))
    digest = pack_digest([entry(name, 0) for name in "cdefg"])
    answers = sent(core.handle_packet(1, packet("b", digest=digest), address("b")))
    assert [[record.peer for record in each.records] for each in answers] == [[each] for each in sorted(map(peer, "cdefg"))[:3]]


def test_equal_digests_end_the_exchange(swim: Build) -> None:
    core = swim("a", member("b"))
    core.handle_packet(0, packet("b", records=(Record(peer("b"), Epoch(1), 5, 0, b"x"),)), address("b"))
    assert core.handle_packet(1, packet("b", digest=pack_digest([entry("b", 5)])), address("b")) == []


def test_records_of_the_dead_leave_the_digests_after_a_minute(swim: Build) -> None:
    core = swim("a", member("b"), member("c"))
    core.handle_packet(0, packet("b", rumors=(Rumor(member("c", DEAD)),)), address("b"))

    def told(until: float) -> set[bytes]:
        digests = [each.digest for each in sent(answer_all(core, until)) if each.digest]
        return {each.short for digest in digests for each in unpack_digest(digest)}

    assert wire.short_id(peer("c")) in told(55)
    answer_all(core, 61)
    assert told(80) == {wire.short_id(peer("a")), wire.short_id(peer("b"))}


# Bad data


def state(core: Swim) -> tuple[object, ...]:
    return core.members(), dict(core.counters), core.health, core.deadline(), core.known_peers(0)


@given(st.binary(max_size=1300))
def test_garbage_raises_one_exception_and_changes_nothing(data: bytes) -> None:
    core = builders.swim("a", member("b"))
    before = state(core)
    for handle in (
        lambda: core.handle_packet(1, data, address("b")),
        lambda: core.handle_sync_request(1, peer("b"), data),
        lambda: core.handle_sync_reply(1, peer("b"), data),
    ):
        with pytest.raises(MalformedData):
            handle()
    assert state(core) == before


def test_a_packet_with_one_bad_rumor_changes_nothing_at_all(swim: Build) -> None:
    core = swim("a", member("b"))
    before = state(core)
    bad = packet("b", rumors=(Rumor(member("c")), Rumor(replace(member("d"), incarnation=-1))))
    with pytest.raises(MalformedData):
        core.handle_packet(1, bad, address("b"))
    assert state(core) == before


def test_my_own_packet_that_comes_back_is_dropped_and_counted(swim: Build) -> None:
    core = swim("a")
    assert core.handle_packet(0, packet("a", rumors=(Rumor(member("b")),)), address("z")) == []
    assert core.counters["packets_own"] == 1 and core.members() == (member("a"),)


def test_a_reply_is_no_request(swim: Build) -> None:
    core = swim("a")
    with pytest.raises(MalformedData):
        core.handle_sync_request(0, peer("b"), wire.fill_sync(SyncReply, member("b"), (), ()))


@pytest.mark.parametrize("profile", ["lan", "wan", "fast"])
def test_every_profile_gives_an_answer_time_to_arrive(profile: str) -> None:
    config = PROFILES[profile]
    assert config.ack_timeout_min <= config.ack_timeout < config.probe_interval
    assert config.ack_timeout * (1 + config.relay_timeout_share) < config.probe_interval + config.ack_timeout
    assert config.suspicion_max_multiplier >= 1


def test_in_a_large_mesh_a_new_record_is_told_to_everybody_within_seconds_and_not_at_once(swim: Build) -> None:
    others = [member(chr(0x100 + number), addresses=(Address(f"10.1.0.{number + 1}", 1),)) for number in range(100)]
    core = swim("a", *(replace(other, name="x") for other in others))
    assert core.publish(1.0, b"old") == []
    told = [each for each in sent(run_until(core, 1.35)) if each.records]
    assert len(told) == 80 and len({each.address for each in told}) == 80
    core.publish(1.36, b"new")
    told = [each for each in sent(run_until(core, 3.0)) if each.records]
    assert {each.address for each in told} == {other.addresses[0] for other in others}
    assert [each.records[0].data for each in told] == [b"new"] * 100


def test_a_digest_is_not_answered_with_what_its_owner_is_still_telling_everybody(swim: Build) -> None:
    core = swim("a", member("b"), member("c"), member("d"))
    records = tuple(Record(peer(name), Epoch(1), 5, 0, b"new") for name in "cd")
    core.handle_packet(10, packet("b", records=records), address("b"))
    digest = pack_digest([entry("c", 4), entry("d", 0)])
    [answer] = sent(core.handle_packet(10.5, packet("b", digest=digest), address("b")))
    assert [record.peer for record in answer.records] == [peer("d")], "who has nothing at all is told at once"
    [answer] = sent(core.handle_packet(11.5, packet("b", digest=digest), address("b")))
    assert sorted(record.peer for record in answer.records) == sorted([peer("c"), peer("d")])


def test_of_what_does_not_fit_those_come_first_of_which_most_was_missed(swim: Build) -> None:
    core = swim("a", *map(member, "bcdefg"))
    for age, name in enumerate("cdefg"):
        core.handle_packet(0, packet("b", records=(Record(peer(name), Epoch(1), 9, 1000 * age, bytes(900)),)), address("b"))
    digest = pack_digest([entry("c", 8), entry("d", 8), entry("e", 8), entry("f", 2), entry("g", 0)])
    answers = sent(core.handle_packet(9, packet("b", digest=digest), address("b")))
    assert [record.peer for each in answers for record in each.records] == [peer("g"), peer("f"), peer("c")]


def test_my_own_record_travels_without_my_name_and_arrives_with_it(swim: Build) -> None:
    core, other = swim("a", member("b")), swim("b", member("a"))
    [send] = core.publish(1, b"record")
    assert isinstance(send, Send) and send.packet.count(peer("a").encode()) == 1
    assert other.handle_packet(1, send.packet, address("a")) == [RecordChanged(peer("a"), b"record")]
