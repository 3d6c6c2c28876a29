"""The doctor's questions about the network: do UDP, TCP and multicast pass, and do others know an address that leads here?"""

from collections.abc import Mapping, Sequence
from ipaddress import ip_address
from typing import Final

from meshq.doctor.facts import Check, Facts, Probe, fine, wrong
from meshq.gossip.addresses import ALL_HOSTS, Interface, Reach
from meshq.gossip.member import Address
from meshq.ids import PeerId

PATIENCE: Final = 300.0  # within which some other peer has surely begun a push/pull with this one
INTERFACES_NAMED_MAX: Final = 4
UNTRIED: Final = "not tried with anybody yet"
NOBODY: Final = "nobody is there to try it with"


def udp(facts: Facts) -> Check:
    """Does UDP get to the others and back?"""
    links = facts.links
    known = [peer for peer, link in links.items() if link.udp is not None]
    blocked = [peer for peer in known if links[peer].udp is False and links[peer].tcp is not False]
    if not blocked:
        good = sum(1 for peer in known if links[peer].udp)
        tried = f"to {good} of {len(links)} and back" if good else UNTRIED
        return fine("udp", f"port {facts.port}; {tried if links else NOBODY}")
    names, matters = facts.names(blocked), "though TCP does: failures are noticed later and gossip costs more"
    here = f"open UDP port {facts.port} in the firewall ({_allow(facts.port, 'udp')})"
    if len(blocked) < len(known):
        fix = f"open UDP port {_ports(facts, blocked)} in the firewall there; `meshq doctor` there says more"
        return wrong("udp", f"UDP does not get to {names} and back, {matters}", fix)
    if len(blocked) == 1:
        return wrong("udp", f"UDP does not pass between here and {names}, {matters}", f"{here}, on both machines")
    what = "no UDP packet ever got here" if facts.udp_received == 0 else "UDP from here gets to nobody and back"
    return wrong("udp", f"{what}, {matters}", here)


def tcp(facts: Facts) -> Check:
    """Does TCP get to the others, and from them to here?"""
    links = facts.links
    failing, matters = [peer for peer, link in links.items() if link.tcp is False], "tasks, code and logs travel by TCP"
    if failing:
        return wrong("tcp", f"{_lost(facts, failing)}: {matters}", _opening(facts, failing))
    if links and facts.tcp_accepted == 0 and facts.running_seconds > PATIENCE:
        detail = f"nobody has reached this peer by TCP in {facts.running_seconds / 60:.0f} min: {matters}"
        return wrong("tcp", detail, f"open TCP port {facts.port} in the firewall ({_allow(facts.port, 'tcp')})")
    good = sum(1 for link in links.values() if link.tcp)
    tried = f"to {good} of {len(links)}{', the others were not tried yet' if good < len(links) else ''}" if good else UNTRIED
    came = f"; {facts.tcp_accepted} connections came in" if facts.tcp_accepted else ""
    return fine("tcp", f"port {facts.port}; {tried if links else NOBODY}{came}")


def _lost(facts: Facts, failing: Sequence[PeerId]) -> str:
    """To whom TCP does not get, and what else does."""
    links = facts.links
    neither = [peer for peer in failing if links[peer].udp is False or links[peer].silent]
    rest = [peer for peer in failing if peer not in neither]
    though = ", though UDP does" if all(links[peer].udp for peer in rest) else ""
    lost = [f"TCP does not get to {facts.names(rest)}{though}"] if rest else []
    lost += [f"neither UDP nor TCP gets to {facts.names(neither)}, held alive by others"] if neither else []
    return "; ".join(lost)


def _opening(facts: Facts, failing: Sequence[PeerId]) -> str:
    """What to do where TCP does not get to these."""
    port = _ports(facts, failing)
    if len(failing) == len(facts.links) > 1:
        return f"let TCP out to port {port} in the firewall of this machine, and what answers in"
    return f"open TCP port {port} in the firewall there ({_allow(port, 'tcp')}), and look at those on the way there"


def _ports(facts: Facts, peers: Sequence[PeerId]) -> int:
    """The port that most of these listen on; nearly always the same everywhere."""
    ports = [address.port for peer in peers if (address := facts.links[peer].address) is not None]
    return max(sorted(set(ports)), key=ports.count) if ports else facts.port


def _allow(port: int, kind: str) -> str:
    return f"`ufw allow {port}/{kind}`, or `firewall-cmd --permanent --add-port={port}/{kind}`"


def discovery(facts: Facts) -> Check:
    """Does multicast work here, so that machines find each other without --seed?"""
    probes = facts.measured.probes
    working = {probe.interface for probe in probes if probe.came_back}  # by either family: one is enough to find each other
    silent = [probe for probe in probes if probe.interface not in working and not _aside(facts, probe)]
    matters = "so machines do not find each other here"
    if not facts.mdns:
        return fine("discovery", "mDNS is off (--no-mdns); peers are found by --seed and by memory")
    if silent:
        causes = ", ".join(sorted({probe.problem or "a firewall drops it" for probe in silent}))
        fix = "let UDP port 5353 pass (`ufw allow 5353/udp`), or join with `--seed HOST:PORT`"
        return wrong("discovery", f"multicast does not work on {_on(silent)}, {matters}: {causes}", fix)
    if facts.mdns_problem:
        fix = "mend that, or join with `--seed HOST:PORT`"
        return wrong("discovery", f"mDNS does not work, {matters}: {facts.mdns_problem}", fix)
    if not working:
        return fine("discovery", "mDNS announces and listens")
    heard = max(probe.heard for probe in probes)
    others = f"{heard} other machine{'s' if heard > 1 else ''} heard" if heard else "no other machine is heard there"
    return fine("discovery", f"multicast works on {_on([each for each in probes if each.came_back])}; {others}")


def _aside(facts: Facts, probe: Probe) -> bool:
    """In tunnels and on the bridges for containers nobody has to be found."""
    return any(each.name == probe.interface and each.reach is not Reach.NETWORK for each in facts.measured.interfaces)


def _on(probes: Sequence[Probe]) -> str:
    """`eth0 (10.0.0.1), wlan0 (10.0.1.7)`: each interface once."""
    hosts = {probe.interface: probe.host for probe in reversed(probes)}
    shown = [f"{name} ({host})" for name, host in sorted(hosts.items())]
    return ", ".join(shown[:INTERFACES_NAMED_MAX])


def addresses(facts: Facts) -> Check:
    """Which addresses others are told, and why these."""
    where = _where(facts)
    if facts.bind not in ALL_HOSTS:
        return _bound(facts, where)
    if all(ip_address(each.host).is_loopback for each in facts.addresses):
        detail = "nothing but loopback has an address that others can use, so no other machine can reach this one"
        return wrong("addresses", detail, "connect the machine (cable, Wi-Fi, DHCP); `ip address` shows what it has")
    good = [_shown(each, where.get(each.host)) for each in facts.addresses if _leads_here(each, where)]
    last = [_shown(each, where.get(each.host)) for each in facts.addresses if not _leads_here(each, where)]
    if not good:
        detail = f"only addresses that lead nowhere from other machines: {', '.join(last)}"
        return wrong("addresses", detail, "connect the machine, or name the right address with `meshq join --bind`")
    reserve = f"; only if these fail {', '.join(last)}" if last else ""
    return fine("addresses", f"others are told {', '.join(good)}{reserve}")


def isolated(facts: Facts) -> bool:
    """Whether this machine has no network: then nobody answers, and that says nothing of its agent."""
    if facts.bind in ALL_HOSTS:
        return not any(_leads_here(each, _where(facts)) for each in facts.addresses)
    return not _bound(facts, _where(facts)).ok


def _where(facts: Facts) -> dict[str, Interface]:
    """The interface that has each address; empty if that could not be looked at."""
    return {host: interface for interface in facts.measured.interfaces for host in interface.hosts}


def _leads_here(address: Address, where: Mapping[str, Interface]) -> bool:
    """From other machines, as far as is known."""
    via = where.get(address.host)
    return not ip_address(address.host).is_loopback and (via is None or (via.reach is not Reach.INNER and via.carrier))


def _bound(facts: Facts, where: Mapping[str, Interface]) -> Check:
    """What somebody chose is right as long as it is there: also loopback, or the bridge for containers."""
    via = where.get(facts.bind)
    shown, anywhere = _shown(Address(facts.bind, facts.port), via), "join with `--bind 0.0.0.0` for all addresses"
    if ip_address(facts.bind).is_loopback:
        return fine("addresses", f"agents on this machine alone are told {shown}, by --bind")
    if where and via is None:
        detail = f"bound to {facts.bind} by --bind, but no interface has that address any more: others cannot reach this peer"
        return wrong("addresses", detail, f"join with an address of this machine, or {anywhere}")
    if via is not None and not via.carrier:
        return wrong("addresses", f"bound to {shown} by --bind: others cannot reach this peer", f"connect it, or {anywhere}")
    return fine("addresses", f"others are told {shown}, by --bind")


def _shown(address: Address, via: Interface | None) -> str:
    """`10.0.0.1:7733 (eth0)`, with what is special about the interface."""
    if via is None:
        return str(address)
    kind = {Reach.NETWORK: "", Reach.TUNNEL: ", a tunnel", Reach.INNER: ", for containers"}[via.reach]
    return f"{address} ({via.name}{kind}{'' if via.carrier else ', unplugged'})"
