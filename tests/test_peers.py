"""Gossip's beliefs in the words of the ledger, and unique names."""

from meshq import codec
from meshq.gossip.member import Address, Liveness, Member
from meshq.gossip.roster import KnownPeer
from meshq.ids import Epoch, PeerId
from meshq.peers import Peers
from meshq.task import Telemetry

ME, OTHER = PeerId("b" * 52), PeerId("c" * 52)


def member(peer: PeerId, name: str = "x", liveness: Liveness = Liveness.ALIVE) -> Member:
    return Member(peer=peer, epoch=Epoch(1), incarnation=0, liveness=liveness, name=name, addresses=(Address("127.0.0.1", 1),))


def peers() -> Peers:
    return Peers(member(ME, "me"), Telemetry(slots_total=2), 10.0)


def test_a_suspect_counts_as_alive_and_a_dead_peer_since_it_died() -> None:
    book = peers()
    book.handle_member(11.0, member(OTHER))
    book.handle_member(12.0, member(OTHER, liveness=Liveness.SUSPECT))
    assert book.others_alive() == [OTHER]
    assert book.views()[OTHER].changed_at == 11.0
    book.handle_member(13.0, member(OTHER, liveness=Liveness.DEAD))
    assert book.others_alive() == []
    assert (book.views()[OTHER].alive, book.views()[OTHER].changed_at) == (False, 13.0)
    book.handle_member(14.0, member(OTHER, liveness=Liveness.LEFT))
    assert (book.views()[OTHER].left, book.views()[OTHER].changed_at) == (True, 13.0)


def test_telemetry_of_others_comes_by_records_and_my_own_does_not() -> None:
    book = peers()
    book.handle_member(11.0, member(OTHER))
    told = Telemetry(slots_total=7)
    for peer in (OTHER, ME):
        book.handle_record(peer, codec.encode(told))
    assert book.views()[OTHER].telemetry == told
    assert book.views()[ME].telemetry == Telemetry(slots_total=2)


def test_a_newcomer_is_who_came_a_short_time_ago_and_has_said_nothing_yet() -> None:
    book = peers()
    book.handle_member(11.0, member(OTHER))
    assert (book.newcomers(11.0), book.newcomers(11.1), book.views()[OTHER].told) == ([OTHER], [], False)
    book.handle_record(OTHER, codec.encode(Telemetry()))
    assert (book.newcomers(11.0), book.views()[OTHER].told) == ([], True)


def test_a_record_that_does_not_decode_is_counted_and_changes_nothing() -> None:
    book = peers()
    book.handle_member(11.0, member(OTHER))
    book.handle_record(OTHER, b"\xc1")
    assert book.undecodable_records == 1
    assert book.views()[OTHER].telemetry == Telemetry()


def test_a_record_of_a_peer_that_is_no_member_yet_is_left_alone() -> None:
    book = peers()
    book.handle_record(OTHER, codec.encode(Telemetry()))
    assert list(book.views()) == [ME]
    assert book.name(OTHER) == "c" * 8


def test_remembered_peers_count_as_dead_since_the_start_until_they_show_up() -> None:
    book = peers()
    book.remember(10.0, [KnownPeer(peer=OTHER, name="old", addresses=(), unseen_for=5.0)])
    assert (book.views()[OTHER].alive, book.views()[OTHER].changed_at, book.name(OTHER)) == (False, 10.0, "old")
    assert [each.peer for each in book.members()] == [ME]
    book.handle_member(11.0, member(OTHER, "new"))
    assert (book.views()[OTHER].alive, book.name(OTHER)) == (True, "new")


def test_what_a_remembered_peer_had_counts_until_it_says_something_newer() -> None:
    book, had = peers(), Telemetry(slots_total=7)
    book.remember(10.0, [KnownPeer(peer=OTHER, name="old", addresses=(), unseen_for=5.0, record=codec.encode(had))])
    assert book.views()[OTHER].telemetry == had
    book.handle_member(11.0, member(OTHER, liveness=Liveness.DEAD))
    assert book.views()[OTHER].telemetry == had


def test_whom_gossip_has_forgotten_is_known_no_more_and_i_always_am() -> None:
    book = peers()
    old = PeerId("d" * 52)
    book.handle_member(11.0, member(OTHER, liveness=Liveness.DEAD))
    book.remember(11.0, [KnownPeer(peer=old, name="old", addresses=(), unseen_for=5.0)])
    assert not book.forget_all_but([OTHER, old])
    assert book.forget_all_but([])
    assert list(book.views()) == [ME]
