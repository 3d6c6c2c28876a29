"""All that the gossip core may ask its shell to do."""

from dataclasses import dataclass

from meshq.gossip.member import Address, Member
from meshq.ids import PeerId


@dataclass(frozen=True, slots=True)
class Send:
    """Seal `packet` (plaintext, at most the sealed limit) and send it by UDP to `address`."""

    address: Address
    packet: bytes


@dataclass(frozen=True, slots=True)
class Stream:
    """Post `packet` over TCP to `peer`, whom UDP may not reach; hand each packet of the answer to `handle_stream_answer`."""

    peer: PeerId
    packet: bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """Put `packet` into the answer of the request that `handle_stream_packet` was called for; nothing else returns this."""

    packet: bytes


@dataclass(frozen=True, slots=True)
class Sync:
    """Post `request` over TCP (push/pull) to `address`; hand the answer to `handle_sync_reply`.

    `peer` is None for a seed, of which only the address is known.
    """

    peer: PeerId | None
    address: Address
    request: bytes


@dataclass(frozen=True, slots=True)
class MemberChanged:
    """A belief changed; `before` is None for a peer that was unknown."""

    before: Member | None
    after: Member


@dataclass(frozen=True, slots=True)
class RecordChanged:
    """Newer telemetry of `peer`: `record` is what its `publish` was given."""

    peer: PeerId
    record: bytes


@dataclass(frozen=True, slots=True)
class NoteHeard:
    """What the ledger of a live peer says has changed: `note` is what its `note` was given."""

    peer: PeerId
    note: bytes


@dataclass(frozen=True, slots=True)
class ProbeFailed:
    """A member answered neither directly, nor through others, nor over TCP; it is now suspect."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Refuted:
    """Somebody held me suspect or dead, or another run of me is known; I outbid it."""

    statement: Member


@dataclass(frozen=True, slots=True)
class TransportChanged:
    """UDP to a live peer does not get there and back while TCP does (`udp` is false), or does so again."""

    peer: PeerId
    udp: bool


@dataclass(frozen=True, slots=True)
class Cloned:
    """Another agent is alive with this very identity: a home was copied. If I am the `newer`, I have fallen silent."""

    other: Member
    newer: bool


Effect = (
    Send
    | Stream
    | Answer
    | Sync
    | MemberChanged
    | RecordChanged
    | NoteHeard
    | ProbeFailed
    | Refuted
    | TransportChanged
    | Cloned
)
