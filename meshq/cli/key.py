"""The mesh key: `meshq key` prints it; `list`, `install`, `use` and `remove` change it while the mesh works.

Without an agent `list`, `install --key-file` and `use` work on the home alone: so a machine that was away while its mesh
changed the key is given the new one. The command line knows nothing of keys, so `python -m meshq.trust.offline` does it,
and reads the key from a pipe.
"""

import json as json_codec
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from meshq.cli import screen
from meshq.cli.commands import Command, Group
from meshq.cli.figures import plural
from meshq.cli.join import read_key
from meshq.cli.layouts import folded
from meshq.cli.options import Json
from meshq.cli.table import Cell, Column, table
from meshq.client import AgentGone, Client
from meshq.config import Home
from meshq.documents import KeyDocument, KeysDocument, KeyStepDocument
from meshq.errors import ERROR_KINDS, MeshqError, TaskFailed, UsageError
from meshq.terminal import harmless

OFFLINE_SECONDS: Final = 60.0

Without = Annotated[
    list[str] | None,
    typer.Option("--without", metavar="PEER", help="Go on without this machine, and shut it out. May be repeated."),
]
KeyId = Annotated[str, typer.Argument(metavar="ID", help="Of a key, or its beginning; `meshq key list` shows them.")]
KeyIds = Annotated[list[str], typer.Argument(metavar="ID", help="Of keys, or their beginnings; `meshq key list` shows them.")]


def application() -> typer.Typer:
    """`meshq key` and what stands below it."""
    app = typer.Typer(cls=Group, invoke_without_command=True, no_args_is_help=False, rich_markup_mode=None)
    app.callback()(key)
    app.command("list", cls=Command)(list_keys)
    app.command("install", cls=Command)(install)
    app.command("use", cls=Command)(use)
    app.command("remove", cls=Command)(remove)
    return app


def key(context: typer.Context, json: Json = False) -> None:
    """Print the mesh key, for the other machines. Whoever has it can run code on all of them.

    To change it: `install` a new one, `use` it, `remove` the old one.
    """
    if context.invoked_subcommand is not None:
        return
    with Client() as client:
        text = client.key()
    if not text:
        raise TaskFailed("the agent knows no mesh key", "restart it with `meshq join`")
    if json:
        screen.document({"key": text})
    else:
        screen.say(text)


def list_keys(json: Json = False) -> None:
    """List the keys that the mesh accepts, by their ids, and how many machines have each.

    Below the table: the known machines that are off, and are not known to have a key.
    """
    with Client() as client:
        try:
            found = client.keys()
        except AgentGone as gone:
            found = _offline(client.home, gone, {"action": "list"})
    if json:
        screen.document(found)
    else:
        screen.say(*key_lines(found, screen.width()))


def install(
    key_file: Annotated[
        Path | None,
        typer.Option("--key-file", metavar="F", help="Install the key in this file (`-`: stdin) instead of a new one."),
    ] = None,
    without: Without = None,
    json: Json = False,
) -> None:
    """Hand a new key to every machine that is known now; it is accepted beside the old one.

    To repeat this hands the same key to machines that have come since.
    """
    text = read_key(key_file) if key_file is not None else None
    with Client() as client:
        try:
            done = client.install_key(text, without or ())
        except AgentGone as gone:
            done = _offline(client.home, gone, {"action": "install", "key": text})
    if json:
        screen.document(done)
        return
    screen.say(_said("is installed", done))
    _remark(done)
    use_it = f"`meshq key use {done['id']}`"
    if text is not None and not done["failed"] and len(done["peers"]) < 2:
        screen.hint(f"to have this machine use it: {use_it}")
    else:
        screen.hint(f"when `meshq key list` shows it everywhere: {use_it}")


def use(key: KeyId, without: Without = None, json: Json = False) -> None:
    """Have every machine use this key, and `meshq key` print it. Refused until all live ones have it."""
    with Client() as client:
        try:
            done = client.use_key(key, without or ())
        except AgentGone as gone:
            done = _offline(client.home, gone, {"action": "use", "id": key})
    if json:
        screen.document(done)
        return
    screen.say(_said("is in use", done))
    _remark(done)
    if done["peers"]:
        screen.hint("before `meshq key remove` of the old one see in `meshq key list` who is off and would be locked out")
    else:
        screen.hint("start the agent: `meshq join`")


def remove(keys: KeyIds, without: Without = None, json: Json = False) -> None:
    """Accept these keys no longer: whoever has no other is out. Refused while a live machine uses one of them.

    `meshq key list` names the machines that are off and would be locked out.
    """
    with Client() as client:
        done = client.remove_keys(keys, without or ())
    if json:
        screen.document(done)
        return
    screen.say(_said("were removed" if "," in done["id"] else "was removed", done))
    _remark(done)


def key_lines(document: KeysDocument, width: int) -> list[str]:
    """One line for each key, the one in use first; then who is off without it."""
    columns = (Column("KEY"), Column("USED"), Column("MACHINES", right=True), Column("LACKING", gives_way=True))
    lines = table(columns, [_row(each) for each in document["keys"]], width, screen.paint)
    for key in document["keys"]:
        if off := key.get("off"):
            text = f"off, and not known to have {key['id']}: {', '.join(off)}"
            lines += [screen.paint(each, "yellow") for each in folded(text, width)]
    return lines


def _row(key: KeyDocument) -> list[Cell | str]:
    elsewhere = f"by {', '.join(key['used_by'])}" if key["used_by"] else "no"
    lacking = Cell(", ".join(key["lacking"]) or "-", "yellow" if key["lacking"] else "")
    return [key["id"], Cell("yes", "green") if key["in_use"] else elsewhere, str(len(key["peers"])), lacking]


def _said(what: str, done: KeyStepDocument) -> str:
    machines = plural(len(done["peers"]), "machine")
    where = f" at {machines}: {', '.join(done['peers'])}" if done["peers"] else " in this home"
    ids = done["id"].split(",")
    return harmless(f"{'key' if len(ids) == 1 else 'keys'} {', '.join(ids)} {what}{where}")


def _remark(done: KeyStepDocument) -> None:
    for each in done["failed"]:
        screen.warn(f"{each['name']} {each['reason']}; it hears of this when it can")
    if later := done.get("later"):
        screen.note(f"off, and get the key when they come back: {', '.join(later)}")
    if left_out := done.get("left_out"):
        screen.note(f"do not get the key: {', '.join(left_out)}")
    if stranded := done.get("stranded"):
        screen.warn(f"off, and locked out now, as far as is known: {', '.join(stranded)}")
        screen.hint(
            "on each of them: `meshq key install --key-file F` with what `meshq key` prints here in F, then "
            "`meshq key use ID`, then `meshq join` if no agent runs there"
        )


def _offline(home: Home, gone: AgentGone, request: dict[str, Any]) -> Any:
    """What can be done in the home alone; `gone` if it belongs to no mesh yet."""
    if not home.key.exists():
        raise gone
    if request["action"] == "install" and request["key"] is None:
        raise UsageError(
            "no agent runs here, so there is nobody to hand a new key to", "start it with `meshq join`, or give --key-file"
        )
    environment = {name: value for name, value in os.environ.items() if name != "MESHQ_KEY"}
    done = subprocess.run(
        [sys.executable, "-m", "meshq.trust.offline"], input=json_codec.dumps(request).encode(), capture_output=True,
        env=environment | {"MESHQ_HOME": str(home.root)}, timeout=OFFLINE_SECONDS, check=False,
    )  # fmt: skip
    try:
        answer = json_codec.loads(done.stdout)
    except ValueError:
        raise MeshqError(f"the home cannot be changed: {done.stderr.decode(errors='replace').strip()[-300:]}") from None
    if "error" in answer:
        error = answer["error"]
        raise ERROR_KINDS[error["code"]](error["message"], error["hint"])
    screen.note("no agent runs here: this concerns this home alone")
    return answer
