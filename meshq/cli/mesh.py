"""Commands for the whole mesh: `status`, `peers`, `retention`, `doctor`, `demo`."""

import contextlib
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Annotated, Final

import typer

from meshq.cli import layouts, screen
from meshq.cli.options import Json
from meshq.client import Client
from meshq.documents import ACTIVE, TaskSummaryDocument

WATCH_SECONDS: Final = 2.0
_CLEAR = "\x1b[H\x1b[J"


def status(
    watch: Annotated[bool, typer.Option("--watch", help="Show it again every 2 s, until Ctrl-C.")] = False,
    json: Json = False,
) -> None:
    """Show every machine, the queues, and what runs."""
    with Client() as client:
        if not watch:
            _show_status(client, json=json, again=False)
            return
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                _show_status(client, json=json, again=True)
                time.sleep(WATCH_SECONDS)


def _show_status(client: Client, *, json: bool, again: bool) -> None:
    document = client.status()
    if json:
        screen.document(document, lines=again)
        return
    lines = layouts.status_lines(document, active_tasks(client), datetime.now().astimezone(), screen.width(), screen.paint)
    if again and screen.is_terminal(sys.stdout):
        sys.stdout.write(_CLEAR)
    screen.say(*lines)


def active_tasks(client: Client) -> list[TaskSummaryDocument]:
    """What some machine is working on right now."""
    return [task for status in ACTIVE for task in client.tasks(status=status)]


def peers(json: Json = False) -> None:
    """List the machines, and how this one reaches each."""
    with Client() as client:
        found = client.peers()
    if json:
        screen.document(found)
    else:
        screen.say(*layouts.peer_lines(found, screen.width(), screen.paint))


def retention(
    days: Annotated[float | None, typer.Option("--days", metavar="N", help="Forget what has been over for longer.")] = None,
    tasks: Annotated[
        int | None, typer.Option("--tasks", metavar="N", help="Of more than so many, forget what ended first.")
    ] = None,
    json: Json = False,
) -> None:
    """Show or set how long the mesh keeps tasks that are over."""
    with Client() as client:
        kept = client.retention() if days is None and tasks is None else client.keep(days=days, tasks=tasks)
    if json:
        screen.document(kept)
    else:
        screen.say(f"Tasks that are over are kept for {kept['days']:g} days, the last {kept['tasks']:,} of them")


def doctor(json: Json = False) -> None:
    """Check this machine, its network and agent, and say what to do. Exits with 1 if a check fails."""
    with Client() as client:
        report = client.doctor()
    if json:
        screen.document(report)
    else:
        screen.say(*layouts.doctor_lines(report, screen.width(), screen.paint))
    if not all(check["ok"] for check in report["checks"]):
        raise typer.Exit(1)


def demo(
    to: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="Where the outputs go (default: ./meshq-demo-outputs).")
    ] = None,
) -> None:
    """Run a mesh of three agents on this machine, and lose one. Needs no agent and leaves none."""
    from meshq.cli.demo import run_demo

    run_demo(to)
