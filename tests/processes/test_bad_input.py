"""What people get wrong: one clear message, the exit code of the contract, and nothing half done."""

import json
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.processes.mesh import Agent, Done, Mesh, alive_at, free_port

pytestmark = pytest.mark.xdist_group("processes")

MESSAGE_LINES_MAX = 5


def assert_clear(code: int, said: str, expected: int, *words: str) -> None:
    """The exit code, and a short message that names what is wrong."""
    assert code == expected, said
    assert "Traceback" not in said and "internal error" not in said, said
    assert 1 <= len(said.strip().splitlines()) <= MESSAGE_LINES_MAX, said
    assert [word for word in words if word not in said] == [], said


def assert_refused(done: Done, expected: int, *words: str) -> None:
    assert_clear(done.code, done.err, expected, *words)


def assert_join_fails(agent: Agent, expected: int, *words: str) -> None:
    assert_clear(agent.wait_until_ended(), agent.output.read_text(), expected, *words)
    agent.output.write_text("")


def tasks_of(agent: Agent) -> list[Any]:
    return [task["id"] for task in agent.ask("tasks", "--limit", "1000")]


# --- join -----------------------------------------------------------------------------------------------------------


def test_a_wrong_key_is_refused_and_the_right_one_then_works(mesh: Mesh) -> None:
    [ada] = mesh.start("ada")
    other = mesh.add("other")
    other.join("--new")
    wrong_key = other.run("key").out.strip()
    bob = mesh.add("bob")

    bob.spawn("--seed", ada.seed, key=wrong_key)
    assert_join_fails(bob, 1, ada.seed, "another mesh")
    assert not bob.home.exists()
    assert alive_at(ada) == {"ada"}

    bob.join("--seed", ada.seed, key=ada.run("key").out.strip())
    mesh.wait_until_whole(ada, bob)


@pytest.mark.parametrize("key", ["hello", "correct horse battery staple", "mq1-aaaa"])
def test_a_text_that_is_no_key_is_refused(mesh: Mesh, key: str) -> None:
    agent = mesh.add("ada")
    agent.spawn("--seed", f"127.0.0.1:{free_port()}", key=key)
    assert_join_fails(agent, 2, "key")
    assert not agent.home.exists()


def test_a_seed_that_does_not_answer_is_named_and_nothing_stays(mesh: Mesh) -> None:
    [ada] = mesh.start("ada")
    bob = mesh.add("bob")
    nobody = f"127.0.0.1:{free_port()}"
    bob.spawn("--seed", nobody, key=mesh.key())
    assert_join_fails(bob, 69, nobody)
    assert not bob.home.exists()
    bob.join("--seed", ada.seed, key=mesh.key())
    mesh.wait_until_whole(ada, bob)


def test_a_seed_without_a_key_is_refused(mesh: Mesh) -> None:
    [ada] = mesh.start("ada")
    bob = mesh.add("bob")
    bob.spawn("--seed", ada.seed)
    assert_join_fails(bob, 2, "key")


def test_a_busy_port_is_named(mesh: Mesh) -> None:
    agent = mesh.add("ada")
    with socket.create_server(("127.0.0.1", agent.port)):
        agent.spawn("--new")
        assert_join_fails(agent, 1, str(agent.port))
    agent.join("--new")


def test_a_second_agent_in_one_home_is_refused_and_the_first_goes_on(mesh: Mesh) -> None:
    [ada] = mesh.start("ada")
    twin = mesh.add("twin")
    twin.home = ada.home
    twin.spawn()
    assert_join_fails(twin, 1, str(ada.home))
    assert alive_at(ada) == {"ada"}


def test_a_home_keeps_its_mesh_when_another_key_is_shown(mesh: Mesh) -> None:
    [ada] = mesh.start("ada")
    other = mesh.add("other")
    other.join("--new")
    key = ada.run("key").out
    ada.terminate()
    ada.output.write_text("")

    ada.spawn(key=other.run("key").out.strip())
    assert_join_fails(ada, 1, "key", "--new")

    ada.join()
    assert ada.run("key").out == key


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--port", "70000"), ("--port", "many"), ("--slots", "-1"), ("--memory", "lots"), ("--gpus", "some"), ("--label", "x"),
        ("--profile", "moon"), ("--order", "random"), ("--name", "a b"), ("--bind", "everywhere"), ("--seed", "lab:port"),
        ("--bind", "255.255.255.255"), ("--bind", "224.0.0.1"), ("--seed", "fd00::1:7733"),
        ("--queue", "../etc"), ("--key-file", "/nowhere/key"), ("--group", "no-such-group"), ("--config", "/nowhere.toml"),
    ],
)  # fmt: skip
def test_an_option_of_join_that_makes_no_sense_is_named(mesh: Mesh, option: str, value: str) -> None:
    agent = mesh.add("ada")
    agent.spawn("--new", option, value)
    assert_join_fails(agent, 2, option.removeprefix("--"))
    assert not agent.home.exists()


# --- no agent -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["status", "tasks", "peers", "doctor", "key", "leave", "show x", "logs x", "wait x"])
def test_without_an_agent_each_command_says_how_to_start_one(mesh: Mesh, command: str) -> None:
    assert_refused(mesh.add("nobody").run(*command.split()), 69, "meshq join")


def test_a_failure_under_json_is_one_document_on_stdout_and_the_message_on_stderr(mesh: Mesh) -> None:
    done = mesh.add("nobody").run("status", "--json")
    assert done.code == 69
    error = json.loads(done.out)["error"]
    assert set(error) == {"code", "message", "hint"} and error["code"] == "unreachable"
    assert error["message"] in done.err


# --- submit ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "code", "word"),
    [
        (("no_such_script.py",), 2, "no_such_script.py"),
        ((), 2, "script"),
        (("--queue", "no/queue", "--", "true"), 2, "--queue"),
        (("--retries", "-1", "--", "true"), 2, "--retries"),
        (("--retries", "101", "--", "true"), 2, "--retries"),
        (("--priority", "100000", "--", "true"), 2, "--priority"),
        (("--cpus", "-1", "--", "true"), 2, "--cpus"),
        (("--gpus", "many", "--", "true"), 2, "--gpus"),
        (("--memory", "lots", "--", "true"), 2, "--memory"),
        (("--time-limit", "soon", "--", "true"), 2, "--time-limit"),
        (("--lease", "0", "--", "true"), 2, "--lease"),
        (("--on-isolation", "panic", "--", "true"), 2, "--on-isolation"),
        (("--label", "novalue", "--", "true"), 2, "--label"),
        (("--env", "=x", "--", "true"), 2, "--env"),
        (("--no-such-option", "--", "true"), 2, "--no-such-option"),
        (("--gpus", "1", "--", "true"), 75, "--hold"),
        (("--queue", "nobody-serves-this", "--", "true"), 75, "--hold"),
        (("--memory", "900T", "--", "true"), 75, "--hold"),
        (("--label", "who=nobody", "--", "true"), 75, "--hold"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_a_submit_that_makes_no_sense_is_refused_and_stores_nothing(
    ada: Agent, args: tuple[str, ...], code: int, word: str
) -> None:
    before = tasks_of(ada)
    assert_refused(ada.run("submit", *args), code, word)
    assert tasks_of(ada) == before


def test_requirements_that_cannot_be_solved_are_named_and_nothing_is_stored(ada: Agent, tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text("print('never')\n")
    (tmp_path / "requirements.txt").write_text("six==1.16.0\nsix==1.15.0\n")
    before = tasks_of(ada)
    done = ada.run("submit", "--requirements", str(tmp_path / "requirements.txt"), str(tmp_path / "main.py"))
    assert_refused(done, 2, "six==1.16.0", "six==1.15.0")
    assert tasks_of(ada) == before


def test_a_requirements_file_that_does_not_exist_is_named(ada: Agent, tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text("print('never')\n")
    assert_refused(ada.run("submit", "--requirements", "/nowhere.txt", str(tmp_path / "main.py")), 2, "/nowhere.txt")


def test_what_nobody_can_run_now_waits_when_it_is_held(ada: Agent) -> None:
    task = ada.submit("--hold", "--gpus", "1", "--", "true")
    document = ada.show(task)
    assert (document["status"], document["attempts"]) == ("queued", [])
    assert document["reason"]
    assert ada.run("cancel", task).code == 0


# --- tasks that are named wrongly -----------------------------------------------------------------------------------

NAMING = ("show", "logs", "wait", "cancel", "retry", "fetch")


@pytest.mark.parametrize("command", NAMING)
def test_an_unknown_task_is_named(ada: Agent, command: str) -> None:
    assert_refused(ada.run(command, "zzzz2222"), 2, "zzzz2222")


@pytest.fixture(scope="module")
def twins(shared_mesh: Mesh) -> list[str]:
    """Two tasks with one name, and more of them, so that two ids begin with the same letter (an id has 32 of them)."""
    ada = shared_mesh.by_name("ada")
    first = ada.submit("--hold", "--gpus", "1", "--name", "twin", "--", "true")
    tasks = [first]
    while len({task[0] for task in tasks}) == len(tasks):
        tasks.append(ada.submit("--hold", "--gpus", "1", "--name", "twin", "--", "true"))
    for task in tasks:
        assert ada.run("cancel", task).code == 0
    return tasks


@pytest.mark.parametrize("command", NAMING)
def test_an_ambiguous_prefix_is_an_error_that_lists_the_ids(ada: Agent, twins: list[str], command: str) -> None:
    same = [task for task in twins if task[0] == twins[-1][0]]
    assert_refused(ada.run(command, twins[-1][0]), 2, *same)


def test_an_ambiguous_name_is_an_error_that_lists_the_ids(ada: Agent, twins: list[str]) -> None:
    assert_refused(ada.run("show", "twin"), 2, *twins[:2])


# --- the disk -------------------------------------------------------------------------------------------------------


@pytest.mark.netns  # a small file system needs root, as namespaces do
def test_a_full_disk_refuses_the_submit_and_takes_it_again_when_there_is_room(mesh: Mesh) -> None:
    agent = mesh.add("ada")
    agent.home.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700m,mode=700", "meshq", str(agent.home)], check=True)
    try:
        agent.join("--new")
        ballast = agent.home / "ballast"
        with ballast.open("wb") as file:
            file.truncate(0)
            for _ in range(640):
                file.write(bytes(2**20))
        assert_refused(agent.run("submit", "--", "true"), 1, "disk")
        assert tasks_of(agent) == []
        ballast.unlink()
        task = agent.submit("--", "true")
        assert agent.wait_until(task, "succeeded")["exit_code"] == 0
    finally:
        mesh.stop()
        subprocess.run(["umount", "--lazy", str(agent.home)], check=True)
