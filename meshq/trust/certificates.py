"""Mutual TLS between peers, with no certificate server and no dates that matter.

Problem: peers must prove to each other, before the first byte of a request, that they belong to the mesh and which peer
they are.

How: the mesh key gives every peer the same certificate authority; each peer signs its own leaf over its identity key, for
the name `<PeerId>.meshq.internal`. Both sides demand a leaf of this authority (membership), and each leaf's name must be
the hash of its own key (identity). Since every member can sign leaves, the signature alone proves no identity: a member
could put another's name on its own key. `_check_identity` runs inside every handshake and refuses that.

Certificates don't expire and time is not checked: clocks on lab machines lie, and a member could sign a fresh leaf
anyhow. A change of the key is what evicts (`keyring.py`).

While a mesh changes its key there are several authorities, all trusted, and a peer can show a leaf of any of them; but the
other side may know one only. So a client names the key whose leaf it shows, in front of the server's name:
`<key id>.<PeerId>.meshq.internal`. A server that has this key shows its leaf of it. One that hasn't shows a leaf of the key
that it uses itself, from which the client learns which to show to it the next time (`contexts.py`). Since the
name that goes over the wire is therefore not the one in the leaf, `_check_identity` compares it, and not OpenSSL.

Limits: TLS 1.3 only, no session tickets (a resumed session would skip the check), one name a leaf.
Reading: RFC 5280 4.1.2.5 (99991231235959Z), RFC 8410 (Ed25519 in X.509).
"""

import datetime
import functools
import os
import socket
import ssl
import tempfile
from collections.abc import Callable, Sequence
from typing import BinaryIO, Final, Self, TypeVar

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
KEY_ID_CHARS: Final = 8
_UNKNOWN_AUTHORITY: Final = (18, 19, 20, 21)  # OpenSSL's ways to say that it does not know who signed (X509_V_ERR_...)

Context = TypeVar("Context", bound=ssl.SSLContext)


def server_name(peer: PeerId) -> str:
    """What a client passes as `server_hostname` to reach this peer and no other."""
    return f"{peer}.{DOMAIN}"


class Authority:
    """The mesh's certificate authority: the same bytes on every machine that has the mesh key."""

    def __init__(self, key: MeshKey) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(key.authority_seed)
        self._name = _common_name(authority_name(key))
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
    """One peer's place in one mesh, as TLS contexts. Make each context once and share it: loading keys costs a millisecond.

    `key`: what the peer's own leaf is signed with. `others`: keys whose leaves are accepted, too.
    """

    def __init__(self, key: MeshKey, identity: Identity, others: Sequence[MeshKey] = ()) -> None:
        authority = Authority(key)
        leaf = authority.issue(identity.private_key.public_key())
        trusted = [authority, *(Authority(other) for other in others if other != key)]
        self._key_id = key.id
        self._trusted = "".join(each.certificate.public_bytes(Encoding.PEM).decode("ascii") for each in trusted)
        self._chain = identity.pem + leaf.public_bytes(Encoding.PEM)

    def server_context(self) -> ssl.SSLContext:
        """For the peer port: answers members only."""
        context = self._prepare(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
        context.num_tickets = 0
        return context

    def client_context(self) -> "ClientContext":
        """For calls to a known peer: pass `server_hostname=server_name(peer)`, and only that peer is spoken to."""
        return self._prepare(ClientContext(self._key_id, named=True))

    def seed_context(self) -> "ClientContext":
        """For calls to an address whose peer is not known yet: any member is spoken to; `peer_of` tells which it was."""
        return self._prepare(ClientContext(self._key_id, named=False))

    def _prepare(self, context: Context) -> Context:
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


class ClientContext(ssl.SSLContext):
    """For the side that calls: names its key to the other side, and checks who that is. Only `Credentials` makes one."""

    def __new__(cls, key_id: str, *, named: bool) -> Self:
        return super().__new__(cls, ssl.PROTOCOL_TLS_CLIENT)

    def __init__(self, key_id: str, *, named: bool) -> None:
        """`named`: only the peer is spoken to whose name was given; else any member."""
        self.check_hostname = False  # the name on the wire is not the leaf's: `_check_identity` compares
        self.key_id = key_id
        self.named = named
        self.on_handshake: Callable[[str, str | None], None] = lambda name, authority: None
        """Told, after each handshake, of the name that was called and of the authority (`authority_of`) that the other side's
        leaf is of; None if it is unknown here, so that the handshake failed."""

    def wrap_bio(
        self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, server_side: bool = False,
        server_hostname: str | bytes | None = None, session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:  # fmt: skip
        """What asyncio and aiohttp call."""
        name = _text(server_hostname)
        wrapped = super().wrap_bio(incoming, outgoing, server_side, self._name_on_the_wire(name), session)
        assert isinstance(wrapped, _CheckedObject)
        wrapped.called = name
        return wrapped

    def wrap_socket(
        self, sock: socket.socket, server_side: bool = False, do_handshake_on_connect: bool = True,
        suppress_ragged_eofs: bool = True, server_hostname: str | bytes | None = None, session: ssl.SSLSession | None = None,
    ) -> ssl.SSLSocket:  # fmt: skip
        """What blocking code calls."""
        name = self._name_on_the_wire(_text(server_hostname))
        return super().wrap_socket(sock, server_side, do_handshake_on_connect, suppress_ragged_eofs, name, session)

    def _name_on_the_wire(self, name: str) -> str:
        """Of a seed all that is known may be an address, for which TLS has no place."""
        return f"{self.key_id}.{name if name.endswith(f'.{DOMAIN}') else f'seed.{DOMAIN}'}"


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


def key_named(name: str | None) -> str:
    """The id of the key that a client named, from what it sent as the server's name; empty if it named none."""
    label, _, rest = (name or "").partition(".")
    return label if rest.endswith(DOMAIN) and len(label) == KEY_ID_CHARS else ""


def authority_of(connection: ssl.SSLObject | ssl.SSLSocket) -> str:
    """Of a finished handshake: the common name of the authority that signed the other side's leaf (`authority_name`)."""
    der = connection.getpeercert(binary_form=True)
    return "" if der is None else _authority_of_leaf(der)


def authority_name(key: MeshKey) -> str:
    """What the authority of this key calls itself. OpenSSL looks an authority up by it, so no other key can sign under it."""
    return f"meshq {key.mesh_id}"


@functools.lru_cache(maxsize=MEMBERS_MAX)
def _authority_of_leaf(der: bytes) -> str:
    names = x509.load_der_x509_certificate(der).issuer.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else ""


def _check_identity(connection: "_CheckedObject | _CheckedSocket") -> None:
    """After a handshake that proved membership: is the other side who it says, and whom we called?"""
    try:
        peer = peer_of(connection)
    except PeerError as error:
        raise ssl.SSLCertVerificationError(1, error.message) from None  # what asyncio and aiohttp expect of a handshake
    context = connection.context
    if isinstance(context, ClientContext) and context.named:
        wanted = (connection.server_hostname or "").removeprefix(f"{context.key_id}.")
        if wanted != server_name(peer):
            raise ssl.SSLCertVerificationError(1, "Hostname mismatch: the peer that answers is not the one that was called")


class _CheckedObject(ssl.SSLObject):
    """What asyncio and aiohttp use."""

    called: str = ""

    def do_handshake(self) -> None:
        try:
            super().do_handshake()
        except ssl.SSLCertVerificationError as error:
            if isinstance(self.context, ClientContext) and error.verify_code in _UNKNOWN_AUTHORITY:
                self.context.on_handshake(self.called, None)
            raise
        _check_identity(self)
        if isinstance(self.context, ClientContext):
            self.context.on_handshake(self.called, authority_of(self))


class _CheckedSocket(ssl.SSLSocket):
    """What blocking code uses: no way of making a connection may skip the check."""

    def do_handshake(self, block: bool = False) -> None:
        super().do_handshake(block)
        _check_identity(self)


def _text(name: str | bytes | None) -> str:
    return name.decode("ascii", "replace") if isinstance(name, bytes) else name or ""


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
