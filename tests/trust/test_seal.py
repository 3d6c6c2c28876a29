"""Sealed packets: what a member made opens once; everything else is dropped, counted, and changes nothing."""

import hashlib
from collections.abc import Iterator
from random import Random

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from meshq.config import PACKET_BYTES_MAX, PACKET_BYTES_MIN, REPLAY_SENDERS_MAX, REPLAY_WINDOW
from meshq.trust import seal
from meshq.trust.seal import OVERHEAD_BYTES, PLAINTEXT_BYTES_MAX, Opener, Refusal, Sealer, key_id

GOSSIP_KEY = bytes(range(32))
OTHER_KEY = bytes(range(1, 33))


def sealer(name: str = "a", gossip_key: bytes = GOSSIP_KEY) -> Sealer:
    return Sealer(gossip_key, hashlib.sha256(name.encode()).digest()[:16])


def opener(*gossip_keys: bytes, own: bytes = b"") -> Opener:
    return Opener({key_id(key): key for key in gossip_keys or (GOSSIP_KEY,)}, own)


def refused(opener: Opener) -> dict[Refusal, int]:
    return {reason: count for reason, count in opener.counters.items() if count}


@given(st.binary(max_size=PLAINTEXT_BYTES_MAX))
def test_a_member_opens_what_a_member_sealed(plaintext: bytes) -> None:
    packet = sealer().seal(plaintext)
    receiver = opener()
    assert receiver.open(packet) == plaintext
    assert len(packet) == len(plaintext) + OVERHEAD_BYTES
    assert refused(receiver) == {}


def test_the_largest_packet_is_never_fragmented() -> None:
    assert len(sealer().seal(bytes(PLAINTEXT_BYTES_MAX))) == PACKET_BYTES_MAX
    assert OVERHEAD_BYTES <= PACKET_BYTES_MIN


def test_the_form_on_the_wire_never_changes() -> None:
    packet = sealer().seal(b"hello mesh")
    assert (
        packet.hex()
        == "4d510131a443dbca978112ca1bbdcafac231b39a23dc4d00000000000000019967ca9c77a37f63de0f7e22a36f7e521713e522d24c4554789a"
    )


def test_nonces_of_one_start_never_repeat_and_other_starts_use_other_subkeys() -> None:
    first, second = sealer("first start"), sealer("second start")
    packets = [each.seal(b"same") for each in (first, second) for _ in range(100)]
    assert len({packet[7:31] for packet in packets}) == len(packets)
    assert len({packet[31:] for packet in packets}) == len(packets)


def test_the_subkey_is_not_the_gossip_key_itself() -> None:
    packet = sealer().seal(b"x")
    with pytest.raises(InvalidTag):
        AESGCM(GOSSIP_KEY).decrypt(bytes(11) + b"\x01", packet[31:], packet[:31])


@given(st.binary(max_size=64), st.data())
def test_a_packet_with_any_bit_changed_is_refused(plaintext: bytes, data: st.DataObject) -> None:
    packet = bytearray(sealer().seal(plaintext))
    at = data.draw(st.integers(0, len(packet) * 8 - 1))
    packet[at // 8] ^= 1 << at % 8
    receiver = opener()
    assert receiver.open(bytes(packet)) is None
    assert sum(receiver.counters.values()) == 1


@given(st.binary(max_size=1300))
def test_garbage_is_refused(packet: bytes) -> None:
    receiver = opener()
    assert receiver.open(packet) is None
    assert sum(receiver.counters.values()) == 1


@pytest.mark.parametrize(
    ("packet", "reason"),
    [
        (b"", Refusal.SIZE),
        (b"MQ\x01" + bytes(OVERHEAD_BYTES - 4), Refusal.SIZE),
        (b"MQ\x01" + bytes(PACKET_BYTES_MAX), Refusal.SIZE),
        (b"MQ\x02" + bytes(100), Refusal.FOREIGN),
        (bytes(100), Refusal.FOREIGN),
        (sealer(gossip_key=OTHER_KEY).seal(b"x"), Refusal.UNKNOWN_KEY),
        (b"MQ\x01" + key_id(GOSSIP_KEY) + bytes(100), Refusal.REPLAYED),
        (b"MQ\x01" + key_id(GOSSIP_KEY) + bytes([9] * 100), Refusal.FORGED),
        (sealer("me").seal(b"x"), Refusal.REFLECTED),
    ],
)
def test_each_refusal_has_its_counter(packet: bytes, reason: Refusal) -> None:
    receiver = opener(own=sealer("me").subkey_id)
    assert receiver.open(packet) is None
    assert refused(receiver) == {reason: 1}


def test_a_packet_opens_only_once() -> None:
    packet = sealer().seal(b"x")
    receiver = opener()
    assert [receiver.open(packet) for _ in range(3)] == [b"x", None, None]
    assert refused(receiver) == {Refusal.REPLAYED: 2}


def test_while_the_key_changes_packets_under_both_keys_open() -> None:
    receiver = opener(GOSSIP_KEY, OTHER_KEY)
    assert receiver.open(sealer(gossip_key=GOSSIP_KEY).seal(b"old")) == b"old"
    assert receiver.open(sealer(gossip_key=OTHER_KEY).seal(b"new")) == b"new"


@given(st.randoms(use_true_random=False), st.integers(1, 300))
def test_reordering_and_duplication_within_the_window_lose_and_repeat_nothing(rng: Random, count: int) -> None:
    source, receiver = sealer(), opener()
    packets = [source.seal(str(number).encode()) for number in range(count)]
    delivered = packets + rng.choices(packets, k=count)
    rng.shuffle(delivered)
    opened = [plaintext for packet in delivered if (plaintext := receiver.open(packet)) is not None]
    assert sorted(opened, key=int) == [str(number).encode() for number in range(count)]
    assert refused(receiver) == {Refusal.REPLAYED: count}


@given(st.lists(st.integers(1, 3 * REPLAY_WINDOW), min_size=1, max_size=200))
def test_the_window_accepts_exactly_what_a_plain_set_of_counters_would(counters: list[int]) -> None:
    source = sealer()
    packets = {counter: packet for counter, packet in zip(range(1, 3 * REPLAY_WINDOW + 1), sealed(source), strict=False)}
    receiver = opener()
    seen: set[int] = set()
    for counter in counters:
        expected = counter not in seen and counter > max(seen, default=0) - REPLAY_WINDOW
        assert (receiver.open(packets[counter]) is not None) == expected
        seen |= {counter} if expected else set()


@pytest.mark.parametrize(("behind", "opens"), [(REPLAY_WINDOW - 1, True), (REPLAY_WINDOW, False)])
def test_the_window_ends_where_its_limit_says(behind: int, opens: bool) -> None:
    source, receiver = sealer(), opener()
    packets = [source.seal(b"x") for _ in range(behind + 1)]
    receiver.open(packets[-2])
    receiver.open(packets[-1])  # a window that was shifted, not a fresh one
    assert (receiver.open(packets[0]) is not None) == opens


def sealed(source: Sealer) -> Iterator[bytes]:
    while True:
        yield source.seal(b"")


def test_a_forged_packet_does_not_move_the_window() -> None:
    source, receiver = sealer(), opener()
    packets = [source.seal(b"%d" % number) for number in range(10)]
    receiver.open(packets[0])
    forged = packets[9][:23] + (2**63).to_bytes(8, "big") + packets[9][31:]
    assert receiver.open(forged) is None
    assert [receiver.open(packet) for packet in packets[1:]] == [b"%d" % number for number in range(1, 10)]


def test_forged_senders_push_no_member_out_and_take_no_memory() -> None:
    source, receiver = sealer(), opener()
    first = source.seal(b"x")
    receiver.open(first)
    header = b"MQ\x01" + key_id(GOSSIP_KEY)
    for number in range(REPLAY_SENDERS_MAX + 10):
        assert receiver.open(header + number.to_bytes(16, "big") + (1).to_bytes(8, "big") + bytes(50)) is None
    assert receiver.open(first) is None
    assert refused(receiver) == {Refusal.FORGED: REPLAY_SENDERS_MAX + 10, Refusal.REPLAYED: 1}


def test_a_full_table_forgets_the_sender_that_was_silent_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seal, "REPLAY_SENDERS_MAX", 3)
    sources = [sealer(name) for name in "abcd"]
    first = [source.seal(b"x") for source in sources]
    receiver = opener()
    for packet in first[:3]:
        receiver.open(packet)
    receiver.open(sources[0].seal(b"y"))  # a is heard again, so b is the silent one
    receiver.open(first[3])
    assert [receiver.open(packet) for packet in (first[0], first[2], first[3])] == [None, None, None]
    assert receiver.open(first[1]) == b"x"
