"""All commands, under the names of the contract."""

from typing import Any, Final

import typer

from meshq.cli import join, key, mesh, queue, submit, tasks
from meshq.cli.commands import Command, Group

_HELP: Final = """Turn a lab's machines into one queue, without any server.

`meshq join` on each machine makes the mesh, `meshq submit SCRIPT` on any of them hands in work, and `meshq demo` shows both.
"""


def _version(chosen: bool) -> None:
    if chosen:
        from importlib.metadata import version

        typer.echo(f"meshq {version('meshq')}")
        raise typer.Exit


def _root(
    version: bool = typer.Option(False, "--version", help="Print the version and exit.", callback=_version, is_eager=True),
) -> None:
    pass


def command(*, completion: bool) -> Any:
    """The parser for all of it; `Any`, because its class has moved between versions of typer.

    `completion`: with `--install-completion`, and able to answer the shell. Typer then imports pydantic to look at two
    options that nobody gave, which takes as long as all the rest of `meshq status`.
    """
    app = typer.Typer(
        cls=Group,
        help=_HELP,
        add_completion=completion,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # plain help: quick to show, and the same in a pipe
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(help=_HELP)(_root)
    app.command("submit", cls=submit.SubmitCommand)(submit.submit)
    plain = (
        join.join, join.leave, mesh.status, tasks.tasks, tasks.show, tasks.logs, tasks.wait, tasks.fetch,
        tasks.cancel, tasks.retry, mesh.peers, mesh.retention, mesh.doctor, mesh.demo,
    )  # fmt: skip
    for function in plain:
        app.command(function.__name__, cls=Command)(function)
    app.add_typer(key.application(), name="key")
    app.add_typer(queue.application(), name="queue")
    return typer.main.get_command(app)
