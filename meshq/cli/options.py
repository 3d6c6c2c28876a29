"""Options and arguments that several commands have, with their completion."""

from typing import Annotated

import typer

from meshq.cli import screen
from meshq.config import check_name
from meshq.errors import MeshqError, UsageError

Json = Annotated[
    bool, typer.Option("--json", help="Answer with one JSON document.", callback=screen.choose_json, is_eager=True)
]


def complete_task(incomplete: str) -> list[tuple[str, str]]:
    """Names and ids of the newest tasks, for the shell; nothing where no agent answers."""
    from meshq.client import Client

    try:
        with Client() as client:
            tasks = client.tasks()
    except MeshqError:
        return []
    words = {task["name"]: f"{task['status']} {task['id']}" for task in reversed(tasks)}
    words |= {task["id"]: f"{task['status']} {task['name']}" for task in tasks}
    return [(word, text) for word, text in words.items() if word.startswith(incomplete)]


def complete_queue(incomplete: str) -> list[str]:
    """The queues of the mesh."""
    from meshq.client import Client

    try:
        with Client() as client:
            return [queue["name"] for queue in client.status()["queues"] if queue["name"].startswith(incomplete)]
    except MeshqError:
        return []


def check_queue(name: str) -> str:
    """The name of a queue. UsageError for what none can have."""
    return check_name(name, "the queue")


def check_task(reference: str) -> str:
    """What may name a task. UsageError for what would end up as another address of the agent."""
    if not reference.strip("./ "):
        raise UsageError(
            f"`{reference}` names no task", "give its id, a unique prefix of it, or its name: `meshq tasks` lists them"
        )
    return reference


def check_tasks(references: list[str]) -> list[str]:
    return [check_task(each) for each in references]


TaskName = Annotated[
    str,
    typer.Argument(
        metavar="TASK", help="Its id, a unique prefix of it, or its name.", autocompletion=complete_task, callback=check_task
    ),
]
TaskNames = Annotated[
    list[str],
    typer.Argument(
        metavar="TASK", help="Ids, unique prefixes of them, or names.", autocompletion=complete_task, callback=check_tasks
    ),
]
QueueName = Annotated[
    str,
    typer.Argument(metavar="Q", help="The name of a queue.", autocompletion=complete_queue, callback=check_queue),
]
