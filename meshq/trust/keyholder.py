"""The keys of this peer at work: it seals and opens packets with them, and shakes hands, whichever they are at the moment.

A change of the ring is on disk before anything follows from it. Then it takes effect at once, without a listener or a client
being made anew: packets are sealed under a fresh subkey of the key in use, and the TLS contexts that were handed out hand out
others (`contexts.py`). Connections of a key that was removed stay open until whoever keeps them asks `admits`.
"""

import asyncio
import logging
import os
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path

from meshq.ids import PeerId
from meshq.trust import keyring, ring_file
from meshq.trust.contexts import Contexts, LiveContext
from meshq.trust.identity import Identity
from meshq.trust.keyring import Keyring, Offer
from meshq.trust.seal import SUBKEY_ID_BYTES, Opener, Refusal, Sealer, key_id

log = logging.getLogger("meshq.trust")


class KeyHolder:
    """One for an agent. UsageError or StoreError if the key file cannot be used.

    `on_change` is called after each change has taken effect.
    """

    def __init__(self, path: Path, identity: Identity) -> None:
        self._path = path
        self._changing = asyncio.Lock()
        self._contexts = Contexts(identity)
        self._opener = Opener({})
        self.on_change: Callable[[], None] = lambda: None
        ring = ring_file.load(path)
        self._sealer = _sealer(ring)
        self._take(ring)

    # -- what is so now

    @property
    def ring(self) -> Keyring:
        return self._ring

    @property
    def mesh_id(self) -> str:
        """What the mesh is called, whichever key it uses."""
        return self._ring.use.mesh

    @property
    def text(self) -> str:
        """The key in use, for the other machines. Secret."""
        return self._ring.current.key.text

    @property
    def ids(self) -> tuple[str, ...]:
        """Of all keys, the one in use first. Public."""
        return tuple(each.id for each in self._ring.ordered)

    @property
    def digest(self) -> str:
        """Equal in two peers if and only if their rings are. Public."""
        return self._digest

    @property
    def mdns_tags(self) -> tuple[str, ...]:
        """By which members know each other's announcements; that of the key in use first."""
        return tuple(each.key.mdns_tag for each in self._ring.ordered)

    # -- what it does for others

    def seal(self, plaintext: bytes) -> bytes:
        return self._sealer.seal(plaintext)

    def open(self, packet: bytes) -> bytes | None:
        return self._opener.open(packet)

    @property
    def counters(self) -> Mapping[Refusal, int]:
        """Packets that did not open, by reason."""
        return self._opener.counters

    @property
    def server_context(self) -> LiveContext:
        """For the peer port. Like the other two it stays right when the keys change."""
        return self._contexts.server

    @property
    def client_context(self) -> LiveContext:
        """For calls to a peer by its name (`certificates.server_name`)."""
        return self._contexts.client

    @property
    def seed_context(self) -> LiveContext:
        """For calls to an address at which any member may answer."""
        return self._contexts.seed

    def admits(self, connection: ssl.SSLObject) -> bool:
        """Whether this open connection is of a key that still counts."""
        return self._contexts.admits(connection)

    @property
    def strangers(self) -> tuple[str, ...]:
        """Names (`certificates.server_name`) and addresses that were called and answered with a key that is unknown here."""
        return self._contexts.strangers

    # -- changes

    def proven_by(self, connection: ssl.SSLObject | None) -> str:
        """The id of the key that the other side of this connection has shown to have; empty if it has shown none of ours."""
        return "" if connection is None else self._contexts.key_of(connection)

    def offer(self, peer: PeerId, proven: str = "") -> Offer:
        """What this peer, who has shown to have the key of this id, may know of the ring."""
        return keyring.offer(self._ring, peer, (proven,))

    async def absorb(self, offer: Offer) -> bool:
        """Take over what another peer told; whether it was news. MalformedData: nothing has changed."""
        return await self.change(lambda ring: keyring.absorb(ring, offer))

    async def change(self, make: Callable[[Keyring], Keyring]) -> bool:
        """Replace the ring by what `make` makes of it; whether that is another one. If it raises, or the disk refuses with
        StoreError, nothing has changed."""
        async with self._changing:
            ring = make(self._ring)
            if ring == self._ring:
                return False
            await asyncio.to_thread(ring_file.save, self._path, ring)
            _tell(self._ring, ring)
            if ring.current.id != self._ring.current.id:
                self._sealer = _sealer(ring)
            self._take(ring)
        self.on_change()
        return True

    def _take(self, ring: Keyring) -> None:
        self._ring = ring
        self._digest = ring.digest  # a quarter of a millisecond for a thousand holders, and asked for each peer each second
        gossip_keys = [each.key.gossip_key for each in ring.keys]
        self._opener.accept({key_id(key): key for key in gossip_keys}, self._sealer.subkey_id)
        self._contexts.change(ring)


def _sealer(ring: Keyring) -> Sealer:
    return Sealer(ring.current.key.gossip_key, os.urandom(SUBKEY_ID_BYTES))


def _tell(before: Keyring, after: Keyring) -> None:
    was, now = set(before.ids_sorted), set(after.ids_sorted)
    for key in sorted(was ^ now):
        log.warning("the key %s was %s", key, "installed" if key in now else "removed")
    if before.current.id != after.current.id:
        log.warning("the key %s is in use now, no longer %s", after.current.id, before.current.id)
    if before.use.mesh != after.use.mesh:
        log.info("this is mesh %s", after.use.mesh)
