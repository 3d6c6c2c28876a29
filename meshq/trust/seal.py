"""Sealed UDP packets: only members can make them, nobody can read, change or repeat them.

Problem: gossip is one datagram at a time, to anybody, with no handshake; it must be secret, authentic and not
replayable, for some microseconds a packet, and a stranger's packet must cost next to nothing.

Form: a header of 31 bytes, then the AES-256-GCM ciphertext and its tag of 16 bytes. The whole header is authenticated.

    magic "MQ" (2) | version (1) | id of the gossip key (4) | id of the subkey (16) | counter (8)

Invariant: a (subkey, counter) pair is used for one packet only, since a repeated GCM nonce gives the key away. Each agent
start, and each change of the key in use, draws a random id of 16 bytes; its subkey is HKDF-Expand(gossip key, id) and its
nonces count from 1. The epoch would not do as an id: a home that was copied to two machines counts the same epochs.

Replay: for each subkey, the highest counter seen and a window of bits below it (as in RFC 6479). What is older than the
window is refused; reordering within it is not. State is kept only for subkeys of packets that proved authentic,
so strangers can't grow the table or push members out of it; the least recently heard goes first when it is full.
A receiver that restarted, or forgot a subkey, accepts the old packets of that subkey once more. That is harmless: what
gossip carries is ordered by epoch and incarnation and merges by `max`, so an old rumor changes nothing.

Limits: every member has the gossip key, so a packet proves that *a* member made it, not which. What gossip says
is therefore advice: it leads to probes, never to running or losing a task without the ledger, which travels over mutual TLS.
A packet names no receiver either: a captured one can be sent on, once, to each other member.
A packet that was not opened must never be answered.

Reading: NIST SP 800-38D 8.2.1 (deterministic nonces); RFC 5869 (HKDF); RFC 6479; the replay windows of WireGuard and Nebula.
"""

import struct
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from meshq.config import PACKET_BYTES_MAX, REPLAY_SENDERS_MAX, REPLAY_WINDOW

MAGIC: Final = b"MQ\x01"  # with the version of the format
KEY_ID_BYTES: Final = 4
SUBKEY_ID_BYTES: Final = 16
OWN_SUBKEYS_MAX: Final = 16  # of this run, whose packets are known as our own: one for each change of keys
TAG_BYTES: Final = 16
COUNTER_MAX: Final = 2**64 - 1
_HEADER: Final = struct.Struct(">3s4s16sQ")
OVERHEAD_BYTES: Final = _HEADER.size + TAG_BYTES
PLAINTEXT_BYTES_MAX: Final = PACKET_BYTES_MAX - OVERHEAD_BYTES


class Refusal(StrEnum):
    """Why a packet was dropped."""

    SIZE = "size"  # too short or too long
    FOREIGN = "foreign"  # its first bytes are not ours
    UNKNOWN_KEY = "unknown_key"  # sealed with a gossip key that we don't have
    REFLECTED = "reflected"  # our own, sent back to us
    REPLAYED = "replayed"  # seen before, or older than the window
    FORGED = "forged"  # not made with the key that it names


def key_id(gossip_key: bytes) -> bytes:
    """Four public bytes that tell gossip keys apart on the wire."""
    return HKDFExpand(SHA256(), KEY_ID_BYTES, b"meshq/v1/gossip key id").derive(gossip_key)


def _subkey(gossip_key: bytes, subkey_id: bytes) -> AESGCM:
    return AESGCM(HKDFExpand(SHA256(), 32, b"meshq/v1/gossip subkey/" + subkey_id).derive(gossip_key))


def _nonce(counter: int) -> bytes:
    return counter.to_bytes(12, "big")


class Sealer:
    """Seals this agent's packets, from its start, or a change of keys, to the next. `subkey_id`: 16 random bytes, drawn for
    this one object only."""

    def __init__(self, gossip_key: bytes, subkey_id: bytes) -> None:
        assert len(subkey_id) == SUBKEY_ID_BYTES
        self.subkey_id = subkey_id
        self._key_id = key_id(gossip_key)
        self._aead = _subkey(gossip_key, subkey_id)
        self._counter = 0

    def seal(self, plaintext: bytes) -> bytes:
        """The packet to send; at most PACKET_BYTES_MAX for a plaintext of at most PLAINTEXT_BYTES_MAX."""
        assert len(plaintext) <= PLAINTEXT_BYTES_MAX
        assert self._counter < COUNTER_MAX
        self._counter += 1
        header = _HEADER.pack(MAGIC, self._key_id, self.subkey_id, self._counter)
        return header + self._aead.encrypt(_nonce(self._counter), plaintext, header)


class Opener:
    """Opens others' packets. `keys`: gossip keys by `key_id`; several while the mesh changes its key."""

    def __init__(self, keys: Mapping[bytes, bytes], own_subkey_id: bytes = b"") -> None:
        self._keys = dict(keys)
        self._own: OrderedDict[bytes, None] = OrderedDict({own_subkey_id: None})  # the oldest first
        self._senders: OrderedDict[bytes, _Sender] = OrderedDict()  # by key id and subkey id; the least recently heard first
        self.counters: dict[Refusal, int] = dict.fromkeys(Refusal, 0)

    def accept(self, keys: Mapping[bytes, bytes], own_subkey_id: bytes) -> None:
        """From now on these keys and no others, while this agent seals under another subkey of its own.

        What was seen under keys that stay is not forgotten: their packets open no second time.
        """
        self._keys = dict(keys)
        self._own[own_subkey_id] = None
        if len(self._own) > OWN_SUBKEYS_MAX:
            self._own.popitem(last=False)
        for name in [name for name in self._senders if name[:KEY_ID_BYTES] not in self._keys]:
            del self._senders[name]

    def open(self, packet: bytes) -> bytes | None:
        """What a member sealed; None if it is anything else, counted under its reason, with nothing else changed."""
        opened = self._open(packet)
        if isinstance(opened, Refusal):
            self.counters[opened] += 1
            return None
        return opened

    def _open(self, packet: bytes) -> bytes | Refusal:
        """The cheap questions come first; the dearest refusal costs one HKDF and one AES-GCM (9 us)."""
        if not OVERHEAD_BYTES <= len(packet) <= PACKET_BYTES_MAX:
            return Refusal.SIZE
        magic, named_key, subkey_id, counter = _HEADER.unpack_from(packet)
        if magic != MAGIC:
            return Refusal.FOREIGN
        gossip_key = self._keys.get(named_key)
        if gossip_key is None:
            return Refusal.UNKNOWN_KEY
        if subkey_id in self._own:
            return Refusal.REFLECTED
        name = named_key + subkey_id
        sender = self._senders.get(name) or _Sender(_subkey(gossip_key, subkey_id))
        if sender.has_seen(counter):
            return Refusal.REPLAYED
        try:
            plaintext = sender.aead.decrypt(_nonce(counter), packet[_HEADER.size :], packet[: _HEADER.size])
        except InvalidTag:
            return Refusal.FORGED
        sender.mark(counter)
        self._remember(name, sender)
        return plaintext

    def _remember(self, name: bytes, sender: "_Sender") -> None:
        self._senders[name] = sender
        self._senders.move_to_end(name)
        if len(self._senders) > REPLAY_SENDERS_MAX:
            self._senders.popitem(last=False)


@dataclass(slots=True)
class _Sender:
    """One subkey: its cipher and which of its counters were seen. Bit i of `seen` stands for `highest - i`."""

    aead: AESGCM
    highest: int = 0
    seen: int = 1  # counter 0 is never sent

    def has_seen(self, counter: int) -> bool:
        behind = self.highest - counter
        return behind >= 0 and (behind >= REPLAY_WINDOW or bool(self.seen >> behind & 1))

    def mark(self, counter: int) -> None:
        ahead = counter - self.highest
        if ahead <= 0:
            self.seen |= 1 << -ahead
        elif ahead < REPLAY_WINDOW:
            self.highest, self.seen = counter, (self.seen << ahead | 1) & (1 << REPLAY_WINDOW) - 1
        else:
            self.highest, self.seen = counter, 1
