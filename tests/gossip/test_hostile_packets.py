"""What a stranger, a broken member or a liar may send: it is counted and dropped, changes nothing or little, and costs little.

Packets that don't decode leave the core as it was, to the last bit. Those that do may lie: every member has the key, so a
lie is believed as far as any word of a member is, but no table grows past its limit, and the core stays sound.
"""

import asyncio
import dataclasses
import hashlib
import os
import socket
import struct
import time
import tracemalloc
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine, Iterator, Mapping
from random import Random
from typing import Any, cast

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshq import codec
from meshq.config import MEMBERS_MAX, NAME_CHARS_MAX, PACKET_BYTES_MAX, RECORD_BYTES_MAX
from meshq.errors import MalformedData, PeerError, Unreachable
from meshq.gossip import streams, wire
from meshq.gossip.effects import Effect, MemberChanged, Refuted, Send
from meshq.gossip.member import Address, Liveness, Member
from meshq.gossip.swim import PROFILES, REPLY_PACKETS_MAX, Swim
from meshq.gossip.transport import GossipShell, open_socket
from meshq.gossip.wire import (
    COUNT_MAX,
    PACKET_PLAIN_BYTES_MAX,
    DigestEntry,
    GossipOnly,
    Packet,
    Ping,
    PingRequest,
    Record,
    Rumor,
    SyncReply,
    SyncRequest,
)
from meshq.ids import Epoch, PeerId
from meshq.trust.seal import MAGIC, Opener, Refusal, Sealer, key_id
from tests.gossip import builders
from tests.gossip.builders import DEAD, MESSAGES, RECORDS, RUMORS, SUSPECT, address, member, pack_digest, packet, peer

NAMES = "abcdef"
ENTRIES = st.builds(
    DigestEntry, short=st.sampled_from(NAMES).map(lambda name: wire.short_id(peer(name))),
    epoch=st.integers(0, COUNT_MAX), version=st.integers(0, COUNT_MAX),
)  # fmt: skip
PACKETS = st.builds(
    Packet,
    sender=st.sampled_from(NAMES).map(peer),
    epoch=st.integers(0, 3).map(Epoch),
    message=MESSAGES,
    rumors=st.lists(RUMORS, max_size=2).map(tuple),
    digest=st.lists(ENTRIES, max_size=4).map(pack_digest),
    records=st.lists(RECORDS, max_size=2).map(tuple),
    note=st.binary(max_size=wire.NOTE_BYTES_MAX),
)


def syncs(kind: type[SyncRequest] | type[SyncReply]) -> st.SearchStrategy[SyncRequest | SyncReply]:
    return st.builds(
        lambda sender, rumors, records: kind(sender, tuple(rumors), tuple(records)),
        builders.members(st.sampled_from(NAMES)), st.lists(RUMORS, max_size=3), st.lists(RECORDS, max_size=2),
    )  # fmt: skip


WELL_FORMED: dict[str, st.SearchStrategy[bytes]] = {
    "packet": PACKETS.map(codec.encode),
    "sync request": syncs(SyncRequest).map(codec.encode),
    "sync reply": syncs(SyncReply).map(codec.encode),
}
EXTREMES = st.sampled_from(
    [None, True, -1, 0, COUNT_MAX, COUNT_MAX + 1, 2**63 - 1, 2**64 - 1, -(2**63), 1.5, float("nan"), "", "x" * 5_000, "\x1b[2J",
     b"", bytes(5_000), [], [[]], {}, {"a": []}, [0] * 300, msgpack.Timestamp(2**33, 999_999_999), msgpack.ExtType(5, b"x")]
)  # fmt: skip


@st.composite
def twisted(draw: st.DrawFn, messages: st.SearchStrategy[bytes]) -> bytes:
    """A message in which one value somewhere is another one: it still is MessagePack."""
    tree = msgpack.unpackb(draw(messages), strict_map_key=False)
    node: list[Any] = tree
    while True:
        place = draw(st.integers(0, len(node) - 1))
        if not isinstance(node[place], list) or not node[place] or draw(st.booleans()):
            break
        node = node[place]
    node[place] = draw(EXTREMES)
    return cast(bytes, msgpack.packb(tree, use_bin_type=True))


@st.composite
def damaged(draw: st.DrawFn, messages: st.SearchStrategy[bytes]) -> bytes:
    """A message with bytes changed, cut out or put in."""
    data = bytearray(draw(messages))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["change", "cut", "cut off", "put in"])):
            case "change" if at < len(data):
                data[at] = draw(st.integers(0, 255))
            case "cut":
                del data[at : at + draw(st.integers(1, 60))]
            case "cut off":
                del data[at:]
            case _:
                data[at:at] = draw(st.binary(max_size=60))
    return bytes(data)


def hostile(messages: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Made from such messages: some are as they should be, some nearly, some are anything."""
    return st.one_of(messages, damaged(messages), twisted(messages), st.binary(max_size=PACKET_BYTES_MAX + 10))


@dataclasses.dataclass(frozen=True)
class Input:
    """One way into the core: what is called with the time, who sent it (where TLS says so) and the bytes, and what it
    expects."""

    expects: str
    call: Callable[[Swim, float, str, bytes], object]


INPUTS = {
    "packet": Input("packet", lambda core, now, name, data: core.handle_packet(now, data, address(name))),
    "stream packet": Input("packet", lambda core, now, name, data: core.handle_stream_packet(now, peer(name), data)),
    "stream answer": Input("packet", lambda core, now, name, data: core.handle_stream_answer(now, peer(name), data)),
    "sync request": Input("sync request", lambda core, now, name, data: core.handle_sync_request(now, peer(name), data)),
    "sync reply": Input("sync reply", lambda core, now, name, data: core.handle_sync_reply(now, peer(name), data)),
}
STEPS = st.sampled_from(sorted(INPUTS)).flatmap(
    lambda name: st.tuples(st.just(name), st.sampled_from("bcf"), hostile(WELL_FORMED[INPUTS[name].expects]))
)


def core_of(name: str = "a") -> Swim:
    return builders.swim(name, *(member(other) for other in NAMES if other != name))


def parts(value: object) -> Iterator[object]:
    """Every value that an object holds, at any depth, in order, without what only counts."""
    yield value
    match value:
        case Random():
            yield value.getstate()
        case Mapping():
            for key, item in value.items():
                yield from parts(key)
                yield from parts(item)
        case tuple() | list() | deque() | set() | frozenset():
            for item in value:
                yield from parts(item)
        case str() | bytes() | int() | float() | None:
            return
        case _ if callable(value):
            return
        case _:
            slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
            for name in sorted({*slots, *getattr(value, "__dict__", {})}):
                if "counter" not in name:
                    yield from parts(getattr(value, name, None))


PLAIN = (str, bytes, int, float, type(None), tuple)


def fingerprint(core: Swim) -> str:
    """Of the whole state: two cores with equal ones behave alike."""
    held = hashlib.sha256()
    for value in parts(core):
        shown = value if isinstance(value, PLAIN) else (type(value).__name__, _length(value))
        held.update(repr(shown).encode())
    return held.hexdigest()


def _length(value: object) -> int:
    return len(value) if isinstance(value, Mapping | list | deque | set) else 0


def largest(core: Swim) -> int:
    """The size of the largest container in it."""
    lengths = (len(value) for value in parts(core) if isinstance(value, dict | OrderedDict | list | deque | set | tuple))
    return max(length for length in lengths if length != 625)  # the state of Random


def effects_of(answer: object) -> list[Effect]:
    return cast(list[Effect], answer[1] if isinstance(answer, tuple) else answer)


# --- bytes that mean nothing ------------------------------------------------------------------------------------------


@given(st.sampled_from(sorted(WELL_FORMED)).flatmap(lambda kind: hostile(WELL_FORMED[kind])))
def test_whatever_is_read_there_is_one_exception(data: bytes) -> None:
    for read in (wire.read_packet, wire.read_sync_request, wire.read_sync_reply, streams.read_answer):
        try:
            read(data)
        except MalformedData:
            continue


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(STEPS, min_size=1, max_size=6), st.data())
def test_what_is_refused_changes_nothing_and_what_is_taken_leaves_the_core_sound(
    story: list[tuple[str, str, bytes]], data: st.DataObject
) -> None:
    core = core_of()
    now = 0.0
    for kind, sender, message in story:
        before = fingerprint(core)
        try:
            effects = effects_of(INPUTS[kind].call(core, now, sender, message))
        except PeerError:
            assert fingerprint(core) == before, f"a refused {kind} changed something"
        else:
            assert all(len(effect.packet) <= PACKET_PLAIN_BYTES_MAX for effect in effects if isinstance(effect, Send))
            assert len(effects) < 100
        now += data.draw(st.floats(0, 2))
        if core.deadline() <= now:
            core.handle_timeout(now)
        core.check()
        assert len(core.members()) <= len(NAMES)


def test_the_fingerprint_sees_a_change_anywhere() -> None:
    assert fingerprint(core_of()) == fingerprint(core_of())
    changes: list[Callable[[Swim], object]] = [
        lambda core: core.handle_packet(0.0, packet("b", Ping(1, peer("a"))), address("b")),
        lambda core: core.handle_packet(0.0, packet("b", rumors=(Rumor(member("c", SUSPECT)),)), address("b")),
        lambda core: core.handle_packet(0.0, packet("b", records=(Record(peer("c"), Epoch(1), 1, 0, b"x"),)), address("b")),
        lambda core: core.handle_timeout(core.deadline()),
        lambda core: core._rng.random(),
        lambda core: core.note(b"x"),
    ]
    for change in changes:
        core = core_of()
        change(core)
        assert fingerprint(core) != fingerprint(core_of())


BOMBS = {
    "arrays in arrays": b"\x91" * PACKET_PLAIN_BYTES_MAX,
    "arrays that claim to be long, in each other": b"\xdc\x00\xff" * 380,
    "arrays that claim to be long, side by side": b"\xdc\x00\xfe" + b"\xdc\x00\xff" * 380,
    "an array that claims four billion": b"\xdd\xff\xff\xff\xff",
    "a map that claims four billion": b"\xdf\xff\xff\xff\xff",
    "maps in maps": b"\x81\x01" * 570,
    "bytes that claim four gigabytes": b"\xc6\xff\xff\xff\xff",
    "a text that claims four gigabytes": b"\xdb\xff\xff\xff\xff",
    "an extension that claims four gigabytes": b"\xc9\xff\xff\xff\xff\x01",
    "a timestamp beyond time": b"\xc7\x0c\xff" + b"\xff" * 12,
    "a map of a thousand equal keys": b"\xde\x02\x00" + b"\x01\x01" * 512,
}


@pytest.mark.parametrize("what", BOMBS)
def test_a_bomb_in_a_packet_is_cheap(what: str) -> None:
    with pytest.raises(MalformedData):
        wire.read_packet(BOMBS[what])  # the converters are made now, not below
    tracemalloc.start()
    try:
        with pytest.raises(MalformedData):
            wire.read_packet(BOMBS[what])
        assert tracemalloc.get_traced_memory()[1] < 2 * 2**20
    finally:
        tracemalloc.stop()


# --- a member that lies -----------------------------------------------------------------------------------------------


def invented(number: int) -> PeerId:
    return peer(f"invented {number}")


def test_thousands_of_invented_members_fill_the_table_and_no_more() -> None:
    core = core_of()
    sent = 0
    for number in range(3 * MEMBERS_MAX):
        lie = dataclasses.replace(member("b"), peer=invented(number), name=f"n{number}")
        said = Packet(
            invented(number), Epoch(1), GossipOnly(), (Rumor(lie),),
            records=(Record(invented(number), Epoch(1), 1, 0, b"r" * 700),), note=b"n" * wire.NOTE_BYTES_MAX,
        )  # fmt: skip
        sent += len(core.handle_packet(number / 1000, codec.encode(said), Address("10.9.9.9", 1 + number % 60_000)))
        if core.deadline() <= number / 1000:
            core.handle_timeout(number / 1000)
    core.check()
    assert len(core.members()) == MEMBERS_MAX and core.counters["members_refused"] > MEMBERS_MAX
    assert largest(core) <= 2 * MEMBERS_MAX + 1
    assert core.member(peer("c")) == member("c"), "those who were here before stay"


def test_records_of_nobody_and_digests_of_nonsense_are_answered_with_little_or_nothing() -> None:
    core = core_of()
    for name in NAMES[1:]:
        record = Record(peer(name), Epoch(1), 1, 0, bytes(RECORD_BYTES_MAX))
        core.handle_packet(0.0, packet(name, records=(record,)), address(name))
    record = Record(invented(1), Epoch(1), 1, 0, b"x")
    assert core.handle_packet(0.0, packet("b", records=(record,) * 9), address("b")) == []
    assert core.counters["records_unknown"] == 9
    rng = Random(1)
    for _ in range(200):
        digest = rng.randbytes(13 * rng.randrange(1, 80))
        sends = core.handle_packet(0.0, packet("b", digest=digest), address("b"))
        assert len(sends) <= REPLY_PACKETS_MAX + 1
    stale = pack_digest([DigestEntry(wire.short_id(peer(name)), 0, 0) for name in NAMES] * 14)
    assert len(core.handle_packet(0.0, packet("b", digest=stale), address("b"))) <= REPLY_PACKETS_MAX + 1
    core.check()


@pytest.mark.parametrize("liveness", [SUSPECT, DEAD])
@pytest.mark.parametrize("incarnation", [0, 1_000_000, COUNT_MAX - 1])
def test_who_is_slandered_objects_and_the_others_believe_that(liveness: Liveness, incarnation: int) -> None:
    slandered, other = core_of("c"), core_of("a")
    lie = Rumor(member("c", liveness, incarnation=incarnation), tuple(wire.observer(peer(name)) for name in "bdef"))
    for core in (slandered, other):
        effects = core.handle_packet(1.0, packet("b", rumors=(lie,)), address("b"))
    objection = slandered.handle_packet(1.5, packet("b", Ping(1, peer("c")), rumors=(lie,)), address("b"))
    assert slandered.me.liveness is Liveness.ALIVE and slandered.me.incarnation == incarnation + 1
    assert other.member(peer("c")) == lie.member, "so far it is believed"
    assert effects
    for effect in objection:
        if isinstance(effect, Send):
            other.handle_packet(2.0, effect.packet, address("c"))
    assert other.member(peer("c")) == slandered.me
    other.check()
    slandered.check()


@pytest.mark.parametrize(
    "lie", [member("c", DEAD, incarnation=COUNT_MAX), member("c", DEAD, epoch=COUNT_MAX), member("c", epoch=COUNT_MAX)]
)
def test_numbers_at_their_end_are_survived(lie: Member) -> None:
    slandered = core_of("c")
    effects = slandered.handle_packet(1.0, packet("b", rumors=(Rumor(lie),)), address("b"))
    assert slandered.counters["refutations_refused"] == 1 or any(isinstance(effect, Refuted) for effect in effects)
    assert slandered.me.liveness is Liveness.ALIVE
    slandered.check()
    wire.read_sync_request(wire.fill_sync(SyncRequest, slandered.me, (), ()))
    slandered.publish(2.0, b"record")
    slandered.readdress(3.0, [Address("10.1.1.1", 1)])
    slandered.check()


def test_a_slanderer_does_not_make_its_victim_talk_without_end() -> None:
    core = core_of("c")
    sent = sum(
        len(core.handle_packet(1.0, packet("b", rumors=(Rumor(member("c", DEAD, incarnation=2 * n)),)), address("b")))
        for n in range(1_000)
    )
    assert core.counters["refutations_refused"] > 900
    assert sent < 200
    core.check()


def test_a_record_at_the_last_version_does_not_stop_its_owner() -> None:
    core = core_of()
    core.publish(0.0, b"mine")
    core.handle_packet(1.0, packet("b", records=(Record(peer("a"), Epoch(1), COUNT_MAX, 0, b"not mine"),)), address("b"))
    core.publish(2.0, b"mine, too")
    assert core.record(peer("a")) == b"mine, too"
    core.check()


@pytest.mark.parametrize(
    "what",
    [
        {"name": "n" * (NAME_CHARS_MAX + 1)},
        {"version": "v" * 33},
        {"addresses": tuple(Address(f"10.0.0.{n}", 1) for n in range(1, 10))},
        {"incarnation": COUNT_MAX + 1},
        {"started_at": 2**41},
        {"named": -1},
        {"named": 2**32},
        {"boot": -1},
    ],
)
def test_a_member_that_is_too_large_is_nobody(what: dict[str, Any]) -> None:
    core = core_of()
    before = fingerprint(core)
    lie = dataclasses.replace(member("b"), **what)
    with pytest.raises(MalformedData):
        core.handle_packet(0.0, packet("b", rumors=(Rumor(lie),)), address("b"))
    with pytest.raises(MalformedData):
        core.handle_sync_request(0.0, peer("b"), codec.encode(SyncRequest(lie, (), ())))
    assert fingerprint(core) == before


@pytest.mark.parametrize("message", [Ping(1, PeerId("nobody")), PingRequest(1, PeerId("")), Ping(1, PeerId("1" * 52))])
def test_a_ping_for_nobody_is_malformed(message: Ping | PingRequest) -> None:
    core = core_of()
    with pytest.raises(MalformedData):
        core.handle_packet(0.0, packet("b", message), address("b"))


def test_nobody_is_made_to_ping_a_stranger() -> None:
    """A member could else have this peer send packets to whomever it likes."""
    core = core_of()
    effects = core.handle_packet(0.0, packet("b", PingRequest(1, invented(1))), address("b"))
    assert [effect.address for effect in effects if isinstance(effect, Send)] == [address("b")]


# --- real shells on real sockets --------------------------------------------------------------------------------------

KEY = b"k" * 32
LIMIT = 20.0


class Shell:
    """A peer with real seals. It asks nobody over TCP."""

    def __init__(self, name: str, key: bytes = KEY) -> None:
        sock = open_socket("127.0.0.1", 0)
        self.address = Address("127.0.0.1", sock.getsockname()[1])
        self.me = dataclasses.replace(member(name), addresses=(self.address,))
        self.sealer = Sealer(key, os.urandom(16))
        self.opener = Opener({key_id(key): key}, self.sealer.subkey_id)
        self.effects: list[Effect] = []
        core = Swim(self.me, PROFILES["fast"], Random(name), time.monotonic())
        self.gossip = GossipShell(
            core, sock, seal=self.sealer.seal, open=self.opener.open, sync=self._nobody, stream=self._no_answer,
            on_effect=self.effects.append, clock=time.monotonic,
        )  # fmt: skip
        self.gossip.start()

    async def _nobody(self, sync: object) -> tuple[PeerId, bytes]:
        raise Unreachable("nobody there")

    async def _no_answer(self, who: PeerId, data: bytes) -> tuple[bytes, ...]:
        raise Unreachable("nobody there")

    def told_of(self, other: "Shell") -> None:
        hello = codec.encode(SyncReply(other.me, (), ()))
        self.gossip.perform(self.gossip.core.handle_sync_reply(time.monotonic(), other.me.peer, hello))

    def holds_alive(self, other: "Shell") -> bool:
        held = self.gossip.core.member(other.me.peer)
        return held is not None and held.liveness is Liveness.ALIVE


def with_shells(story: Callable[..., Coroutine[Any, Any, None]], *names: str) -> None:
    """Tell the story with these peers, which know each other."""

    async def run() -> None:
        shells = [Shell(name) for name in names]
        for shell in shells:
            for other in shells:
                if shell is not other:
                    shell.told_of(other)
        try:
            await story(*shells)
        finally:
            for shell in shells:
                await shell.gossip.stop()

    asyncio.run(run())


async def until(predicate: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LIMIT
    while not predicate():
        assert time.monotonic() < deadline, f"never: {what}"
        await asyncio.sleep(0.005)


def test_nothing_that_a_stranger_can_make_is_answered_and_each_kind_is_counted() -> None:
    async def story(a: Shell) -> None:
        member_of_another_mesh, friend = Sealer(b"o" * 32, os.urandom(16)), Sealer(KEY, os.urandom(16))
        plain = packet("b", Ping(1, a.me.peer))
        good = friend.seal(plain)
        captured = friend.seal(packet("c", Ping(2, a.me.peer)))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            stranger.setblocking(False)
            stranger.connect((a.address.host, a.address.port))
            before = dict(a.gossip.core.counters)
            for data in (
                b"", b"short", bytes(PACKET_BYTES_MAX + 1), os.urandom(300), good[:-1], good[:60], good + b"x",
                member_of_another_mesh.seal(plain), MAGIC[:2] + b"\x02" + good[3:], a.sealer.seal(plain),
                friend.seal(b"no packet"), friend.seal(plain[:-1]),
            ):  # fmt: skip
                stranger.send(data)
            await until(lambda: a.gossip.stats()["received"] == 12, "all arrived")
            stats = a.gossip.stats()
            assert (stats["too_short"], stats["too_long"], stats["unopened"], stats["malformed"]) == (2, 1, 7, 2)
            refused = {reason: count for reason, count in a.opener.counters.items() if count}
            assert refused == {Refusal.FOREIGN: 2, Refusal.FORGED: 3, Refusal.UNKNOWN_KEY: 1, Refusal.REFLECTED: 1}
            assert stats["sent"] == 0 and a.gossip.core.members() == (a.me,)
            assert dict(a.gossip.core.counters) == before
            stranger.send(captured)
            await until(lambda: a.gossip.stats()["sent"] == 1, "a member's ping is answered")
            for _ in range(3):
                stranger.send(captured)
            await until(lambda: a.opener.counters[Refusal.REPLAYED] == 3, "the repeated one is known")
            assert a.gossip.stats()["sent"] == 1

    with_shells(story, "a")


FLOODS: dict[str, Callable[[Sealer, int], bytes]] = {
    "garbage": lambda sealer, number: b"x" * 200,
    "forged": lambda sealer, number: MAGIC + key_id(KEY) + os.urandom(16) + struct.pack(">Q", number) + bytes(200),
    "empty packets of a member": lambda sealer, number: sealer.seal(packet("c")),
    "nonsense of a member": lambda sealer, number: sealer.seal(b"nonsense"),
    "pings of a member": lambda sealer, number: sealer.seal(packet("c", Ping(number % 2**32, peer("a")))),
    "lies of a member": lambda sealer, number: sealer.seal(
        packet("c", rumors=tuple(Rumor(dataclasses.replace(member("x"), peer=invented(10 * number + n))) for n in range(3)))
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FLOODS)
def test_a_flood_from_one_address_costs_little_and_others_are_served(kind: str) -> None:
    async def story(a: Shell, b: Shell) -> None:
        await until(lambda: a.gossip.stats()["core_packets_in"] > 2, "b is heard")
        sealer, sent = Sealer(KEY, os.urandom(16)), 0
        ping = Send(a.address, packet("b", Ping(1, a.me.peer)))  # besides those of b's core, which are too few to wait for
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as flooder:
            flooder.setblocking(False)
            while sent < 30_000 or b.gossip.core.counters["acks_late"] < 5:
                if sent % 5_000 == 0:
                    b.gossip.perform([ping])
                for _ in range(100):
                    sent += 1
                    flooder.sendto(FLOODS[kind](sealer, sent), (a.address.host, a.address.port))
                await asyncio.sleep(0)
        stats = a.gossip.stats()
        assert stats["throttled"] + stats["flooded"] > sent // 2, "most of it is not looked at"
        assert a.holds_alive(b) and b.holds_alive(a)
        slandered = [each.after for each in (*a.effects, *b.effects) if isinstance(each, MemberChanged)]
        assert not [who for who in slandered if who.peer in (a.me.peer, b.me.peer) and who.liveness is Liveness.DEAD]
        assert stats["bugs"] == 0 and stats["sent"] < 1_000, "who floods is not answered in kind"
        assert len(a.gossip.core.members()) <= MEMBERS_MAX
        a.gossip.core.check()

    with_shells(story, "a", "b")
