"""Finding others by mDNS: real zeroconf between real instances on loopback."""

import asyncio
import ipaddress
import socket
import struct
import time
from collections.abc import Callable, Coroutine, Sequence

import pytest
from zeroconf.asyncio import AsyncServiceInfo

from meshq.config import ADDRESSES_MAX
from meshq.gossip import discovery as module
from meshq.gossip.addresses import Interface
from meshq.gossip.discovery import OTHERS_MAX, SERVICE, TRIES_AT_ONCE, Announcement, Discovery, SeenMesh, look_around
from meshq.gossip.member import Address

LIMIT = 20.0
LO = Interface("lo", ("127.0.0.1", "::1"))
TAG = "0123456789abcdef"

Listing = Callable[[], Sequence[Interface]]


class Field:
    """Several peers that search on loopback. Each announces itself under the number of its port."""

    def __init__(self) -> None:
        self.found: dict[int, list[list[Address]]] = {}
        self.live: set[str] = set()
        self.running: list[Discovery] = []

    def make(self, port: int, tag: str = TAG, listing: Listing = lambda: [LO], addresses: Sequence[str] = ()) -> Discovery:
        """Not started yet."""
        self.found[port] = []
        return Discovery(
            tags=lambda: (tag,),
            instance=f"{port:016x}",
            port=port,
            addresses=lambda: [Address(host, port) for host in addresses or ["127.0.0.1"]],
            found=self.found[port].append,
            is_live=lambda instance: instance in self.live,
            members=lambda: len(self.live),
            name="lab",
            listing=listing,
        )

    async def start(self, port: int, tag: str = TAG, listing: Listing = lambda: [LO], *addresses: str) -> Discovery:
        discovery = self.make(port, tag, listing, addresses)
        await discovery.start()
        self.running.append(discovery)
        return discovery

    async def until(self, predicate: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + LIMIT
        while not predicate():
            assert time.monotonic() < deadline, f"never: {what}"
            await asyncio.sleep(0.01)


def in_field(test: Callable[[Field], Coroutine[object, object, None]]) -> None:
    async def run() -> None:
        field = Field()
        try:
            await test(field)
        finally:
            await asyncio.gather(*(discovery.stop() for discovery in field.running))

    asyncio.run(run())


@pytest.mark.slow
def test_two_peers_find_each_other_and_try_again_until_the_other_is_a_member() -> None:
    """Both have the address of every docker bridge, too, by which nobody may be taken for somebody else."""

    async def story(field: Field) -> None:
        mine = [Address("127.0.0.1", 40_001), Address("172.17.0.1", 40_001)]
        one = await field.start(40_001, TAG, lambda: [LO], "127.0.0.1", "172.17.0.1")
        other = await field.start(40_002, TAG, lambda: [LO], "127.0.0.1", "172.17.0.1")
        await field.until(lambda: len(field.found[40_001]) >= 2 and len(field.found[40_002]) >= 2, "both try twice")
        assert sorted(field.found[40_002][0]) == mine
        field.live.add(f"{40_002:016x}")
        tried = one.counters["tried"]
        await field.until(lambda: other.counters["tried"] >= tried + 1, "the other goes on trying")
        assert one.counters["tried"] <= tried + 1, "a live member is left alone"

    in_field(story)


@pytest.mark.slow
def test_another_mesh_is_seen_but_not_joined_and_can_be_listed() -> None:
    async def story(field: Field) -> None:
        one = await field.start(40_003, tag="a" * 16)
        await field.start(40_004, tag="b" * 16)
        other = SeenMesh(tag="b" * 16, addresses=(Address("127.0.0.1", 40_004),), name="lab")
        # Not "only the other one": other tests announce on loopback at the same time.
        await field.until(lambda: other in one.other_meshes, "the other mesh is seen")
        assert one.counters["foreign"] > 0
        assert field.found == {40_003: [], 40_004: []}
        seen: dict[str, SeenMesh] = {}
        deadline = time.monotonic() + LIMIT
        while not {"a" * 16, "b" * 16} <= seen.keys() and time.monotonic() < deadline:
            seen = {mesh.tag: mesh for mesh in await look_around(1.0, bind="127.0.0.1", listing=lambda: [LO])}
        assert seen["a" * 16] == SeenMesh(tag="a" * 16, addresses=(Address("127.0.0.1", 40_003),), name="lab")
        assert seen["b" * 16] == other

    in_field(story)


@pytest.mark.slow
def test_a_machine_whose_network_comes_up_later_searches_then() -> None:
    async def story(field: Field) -> None:
        present: list[Interface] = []
        late = await field.start(40_005, "c" * 16, lambda: list(present))
        await field.start(40_006, "c" * 16)
        await asyncio.sleep(0)
        assert late.hosts == () and late.counters["seen"] == 0
        present.append(LO)
        late.networks_changed()
        await field.until(lambda: len(field.found[40_005]) > 0, "the late one finds the other")
        present.clear()
        late.networks_changed()
        await field.until(lambda: late.hosts == (), "the search ends with the network")
        assert late.problem == "" and late.counters["failed"] == 0

    in_field(story)


@pytest.mark.slow
def test_an_address_that_went_and_came_back_is_searched_from_anew_and_no_other_change_disturbs() -> None:
    """The kernel forgets the membership in a multicast group with the address: the socket would be deaf."""

    async def story(field: Field) -> None:
        looks: list[int] = []

        def listing() -> list[Interface]:
            looks.append(1)
            return [LO]

        one = await field.start(40_007, "d" * 16, listing)
        await field.until(lambda: one.counters["own"] > 0, "it hears itself")
        one.networks_changed()
        await field.until(lambda: len(looks) == 2, "it has looked")
        one.networks_changed(["10.0.0.1"])
        await field.until(lambda: len(looks) == 3, "it has looked again")
        await field.until(lambda: not one._look, "and has done with it")
        assert one.counters["opened"] == 1
        one.networks_changed(["127.0.0.1"])
        await field.until(lambda: one.counters["opened"] == 2, "it searches anew")

    in_field(story)


@pytest.mark.slow
def test_an_interface_that_does_not_work_takes_no_other_with_it(caplog: pytest.LogCaptureFixture) -> None:
    async def story(field: Field) -> None:
        here = Interface("odd", ("127.0.0.1", "192.0.2.8"))  # no loopback, as far as the search is concerned
        gone = Interface("gone", ("192.0.2.9",))
        one = await field.start(40_008, "e" * 16, lambda: [gone, here])
        other = await field.start(40_009, "e" * 16, lambda: [here])
        await field.until(lambda: bool(field.found[40_008]), "it finds the other on the one that works")
        assert one.hosts == ("127.0.0.1",) and "192.0.2.9" in one.problem
        assert other.problem == "" and other.counters["failed"] == 0
        one.networks_changed(["127.0.0.1"])
        await field.until(lambda: one.counters["opened"] == 2 and one.counters["failed"] == 2, "it tries again")

    in_field(story)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len([text for text in warnings if "192.0.2.9" in text]) == 1, "said once, however often it is tried"


@pytest.mark.slow
def test_announcements_are_repeated_for_those_whose_network_is_joined_to_this_one_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "ANNOUNCE_ALONE", 0.1)

    async def story(field: Field) -> None:
        one = await field.start(40_010, "f" * 16)
        await field.until(lambda: one.counters["own"] > 0, "it has announced itself")
        heard = 0
        with _on_the_wire() as wire:
            deadline = time.monotonic() + LIMIT
            while heard < 12 and time.monotonic() < deadline:  # three announcements and a few answers come by themselves
                data = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(wire, 9_000), LIMIT)
                heard += f"{40_010:016x}".encode() in data and bool(data[2] & 0x80)
        assert heard == 12

    in_field(story)


def _on_the_wire() -> socket.socket:
    """Hears what is sent to the mDNS group on loopback."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(("224.0.0.251", 5353))
    membership = struct.pack("4s4s", socket.inet_aton("224.0.0.251"), socket.inet_aton("127.0.0.1"))
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
    sock.setblocking(False)
    return sock


def test_who_has_met_nobody_announces_itself_often_and_many_members_seldom() -> None:
    field = Field()
    one = field.make(40_011)
    alone = one._announce_pause()
    field.live |= {str(number) for number in range(300)}
    crowded = one._announce_pause()
    assert 7 <= alone <= 13 and 225 <= crowded <= 375


def test_another_mesh_is_remembered_until_it_is_gone_or_has_our_key() -> None:
    one = Field().make(40_014)
    place = (Address("10.0.0.1", 1),)
    for instance in ("x", "y"):
        one._handle_found(instance, Announcement("b" * 16, place))
    assert one.other_meshes == [SeenMesh(tag="b" * 16, addresses=place)]
    one._handle_lost("x")
    one._handle_found("y", Announcement("c" * 16, place, others=(TAG,)))
    assert one.other_meshes == []
    for number in range(2 * OTHERS_MAX):
        one._handle_found(str(number), Announcement(f"{number:016x}", place))
    assert len(one.other_meshes) == OTHERS_MAX


def test_a_newcomer_tries_a_few_of_those_in_sight_and_the_others_only_if_that_did_not_help() -> None:
    field = Field()
    one = field.make(40_012)
    for number in range(10):
        one._handle_found(f"{number:016x}", Announcement(TAG, (Address("10.0.0.1", 1 + number),)))
    one._try_due(100.0)
    assert field.found[40_012] == [[Address("10.0.0.1", 1 + number)] for number in range(TRIES_AT_ONCE)]
    field.live |= {f"{number:016x}" for number in range(9)}
    one._try_due(101.0)
    assert field.found[40_012][TRIES_AT_ONCE:] == [[Address("10.0.0.1", 10)]]


def test_one_that_announces_other_addresses_is_tried_at_once() -> None:
    field = Field()
    one = field.make(40_013)
    old, new = Address("10.0.0.1", 1), Address("10.0.0.2", 1)
    one._handle_found("a", Announcement(TAG, (old,)))
    one._try_due(100.0)
    one._handle_found("a", Announcement(TAG, (old,)))
    one._try_due(100.5)
    assert field.found[40_013] == [[old]]
    one._handle_found("a", Announcement(TAG, (new,)))
    one._try_due(100.6)
    assert field.found[40_013] == [[old], [new]]


def test_a_machine_without_a_network_sees_nothing_and_says_so_without_an_error() -> None:
    assert asyncio.run(look_around(0.0, listing=list)) == []


def announced(*hosts: str, port: int = 7_733, version: str = "1", tag: str = TAG) -> AsyncServiceInfo:
    packed = [ipaddress.ip_address(host).packed for host in hosts]
    return AsyncServiceInfo(SERVICE, f"x.{SERVICE}", port=port, addresses=packed, properties={"v": version, "m": tag})


def test_only_places_where_one_machine_can_be_reached_are_read_and_link_local_ipv4_is_one() -> None:
    read = module._read(announced("10.0.0.1", "169.254.7.1", "0.0.0.0", "224.0.0.1", "fe80::1", "fd00::1", "ff02::1"))
    assert read is not None
    assert sorted(address.host for address in read.addresses) == ["10.0.0.1", "169.254.7.1", "fd00::1"]
    assert module._read(announced("fe80::1")) is None


def test_a_stranger_cannot_have_more_addresses_tried_than_a_member_may_have() -> None:
    read = module._read(announced(*(f"10.0.0.{number}" for number in range(1, 60))))
    assert read is not None and len(read.addresses) == ADDRESSES_MAX


def test_what_is_no_announcement_of_a_mesh_is_passed_over() -> None:
    assert module._read(announced("10.0.0.1", version="2")) is None
    assert module._read(announced("10.0.0.1", tag="")) is None
    assert module._read(announced("10.0.0.1", port=0)) is None
