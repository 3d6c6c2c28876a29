"""The mesh key: 128 random bits. Who has it is a member, and a member can run code on every machine of the mesh.

Everything that the mesh shares comes from it by HKDF-SHA256 under distinct labels, so it is byte-identical everywhere
and no server hands it out. One derived value says nothing about another or about the key.

People copy it as text: `meshq1-` and 30 Crockford base32 characters (26 of key, 4 of checksum) in groups of six. Case,
hyphens and spaces don't matter, `o` reads as 0, `i` and `l` as 1. The checksum is a Reed-Solomon code over GF(32): *any*
four wrong characters are noticed for certain, so every slip of a finger and every swapped pair is, and no mistyped
key founds a second mesh. Only this form is accepted: a passphrase would fall offline to one captured packet.
"""

import functools
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from meshq.errors import UsageError
from meshq.ids import base32
from meshq.trust import secret_file
from meshq.trust.seal import key_id

SECRET_BYTES: Final = 16
PREFIX: Final = "meshq1"
ALPHABET: Final = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's: no i, l, o, u
SECRET_CHARS: Final = 26  # 130 bits; the two on top are zero
CHECK_CHARS: Final = 4
KEY_CHARS: Final = SECRET_CHARS + CHECK_CHARS  # 30 <= 31: the longest a Reed-Solomon code over GF(32) may be
GROUP_CHARS: Final = 6
FILE_BYTES_MAX: Final = 4_096

_IGNORED: Final = {ord(char): None for char in " \t\r\n-\u00a0\u2010\u2011\u2012\u2013\u2014"}  # what pasting makes of hyphens
_READ_AS: Final = str.maketrans("oil", "011")
HINT: Final = "run `meshq key` on a machine of the mesh and copy its whole line; a new mesh makes its own key"


@dataclass(frozen=True, slots=True)
class MeshKey:
    """One mesh's secret, and what is derived from it. Its `repr` shows nothing, so that no log can."""

    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        assert len(self.secret) == SECRET_BYTES

    @property
    def text(self) -> str:
        """The form for people: `parse` gives the key back."""
        number = int.from_bytes(self.secret, "big")
        symbols = [number >> 5 * place & 31 for place in reversed(range(SECRET_CHARS))]
        chars = "".join(ALPHABET[symbol] for symbol in symbols + _checksum(symbols))
        return "-".join([PREFIX, *(chars[at : at + GROUP_CHARS] for at in range(0, KEY_CHARS, GROUP_CHARS))])

    @property
    def gossip_key(self) -> bytes:
        """32 bytes: seals UDP packets (`seal.py`)."""
        return self._derive("gossip", 32)

    @property
    def authority_seed(self) -> bytes:
        """32 bytes: the Ed25519 private key of the membership CA (`certificates.py`)."""
        return self._derive("authority", 32)

    @property
    def mesh_id(self) -> str:
        """16 base32 characters that name the mesh which this key founds. Public: they stand in `status` and in certificates.

        A mesh keeps the name of its first key when it changes its key (`keyring.py`).
        """
        return base32(self._derive("mesh id", 10))

    @property
    def id(self) -> str:
        """8 hex digits that tell keys apart, for people and on the wire. Public: they stand in every sealed packet."""
        return key_id(self.gossip_key).hex()

    @property
    def mdns_tag(self) -> str:
        """16 hex digits by which members know each other's mDNS announcements; to others they are noise."""
        return self._derive("mdns tag", 8).hex()

    def _derive(self, label: str, length: int) -> bytes:
        return HKDF(SHA256(), length, salt=None, info=b"meshq/v1/" + label.encode()).derive(self.secret)


def generate() -> MeshKey:
    """A new mesh's key, from the operating system's randomness."""
    return MeshKey(secrets.token_bytes(SECRET_BYTES))


def parse(text: str) -> MeshKey:
    """The key that was typed or pasted. UsageError says what is wrong with it, and never repeats it."""
    chars = text.translate(_IGNORED).lower().translate(_READ_AS)
    if not chars:
        raise UsageError("the mesh key is empty", HINT)
    if not chars.startswith(PREFIX):
        if chars.startswith(PREFIX[:-1]) and chars[5:6].isdigit():
            raise UsageError("this mesh key was made by a newer meshq", "upgrade meshq on this machine")
        raise UsageError(f"this is no mesh key: one begins with {PREFIX}-; a passphrase is not accepted", HINT)
    chars = chars.removeprefix(PREFIX)
    for place, char in enumerate(chars, start=1):
        if char not in ALPHABET:
            raise UsageError(f"the mesh key is mistyped: character {place} after {PREFIX}- can't stand in a key", HINT)
    if len(chars) != KEY_CHARS:
        raise UsageError(f"the mesh key has {len(chars)} characters after {PREFIX}-, not {KEY_CHARS}", HINT)
    symbols = [ALPHABET.index(char) for char in chars]
    number = functools.reduce(lambda sum_, symbol: sum_ << 5 | symbol, symbols[:SECRET_CHARS], 0)
    if symbols[SECRET_CHARS:] != _checksum(symbols[:SECRET_CHARS]) or number >= 1 << 8 * SECRET_BYTES:
        raise UsageError("the mesh key is mistyped: its checksum does not fit", HINT)
    return MeshKey(number.to_bytes(SECRET_BYTES, "big"))


def write(path: Path, key: MeshKey) -> None:
    """Store the key for its owner only. FileExistsError if there is one: it is left as it is."""
    secret_file.create(path, f"{key.text}\n".encode())


def read(path: Path) -> MeshKey:
    """The key in a file. FileNotFoundError if there is none; UsageError if it is wrong or others may read it."""
    data = secret_file.read(path, "key file", FILE_BYTES_MAX)
    try:
        return parse(data.decode("utf-8"))
    except UnicodeDecodeError:
        raise UsageError(f"the key file {path} holds no text", HINT) from None
    except UsageError as error:
        raise UsageError(f"key file {path}: {error.message}", error.hint) from None


def _powers_of_two() -> tuple[list[int], list[int]]:
    """Powers and logarithms to the base x in GF(32) = GF(2)[x] / (x^5 + x^2 + 1)."""
    powers, logs = [1], [0] * 32
    for exponent in range(1, 31):
        doubled = powers[-1] << 1
        powers.append(doubled ^ 0b100101 if doubled & 32 else doubled)
        logs[powers[-1]] = exponent
    return powers, logs


_POWERS, _LOGS = _powers_of_two()


def _times(a: int, b: int) -> int:
    return _POWERS[(_LOGS[a] + _LOGS[b]) % 31] if a and b else 0


def _generator() -> list[int]:
    """The coefficients below the leading one of (z - x^0)(z - x^1)(z - x^2)(z - x^3), highest first."""
    polynomial = [1]
    for root in _POWERS[:CHECK_CHARS]:
        shifted, scaled = [*polynomial, 0], [0, *(_times(root, term) for term in polynomial)]
        polynomial = [a ^ b for a, b in zip(shifted, scaled, strict=True)]
    return polynomial[1:]


_GENERATOR = _generator()


def _checksum(symbols: list[int]) -> list[int]:
    """The remainder of the message divided by the generator: four symbols (Reed-Solomon, systematic encoding)."""
    remainder = [0] * CHECK_CHARS
    for symbol in symbols:
        factor = symbol ^ remainder[0]
        remainder = [a ^ _times(factor, b) for a, b in zip([*remainder[1:], 0], _GENERATOR, strict=True)]
    return remainder
