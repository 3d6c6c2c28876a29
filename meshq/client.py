"""What the command line and the Python API call: one method for each thing that the local agent can be asked.

Synchronous, over the agent's Unix socket, with the standard library's HTTP client: this module stands in the start-up path
of every command, so it imports nothing that takes long. Whatever goes wrong comes out as one kind of `MeshqError`; an
error that the agent reports keeps its kind, its message and its hint.
"""

import contextlib
import functools
import http.client
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Final, Self, TypeVar, cast
from urllib.parse import quote, urlencode

from meshq import control
from meshq.config import KEEPALIVE_SECONDS, LOG_CHUNK_BYTES, OBJECTS_BATCH_BYTES, Home, home_from_environment
from meshq.documents import (
    ClearedDocument,
    DeletedDocument,
    DoctorDocument,
    KeysDocument,
    KeyStepDocument,
    MeDocument,
    OutputsDocument,
    PeerDocument,
    QueueDetailsDocument,
    QueueDocument,
    RetentionDocument,
    StatusDocument,
    SubmittedDocument,
    TaskDocument,
    TaskSummaryDocument,
    WaitDocument,
)
from meshq.errors import ERROR_KINDS, MeshqError, Unreachable, UsageError
from meshq.pieces import FrameReader, Piece, decode_piece

T = TypeVar("T")

REFERENCE_CHARS_MAX: Final = 128  # of a task: names have half as many
ANSWER_SECONDS: Final = 30.0  # an agent that answers later than this hangs; commits on a busy disk took up to 5 s
SUBMIT_SECONDS: Final = 900.0  # the agent answers when the source is on other machines: 512 MiB over a slow line
KEY_SECONDS: Final = 360.0  # each of 1,000 machines may take 5 s to answer, 32 at a time, twice
WAIT_SECONDS: Final = 60.0  # of one long poll, the most that the agent allows
RECONNECT_SECONDS: Final = 60.0  # an agent is upgraded or restarted in less
RECONNECT_PAUSE_SECONDS: Final = 0.5
TOKEN_BYTES: Final = 12
RECONNECTS_MAX: Final = 20  # in a row, soon and without a single byte: then it is no restart
ANSWER_BYTES_MAX: Final = 64 * 2**20  # the list of 100,000 tasks has 40 MB
EXIT_TIMED_OUT: Final = 124
EXIT_UNKNOWN: Final = 1


class AgentGone(Unreachable):
    """This machine's agent itself does not answer, as opposed to a peer that it asked. State: unknown there, unchanged here."""


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over the agent's socket instead of TCP."""

    def __init__(self, home: Home) -> None:
        super().__init__("meshq")
        self._home = home

    def connect(self) -> None:
        self.sock = control.connect(self._home, ANSWER_SECONDS)


class Client:
    """The agent of one home. Keeps one connection; for use by one thread at a time."""

    def __init__(self, home: Home | None = None) -> None:
        self.home = home or home_from_environment()
        self._connection: http.client.HTTPConnection | None = None
        self._used_at = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; the next call opens another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    # ---- the mesh

    def me(self) -> MeDocument:
        return cast(MeDocument, self._get("/v1/me"))

    def status(self) -> StatusDocument:
        return cast(StatusDocument, self._get("/v1/status"))

    def peers(self) -> list[PeerDocument]:
        return cast(list[PeerDocument], self._get("/v1/peers"))

    def doctor(self) -> DoctorDocument:
        return cast(DoctorDocument, self._get("/v1/doctor"))

    def key(self) -> str:
        """The mesh key."""
        return str(self._get("/v1/key")["key"])

    def keys(self) -> KeysDocument:
        """All keys of the mesh, by their public ids, and who has them."""
        return cast(KeysDocument, self._get("/v1/keys"))

    def install_key(self, key: str | None, without: Iterable[str] = ()) -> KeyStepDocument:
        """Hand this key, or a new one, to every machine that is known but those `without`."""
        body = {"key": key, "without": list(without)}
        return cast(KeyStepDocument, self._post("/v1/keys/install", body, KEY_SECONDS))

    def use_key(self, key: str, without: Iterable[str] = ()) -> KeyStepDocument:
        """Have the mesh use the key of this id. TaskFailed unless all live machines but those `without` have it."""
        return cast(KeyStepDocument, self._post("/v1/keys/use", {"ids": [key], "without": list(without)}, KEY_SECONDS))

    def remove_keys(self, keys: Iterable[str], without: Iterable[str] = ()) -> KeyStepDocument:
        """Accept these keys no longer. TaskFailed while live machines but those `without` use one of them."""
        return cast(KeyStepDocument, self._post("/v1/keys/remove", {"ids": list(keys), "without": list(without)}, KEY_SECONDS))

    def leave(self, *, drain: bool = False, timeout: float | None = None) -> list[str]:
        """End the agent's attempts and let it say left; the tasks of which processes still run, since they could not be ended.

        `drain`: first let what runs end by itself, for that long at most.
        """
        body: dict[str, object] = {"drain": drain, "timeout": timeout} if drain else {}
        return cast(list[str], self._post("/v1/leave", body, answer_seconds=None).get("still_running", []))

    # ---- tasks

    def tasks(
        self, *, queue: str | None = None, status: str | None = None, user: str | None = None, limit: int | None = None
    ) -> list[TaskSummaryDocument]:
        """The newest first, finished ones included; 50 unless `limit` says otherwise."""
        query = _query(queue=queue, status=status, user=user, limit=limit)
        return cast(list[TaskSummaryDocument], self._get(f"/v1/tasks{query}"))

    def show(self, task: str) -> TaskDocument:
        return cast(TaskDocument, self._get(_task_path(task)))

    def cancel(self, task: str) -> TaskDocument:
        return cast(TaskDocument, self._post(_task_path(task, "cancel"), {}))

    def retry(self, task: str) -> SubmittedDocument:
        return cast(SubmittedDocument, self._post(_task_path(task, "retry"), {}))

    def move(self, task: str, place: str, target: str = "") -> TaskSummaryDocument:
        """Let a waiting task wait elsewhere: first, last, up, down, before the task `target` or to the queue `target`."""
        return cast(TaskSummaryDocument, self._post(_task_path(task, "move"), {"place": place, "target": target}))

    def submit(self, specs: list[dict[str, object]], *, hold: bool = False, copies: int | str = 1) -> SubmittedDocument:
        """Hand in plain specs whose objects were stored before. Unplaceable if no known peer could run them.

        Answered when the tasks are stored here and on `copies` other machines (a number or "all"), or when those take too long.
        If the agent goes away before it answers, the same request is sent again, and makes no second task.
        """
        token = os.urandom(TOKEN_BYTES).hex()
        named = [{**spec, "request": spec.get("request") or f"{token}.{number}"} for number, spec in enumerate(specs)]
        body: dict[str, object] = {"specs": named, "hold": hold, "copies": copies}
        send = functools.partial(self._post, "/v1/tasks", body, SUBMIT_SECONDS)
        try:
            return cast(SubmittedDocument, send())
        except AgentGone:
            return cast(SubmittedDocument, self.patient(send))

    def missing_objects(self, ids: Iterable[str]) -> list[str]:
        """Those of these git objects that the agent lacks."""
        return [str(each) for each in self._post("/v1/objects/missing", {"ids": list(ids)})["ids"]]

    def store_objects(self, objects: Iterable[tuple[int, bytes]]) -> None:
        """Store git objects, each given as (1 commit, 2 tree or 3 blob; raw content), in batches."""
        for batch in _batches(objects):
            self._json("POST", "/v1/objects", batch, "application/octet-stream", ANSWER_SECONDS)

    # ---- queues

    def queues(self) -> list[QueueDocument]:
        return cast(list[QueueDocument], self._get("/v1/queues"))

    def show_queue(self, queue: str) -> QueueDetailsDocument:
        return cast(QueueDetailsDocument, self._get(_queue_path(queue)))

    def create_queue(self, queue: str) -> QueueDocument:
        return cast(QueueDocument, self._post(_queue_path(queue, "create"), {}))

    def delete_queue(self, queue: str) -> DeletedDocument:
        """TaskFailed while tasks are in it or a live machine serves it."""
        return cast(DeletedDocument, self._post(_queue_path(queue, "delete"), {}))

    def pause_queue(self, queue: str) -> QueueDocument:
        """Nothing of it starts any more; what runs goes on."""
        return cast(QueueDocument, self._post(_queue_path(queue, "pause"), {}))

    def resume_queue(self, queue: str) -> QueueDocument:
        return cast(QueueDocument, self._post(_queue_path(queue, "resume"), {}))

    def clear_queue(self, queue: str) -> ClearedDocument:
        """Cancel what waits in it."""
        return cast(ClearedDocument, self._post(_queue_path(queue, "clear"), {}, SUBMIT_SECONDS))

    def retention(self) -> RetentionDocument:
        return cast(RetentionDocument, self._get("/v1/retention"))

    def keep(self, *, days: float | None = None, tasks: int | None = None) -> RetentionDocument:
        """Keep ended tasks for so many days, and at most so many; None: as it is."""
        return cast(RetentionDocument, self._post("/v1/retention", {"days": days, "tasks": tasks}))

    # ---- waiting, logs and outputs

    def wait(self, task: str, timeout: float = WAIT_SECONDS) -> WaitDocument:
        """Where the task stands as soon as it is over, or after `timeout` seconds (at most 60)."""
        path = _task_path(task, "wait") + _query(timeout=min(timeout, WAIT_SECONDS))
        return cast(WaitDocument, self._json("GET", path, None, "", timeout + ANSWER_SECONDS))

    def result(self, task: str, timeout: float | None = None) -> WaitDocument:
        """Where the task stands when it is over, or (`final` is false) after `timeout` seconds.

        Goes on when the agent is restarted meanwhile.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = WAIT_SECONDS if deadline is None else max(0.0, deadline - time.monotonic())
            answer = self.patient(functools.partial(self.wait, task, left))
            if answer["final"] or (deadline is not None and time.monotonic() >= deadline):
                return answer
            task = answer["id"]  # a name may be given again while we wait

    def log(self, task: str, *, attempt: int | None = None, tail: int | None = None) -> Iterator[bytes]:
        """What there is of the log of one attempt."""
        yield from self._stream(_task_path(task, "log") + _query(attempt=attempt, tail=tail), ANSWER_SECONDS)

    def follow_log(self, task: str, *, attempt: int | None = None, tail: int | None = None) -> Iterator[Piece]:
        """The log of every attempt as it comes, until the task is over; with `attempt` of that one alone.

        Goes on exactly where it was when the agent is restarted meanwhile.
        """
        task = self.patient(functools.partial(self.wait, task, 0))["id"]  # a name may be given again while we follow
        position: str | None = None
        failures = 0
        while True:
            began = time.monotonic()
            query = {"follow": 1, "attempt": attempt} | ({"from": position} if position else {"tail": tail})
            try:
                for piece in self._pieces(_task_path(task, "log") + _query(**query)):
                    position = f"{piece.fence}:{piece.end}"
                    failures = 0 if piece.data else failures
                    yield piece
                return
            except AgentGone:
                failures = failures + 1 if time.monotonic() - began < RECONNECT_SECONDS else 0
                if failures > RECONNECTS_MAX:
                    raise
                time.sleep(RECONNECT_PAUSE_SECONDS)
            self.patient(functools.partial(self.wait, task, 0))

    def _pieces(self, path: str) -> Iterator[Piece]:
        reader = FrameReader()
        for data in self._stream(path, None):
            for header, content in reader.feed(data):
                yield decode_piece(header, content)

    def outputs(self, task: str) -> OutputsDocument:
        return cast(OutputsDocument, self._get(_task_path(task, "outputs")))

    def output(self, task: str, path: str) -> Iterator[bytes]:
        """The bytes of one output file."""
        yield from self._stream(_task_path(task, "outputs", path), ANSWER_SECONDS)

    def patient(self, call: Callable[[], T]) -> T:
        """The result of `call`, repeated while no agent answers, for at most RECONNECT_SECONDS."""
        deadline = time.monotonic() + RECONNECT_SECONDS
        while True:
            try:
                return call()
            except AgentGone:
                if time.monotonic() >= deadline:
                    raise
            time.sleep(RECONNECT_PAUSE_SECONDS)

    # ---- transport

    def _get(self, path: str) -> Any:
        return self._json("GET", path, None, "", ANSWER_SECONDS)

    def _post(self, path: str, body: Mapping[str, object], answer_seconds: float | None = ANSWER_SECONDS) -> Any:
        return self._json("POST", path, json.dumps(body).encode(), "application/json", answer_seconds)

    def _json(self, method: str, path: str, body: bytes | None, kind: str, answer_seconds: float | None) -> Any:
        with self._failures(answer_seconds):
            response = self._send(method, path, body, kind, answer_seconds)
            data = _whole(response)
            self._used_at = time.monotonic()
        return _decoded(response.status, data)

    def _stream(self, path: str, answer_seconds: float | None) -> Iterator[bytes]:
        try:
            with self._failures(answer_seconds):
                response = self._send("GET", path, None, "", answer_seconds)
                if response.status >= 400:
                    _decoded(response.status, _whole(response))
                while chunk := response.read1(LOG_CHUNK_BYTES):
                    yield chunk
                if response.length:  # read1 does not tell a cut connection from the end
                    raise http.client.IncompleteRead(b"", response.length)
        finally:
            self.close()  # a stream that was left half read can't carry the next answer

    def _send(
        self, method: str, path: str, body: bytes | None, kind: str, answer_seconds: float | None
    ) -> http.client.HTTPResponse:
        """Send one request. An idle connection is not reused near its end of life: the agent may be closing it right now."""
        if self._connection is None or time.monotonic() - self._used_at > KEEPALIVE_SECONDS / 2:
            self.close()
            self._connection = _UnixConnection(self.home)
            self._connection.connect()
        headers = {"Authorization": f"Bearer {control.read_cookie(self.home)}"} | ({"Content-Type": kind} if kind else {})
        if self._connection.sock is not None:
            self._connection.sock.settimeout(answer_seconds)
        self._connection.request(method, path, body, headers)
        return self._connection.getresponse()

    @contextlib.contextmanager
    def _failures(self, answer_seconds: float | None) -> Iterator[None]:
        """Turn what the transport may raise into AgentGone, saying what to do next."""
        where = f"(home `{self.home.root}`)"
        try:
            yield
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
            self.close()
            raise AgentGone(f"no agent runs here {where}", "start one with `meshq join`") from None
        except PermissionError:
            self.close()
            raise AgentGone(
                f"not allowed to talk to the agent of another user {where}",
                "ask its owner to restart it with `meshq join --group GROUP`, or set MESHQ_HOME to your own",
            ) from None
        except TimeoutError:
            self.close()
            raise AgentGone(
                f"the agent did not answer within {answer_seconds:.0f} s {where}", "look into its log, `agent.log` in its home"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise AgentGone(
                f"the connection to the agent broke {where}: {str(error) or type(error).__name__}",
                "see whether it still runs with `meshq status`; its log is `agent.log` in its home",
            ) from None


def exit_code(result: WaitDocument) -> int:
    """What a command that waited for this task exits with: 0, the task's code, 124 after its time limit, 1 if nobody knows."""
    if result["timed_out"]:
        return EXIT_TIMED_OUT
    if result["status"] == "succeeded":
        return 0
    return result["exit_code"] or EXIT_UNKNOWN


def _whole(response: http.client.HTTPResponse) -> bytes:
    """The body. IncompleteRead if the connection was cut in its middle, of which `read` with a limit says nothing."""
    data = response.read(ANSWER_BYTES_MAX)
    if response.length and len(data) < ANSWER_BYTES_MAX:
        raise http.client.IncompleteRead(data, response.length)
    return data


def _decoded(status: int, data: bytes) -> Any:
    """The JSON in an answer; raises the error that it holds."""
    try:
        document = json.loads(data)
    except ValueError:
        raise Unreachable(
            f"the agent answered with something else than JSON (HTTP status {status})",
            "restart the agent: it may be of another version than this command",
        ) from None
    if status < 400:
        return document
    error = document.get("error", {}) if isinstance(document, dict) else {}
    kind = ERROR_KINDS.get(str(error.get("code")), MeshqError)
    raise kind(str(error.get("message") or f"the agent refused with HTTP status {status}"), str(error.get("hint") or ""))


def _task_path(task: str, *rest: str) -> str:
    """UsageError for what can be neither an id nor a name: the agent would not even understand the request."""
    if len(task) > REFERENCE_CHARS_MAX or not task.isprintable():
        raise UsageError(f"there is no task {task[:REFERENCE_CHARS_MAX]!a}", "`meshq tasks` lists them")
    return "/".join(("/v1/tasks", quote(task, safe=""), *(quote(part, safe="/") for part in rest)))


def _queue_path(queue: str, *rest: str) -> str:
    return "/".join(("/v1/queues", quote(queue, safe=""), *rest))


def _query(**values: str | float | None) -> str:
    given = {name: value for name, value in values.items() if value is not None}
    return f"?{urlencode(given)}" if given else ""


def _batches(objects: Iterable[tuple[int, bytes]]) -> Iterator[bytes]:
    """Frames of type, length and content, joined to bodies of about OBJECTS_BATCH_BYTES."""
    batch = bytearray()
    for kind, content in objects:
        if batch and len(batch) + len(content) > OBJECTS_BATCH_BYTES:
            yield bytes(batch)
            batch.clear()
        batch += bytes((kind,)) + len(content).to_bytes(4, "big") + content
    if batch:
        yield bytes(batch)
