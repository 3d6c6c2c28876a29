"""TLS between peers, over real sockets: who gets through a handshake, and who the other side then is."""

import asyncio
import contextlib
import datetime
import os
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from meshq.errors import PeerError, StoreError, UsageError
from meshq.trust import identity
from meshq.trust.certificates import Authority, Credentials, peer_of, server_name
from meshq.trust.identity import Identity
from meshq.trust.keys import MeshKey

KEY = MeshKey(bytes(range(16)))
OTHER_MESH = MeshKey(bytes(range(1, 17)))


def member(number: int) -> Identity:
    return Identity(Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32))


SERVER, CLIENT, THIRD = member(1), member(2), member(3)


def context_with(leaf: x509.Certificate, key: Identity, *, server: bool) -> ssl.SSLContext:
    """A context of the mesh KEY that shows another leaf than it should: what a malicious member can make."""
    credentials = Credentials(KEY, key)
    credentials._chain = key.pem + leaf.public_bytes(Encoding.PEM)
    return credentials.server_context() if server else credentials.client_context()


def leaf_of(
    key: Identity, name: str, before: int = 2020, after: int = 9999, authority: Authority | None = None
) -> x509.Certificate:
    """A leaf over this key, signed by the mesh, for any name and dates."""
    issuer = authority or Authority(KEY)
    honest = issuer.issue(key.private_key.public_key())
    builder = (
        x509.CertificateBuilder(honest.issuer, honest.subject, honest.public_key(), honest.serial_number)
        .not_valid_before(datetime.datetime(before, 1, 1, tzinfo=datetime.UTC))
        .not_valid_after(datetime.datetime(after, 1, 1, tzinfo=datetime.UTC))
    )
    for extension in honest.extensions:
        san = isinstance(extension.value, x509.SubjectAlternativeName)
        value = x509.SubjectAlternativeName([x509.DNSName(name)]) if san else extension.value
        builder = builder.add_extension(value, extension.critical)
    return builder.sign(issuer._key, None)


@contextlib.contextmanager
def echo(context: ssl.SSLContext) -> Iterator[tuple[tuple[str, int], list[str]]]:
    """A TLS server for one connection: its address, and what it saw of the connection: the peer and "request", or an error."""
    outcome: list[str] = []
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(10)

    def serve() -> None:
        connection, _ = listener.accept()
        connection.settimeout(10)
        with connection:
            try:
                with context.wrap_socket(connection, server_side=True) as tls:
                    outcome.append(peer_of(tls))
                    if request := tls.recv(100):
                        outcome.append("request")
                        tls.sendall(request)
            except OSError as error:  # ssl.SSLError is one
                outcome.append(type(error).__name__)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener.getsockname(), outcome
    finally:
        thread.join()
        listener.close()


def call(context: ssl.SSLContext, address: tuple[str, int], name: str | None) -> str:
    """Say hello over TLS; the peer that answered."""
    with (
        socket.create_connection(address, timeout=10) as connection,
        context.wrap_socket(connection, server_hostname=name) as tls,
    ):
        tls.sendall(b"hello")
        if tls.recv(100) != b"hello":  # TLS 1.3: a refusal of our certificate arrives only now
            raise ConnectionError("the server closed")
        assert tls.version() == "TLSv1.3"
        return peer_of(tls)


def test_two_members_know_each_other_after_the_handshake() -> None:
    with echo(Credentials(KEY, SERVER).server_context()) as (address, outcome):
        assert call(Credentials(KEY, CLIENT).client_context(), address, server_name(SERVER.peer)) == SERVER.peer
    assert outcome == [CLIENT.peer, "request"]


def test_a_seed_tells_who_it_is() -> None:
    with echo(Credentials(KEY, SERVER).server_context()) as (address, outcome):
        assert call(Credentials(KEY, CLIENT).seed_context(), address, None) == SERVER.peer
    assert outcome == [CLIENT.peer, "request"]


def test_a_member_of_another_mesh_reaches_no_request() -> None:
    with echo(Credentials(KEY, SERVER).server_context()) as (address, outcome), pytest.raises(ssl.SSLCertVerificationError):
        call(Credentials(OTHER_MESH, CLIENT).client_context(), address, server_name(SERVER.peer))
    assert "request" not in outcome


def test_a_server_refuses_the_certificate_of_another_mesh() -> None:
    stranger = Credentials(OTHER_MESH, CLIENT).seed_context()
    stranger.load_verify_locations(cadata=Credentials(KEY, SERVER)._trusted)  # it knows our authority: all but the key is right
    with echo(Credentials(KEY, SERVER).server_context()) as (address, outcome), pytest.raises(OSError):
        call(stranger, address, None)
    assert outcome == ["SSLCertVerificationError"]


def test_a_client_without_a_certificate_is_refused() -> None:
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.load_verify_locations(cadata=Credentials(KEY, SERVER)._trusted)
    with echo(Credentials(KEY, SERVER).server_context()) as (address, outcome), pytest.raises(OSError):
        call(bare, address, server_name(SERVER.peer))
    assert outcome == ["SSLError"]


def test_a_client_refuses_the_wrong_peer_at_the_right_address() -> None:
    context = Credentials(KEY, CLIENT).client_context()
    with (
        echo(Credentials(KEY, THIRD).server_context()) as (address, outcome),
        pytest.raises(ssl.SSLError, match="Hostname mis"),
    ):
        call(context, address, server_name(SERVER.peer))
    assert "request" not in outcome


@pytest.mark.parametrize("name", [server_name(SERVER.peer), "*.meshq.internal"], ids=["name of another", "wildcard"])
def test_a_member_that_signs_itself_another_name_is_refused_as_server(name: str) -> None:
    thief = context_with(leaf_of(THIRD, name), THIRD, server=True)
    with echo(thief) as (address, outcome), pytest.raises(ssl.SSLCertVerificationError, match="another name than its key"):
        call(Credentials(KEY, CLIENT).client_context(), address, server_name(SERVER.peer))
    assert "request" not in outcome


def test_asyncio_refuses_such_a_server_before_it_sends_anything() -> None:
    async def call_by_asyncio(address: tuple[str, int]) -> None:
        context = Credentials(KEY, CLIENT).client_context()
        _, writer = await asyncio.open_connection(*address, ssl=context, server_hostname=server_name(SERVER.peer))
        writer.write(b"hello")

    thief = context_with(leaf_of(THIRD, server_name(SERVER.peer)), THIRD, server=True)
    with echo(thief) as (address, outcome), pytest.raises(ssl.SSLCertVerificationError, match="another name than its key"):
        asyncio.run(call_by_asyncio(address))
    assert CLIENT.peer not in outcome and "request" not in outcome  # not even our certificate was shown


def test_a_member_that_signs_itself_another_name_is_refused_as_client() -> None:
    thief = context_with(leaf_of(THIRD, server_name(CLIENT.peer)), THIRD, server=False)
    with echo(Credentials(KEY, SERVER).server_context()) as (address, outcome), pytest.raises(OSError):
        call(thief, address, server_name(SERVER.peer))
    assert outcome == ["SSLCertVerificationError"]


@pytest.mark.parametrize(("before", "after"), [(2020, 2021), (9998, 9999)], ids=["expired", "not yet valid"])
def test_a_wrong_clock_locks_nobody_out(before: int, after: int) -> None:
    context = context_with(leaf_of(CLIENT, server_name(CLIENT.peer), before, after), CLIENT, server=False)
    with echo(Credentials(KEY, SERVER).server_context()) as (address, outcome):
        call(context, address, server_name(SERVER.peer))
    assert outcome == [CLIENT.peer, "request"]


def test_tls_1_2_is_refused_even_from_a_member() -> None:
    old = Credentials(KEY, CLIENT).client_context()
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_2
    with echo(Credentials(KEY, SERVER).server_context()) as (address, outcome), pytest.raises(ssl.SSLError, match="VERSION"):
        call(old, address, server_name(SERVER.peer))
    assert outcome == ["SSLError"]


def test_a_client_refuses_a_server_that_knows_only_tls_1_2() -> None:
    old = Credentials(KEY, SERVER).server_context()
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_2
    with echo(old) as (address, outcome), pytest.raises(ssl.SSLError, match="VERSION"):
        call(Credentials(KEY, CLIENT).client_context(), address, server_name(SERVER.peer))
    assert "request" not in outcome


def test_a_server_hands_out_no_tickets_since_a_resumed_session_would_skip_the_check() -> None:
    with echo(Credentials(KEY, SERVER).server_context()) as (address, _):
        context = Credentials(KEY, CLIENT).client_context()
        with (
            socket.create_connection(address, timeout=10) as connection,
            context.wrap_socket(connection, server_hostname=server_name(SERVER.peer)) as tls,
        ):
            tls.sendall(b"hello")
            tls.recv(100)
            assert tls.session is None or not tls.session.has_ticket


def test_two_processes_make_the_same_authority_byte_for_byte() -> None:
    code = (
        "import sys; from meshq.trust.keys import MeshKey; from meshq.trust.certificates import Authority\n"
        "from cryptography.hazmat.primitives.serialization import Encoding\n"
        "print(Authority(MeshKey(bytes(range(16)))).certificate.public_bytes(Encoding.DER).hex())"
    )
    environments = [os.environ | {"PYTHONHASHSEED": seed} for seed in ("1", "2")]
    printed = [
        subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout.strip()
        for env in environments
    ]
    assert printed[0] == printed[1] == Authority(KEY).certificate.public_bytes(Encoding.DER).hex()


def test_a_leaf_is_the_same_each_time_and_another_for_each_peer() -> None:
    leaves = [Authority(KEY).issue(each.private_key.public_key()) for each in (SERVER, SERVER, CLIENT)]
    assert leaves[0] == leaves[1] != leaves[2]
    assert len({leaf.serial_number for leaf in leaves}) == 2


def test_no_certificate_holds_the_name_of_a_machine_or_a_user() -> None:
    leaf = Authority(KEY).issue(SERVER.private_key.public_key())
    assert [leaf.subject.rfc4514_string(), leaf.issuer.rfc4514_string()] == [f"CN={SERVER.peer}", f"CN=meshq {KEY.mesh_id}"]


def test_contexts_work_where_memfd_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delattr(os, "memfd_create")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with echo(Credentials(KEY, SERVER).server_context()) as (address, outcome):
        call(Credentials(KEY, CLIENT).client_context(), address, server_name(SERVER.peer))
    assert outcome == [CLIENT.peer, "request"]
    assert list(tmp_path.iterdir()) == []


def test_peer_of_needs_a_certificate() -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname="x")
    with pytest.raises((PeerError, ValueError)):
        peer_of(tls)


# --- the identity file ----------------------------------------------------------------------------------------------


def test_an_identity_is_made_once_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    first = identity.load_or_create(path)
    assert identity.load_or_create(path).peer == first.peer
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(first.peer) == 52


def test_an_identity_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    identity.load_or_create(path)
    path.chmod(0o644)
    with pytest.raises(UsageError, match="0644"):
        identity.load_or_create(path)


@pytest.mark.parametrize("content", [b"", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_a_damaged_identity_is_never_replaced_silently(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "identity.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(StoreError, match="damaged") as caught:
        identity.load_or_create(path)
    assert path.read_bytes() == content and caught.value.hint


def test_an_identity_shows_nothing_of_its_key_in_logs() -> None:
    assert repr(SERVER) == "Identity()"
