"""By which way packets go: UDP, TCP for whom UDP does not reach, and how much may go at all."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from meshq import codec
from meshq.errors import PeerError
from meshq.gossip import wire
from meshq.gossip.connectivity import MISSES_MAX, SILENT_SECONDS, Connections, Connectivity
from meshq.gossip.effects import Answer, Effect, NoteHeard, Send, Stream, Sync, TransportChanged
from meshq.gossip.member import Address
from meshq.gossip.swim import Routine, Swim
from meshq.gossip.throttle import BYTES_BURST, PACKETS_BURST, Throttle
from meshq.gossip.wire import Ack, GossipOnly, Message, Packet, Ping, PingRequest, Record, Rumor
from meshq.ids import Epoch, PeerId
from tests.gossip.builders import (
    LEFT,
    SUSPECT,
    address,
    first_ping,
    member,
    number_of,
    pack_digest,
    packet,
    peer,
    run_until,
    sent,
)

Build = Callable[..., Swim]


def streamed(effects: list[Effect]) -> list[tuple[PeerId, Message]]:
    return [(each.peer, wire.read_packet(each.packet).message) for each in effects if isinstance(each, Stream)]


def answered(effects: list[Effect]) -> list[Message]:
    return [wire.read_packet(each.packet).message for each in effects if isinstance(each, Answer)]


def probe_by_tcp_alone(core: Swim, times: int) -> list[Effect]:
    """Let so many probes be answered over TCP and not by UDP."""
    effects: list[Effect] = []
    while times:
        new = core.handle_timeout(core.deadline())
        effects += new
        for to, message in streamed(new):
            if isinstance(message, Ping):
                name = next(name for name in "bcdefgh" if peer(name) == to)
                effects += core.handle_stream_answer(core.deadline(), to, packet(name, Ack(message.number)))
                times -= 1
    return effects


def test_a_probe_without_an_ack_is_repeated_over_tcp_and_an_answer_there_counts(swim: Build) -> None:
    core = swim("a", member("b"), member("c"))
    now, ping = first_ping(core)
    assert isinstance(ping.message, Ping)
    effects = run_until(core, now + 0.5)
    assert streamed(effects) == [(ping.message.target, ping.message)]
    name = "b" if ping.message.target == peer("b") else "c"
    core.handle_stream_answer(now + 0.6, peer(name), packet(name, Ack(ping.message.number)))
    assert not [each for each in run_until(core, now + 1.0) if isinstance(each, Send) and wire.read_packet(each.packet).rumors]
    assert core.member(peer(name)) == member(name)
    assert rounded(core.connectivity(now + 1.6, peer(name))) == Connectivity(
        udp=None, tcp=True, address=address(name), rtt=0.1, heard_seconds=1.0
    )


def rounded(connectivity: Connectivity | None) -> Connectivity:
    assert connectivity is not None and connectivity.rtt is not None and connectivity.heard_seconds is not None
    return replace(connectivity, rtt=round(connectivity.rtt, 6), heard_seconds=round(connectivity.heard_seconds, 6))


def test_who_answers_by_tcp_alone_again_and_again_is_served_by_tcp_until_an_ack_comes_by_udp(swim: Build) -> None:
    core = swim("a", member("b"))
    effects = probe_by_tcp_alone(core, MISSES_MAX)
    assert TransportChanged(peer("b"), False) not in effects
    effects = probe_by_tcp_alone(core, 1)
    assert TransportChanged(peer("b"), False) in effects

    assert streamed(core.publish(100, b"record")) == [(peer("b"), GossipOnly())]
    now, ping = first_ping(core)
    back = core.handle_packet(now + 0.1, packet("b", Ack(number_of(ping))), address("b"))
    assert back == [TransportChanged(peer("b"), True)]
    assert [each.address for each in sent(core.publish(200, b"record"))] == [address("b")]
    assert rounded(core.connectivity(now + 0.1, peer("b"))) == Connectivity(
        udp=True, tcp=True, address=address("b"), rtt=0.1, heard_seconds=0.0
    )


def test_a_peer_that_is_served_by_tcp_is_still_probed_by_udp(swim: Build) -> None:
    core = swim("a", member("b"))
    probe_by_tcp_alone(core, MISSES_MAX + 1)
    pings: list[Message] = []
    while not pings:
        effects = core.handle_timeout(core.deadline())
        pings = [each.message for each in sent(effects) if isinstance(each.message, Ping)]
    assert [message for _, message in streamed(effects) if isinstance(message, Ping)] == pings, (
        "both at once, from the first on"
    )


def test_one_probe_is_judged_once(swim: Build) -> None:
    core = swim("a", member("b"))
    now, ping = first_ping(core)
    run_until(core, now + 0.5)
    core.handle_stream_answer(now + 0.6, peer("b"), packet("b", Ack(number_of(ping))))
    core.handle_stream_packet(now + 0.7, peer("b"), packet("b", Ack(0), rumors=(Rumor(member("b", LEFT, incarnation=1)),)))
    assert not [each for each in run_until(core, now + 30) if isinstance(each, TransportChanged)]
    assert not core._connections.by_tcp(peer("c"))


def test_an_ack_that_a_helper_hands_on_says_nothing_of_my_own_udp(swim: Build) -> None:
    core = swim("a", member("b"), member("c"))
    core.handle_stream_packet(0, peer("b"), packet("b"))
    now, ping = first_ping(core)
    while ping.address != address("b"):
        core.handle_packet(now, packet("c", Ack(number_of(ping))), address("c"))
        now, ping = first_ping(core)
    assert core.handle_packet(now + 0.6, packet("c", Ack(number_of(ping))), address("c")) == []
    assert core._connections.by_tcp(peer("b"))


def test_an_earlier_run_of_a_peer_says_nothing_of_where_it_is_or_of_its_ledger(swim: Build) -> None:
    core = swim("a", member("b", epoch=4))
    note = codec.encode(Packet(peer("b"), Epoch(2), GossipOnly(), note=b"old"))
    assert not [each for each in core.handle_packet(5, note, address("b")) if isinstance(each, NoteHeard)]
    link = core.connectivity(5, peer("b"))
    assert link is not None and link.heard_seconds is None


def test_who_is_behind_a_wall_itself_does_not_wait_until_it_has_probed_everybody_often() -> None:
    connections = Connections()
    for name in "bcdef":
        assert not connections.by_tcp(peer("z"))
        connections.missed(peer(name))
    assert connections.by_tcp(peer("z")) and connections.by_tcp(peer("b"))
    connections.acked(peer("c"), 0.01)
    assert not connections.by_tcp(peer("z")) and not connections.by_tcp(peer("c"))


def test_a_peer_that_serves_me_by_tcp_is_served_so_too_unless_udp_is_known_to_work(swim: Build) -> None:
    core = swim("a", member("b"), member("c"))
    assert core.handle_stream_packet(0, peer("b"), packet("b")) == [TransportChanged(peer("b"), False)]
    assert core.handle_stream_packet(0, peer("b"), packet("b")) == []
    core.handle_stream_packet(0, peer("x"), packet("x"))
    assert streamed(core.publish(1, b"record")) == [(peer("b"), GossipOnly())]
    now, ping = first_ping(core)
    while ping.address != address("c"):
        now, ping = first_ping(core)
    core.handle_packet(now, packet("c", Ack(number_of(ping))), address("c"))
    core.handle_stream_packet(now, peer("c"), packet("c"))
    assert [each.address for each in sent(core.publish(50, b"record"))] == [address("c")]


def test_a_new_run_of_a_peer_is_tried_by_udp_again(swim: Build) -> None:
    core = swim("a", member("b"), member("c"))
    core.handle_stream_packet(0, peer("b"), packet("b"))
    core.handle_packet(1, packet("c", rumors=(Rumor(member("b", epoch=2)),)), address("c"))
    assert core.connectivity(1, peer("b")) == Connectivity(udp=None, tcp=None, address=address("b"), rtt=None, heard_seconds=1)
    assert address("b") in [each.address for each in sent(core.publish(2, b"record"))]


def test_a_ping_over_tcp_is_acked_in_the_answer_with_what_the_sender_should_know(swim: Build) -> None:
    core = swim("a", member("b"))
    core.handle_packet(0, packet("b", rumors=(Rumor(member("b", SUSPECT)),)), address("b"))
    effects = core.handle_stream_packet(1, peer("b"), packet("b", Ping(7, peer("a"))))
    assert answered(effects) == [Ack(7)]
    [answer] = [wire.read_packet(each.packet) for each in effects if isinstance(each, Answer)]
    assert [rumor.member for rumor in answer.rumors] == [member("b", SUSPECT)]


def test_a_helper_that_was_asked_over_tcp_hands_the_ack_back_over_tcp(swim: Build) -> None:
    core = swim("a", member("b"), member("c"))
    [ping] = sent(core.handle_stream_packet(0, peer("b"), packet("b", PingRequest(77, peer("c")))))
    effects = core.handle_packet(0.1, packet("c", Ack(number_of(ping))), address("c"))
    assert streamed(effects) == [(peer("b"), Ack(77))]


def test_a_digest_over_tcp_is_answered_there_with_all_that_follows(swim: Build) -> None:
    core = swim("a", member("b"), member("c"))
    core.handle_packet(0, packet("c", records=(Record(peer("c"), Epoch(1), 5, 0, b"c"),)), address("c"))
    digest = pack_digest([wire.DigestEntry(wire.short_id(peer("c")), 1, 3)])
    effects = core.handle_stream_packet(5, peer("b"), packet("b", digest=digest))
    [answer] = [wire.read_packet(each.packet) for each in effects if isinstance(each, Answer)]
    assert [record.data for record in answer.records] == [b"c"]
    asked = core.handle_stream_answer(5, peer("b"), packet("b", digest=digest))
    assert streamed(asked) == [(peer("b"), GossipOnly())]


@pytest.mark.parametrize("answer", [False, True])
def test_a_packet_over_tcp_in_the_name_of_somebody_else_is_refused(swim: Build, answer: bool) -> None:
    core = swim("a", member("b"), member("c"))
    handle = core.handle_stream_answer if answer else core.handle_stream_packet
    with pytest.raises(PeerError):
        handle(0, peer("b"), packet("c", rumors=(Rumor(member("x")),)))
    assert core.member(peer("x")) is None and core.counters["packets_misattributed"] == 1


def test_a_failed_stream_is_counted_and_no_proof(swim: Build) -> None:
    core = swim("a", member("b"))
    assert core.handle_stream_failed(0, peer("b")) == [] and core.handle_stream_failed(0, peer("x")) == []
    assert core.member(peer("b")) == member("b") and core.counters["streams_failed"] == 2


def test_what_requests_say_of_tcp_is_told_until_the_next_one_says_otherwise_or_another_run_comes(swim: Build) -> None:
    core = swim("a", member("b"))

    def tcp() -> bool | None:
        link = core.connectivity(2, peer("b"))
        assert link is not None and link.udp is None and core.member(peer("b")) is not None
        return link.tcp

    told = [tcp()]
    for answered in (True, False, True, False):
        core.handle_tcp(peer("b"), answered)
        told.append(tcp())
    core.handle_packet(1, packet("c", rumors=(Rumor(member("b", epoch=2)),)), address("c"))
    assert [*told, tcp()] == [None, True, False, True, False, None]
    core.handle_tcp(peer("x"), False)
    core.handle_tcp(peer("a"), False)
    assert core.connectivity(2, peer("x")) is None and core._connections.peers() == (peer("b"),)


@pytest.mark.parametrize(("seconds", "silent"), [(0.0, False), (SILENT_SECONDS, False), (SILENT_SECONDS + 0.1, True)])
def test_who_was_not_heard_for_three_refreshes_is_silent(swim: Build, seconds: float, silent: bool) -> None:
    core = swim("a", member("b"))
    core.handle_packet(0, packet("b"), address("b"))
    link = core.connectivity(seconds, peer("b"))
    assert link is not None and link.silent is silent
    assert not Connectivity(udp=None, tcp=None, address=None, rtt=None, heard_seconds=None).silent, "it was never heard"


def test_a_refused_connection_leads_to_a_probe_at_once_but_not_to_one_after_the_other(swim: Build) -> None:
    core = swim("a", *map(member, "bcdefg"))
    now, ping = first_ping(core)
    name = next(name for name in "bcdefg" if address(name) == ping.address)
    core.handle_packet(now, packet(name, Ack(number_of(ping))), address(name))
    target = "b" if name != "b" else "c"
    hinted = core.handle_refused(now + 0.1, peer(target))
    assert [(each.address, type(each.message)) for each in sent(hinted)] == [(address(target), Ping)]
    assert core.handle_refused(now + 0.2, peer(target)) == []
    assert core.handle_refused(now + 0.2, peer("x")) == [], "nobody knows that one"
    assert core.counters["hints"] == 1


def test_a_refused_connection_leads_to_a_probe_of_that_very_peer_and_again_only_after_a_pause(swim: Build) -> None:
    for seed in range(20):
        core = swim("a", *map(member, "bcdefg"), seed=seed)
        pings = [each for each in sent(core.handle_refused(0.0, peer("d"))) if isinstance(each.message, Ping)]
        assert {each.address for each in pings} == {address("d")}
        core.handle_packet(0.1, packet("d", Ack(number_of(pings[0]))), address("d"))
        assert core.handle_refused(4.9, peer("d")) == []


def test_what_the_ledger_says_is_in_every_packet_and_told_when_it_changes(swim: Build) -> None:
    core, other = swim("a", member("b")), swim("b", member("a"))
    core.note(b"hash")
    [ack] = core.handle_packet(0, packet("b", Ping(1, peer("a"))), address("b"))
    assert isinstance(ack, Send)
    assert other.handle_packet(0, ack.packet, address("a")) == [NoteHeard(peer("a"), b"hash")]
    assert other.handle_packet(0, ack.packet, address("a")) == []


# How much may go


def test_packets_to_one_address_are_rationed_and_others_are_not_hurt_by_it() -> None:
    throttle = Throttle(0)
    admitted = sum(throttle.admits(0, address("b"), 100, vital=True) for _ in range(1000))
    assert admitted == PACKETS_BURST
    assert throttle.admits(0, address("c"), 100, vital=True)
    assert throttle.admits(1, address("b"), 100, vital=True)


def test_news_that_is_refused_does_not_use_up_what_acks_need() -> None:
    throttle = Throttle(0)
    for port in range(1, 2000):
        throttle.admits(0, Address("10.1.0.1", port), 1000, vital=False)
    assert not any(throttle.admits(0, address("b"), 1000, vital=False) for _ in range(200))
    assert throttle.admits(0, address("b"), 100, vital=True)


def test_bytes_are_rationed_for_all_together_but_not_for_the_failure_detector() -> None:
    throttle = Throttle(0)
    places = [Address("10.1.0.1", port) for port in range(1, 2001)]
    admitted = sum(throttle.admits(0, place, 1000, vital=False) for place in places)
    assert admitted == BYTES_BURST // 1000
    assert throttle.admits(0, address("b"), 1000, vital=True)
    assert not throttle.admits(0, address("b"), 1000, vital=False)


def test_a_member_that_floods_me_with_pings_gets_no_flood_back(swim: Build) -> None:
    core = swim("a", member("b"))
    acks = [core.handle_packet(0, packet("b", Ping(number, peer("a"))), address("b")) for number in range(1000)]
    assert sum(map(len, acks)) == PACKETS_BURST and core.counters["packets_throttled"] == 1000 - PACKETS_BURST


# Push/pull that asks first


def test_a_routine_push_pull_between_equals_is_a_question_and_a_short_answer(swim: Build) -> None:
    core, other = swim("a", *map(member, "bcdefgh")), swim("b", *map(member, "acdefgh"))
    [question] = [each for each in run_until_sync(core) if isinstance(each, Sync)]
    reply, effects = other.handle_sync_request(1, peer("a"), question.request)
    assert effects == [] and len(question.request) < 250 and len(reply) < 250
    assert wire.read_sync_reply(reply).same
    assert core.handle_sync_reply(1, peer("b"), reply) == []


def test_who_differs_answers_with_everything_and_is_told_everything(swim: Build) -> None:
    core, other = swim("a", *map(member, "bc")), swim("b", *map(member, "acd"))
    core.publish(0, b"record of a")
    question = next(each for each in run_until_sync(core) if isinstance(each, Sync) and each.peer == peer("b"))
    reply, _ = other.handle_sync_request(1, peer("a"), question.request)
    effects = core.handle_sync_reply(1, peer("b"), reply)
    assert core.member(peer("d")) == member("d")
    [push] = [each for each in effects if isinstance(each, Sync)]
    assert (push.peer, push.address) == (peer("b"), address("b"))
    reply, _ = other.handle_sync_request(1, peer("a"), push.request)
    assert other.record(peer("a")) == b"record of a"
    assert not [each for each in core.handle_sync_reply(1, peer("b"), reply) if isinstance(each, Sync)], "it ends here"


def run_until_sync(core: Swim) -> list[Effect]:
    """Until somebody was asked; nobody answers probes, so within the half minute in which all are still alive or suspect."""
    effects: list[Effect] = []
    while not [each for each in effects if isinstance(each, Sync)]:
        core._due[Routine.SYNC] = 0.0
        effects += core.handle_timeout(core.deadline())
    return effects
