"""The client over a real Unix socket: what it asks, what it makes of failures, and how it survives a restart."""

import threading
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from meshq import client as client_module
from meshq.client import AgentGone, Client, exit_code
from meshq.config import OBJECTS_BATCH_BYTES, Home
from meshq.documents import STATUSES
from meshq.errors import ERROR_KINDS, MeshqError, Unreachable
from meshq.pieces import encode_piece
from meshq.task import Status
from tests.cli.builders import OTHER, TASK, task, waited
from tests.cli.small_agent import Answer, SmallAgent, error, piece, pieces, running, together


def test_calls_share_one_connection_and_each_shows_the_cookie(agent: SmallAgent) -> None:
    agent.set("GET /v1/peers", [])
    with Client(agent.home) as client:
        assert client.peers() == client.peers() == []
        assert client._connection is not None and client._connection.sock is not None


def test_a_deep_home_is_reached_too(tmp_path: Path) -> None:
    with running(tmp_path / ("deep" * 30)) as agent, Client(agent.home) as client:
        agent.set("GET /v1/peers", [])
        assert client.peers() == []


@pytest.mark.parametrize("code", ERROR_KINDS)
def test_an_error_of_the_agent_comes_out_as_its_own_kind(agent: SmallAgent, code: str) -> None:
    agent.set("GET /v1/peers", error(code, "it failed", "do this"))
    with Client(agent.home) as client, pytest.raises(ERROR_KINDS[code]) as caught:
        client.peers()
    assert type(caught.value) is ERROR_KINDS[code]
    assert (caught.value.message, caught.value.hint) == ("it failed", "do this")


@pytest.mark.parametrize(
    "answer", [Answer("no object", 500), Answer({"error": {}}, 404), Answer({"error": {"code": "new"}}, 418)]
)
def test_an_error_in_another_shape_is_still_an_error(agent: SmallAgent, answer: Answer) -> None:
    agent.set("GET /v1/peers", answer)
    with Client(agent.home) as client, pytest.raises(MeshqError, match="HTTP status"):
        client.peers()


def test_an_answer_that_is_no_json_is_named(agent: SmallAgent) -> None:
    agent.set("GET /v1/peers", Answer(chunks=(b"<html>",)))
    with Client(agent.home) as client, pytest.raises(Unreachable, match="something else than JSON"):
        client.peers()


def test_no_agent_and_a_foreign_agent_are_told_apart(tmp_path: Path) -> None:
    with Client(Home(tmp_path / "none")) as client, pytest.raises(AgentGone, match="no agent runs here"):
        client.me()


def test_an_agent_that_does_not_answer_in_time_is_named(agent: SmallAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "ANSWER_SECONDS", 0.05)
    release = threading.Event()

    class Slow(list[Answer]):
        def __getitem__(self, index: object) -> Answer:  # type: ignore[override]  # only [0] is used
            release.wait(30)
            return Answer([])

    agent.answers["GET /v1/peers"] = Slow([Answer([])])
    try:
        with Client(agent.home) as client, pytest.raises(AgentGone, match="did not answer within"):
            client._json("GET", "/v1/peers", None, "", 0.05)
    finally:
        release.set()


def test_references_and_paths_are_quoted(agent: SmallAgent) -> None:
    agent.set("GET /v1/tasks/a%20b%2Fc%3F", task())
    agent.set("GET /v1/tasks/t/outputs/plots/a%20b.png", Answer(chunks=(b"x",)))
    with Client(agent.home) as client:
        assert client.show("a b/c?")["id"] == TASK
        assert b"".join(client.output("t", "plots/a b.png")) == b"x"


def test_objects_travel_in_frames_and_batches_of_limited_size(agent: SmallAgent) -> None:
    agent.set("POST /v1/objects", {"stored": 1})
    half = b"x" * (OBJECTS_BATCH_BYTES // 2 + 1)
    with Client(agent.home) as client:
        client.store_objects([(3, half), (3, half), (2, b"tree"), (1, b"commit")])
        client.store_objects([])
    bodies = [body for _, body in agent.requests]
    assert [len(body) for body in bodies] == [5 + len(half), 5 + len(half) + 5 + 4 + 5 + 6]
    assert bodies[0] == b"\x03" + len(half).to_bytes(4, "big") + half
    assert bodies[1].endswith(b"\x02\x00\x00\x00\x04tree\x01\x00\x00\x00\x06commit")


def test_a_stream_that_breaks_off_is_no_end(agent: SmallAgent) -> None:
    agent.set("GET /v1/tasks/t/log", Answer(chunks=(b"one\n",), cut=True))
    with Client(agent.home) as client:
        stream = client.log("t")
        assert next(stream) == b"one\n"
        with pytest.raises(AgentGone):
            next(stream)


def followed(agent: SmallAgent, **options: Any) -> bytes:
    with Client(agent.home) as client:
        return b"".join(piece.data for piece in client.follow_log("t", **options))


def log_queries(agent: SmallAgent) -> list[str]:
    return [unquote(request.partition("?")[2]) for request, _ in agent.requests if "/log" in request]


def test_a_followed_log_goes_on_where_it_broke_off(agent: SmallAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "RECONNECT_PAUSE_SECONDS", 0.01)
    agent.set("GET /v1/tasks/t/wait", waited("running", None, final=False, id="t"))
    agent.set(
        "GET /v1/tasks/t/log",
        Answer(chunks=(), cut=True),
        pieces(b"two\n", b"thr", offset=4, cut=True),
        pieces(offset=11, cut=True),
        together(pieces(b"ee\n", offset=11), pieces(b"again\n", attempt=2, cut=True)),
        pieces(b"end\n", attempt=2, offset=6),
    )
    assert followed(agent, tail=2) == b"two\nthree\nagain\nend\n"
    first, second = piece(1, 0).fence, piece(2, 0).fence
    assert log_queries(agent) == [
        "follow=1&tail=2",
        "follow=1&tail=2",
        f"follow=1&from={first}:11",
        f"follow=1&from={first}:11",
        f"follow=1&from={second}:6",
    ]


def test_a_piece_that_was_cut_in_its_middle_is_asked_for_again(agent: SmallAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "RECONNECT_PAUSE_SECONDS", 0.01)
    whole = encode_piece(piece(1, 0, b"one\n"))
    agent.set("GET /v1/tasks/t/wait", waited("running", None, final=False, id="t"))
    agent.set("GET /v1/tasks/t/log", Answer(chunks=(whole, whole[:-2]), cut=True), pieces(b"two\n", offset=4))
    assert followed(agent, attempt=1) == b"one\ntwo\n"
    assert log_queries(agent) == ["follow=1&attempt=1", f"follow=1&attempt=1&from={piece(1, 0).fence}:4"]


def test_a_log_that_never_comes_is_given_up(agent: SmallAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "RECONNECT_PAUSE_SECONDS", 0.0)
    agent.set("GET /v1/tasks/t/wait", waited("running", None, final=False, id="t"))
    agent.set("GET /v1/tasks/t/log", Answer(chunks=(), cut=True))
    with Client(agent.home) as client, pytest.raises(AgentGone):
        list(client.follow_log("t"))
    assert len([request for request, _ in agent.requests if "/log" in request]) == client_module.RECONNECTS_MAX + 1


def test_an_answer_that_was_cut_in_its_middle_is_asked_for_again(agent: SmallAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "RECONNECT_PAUSE_SECONDS", 0.01)
    agent.set("GET /v1/tasks/t/wait", Answer(waited(), cut=True), waited("failed", 9))
    with Client(agent.home) as client:
        assert client.result("t")["exit_code"] == 9


def test_a_peer_that_is_out_of_reach_is_reported_at_once(agent: SmallAgent) -> None:
    agent.set("GET /v1/tasks/t/wait", error("unreachable", "lab-2 does not answer", status=502))
    with Client(agent.home) as client, pytest.raises(Unreachable, match="lab-2"):
        client.result("t")
    assert len(agent.requests) == 1


def test_an_agent_that_stays_away_is_waited_for_only_so_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "RECONNECT_SECONDS", 0.05)
    monkeypatch.setattr(client_module, "RECONNECT_PAUSE_SECONDS", 0.01)
    with Client(Home(tmp_path)) as client, pytest.raises(AgentGone):
        client.result("t")


def test_waiting_by_name_holds_on_to_the_task_that_had_it_first(agent: SmallAgent) -> None:
    agent.set("GET /v1/tasks/train/wait", waited("running", None, final=False, id=OTHER))
    agent.set(f"GET /v1/tasks/{OTHER}/wait", waited("succeeded", 0, id=OTHER))
    with Client(agent.home) as client:
        assert client.result("train")["id"] == OTHER


@pytest.mark.parametrize(
    ("status", "code", "timed_out", "expected"),
    [
        ("succeeded", 0, False, 0),
        ("failed", 7, False, 7),
        ("failed", 143, True, 124),
        ("failed", None, False, 1),
        ("cancelled", None, False, 1),
        ("cancelled", 143, False, 143),
    ],
)
def test_the_exit_code_of_a_wait(status: str, code: int | None, timed_out: bool, expected: int) -> None:
    assert exit_code(waited(status, code, timed_out=timed_out)) == expected


def test_the_statuses_of_the_command_line_are_those_of_tasks() -> None:
    assert tuple(status.value for status in Status) == STATUSES
