"""The doctor's questions about the mesh: who is there, whether they agree with this peer, and whether they count on it."""

from collections.abc import Mapping
from ipaddress import ip_address
from statistics import median_high, median_low
from typing import Final

from meshq.config import Home
from meshq.doctor.facts import Check, Facts, fine, named, wrong
from meshq.doctor.network import isolated
from meshq.ids import PeerId
from meshq.peers import is_alive

SKEW_MAX: Final = 2.0  # seconds; the age of telemetry is known to a fraction of that, unless an agent is held up


def peers(facts: Facts) -> Check:
    """Is anybody there, and who should be and is not?"""
    alive, gone = len(facts.others_alive()) + 1, facts.gone()
    names = named([member.name for member in gone])
    if alive == 1 and facts.other_meshes:
        return _beside_another(facts.other_meshes[0], names)
    if alive == 1 and gone:
        fix = "look at this machine's network, and whether their agents run"
        return wrong("peers", f"alone: none of the others answers ({names})", fix)
    if alive == 1:
        return wrong("peers", f"alone{_unheard(facts)}", _invitation(facts))
    if len(gone) > alive:
        detail = f"only {alive} of {alive + len(gone)} are alive, so it may be this side that is cut off; silent: {names}"
        return wrong("peers", detail, "look at the network of this machine first")
    if gone:
        fix = "look whether they are on, their agents run (`meshq join` there) and their network works"
        return wrong("peers", f"{alive} alive; these do not answer: {names}", fix)
    return fine("peers", f"{alive} alive")


def _beside_another(place: str, gone: str) -> Check:
    """This machine began a mesh of its own, or its mesh has changed the key meanwhile."""
    silent = f" (none of the others answers: {gone})" if gone else ""
    renewed = "`meshq key install --key-file F; meshq key use ID` if it is this mesh with a new key, else " if gone else ""
    over = f"`meshq leave; meshq join --new --key-file F --seed {place}` to move over"
    fix = f"with what `meshq key` prints there in F: {renewed}{over}"
    return wrong("peers", f"alone{silent}, but a mesh is in sight at {place}: its key is another than this machine's", fix)


def _invitation(facts: Facts) -> str:
    """The command that joins another machine to this one."""
    if facts.bind and ip_address(facts.bind).is_loopback:
        return "this agent listens on loopback only: for others to join it, `meshq join --bind 0.0.0.0` here"
    if isolated(facts):
        return "connect this machine first: see `addresses`"
    seed = str(facts.addresses[0])
    profile = "" if facts.profile == "lan" else f" --profile {facts.profile}"
    return f"on another machine run `meshq join --key-file F --seed {seed}{profile}`, with what `meshq key` prints in F"


def _unheard(facts: Facts) -> str:
    """Why mDNS may have found nobody."""
    probes = facts.measured.probes
    if not facts.mdns or not probes or any(probe.heard for probe in probes):
        return ""
    return "; no other machine's mDNS is heard, so nobody is near or the network filters multicast"


def identity(facts: Facts) -> Check:
    """Does another agent run with this identity?"""
    other = facts.clone
    if other is None:
        return fine("identity", f"{facts.me.peer[:8]}, and nobody else has it")
    where = f"{other.name} at {other.addresses[0] if other.addresses else 'an unknown address'}"
    newer = "this agent is the newer, so it is silent and" if facts.silent else "that one is the newer, so it"
    place = str(Home(facts.home).identity) if facts.silent else "trust/identity.key in the copy's home"
    fix = f"if a home was copied, stop the agent of the copy, remove {place}, and join again; this clears within minutes"
    return wrong("identity", f"{where} has this very identity, too; {newer} claims nothing", fix)


def name(facts: Facts) -> Check:
    """Is this peer called what it was meant to be called?"""
    mine = facts.me.name
    twins = [member for member in facts.members if member.name == mine and member.peer != facts.me.peer and is_alive(member)]
    fix = "choose another name with `meshq join --name`"
    if twins:
        return wrong("name", f"another peer is called {mine}, too", fix)
    if facts.wanted_name and mine != facts.wanted_name:
        return wrong("name", f"another peer is called {facts.wanted_name}, so this one is {mine}", fix)
    return fine("name", mine)


def version(facts: Facts) -> Check:
    """Do all run the same meshq?"""
    versions = {member.peer: member.version for member in facts.others_alive()}
    return _same_everywhere(
        facts, "version", facts.me.version, versions, "install one version everywhere, and `meshq join` again"
    )


def profile(facts: Facts) -> Check:
    """Do all take as long to hold a machine dead, and its leases for over?"""
    fix = "run `meshq join --profile P` with one P on every machine"
    return _same_everywhere(facts, "profile", facts.profile, facts.profiles, fix)


def _same_everywhere(facts: Facts, name: str, mine: str, theirs: Mapping[PeerId, str], fix: str) -> Check:
    """`theirs`: what the other peers have; empty if they don't say."""
    others: dict[str, list[str]] = {}
    for member in facts.others_alive():
        other = theirs.get(member.peer, "")
        if other and other != mine:
            others.setdefault(other, []).append(member.name)
    if not others:
        return fine(name, mine)
    differ = "; ".join(f"{other}: {named(names)}" for other, names in sorted(others.items())[:4])
    return wrong(name, f"this peer has {mine}, others differ: {differ}", fix)


def clock(facts: Facts) -> Check:
    """Is this machine's clock right, as far as the others' show it?"""
    offsets = sorted(facts.clocks.values())
    if not offsets:
        return fine("clock", "nothing to compare it with yet")
    middle = min(median_low(offsets), median_high(offsets), key=abs)  # of an even number: in doubt for this machine
    if abs(middle) <= SKEW_MAX:
        off = {peer for peer, offset in facts.clocks.items() if abs(offset) > SKEW_MAX}
        strays = f"; these are off: {facts.names(off)}" if off else ""
        return fine("clock", f"within {max(0.1, abs(middle)):.1f} s of the others{strays}")
    direction = "behind" if middle > 0 else "ahead of"
    if len(offsets) == 1:
        other = facts.names(facts.clocks.keys())
        detail = f"{_seconds(middle)} {direction} {other}'s: one of the two is wrong"
    else:
        detail = f"{_seconds(middle)} {direction} the clocks of most others"
    detail += "; times are shown wrong and downloads may be refused (meshq's leases do not depend on it)"
    return wrong("clock", detail, "set it by the network: `timedatectl set-ntp true`, or install chrony")


def _seconds(offset: float) -> str:
    """`2.1 s`, `7 min`, `2.5 h`, `400 days`, and no number that a liar made long."""
    for length, limit, unit in ((1.0, 120.0, "s"), (60.0, 120.0, "min"), (3_600.0, 48.0, "h"), (86_400.0, 10_000.0, "days")):
        if (amount := abs(offset) / length) < limit:
            return f"{amount:.{1 if amount < 9.95 else 0}f} {unit}"
    return "many years"


def keys(facts: Facts) -> Check:
    """Has this peer the mesh's key, and have all others the one that is in use?"""
    ring = facts.keys
    if ring is None:
        return fine("keys", "one mesh key")
    again = "take over what `meshq key` prints on a machine of the mesh: `meshq key install --key-file F`, `meshq key use ID`"
    if ring.in_use not in ring.held:
        return wrong("keys", f"the mesh uses the key {ring.in_use}, which this peer does not have", again)
    if ring.strangers and not facts.others_alive():
        detail = f"{ring.strangers} that were called have another key: the mesh may have changed it while this machine was off"
        return wrong("keys", detail, again)
    if ring.lacking:
        detail = f"these do not have the key in use, {ring.in_use}, and will be cut off from the others: {named(ring.lacking)}"
        fix = "`meshq key install --key-file F`, with what `meshq key` prints in F, hands it to all that are there"
        return wrong("keys", detail, fix)
    more = f", {len(ring.held) - 1} more installed" if len(ring.held) > 1 else ""
    return fine("keys", f"{ring.in_use} in use{more}")


def flapping(facts: Facts) -> Check:
    """Is this peer suspected again and again?"""
    if facts.damped_seconds <= 0:
        return fine("flapping", "not suspected again and again")
    detail = f"held suspect 3 times within a minute: claims nothing for {facts.damped_seconds:.0f} s"
    return wrong("flapping", detail, "see `health` (an agent without CPU) and `udp` (a network that loses packets)")
