"""Mutual TLS between peers, with no certificate server and no dates that matter.

Problem: peers must prove to each other, before the first byte of a request, that they belong to the mesh and which peer
they are.

How: the mesh key gives every peer the same certificate authority; each peer signs its own leaf over its identity key, for
the name `<PeerId>.meshq.internal`. Both sides demand a leaf of this authority (membership), and each leaf's name must be
the hash of its own key (identity). Since every member can sign leaves, the signature alone proves no identity: a member
could put another's name on its own key. `_check_identity` runs inside every handshake and refuses that.

Certificates don't expire and time is not checked: clocks on lab machines lie, and a member could sign a fresh leaf
anyhow. A key epoch, not a date, will be what evicts (design section 8).

Limits: TLS 1.3 only, no session tickets (a resumed session would skip the check), one name a leaf.
Reading: RFC 5280 4.1.2.5 (99991231235959Z), RFC 8410 (Ed25519 in X.509).
"""

import datetime
import functools
import os
import ssl
import tempfile
from typing import BinaryIO, Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from meshq.config import MEMBERS_MAX
from meshq.errors import PeerError
from meshq.ids import PeerId, peer_id
from meshq.trust.identity import Identity
from meshq.trust.keys import MeshKey

DOMAIN: Final = "meshq.internal"  # .internal is reserved for private use and never resolves on the internet
NOT_BEFORE: Final = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
NOT_AFTER: Final = datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC)
X509_V_FLAG_NO_CHECK_TIME: Final = 0x200000  # OpenSSL's; the ssl module has no name for it


def server_name(peer: PeerId) -> str:
    """What a client passes as `server_hostname` to reach this peer and no other."""
    return f"{peer}.{DOMAIN}"


class Authority:
    """The mesh's certificate authority: the same bytes on every machine that has the mesh key."""

    def __init__(self, key: MeshKey) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(key.authority_seed)
        self._name = _common_name(f"meshq {key.mesh_id}")
        self.certificate = self._sign_itself()

    def issue(self, public_key: Ed25519PublicKey) -> x509.Certificate:
        """The leaf of the peer that owns this key; the same bytes each time."""
        peer = peer_id(public_key.public_bytes_raw())
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        return (
            self._builder(public_key, _common_name(peer))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(authority=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(server_name(peer))]), critical=False)
            .sign(self._key, None)
        )

    def _sign_itself(self) -> x509.Certificate:
        return (
            self._builder(self._key.public_key(), self._name)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(authority=True), critical=True)
            .sign(self._key, None)
        )

    def _builder(self, public_key: Ed25519PublicKey, subject: x509.Name) -> x509.CertificateBuilder:
        """What both kinds have; VERIFY_X509_STRICT insists on the two key identifiers."""
        subject_id = x509.SubjectKeyIdentifier.from_public_key(public_key)
        return (
            x509.CertificateBuilder(issuer_name=self._name, subject_name=subject, public_key=public_key)
            .serial_number(int.from_bytes(subject_id.digest[:16], "big") | 1)  # derived: no randomness in the bytes
            .not_valid_before(NOT_BEFORE)
            .not_valid_after(NOT_AFTER)
            .add_extension(subject_id, critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )


class Credentials:
    """One peer's place in one mesh, as TLS contexts. Make each context once and share it: loading keys costs a millisecond."""

    def __init__(self, key: MeshKey, identity: Identity) -> None:
        authority = Authority(key)
        leaf = authority.issue(identity.private_key.public_key())
        self._trusted = authority.certificate.public_bytes(Encoding.PEM).decode("ascii")
        self._chain = identity.pem + leaf.public_bytes(Encoding.PEM)

    def server_context(self) -> ssl.SSLContext:
        """For the peer port: answers members only."""
        context = self._context(ssl.PROTOCOL_TLS_SERVER)
        context.num_tickets = 0
        return context

    def client_context(self) -> ssl.SSLContext:
        """For calls to a known peer: pass `server_hostname=server_name(peer)`, and only that peer is spoken to."""
        return self._context(ssl.PROTOCOL_TLS_CLIENT)

    def seed_context(self) -> ssl.SSLContext:
        """For calls to an address whose peer is not known yet: any member is spoken to; `peer_of` tells which it was."""
        context = self._context(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        return context

    def _context(self, protocol: int) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
        context.load_verify_locations(cadata=self._trusted)
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_STRICT | ssl.VerifyFlags(X509_V_FLAG_NO_CHECK_TIME)
        context.set_alpn_protocols(["http/1.1"])
        context.sslobject_class = _CheckedObject
        context.sslsocket_class = _CheckedSocket
        with _anonymous_file() as file:
            file.write(self._chain)
            file.flush()
            context.load_cert_chain(f"/proc/self/fd/{file.fileno()}")
        return context


def peer_of(connection: ssl.SSLObject | ssl.SSLSocket) -> PeerId:
    """The peer at the other end of a finished handshake. PeerError if its name is not the hash of its key."""
    der = connection.getpeercert(binary_form=True)
    if der is None:
        raise PeerError("the peer showed no certificate")
    return _peer_of_leaf(der)


@functools.lru_cache(maxsize=MEMBERS_MAX)
def _peer_of_leaf(der: bytes) -> PeerId:
    try:
        leaf = x509.load_der_x509_certificate(der)
        key = leaf.public_key()
        names = list(leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except (ValueError, TypeError, x509.ExtensionNotFound, x509.DuplicateExtension) as error:
        raise PeerError(f"the peer's certificate is malformed: {error}") from None
    if not isinstance(key, Ed25519PublicKey):
        raise PeerError("the peer's certificate has no Ed25519 key")
    peer = peer_id(key.public_bytes_raw())
    if names != [x509.DNSName(server_name(peer))]:
        raise PeerError("the peer's certificate bears another name than its key")
    return peer


def _check_identity(connection: ssl.SSLObject | ssl.SSLSocket) -> None:
    try:
        peer_of(connection)
    except PeerError as error:
        raise ssl.SSLCertVerificationError(1, error.message) from None  # what asyncio and aiohttp expect of a handshake


class _CheckedObject(ssl.SSLObject):
    """What asyncio and aiohttp use."""

    def do_handshake(self) -> None:
        super().do_handshake()
        _check_identity(self)


class _CheckedSocket(ssl.SSLSocket):
    """What blocking code uses: no way of making a connection may skip the check."""

    def do_handshake(self, block: bool = False) -> None:
        super().do_handshake(block)
        _check_identity(self)


def _anonymous_file() -> BinaryIO:
    """A file without a name, since OpenSSL reads keys from files only: in memory, else on disk, 0600 and unlinked at once."""
    try:
        return os.fdopen(os.memfd_create("meshq-identity", os.MFD_CLOEXEC), "w+b")
    except (AttributeError, OSError):
        return tempfile.TemporaryFile()


def _common_name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority, key_cert_sign=authority, crl_sign=authority, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
