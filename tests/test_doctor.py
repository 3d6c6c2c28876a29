"""Each check of the doctor, with made-up facts: what it finds and what it tells people to do."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from meshq import codec, config, doctor
from meshq.doctor import host
from meshq.doctor.facts import Check, Disk, Docker, Facts, Files, KeyRing, Measured, Probe, named
from meshq.exec.gpus import NO_DRIVER
from meshq.exec.probe import Sample
from meshq.gossip.addresses import Interface, Reach
from meshq.gossip.connectivity import Connectivity
from meshq.gossip.member import Address, Liveness, Member
from meshq.gossip.wire import Record
from meshq.ids import Epoch, PeerId
from meshq.peers import Peers
from meshq.settings import Settings
from meshq.task import Gpu, Telemetry
from tests.gossip import builders as gossip
from tests.simulator.gossip_peer import peer_for

DOCUMENT = Path(__file__).parent.parent / "docs" / "operations.md"


def member(name: str, letter: str, liveness: Liveness = Liveness.ALIVE, version: str = "1", **given: object) -> Member:
    plain = Member(
        peer=PeerId(letter * 52), epoch=Epoch(1), incarnation=0, liveness=liveness, name=name, addresses=(), version=version
    )
    return replace(plain, **given)  # type: ignore[arg-type]  # fields of Member


def link(udp: bool | None = True, tcp: bool | None = True, port: int = 7733) -> Connectivity:
    return Connectivity(udp=udp, tcp=tcp, address=Address("10.0.0.2", port), rtt=0.001, heard_seconds=1.0)


ME, BOB, CYD, DAN = member("ada", "a"), member("bob", "b"), member("cyd", "c"), member("dan", "d")
ETH = Interface("eth0", ("10.0.0.1", "fd00::1"))
DOCKER0 = Interface("docker0", ("172.17.0.1",), Reach.INNER)
VPN = Interface("wg0", ("10.9.0.1",), Reach.TUNNEL)


def at(host: str) -> Address:
    return Address(host, 7733)


@pytest.fixture
def facts(tmp_path: Path) -> Facts:
    measured = Measured(
        interfaces=(ETH,), probes=(Probe(interface="eth0", host="10.0.0.1", came_back=True, heard=2),),
        disk=Disk(free_bytes=2**40, free_files=10**6, kind="ext4"), files=Files(open=40, limit=65_536), git="/bin/git",
    )  # fmt: skip
    return Facts(
        me=ME, members=(ME, BOB), telemetry=Telemetry(queues=("default",)), home=tmp_path, uid=1000, group=None, mdns=True,
        mdns_problem="", gpu_state="no NVIDIA driver", landlock_abi=4, uv="/bin/uv", addresses=(at("10.0.0.1"),),
        links={BOB.peer: link()}, port=7733, wanted_name="ada", measured=measured, running_seconds=3600.0, udp_received=9,
        tcp_accepted=3,
    )  # fmt: skip


def check(facts: Facts, name: str) -> Check:
    return next(each for each in doctor.examine(facts) if each.name == name)


def with_links(facts: Facts, *links: Connectivity) -> Facts:
    """As many of the others as there are links, alive."""
    others = (BOB, CYD, DAN)[: len(links)]
    return replace(facts, members=(ME, *others), links={each.peer: way for each, way in zip(others, links, strict=True)})


def measured(facts: Facts, **given: object) -> Facts:
    return replace(facts, measured=replace(facts.measured, **given))  # type: ignore[arg-type]  # fields of Measured


# --- all checks ------------------------------------------------------------------------------------------------------


def test_a_healthy_peer_has_nothing_to_mend(facts: Facts) -> None:
    assert [each for each in doctor.examine(facts) if not each.ok] == []


def test_each_check_has_the_name_of_its_function_and_a_row_in_the_document(facts: Facts) -> None:
    names = [each.name for each in doctor.examine(facts)]
    assert names == [each.__name__ for each in doctor.CHECKS]
    section = DOCUMENT.read_text().partition("### The checks of the doctor")[2].partition("\n#")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == names


SICK: dict[str, Callable[[Facts], Facts]] = {
    "peers": lambda facts: replace(facts, members=(ME,)),
    "identity": lambda facts: replace(facts, clone=member("ada", "a")),
    "name": lambda facts: replace(facts, wanted_name="ann"),
    "version": lambda facts: replace(facts, members=(ME, member("bob", "b", version="2"))),
    "profile": lambda facts: replace(facts, profiles={BOB.peer: "fast"}),
    "clock": lambda facts: replace(facts, clocks={BOB.peer: 9.0}),
    "keys": lambda facts: replace(facts, keys=KeyRing(in_use="k1", held=("k2",))),
    "udp": lambda facts: with_links(facts, link(udp=False)),
    "tcp": lambda facts: with_links(facts, link(tcp=False)),
    "discovery": lambda facts: replace(facts, mdns_problem="the log says why"),
    "addresses": lambda facts: replace(facts, addresses=()),
    "flapping": lambda facts: replace(facts, damped_seconds=60.0),
    "health": lambda facts: replace(facts, health=5),
    "files": lambda facts: measured(facts, files=Files(open=1, limit=256)),
    "ledger": lambda facts: replace(facts, damage={"rows_quarantined": 2}),
    "disk": lambda facts: measured(facts, disk=Disk(free_bytes=1)),
    "gpus": lambda facts: replace(facts, gpu_state="the NVIDIA driver does not work: mismatch"),
    "docker": lambda facts: measured(facts, docker=Docker(wanted=True)),
    "environments": lambda facts: replace(facts, uv=None),
    "isolation": lambda facts: replace(facts, landlock_abi=0),
    "user": lambda facts: replace(facts, uid=0),
    "claims": lambda facts: replace(facts, telemetry=Telemetry(problem="its disk is nearly full")),
}


def test_there_is_an_illness_for_each_check_but_that_of_git() -> None:
    assert {each.__name__ for each in doctor.CHECKS} - set(SICK) == {"git"}


@pytest.mark.parametrize("name", SICK)
def test_what_is_wrong_is_found_by_its_check_alone_and_comes_with_a_fix_on_one_short_line(facts: Facts, name: str) -> None:
    wrong = [each for each in doctor.examine(SICK[name](facts)) if not each.ok]
    assert [each.name for each in wrong] == [name]
    assert wrong[0].fix and "\n" not in wrong[0].detail + wrong[0].fix
    assert len(wrong[0].detail) < 200 and len(wrong[0].fix) < 200
    assert not wrong[0].detail.endswith(".") and not wrong[0].fix.endswith(".")


def test_three_hundred_peers_do_not_make_a_long_line(facts: Facts) -> None:
    many = [replace(BOB, peer=PeerId(f"{n:052d}"), name=f"lab-{n:03d}-{'x' * 50}", version=str(n)) for n in range(300)]
    links = {each.peer: link(udp=False) for each in many[:299]} | {many[299].peer: link()}
    for each in doctor.examine(replace(facts, members=(ME, *many), links=links)):
        assert len(each.detail) < 2_000
    dead = [replace(each, liveness=Liveness.DEAD) for each in many]
    assert "and 294 more" in check(replace(facts, members=(ME, BOB, *dead)), "peers").detail


def test_the_document_has_checks_with_fixes_and_counters() -> None:
    checks = [Check(name="version", ok=True, detail="1"), Check(name="disk", ok=False, detail="full", fix="make room")]
    assert doctor.to_document(checks, {"b": 2, "a": 1}) == {
        "checks": [
            {"name": "version", "ok": True, "detail": "1", "fix": None},
            {"name": "disk", "ok": False, "detail": "full", "fix": "make room"},
        ],
        "counters": {"a": 1, "b": 2},
    }


def test_join_is_told_what_is_not_ok_but_not_what_it_warns_of_anyway(facts: Facts) -> None:
    sick = replace(facts, uid=0, uv=None)
    assert [each["name"] for each in doctor.findings(doctor.examine(sick))] == ["environments"]


def test_names_are_sorted_and_the_rest_is_counted() -> None:
    assert named(["cyd", "ada"]) == "ada, cyd"
    assert named(["cyd", "ada", "bob"], 2) == "ada, bob and 1 more"


# --- the mesh --------------------------------------------------------------------------------------------------------


def test_alone_it_prints_the_command_that_would_join_another(facts: Facts) -> None:
    found = check(replace(facts, members=(ME,), links={}), "peers")
    assert (found.ok, found.detail) == (False, "alone")
    assert "`meshq join --key-file F --seed 10.0.0.1:7733`" in found.fix
    fast = check(replace(facts, members=(ME,), links={}, profile="fast"), "peers")
    assert "--seed 10.0.0.1:7733 --profile fast`" in fast.fix


def test_who_listens_on_loopback_alone_invites_nobody_there(facts: Facts) -> None:
    alone = replace(facts, members=(ME,), bind="127.0.0.1", addresses=(at("127.0.0.1"),))
    assert "--bind 0.0.0.0" in check(alone, "peers").fix
    assert "--seed" in check(replace(alone, bind="10.0.0.1"), "peers").fix


def test_alone_where_no_mdns_is_heard_the_network_is_suspected(facts: Facts) -> None:
    deaf = measured(replace(facts, members=(ME,)), probes=(Probe(interface="eth0", host="10.0.0.1", came_back=True),))
    assert "filters multicast" in check(deaf, "peers").detail
    assert check(replace(deaf, mdns=False), "peers").detail == "alone"


def test_alone_beside_another_mesh_it_prints_the_commands_that_move_over(facts: Facts) -> None:
    alone = replace(facts, members=(ME,), other_meshes=("10.0.0.7:7733", "10.0.0.8:7733"))
    found = check(alone, "peers")
    assert found.detail == "alone, but a mesh is in sight at 10.0.0.7:7733: its key is another than this machine's"
    over = "`meshq leave; meshq join --new --key-file F --seed 10.0.0.7:7733` to move over"
    assert found.fix == f"with what `meshq key` prints there in F: {over}"
    missed = check(replace(alone, remembered=(member("x", "c", Liveness.DEAD),)), "peers")
    assert "alone (none of the others answers: x), but a mesh is in sight" in missed.detail
    assert "`meshq key install --key-file F; meshq key use ID` if it is this mesh with a new key" in missed.fix
    assert check(replace(alone, members=(ME, BOB)), "peers").ok, "two meshes on one network are no fault"


def test_peers_that_do_not_answer_are_named_and_those_that_left_are_not(facts: Facts) -> None:
    gone = (member("x", "c", Liveness.DEAD), member("y", "d", Liveness.LEFT))
    found = check(replace(facts, members=(ME, BOB, *gone)), "peers")
    assert (found.ok, found.detail) == (False, "2 alive; these do not answer: x")


def test_who_is_remembered_and_has_not_shown_up_does_not_answer_either(facts: Facts) -> None:
    found = check(replace(facts, members=(ME,), remembered=(member("x", "c", Liveness.DEAD),)), "peers")
    assert found.detail == "alone: none of the others answers (x)"


def test_who_sees_most_of_the_mesh_dead_looks_to_its_own_network_first(facts: Facts) -> None:
    gone = [member(f"x{n}", letter, Liveness.DEAD) for n, letter in enumerate("cde")]
    found = check(replace(facts, members=(ME, BOB, *gone)), "peers")
    assert "only 2 of 5 are alive, so it may be this side that is cut off" in found.detail
    assert "this machine first" in found.fix


@pytest.mark.parametrize(("silent", "words"), [(True, "this agent is the newer, so it is silent and"), (False, "that one is")])
def test_the_copy_of_a_home_is_named_with_where_it_runs(facts: Facts, silent: bool, words: str) -> None:
    found = check(replace(facts, clone=member("ada", "a", addresses=(at("10.0.0.9"),)), silent=silent), "identity")
    assert "ada at 10.0.0.9:7733 has this very identity, too" in found.detail and words in found.detail
    where = f"{facts.home}/trust/identity.key" if silent else "trust/identity.key in the copy's home"
    assert f"remove {where}" in found.fix


def test_two_peers_of_one_name_are_told_apart_and_the_renamed_one_is_told(facts: Facts) -> None:
    assert not check(replace(facts, members=(ME, member("ada", "b"))), "name").ok
    assert check(replace(facts, members=(ME, member("ada", "b", Liveness.DEAD))), "name").ok
    renamed = check(replace(facts, me=replace(ME, name="ada-2")), "name")
    assert (renamed.ok, renamed.detail) == (False, "another peer is called ada, so this one is ada-2")


def test_other_versions_are_named_with_who_has_them(facts: Facts) -> None:
    others = (member("bob", "b", version="2"), member("cyd", "c", version="2"), member("dan", "d", Liveness.DEAD, version="3"))
    found = check(replace(facts, members=(ME, *others, member("eve", "e", version=""))), "version")
    assert found.detail == "this peer has 1, others differ: 2: bob, cyd"


def test_other_profiles_are_named_and_who_does_not_say_is_not(facts: Facts) -> None:
    found = check(replace(facts, members=(ME, BOB, CYD), profiles={BOB.peer: "fast"}), "profile")
    assert (found.ok, found.detail) == (False, "this peer has lan, others differ: fast: bob")


CLOCKS: list[tuple[dict[PeerId, float], bool, str]] = [
    ({}, True, "nothing to compare it with yet"),
    ({BOB.peer: -1.9}, True, "within 1.9 s of the others"),
    ({BOB.peer: 2.1}, False, "2.1 s behind bob's: one of the two is wrong"),
    ({BOB.peer: 0.5, CYD.peer: 900.0}, True, "within 0.5 s of the others; these are off: cyd"),
    ({BOB.peer: -400.0, CYD.peer: -401.0, DAN.peer: 0.0}, False, "6.7 min ahead of the clocks of most others"),
    ({BOB.peer: 1e300, CYD.peer: 1e300}, False, "many years behind the clocks of most others"),
    ({BOB.peer: 86_400.0 * 400}, False, "400 days behind bob's"),
    ({BOB.peer: 4000.0, CYD.peer: 4000.0, DAN.peer: 9000.0}, False, "67 min behind"),
    ({BOB.peer: 9000.0}, False, "2.5 h behind bob's"),
]


@pytest.mark.parametrize(("clocks", "ok", "words"), CLOCKS)
def test_a_clock_is_wrong_if_most_others_say_so(facts: Facts, clocks: dict[PeerId, float], ok: bool, words: str) -> None:
    found = check(replace(facts, members=(ME, BOB, CYD, DAN), clocks=clocks), "clock")
    assert found.ok is ok and found.detail.startswith(words)
    if not ok:
        assert "leases do not depend on it" in found.detail and "chrony" in found.fix


def test_peers_without_the_key_in_use_are_named(facts: Facts) -> None:
    ring = KeyRing(in_use="k2", held=("k1", "k2"))
    assert check(replace(facts, keys=ring), "keys").detail == "k2 in use, 1 more installed"
    found = check(replace(facts, keys=replace(ring, lacking=("bob",))), "keys")
    assert found.detail == "these do not have the key in use, k2, and will be cut off from the others: bob"
    assert "does not have" in check(replace(facts, keys=replace(ring, held=("k1",))), "keys").detail


def test_who_is_alone_and_meets_another_key_has_missed_its_change(facts: Facts) -> None:
    ring = replace(facts, keys=KeyRing(in_use="k1", held=("k1",), strangers=2))
    assert check(ring, "keys").ok, "somebody else's mesh is in sight of many"
    alone = check(replace(ring, members=(ME,)), "keys")
    assert (
        not alone.ok
        and "changed it while this machine was off" in alone.detail
        and "`meshq key install --key-file F`" in alone.fix
    )


# --- UDP, TCP, addresses ---------------------------------------------------------------------------------------------

TWO_WAYS = "though TCP does: failures are noticed later and gossip costs more"
UDP: list[tuple[list[Connectivity], bool, str, str]] = [
    ([], True, "port 7733; nobody is there to try it with", ""),
    ([link(udp=None)], True, "port 7733; not tried with anybody yet", ""),
    ([link(), link(udp=None)], True, "port 7733; to 1 of 2 and back", ""),
    ([link(udp=False)], False, f"UDP does not pass between here and bob, {TWO_WAYS}", "on both machines"),
    ([link(udp=False), link(udp=False)], False, f"UDP from here gets to nobody and back, {TWO_WAYS}", "`ufw allow 7733/udp`"),
    ([link(udp=False, port=7734), link()], False, f"UDP does not get to bob and back, {TWO_WAYS}", "port 7734 in the firewall"),
    ([link(udp=False, tcp=None)], False, f"UDP does not pass between here and bob, {TWO_WAYS}", "on both"),
    ([link(udp=False), link(udp=None)], False, f"UDP does not pass between here and bob, {TWO_WAYS}", "on both"),
    ([link(udp=False, tcp=False), link()], True, "port 7733; to 1 of 2 and back", ""),
]  # fmt: skip


@pytest.mark.parametrize(("links", "ok", "detail", "fix"), UDP)
def test_udp_that_does_not_pass_is_found_with_its_side(
    facts: Facts, links: list[Connectivity], ok: bool, detail: str, fix: str
) -> None:
    found = check(with_links(facts, *links), "udp")
    assert (found.ok, found.detail) == (ok, detail) and fix in found.fix


def test_that_no_udp_packet_ever_came_is_better_evidence(facts: Facts) -> None:
    found = check(replace(with_links(facts, link(udp=False), link(udp=False)), udp_received=0), "udp")
    assert found.detail.startswith("no UDP packet ever got here")


SILENT = replace(link(tcp=False), heard_seconds=44.0)
MATTERS = "tasks, code and logs travel by TCP"
TCP: list[tuple[list[Connectivity], bool, str]] = [
    ([], True, "port 7733; nobody is there to try it with; 3 connections came in"),
    ([link(tcp=None)], True, "port 7733; not tried with anybody yet; 3 connections came in"),
    ([link(), link()], True, "port 7733; to 2 of 2; 3 connections came in"),
    ([link(), link(tcp=None)], True, "port 7733; to 1 of 2, the others were not tried yet; 3 connections came in"),
    ([link(tcp=False), link()], False, f"TCP does not get to bob, though UDP does: {MATTERS}"),
    ([link(tcp=False), link(), link(tcp=False)], False, f"TCP does not get to bob, dan, though UDP does: {MATTERS}"),
    ([link(udp=None, tcp=False), link(tcp=None)], False, f"TCP does not get to bob: {MATTERS}"),
    ([link(udp=False, tcp=False), link()], False, f"neither UDP nor TCP gets to bob, held alive by others: {MATTERS}"),
    ([SILENT], False, f"neither UDP nor TCP gets to bob, held alive by others: {MATTERS}"),
    ([link(udp=False, tcp=False), link(tcp=False)], False,
     f"TCP does not get to cyd, though UDP does; neither UDP nor TCP gets to bob, held alive by others: {MATTERS}"),
]  # fmt: skip


@pytest.mark.parametrize(("links", "ok", "detail"), TCP)
def test_tcp_that_does_not_pass_is_found_and_everybody_named_to_whom_it_does_not(
    facts: Facts, links: list[Connectivity], ok: bool, detail: str
) -> None:
    found = check(with_links(facts, *links), "tcp")
    assert (found.ok, found.detail) == (ok, detail)


def test_where_tcp_gets_to_nobody_of_several_it_is_this_machine_s_firewall(facts: Facts) -> None:
    lost = link(tcp=False, port=7734)
    assert "TCP out to port 7734 in the firewall of this machine" in check(with_links(facts, lost, lost), "tcp").fix
    for links in ([lost], [lost, link()]):
        assert "open TCP port 7734 in the firewall there (`ufw allow 7734/tcp`" in check(with_links(facts, *links), "tcp").fix


def test_who_is_never_reached_by_tcp_is_told_after_a_while(facts: Facts) -> None:
    silent = replace(facts, tcp_accepted=0, running_seconds=420.0)
    assert "nobody has reached this peer by TCP in 7 min" in check(silent, "tcp").detail
    assert check(replace(silent, running_seconds=200.0), "tcp").ok
    unknown = check(replace(silent, tcp_accepted=None), "tcp")
    assert (unknown.ok, unknown.detail) == (True, "port 7733; to 1 of 1"), "not known is no evidence"


def test_addresses_say_their_interface_and_what_is_only_a_last_resort(facts: Facts) -> None:
    found = check(
        measured(replace(facts, addresses=(at("10.0.0.1"), at("10.9.0.1"), at("172.17.0.1"))), interfaces=(ETH, VPN, DOCKER0)),
        "addresses",
    )
    assert found.ok
    assert found.detail == (
        "others are told 10.0.0.1:7733 (eth0), 10.9.0.1:7733 (wg0, a tunnel); "
        "only if these fail 172.17.0.1:7733 (docker0, for containers)"
    )


def test_addresses_that_lead_nowhere_are_no_addresses(facts: Facts) -> None:
    only_docker = measured(replace(facts, addresses=(at("172.17.0.1"),)), interfaces=(DOCKER0,))
    assert not check(only_docker, "addresses").ok
    unplugged = measured(facts, interfaces=(replace(ETH, carrier=False),))
    assert "10.0.0.1:7733 (eth0, unplugged)" in check(unplugged, "addresses").detail
    assert not check(unplugged, "addresses").ok


LO = Interface("lo", ("127.0.0.1", "::1"))
OFFLINE: list[tuple[tuple[Interface, ...], tuple[Address, ...], str, bool]] = [
    ((LO,), (at("127.0.0.1"), at("::1")), "", True),
    ((), (at("127.0.0.1"),), "", True),
    ((LO,), (), "", True),
    ((LO, DOCKER0), (at("172.17.0.1"),), "", True),
    ((LO, replace(ETH, carrier=False)), (at("10.0.0.1"),), "10.0.0.1", True),
    ((LO, VPN), (at("10.0.0.1"),), "10.0.0.1", True),
    ((LO, ETH), (at("127.0.0.1"),), "127.0.0.1", False),
    ((LO, ETH), (at("127.0.0.9"),), "127.0.0.9", False),
]


@pytest.mark.parametrize(("interfaces", "told", "bind", "offline"), OFFLINE)
def test_a_machine_without_a_network_is_told_that_and_is_not_blamed_for_what_follows_from_it(
    facts: Facts, interfaces: tuple[Interface, ...], told: tuple[Address, ...], bind: str, offline: bool
) -> None:
    alone = measured(replace(facts, members=(ME,), links={}, health=7, addresses=told, bind=bind), interfaces=interfaces)
    found = check(alone, "addresses")
    assert (found.ok, bool(found.fix)) == (not offline, offline)
    assert check(alone, "health").ok is offline
    assert ("see `addresses`" in check(alone, "peers").fix) is offline
    held_up = check(replace(alone, health=0, stalls=9, running_seconds=60.0), "health")
    assert not held_up.ok, "that is counted here, whatever the network does"


def test_an_address_that_is_bound_and_gone_is_told(facts: Facts) -> None:
    assert check(replace(facts, bind="10.0.0.1"), "addresses").detail == "others are told 10.0.0.1:7733 (eth0), by --bind"
    moved = replace(facts, bind="10.0.0.7", addresses=(at("10.0.0.7"),))
    assert "no interface has that address any more" in check(moved, "addresses").detail
    assert check(measured(moved, interfaces=()), "addresses").ok, "what could not be looked at is no finding"


# --- multicast -------------------------------------------------------------------------------------------------------


def probes(facts: Facts, *found: Probe) -> Check:
    return check(measured(facts, probes=found, interfaces=(ETH, DOCKER0)), "discovery")


def test_multicast_that_does_not_come_back_is_a_firewall_unless_there_is_another_cause(facts: Facts) -> None:
    silent = Probe(interface="eth0", host="10.0.0.1")
    assert (
        probes(facts, silent).detail
        == "multicast does not work on eth0 (10.0.0.1), so machines do not find each other here: a firewall drops it"
    )
    assert "not permitted" in probes(facts, replace(silent, problem="operation not permitted")).detail
    assert "ufw allow 5353/udp" in probes(facts, silent).fix


def test_one_family_that_works_is_enough_and_bridges_do_not_count(facts: Facts) -> None:
    v4, v6 = Probe(interface="eth0", host="10.0.0.1"), Probe(interface="eth0", host="fd00::1", came_back=True, heard=1)
    found = probes(facts, v4, v6, Probe(interface="docker0", host="172.17.0.1"))
    assert (found.ok, found.detail) == (True, "multicast works on eth0 (fd00::1); 1 other machine heard")


def test_without_mdns_multicast_is_nobody_s_concern(facts: Facts) -> None:
    assert check(replace(facts, mdns=False, mdns_problem="x"), "discovery").ok
    assert check(measured(facts, probes=()), "discovery").detail == "mDNS announces and listens"


# --- the machine -----------------------------------------------------------------------------------------------------


def test_an_agent_that_starves_is_told_apart_from_one_that_stumbled_once(facts: Facts) -> None:
    assert check(replace(facts, health=2, stalls=2, running_seconds=60.0), "health").ok
    assert not check(replace(facts, health=3), "health").ok
    assert "held up 4 times in 10 min" in check(replace(facts, stalls=4, running_seconds=600.0), "health").detail
    assert check(replace(facts, stalls=4, running_seconds=86_400.0), "health").ok
    assert "--cpus" in check(replace(facts, health=3), "health").fix


def test_a_limit_of_open_files_that_is_low_or_nearly_reached_is_told(facts: Facts) -> None:
    assert not check(measured(facts, files=Files(open=10, limit=1_023)), "files").ok
    assert not check(measured(facts, files=Files(open=9_000, limit=10_000)), "files").ok
    assert check(measured(facts, files=Files(open=8_000, limit=10_000)), "files").ok


def test_damage_of_the_ledger_is_told_with_what_was_done_about_it(facts: Facts) -> None:
    assert check(facts, "ledger").ok
    found = check(replace(facts, damage={"rows_quarantined": 2, "databases_damaged": 1}), "ledger")
    assert not found.ok and "(databases damaged: 1, rows quarantined: 2)" in found.detail
    assert "smartctl" in (found.fix or "")


def test_a_disk_without_room_without_inodes_or_on_another_machine_is_told(facts: Facts) -> None:
    low = Disk(free_bytes=config.DISK_FREE_BYTES_MIN - 1)
    assert "no task is claimed below 512 MiB" in check(measured(facts, disk=low), "disk").detail
    assert check(measured(facts, disk=Disk(free_bytes=config.DISK_FREE_BYTES_MIN)), "disk").ok, "as where tasks are claimed"
    assert "inodes" in check(measured(facts, disk=Disk(free_bytes=2**40, free_files=3)), "disk").detail
    assert "network file system (nfs4)" in check(measured(facts, disk=Disk(free_bytes=2**40, kind="nfs4")), "disk").detail
    assert "a reboot loses it" in check(measured(facts, disk=Disk(free_bytes=2**40, kind="tmpfs")), "disk").detail
    assert check(measured(facts, disk=Disk(free_bytes=2**40, free_files=None, kind="btrfs")), "disk").ok
    assert check(measured(facts, disk=Disk()), "disk").ok


def test_gpus_and_who_uses_them_are_counted(facts: Facts) -> None:
    gpus = tuple(Gpu(index=n, uuid="", name="", memory_bytes=1, foreign_pids=pids) for n, pids in enumerate([(), (7,)]))
    assert check(replace(facts, telemetry=Telemetry(gpus=gpus)), "gpus").detail == "2 seen, 1 used by other processes"
    assert check(facts, "gpus").detail == "none: no NVIDIA driver"


def test_a_driver_that_is_missing_or_broken_is_told_unless_nobody_wants_the_gpus(facts: Facts) -> None:
    for state in ("no NVIDIA driver, though an NVIDIA GPU is built in", "the NVIDIA driver does not answer: unknown error"):
        sick = replace(facts, gpu_state=state)
        assert state in check(sick, "gpus").detail and not check(sick, "gpus").ok
        assert check(replace(sick, gpus_wanted=False), "gpus").ok
    assert "install" in check(replace(facts, gpu_state="no NVIDIA driver, though an NVIDIA GPU is built in"), "gpus").fix


def test_a_gpu_that_fails_or_is_cut_into_parts_is_told(facts: Facts) -> None:
    gpus = tuple(Gpu(index=n, uuid="", name="", memory_bytes=1, mig_mode=n == 2) for n in range(3))
    two = replace(facts, gpu_state="", telemetry=Telemetry(gpus=gpus[:2]), gpu_faults={1: "it must be reset"})
    assert check(two, "gpus").detail == "1 of 2 can't be used: GPU 1: it must be reset"
    parted = check(replace(facts, gpu_state="", telemetry=Telemetry(gpus=gpus)), "gpus")
    assert (parted.ok, parted.detail) == (False, "1 of 3 can't be used: in MIG mode: GPU 2")
    assert "-i 2 -mig 0" in parted.fix and "says of it" not in parted.fix
    both = check(replace(two, telemetry=Telemetry(gpus=gpus)), "gpus")
    assert both.detail == "2 of 3 can't be used: GPU 1: it must be reset; in MIG mode: GPU 2"
    assert "nvidia-smi` says" in both.fix and "-i 2 -mig 0" in both.fix and len(both.fix) < 200
    assert check(replace(two, telemetry=Telemetry(gpus=gpus), gpu_faults={2: "it is lost"}), "gpus").detail.endswith("is lost")
    assert host.NO_DRIVER == NO_DRIVER


def test_docker_is_wanted_before_it_is_missed(facts: Facts) -> None:
    assert check(measured(facts, docker=Docker(path="/s", version="27.1")), "docker").detail == "27.1 at /s"
    denied = Docker(path="/s", problem="this user may not use it", denied=True)
    assert check(measured(facts, docker=denied), "docker").ok
    wanted = check(measured(facts, docker=replace(denied, wanted=True)), "docker")
    assert not wanted.ok and "group docker" in wanted.fix


def test_what_keeps_tasks_away_is_said(facts: Facts) -> None:
    young = Telemetry(problem="its machine is not measured yet")
    assert check(replace(facts, telemetry=young, sampled=False), "claims").ok, "as each agent begins"
    assert "draining" in check(replace(facts, telemetry=Telemetry(draining=True)), "claims").detail
    assert "members of group lab" in check(replace(facts, group="lab"), "user").detail
    assert check(measured(facts, git=None), "git").ok


# --- what the agent knows --------------------------------------------------------------------------------------------


def of_an_agent(
    *told: tuple[str, Telemetry, float], now: float = 100.0, own: Telemetry | None = None, sample: Sample | None = None,
    **settings: object,
) -> Facts:  # fmt: skip
    """The facts of `a`, to which these peers have published this, so many seconds ago."""
    others = [gossip.member(name) for name, _, _ in told]
    core, peers = gossip.swim("a", *others), Peers(gossip.member("a"), own or Telemetry(), 0.0)
    for other, (name, telemetry, age) in zip(others, told, strict=True):
        record = Record(other.peer, other.epoch, 1, round(age * 1000), codec.encode(telemetry))
        core.handle_packet(now, gossip.packet(name, records=(record,)), gossip.address(name))
        peers.handle_member(0.0, other)
        peers.handle_record(other.peer, record.data)
    return doctor.gather(
        Measured(), now=now, wall=5_000.0, started=40.0, home=Path("/"), settings=Settings(**settings),  # type: ignore[arg-type]
        port=7733, addresses=(at("10.0.0.1"),), swim=core, peers=peers, gossip={"received": 3, "stalls": 2},
        mdns_problem="", sample=sample, accepted=4,
        keys=doctor.key_ring("k2", ("k2", "k1"), 0, peers), damage={"rows_quarantined": 2, "reserve_used": 1},
    )  # fmt: skip


def test_a_clock_is_compared_with_the_stamp_that_travelled_and_its_age() -> None:
    facts = of_an_agent(
        ("b", Telemetry(wall=4_990.0), 10.0), ("c", Telemetry(wall=5_005.0), 2.0), ("d", Telemetry(), 1.0),
        ("e", Telemetry(wall=float("inf")), 1.0),
    )  # fmt: skip
    assert {peer: round(offset, 3) for peer, offset in facts.clocks.items()} == {peer_for("b"): 0.0, peer_for("c"): 7.0}


def test_a_stamp_that_lay_in_a_socket_while_this_process_stood_still_says_nothing_of_a_clock() -> None:
    others = [gossip.member(name) for name in "bcd"]
    core, peers = gossip.swim("a", *others), Peers(gossip.member("a"), Telemetry(), 0.0)
    for other in others:
        peers.handle_member(0.0, other)

    def read(name: str, version: int, wall: float, now: float) -> None:
        sender = gossip.member(name)
        record = Record(sender.peer, sender.epoch, version, 0, codec.encode(Telemetry(wall=wall)))
        core.handle_packet(now, gossip.packet(name, records=(record,)), gossip.address(name))
        peers.handle_record(sender.peer, record.data)

    def clocks(now: float) -> dict[str, float]:
        seen = doctor.gather(
            Measured(), now=now, wall=5_000.0 + now, started=0.0, home=Path("/"), settings=Settings(), port=7733,
            addresses=(), swim=core, peers=peers, gossip={}, mdns_problem="", sample=None, accepted=None, keys=None, damage={},
        ).clocks  # fmt: skip
        return {peers.name(peer): offset for peer, offset in seen.items()}

    read("b", 1, 5_099.0, 99.0)
    read("c", 1, 5_100.5, 400.0)  # read first thing after 300 s, before anybody noticed that they have passed
    core.handle_stall(400.0, 300.0)
    read("d", 1, 5_100.7, 400.1)  # the rest of what waited
    assert clocks(400.2) == {"b": 0.0}
    core.handle_stall(401.5, 1.2)
    assert clocks(401.6) == {"b": 0.0}, "a stall that follows makes the stamps before it no better"
    read("c", 2, 5_403.0, 403.0)
    read("d", 2, 5_410.0, 403.0)
    assert clocks(403.5) == {"b": 0.0, "c": 0.0, "d": 7.0}


def test_the_facts_are_those_of_the_parts() -> None:
    facts = of_an_agent(("b", Telemetry(), 1.0), bind="::ffff:10.0.0.1", gpus="none", group="lab")
    assert facts.damage == {"rows_quarantined": 2}
    assert list(facts.links) == [peer_for("b")] and facts.links[peer_for("b")].heard_seconds == 0.0
    assert (facts.running_seconds, facts.stalls, facts.udp_received, facts.tcp_accepted) == (60.0, 2, 3, 4)
    assert (facts.bind, facts.gpus_wanted, facts.group, facts.damped_seconds, facts.health) == (
        "10.0.0.1",
        False,
        "lab",
        0.0,
        0,
    )
    assert (facts.clone, facts.silent, facts.gpu_state, facts.sampled) == (None, False, "", False)
    assert len(doctor.examine(facts)) == len(doctor.CHECKS)


def test_a_gpu_that_tasks_may_not_have_or_that_is_in_use_has_no_fault() -> None:
    gpus = [Gpu(index=index, uuid="", name="", memory_bytes=1, problem="it is lost" if index else "") for index in range(3)]
    sample = Sample(
        cpus=1, cpu_percent=None, load_1m=None, memory_bytes=1, memory_used_bytes=0, disk_free_bytes=None, disk_read_bps=None,
        disk_write_bps=None, net_rx_bps=None, net_tx_bps=None, gpus=tuple(gpus), gpu_problem="",
    )  # fmt: skip
    facts = of_an_agent(own=Telemetry(gpus=tuple(gpus[:2])), sample=sample)
    assert (facts.gpu_faults, facts.sampled) == ({1: "it is lost"}, True)


def test_who_reports_keys_but_not_the_one_in_use_lacks_it() -> None:
    facts = of_an_agent(("b", Telemetry(keys=("k1",)), 1.0), ("c", Telemetry(keys=("k2", "k1")), 1.0), ("d", Telemetry(), 1.0))
    assert facts.keys == KeyRing(in_use="k2", held=("k2", "k1"), lacking=("b",))
