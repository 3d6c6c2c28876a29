"""The real command line against a small agent: streams, documents and exit codes of the contract."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from meshq.pieces import encode_piece
from tests.cli.builders import OTHER, TASK, peer, queue, status, submitted, task, waited
from tests.cli.conftest import Meshq
from tests.cli.small_agent import Answer, SmallAgent, error, piece, pieces, running, together

STATUS = status([peer("lab-1"), peer("lab-2", liveness="dead")], [queue("default")])
ME = {
    "id": "p", "name": "lab-1", "mesh": {"id": "m", "name": "lab"}, "version": "0.1.0", "pid": 1, "home": "h", "port": 1,
    "addresses": [], "queues": [], "peers_alive": 2,
}  # fmt: skip

EVERY_COMMAND_THAT_ASKS = [
    ["status"], ["tasks"], ["show", "t"], ["logs", "t"], ["wait", "t"], ["fetch", "t"], ["cancel", "t"], ["retry", "t"],
    ["peers"], ["doctor"], ["key"], ["leave"], ["submit", "--", "true"],
]  # fmt: skip


# --- no agent, wrong usage, bugs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", EVERY_COMMAND_THAT_ASKS, ids=lambda arguments: arguments[0])
def test_without_an_agent_every_command_exits_with_69_and_says_what_to_do(meshq: Meshq, arguments: list[str]) -> None:
    done = meshq(*arguments)
    assert done.returncode == 69
    assert done.stdout == b""
    first, second = done.stderr.decode().splitlines()
    assert first.startswith("error: no agent runs here (home `") and second == "hint: start one with `meshq join`"


def test_a_failure_under_json_is_one_document_and_the_message_is_on_stderr(meshq: Meshq) -> None:
    done = meshq("status", "--json")
    assert done.returncode == 69
    document = json.loads(done.stdout)
    assert document["error"]["code"] == "unreachable" and document["error"]["hint"] == "start one with `meshq join`"
    assert done.stderr.startswith(b"error: no agent runs here")


WRONG_USAGE = [
    (["stats"], "error: no such command `stats`"),
    (["tasks", "--quene", "x"], "error: no such option `--quene`"),
    (["show"], "error: missing argument `TASK`"),
    (["tasks", "--status", "done"], "error: --status: `done` is no status"),
    (["tasks", "--limit", "0"], "error: --limit: 0 is out of range"),
    (["tasks", "--limit", "1000001"], "error: --limit: 1000001 is out of range"),
    (["show", ""], "error: `` names no task"),
    (["logs", " "], "error: ` ` names no task"),
    (["wait", "t", ".."], "error: `..` names no task"),
    (["leave", "--timeout", "5"], "error: `--timeout` is only possible with `--drain`"),
    (["submit", "--docker", "image", "x.py"], "error: `--docker` is not supported yet"),
    (["submit", "--manager", "conda", "x.py"], "error: `--manager conda` is not supported yet"),
    (["join", "--port", "x"], "error: invalid value for `--port`"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG_USAGE, ids=lambda value: value if isinstance(value, str) else "")
def test_wrong_usage_exits_with_2_and_one_message(meshq: Meshq, arguments: list[str], message: str) -> None:
    done = meshq(*arguments)
    lines = done.stderr.decode().splitlines()
    assert (done.returncode, done.stdout) == (2, b"")
    assert lines[0].startswith(message) and not lines[0].endswith(".")
    assert [line for line in lines[1:] if not line.startswith("hint: ")] == []


def test_wrong_usage_under_json_is_a_document_too(meshq: Meshq) -> None:
    done = meshq("tasks", "--json", "--limits", "x")
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"] == {
        "code": "usage",
        "message": "no such option `--limits`",
        "hint": "did you mean `--limit`?",
    }


def test_a_log_is_no_document(meshq: Meshq) -> None:
    done = meshq("submit", "--follow", "--json", "x.py")
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["message"] == "`--follow` prints the log and `--json` a document: choose one"


def test_a_bug_is_one_message_and_its_traceback_goes_into_a_private_file(
    meshq: Meshq, agent: SmallAgent, tmp_path: Path
) -> None:
    agent.set("GET /v1/peers", [{"not": "a peer"}])
    done = meshq("peers")
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr and done.stderr.startswith(b"error: internal error: KeyError")
    [report] = (tmp_path / "state" / "meshq").iterdir()
    assert "Traceback" in report.read_text() and report.stat().st_mode & 0o777 == 0o600
    assert str(report) in done.stderr.decode()


def test_help_is_shown_when_nothing_is_asked(meshq: Meshq) -> None:
    done = meshq()
    assert done.returncode == 0
    assert b"status" in done.stdout and b"--install-completion" in done.stdout
    assert meshq("--version").stdout.startswith(b"meshq 0.")


# --- looking --------------------------------------------------------------------------------------------------------


def test_status_lists_machines_queues_and_tasks_without_colour_in_a_pipe(meshq: Meshq, agent: SmallAgent) -> None:
    agent.set("GET /v1/status", STATUS)
    agent.set("GET /v1/tasks", [])
    done = meshq("status")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"Mesh lab: 1 of 2 machines alive\n")
    assert b"\x1b" not in done.stdout
    coloured = meshq("status", FORCE_COLOR="1").stdout
    assert b"\x1b[32malive\x1b[0m" in coloured
    assert b"\x1b" not in meshq("status", FORCE_COLOR="1", NO_COLOR="1").stdout


@pytest.mark.parametrize(
    ("command", "route", "document"),
    [
        ("status", "GET /v1/status", STATUS),
        ("peers", "GET /v1/peers", STATUS["peers"]),
        ("tasks", "GET /v1/tasks", [task()]),
        ("show t", "GET /v1/tasks/t", task()),
        ("doctor", "GET /v1/doctor", {"checks": [], "counters": {}}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_json_is_the_document_of_the_agent_and_nothing_else(
    meshq: Meshq, agent: SmallAgent, command: str, route: str, document: object
) -> None:
    agent.set(route, document)
    done = meshq(*command.split(), "--json")
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout) == document


def test_tasks_asks_for_what_was_given(meshq: Meshq, agent: SmallAgent) -> None:
    agent.set("GET /v1/tasks", [])
    assert meshq("tasks", "--queue", "gpu", "--status", "failed", "--mine", "--limit", "7").stdout == b"No tasks\n"
    [(request, _)] = agent.requests
    assert request.startswith("GET /v1/tasks?queue=gpu&status=failed&user=") and request.endswith("&limit=7")


def test_watch_under_json_is_one_document_a_line_until_it_is_stopped(agent: SmallAgent) -> None:
    agent.set("GET /v1/status", STATUS)
    with start(agent, "status", "--watch", "--json") as watching:
        assert watching.stdout is not None
        assert json.loads(watching.stdout.readline()) == STATUS
        watching.send_signal(signal.SIGINT)
        assert watching.wait(30) == 0


def test_a_failed_check_makes_doctor_exit_with_1(meshq: Meshq, agent: SmallAgent) -> None:
    agent.set("GET /v1/doctor", {"checks": [{"name": "clock", "ok": False, "detail": "wrong"}], "counters": {}})
    done = meshq("doctor")
    assert (done.returncode, done.stdout) == (1, b"FAIL  clock  wrong\n\n1 of 1 check failed: clock\n")


def test_an_error_of_the_agent_keeps_its_message_hint_and_exit_code(meshq: Meshq, agent: SmallAgent) -> None:
    agent.set("GET /v1/tasks/nope", error("usage", "there is no task `nope`", "`meshq tasks` lists them"))
    done = meshq("show", "nope")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"error: there is no task `nope`\nhint: `meshq tasks` lists them\n"


def test_a_reader_that_goes_away_is_no_error(agent: SmallAgent) -> None:
    agent.set("GET /v1/tasks", [task(id=f"{number:016}") for number in range(3000)])
    with start(agent, "tasks") as listing:
        assert listing.stdout is not None and listing.stderr is not None
        listing.stdout.readline()
        listing.stdout.close()
        assert listing.stderr.read() == b""


# --- logs, wait -----------------------------------------------------------------------------------------------------


def test_logs_in_a_pipe_are_the_bytes_that_were_written(meshq: Meshq, agent: SmallAgent) -> None:
    written = (b"10%\r20%\r\x1b[31mred\n", b"\xff\x00 no newline")
    agent.set("GET /v1/tasks/t/log", Answer(chunks=written))
    done = meshq("logs", "t", "--tail", "5", "--attempt", "2")
    assert (done.returncode, done.stdout) == (0, b"".join(written))
    assert agent.requests[0][0] == "GET /v1/tasks/t/log?attempt=2&tail=5"


def test_what_is_said_about_a_followed_log_goes_to_stderr(meshq: Meshq, agent: SmallAgent) -> None:
    broken = Answer(chunks=(encode_piece(piece(1, 10, broke_off=True)),))
    agent.set("GET /v1/tasks/t", task(id=TASK))
    agent.set(f"GET /v1/tasks/{TASK}/wait", waited())
    agent.set(f"GET /v1/tasks/{TASK}/log", together(pieces(b"no newline"), broken, pieces(b"whole\n", attempt=2)))
    done = meshq("logs", "t", "--follow")
    assert (done.returncode, done.stdout) == (0, b"no newlinewhole\n")
    assert done.stderr == b"\n--- the log of attempt 1 on lab-1 broke off ---\n--- attempt 2 on lab-2 ---\n"


def test_logs_follow_fails_at_once_where_no_agent_runs(meshq: Meshq) -> None:
    assert meshq("logs", "t", "--follow").returncode == 69


WAITS = [
    ([waited()], 0),
    ([waited("failed", 7)], 7),
    ([waited("failed", 143, timed_out=True)], 124),
    ([waited("cancelled", None)], 1),
    ([waited(), waited("failed", 5), waited("failed", 6)], 5),
]


@pytest.mark.parametrize(("results", "code"), WAITS)
def test_wait_exits_with_the_first_code_that_is_not_zero(
    meshq: Meshq, agent: SmallAgent, results: list[dict[str, object]], code: int
) -> None:
    names = [f"t{number}" for number in range(len(results))]
    results = [result | {"id": name} for name, result in zip(names, results, strict=True)]
    for name, result in zip(names, results, strict=True):
        agent.set(f"GET /v1/tasks/{name}", task(id=name))
        agent.set(f"GET /v1/tasks/{name}/wait", result | {"final": False, "status": "running"}, result)
    done = meshq("wait", *names)
    assert done.returncode == code, done.stderr
    assert len(done.stdout.splitlines()) == len(names)
    assert json.loads(meshq("wait", *names, "--json").stdout) == results


def test_wait_for_an_unknown_task_fails_before_it_waits(meshq: Meshq, agent: SmallAgent) -> None:
    agent.set(f"GET /v1/tasks/{TASK}", task())
    agent.set("GET /v1/tasks/nope", error("usage", "there is no task `nope`"))
    assert meshq("wait", TASK, "nope").returncode == 2
    assert not any("/wait" in request for request, _ in agent.requests)


@contextmanager
def start(agent: SmallAgent, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """The command, running; killed at the end of the block if it still runs."""
    with subprocess.Popen(
        [sys.executable, "-m", "meshq", *arguments],
        env=os.environ | {"MESHQ_HOME": str(agent.home.root)},
        cwd=agent.home.root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def until_asked(agent: SmallAgent, part: str) -> None:
    deadline = time.monotonic() + 30
    while not any(part in request for request, _ in list(agent.requests)):
        assert time.monotonic() < deadline, agent.requests
        time.sleep(0.01)


@pytest.mark.parametrize(
    "command", [("wait", TASK), ("logs", TASK, "--follow"), ("submit", "--wait", "--", "true")], ids=" ".join
)
def test_ctrl_c_detaches_with_130_and_says_that_the_task_goes_on(agent: SmallAgent, command: tuple[str, ...]) -> None:
    agent.set("GET /v1/me", ME)
    agent.set("POST /v1/tasks", submitted(["lab-1", "lab-2"]))
    agent.set(f"GET /v1/tasks/{TASK}", task())
    agent.set(f"GET /v1/tasks/{TASK}/wait", waited("running", None, final=False))
    agent.set(f"GET /v1/tasks/{TASK}/log", pieces(b"line\n", cut=True))
    with start(agent, *command) as waiting:
        until_asked(agent, f"/{TASK}/wait")
        waiting.send_signal(signal.SIGINT)
        _, said = waiting.communicate(timeout=30)
    assert waiting.returncode == 130
    assert b"note: detached, `" in said and f"`meshq logs {TASK} --follow` shows it".encode() in said


def test_waiting_goes_on_when_the_agent_is_restarted(tmp_path: Path) -> None:
    with ExitStack() as stack:
        with running(tmp_path / "home") as agent:
            agent.set(f"GET /v1/tasks/{TASK}", task())
            agent.set(f"GET /v1/tasks/{TASK}/wait", waited("running", None, final=False))
            process = stack.enter_context(start(agent, "wait", TASK))
            until_asked(agent, "/wait")
        with running(tmp_path / "home", {f"GET /v1/tasks/{TASK}/wait": waited("failed", 9)}):
            assert process.wait(30) == 9


# --- submit, cancel, retry, key, leave ------------------------------------------------------------------------------


def an_agent_that_stores(agent: SmallAgent, *stored_on: str) -> None:
    agent.set("GET /v1/me", ME)
    agent.set("POST /v1/objects/missing", {"ids": []})
    agent.set("POST /v1/tasks", submitted(list(stored_on)))
    agent.set(f"GET /v1/tasks/{TASK}/wait", waited("failed", 3))
    agent.set(f"GET /v1/tasks/{TASK}/log", pieces(b"epoch 1\n", b"epoch 2\n"))


def test_submit_in_a_pipe_prints_the_bare_id(meshq: Meshq, agent: SmallAgent) -> None:
    an_agent_that_stores(agent, "lab-1", "lab-2")
    done = meshq("submit", "--queue", "gpu", "--label", "room=b12", "--env", "A=1", "--retries", "2", "--", "echo", "--wait")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{TASK}\n".encode(), b"")
    [body] = [json.loads(body) for request, body in agent.requests if request == "POST /v1/tasks"]
    [spec] = body["specs"]
    assert body["hold"] is False
    assert (spec["argv"], spec["queue"], spec["env"], spec["retries"]) == (["echo", "--wait"], "gpu", {"A": "1"}, 2)
    assert spec["needs"] == {"cpus": 0, "memory_bytes": 0, "gpus": 1, "gpu_memory_bytes": 0, "labels": {"room": "b12"}}


def test_submit_with_options_behind_the_script_names_them(meshq: Meshq, agent: SmallAgent, tmp_path: Path) -> None:
    an_agent_that_stores(agent, "lab-1", "lab-2")
    (tmp_path / "train.py").write_text("print(1)\n")
    done = meshq("submit", "train.py", "--queue", "gpu", "--lr", "0.1", "--wait")
    assert done.returncode == 0, done.stderr
    assert b"note: `--queue gpu` was taken by meshq; put `--` before the script's own options\n" in done.stderr
    [body] = [json.loads(body) for request, body in agent.requests if request == "POST /v1/tasks"]
    assert body["specs"][0]["argv"] == ["train.py", "--lr", "0.1", "--wait"]


def test_a_misspelt_option_is_remarked_on_unless_two_dashes_say_whose_it_is(
    meshq: Meshq, agent: SmallAgent, tmp_path: Path
) -> None:
    an_agent_that_stores(agent, "lab-1", "lab-2")
    (tmp_path / "train.py").write_text("print(1)\n")
    assert b"`--quene` goes to the script" in meshq("submit", "train.py", "--quene", "x").stderr
    assert b"--quene" not in meshq("submit", "train.py", "--", "--quene", "x").stderr


def test_a_command_goes_with_the_folder_of_the_file_that_it_names(meshq: Meshq, agent: SmallAgent, tmp_path: Path) -> None:
    an_agent_that_stores(agent, "lab-1", "lab-2")
    (tmp_path / "s.sh").write_text("#!/bin/sh\n")
    done = meshq("submit", "--", "./s.sh", "q")
    assert (done.returncode, done.stderr.decode()) == (
        0, f"note: {tmp_path} goes along, for the command names `./s.sh`\n",
    )  # fmt: skip
    [spec] = json.loads(agent.requests[-1][1])["specs"]
    assert spec["source"]["commit"] is not None
    done = meshq("submit", "--", "echo", "hi")
    assert done.stderr == b"note: nothing of this folder is sent; `--workdir .` takes it along\n"
    [spec] = json.loads(agent.requests[-1][1])["specs"]
    assert spec["source"]["commit"] is None


def test_submit_and_wait_says_in_one_line_how_it_failed_and_where_to_look(meshq: Meshq, agent: SmallAgent) -> None:
    an_agent_that_stores(agent, "lab-1", "lab-2")
    agent.set(f"GET /v1/tasks/{TASK}/wait", waited("failed", 5, reason="exit code 5"))
    done = meshq("submit", "--wait", "--", "false")
    assert (done.returncode, done.stdout) == (5, f"{TASK}\n".encode())
    assert done.stderr.decode() == (
        f"note: train ({TASK}) failed on lab-2 with exit code 5; `meshq logs {TASK[:8]}` shows what it wrote\n"
    )
    agent.set(f"GET /v1/tasks/{TASK}/wait", waited())
    assert meshq("submit", "--wait", "--", "true").stderr == b""


def test_submit_sends_the_objects_that_the_agent_lacks(meshq: Meshq, agent: SmallAgent, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("print('the very content')\n")
    an_agent_that_stores(agent, "lab-1", "lab-2")
    assert meshq("submit", "train.py").returncode == 0
    [asked] = [json.loads(body)["ids"] for request, body in agent.requests if request == "POST /v1/objects/missing"]
    assert len(asked) == 3 and not any(request == "POST /v1/objects" for request, _ in agent.requests)

    agent.set("POST /v1/objects/missing", {"ids": asked})
    agent.set("POST /v1/objects", {"stored": 3})
    assert meshq("submit", "train.py").returncode == 0
    [frames] = [body for request, body in agent.requests if request == "POST /v1/objects"]
    found = []
    while frames:
        kind, length = frames[0], int.from_bytes(frames[1:5], "big")
        found.append((kind, frames[5 : 5 + length]))
        frames = frames[5 + length :]
    assert sorted(kind for kind, _ in found) == [1, 2, 3]
    assert (3, b"print('the very content')\n") in found


def test_submit_says_when_only_this_machine_has_it(meshq: Meshq, agent: SmallAgent) -> None:
    an_agent_that_stores(agent, "lab-1")
    done = meshq("submit", "--json", "--", "true")
    plain = {"id": TASK, "name": "train", "queue": "gpu", "stored_on": ["lab-1"], "not_stored_on": []}
    assert json.loads(done.stdout) == plain
    assert done.stderr == b"warning: stored on this machine only: keep it on until another machine has joined\n"


def test_submit_names_in_one_line_who_is_alive_and_took_no_copy(meshq: Meshq, agent: SmallAgent) -> None:
    an_agent_that_stores(agent, "lab-1", "lab-2")
    lost = [{"name": "lab-3", "reason": "no answer in time"}, {"name": "lab-4", "reason": "evil\n\x1b[2J"}]
    agent.set("POST /v1/tasks", submitted(["lab-1", "lab-2"], not_stored_on=lost[:1]))
    done = meshq("submit", "--", "true")
    assert (done.stdout, done.stderr) == (
        f"{TASK}\n".encode(), b"note: lab-3 is alive but did not take a copy: no answer in time\n",
    )  # fmt: skip
    agent.set("POST /v1/tasks", submitted(["lab-1"], not_stored_on=lost))
    done = meshq("submit", "--json", "--", "true")
    assert json.loads(done.stdout)["not_stored_on"] == lost
    warning, note = done.stderr.decode().splitlines()
    assert warning == "warning: stored on this machine only: keep it on until another machine has taken a copy"
    assert note.startswith("note: these are alive but did not take a copy: lab-3 (no answer in time), lab-4 (evil ")
    assert "\x1b" not in note


@pytest.mark.parametrize(
    ("voters", "sentence"),
    [
        (["lab-1"], "warning: it runs only while lab-1 agrees, the only machine there is now: without it"),
        (["lab-1", "lab-2"], "warning: it runs only while lab-1 and lab-2 agree: losing either of them stops it"),
        (["lab-1", "lab-2", "lab-3"], "note: it runs only while 2 of 3 machines agree (lab-1, lab-2, lab-3): one"),
    ],
)
def test_submit_says_on_whom_a_task_depends_that_stops_in_isolation(
    meshq: Meshq, agent: SmallAgent, voters: list[str], sentence: str
) -> None:
    an_agent_that_stores(agent, "lab-1", "lab-2")
    agent.set("POST /v1/tasks", submitted(["lab-1", "lab-2"]) | {"voters": voters})
    done = meshq("submit", "--on-isolation", "stop", "--json", "--", "true")
    assert (done.returncode, json.loads(done.stdout)["voters"]) == (0, voters)
    assert " ".join(done.stderr.decode().split()).startswith(sentence)
    [body] = [json.loads(body) for request, body in agent.requests if request == "POST /v1/tasks"]
    assert body["specs"][0]["isolation"] == "stop"


def test_submit_asks_for_as_many_copies_as_wanted_and_says_when_there_are_fewer(meshq: Meshq, agent: SmallAgent) -> None:
    an_agent_that_stores(agent, "lab-1", "lab-2")
    agent.set("POST /v1/tasks", submitted(["lab-1", "lab-2"], copies=3))
    done = meshq("submit", "--copies", "3", "--", "true")
    assert done.stderr == b"warning: stored on 1 other machine, 3 were asked for: there are no more\n"
    assert [json.loads(body)["copies"] for what, body in agent.requests if what == "POST /v1/tasks"] == [3]
    wrong = meshq("submit", "--copies", "none", "--", "true")
    assert (wrong.returncode, b"`all`" in wrong.stderr) == (2, True)


def test_submit_and_follow_prints_the_log_and_exits_with_the_code_of_the_task(meshq: Meshq, agent: SmallAgent) -> None:
    an_agent_that_stores(agent, "lab-1", "lab-2")
    done = meshq("submit", "--follow", "--", "true")
    assert (done.returncode, done.stdout) == (3, b"epoch 1\nepoch 2\n")


def test_submit_that_nobody_could_run_exits_with_75(meshq: Meshq, agent: SmallAgent) -> None:
    an_agent_that_stores(agent)
    agent.set("POST /v1/tasks", error("unplaceable", "no machine has 8 GPUs", "add `--hold` to wait for one", 409))
    done = meshq("submit", "--gpus", "8", "--json", "--", "true")
    assert done.returncode == 75
    assert json.loads(done.stdout)["error"]["code"] == "unplaceable"


def test_a_script_that_does_not_exist_is_named(meshq: Meshq, agent: SmallAgent) -> None:
    an_agent_that_stores(agent)
    done = meshq("submit", "nothing.py")
    assert done.returncode == 2 and b"nothing.py" in done.stderr
    assert not any("/v1/tasks" in request or "/v1/objects" in request for request, _ in agent.requests)


def test_cancel_asks_for_all_tasks_before_it_cancels_the_first(meshq: Meshq, agent: SmallAgent) -> None:
    agent.set("GET /v1/tasks/one", task(id=TASK))
    agent.set("GET /v1/tasks/two", task(id=OTHER))
    agent.set(f"POST /v1/tasks/{TASK}/cancel", task("one", id=TASK, status="cancelled"))
    agent.set(f"POST /v1/tasks/{OTHER}/cancel", task("two", id=OTHER, status="running"))
    done = meshq("cancel", "one", "two")
    assert done.stdout.decode() == f"one {TASK} is cancelled\ntwo {OTHER} is being stopped\n"
    assert meshq("cancel", "one", "nope").returncode == 2
    assert len([request for request, _ in agent.requests if request.endswith("/cancel")]) == 2


def test_retry_prints_the_new_id(meshq: Meshq, agent: SmallAgent) -> None:
    agent.set("POST /v1/tasks/t/retry", submitted(["lab-1", "lab-2"]))
    assert meshq("retry", "t").stdout.decode() == f"{TASK}\n"


def test_a_refused_retry_gives_no_advice_that_retry_can_not_follow(meshq: Meshq, agent: SmallAgent) -> None:
    hint = "lab-1 has no GPU\nchange what it needs, or keep it for a later peer with --hold"
    agent.set("POST /v1/tasks/t/retry", error("unplaceable", "nobody could run it", hint, 409))
    done = meshq("retry", "t")
    assert done.returncode == 75
    assert done.stderr.decode() == (
        "error: nobody could run it\nhint: lab-1 has no GPU\njoin a machine that fits, then retry it\n"
    )


def test_help_speaks_plainly_of_arguments_and_of_the_last_join(meshq: Meshq) -> None:
    shown = meshq("show", "--help").stdout.decode()
    assert "Usage: meshq show [OPTIONS] TASK\n" in shown and "<str>" not in shown
    assert "those of the last join" in " ".join(meshq("join", "--help").stdout.decode().split())
    assert "..." not in meshq("--help").stdout.decode().partition("Commands:")[2]


def test_key_prints_the_key_alone_and_leave_says_who_left(meshq: Meshq, agent: SmallAgent) -> None:
    agent.set("GET /v1/key", {"key": "mq1-the-key"})
    agent.set("GET /v1/me", ME)
    agent.set("POST /v1/leave", {})
    assert meshq("key").stdout == b"mq1-the-key\n"
    assert meshq("leave", "--drain", "--timeout", "5m").stdout == b"lab-1 left the mesh\n"
    assert json.loads(agent.requests[-1][1]) == {"drain": True, "timeout": 300.0}


def test_a_leave_says_what_it_could_not_end(meshq: Meshq, agent: SmallAgent) -> None:
    agent.set("GET /v1/me", ME)
    agent.set("POST /v1/leave", {"still_running": ["abc234", "def567"]})
    done = meshq("leave")
    assert done.stdout == b"lab-1 left the mesh\n"
    assert b"processes of abc234, def567 could not be ended and still run here" in done.stderr


# --- completion -----------------------------------------------------------------------------------------------------


def completed(meshq: Meshq, line: str) -> list[str]:
    words = line.split(" ")
    done = meshq(_MESHQ_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=str(len(words) - 1))
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout.decode().split()


def test_the_shell_completes_commands_options_queues_and_tasks(meshq: Meshq, agent: SmallAgent) -> None:
    agent.set("GET /v1/status", STATUS)
    agent.set("GET /v1/tasks", [task("train", TASK), task("eval", OTHER)])
    assert completed(meshq, "meshq sta") == ["status"]
    assert completed(meshq, "meshq submit --req") == ["--requirements"]
    assert completed(meshq, "meshq submit --queue d") == ["default"]
    assert completed(meshq, "meshq logs tr") == ["train"]
    assert completed(meshq, "meshq tasks --status f") == ["failed"]


def test_the_shell_gets_no_error_where_no_agent_runs(meshq: Meshq) -> None:
    assert completed(meshq, "meshq logs tr") == []


@pytest.mark.parametrize(
    "tokens", [("--json", "--after", "t1", "x.py"), ("--dry-run", "--json", "x.py"), ("x.py", "--json", "--name")]
)
def test_a_submit_that_is_refused_while_its_options_are_told_apart_answers_in_json_if_asked(
    meshq: Meshq, tokens: tuple[str, ...]
) -> None:
    done = meshq("submit", *tokens)
    assert (done.returncode, json.loads(done.stdout)["error"]["code"]) == (2, "usage")
    assert meshq("submit", "--after", "t1", "--", "x", "--json").stdout == b"", "this one is the command's own"


@pytest.mark.parametrize("reference", ["\udcff", "q" * 9_000])
def test_what_can_be_no_task_is_an_error_of_usage(meshq: Meshq, agent: SmallAgent, reference: str) -> None:
    done = meshq("show", reference, "--json")
    error = json.loads(done.stdout)["error"]
    assert (done.returncode, error["code"], len(error["message"]) < 200) == (2, "usage", True)
