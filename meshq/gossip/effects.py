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
class ProbeFailed:
    """A member answered neither directly nor through others; it is now suspect."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Refuted:
    """Somebody held me suspect or dead, or another run of me is alive; I raised my incarnation."""

    accusation: Member


Effect = Send | Sync | MemberChanged | RecordChanged | ProbeFailed | Refuted
