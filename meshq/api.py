"""The Python API: `connect()` to this machine's agent, `Mesh` to submit and look, `Task` to wait, read and fetch.

Synchronous, over the same client as the command line, with the same rules: whatever goes wrong is a `MeshqError`, and its
message and hint are what the command line would print.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypedDict, Unpack

from meshq.client import Client, exit_code
from meshq.config import Home
from meshq.documents import PeerDocument, StatusDocument, TaskDocument, TaskSummaryDocument
from meshq.download import default_folder, download


class SubmitKeywords(TypedDict, total=False):
    """The options of `meshq submit`. Sizes may be bytes or text such as "16G", times seconds or text such as "2h"."""

    queue: str
    name: str
    priority: int
    cpus: int
    memory: int | str
    gpus: int
    gpu_memory: int | str
    labels: Mapping[str, str]
    env: Mapping[str, str]
    requirements: str | os.PathLike[str]
    python: str
    workdir: str | os.PathLike[str]
    retries: int
    time_limit: float | str
    lease: float | str
    on_isolation: str
    hold: bool
    copies: int | str


def connect(home: str | os.PathLike[str] | None = None) -> "Mesh":
    """The mesh of the agent of this home (default: `$MESHQ_HOME`, else the user's). Unreachable if no agent runs there."""
    client = Client(None if home is None else Home(Path(home).absolute()))
    client.me()
    return Mesh(client)


class Mesh:
    """All machines, seen from this one. Close it, or use it in a `with`. For one thread at a time."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._client.close()

    def submit(self, script: str | os.PathLike[str], *args: str, **options: Unpack[SubmitKeywords]) -> "Task":
        """Hand a Python script with its arguments to the mesh. It is stored when this returns."""
        return self._submit(Path(script), args, (), options)

    def submit_command(self, command: Sequence[str], **options: Unpack[SubmitKeywords]) -> "Task":
        """Hand a command to the mesh: what `meshq submit -- COMMAND` does."""
        return self._submit(None, (), tuple(command), options)

    def _submit(self, script: Path | None, args: Sequence[str], command: Sequence[str], options: SubmitKeywords) -> "Task":
        from meshq.handover import hand_over, options_from

        given = options_from(script=script, arguments=args, command=command, **options)
        submitted, _ = hand_over(self._client, given, hold=options.get("hold", False), copies=options.get("copies", 1))
        return Task(self._client, submitted["ids"][0], submitted["name"])

    def task(self, reference: str) -> "Task":
        """The task with this id, unique prefix of an id, or name. UsageError if there is none, or more than one."""
        found = self._client.show(reference)
        return Task(self._client, found["id"], found["name"])

    def tasks(
        self, *, queue: str | None = None, status: str | None = None, user: str | None = None, limit: int | None = None
    ) -> list[TaskSummaryDocument]:
        """What `meshq tasks --json` prints."""
        return self._client.tasks(queue=queue, status=status, user=user, limit=limit)

    def status(self) -> StatusDocument:
        """What `meshq status --json` prints."""
        return self._client.status()

    def peers(self) -> list[PeerDocument]:
        """What `meshq peers --json` prints."""
        return self._client.peers()


class Task:
    """One task, wherever it runs."""

    def __init__(self, client: Client, id: str, name: str) -> None:
        self._client = client
        self.id = id
        self.name = name

    def __repr__(self) -> str:
        return f"<meshq task {self.name} {self.id}>"

    def status(self) -> str:
        """`queued`, `running`, `succeeded`…: the status of the contract."""
        return self._client.wait(self.id, 0)["status"]

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit code: 0, the task's own, 124 after its time limit, 1 if nobody knows.

        TimeoutError if it is not over after `timeout` seconds; it goes on.
        """
        result = self._client.result(self.id, timeout)
        if not result["final"]:
            raise TimeoutError(f"{self.name} ({self.id}) is not over after {timeout} s; it is {result['status']}")
        return exit_code(result)

    def logs(self, *, attempt: int | None = None, tail: int | None = None) -> str:
        """All that it wrote so far, or the last `tail` lines."""
        return b"".join(self._client.log(self.id, attempt=attempt, tail=tail)).decode("utf-8", "replace")

    def follow(self) -> Iterator[bytes]:
        """What it writes, as it comes, until it is over."""
        return (piece.data for piece in self._client.follow_log(self.id) if piece.data)

    def show(self) -> TaskDocument:
        """What `meshq show --json` prints."""
        return self._client.show(self.id)

    def fetch(self, to: str | os.PathLike[str] | None = None) -> Path:
        """Copy its outputs into the folder `to` (default: `./<name>-outputs`), never over what differs. The folder."""
        folder = Path(to) if to is not None else default_folder(self.show())
        download(self._client, self.id, folder)
        return folder

    def cancel(self) -> None:
        """Don't start it, or stop it."""
        self._client.cancel(self.id)

    def retry(self) -> "Task":
        """A new task with the same code and environment."""
        submitted = self._client.retry(self.id)
        return Task(self._client, submitted["ids"][0], submitted["name"])
