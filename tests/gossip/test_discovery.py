"""Finding others: real mDNS between real instances on loopback, seeds, and this machine's own addresses."""

import asyncio
import time
from collections.abc import Callable, Coroutine

import pytest

from meshq.config import PORT_DEFAULT
from meshq.errors import Unreachable, UsageError
from meshq.gossip.addresses import Interface, interfaces, own_addresses, parse_seed, resolve_seed
from meshq.gossip.discovery import Discovery, SeenMesh, look_around, search_hosts
from meshq.gossip.member import Address

LIMIT = 20.0
ETH = Interface("eth0", ("192.168.1.5", "2001:db8::5"))
DOCKER = Interface("docker0", ("172.17.0.1",))
LO = Interface("lo", ("127.0.0.1", "::1"))


class Field:
    """Several peers that search on loopback."""

    def __init__(self) -> None:
        self.found: dict[int, list[list[Address]]] = {}
        self.live: set[Address] = set()
        self.running: list[Discovery] = []

    async def start(
        self, port: int, tag: str = "0123456789abcdef", listing: Callable[[], list[Interface]] = lambda: [LO]
    ) -> Discovery:
        self.found[port] = []
        discovery = Discovery(
            tag=tag,
            port=port,
            addresses=lambda: [Address("127.0.0.1", port)],
            found=self.found[port].append,
            is_live=lambda address: address in self.live,
            name="lab",
            loopback=True,
            listing=listing,
        )
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
    async def story(field: Field) -> None:
        one, other = await field.start(40_001), await field.start(40_002)
        await field.until(lambda: len(field.found[40_001]) >= 2 and len(field.found[40_002]) >= 2, "both try twice")
        assert field.found[40_001][0] == [Address("127.0.0.1", 40_002)]
        assert field.found[40_002][0] == [Address("127.0.0.1", 40_001)]
        field.live.add(Address("127.0.0.1", 40_002))
        tried = one.counters["tried"]
        await field.until(lambda: other.counters["tried"] >= tried + 1, "the other goes on trying")
        assert one.counters["tried"] <= tried + 1, "a live member is left alone"

    in_field(story)


@pytest.mark.slow
def test_another_mesh_is_seen_but_not_joined_and_can_be_listed() -> None:
    async def story(field: Field) -> None:
        one = await field.start(40_003, tag="a" * 16)
        await field.start(40_004, tag="b" * 16)
        await field.until(lambda: one.counters["foreign"] > 0, "the other mesh is seen")
        assert field.found == {40_003: [], 40_004: []}
        seen: dict[str, SeenMesh] = {}
        deadline = time.monotonic() + LIMIT
        while not {"a" * 16, "b" * 16} <= seen.keys() and time.monotonic() < deadline:
            seen = {mesh.tag: mesh for mesh in await look_around(1.0, loopback=True, listing=lambda: [LO])}
        assert seen["a" * 16] == SeenMesh(tag="a" * 16, addresses=(Address("127.0.0.1", 40_003),), name="lab")
        assert seen["b" * 16].addresses == (Address("127.0.0.1", 40_004),)

    in_field(story)


@pytest.mark.slow
def test_a_machine_whose_network_comes_up_later_searches_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshq.gossip.discovery.INTERFACES_INTERVAL", 0.2)

    async def story(field: Field) -> None:
        present: list[Interface] = []
        late = await field.start(40_005, tag="c" * 16, listing=lambda: list(present))
        await field.start(40_006, tag="c" * 16)
        await asyncio.sleep(0)
        assert late.counters["seen"] == 0
        present.append(LO)
        await field.until(lambda: len(field.found[40_005]) > 0, "the late one finds the other")
        present.clear()
        await field.until(lambda: late._net is None, "the search ends with the network")

    in_field(story)


def test_a_machine_without_a_network_sees_nothing_and_says_so_without_an_error() -> None:
    assert asyncio.run(look_around(0.0, listing=list)) == []


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("lab3", ("lab3", PORT_DEFAULT)),
        ("lab3.example.org:99", ("lab3.example.org", 99)),
        ("10.0.0.1", ("10.0.0.1", PORT_DEFAULT)),
        ("10.0.0.1:1", ("10.0.0.1", 1)),
        ("[fd00::3]:7734", ("fd00::3", 7734)),
        ("[fd00::3]", ("fd00::3", PORT_DEFAULT)),
        ("fd00::3", ("fd00::3", PORT_DEFAULT)),
    ],
)
def test_a_seed_is_a_host_with_or_without_a_port(text: str, meaning: tuple[str, int]) -> None:
    assert parse_seed(text) == meaning


@pytest.mark.parametrize(
    "text", ["", ":7733", "lab3:", "lab3:0", "lab3:65536", "lab 3", "http://lab3:1", "[lab3]:1", "a:b:c", "lab3:-1"]
)
def test_a_seed_that_is_no_address_is_wrong_usage(text: str) -> None:
    with pytest.raises(UsageError, match="is no address"):
        asyncio.run(resolve_seed(text))


def test_seeds_resolve_to_numeric_addresses() -> None:
    assert asyncio.run(resolve_seed("127.0.0.1:5")) == [Address("127.0.0.1", 5)]
    assert asyncio.run(resolve_seed("[::1]:5")) == [Address("::1", 5)]
    found = asyncio.run(resolve_seed("localhost:5"))
    assert found and all(address in (Address("127.0.0.1", 5), Address("::1", 5)) for address in found)


def test_a_seed_whose_name_does_not_resolve_is_unreachable() -> None:
    with pytest.raises(Unreachable, match="does not resolve"):
        asyncio.run(resolve_seed("no-such-machine.invalid:5"))


def test_own_addresses_put_real_interfaces_before_bridges_and_ipv4_before_ipv6() -> None:
    listing = [DOCKER, ETH, LO]
    assert own_addresses(7, listing=lambda: listing) == (
        Address("192.168.1.5", 7), Address("2001:db8::5", 7), Address("172.17.0.1", 7),
    )  # fmt: skip
    assert own_addresses(7, "0.0.0.0", lambda: listing) == (Address("192.168.1.5", 7), Address("172.17.0.1", 7))


def test_own_addresses_are_loopback_only_if_there_is_nothing_else_or_it_is_bound() -> None:
    assert own_addresses(7, listing=lambda: [LO]) == (Address("127.0.0.1", 7), Address("::1", 7))
    assert own_addresses(7, "127.0.0.1", lambda: [ETH, LO]) == (Address("127.0.0.1", 7),)
    assert own_addresses(7, listing=list) == ()


def test_no_more_addresses_are_claimed_than_a_member_may_have() -> None:
    many = [Interface(f"eth{n}", (f"10.0.0.{n + 1}",)) for n in range(20)]
    assert len(own_addresses(7, listing=lambda: many)) == 8


def test_the_search_leaves_loopback_out_unless_it_is_all_there_is_or_asked_for() -> None:
    assert search_hosts([DOCKER, ETH, LO], loopback=False) == ("172.17.0.1", "192.168.1.5")
    assert search_hosts([DOCKER, ETH, LO], loopback=True) == ("127.0.0.1",)
    assert search_hosts([LO], loopback=False) == ("127.0.0.1",)
    assert search_hosts([Interface("eth0", ("2001:db8::5",))], loopback=False) == ("2001:db8::5",)
    assert search_hosts([], loopback=False) == ()


def test_this_machine_has_a_loopback_interface_and_no_scoped_address() -> None:
    found = interfaces()
    assert any(interface.loopback and "127.0.0.1" in interface.hosts for interface in found)
    assert not any("%" in host for interface in found for host in interface.hosts)
