"""What this machine's interfaces mean, which addresses others are told, and where mDNS searches."""

import asyncio
import socket
import threading

import pytest

from meshq.config import ADDRESSES_MAX, PORT_DEFAULT
from meshq.errors import Unreachable, UsageError
from meshq.gossip import addresses as module
from meshq.gossip.addresses import (
    Interface,
    Reach,
    describe,
    interfaces,
    normal_bind,
    own_addresses,
    parse_seed,
    resolve_seed,
    search_hosts,
    told_addresses,
)
from meshq.gossip.member import Address
from meshq.gossip.netlink import Link, LinkAddress

ETH = Interface("eth0", ("192.168.1.5", "2001:db8::5"))
UNPLUGGED = Interface("eth1", ("10.5.0.5",), carrier=False)
DOCKER = Interface("docker0", ("172.17.0.1",), Reach.INNER)
TUNNEL = Interface("tun0", ("10.8.0.5",), Reach.TUNNEL, multicast=False)
BY_ITSELF = Interface("eth2", ("169.254.7.5",))
LO = Interface("lo", ("127.0.0.1", "::1"))


def link(index: int, name: str, *hosts: str, kind: str = "", master: int = 0, carrier: bool = True, up: bool = True) -> Link:
    addresses = tuple(LinkAddress(host) for host in hosts)
    return Link(index=index, name=name, kind=kind, master=master, carrier=carrier, up=up, addresses=addresses)


def reach_of(*links: Link) -> dict[str, Reach]:
    return {interface.name: interface.reach for interface in describe(links)}


# --- what an interface is --------------------------------------------------------------------------------------------


def test_a_bridge_leads_out_if_a_cable_is_plugged_into_it_whatever_its_name() -> None:
    assert reach_of(
        link(1, "docker0", "172.17.0.1", kind="bridge"),
        link(2, "br-lan", "192.168.1.5", kind="bridge"),
        link(3, "veth1", kind="veth", master=1),
        link(4, "eth0", master=2),
        link(5, "vnet0", kind="tun", master=2),
    ) == {"docker0": Reach.INNER, "br-lan": Reach.NETWORK}


@pytest.mark.parametrize(
    ("name", "kind", "reach"),
    [
        ("eth0", "", Reach.NETWORK),
        ("eth0", "veth", Reach.NETWORK),  # inside a container
        ("bond0", "bond", Reach.NETWORK),
        ("eth0.7", "vlan", Reach.NETWORK),
        ("tun0", "tun", Reach.TUNNEL),
        ("wg0", "wireguard", Reach.TUNNEL),
        ("flannel.1", "vxlan", Reach.INNER),
        ("dummy0", "dummy", Reach.INNER),
        ("vboxnet0", "", Reach.INNER),
        ("veth12", "veth", Reach.INNER),
    ],
)
def test_the_kernel_says_what_the_other_interfaces_are(name: str, kind: str, reach: Reach) -> None:
    assert reach_of(link(1, name, "10.0.0.1", kind=kind)) == {name: reach}


def test_a_link_to_one_other_end_is_a_tunnel() -> None:
    ppp = Link(index=1, name="ppp0", point_to_point=True, addresses=(LinkAddress("10.0.0.1"),))
    assert reach_of(ppp) == {"ppp0": Reach.TUNNEL}


def test_what_is_down_or_leads_to_nobody_is_left_out_but_an_unplugged_cable_may_come_back() -> None:
    assert reach_of(
        link(1, "docker0", "172.17.0.1", kind="bridge", carrier=False),
        link(2, "virbr0", "192.168.122.1", kind="bridge"),
        link(3, "vnet0", kind="tun", master=2, carrier=False),
        link(4, "tun0", "10.8.0.1", kind="tun", carrier=False),
        link(5, "eth0", "10.0.0.1", carrier=False),
        link(6, "eth1", "10.0.1.1", up=False),
        link(7, "eth2"),
        link(8, "br0", "10.0.2.1", kind="bridge"),
        link(9, "eth3", master=8, carrier=False),
    ) == {"eth0": Reach.NETWORK, "br0": Reach.NETWORK}


def test_addresses_that_cannot_be_used_and_privacy_addresses_beside_a_lasting_one_are_left_out() -> None:
    eth0 = Link(
        index=1,
        name="eth0",
        addresses=(
            LinkAddress("2001:db8::a", temporary=True),
            LinkAddress("fe80::1"),
            LinkAddress("2001:db8::1"),
            LinkAddress("2001:db8::2", usable=False),
            LinkAddress("10.0.0.1"),
        ),
    )
    eth1 = Link(index=2, name="eth1", addresses=(LinkAddress("2001:db8:1::a", temporary=True), LinkAddress("10.0.1.1")))
    assert describe([eth0, eth1]) == [
        Interface("eth0", ("10.0.0.1", "2001:db8::1")),
        Interface("eth1", ("10.0.1.1", "2001:db8:1::a")),
    ]


def test_an_address_that_a_router_keeps_on_lo_is_no_loopback() -> None:
    assert [(each.hosts, each.loopback) for each in describe([link(1, "lo", "127.0.0.1", "10.255.0.7", "::1")])] == [
        (("127.0.0.1", "::1"), True),
        (("10.255.0.7",), False),
    ]


def test_this_machine_has_a_loopback_interface_and_no_scoped_address() -> None:
    found = interfaces()
    assert any(interface.loopback and "127.0.0.1" in interface.hosts for interface in found)
    assert not any("%" in host for interface in found for host in interface.hosts)


# --- what others are told --------------------------------------------------------------------------------------------


def hosts_told(*listing: Interface, bind: str = "") -> list[str]:
    return [address.host for address in own_addresses(7, bind, lambda: listing)]


def test_a_good_address_is_never_behind_one_that_means_another_machine_elsewhere() -> None:
    assert hosts_told(DOCKER, UNPLUGGED, BY_ITSELF, TUNNEL, ETH, LO) == [
        "192.168.1.5", "2001:db8::5", "169.254.7.5", "10.8.0.5", "10.5.0.5", "172.17.0.1",
    ]  # fmt: skip
    assert hosts_told(DOCKER, UNPLUGGED) == ["10.5.0.5", "172.17.0.1"]


def test_own_addresses_are_of_the_family_that_is_bound() -> None:
    assert hosts_told(DOCKER, ETH, LO, bind="0.0.0.0") == ["192.168.1.5", "172.17.0.1"]
    assert hosts_told(DOCKER, ETH, LO, bind="::") == ["192.168.1.5", "2001:db8::5", "172.17.0.1"]
    assert hosts_told(ETH, bind="FD00:0::9") == ["fd00::9"]


def test_own_addresses_are_loopback_only_if_there_is_nothing_else_or_it_is_bound() -> None:
    assert hosts_told(LO) == ["127.0.0.1", "::1"]
    assert hosts_told(ETH, LO, bind="127.0.0.1") == ["127.0.0.1"]
    assert hosts_told() == []


def test_no_more_addresses_are_claimed_than_a_member_may_have_and_one_of_each_family_at_least() -> None:
    many = [Interface(f"eth{n}", (f"10.0.0.{n + 1}",)) for n in range(20)]
    assert hosts_told(*many) == [f"10.0.0.{n + 1}" for n in range(ADDRESSES_MAX)]
    with_v6 = hosts_told(*many, Interface("eth9", ("2001:db8::1", "2001:db8::2")))
    assert with_v6 == [*(f"10.0.0.{n + 1}" for n in range(ADDRESSES_MAX - 1)), "2001:db8::1"]


def test_a_person_is_told_only_addresses_that_can_be_typed_elsewhere() -> None:
    listing = [DOCKER, ETH, TUNNEL, LO]
    assert told_addresses(7, "", lambda: listing) == (
        Address("192.168.1.5", 7), Address("2001:db8::5", 7), Address("10.8.0.5", 7),
    )  # fmt: skip
    assert told_addresses(7, "10.8.0.5", lambda: listing) == (Address("10.8.0.5", 7),)
    assert told_addresses(7, "127.0.0.1", lambda: listing) == told_addresses(7, "", lambda: [LO, DOCKER]) == ()


# --- where mDNS searches ---------------------------------------------------------------------------------------------


def test_every_interface_that_leads_anywhere_is_searched_by_each_family_that_it_has() -> None:
    v6_only = Interface("eth3", ("fd00::5", "2001:db8:3::5"))
    assert search_hosts([DOCKER, ETH, TUNNEL, UNPLUGGED, LO]) == ("172.17.0.1", "192.168.1.5", "2001:db8::5")
    assert search_hosts([DOCKER, v6_only, LO]) == ("172.17.0.1", "fd00::5")
    assert search_hosts([ETH, v6_only], "0.0.0.0") == ("192.168.1.5",)
    assert search_hosts([ETH, v6_only], "::") == ("192.168.1.5", "2001:db8::5", "fd00::5")


def test_loopback_is_searched_only_if_it_is_all_there_is_or_bound() -> None:
    assert search_hosts([LO, UNPLUGGED]) == ("127.0.0.1",)
    assert search_hosts([Interface("lo", ("::1",))]) == ("::1",)
    assert search_hosts([DOCKER, ETH, LO], "127.0.0.1") == ("127.0.0.1",)
    assert search_hosts([]) == ()


def test_a_bound_address_is_searched_from_alone_and_only_while_the_machine_has_it() -> None:
    assert search_hosts([DOCKER, ETH, LO], "192.168.1.5") == ("192.168.1.5",)
    assert search_hosts([DOCKER, ETH, LO], "2001:DB8::5") == ("2001:db8::5",)
    assert search_hosts([DOCKER, ETH, LO], "192.168.1.6") == ()
    assert search_hosts([UNPLUGGED], "10.5.0.5") == ()


@pytest.mark.parametrize(
    ("text", "meaning"),
    [("", ""), ("0.0.0.0", "0.0.0.0"), ("::0", "::"), ("10.0.0.1", "10.0.0.1"), ("FD00::0:1", "fd00::1"),
     ("::ffff:10.0.0.1", "10.0.0.1")],
)  # fmt: skip
def test_a_bind_address_has_one_form(text: str, meaning: str) -> None:
    assert normal_bind(text) == meaning


@pytest.mark.parametrize(
    "text", ["lab3", "10.0.0", "10.0.0.1:7733", "[fd00::1]", "fe80::1%eth0", "fe80::1", "224.0.0.1", "ff02::1"]
)
def test_what_nobody_can_be_reached_at_is_no_bind_address(text: str) -> None:
    with pytest.raises(UsageError, match="--bind"):
        normal_bind(text)


# --- seeds -----------------------------------------------------------------------------------------------------------


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


def test_a_name_server_that_does_not_answer_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    silence = threading.Event()
    monkeypatch.setattr(module, "RESOLVE_SECONDS", 0.01)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **more: silence.wait(10) and [])
    with pytest.raises(Unreachable, match="no name server answers"):
        asyncio.run(resolve_seed("lab3:5"))
    waiting = [thread for thread in threading.enumerate() if thread.name == "meshq resolves lab3"]
    silence.set()
    for thread in waiting:
        thread.join(10)
    assert [thread.daemon for thread in waiting] == [True], "it was still asking, and would not have kept the agent from ending"
