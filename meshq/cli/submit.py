"""`meshq submit`: hand a script or a command to the mesh, and perhaps wait for it."""

import functools
import itertools
import sys
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from meshq.cli import arguments, layouts, screen
from meshq.cli.commands import Command
from meshq.cli.options import Json, complete_queue
from meshq.cli.tasks import announce, detached, result_line, write_pieces
from meshq.client import Client, exit_code
from meshq.errors import UsageError
from meshq.terminal import harmless

if TYPE_CHECKING:
    from meshq.submit.spec import SubmitOptions

SPLIT: Final = "meshq.split"
MANAGERS_NOT_YET: Final = ("pip", "conda", "poetry")
WAITING: Final = ("queued", "waiting", "claimed", "preparing")
LOOK_SECONDS: Final = 0.25
Text = str | None
Number = int | None


class SubmitCommand(Command):
    """A command whose options may also stand directly behind its first argument."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put meshq's options first, then `--`, then the rest, which the parser so leaves alone."""
        if ctx.resilient_parsing:  # the shell asks for completions
            return super().parse_args(ctx, args)
        takes_value = {
            name: not getattr(param, "is_flag", False)
            for param in self.get_params(ctx)
            for name in param.opts
            if name[:1] == "-"
        }
        try:
            split = arguments.split(args, takes_value)
        except UsageError:
            screen.choose_json("--json" in itertools.takewhile(lambda token: token != "--", args))  # of whatever it was
            raise
        ctx.meta[SPLIT] = split
        for option in split.after_script:
            screen.note(f"`{option}` was taken by meshq; put `--` before the script's own options")
        if split.arguments and not split.dashes and (meant := arguments.near_miss(split.arguments[0], list(takes_value))):
            screen.note(f"`{split.arguments[0]}` goes to the script; meshq's own option is `{meant}`")
        rest = split.command or ((split.script, *split.arguments) if split.script is not None else ())
        return super().parse_args(ctx, [*split.options, "--", *rest])


def submit(
    ctx: typer.Context,
    script: Annotated[
        Text, typer.Argument(metavar="SCRIPT", help="A Python script; or `--` and a command.", show_default=False)
    ] = None,
    args: Annotated[
        list[str] | None, typer.Argument(metavar="ARGS", help="The script's own arguments.", show_default=False)
    ] = None,
    queue: Annotated[
        str, typer.Option("--queue", metavar="Q", help="Queue to put it in.", autocompletion=complete_queue)
    ] = "default",
    name: Annotated[Text, typer.Option("--name", metavar="N", help="Name of the task (default: the script's).")] = None,
    priority: Annotated[int, typer.Option("--priority", metavar="N", help="Higher runs earlier in its queue.")] = 0,
    cpus: Annotated[Number, typer.Option("--cpus", metavar="N", help="Cores that it needs.")] = None,
    memory: Annotated[Text, typer.Option("--memory", metavar="SIZE", help="Memory that it needs, such as 16G.")] = None,
    gpus: Annotated[
        Number, typer.Option("--gpus", metavar="N", help="GPUs that it needs (default: 1 in queue gpu, else 0).")
    ] = None,
    gpu_memory: Annotated[Text, typer.Option("--gpu-memory", metavar="SIZE", help="Memory that each GPU must have.")] = None,
    label: Annotated[
        list[str] | None, typer.Option("--label", metavar="K=V", help="Only on machines with this label. May be repeated.")
    ] = None,
    env: Annotated[list[str] | None, typer.Option("--env", metavar="K=V", help="Set a variable. May be repeated.")] = None,
    requirements: Annotated[
        Text,
        typer.Option(
            "--requirements", metavar="F", help="File that lists what it needs (default: found near it, else its imports)."
        ),
    ] = None,
    python: Annotated[Text, typer.Option("--python", metavar="3.12", help="Version of Python to run it with.")] = None,
    manager: Annotated[str, typer.Option("--manager", metavar="uv", help="What installs the requirements.")] = "uv",
    workdir: Annotated[Text, typer.Option("--workdir", metavar="D", help="Folder that goes along and where it starts.")] = None,
    retries: Annotated[int, typer.Option("--retries", metavar="N", help="How often it runs again when it fails.")] = 0,
    time_limit: Annotated[Text, typer.Option("--time-limit", metavar="T", help="Stop it after so long, such as 2h.")] = None,
    lease: Annotated[
        Text, typer.Option("--lease", metavar="T", help="How long its machine may be silent before it runs elsewhere.")
    ] = None,
    on_isolation: Annotated[
        str, typer.Option("--on-isolation", metavar="continue|stop", help="What it does when its machine is cut off.")
    ] = "continue",
    hold: Annotated[bool, typer.Option("--hold", help="Accept it even if no known machine could run it.")] = False,
    copies: Annotated[
        str, typer.Option("--copies", metavar="N|all", help="Other machines that must have it before its id is printed.")
    ] = "1",
    wait: Annotated[bool, typer.Option("--wait", help="Wait for its end and exit with its code.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Show its output, then exit with its code.")] = False,
    json: Json = False,
) -> None:
    """Run a Python script or a command on whichever machine is free.

    Options stand before the script or directly after it; the script's own arguments follow. A command stands behind `--`:
    `meshq submit [OPTIONS] -- COMMAND`.

    With a script goes the git repository that it lies in, or its folder if it imports something from there. With a command
    goes the current folder (or the repository around it) if a word of the command names something in that folder, such as
    `./run.sh`; else nothing, unless --workdir names a folder.
    """
    split: arguments.Split = ctx.meta[SPLIT]
    if follow and json:
        raise UsageError("`--follow` prints the log and `--json` a document: choose one", "`--wait --json` waits, too")
    from meshq.submit.spec import SubmitOptions

    options = SubmitOptions(
        script=split.script,
        args=split.arguments,
        command=split.command,
        queue=queue,
        name=name,
        priority=priority,
        cpus=cpus,
        memory=memory,
        gpus=gpus,
        gpu_memory=gpu_memory,
        labels=tuple(label or ()),
        env=tuple(env or ()),
        requirements=requirements,
        python=python,
        manager=manager,
        workdir=workdir,
        retries=retries,
        time_limit=time_limit,
        lease=lease,
        on_isolation=on_isolation,
    )
    _submit(options, hold=hold, copies=_copies(copies), wait=wait or follow, follow=follow, json=json)


def _copies(text: str) -> int | str:
    if text == "all" or (text.isdecimal() and int(text) > 0):
        return text if text == "all" else int(text)
    raise UsageError(f"--copies: {text!r} is neither a number of machines nor `all`", "1 is the default")


def _submit(options: "SubmitOptions", *, hold: bool, copies: int | str, wait: bool, follow: bool, json: bool) -> None:
    from meshq.handover import hand_over

    if options.manager in MANAGERS_NOT_YET:
        raise UsageError(f"`--manager {options.manager}` is not supported yet", "leave it out to use uv")
    with Client() as client:
        submitted, notes = hand_over(client, options, hold=hold, copies=copies, report=screen.progress)
        for text in notes:
            screen.note(text)
        announce(submitted, json=json, on_stderr=follow)
        if wait:
            raise typer.Exit(_outcome(client, submitted["ids"][0], submitted["name"], follow=follow))


def _outcome(client: Client, task: str, name: str, *, follow: bool) -> int:
    """Wait for the end of the task, showing its log if asked to; the exit code for it."""
    try:
        if screen.is_terminal(sys.stderr):
            _watch_start(client, task)
        if follow:
            write_pieces(client.follow_log(task))
        result = client.result(task)
    except KeyboardInterrupt:
        detached(name, task)
    if result["status"] == "succeeded":
        screen.progress(result_line(name, result))
    else:
        log = "" if follow else f"; `meshq logs {task[: layouts.ID_CHARS]}` shows what it wrote"
        screen.note(result_line(f"{name} ({task})", result) + log)
    return exit_code(result)


def _watch_start(client: Client, task: str) -> None:
    """Tell a person what happens until the task runs: an environment may take minutes to build."""
    told = ""
    while (state := client.patient(functools.partial(client.wait, task, LOOK_SECONDS)))["status"] in WAITING:
        text = f"{state['status']}{' on ' + harmless(state['peer']) if state['peer'] else ''}"
        text += f": {harmless(state['reason'])}" if state["reason"] else ""
        if text != told:
            screen.progress(text)
        told = text
