"""Packets: what goes in comes out, they never grow too large, and nothing else gets in."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshq import codec
from meshq.config import ADDRESSES_MAX, PACKET_BYTES_MAX, RECORD_BYTES_MAX, SYNC_BYTES_MAX
from meshq.errors import MalformedData
from meshq.gossip import wire
from meshq.gossip.member import Address, Liveness, Member
from meshq.gossip.wire import (
    PACKET_PLAIN_BYTES_MAX,
    DigestEntry,
    GossipOnly,
    Message,
    Packet,
    Ping,
    Record,
    Rumor,
    SyncReply,
    SyncRequest,
)
from meshq.ids import Epoch, PeerId
from tests.gossip.builders import DEAD, MESSAGES, RECORDS, RUMORS, member, pack_digest, peer, unpack_digest

ENTRIES = st.builds(
    DigestEntry, short=st.binary(min_size=5, max_size=5), epoch=st.integers(0, 2**32 - 1), version=st.integers(0, 2**32 - 1)
)


def empty(message: Message | None = None) -> Packet:
    return Packet(peer("a"), Epoch(1), message or GossipOnly())


def largest() -> Member:
    return replace(
        member("x"),
        epoch=Epoch(2**32 - 1),
        incarnation=2**32 - 1,
        name="n" * 63,
        version="v" * 32,
        addresses=tuple(Address(f"2001:db8:ffff:ffff:ffff:ffff:ffff:{n:04x}", 65_535) for n in range(ADDRESSES_MAX)),
    )


@given(MESSAGES, st.lists(RUMORS, max_size=3), st.lists(RECORDS, max_size=1), st.lists(ENTRIES, max_size=5))
def test_a_packet_survives_the_wire(
    message: Message, rumors: list[Rumor], records: list[Record], digest: list[DigestEntry]
) -> None:
    packet = Packet(peer("a"), Epoch(7), message, tuple(rumors[:1]), pack_digest(digest), ())
    assert wire.read_packet(codec.encode(packet)) == packet
    assert unpack_digest(packet.digest) == digest
    carrying = Packet(peer("a"), Epoch(7), message, records=tuple(records))
    assert wire.read_packet(codec.encode(carrying)) == carrying


@given(st.tuples(st.lists(RUMORS, max_size=20), st.lists(RECORDS, max_size=20)))
def test_push_pull_survives_the_wire(content: tuple[list[Rumor], list[Record]]) -> None:
    rumors, records = content
    request = wire.fill_sync(SyncRequest, member("a"), rumors, records)
    assert wire.read_sync_request(request) == SyncRequest(member("a"), tuple(rumors), tuple(records))
    reply = wire.fill_sync(SyncReply, member("a"), rumors, records)
    assert wire.read_sync_reply(reply) == SyncReply(member("a"), tuple(rumors), tuple(records))
    with pytest.raises(MalformedData):
        wire.read_sync_reply(request)


@given(
    MESSAGES,
    st.lists(RUMORS, max_size=30),
    st.lists(RECORDS, max_size=8),
    st.lists(ENTRIES, max_size=120),
    st.one_of(st.none(), RECORDS),
)
def test_a_packet_is_filled_in_order_and_never_too_large(
    message: Message, rumors: list[Rumor], records: list[Record], digest: list[DigestEntry], lead: Record | None
) -> None:
    filled = wire.fill(
        empty(message), rumors=[wire.coded(rumor) for rumor in rumors], records=[wire.coded(record) for record in records],
        digest=[wire.digest_entry(*each) for each in digest], lead=None if lead is None else wire.coded(lead),
    )  # fmt: skip
    assert len(filled.data) <= PACKET_PLAIN_BYTES_MAX
    packet = wire.read_packet(filled.data)
    assert packet.message == message
    assert packet.rumors == filled.rumors and packet.records == filled.records
    assert unpack_digest(packet.digest) == digest[: len(unpack_digest(packet.digest))]
    assert lead is None or packet.records[0] == lead
    places = iter(rumors)
    assert all(any(rumor == other for other in places) for rumor in packet.rumors), "told in another order"


def test_the_largest_rumor_fits_beside_telemetry_and_the_largest_record_leads_a_packet() -> None:
    rumor = Rumor(largest(), tuple(wire.observer(peer(name)) for name in "abc"), 2**32 - 1)
    digest = [wire.digest_entry(b"12345", 1, 1)] * 90
    filled = wire.fill(empty(Ping(2**32 - 1, peer("x"))), rumors=[wire.coded(rumor)], digest=digest)
    assert filled.rumors == (rumor,)
    record = Record(peer("a"), Epoch(2**32 - 1), 2**32 - 1, 2**40, b"r" * RECORD_BYTES_MAX)
    assert wire.fill(empty(), rumors=[wire.coded(rumor)], lead=wire.coded(record)).records == (record,)


def test_each_class_has_its_share_and_lends_what_it_does_not_use() -> None:
    rumors = [wire.coded(Rumor(member(name))) for name in "abcdefghijklmnopqrst"]
    digest = [wire.digest_entry(b"12345", 1, 1)] * 90
    both = wire.read_packet(wire.fill(empty(), rumors=rumors, digest=digest).data)
    membership = sum(len(codec.encode(rumor)) for rumor in both.rumors)
    room = PACKET_PLAIN_BYTES_MAX - len(codec.encode(empty()))
    assert 0.5 * room < membership <= 0.66 * room
    assert 0.33 * room < len(both.digest)
    alone = wire.read_packet(wire.fill(empty(), rumors=rumors).data)
    assert sum(len(codec.encode(rumor)) for rumor in alone.rumors) > 0.85 * room
    only_digest = wire.read_packet(wire.fill(empty(), digest=digest).data)
    assert len(unpack_digest(only_digest.digest)) > 80


def test_push_pull_of_a_full_mesh_with_full_records_stays_within_its_limit() -> None:
    rumors = [Rumor(replace(largest(), name=f"n{number}")) for number in range(1024)]
    records = [Record(peer("a"), Epoch(1), number, 0, b"r" * RECORD_BYTES_MAX) for number in range(1024)]
    data = wire.fill_sync(SyncRequest, member("a"), rumors, records)
    assert 0.9 * SYNC_BYTES_MAX < len(data) <= SYNC_BYTES_MAX
    assert len(wire.read_sync_request(data).rumors) == 1024


@given(st.binary(max_size=PACKET_BYTES_MAX + 10))
def test_garbage_is_refused_with_one_exception(data: bytes) -> None:
    for read in (wire.read_packet, wire.read_sync_request, wire.read_sync_reply):
        with pytest.raises(MalformedData):
            read(data)


@given(st.data())
def test_a_damaged_packet_is_refused_or_read_but_never_anything_else(data: st.DataObject) -> None:
    rumor = Rumor(member("b", DEAD), (wire.observer(peer("c")),), 5)
    good = bytearray(codec.encode(Packet(peer("a"), Epoch(1), Ping(1, peer("b")), (rumor,))))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        wire.read_packet(bytes(good))
    except MalformedData:
        return


BAD_MEMBERS = {
    "a peer that is no id": replace(member("b"), peer=PeerId("nobody")),
    "a negative incarnation": replace(member("b"), incarnation=-1),
    "an incarnation beyond the limit": replace(member("b"), incarnation=2**32),
    "an epoch beyond the limit": replace(member("b"), epoch=Epoch(2**32)),
    "a name that is too long": replace(member("b"), name="n" * 64),
    "a name that rings the bell": replace(member("b"), name="ding\a"),
    "a name of the wrong alphabet": replace(member("b"), name="ñandú"),
    "a host name for an address": replace(member("b"), addresses=(Address("localhost", 1),)),
    "an address with a scope": replace(member("b"), addresses=(Address("fe80::1%eth0", 1),)),
    "port 0": replace(member("b"), addresses=(Address("10.0.0.1", 0),)),
    "too many addresses": replace(member("b"), addresses=(Address("10.0.0.1", 1),) * 9),
}


@pytest.mark.parametrize("what", BAD_MEMBERS)
def test_a_rumor_that_makes_no_sense_is_refused(what: str) -> None:
    bad = BAD_MEMBERS[what]
    with pytest.raises(MalformedData):
        wire.read_packet(codec.encode(Packet(peer("a"), Epoch(1), GossipOnly(), (Rumor(bad),))))
    with pytest.raises(MalformedData):
        wire.read_sync_request(codec.encode(SyncRequest(bad, (), ())))


@pytest.mark.parametrize(
    "packet",
    [
        Packet(peer("a"), Epoch(1), Ping(1, peer("b")), digest=b"no whole entry"),
        Packet(peer("a"), Epoch(-1), GossipOnly()),
        Packet(peer("a"), Epoch(1), GossipOnly(), records=(Record(peer("b"), Epoch(1), 1, -5, b""),)),
        Packet(peer("a"), Epoch(1), GossipOnly(), records=(Record(peer("b"), Epoch(1), 1, 0, b"r" * 1001),)),
        Packet(peer("a"), Epoch(1), GossipOnly(), (Rumor(member("b"), ("much too long for one",)),)),
        Packet(peer("a"), Epoch(1), GossipOnly(), (Rumor(member("b"), (), -1),)),
    ],
)
def test_a_packet_with_a_field_out_of_range_is_refused(packet: Packet) -> None:
    with pytest.raises(MalformedData):
        wire.read_packet(codec.encode(packet))


def test_the_wire_form_of_released_packets_does_not_change() -> None:
    """Bytes that an older peer sends; they must be read for ever."""
    rumor = Rumor(replace(member("b"), liveness=Liveness.SUSPECT), ("aaaaaaaaaa",), 0)
    packet = Packet(peer("a"), Epoch(3), Ping(9, peer("b")), (rumor,), b"12345" + bytes(8), ())
    assert wire.read_packet(bytes.fromhex(GOLDEN)) == packet


@given(MESSAGES, st.lists(RUMORS, max_size=30), st.lists(RECORDS, max_size=3), st.binary(max_size=wire.NOTE_BYTES_MAX))
def test_a_packet_that_is_joined_from_parts_is_what_the_codec_makes_of_the_whole(
    message: Message, rumors: list[Rumor], records: list[Record], note: bytes
) -> None:
    packet = replace(empty(message), note=note)
    data = wire.fill(
        packet, rumors=[wire.coded(rumor) for rumor in rumors], records=[wire.coded(record) for record in records]
    ).data
    assert data == codec.encode(wire.read_packet(data))
    assert wire.read_packet(data).note == note


GOLDEN = (
    "96d9347a6b6c796365776b646f36347636776367677a7a756936346a7774796e333779637236653434767a716233796c6c376f6a63357103930109d9"
    "34687972367166716168666d75756d346a6a3573776a796e72677366333236716172646b637973776c6f70786b35766d3461636f71919397d9346879"
    "72367166716168666d75756d346a6a3573776a796e72677366333236716172646b637973776c6f70786b35766d3461636f71010001a1629192a93130"
    "2e302e302e3938cd1e35a5302e312e3091aa6161616161616161616100c40d3132333435000000000000000090"
)
