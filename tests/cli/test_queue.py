"""`meshq queue` and its steps: the real command against a small agent."""

import json
import subprocess
from typing import Any

import pytest

from tests.cli.builders import OTHER, TASK, before, queue, task
from tests.cli.conftest import Meshq
from tests.cli.small_agent import SmallAgent, error

PAUSED = queue("gpu", queued=3, running=1, paused=True, paused_by="ann@lab-1", peers=2)


def said(done: subprocess.CompletedProcess[bytes]) -> tuple[int, str, str]:
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def sent(agent: SmallAgent) -> list[tuple[str, Any]]:
    return [(route, json.loads(body) if body else None) for route, body in agent.requests]


def test_the_list_shows_what_is_paused_and_by_whom(meshq: Meshq, agent: SmallAgent) -> None:
    agent.set("GET /v1/queues", [queue("default", queued=1), PAUSED])
    code, out, err = said(meshq("queue", "list"))
    assert (code, err) == (0, "")
    assert out.splitlines()[1:] == [
        "default            1        0          0       0         1        -",
        "gpu (paused)       3        1          0       0         2        -",
        "gpu is paused by ann@lab-1: `meshq queue resume gpu` lets it go on",
    ]
    assert json.loads(meshq("queue", "list", "--json").stdout) == [queue("default", queued=1), PAUSED]


def test_show_lists_who_serves_a_queue_and_what_is_next(meshq: Meshq, agent: SmallAgent) -> None:
    waiting = [task("train", TASK, "queued", position=1), task("eval", OTHER, "queued", position=2)]
    document = PAUSED | {"served_by": ["lab-1", "lab-2"], "waiting": waiting}
    agent.set("GET /v1/queues/gpu", document)
    code, out, _ = said(meshq("queue", "show", "gpu"))
    lines = out.splitlines()
    assert code == 0
    assert lines[3] == "Served by lab-1, lab-2"
    assert [line.split()[1:4] for line in lines[6:8]] == [["train", "queued", "#1"], ["eval", "queued", "#2"]]
    assert lines[-1] == "and 1 more"
    assert json.loads(meshq("queue", "show", "gpu", "--json").stdout) == document


STEPS = [
    ("create", queue("big", peers=0), "The queue big is there\n", "hint: a machine serves it when"),
    ("create", queue("big", peers=1), "The queue big is there\n", ""),
    ("delete", {"name": "big", "deleted": True}, "The queue big is deleted\n", ""),
    ("pause", PAUSED, "The queue gpu is paused by ann@lab-1\n", "note: 1 task of it that machines work on already will go on"),
    ("resume", queue("gpu"), "The queue gpu goes on: nothing pauses it\n", ""),
]


@pytest.mark.parametrize(("step", "answer", "out", "err"), STEPS)
def test_a_step_is_one_request_and_one_sentence(
    meshq: Meshq, agent: SmallAgent, step: str, answer: dict[str, Any], out: str, err: str
) -> None:
    agent.set(f"POST /v1/queues/{answer['name']}/{step}", answer)
    done = said(meshq("queue", step, answer["name"]))
    assert (done[0], done[1]) == (0, out) and done[2].startswith(err) and bool(done[2]) == bool(err)
    assert sent(agent) == [(f"POST /v1/queues/{answer['name']}/{step}", {})]
    assert json.loads(meshq("queue", step, answer["name"], "--json").stdout) == answer


def test_retention_is_shown_and_set(meshq: Meshq, agent: SmallAgent) -> None:
    kept = {"days": 30.0, "tasks": 1000}
    agent.set("GET /v1/retention", kept)
    agent.set("POST /v1/retention", kept)
    sentence = "Tasks that are over are kept for 30 days, the last 1,000 of them\n"
    assert said(meshq("retention")) == (0, sentence, "")
    assert said(meshq("retention", "--days", "30")) == (0, sentence, "")
    assert json.loads(meshq("retention", "--tasks", "1000", "--json").stdout) == kept
    route = "POST /v1/retention"
    assert sent(agent)[1:] == [(route, {"days": 30.0, "tasks": None}), (route, {"days": None, "tasks": 1000})]


def test_clear_says_how_many_before_it_cancels_them(meshq: Meshq, agent: SmallAgent) -> None:
    agent.set("GET /v1/queues/gpu", PAUSED | {"served_by": [], "waiting": []})
    agent.set("POST /v1/queues/gpu/clear", {"name": "gpu", "cancelled": 2})
    code, out, err = said(meshq("queue", "clear", "gpu"))
    assert (code, out, err) == (
        0,
        "2 tasks of the queue gpu cancelled\n",
        "note: cancelling 3 tasks that wait in the queue gpu\n",
    )
    done = meshq("queue", "clear", "gpu", "--json")
    assert json.loads(done.stdout) == {"name": "gpu", "cancelled": 2}


MOVES = [
    (["--first"], "first", ""), (["--last"], "last", ""), (["--up"], "up", ""), (["--down"], "down", ""),
    (["--before", "eval"], "before", "eval"), (["--to", "gpu"], "to", "gpu"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "place", "target"), MOVES)
def test_a_move_says_where_the_task_waits_now(
    meshq: Meshq, agent: SmallAgent, options: list[str], place: str, target: str
) -> None:
    moved = task("train", TASK, "queued", position=2, submitted_at=before(minutes=1))
    agent.set("POST /v1/tasks/train/move", moved)
    assert said(meshq("queue", "move", "train", *options)) == (0, f"train {TASK} is number 2 in the queue gpu\n", "")
    assert sent(agent) == [("POST /v1/tasks/train/move", {"place": place, "target": target})]
    assert json.loads(meshq("queue", "move", "train", *options, "--json").stdout) == moved


def test_a_task_that_started_in_the_same_moment_is_said_to_have(meshq: Meshq, agent: SmallAgent) -> None:
    agent.set("POST /v1/tasks/train/move", task("train", TASK, "claimed"))
    assert said(meshq("queue", "move", "train", "--up")) == (0, f"train {TASK} is claimed\n", "")


WRONG = [
    (["queue"], "error: `meshq queue` needs a command\nhint: see `meshq queue --help`\n"),
    (["queue", "move", "t"], "error: `meshq queue move` needs a place\nhint: give one of --first"),
    (["queue", "move", "t", "--first", "--to", "q"], "error: `--first` and `--to` contradict each other\nhint: give one of"),
    (["queue", "move", "t", "--up", "--down"], "error: `--up` and `--down` contradict each other\n"),
    (["queue", "move", "t", "--before", "."], "error: `.` names no task\n"),
    (["queue", "move", "t", "--to", "a b"], "error: the queue: 'a b' is no name\n"),
    (["queue", "pause"], "error: missing argument `Q`\n"),
    (["queue", "pause", "../x"], "error: the queue: '../x' is no name\n"),
    (["queue", "show", "x" * 64], "error: the queue: '" + "x" * 63 + "…' is no name\n"),
    (["queue", "stop", "gpu"], "error: no such command `stop`\n"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_wrong_usage_is_one_message_and_exit_2_and_asks_no_agent(
    meshq: Meshq, agent: SmallAgent, arguments: list[str], message: str
) -> None:
    code, out, err = said(meshq(*arguments))
    assert (code, out) == (2, "") and err.startswith(message)
    assert agent.requests == []


@pytest.mark.parametrize(
    ("arguments", "route", "kind", "code"),
    [
        (["queue", "pause", "gpu"], "POST /v1/queues/gpu/pause", "usage", 2),
        (["queue", "delete", "gpu"], "POST /v1/queues/gpu/delete", "failed", 1),
        (["queue", "move", "t", "--first"], "POST /v1/tasks/t/move", "failed", 1),
    ],
)
def test_what_the_agent_refuses_is_its_message_with_the_right_code(
    meshq: Meshq, agent: SmallAgent, arguments: list[str], route: str, kind: str, code: int
) -> None:
    agent.set(route, error(kind, "it cannot be done", "do something else", status=409))
    assert said(meshq(*arguments)) == (code, "", "error: it cannot be done\nhint: do something else\n")
    under_json = meshq(*arguments, "--json")
    assert json.loads(under_json.stdout)["error"] == {"code": kind, "message": "it cannot be done", "hint": "do something else"}


@pytest.mark.parametrize("arguments", [["list"], ["show", "q"], ["clear", "q"], ["pause", "q"], ["move", "t", "--up"]])
def test_without_an_agent_each_exits_with_69(meshq: Meshq, arguments: list[str]) -> None:
    done = meshq("queue", *arguments)
    assert (done.returncode, done.stdout) == (69, b"")
