"""The commands of the contract, against three agents that share their work: what they print and how they exit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes.mesh import Agent, Done, Mesh, wait_for

pytestmark = pytest.mark.xdist_group("processes")

FINAL = ("succeeded", "failed", "cancelled")


def at(agent: Agent) -> tuple[str, str]:
    return ("--label", f"who={agent.name}")


# --- submitting -----------------------------------------------------------------------------------------------------


def test_submit_says_where_the_task_is_stored_and_the_peer_is_more_than_one(shared_mesh: Mesh, ada: Agent) -> None:
    gate = shared_mesh.gate("stored")
    gate.open()
    document = ada.run("submit", "--json", "--name", "kept", shared_mesh.program("hold.py"), str(gate.folder)).json()
    assert set(document) >= {"id", "name", "queue", "stored_on"}
    assert (document["name"], document["queue"]) == ("kept", "default")
    assert document["stored_on"][0] == "ada" and len(document["stored_on"]) >= 2
    assert ada.wait_until(document["id"], *FINAL)["status"] == "succeeded"


def test_submit_with_options_behind_the_script_takes_them_and_says_so(shared_mesh: Mesh, ada: Agent) -> None:
    gate = shared_mesh.gate("behind")
    gate.open()
    done = ada.run("submit", shared_mesh.program("hold.py"), "--queue", "default", "--wait", str(gate.folder), "5")
    assert done.code == 5, done.err
    assert "--queue" in done.err


def test_submit_with_follow_shows_the_log_and_exits_with_the_code_of_the_task(shared_mesh: Mesh, ada: Agent) -> None:
    gate = shared_mesh.gate("follow")
    gate.open()
    done = ada.run("submit", "--follow", shared_mesh.program("hold.py"), str(gate.folder), "9")
    assert done.code == 9, done.err
    assert "holding on" in done.out and "released" in done.out


def test_a_plain_command_needs_no_script(ada: Agent) -> None:
    done = ada.run("submit", "--follow", "--", "sh", "-c", "echo two words; exit 4")
    assert (done.code, done.out.splitlines()[-1]) == (4, "two words")


def test_a_script_with_requirements_gets_them_on_whichever_peer_runs_it(shared_mesh: Mesh, ada: Agent, bob: Agent) -> None:
    folder = shared_mesh.folder / "programs" / "needs-six"
    folder.mkdir(parents=True)
    script = folder / "show_six.py"
    script.write_text('# /// script\n# dependencies = ["six==1.16.0"]\n# ///\nimport six\nprint(six.__version__)\n')
    done = ada.run("submit", "--follow", *at(bob), str(script))
    assert (done.code, done.out.splitlines()[-1]) == (0, "1.16.0"), done.err


def test_a_script_takes_the_module_beside_it_along(shared_mesh: Mesh, ada: Agent, bob: Agent) -> None:
    folder = shared_mesh.folder / "programs" / "two-files"
    folder.mkdir(parents=True)
    (folder / "beside.py").write_text("VALUE = 41\n")
    (folder / "main.py").write_text("import beside\nprint(beside.VALUE + 1)\n")
    done = ada.run("submit", "--follow", *at(bob), str(folder / "main.py"))
    assert (done.code, done.out.splitlines()[-1]) == (0, "42"), done.err


def test_a_dirty_repository_runs_as_it_lies_there(shared_mesh: Mesh, ada: Agent, bob: Agent) -> None:
    folder = shared_mesh.folder / "programs" / "repository"
    folder.mkdir(parents=True)
    git = ("git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@example.org")
    subprocess.run((*git, "init", "--quiet"), check=True)
    (folder / "main.py").write_text("import added, changed\nprint(added.VALUE, changed.VALUE)\n")
    (folder / "changed.py").write_text("VALUE = 'old'\n")
    subprocess.run((*git, "add", "."), check=True)
    subprocess.run((*git, "commit", "--quiet", "-m", "first"), check=True)
    (folder / "changed.py").write_text("VALUE = 'changed'\n")
    (folder / "added.py").write_text("VALUE = 'untracked'\n")
    before = subprocess.run((*git, "status", "--porcelain"), capture_output=True, text=True, check=True).stdout

    done = ada.run("submit", "--follow", *at(bob), str(folder / "main.py"))

    assert (done.code, done.out.splitlines()[-1]) == (0, "untracked changed"), done.err
    after = subprocess.run((*git, "status", "--porcelain"), capture_output=True, text=True, check=True).stdout
    assert after == before


def test_a_task_sees_what_the_contract_says_and_not_the_secrets_of_the_mesh(shared_mesh: Mesh, ada: Agent, bob: Agent) -> None:
    secrets = [str(file) for file in (bob.home / "trust").iterdir()] + [str(bob.home / "control" / "cookie")]
    script = shared_mesh.program("look_around.py")
    done = ada.run("submit", "--follow", *at(bob), "--env", "COLOUR=red", script, script, *secrets, MESHQ_KEY="not for tasks")
    assert done.code == 0, done.err
    seen = json.loads(done.out.splitlines()[-1])
    assert set(seen["variables"]) <= {
        "MESHQ_TASK_ID", "MESHQ_TASK_NAME", "MESHQ_ATTEMPT", "MESHQ_FENCE", "MESHQ_QUEUE", "MESHQ_PEER", "MESHQ_OUTPUT_DIR",
    }  # fmt: skip
    assert (seen["variables"]["MESHQ_PEER"], seen["variables"]["MESHQ_ATTEMPT"]) == ("bob", "1")
    assert seen["readable"] == [script]


# --- following ------------------------------------------------------------------------------------------------------


def test_a_log_is_followed_live_from_another_peer(shared_mesh: Mesh, ada: Agent, bob: Agent) -> None:
    gate = shared_mesh.gate("live")
    task = ada.submit(*at(ada), shared_mesh.program("hold.py"), str(gate.folder))
    gate.wait_for_starts(1)
    with subprocess.Popen(
        [sys.executable, "-m", "meshq", "logs", task, "--follow"], env=bob.environment(), stdout=subprocess.PIPE, text=True
    ) as follower:
        assert follower.stdout is not None
        assert follower.stdout.readline() == "holding on ada\n"
        gate.open()
        assert follower.stdout.read() == "released\n"
        assert follower.wait() == 0


def test_outputs_are_fetched_at_another_peer(shared_mesh: Mesh, ada: Agent, bob: Agent, tmp_path: Path) -> None:
    gate = shared_mesh.gate("fetch")
    gate.open()
    task = ada.submit(*at(ada), shared_mesh.program("hold.py"), str(gate.folder))
    document = bob.wait_until(task, "succeeded")
    done = bob.run("fetch", task, "--to", str(tmp_path / "results"))
    assert done.code == 0, done.err
    assert (tmp_path / "results" / "result.txt").read_text() == document["attempts"][0]["fence"]


# --- steering -------------------------------------------------------------------------------------------------------


def test_cancel_stops_what_runs(shared_mesh: Mesh, ada: Agent, bob: Agent) -> None:
    gate = shared_mesh.gate("cancel")
    task = ada.submit(*at(bob), shared_mesh.program("hold.py"), str(gate.folder))
    gate.wait_for_starts(1)
    assert ada.run("cancel", task).code == 0
    document = ada.wait_until(task, *FINAL)
    assert document["status"] == "cancelled"
    assert [attempt["status"] for attempt in document["attempts"]] == ["cancelled"]
    wait_for(lambda: not bob.attempts_running(), 30, "bob runs nothing any more")
    assert ada.run("wait", task).code != 0


def test_cancel_of_what_waits_never_starts_it(ada: Agent) -> None:
    task = ada.submit("--hold", "--gpus", "1", "--", "true")
    assert ada.status_of(task) == "queued"
    assert ada.run("cancel", task).code == 0
    assert ada.wait_until(task, "cancelled")["attempts"] == []


def test_a_failure_is_tried_again_as_often_as_asked(shared_mesh: Mesh, ada: Agent) -> None:
    task = ada.submit("--retries", "1", shared_mesh.program("fail_first.py"))
    document = ada.wait_until(task, *FINAL)
    assert document["status"] == "succeeded"
    assert [(each["number"], each["status"], each["exit_code"]) for each in document["attempts"]] == [
        (1, "failed", 3),
        (2, "succeeded", 0),
    ]
    assert ada.log(task) == "attempt 2\n"
    assert ada.run("logs", task, "--attempt", "1").out == "attempt 1\n"


def test_a_time_limit_ends_the_task_and_waiting_for_it_exits_with_124(shared_mesh: Mesh, ada: Agent) -> None:
    gate = shared_mesh.gate("limit")
    done = ada.run("submit", "--time-limit", "1s", "--wait", shared_mesh.program("hold.py"), str(gate.folder))
    assert done.code == 124, done.err
    assert len(gate.starts()) == 1


def test_retry_makes_a_new_task_that_remembers_the_old_one(shared_mesh: Mesh, ada: Agent) -> None:
    old = ada.submit(shared_mesh.program("fail_first.py"))
    assert ada.wait_until(old, *FINAL)["status"] == "failed"
    new = ada.ask("retry", old)["id"]
    document = ada.wait_until(new, *FINAL)
    assert (document["retry_of"], document["status"], document["exit_code"]) == (old, "failed", 3)
    assert ada.status_of(old) == "failed"


def test_wait_for_several_exits_with_the_first_code_that_is_not_zero(ada: Agent) -> None:
    tasks = [ada.submit("--", "sh", "-c", f"exit {code}") for code in (0, 6, 2)]
    assert ada.run("wait", *tasks).code == 6


# --- looking --------------------------------------------------------------------------------------------------------


def test_status_has_the_fields_of_the_contract_and_fits_into_80_columns(ada: Agent) -> None:
    document = ada.ask("status")
    assert set(document["mesh"]) >= {"id", "name", "peers_alive", "peers_known"}
    assert [peer["name"] for peer in document["peers"] if peer["liveness"] == "alive"] == ["ada", "bob", "cyd"]
    for peer in document["peers"]:
        assert set(peer) >= {
            "id",
            "name",
            "address",
            "liveness",
            "epoch",
            "version",
            "labels",
            "queues",
            "slots",
            "gpus",
            "usage",
        }
        assert set(peer["usage"]) >= {"cpu_percent", "memory_used_bytes", "load_1m", "disk_free_bytes", "net_rx_bps"}
    assert "default" in [queue["name"] for queue in document["queues"]]

    lines = ada.run("status").out.splitlines()
    assert max(map(len, lines)) <= 80
    assert all(any(name in line for line in lines) for name in ("ada", "bob", "cyd", "default"))


def test_every_peer_shows_the_same_task(shared_mesh: Mesh, ada: Agent) -> None:
    task = ada.submit("--", "true")
    shown = [agent.wait_until(task, "succeeded") for agent in shared_mesh.agents]
    assert shown[1] == shown[0] and shown[2] == shown[0]


def test_tasks_lists_the_newest_first_and_can_be_narrowed(ada: Agent) -> None:
    tasks = [ada.submit("--name", f"listed-{number}", "--", "true") for number in range(2)]
    for task in tasks:
        ada.wait_until(task, "succeeded")
    assert [each["id"] for each in ada.ask("tasks", "--limit", "2")] == tasks[::-1]
    assert all(each["status"] == "failed" for each in ada.ask("tasks", "--status", "failed"))


def test_doctor_finds_nothing_wrong_but_that_root_runs_it(ada: Agent) -> None:
    done = ada.run("doctor", "--json")
    document = done.json()
    wrong = [check["name"] for check in document["checks"] if not check["ok"]]
    assert wrong == (["user"] if os.geteuid() == 0 else []), document["checks"]
    assert done.code == (1 if wrong else 0)
    assert all(isinstance(count, int) for count in document["counters"].values())


def test_a_detached_agent_goes_on_after_its_command(mesh: Mesh) -> None:
    agent = mesh.add("lone")
    agent.spawn("--new", "--detach")
    assert agent.wait_until_ended() == 0
    assert agent.ask("status")["mesh"]["peers_alive"] == 1
    left: Done = agent.run("leave")
    assert left.code == 0, left.err
    wait_for(lambda: agent.run("peers").code == 69, 30, "nobody answers any more")
