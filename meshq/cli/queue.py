"""Commands about queues: `meshq queue list | show | create | delete | pause | resume | clear | move`."""

from datetime import datetime
from typing import Annotated

import typer

from meshq.cli import figures, layouts, screen
from meshq.cli.commands import Command, Group
from meshq.cli.options import Json, QueueName, TaskName, check_queue, check_task, complete_queue, complete_task
from meshq.client import Client
from meshq.documents import QueueDetailsDocument
from meshq.errors import UsageError
from meshq.terminal import harmless


def application() -> typer.Typer:
    """`meshq queue` and what stands below it."""
    app = typer.Typer(cls=Group, no_args_is_help=False, invoke_without_command=True, rich_markup_mode=None)
    app.callback()(queue)
    app.command("list", cls=Command)(list_queues)
    for function in (show, create, delete, pause, resume, clear, move):
        app.command(function.__name__, cls=Command)(function)
    return app


def queue(context: typer.Context) -> None:
    """Look at queues, pause them, move tasks in them."""
    if context.invoked_subcommand is None:
        raise UsageError("`meshq queue` needs a command", "see `meshq queue --help`")


def list_queues(json: Json = False) -> None:
    """List the queues, and how many tasks are in each."""
    with Client() as client:
        found = client.queues()
    if json:
        screen.document(found)
    else:
        screen.say(*layouts.queue_lines(found, screen.width(), screen.paint))


def show(queue: QueueName, json: Json = False) -> None:
    """Show one queue: who serves it, what is next."""
    with Client() as client:
        found = client.show_queue(queue)
    if json:
        screen.document(found)
    else:
        screen.say(*queue_lines(found, datetime.now().astimezone(), screen.width()))


def queue_lines(document: QueueDetailsDocument, now: datetime, width: int) -> list[str]:
    """What there is of the queue, and the beginning of its order."""
    lines = layouts.queue_lines([document], width, screen.paint)
    lines.append(f"Served by {harmless(', '.join(document['served_by'])) or 'no machine that is alive'}")
    waiting = document["waiting"]
    if waiting:
        lines += ["", *layouts.task_lines(waiting, now, width, screen.paint)]
    if document["queued"] > len(waiting):
        lines.append(f"and {document['queued'] - len(waiting)} more")
    return lines


def create(queue: QueueName, json: Json = False) -> None:
    """Create a queue, maybe before a machine serves it."""
    with Client() as client:
        done = client.create_queue(queue)
    if json:
        screen.document(done)
        return
    screen.say(f"The queue {harmless(done['name'])} is there")
    if not done["peers"]:
        screen.hint(f"a machine serves it when its agent is started with `meshq join --queue {harmless(done['name'])}`")


def delete(queue: QueueName, json: Json = False) -> None:
    """Delete a queue. Refused while tasks are in it, or a machine that is alive serves it."""
    with Client() as client:
        done = client.delete_queue(queue)
    if json:
        screen.document(done)
    else:
        screen.say(f"The queue {harmless(done['name'])} is deleted")


def pause(queue: QueueName, json: Json = False) -> None:
    """Start nothing more of a queue, anywhere. What runs goes on."""
    with Client() as client:
        done = client.pause_queue(queue)
    if json:
        screen.document(done)
        return
    by = f" by {harmless(str(done.get('paused_by')))}" if done.get("paused_by") else ""
    screen.say(f"The queue {harmless(done['name'])} is paused{by}")
    if done["running"]:
        screen.note(f"{figures.plural(done['running'], 'task')} of it that machines work on already will go on")


def resume(queue: QueueName, json: Json = False) -> None:
    """Let the tasks of a paused queue start again."""
    with Client() as client:
        done = client.resume_queue(queue)
    if json:
        screen.document(done)
    else:
        screen.say(f"The queue {harmless(done['name'])} goes on: nothing pauses it")


def clear(queue: QueueName, json: Json = False) -> None:
    """Cancel all tasks that wait in a queue. What runs goes on."""
    with Client() as client:
        waiting = client.show_queue(queue)["queued"]
        screen.note(f"cancelling {figures.plural(waiting, 'task')} that wait in the queue {queue}")
        done = client.clear_queue(queue)
    if json:
        screen.document(done)
    else:
        screen.say(f"{figures.plural(done['cancelled'], 'task')} of the queue {harmless(done['name'])} cancelled")


def move(
    task: TaskName,
    first: Annotated[bool, typer.Option("--first", help="Before all that wait in its queue.")] = False,
    last: Annotated[bool, typer.Option("--last", help="Behind all that wait in its queue.")] = False,
    up: Annotated[bool, typer.Option("--up", help="Before the task that it stands behind.")] = False,
    down: Annotated[bool, typer.Option("--down", help="Behind the task that it stands before.")] = False,
    before: Annotated[
        str | None,
        typer.Option("--before", metavar="TASK", help="Directly before this task.", autocompletion=complete_task),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="Q", help="Into this queue, behind all in it.", autocompletion=complete_queue),
    ] = None,
    json: Json = False,
) -> None:
    """Change when a waiting task runs. It takes the priority that its new place needs."""
    flags = {"first": first, "last": last, "up": up, "down": down}
    places = [(place, "") for place, given in flags.items() if given]
    places += [("before", check_task(before))] if before is not None else []
    places += [("to", check_queue(to))] if to is not None else []
    if len(places) != 1:
        given = " and ".join(f"`--{place}`" for place, _ in places)
        raise UsageError(
            f"{given} contradict each other" if places else "`meshq queue move` needs a place",
            "give one of --first, --last, --up, --down, --before TASK and --to Q",
        )
    place, target = places[0]
    with Client() as client:
        moved = client.move(task, place, target)
    if json:
        screen.document(moved)
    elif moved["position"] is None:
        screen.say(f"{harmless(moved['name'])} {moved['id']} is {moved['status']}")
    else:
        screen.say(
            f"{harmless(moved['name'])} {moved['id']} is number {moved['position']} in the queue {harmless(moved['queue'])}"
        )
