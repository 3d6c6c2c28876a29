"""Keys at work: packets and real handshakes between peers whose rings are old, new, or in the middle of a change."""

import asyncio
import functools
import json
import os
import ssl
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec

import pytest

from meshq.errors import MalformedData, StoreError
from meshq.ids import PeerId
from meshq.trust import keyring, keys, ring_file
from meshq.trust.certificates import Credentials, peer_of, server_name
from meshq.trust.keyholder import KeyHolder
from meshq.trust.keyring import Keyring, Offer, ring_of
from meshq.trust.keys import MeshKey
from meshq.trust.seal import Opener, Refusal, key_id
from tests.trust.test_certificates import member
from tests.trust.test_keyring import ADA, BOB, K0, K1, K2, ring

NEW_IN_USE = keyring.use(ring(K0, K1), ADA, K1.id)
OLD, MIXED, NEW = ring_of(K0), ring(K0, K1), keyring.remove(NEW_IN_USE, [K0.id])
ONLY_NEW = ring_of(K1)  # a newcomer's
RINGS = {"old": OLD, "both, old in use": MIXED, "both, new in use": NEW_IN_USE, "new": NEW, "newcomer": ONLY_NEW}

Make = Callable[[Keyring, int], KeyHolder]
Arguments = ParamSpec("Arguments")
LIMIT_SECONDS = 60.0


def in_loop(test: Callable[Arguments, Coroutine[Any, Any, None]]) -> Callable[Arguments, None]:
    """Run an asynchronous test, with a limit."""

    @functools.wraps(test)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        async def limited() -> None:
            async with asyncio.timeout(LIMIT_SECONDS):
                await test(*args, **kwargs)

        asyncio.run(limited())

    return run


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def made(held: Keyring, number: int) -> KeyHolder:
        path = tmp_path / f"{number}-{len(list(tmp_path.iterdir()))}.key"
        ring_file.save(path, held)
        return KeyHolder(path, member(number))

    return made


def install(key: MeshKey) -> Callable[[Keyring], Keyring]:
    return lambda held: keyring.install(held, ADA, key, (ADA, BOB), (), key)[0]


def use(key: MeshKey) -> Callable[[Keyring], Keyring]:
    return lambda held: keyring.use(held, ADA, key.id)


def remove(key: MeshKey) -> Callable[[Keyring], Keyring]:
    return lambda held: keyring.remove(held, [key.id])


def peer_number(number: int) -> PeerId:
    return member(number).peer


# --- UDP ------------------------------------------------------------------------------------------------------------


def refused(holder: KeyHolder) -> dict[Refusal, int]:
    return {reason: count for reason, count in holder.counters.items() if count}


@in_loop
async def test_packets_of_every_key_of_the_ring_open_and_those_of_a_removed_one_do_not(make: Make) -> None:
    old, both, new = make(OLD, 1), make(MIXED, 2), make(NEW, 3)
    assert both.open(old.seal(b"old")) == b"old"
    assert both.open(new.seal(b"new")) == b"new"
    assert new.open(old.seal(b"old")) is None
    assert old.open(new.seal(b"new")) is None
    assert refused(new) == refused(old) == {Refusal.UNKNOWN_KEY: 1}


@in_loop
async def test_from_its_use_on_packets_are_sealed_with_the_new_key_and_until_then_with_the_old(make: Make) -> None:
    holder, only_old, only_new = make(OLD, 1), make(OLD, 2), make(ONLY_NEW, 3)
    await holder.change(install(K1))
    assert only_old.open(holder.seal(b"x")) == b"x"
    await holder.change(use(K1))
    assert only_new.open(holder.seal(b"y")) == b"y"
    assert only_old.open(holder.seal(b"z")) is None


@in_loop
async def test_a_change_of_keys_repeats_no_nonce_and_forgets_no_replay(make: Make) -> None:
    holder, other = make(MIXED, 1), make(MIXED, 2)
    first = other.seal(b"x")
    assert holder.open(first) == b"x"
    packets = [holder.seal(b"same")]
    for key in (K1, K0, K1):
        await holder.change(use(key))
        packets += [holder.seal(b"same") for _ in range(3)]
    assert len({packet[:31] for packet in packets}) == len(packets)
    assert len({packet[31:] for packet in packets}) == len(packets)
    assert holder.open(first) is None
    assert refused(holder) == {Refusal.REPLAYED: 1}


@in_loop
async def test_ones_own_packets_sent_back_are_known_also_after_a_change_of_keys(make: Make) -> None:
    holder = make(MIXED, 1)
    mine = [holder.seal(b"x")]
    await holder.change(use(K1))
    mine.append(holder.seal(b"x"))
    assert [holder.open(packet) for packet in mine] == [None, None]
    assert refused(holder) == {Refusal.REFLECTED: 2}


@in_loop
async def test_a_change_that_leaves_the_key_in_use_goes_on_with_the_same_subkey(make: Make) -> None:
    holder = make(OLD, 1)
    before = holder.seal(b"x")
    await holder.change(install(K1))
    assert holder.seal(b"x")[7:23] == before[7:23]


def test_packets_that_meshq_0_1_sealed_open_for_ever() -> None:
    golden = json.loads((Path(__file__).parent.parent / "golden" / "trust" / "sealed-packets.json").read_text())
    gossip_key = keys.parse(golden["key"]).gossip_key
    opener = Opener({key_id(gossip_key): gossip_key})
    assert [opener.open(bytes.fromhex(packet)) for packet in golden["packets"]] == [
        bytes.fromhex(plaintext) for plaintext in golden["plaintexts"]
    ]


# --- TLS ------------------------------------------------------------------------------------------------------------


@dataclass
class Server:
    """A real TLS server on loopback that answers a line with the same line."""

    context: ssl.SSLContext
    seen: list[PeerId] = field(default_factory=list)
    connections: list[asyncio.StreamWriter] = field(default_factory=list)

    async def __aenter__(self) -> "Server":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.context)
        self.address: tuple[str, int] = self._server.sockets[0].getsockname()[:2]
        return self

    async def __aexit__(self, *_: object) -> None:
        for writer in self.connections:
            writer.transport.abort()
        self._server.close()
        await asyncio.sleep(0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.append(writer)
        with suppress(OSError):
            while line := await reader.readline():
                self.seen.append(peer_of(writer.get_extra_info("ssl_object")))
                writer.write(line)


async def call(context: ssl.SSLContext, address: tuple[str, int], name: str) -> PeerId | None:
    """Who answered, if anybody did."""
    try:
        reader, writer = await asyncio.open_connection(*address, ssl=context, server_hostname=name)
    except ssl.SSLError:
        return None
    try:
        writer.write(b"hello\n")
        answered = await reader.readline() == b"hello\n"
        return peer_of(writer.get_extra_info("ssl_object")) if answered else None
    except OSError:
        return None
    finally:
        writer.transport.abort()
        await asyncio.sleep(0)


async def in_two_tries(context: ssl.SSLContext, server: Server, name: str) -> PeerId | None:
    """As whoever calls does: a connection that broke before an answer is made once more."""
    return await call(context, server.address, name) or await call(context, server.address, name)


def have_a_key_in_common(a: Keyring, b: Keyring) -> bool:
    return bool(set(a.ids_sorted) & set(b.ids_sorted))


@pytest.mark.parametrize("mine", RINGS.values(), ids=[f"client {name}" for name in RINGS])
@pytest.mark.parametrize("theirs", RINGS.values(), ids=[f"server {name}" for name in RINGS])
@in_loop
async def test_two_peers_get_through_to_each_other_if_and_only_if_they_have_a_key_in_common(
    make: Make, mine: Keyring, theirs: Keyring
) -> None:
    client = make(mine, 2)
    async with Server(make(theirs, 1).server_context) as server:
        found = await in_two_tries(client.client_context, server, server_name(peer_number(1)))
    assert found == (peer_number(1) if have_a_key_in_common(mine, theirs) else None)
    assert server.seen == ([peer_number(2)] if have_a_key_in_common(mine, theirs) else [])


@pytest.mark.parametrize("mine", RINGS.values(), ids=[f"client {name}" for name in RINGS])
@pytest.mark.parametrize("theirs", RINGS.values(), ids=[f"server {name}" for name in RINGS])
@in_loop
async def test_the_same_holds_for_a_seed_whose_peer_is_not_known(make: Make, mine: Keyring, theirs: Keyring) -> None:
    async with Server(make(theirs, 1).server_context) as server:
        found = await in_two_tries(make(mine, 2).seed_context, server, "127.0.0.1")
    assert found == (peer_number(1) if have_a_key_in_common(mine, theirs) else None)


@in_loop
async def test_peers_in_the_middle_of_a_change_need_one_try_only(make: Make) -> None:
    for mine in (MIXED, NEW_IN_USE):
        for theirs in (MIXED, NEW_IN_USE):
            async with Server(make(theirs, 1).server_context) as server:
                assert await call(make(mine, 2).client_context, server.address, server_name(peer_number(1)))


@in_loop
async def test_the_contexts_that_were_handed_out_follow_the_keys(make: Make) -> None:
    """Neither the listener nor the client is made anew."""
    ada, bob, old, new = make(OLD, 1), make(OLD, 2), make(OLD, 3), make(ONLY_NEW, 4)
    contexts = [each.client_context for each in (bob, old, new)]
    name = server_name(peer_number(1))
    async with Server(ada.server_context) as server:

        async def getting_through() -> list[bool]:
            return [await in_two_tries(context, server, name) is not None for context in contexts]

        assert await getting_through() == [True, True, False]
        for holder in (ada, bob):
            await holder.change(install(K1))
        assert await getting_through() == [True, True, True]
        for holder in (ada, bob):
            await holder.change(use(K1))
        assert await getting_through() == [True, True, True]
        for holder in (ada, bob):
            await holder.change(remove(K0))
        assert await getting_through() == [True, False, True]


@in_loop
async def test_a_stranger_that_knows_the_new_authority_but_not_its_key_is_refused(make: Make) -> None:
    stranger = Credentials(K0, member(3), [K1]).seed_context()
    async with Server(make(NEW, 1).server_context) as server:
        assert await call(stranger, server.address, "seed") is None
        assert server.seen == []


@in_loop
async def test_meshq_0_1_which_names_no_key_is_answered_with_the_one_in_use(make: Make) -> None:
    plain = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made = Credentials(K0, member(2))
    plain.load_verify_locations(cadata=made._trusted)
    with_key = made.client_context()
    assert plain.check_hostname  # it compares the name itself
    plain.verify_flags |= with_key.verify_flags
    load_chain(plain, made)
    async with Server(make(MIXED, 1).server_context) as server:
        assert await call(plain, server.address, server_name(peer_number(1))) == peer_number(1)


def load_chain(context: ssl.SSLContext, credentials: Credentials) -> None:
    descriptor = os.memfd_create("chain")
    try:
        os.write(descriptor, credentials._chain)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


@in_loop
async def test_an_open_connection_of_a_removed_key_is_no_longer_admitted(make: Make) -> None:
    ada, old, new = make(NEW_IN_USE, 1), make(OLD, 2), make(ONLY_NEW, 3)
    async with Server(ada.server_context) as server:
        writers = []
        for client in (old, new):
            reader, writer = await asyncio.open_connection(
                *server.address, ssl=client.client_context, server_hostname=server_name(peer_number(1))
            )
            writer.write(b"hello\n")
            assert await reader.readline() == b"hello\n"
            writers.append(writer)
        tls = [writer.get_extra_info("ssl_object") for writer in server.connections]
        assert [ada.admits(each) for each in tls] == [True, True]
        await ada.change(remove(K0))
        assert [ada.admits(each) for each in tls] == [False, True]
        for writer in writers:
            writer.transport.abort()


@in_loop
async def test_who_answers_with_an_unknown_key_is_remembered_until_it_does_no_longer(make: Make) -> None:
    away = make(OLD, 2)
    name = server_name(peer_number(1))
    async with Server(make(NEW, 1).server_context) as server:
        assert await call(away.client_context, server.address, name) is None
        assert await call(away.seed_context, server.address, "127.0.0.1") is None
        assert list(away.strangers) == [name, "127.0.0.1"]
    async with Server(make(OLD, 1).server_context) as server:
        assert await call(away.client_context, server.address, name)
    assert list(away.strangers) == ["127.0.0.1"]
    await away.change(install(K1))
    assert list(away.strangers) == []


@in_loop
async def test_who_spoke_an_old_key_when_it_was_called_last_is_called_with_the_one_in_use_once_that_is_removed(
    make: Make,
) -> None:
    client, name = make(NEW_IN_USE, 2), server_name(peer_number(1))
    async with Server(make(OLD, 1).server_context) as server:
        assert await in_two_tries(client.client_context, server, name)
    await client.change(remove(K0))
    async with Server(make(NEW, 1).server_context) as server:
        assert await call(client.client_context, server.address, name)


@in_loop
async def test_the_wrong_peer_of_the_mesh_is_no_stranger_and_is_not_spoken_to(make: Make) -> None:
    client = make(MIXED, 2)
    async with Server(make(MIXED, 3).server_context) as server:
        assert await call(client.client_context, server.address, server_name(peer_number(1))) is None
        assert (server.seen, client.strangers) == ([], ())


@in_loop
async def test_a_client_context_needs_a_name_so_that_none_is_forgotten(make: Make) -> None:
    async with Server(make(MIXED, 1).server_context) as server:
        assert await call(make(MIXED, 2).client_context, server.address, "127.0.0.1") is None
        assert server.seen == []


def test_a_live_context_trusts_nobody_by_itself(make: Make) -> None:
    """So whoever forgets that it chooses another for each connection gets no connection."""
    for context in (make(OLD, 1).client_context, make(OLD, 1).seed_context):
        assert (context.verify_mode, context.check_hostname, context.get_ca_certs()) == (ssl.CERT_REQUIRED, True, [])


# --- changes --------------------------------------------------------------------------------------------------------


@in_loop
async def test_a_change_is_on_disk_before_anybody_hears_of_it(make: Make) -> None:
    holder = make(OLD, 1)
    found: list[Keyring] = []
    holder.on_change = lambda: found.append(ring_file.load(holder._path))
    assert await holder.change(install(K1))
    assert found == [holder.ring]
    assert not await holder.change(lambda held: held)
    assert len(found) == 1


@in_loop
async def test_a_disk_that_refuses_changes_nothing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = make(MIXED, 1)
    heard: list[bool] = []
    holder.on_change = lambda: heard.append(True)

    def refuse(path: Path, held: Keyring) -> None:
        raise StoreError("no space")

    monkeypatch.setattr(ring_file, "save", refuse)
    with pytest.raises(StoreError):
        await holder.change(use(K1))
    assert (holder.ring, holder.text, heard) == (MIXED, K0.text, [])


@in_loop
async def test_an_offer_that_makes_no_sense_changes_nothing(make: Make) -> None:
    holder = make(MIXED, 1)
    evil = Offer(held=(K0.id,), keys=(), removed=tuple(sorted((K0.id, K1.id))), use=MIXED.use)
    with pytest.raises(MalformedData):
        await holder.absorb(evil)
    assert holder.ring == MIXED == ring_file.load(holder._path)


@in_loop
async def test_changes_at_the_same_time_follow_each_other(make: Make) -> None:
    holder = make(OLD, 1)
    added: list[Awaitable[bool]] = [holder.change(install(key)) for key in (K1, K2)]
    await asyncio.gather(*added)
    assert set(holder.ids) == {K0.id, K1.id, K2.id}
    assert ring_file.load(holder._path) == holder.ring


@in_loop
async def test_what_the_holder_says_in_public_holds_no_secret(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    holder = make(OLD, 1)
    caplog.set_level("DEBUG")
    await holder.change(install(K1))
    await holder.change(use(K1))
    await holder.change(remove(K0))
    said = f"{caplog.text} {holder.ids} {holder.digest} {holder.mdns_tags} {holder.mesh_id} {holder!r}"
    assert "is in use now" in caplog.text
    assert not [key for key in (K0, K1) if contains(said, key)]


def contains(text: str, key: MeshKey) -> bool:
    return any(part in text for part in (key.text, key.text[7:20], key.secret.hex(), repr(key.secret), key.gossip_key.hex()))


@in_loop
async def test_mdns_tags_are_those_of_all_keys_the_one_in_use_first(make: Make) -> None:
    assert make(NEW_IN_USE, 1).mdns_tags == (K1.mdns_tag, K0.mdns_tag)
