"""The facts of a check-up, collected from the parts of a running agent."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from meshq.doctor.facts import Facts, KeyRing, Measured
from meshq.doctor.measuring import find_uv
from meshq.exec.confine import landlock_abi
from meshq.exec.probe import Sample
from meshq.gossip.addresses import normal_bind
from meshq.gossip.member import Address
from meshq.gossip.swim import Swim
from meshq.ids import PeerId
from meshq.peers import Peers
from meshq.settings import Settings, default_name
from meshq.task import Telemetry

DAMAGE: Final = ("rows_quarantined", "tables_damaged", "databases_damaged")  # counters of the ledger's store


def gather(
    measured: Measured, *, now: float, wall: float, started: float, home: Path, settings: Settings, port: int,
    addresses: tuple[Address, ...], swim: Swim, peers: Peers, gossip: Mapping[str, int], mdns_problem: str,
    sample: Sample | None, accepted: int | None, keys: KeyRing | None, damage: Mapping[str, int],
    other_meshes: Sequence[str] = (),
) -> Facts:  # fmt: skip
    """`now` and `started` (of this agent) on the clock of `swim`, `wall` the time of day; `gossip`: its counters; `accepted`:
    connections of others to the peer port so far."""
    others = peers.others_alive()
    links = {peer: link for peer in others if (link := swim.connectivity(now, peer)) is not None}
    return Facts(
        me=swim.me,
        members=peers.members(),
        remembered=peers.remembered(),
        other_meshes=other_meshes,
        telemetry=peers.telemetry(swim.me.peer),
        links=links,
        clocks=_clocks(now, wall, swim, peers),
        keys=keys,
        clone=swim.clone,
        silent=swim.silent,
        damped_seconds=swim.damped(now),
        health=swim.health,
        stalls=gossip.get("stalls", 0),
        running_seconds=now - started,
        udp_received=gossip.get("received"),
        tcp_accepted=accepted,
        home=home,
        uid=os.geteuid(),
        group=settings.group,
        port=port,
        bind=normal_bind(settings.bind or ""),
        profile=settings.profile,
        profiles={peer: told for peer in others if (told := peers.telemetry(peer).profile)},
        addresses=addresses,
        mdns=settings.mdns,
        mdns_problem=mdns_problem,
        wanted_name=settings.name or default_name(),
        gpus_wanted=settings.gpus != "none",
        sampled=sample is not None,
        gpu_state=sample.gpu_problem if sample is not None else "",
        gpu_faults=_gpu_faults(sample, peers.telemetry(swim.me.peer)),
        landlock_abi=landlock_abi(),
        uv=find_uv(),
        measured=measured,
        damage={name: damage[name] for name in DAMAGE if damage.get(name)},
    )


def key_ring(in_use: str, held: Sequence[str], strangers: int, peers: Peers) -> KeyRing:
    """The fact about keys, from what the live peers report. Who reports none has said nothing yet, or is too old to."""
    said = {peer: peers.telemetry(peer).keys for peer in peers.others_alive()}
    lacking = [peers.name(peer) for peer, ids in said.items() if ids and in_use not in ids]
    return KeyRing(in_use=in_use, held=tuple(held), lacking=tuple(lacking), strangers=strangers)


def _gpu_faults(sample: Sample | None, told: Telemetry) -> dict[int, str]:
    """What is wrong with the GPUs that tasks may have. That somebody uses one is no fault of it."""
    allowed = [gpu.index for gpu in told.gpus]
    return {gpu.index: gpu.problem for gpu in (sample.gpus if sample else ()) if gpu.problem and gpu.index in allowed}


def _clocks(now: float, wall: float, swim: Swim, peers: Peers) -> dict[PeerId, float]:
    """Seconds by which each live peer's clock is ahead of this one's: its stamp, plus the age of what carried it.

    A stamp that lay in a socket while this process was stopped, or the machine suspended, would make a right clock look wrong.
    """
    offsets = {}
    for peer in peers.others_alive():
        stamp, age = peers.telemetry(peer).wall, swim.record_age(now, peer)
        if stamp > 0 and age is not None and not swim.read_late(peer):
            offsets[peer] = stamp + age - wall
    return offsets
