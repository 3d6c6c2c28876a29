"""Who this peer is: one Ed25519 key, made once, kept in the home. The `PeerId` is the hash of its public half.

So a name is proven by a key and not granted by anybody: a member can invent new peers but not be another one.
"""

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meshq.errors import StoreError
from meshq.ids import PeerId, peer_id
from meshq.trust import secret_file

FILE_BYTES_MAX: Final = 4_096


@dataclass(frozen=True)
class Identity:
    """This peer's key pair."""

    private_key: Ed25519PrivateKey = field(repr=False)

    @functools.cached_property
    def peer(self) -> PeerId:
        return peer_id(self.private_key.public_key().public_bytes_raw())

    @property
    def pem(self) -> bytes:
        return self.private_key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )


def load_or_create(path: Path) -> Identity:
    """The identity in `path`; a new one at the first start. UsageError if others may read it, StoreError if damaged."""
    try:
        return load(path)
    except FileNotFoundError:
        identity = Identity(Ed25519PrivateKey.generate())
        secret_file.create(path, identity.pem)
        return identity


def load(path: Path) -> Identity:
    """The identity in `path`. FileNotFoundError if there is none; else as `load_or_create`."""
    data = secret_file.read(path, "identity", FILE_BYTES_MAX)
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError):
        raise _damaged(path) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise _damaged(path)
    return Identity(key)


def _damaged(path: Path) -> StoreError:
    return StoreError(
        f"the identity {path} is damaged",
        "restore it from a backup; or move it away, and this machine joins as a new peer",
    )
