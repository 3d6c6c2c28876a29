"""Whole meshes of real gossip cores on virtual time, with the faults of real networks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from meshq.gossip.member import Liveness
from meshq.ids import PeerId
from tests.simulator.gossip_peer import GossipPeer, Mesh
from tests.simulator.world import Network, World


def started(seed: int, count: int, *, loss: float = 0.0, duplication: float = 0.0) -> tuple[World, Mesh, list[GossipPeer]]:
    """A mesh in which everybody joined by the first peer, and knows everybody."""
    world = World(seed)
    mesh = Mesh(world, Network(world, loss=loss, duplication=duplication))
    peers = [mesh.add(f"peer-{number}") for number in range(count)]
    for peer in peers:
        peer.start(peers[:1])
    assert world.run_until_true(mesh.converged, world.now + 60)
    return world, mesh, peers


def liveness(peer: GossipPeer, other: PeerId) -> Liveness | None:
    member = peer.core.member(other)
    return None if member is None else member.liveness


def false_deaths(peers: list[GossipPeer]) -> int:
    """How often somebody who ran was declared dead."""
    return sum(1 for peer in peers for _, change in peer.changes if change.after.liveness is Liveness.DEAD)


@pytest.mark.parametrize("count", [2, 3, 10, 30])
def test_peers_that_joined_by_one_seed_know_each_other_within_seconds(count: int) -> None:
    world, _, _ = started(1, count)
    assert world.now < 5


@pytest.mark.parametrize("seed", range(5))
def test_a_crash_is_noticed_by_everybody_and_by_nobody_too_late(seed: int) -> None:
    world, _, peers = started(seed, 5)
    world.run_until(world.now + 20)
    peers[2].crash()
    crashed_at = world.now
    others = [peer for peer in peers if peer is not peers[2]]
    assert world.run_until_true(lambda: all(liveness(p, peers[2].id) is Liveness.DEAD for p in others), crashed_at + 15)
    assert world.now - crashed_at >= 4, "nobody may be buried before the shortest suspicion is over"
    assert all(liveness(a, b.id) is Liveness.ALIVE for a in others for b in others)


def test_a_crash_in_a_mesh_of_two_is_noticed_too() -> None:
    world, _, peers = started(3, 2)
    peers[1].crash()
    assert world.run_until_true(lambda: liveness(peers[0], peers[1].id) is Liveness.DEAD, world.now + 12)


@pytest.mark.parametrize("seed", range(3))
def test_with_a_third_of_all_packets_lost_suspects_refute_and_nobody_dies(seed: int) -> None:
    world, mesh, peers = started(seed, 10)
    mesh.network.loss = 0.33
    world.run_until(world.now + 180)
    assert mesh.network.traffic.dropped > 1000
    assert sum(len(peer.refuted) for peer in peers) > 0, "connections lose packets too: TCP cannot answer for everybody in time"
    assert false_deaths(peers) == 0
    mesh.network.loss = 0.0
    assert world.run_until_true(mesh.converged, world.now + 30)


def test_peers_that_stand_still_for_a_moment_again_and_again_are_suspected_refute_and_never_die() -> None:
    world, _, peers = started(1, 10)
    rng = world.rng_for("pauses")
    until = world.now + 180
    while world.now < until:
        rng.choice(peers[:2]).pause(rng.uniform(1.0, 2.5))
        world.run_until(world.now + rng.uniform(3, 5))
    suspicions = sum(change.after.liveness is Liveness.SUSPECT for peer in peers for _, change in peer.changes)
    assert suspicions > 0 and sum(len(peer.refuted) for peer in peers) > 0
    assert false_deaths(peers) == 0


def test_a_restarted_peer_replaces_its_old_run_at_once() -> None:
    world, mesh, peers = started(4, 5)
    peers[3].crash()
    world.run_until(world.now + 0.5)
    peers[3].start([peers[0]])
    restarted_at = world.now
    assert world.run_until_true(mesh.converged, restarted_at + 2)
    assert all(member.epoch == 2 for p in peers if (member := p.core.member(peers[3].id)) is not None)


def test_a_peer_that_leaves_is_gone_everywhere_without_a_suspicion() -> None:
    world, _, peers = started(5, 6, loss=0.1)
    peers[1].leave()
    others = [peer for peer in peers if peer is not peers[1]]
    assert world.run_until_true(lambda: all(liveness(p, peers[1].id) is Liveness.LEFT for p in others), world.now + 3)
    world.run_until(world.now + 60)
    assert all(liveness(p, peers[1].id) is Liveness.LEFT for p in others)


@pytest.mark.parametrize("hours", [0.05, 0.5])
def test_a_partition_of_any_length_heals_by_itself(hours: float) -> None:
    world, mesh, peers = started(6, 6)
    mesh.network.partition([[peer.name for peer in peers[:2]], [peer.name for peer in peers[2:]]])
    world.run_until(world.now + hours * 3600)
    assert mesh.network.traffic.cut > 0
    assert all(liveness(a, b.id) is Liveness.DEAD for a in peers[:2] for b in peers[2:])
    mesh.network.heal()
    assert world.run_until_true(mesh.converged, world.now + 60)


def test_a_single_peer_that_was_cut_off_comes_back() -> None:
    world, mesh, peers = started(7, 5)
    mesh.network.partition([[peers[0].name], [peer.name for peer in peers[1:]]])
    world.run_until(world.now + 120)
    mesh.network.heal()
    assert world.run_until_true(mesh.converged, world.now + 60)


def test_a_site_that_was_switched_off_comes_together_by_its_snapshots() -> None:
    world, mesh, peers = started(8, 4)
    world.run_until(world.now + 5)
    snapshots = [peer.core.known_peers(world.now) for peer in peers]
    for peer in peers:
        peer.crash()
    world.run_until(world.now + 3600)
    for peer, snapshot in zip(peers, snapshots, strict=True):
        peer.start()
        peer.perform(peer.core.remember(world.now, snapshot))
        world.run_until(world.now + 15)
    assert world.run_until_true(mesh.converged, world.now + 60)


def test_a_peer_that_hung_for_a_while_buries_nobody() -> None:
    world, mesh, peers = started(9, 5)
    world.run_until(world.now + 10)
    peers[0].pause(40)
    world.run_until(world.now + 45)
    assert all(liveness(peer, peers[0].id) is not None for peer in peers)
    assert any(change.after.liveness is Liveness.DEAD for peer in peers[1:] for _, change in peer.changes)
    assert false_deaths(peers[:1]) == 0
    assert world.run_until_true(mesh.converged, world.now + 60)
    assert peers[0].core.counters["stalls"] > 0


def test_a_link_that_is_deaf_in_one_direction_kills_nobody_else() -> None:
    world, mesh, peers = started(10, 5)
    mesh.network.cut(peers[0].name, peers[1].name)
    world.run_until(world.now + 120)
    assert mesh.network.traffic.cut > 0
    assert false_deaths(peers) == 0, "helpers reach both, so nobody has a reason to believe in a death"


def test_a_home_restored_from_a_backup_outbids_its_own_future() -> None:
    world, mesh, peers = started(11, 4)
    for _ in range(3):
        peers[2].crash()
        peers[2].start([peers[0]])
        assert world.run_until_true(mesh.converged, world.now + 30)
    peers[2].crash()
    world.run_until(world.now + 30)
    peers[2].epoch = 0
    peers[2].start([peers[0]])
    assert world.run_until_true(mesh.converged, world.now + 10)
    assert peers[2].core.me.epoch == 5
    assert peers[2].epoch == 5


def test_telemetry_reaches_everybody_in_spite_of_loss() -> None:
    world, _, peers = started(12, 10, loss=0.2)
    for peer in peers:
        peer.publish(peer.name.encode() * 20)
    assert world.run_until_true(
        lambda: all(a.core.record(b.id) == b.name.encode() * 20 for a in peers for b in peers), world.now + 20
    )
    age = peers[0].core.record_age(world.now, peers[9].id)
    assert age is not None and 0 <= age <= 20


def test_telemetry_of_a_newcomer_and_for_a_newcomer_arrives_within_seconds() -> None:
    world, mesh, peers = started(13, 5)
    for peer in peers:
        peer.publish(b"old " + peer.name.encode())
    world.run_until(world.now + 5)
    late = mesh.add("late")
    late.start([peers[0]])
    late.publish(b"new")
    everything = [*peers, late]
    assert world.run_until_true(
        lambda: all(a.core.record(b.id) is not None for a in everything for b in everything), world.now + 5
    )


@pytest.mark.parametrize("seed", range(12))
def test_after_any_faults_the_living_agree(seed: int) -> None:
    world, mesh, peers = started(seed, 7)
    rng = world.rng_for("faults")
    network = mesh.network
    network.loss, network.duplication, network.delay = 0.15, 0.1, (0.0005, 0.2)
    for _ in range(12):
        peer = rng.choice(peers)
        match rng.choice(["crash", "restart", "pause", "cut", "partition", "heal"]):
            case "crash" if peer.swim is not None and len(mesh.running()) > 2:
                peer.crash()
            case "restart" if peer.swim is None:
                peer.start([each for each in peers if each is not peer])
            case "pause" if peer.swim is not None:
                peer.pause(rng.uniform(0.2, 8))
            case "cut":
                network.cut(peer.name, rng.choice(peers).name)
            case "partition":
                split = rng.randint(1, 6)
                network.partition([[each.name for each in peers[:split]], [each.name for each in peers[split:]]])
            case _:
                network.heal()
        world.run_until(world.now + rng.uniform(0.5, 20))
    assert network.traffic.dropped > 0 and network.traffic.duplicated > 0
    network.heal()
    network.loss = network.duplication = 0.0
    assert world.run_until_true(mesh.converged, world.now + 120)


def story(seed: int) -> str:
    """A run with a bit of everything; its trace."""
    world, mesh, peers = started(seed, 6, loss=0.1, duplication=0.1)
    peers[1].crash()
    peers[2].publish(b"hello")
    world.run_until(world.now + 20)
    peers[1].start([peers[3]])
    peers[4].leave()
    world.run_until(world.now + 20)
    assert mesh.network.traffic.dropped > 0
    return world.trace_hash()


def test_one_seed_makes_one_history() -> None:
    assert story(1) == story(1) != story(2)


def test_the_history_does_not_depend_on_the_hash_seed_of_the_process() -> None:
    code = "from tests.simulator.test_gossip import story; print(story(1))"
    root = Path(__file__).parents[2]
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(root)},
            capture_output=True, check=True, text=True, cwd=root,
        ).stdout.strip()
        for hash_seed in ("1", "2")
    ]  # fmt: skip
    assert outputs == [story(1)] * 2
