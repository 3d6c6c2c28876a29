"""The experiments with gossip: each scenario does its harm and measures it, and the numbers can be bad."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.simulator.gossip_peer import Request
from tests.simulator.trials import report, scenarios, table
from tests.simulator.trials.__main__ import main
from tests.simulator.trials.pool import run_all
from tests.simulator.trials.scenarios import run_trial
from tests.simulator.trials.setup import Result, Scenario, Setup, spread
from tests.simulator.trials.trial import COLD_PEERS_MAX, Trial
from tests.simulator.world import Network, World

HASTY = (("suspicion_multiplier", 0.3), ("suspicion_max_multiplier", 1.0))
FORGETFUL = (("dead_kept", 90.0), ("left_kept", 90.0))


def trial(scenario: Scenario, **rest: object) -> Result:
    return run_trial(replace(Setup(scenario=scenario, peers=6, record_bytes=0), **rest))  # type: ignore[arg-type]  # a shorthand


def figure(result: Result, name: str) -> list[float]:
    return report.pooled([result], name)


def test_a_crash_is_timed_from_the_first_who_knows_to_the_last() -> None:
    result = trial(Scenario.CRASH)
    [first], [last] = figure(result, scenarios.FIRST_DEAD), figure(result, scenarios.ALL_DEAD)
    assert 4.0 <= first <= last <= 13.0
    assert result.happened["crashes"] == 1
    [slow] = figure(trial(Scenario.CRASH, config=(("suspicion_multiplier", 12.0),)), scenarios.FIRST_DEAD)
    assert slow > 12.0, "what is measured is what the core does"


def test_a_change_is_timed_until_everybody_knows() -> None:
    result = trial(Scenario.CHANGE)
    changes = [scenarios.RENAME, scenarios.LEAVE, scenarios.JOIN]
    assert all(0.0 < seconds < 0.6 for name in changes for seconds in figure(result, name))
    gossip_only = trial(Scenario.CHANGE, peers=12, config=(("direct_members_max", 0), ("gossip_fanout", 1)))
    assert max(figure(gossip_only, scenarios.RENAME)) > 0.2


def test_a_mesh_that_starts_cold_is_timed_until_the_full_view() -> None:
    assert figure(trial(Scenario.COLD), scenarios.FULL_VIEW)[0] < 5.0


def test_an_idle_mesh_says_what_it_costs_and_how_old_telemetry_is() -> None:
    result = trial(Scenario.IDLE, record_bytes=250)
    assert 0.0 < spread(figure(result, "telemetry age (s)")).max < 11.0
    assert max(figure(result, "telemetry age, shown wrong by (s)")) < 0.1
    assert 1.0 < spread(figure(result, "UDP packets sent (/s a peer)")).median < 10.0
    silent = trial(Scenario.IDLE)
    assert "telemetry age (s)" not in silent.figures and silent.counts["telemetry missing"] > 0
    sent = [spread(figure(each, "UDP sent (kB/s a peer)")).median for each in (silent, result)]
    assert sent[0] < sent[1], "telemetry is not free"


def test_bytes_are_those_of_sealed_packets() -> None:
    mesh = Trial(Setup(scenario=Scenario.IDLE, peers=3, record_bytes=0))
    mesh.begin()
    mesh.run(10.0)
    sent = sum(each.bytes_out for each in mesh.counts.traffic.values())
    packets = sum(each.packets_out for each in mesh.counts.traffic.values())
    received = sum(each.bytes_in for each in mesh.counts.traffic.values())
    assert packets > 20 and sent > 47 * packets
    assert abs(sent - received) < 1200, "nothing is lost, but for what is under way"


@pytest.mark.parametrize("seed", range(2))
def test_under_heavy_loss_suspects_refute_and_nobody_dies(seed: int) -> None:
    result = trial(Scenario.LOSS, seed=seed, loss=0.3, seconds=200.0)
    assert result.happened["packets lost"] > 1000
    assert result.wrongs.suspicions > 0 and result.wrongs.deaths == 0


def test_false_deaths_are_seen_where_there_are_any() -> None:
    result = trial(Scenario.LOSS, loss=0.6, seconds=300.0, config=HASTY)
    wrongs = result.wrongs
    assert wrongs.deaths == wrongs.deaths_healthy > 0
    assert wrongs.deaths_believed > 0 and wrongs.views_max > 0 and wrongs.words_min > 0


def test_who_stops_again_and_again_is_not_buried() -> None:
    result = trial(Scenario.STARVED, seconds=120.0)
    assert result.happened["stops"] > 10
    assert result.wrongs.deaths == 0


@pytest.mark.parametrize(("seed", "harm"), [(0, "deaf peers"), (1, "mute peers")])
def test_who_is_deaf_or_mute_persuades_nobody_of_the_death_of_another(seed: int, harm: str) -> None:
    result = trial(Scenario.ONE_WAY, seed=seed, seconds=60.0)
    assert result.happened[harm] == 1 and result.happened["packets cut"] > 0
    assert result.wrongs.deaths > 0, "the victim itself is given up"
    assert result.wrongs.deaths_believed == 0
    assert result.counts["never healed"] == 0


def test_halves_that_were_apart_for_a_minute_come_together() -> None:
    result = trial(Scenario.PARTITION, seconds=60.0, discovery=False)
    assert result.wrongs.deaths > 0 and result.wrongs.deaths_healthy == 0, "nobody is healthy in a partition"
    assert result.counts["never healed"] == 0 and figure(result, scenarios.HEALED)[0] < 60.0


def test_halves_that_forgot_each_other_come_together_by_what_mdns_shows_and_only_by_that() -> None:
    healed = trial(Scenario.PARTITION, seconds=600.0, config=FORGETFUL)
    assert set(figure(healed, scenarios.FORGOTTEN)) == {1.0}
    assert healed.counts["never healed"] == 0 and healed.happened["addresses tried again"] > 0
    alone = trial(Scenario.PARTITION, seconds=600.0, config=FORGETFUL, discovery=False)
    assert alone.counts["never healed"] == 1, "a harness that always says healed says nothing"


def test_who_flaps_is_damped_and_harms_nobody() -> None:
    result = trial(Scenario.FLAPPING, seconds=120.0)
    assert result.happened["cables pulled"] > 5
    assert figure(result, scenarios.DAMPED)[0] > 0
    assert result.wrongs.deaths_healthy == 0 and result.counts["never healed"] == 0


def test_over_a_bridge_the_sides_suspect_each_other_and_agree_in_the_end() -> None:
    result = trial(Scenario.BRIDGE, peers=9, seconds=120.0)
    assert 0.5 < figure(result, scenarios.EQUAL)[0] <= 1.0
    assert result.wrongs.suspicions > 0, "the sides cannot probe each other"
    assert result.counts["never healed"] == 0


def test_where_udp_is_blocked_tcp_serves() -> None:
    result = trial(Scenario.UDP_BLOCKED, seconds=60.0, record_bytes=100)
    assert result.happened["pairs blocked"] == 15
    assert figure(result, scenarios.TOLD_BLOCKED) == [1.0]
    assert result.wrongs.deaths == 0 and figure(result, scenarios.ALL_DEAD)[0] < 15.0
    assert max(figure(result, "UDP packets received (/s a peer)")) == 0.0
    assert min(figure(result, "TCP both ways (kB/s a peer)")) > 0.0


def test_a_large_mesh_begins_with_full_views_and_nothing_to_tell() -> None:
    mesh = Trial(Setup(scenario=Scenario.CRASH, peers=COLD_PEERS_MAX + 8, record_bytes=0))
    mesh.start_warm()
    assert mesh.mesh.converged()
    mesh.run(5.0)
    assert mesh.mesh.converged() and mesh.counts.suspicions == 0
    assert 2.0 < mesh.network.traffic.sent / 5.0 / len(mesh.peers) < 4.0, "a probe, its ack and a digest"


def test_no_timer_is_late() -> None:
    mesh = Trial(Setup(scenario=Scenario.IDLE, peers=4, loss=0.3))
    mesh.begin()
    for _ in range(200):
        mesh.run(0.05)
        assert all(peer.core.deadline() > mesh.world.now for peer in mesh.peers)


def test_an_answer_that_comes_too_late_is_none() -> None:
    mesh = Trial(Setup(scenario=Scenario.IDLE, peers=2, record_bytes=0))
    mesh.begin()
    one, other = mesh.peers
    outcomes: list[str] = []
    other.pause(3.0)
    for patience in (1.0, 9.0):
        Request(
            one, other, 0, patience, lambda target: [target.name.encode()],
            lambda answer: outcomes.append(answer[0].decode()), lambda refused: outcomes.append("failed"),
        )  # fmt: skip
    mesh.run(10.0)
    assert outcomes == ["failed", other.name]


def test_one_seed_makes_one_history_in_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup(scenario=Scenario.LOSS, peers=5, loss=0.2, seconds=60.0)
    monkeypatch.setenv("PYTHONHASHSEED", "7")  # for the processes that are started now
    others = run_all([setup, *(replace(setup, seed=seed, seconds=1.0) for seed in (1, 2, 3))], jobs=2)
    assert [each.setup.seed for each in others] == [0, 1, 2, 3], "in the order that was asked for"
    assert run_trial(setup).trace_hash == others[0].trace_hash
    assert len({each.trace_hash for each in others}) == 4


def test_a_spread_is_of_samples_that_were_measured() -> None:
    of_hundred = spread([float(number) for number in range(100, 0, -1)])
    assert (of_hundred.median, of_hundred.p99, of_hundred.max, of_hundred.samples) == (50.0, 99.0, 100.0, 100)
    assert spread([1.0, 2.0, 9.0]).median == 2.0 and spread([1.0, 2.0, 9.0]).p99 == 9.0


def test_a_trial_that_fails_names_its_setup() -> None:
    with pytest.raises(RuntimeError, match=r"Setup\(scenario=<Scenario.LOSS.*say how much is lost"):
        run_all([Setup(scenario=Scenario.LOSS, peers=3)], jobs=1)


def test_the_report_pools_all_seeds(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    wanted = ["--peers", "4", "--seeds", "2", "--record-bytes", "0", "--jobs", "1", "--scenario", "crash", "--verbose"]
    assert main([*wanted, "--json", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "crash, 4 peers, lan, loss 0%, no telemetry: 2 seeds" in shown
    assert f"{scenarios.FIRST_DEAD}  " in shown and "n=2" in shown and "crashes 2" in shown
    assert [each["setup"]["seed"] for each in json.loads(out.read_text())] == [0, 1]


@pytest.mark.parametrize("wrong", [["--set", "nonsense=1"], ["--loss", "2"], ["--peers", "1"], ["--scenario", "war"]])
def test_wrong_options_get_a_message(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(wrong)
    assert wrong[0] in capsys.readouterr().err


def test_a_row_of_the_table_says_whether_its_goal_was_missed() -> None:
    [cell] = [each for each in table.cells() if each.setup.profile == "fast"]
    result = trial(Scenario.CRASH, profile="fast")
    assert "missed" not in table.line(cell, cell.rows[0], [result])
    late = replace(result, figures={scenarios.ALL_DEAD: (2.5,)})
    assert "**2.50 s**" in table.line(cell, cell.rows[0], [late]) and "**missed**" in table.line(cell, cell.rows[0], [late])


def test_a_row_of_changes_says_how_many_were_known_in_time() -> None:
    cell = next(each for each in table.cells() if each.setup.scenario is Scenario.CHANGE)
    result = replace(trial(Scenario.CHANGE), figures={scenarios.LEAVE: (0.1, 0.2, 0.3, 9.0)})
    shown = table.line(cell, cell.rows[0], [result])
    assert "**0.20 s** (p99 9.00, max 9.00; n=4; 75.0% within 0.6 s)" in shown and "missed" in shown, "the slowest counts"
    quick = replace(result, figures={scenarios.LEAVE: (0.1, 0.2, 0.3, 0.6)})
    assert "missed" not in table.line(cell, cell.rows[0], [quick])


def test_the_table_has_every_cell_and_enough_seeds() -> None:
    cells = table.cells()
    assert {each.setup.scenario for each in cells} == set(Scenario) - {Scenario.COLD}
    few = {(each.setup.scenario, each.setup.peers) for each in cells if each.seeds < 30}
    assert few == {(Scenario.CRASH, 1000), (Scenario.CHANGE, 1000), (Scenario.PARTITION, 10)}
    assert min(each.seeds for each in cells) == 10
    for each in cells:
        each.setup.swim_config()


def test_the_script_runs_them() -> None:
    root = Path(__file__).parents[2]
    ran = subprocess.run(
        ["scripts/simulate", "gossip", "--scenario", "cold", "--peers", "3", "--seeds", "1"],
        cwd=root, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert scenarios.FULL_VIEW in ran.stdout


# ---- the network under them


def test_where_datagrams_are_cut_reliable_messages_pass() -> None:
    world, arrived = World(3), list[str]()
    network = Network(world)
    network.cut_datagrams("a", "b")
    assert not network.send("a", "b", arrived.append, "datagram")
    assert network.send("b", "a", arrived.append, "the other way")
    assert network.send("a", "b", arrived.append, "over a connection", reliable=True)
    world.run_until(1.0)
    network.mend("a", "b")
    assert network.send("a", "b", arrived.append, "mended")
    world.run_until(2.0)
    assert sorted(arrived) == ["mended", "over a connection", "the other way"]


def test_a_connection_needs_both_ways() -> None:
    world, arrived = World(3), list[str]()
    network = Network(world)
    network.cut("a", "b")
    assert not network.send("b", "a", arrived.append, "connection", reliable=True)
    assert network.send("b", "a", arrived.append, "datagram")
    world.run_until(1.0)
    assert arrived == ["datagram"]


def test_a_machine_without_its_agent_refuses_at_once_and_one_without_power_says_nothing() -> None:
    hints: dict[str, tuple[int, float]] = {}
    for way in ("kill", "crash"):
        mesh = Trial(Setup(scenario=Scenario.CRASH, peers=4, record_bytes=0, seed=5))
        mesh.begin()
        one, other = mesh.peers[:2]
        getattr(other, way)()
        failed = one.core.counters["syncs_failed"]
        began = mesh.world.now
        one.perform(one.core.join(began, [other.address]))
        while one.core.counters["syncs_failed"] == failed and mesh.world.now < began + 10.0:
            mesh.run(0.1)
        hints[way] = (one.core.counters["syncs_failed"] - failed, mesh.world.now - began)
    assert hints["kill"][0] == hints["crash"][0] == 1
    assert hints["kill"][1] < 0.5 and hints["crash"][1] >= 5.0
