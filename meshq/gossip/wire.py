"""What peers say to each other: the schema of packets and of push/pull, and how a packet is filled.

A packet holds one message of the failure detector (or `GossipOnly`) and whatever fits beside it: rumors about members, a
note of the ledger, a digest of telemetry versions, telemetry records. It never exceeds `PACKET_PLAIN_BYTES_MAX`, so that
sealed it stays one unfragmented datagram. Three classes compete for the room: membership has half of it for sure, telemetry
a third, the ledger as much as its note may be long; what one class does not use, the others may. (A queue that served one
class first starved the other for good: hashicorp/memberlist#299.)

Reading checks everything that later code relies on, and raises `MalformedData` for all else.
"""

import base64
import functools
import ipaddress
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Final, NamedTuple, TypeAlias, TypeVar

from meshq import codec
from meshq.config import (
    ADDRESSES_MAX,
    MEMBERS_MAX,
    NAME_CHARS_MAX,
    PACKET_BYTES_MAX,
    PACKET_ITEMS_MAX,
    RECORD_BYTES_MAX,
    SYNC_BYTES_MAX,
)
from meshq.errors import MalformedData
from meshq.gossip.member import Member
from meshq.ids import Epoch, PeerId, is_peer_id

SEAL_BYTES_MAX: Final = 48  # header and tag that sealing adds
PACKET_PLAIN_BYTES_MAX: Final = PACKET_BYTES_MAX - SEAL_BYTES_MAX
HEADS_BYTES: Final = 12  # what MessagePack needs around the parts of a packet or push/pull
NOTE_BYTES_MAX: Final = 64  # of the ledger; its rows travel over TCP, in UDP it only says what it has
TELEMETRY_SHARE: Final = 0.35  # of the room that the note leaves; membership has the rest
COUNT_MAX: Final = 2**32 - 1  # of epochs, incarnations, versions: they fit a digest's entry, and can still be exceeded by one
VERSION_CHARS_MAX: Final = 32
OBSERVERS_MAX: Final = 8
OBSERVER_CHARS: Final = 10  # 50 bits of a peer id: enough to tell observers apart
HOST_CHARS_MAX: Final = 45  # the longest spelling of an IPv6 address
AGE_MS_MAX: Final = 2**45  # a thousand years
STARTED_MAX: Final = 2**40

MISFITS_MAX: Final = 4  # items that don't fit, before the search for smaller ones is given up
VIEW_BYTES: Final = 16

_DIGEST_ENTRY = struct.Struct(">5sII")


@dataclass(frozen=True, slots=True)
class Ping:
    """Are you there? For `target` alone: the address may meanwhile belong to somebody else."""

    TAG: ClassVar[int] = 1

    number: int
    target: PeerId


@dataclass(frozen=True, slots=True)
class Ack:
    """The one whom your ping or ping-request of this number asked for is there."""

    TAG: ClassVar[int] = 2

    number: int


@dataclass(frozen=True, slots=True)
class PingRequest:
    """Ping `target` for me."""

    TAG: ClassVar[int] = 3

    number: int
    target: PeerId


@dataclass(frozen=True, slots=True)
class Nack:
    """I am here and tried, but got no ack for your ping-request. It says that the asker's own network works."""

    TAG: ClassVar[int] = 4

    number: int


@dataclass(frozen=True, slots=True)
class GossipOnly:
    """Nothing but what travels beside it."""

    TAG: ClassVar[int] = 5


Message = Ping | Ack | PingRequest | Nack | GossipOnly


@dataclass(frozen=True, slots=True)
class Rumor:
    """A belief that is worth telling. `observers` (see `observer`) stand behind a suspicion; `gone_seconds` is the age of a
    death or leave, so that it is forgotten everywhere at the same time, however late somebody hears of it."""

    member: Member
    observers: tuple[str, ...] = ()
    gone_seconds: int = 0


@dataclass(frozen=True, slots=True)
class Record:
    """Telemetry of one peer. `age_ms` since the owner published it, as far as its carriers know.

    On the wire an empty `peer` stands for the packet's sender: most records come from their owner, and its id is an eighth of
    the packet.
    """

    peer: PeerId
    epoch: Epoch
    version: int
    age_ms: int
    data: bytes


class DigestEntry(NamedTuple):
    """`short` (see `short_id`) has a record of this epoch and version here; 0, 0 for none."""

    short: bytes
    epoch: int
    version: int


@dataclass(frozen=True, slots=True)
class Packet:
    """One datagram before it is sealed. `digest`: entries, one after the other (see `split_digest`)."""

    sender: PeerId
    epoch: Epoch
    message: Message
    rumors: tuple[Rumor, ...] = ()
    digest: bytes = b""
    records: tuple[Record, ...] = ()
    note: bytes = b""


@dataclass(frozen=True, slots=True)
class SyncRequest:
    """Push/pull: all that I believe, `sender` first of all. The answer is the same of the other side.

    With a `view` (see `Beliefs.view`) it is a question only, and has nothing else: do you believe the same?
    """

    TAG: ClassVar[int] = 1

    sender: Member
    rumors: tuple[Rumor, ...]
    records: tuple[Record, ...]
    view: bytes = b""


@dataclass(frozen=True, slots=True)
class SyncReply:
    """`same`: I believe what the view in your question stands for, so there is nothing to tell.

    If it is false in the answer to a question, this is all that I believe, and I want to hear the same of you.
    """

    TAG: ClassVar[int] = 2

    sender: Member
    rumors: tuple[Rumor, ...]
    records: tuple[Record, ...]
    same: bool = False


Item = TypeVar("Item")
Coded: TypeAlias = tuple[Item, bytes]
Synced = TypeVar("Synced", SyncRequest, SyncReply)


def observer(peer: PeerId) -> str:
    """The name of an observer in rumors."""
    return peer[:OBSERVER_CHARS]


@functools.lru_cache(maxsize=4096)
def short_id(peer: PeerId) -> bytes:
    """40 bits of the peer's id: two of a thousand peers share them with p < 10^-6, and then only get too much."""
    return base64.b32decode(peer[:8].upper())


def digest_entry(short: bytes, epoch: int, version: int) -> bytes:
    """13 bytes; `read_entry` is the inverse."""
    return _DIGEST_ENTRY.pack(short, epoch, version)


def read_entry(entry: bytes) -> DigestEntry:
    return DigestEntry._make(_DIGEST_ENTRY.unpack(entry))


def split_digest(digest: bytes) -> list[bytes]:
    """Its entries."""
    return [digest[at : at + _DIGEST_ENTRY.size] for at in range(0, len(digest), _DIGEST_ENTRY.size)]


def coded(item: Item) -> Coded[Item]:
    """An item and its encoding: a rumor goes into many packets, and is encoded once."""
    return item, codec.encode(item)


@dataclass(frozen=True, slots=True)
class Filled:
    """A packet ready to be sealed, and what found room in it, in order."""

    data: bytes
    rumors: tuple[Rumor, ...] = ()
    records: tuple[Record, ...] = ()


def fill(
    packet: Packet,
    *,
    rumors: Sequence[Coded[Rumor]] = (),
    digest: Sequence[bytes] = (),
    records: Sequence[Coded[Record]] = (),
    lead: Coded[Record] | None = None,
) -> Filled:
    """`packet` (its message and note) with as much beside it as fits, in the order given. `lead` is what the packet is for: it
    comes before all else (a record may need more than telemetry's share)."""
    assert len(packet.note) <= NOTE_BYTES_MAX
    if not (rumors or digest or records or lead):
        return Filled(codec.encode(packet))
    head = [codec.encode(packet.sender), codec.encode(packet.epoch), codec.encode(packet.message)]
    carried = [_shortened(lead, packet.sender)] if lead is not None else []
    room = PACKET_PLAIN_BYTES_MAX - sum(map(len, head)) - HEADS_BYTES - _bytes(carried)
    assert room >= 0, "a record larger than RECORD_BYTES_MAX"
    note = packet.note if len(packet.note) <= room else b""  # only beside the largest records; all other packets carry it
    room -= len(note)
    wanted = len(digest) * _DIGEST_ENTRY.size + _bytes(records)
    told = _first_fitting(rumors, room - min(wanted, int(room * TELEMETRY_SHARE)))
    room -= _bytes(told)
    entries = digest[: room // _DIGEST_ENTRY.size]
    carried += _first_fitting(records, room - len(entries) * _DIGEST_ENTRY.size)
    tail = [codec.encode(b"".join(entries)), _array(carried), codec.encode(note)]
    data = b"".join([_array_head(7), *head, _array(told), *tail])
    assert len(data) <= PACKET_PLAIN_BYTES_MAX
    return Filled(data, _items(told), _items(carried))


def _shortened(record: Coded[Record], sender: PeerId) -> Coded[Record]:
    """The encoding that leaves out who the packet names already."""
    if record[0].peer != sender:
        return record
    return record[0], codec.encode(replace(record[0], peer=PeerId("")))


def fill_sync(
    kind: type[SyncRequest] | type[SyncReply], sender: Member, rumors: Sequence[Rumor], records: Sequence[Record]
) -> bytes:
    """A push/pull message with as many rumors as fit, then records."""
    empty = codec.encode(kind(sender, (), ()))
    room = SYNC_BYTES_MAX - len(empty) - HEADS_BYTES
    told = _first_fitting([coded(rumor) for rumor in rumors], room)
    carried = _first_fitting([coded(record) for record in records], room - _bytes(told))
    return codec.encode(kind(sender, _items(told), _items(carried)))


def encode_sync(message: SyncRequest | SyncReply) -> bytes:
    """A push/pull message that tells nothing."""
    return codec.encode(message)


def _first_fitting(items: Sequence[Coded[Item]], room: int) -> list[Coded[Item]]:
    """Those of `items` that fit into `room` bytes, each taken if it still fits, up to a few that don't."""
    chosen: list[Coded[Item]] = []
    misfits = 0
    for each in items:
        if misfits >= MISFITS_MAX or len(chosen) >= codec.ARRAY_ITEMS_MAX:
            break
        if len(each[1]) <= room:
            chosen.append(each)
            room -= len(each[1])
        else:
            misfits += 1
    return chosen


def _bytes(items: Iterable[Coded[Item]]) -> int:
    return sum(len(data) for _, data in items)


def _items(items: Iterable[Coded[Item]]) -> tuple[Item, ...]:
    return tuple(item for item, _ in items)


def _array(items: Sequence[Coded[Item]]) -> bytes:
    """What `codec.encode` makes of a tuple of these."""
    return b"".join([_array_head(len(items)), *(data for _, data in items)])


@functools.cache
def _array_head(length: int) -> bytes:
    """How MessagePack begins an array of so many items; a packet never holds more than 16 bits can count."""
    return bytes([0x90 | length]) if length < 16 else b"\xdc" + length.to_bytes(2, "big")


def read_packet(data: bytes) -> Packet:
    """MalformedData for anything that is no packet as this module makes them."""
    packet = codec.decode(Packet, data, bytes_max=PACKET_BYTES_MAX, items_max=PACKET_ITEMS_MAX)
    _require(is_peer_id(packet.sender) and 0 <= packet.epoch <= COUNT_MAX, "sender")
    if any(not record.peer for record in packet.records):
        named = (record if record.peer else replace(record, peer=packet.sender) for record in packet.records)
        packet = replace(packet, records=tuple(named))
    message = packet.message
    if isinstance(message, Ping | PingRequest):
        _require(is_peer_id(message.target), "target")
    _require(len(packet.digest) % _DIGEST_ENTRY.size == 0, "digest")
    _require(len(packet.note) <= NOTE_BYTES_MAX, "note")
    _check_items(packet.rumors, packet.records)
    return packet


def read_sync_request(data: bytes) -> SyncRequest:
    """MalformedData for anything else."""
    request = _checked_sync(codec.decode(SyncRequest, data, bytes_max=SYNC_BYTES_MAX, items_max=MEMBERS_MAX))
    _require(len(request.view) in (0, VIEW_BYTES), "view")
    return request


def read_sync_reply(data: bytes) -> SyncReply:
    """MalformedData for anything else."""
    return _checked_sync(codec.decode(SyncReply, data, bytes_max=SYNC_BYTES_MAX, items_max=MEMBERS_MAX))


def _checked_sync(message: Synced) -> Synced:
    _check_member(message.sender)
    _check_items(message.rumors, message.records)
    return message


def _check_items(rumors: Sequence[Rumor], records: Sequence[Record]) -> None:
    for rumor in rumors:
        _check_member(rumor.member)
        _require(len(rumor.observers) <= OBSERVERS_MAX, "observers")
        _require(all(len(name) <= OBSERVER_CHARS for name in rumor.observers), "observer")
        _require(0 <= rumor.gone_seconds <= COUNT_MAX, "gone_seconds")
    for record in records:
        _require(is_peer_id(record.peer), "peer of a record")
        _require(0 <= record.epoch <= COUNT_MAX and 0 <= record.version <= COUNT_MAX, "version of a record")
        _require(0 <= record.age_ms <= AGE_MS_MAX, "age of a record")
        _require(len(record.data) <= RECORD_BYTES_MAX, "size of a record")


def _check_member(member: Member) -> None:
    _require(is_peer_id(member.peer), "peer")
    _require(0 <= member.epoch <= COUNT_MAX and 0 <= member.incarnation <= COUNT_MAX, "epoch or incarnation")
    _require(len(member.name) <= NAME_CHARS_MAX and _is_plain(member.name), "name")
    _require(len(member.version) <= VERSION_CHARS_MAX and _is_plain(member.version), "version")
    _require(0 <= member.started_at <= STARTED_MAX and 0 <= member.boot <= codec.INT_MAX, "run")
    _require(0 <= member.named <= COUNT_MAX, "named")
    _require(len(member.addresses) <= ADDRESSES_MAX, "number of addresses")
    for address in member.addresses:
        _require(0 < address.port < 65_536 and is_numeric(address.host), "address")


@functools.lru_cache(maxsize=4096)
def is_numeric(host: str) -> bool:
    """Is this an IP address, not a name?"""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return len(host) <= HOST_CHARS_MAX and "%" not in host  # a scope means something on one machine only


def _is_plain(text: str) -> bool:
    """Such a text takes one byte a character and does nothing to a terminal."""
    return text.isascii() and text.isprintable()


def _require(fits: bool, what: str) -> None:
    if not fits:
        raise MalformedData(f"gossip: {what} out of range")
