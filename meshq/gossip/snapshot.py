"""The peers that this one knew, on disk, so that a mesh that was switched off finds itself again.

It holds the failed as well as the living: after a power cut everybody's last view is that everybody else failed. A damaged file
is put aside and not fatal: seeds and mDNS remain.
"""

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

from meshq import codec
from meshq.config import ADDRESSES_MAX, MEMBERS_MAX
from meshq.durable import write_atomically
from meshq.errors import MalformedData, StoreError
from meshq.gossip.member import Address
from meshq.gossip.roster import KnownPeer
from meshq.ids import PeerId, is_peer_id

log = logging.getLogger("meshq.gossip")

FILE_BYTES_MAX: Final = 4 * 2**20  # MEMBERS_MAX lines with their records


@dataclass(frozen=True, slots=True, kw_only=True)
class _Line:
    peer: PeerId
    name: str
    addresses: tuple[Address, ...]
    last_seen: float  # wall-clock seconds: the one clock that goes on while the machine is off
    record: bytes = b""


@dataclass(frozen=True, slots=True)
class _File:
    TAG: ClassVar[int] = 1

    peers: tuple[_Line, ...]


def save(path: Path, peers: Sequence[KnownPeer], wall_now: float) -> None:
    """Replace the snapshot. StoreError: the old one is still there."""
    newest = sorted(peers, key=lambda known: (known.unseen_for, known.peer))[:MEMBERS_MAX]
    lines = tuple(
        _Line(
            peer=known.peer,
            name=known.name,
            addresses=known.addresses[:ADDRESSES_MAX],
            last_seen=wall_now - known.unseen_for,
            record=known.record,
        )
        for known in newest
    )
    try:
        write_atomically(path, codec.encode(_File(lines)))
    except OSError as error:
        raise StoreError(f"cannot save the known peers to {path}: {error.strerror}") from None


def load(path: Path, wall_now: float) -> list[KnownPeer]:
    """What was saved; nothing if there is no snapshot or it is damaged (then it is kept as `….damaged`)."""
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
        lines = codec.decode(_File, data, bytes_max=FILE_BYTES_MAX).peers
    except FileNotFoundError:
        return []
    except OSError as error:
        log.warning("cannot read the known peers in %s: %s; going on without them", path, error.strerror)
        return []
    except MalformedData as error:
        aside = path.with_name(path.name + ".damaged")
        with suppress(OSError):  # then it is overwritten by the next one
            path.replace(aside)
        log.warning("the known peers in %s are damaged (%s); kept as %s, going on without them", path, error, aside)
        return []
    return [
        KnownPeer(
            peer=line.peer,
            name=line.name,
            addresses=line.addresses,
            unseen_for=max(0.0, wall_now - line.last_seen),
            record=line.record,
        )
        for line in lines[:MEMBERS_MAX]
        if is_peer_id(line.peer)
    ]
