"""Commands about single tasks: `tasks`, `show`, `logs`, `wait`, `fetch`, `cancel`, `retry`."""

import sys
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Annotated, NoReturn, Self

import typer

from meshq.cli import figures, layouts, screen
from meshq.cli.boundary import EXIT_DETACHED
from meshq.cli.options import Json, TaskName, TaskNames, complete_queue
from meshq.client import Client, exit_code
from meshq.documents import ACTIVE, STATUSES, SubmittedDocument, WaitDocument, WithoutCopyDocument
from meshq.errors import Unplaceable, UsageError
from meshq.pieces import Piece, remarks
from meshq.terminal import LogView, harmless

TASKS_SHOWN = 50
LIMIT_MAX = 1_000_000  # of the agent


def tasks(
    queue: Annotated[
        str | None, typer.Option("--queue", metavar="Q", help="Only those of this queue.", autocompletion=complete_queue)
    ] = None,
    status: Annotated[
        str | None,
        typer.Option(
            "--status",
            metavar="S",
            help=f"Only those that are {', '.join(STATUSES[:-1])} or {STATUSES[-1]}.",
            autocompletion=lambda: list(STATUSES),
        ),
    ] = None,
    mine: Annotated[bool, typer.Option("--mine", help="Only those that I submitted.")] = False,
    limit: Annotated[int, typer.Option("--limit", metavar="N", help="At most so many.")] = TASKS_SHOWN,
    json: Json = False,
) -> None:
    """List tasks, the newest first, finished ones included."""
    if status is not None and status not in STATUSES:
        raise UsageError(f"--status: `{status}` is no status", f"choose one of {', '.join(STATUSES)}")
    if not 1 <= limit <= LIMIT_MAX:
        raise UsageError(f"--limit: {limit} is out of range", f"choose a number from 1 to {LIMIT_MAX}")
    with Client() as client:
        found = client.tasks(queue=queue, status=status, user=_user() if mine else None, limit=limit)
    if json:
        screen.document(found)
    else:
        screen.say(*layouts.task_lines(found, datetime.now().astimezone(), screen.width(), screen.paint))


def _user() -> str:
    """The name by which the agent knows whoever runs this command."""
    import os
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


def show(task: TaskName, json: Json = False) -> None:
    """Show one task: its status, attempts and outputs."""
    with Client() as client:
        document = client.show(task)
    if json:
        screen.document(document)
    else:
        screen.say(*layouts.show_lines(document, datetime.now().astimezone(), screen.width(), screen.paint))


def logs(
    task: TaskName,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the task is over.")] = False,
    attempt: Annotated[int | None, typer.Option("--attempt", min=1, metavar="N", help="Only of this attempt.")] = None,
    tail: Annotated[int | None, typer.Option("--tail", min=0, metavar="N", help="Only the last N lines.")] = None,
) -> None:
    """Print what a task wrote, wherever it runs or ran.

    stdout gets the log and nothing else. With `--follow`, lines such as `--- attempt 2 on lab-2 ---` go to stderr.
    """
    with Client() as client:
        try:
            if follow:
                found = client.show(task)["id"]  # fails at once where no agent runs
                write_pieces(client.follow_log(found, attempt=attempt, tail=tail))
            else:
                with _LogOutput() as output:
                    for chunk in client.log(task, attempt=attempt, tail=tail):
                        output.write(chunk)
        except KeyboardInterrupt:
            detached(task, task)


def write_pieces(followed: Iterable[Piece]) -> None:
    """Copy a followed log to stdout, and what is to be said about it to stderr."""
    before: Piece | None = None
    with _LogOutput() as output:
        for piece in followed:
            for remark in remarks(before, piece):
                output.remark(remark)
            output.write(piece.data)
            before = piece


class _LogOutput:
    """stdout for a log: made harmless for a terminal, byte for byte into a pipe."""

    def __init__(self) -> None:
        self._view: LogView | None = None
        self._open = False  # in the middle of a line

    def __enter__(self) -> Self:
        if screen.is_terminal(sys.stdout):
            self._view = LogView(terminal=True, colours=screen.colours(sys.stdout))
        return self

    def __exit__(self, *_: object) -> None:
        if self._view is not None:
            sys.stdout.write(self._view.finish())
            sys.stdout.flush()

    def write(self, data: bytes) -> None:
        if not data:
            return
        if self._view is not None:
            sys.stdout.write(self._view.feed(data))
        else:
            sys.stdout.buffer.write(data)
        sys.stdout.flush()
        self._open = not data.endswith(b"\n")

    def remark(self, text: str) -> None:
        """A line of its own on stderr, also where both streams are one."""
        if self._view is not None:
            sys.stdout.write(self._view.finish())
            sys.stdout.flush()
        line = screen.painted(f"--- {harmless(text)} ---", "dim", sys.stderr)
        print(f"\n{line}" if self._open else line, file=sys.stderr, flush=True)
        self._open = False


def detached(name: str, task: str) -> NoReturn:
    """After Ctrl-C: the task is none of this command's business any more."""
    screen.note(f"detached, `{name}` goes on")
    screen.hint(f"`meshq logs {task} --follow` shows it, `meshq cancel {task}` ends it")
    raise typer.Exit(EXIT_DETACHED)


def wait(tasks: TaskNames, json: Json = False) -> None:
    """Wait until tasks are over. Exits with the first code that is not 0, in the order given."""
    results: list[WaitDocument] = []
    with Client() as client:
        ids = [client.show(task)["id"] for task in tasks]  # all of them exist, before we wait for the first
        for name, task in zip(tasks, ids, strict=True):
            try:
                results.append(client.result(task))
            except KeyboardInterrupt:
                detached(name, task)
            if not json:
                screen.say(result_line(name, results[-1]))
    if json:
        screen.document(results)
    raise typer.Exit(next((code for code in map(exit_code, results) if code), 0))


def result_line(name: str, result: WaitDocument) -> str:
    """`train succeeded on lab-2`."""
    line = f"{harmless(name)} {result['status']}"
    line += f" on {harmless(result['peer'])}" if result["peer"] else ""
    code, reason = result["exit_code"], result["reason"]
    if result["status"] == "failed" and code is not None:
        line += f" with exit code {code}"
    return line + (f": {harmless(reason)}" if reason and reason != f"exit code {code}" else "")


def fetch(
    task: TaskName,
    to: Annotated[Path | None, typer.Option("--to", metavar="DIR", help="Where to put them (default: ./NAME-outputs).")] = None,
    json: Json = False,
) -> None:
    """Copy a task's outputs here, from whichever machine has them. Never overwrites a file that differs."""
    from meshq.download import default_folder, download

    with Client() as client:
        document = client.show(task)
        folder = to or default_folder(document)
        outputs = download(client, document["id"], folder, screen.progress)
    files = outputs["files"]
    if skipped := outputs.get("skipped", 0):
        screen.warn(f"the task left {figures.plural(skipped, 'more thing')} that are no plain files, or too many: not fetched")
    if json:
        screen.document({"id": document["id"], "folder": str(folder), "outputs": files})
        return
    if not files:
        screen.note(f"`{document['name']}` left no files in $MESHQ_OUTPUT_DIR")
        return
    for file in files:
        screen.say(f"{folder / file['path']}")
    total = figures.size(sum(file["bytes"] for file in files))
    screen.progress(f"Fetched {figures.plural(len(files), 'file')} ({total}) into {folder}")


def cancel(tasks: TaskNames, json: Json = False) -> None:
    """Cancel tasks: what waits won't start, what runs is stopped."""
    with Client() as client:
        ids = [client.show(task)["id"] for task in tasks]  # all of them exist, before the first is cancelled
        documents = [client.cancel(task) for task in ids]
    if json:
        screen.document(documents)
        return
    for document in documents:
        state = f"is {document['status']}" if document["status"] not in ACTIVE else "is being stopped"
        screen.say(f"{harmless(document['name'])} {document['id']} {state}")


def retry(task: TaskName, json: Json = False) -> None:
    """Run a task that is over once more, as a new task.

    Code, environment and options are those of the old one.
    """
    with Client() as client:
        try:
            submitted = client.retry(task)
        except Unplaceable as error:  # the agent's advice is an option of `submit`
            reasons = [line for line in error.hint.splitlines() if "--hold" not in line]
            raise Unplaceable(error.message, "\n".join([*reasons, "join a machine that fits, then retry it"])) from None
    announce(submitted, json=json)


def announce(submitted: SubmittedDocument, *, json: bool, on_stderr: bool = False) -> None:
    """Say what was submitted: a document, a sentence for a person, or the bare ids for a script."""
    for warning in submitted.get("warnings") or []:
        screen.warn(warning)
    ids, stored_on, missing = submitted["ids"], submitted["stored_on"], submitted.get("not_stored_on", [])
    if len(stored_on) < 2:
        until = "has taken a copy" if missing else "has joined"
        screen.warn(f"stored on this machine only: keep it on until another machine {until}")
    elif len(stored_on) - 1 < (wanted := submitted.get("copies", 1)):
        why = "" if missing else ": there are no more"
        others = figures.plural(len(stored_on) - 1, "other machine")
        screen.warn(f"stored on {others}, {wanted} were asked for{why}")
    if missing:
        screen.note(_without_copy(missing))
    if voters := submitted.get("voters"):
        (screen.note if len(voters) > 2 else screen.warn)(layouts.voters(voters))
    if json:
        screen.document(_submitted_document(submitted))
        return
    sentence = (
        f"Submitted `{submitted['name']}` ({', '.join(ids)}) to queue {submitted['queue']}, stored on {', '.join(stored_on)}"
    )
    if on_stderr:
        screen.progress(sentence)
    elif screen.is_terminal(sys.stdout):
        screen.say(harmless(sentence))
        screen.hint(f"`meshq logs {ids[0][: layouts.ID_CHARS]} --follow` shows its output")
    else:
        screen.say(*ids)


def _without_copy(missing: list[WithoutCopyDocument]) -> str:
    if len(missing) == 1:
        return layouts.line(f"{missing[0]['name']} is alive but did not take a copy: {missing[0]['reason']}")
    names = layouts.several([f"{each['name']} ({each['reason']})" for each in missing])
    return f"these are alive but did not take a copy: {names}"


def _submitted_document(submitted: SubmittedDocument) -> dict[str, object]:
    ids = submitted["ids"]
    identity: dict[str, object] = {"id": ids[0]} if len(ids) == 1 else {"ids": ids}
    places = {"stored_on": submitted["stored_on"], "not_stored_on": submitted.get("not_stored_on", [])}
    voters: dict[str, object] = {"voters": submitted["voters"]} if "voters" in submitted else {}
    return identity | {"name": submitted["name"], "queue": submitted["queue"]} | places | voters
