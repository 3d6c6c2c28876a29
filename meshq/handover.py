"""The way of a task from what somebody asked for into the agent: build, send the objects that it lacks, submit."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from meshq import codec
from meshq.client import Client
from meshq.documents import SubmittedDocument
from meshq.submit.spec import SubmitOptions, build
from meshq.task import QUEUE_DEFAULT, Isolation


def hand_over(
    client: Client, options: SubmitOptions, *, hold: bool = False, copies: int | str = 1,
    report: Callable[[str], None] = lambda message: None,
) -> tuple[SubmittedDocument, list[str]]:  # fmt: skip
    """Store the task and its files with the agent; what it answered, and what the person should know.

    `report` hears what is being done. UsageError and Unplaceable: nothing was stored.
    """
    client.me()  # resolving requirements may take a while: not in vain
    report("Looking at the script and its requirements")
    spec, snapshot, notes = build(options)
    if missing := frozenset(client.missing_objects(snapshot.objects)) if snapshot.objects else frozenset():
        report(f"Handing over {len(missing)} of {len(snapshot.objects)} objects ({snapshot.files} files)")
        client.store_objects(snapshot.read(each for each in snapshot.objects if each in missing))
    return client.submit([codec.to_plain(spec)], hold=hold, copies=copies), notes


def options_from(
    *,
    script: Path | None,
    arguments: Sequence[str],
    command: Sequence[str],
    queue: str = QUEUE_DEFAULT,
    name: str | None = None,
    priority: int = 0,
    cpus: int | None = None,
    memory: int | str | None = None,
    gpus: int | None = None,
    gpu_memory: int | str | None = None,
    labels: Mapping[str, str] | None = None,
    env: Mapping[str, str] | None = None,
    requirements: str | os.PathLike[str] | None = None,
    python: str | None = None,
    workdir: str | os.PathLike[str] | None = None,
    retries: int = 0,
    time_limit: float | str | None = None,
    lease: float | str | None = None,
    on_isolation: str = Isolation.CONTINUE.value,
    hold: bool = False,
    copies: int | str = 1,
) -> SubmitOptions:
    """The options of the Python API, as the command line would write them. `hold` and `copies` do not belong to the task."""
    return SubmitOptions(
        script=None if script is None else os.fspath(script),
        args=tuple(arguments),
        command=tuple(command),
        queue=queue,
        name=name,
        priority=priority,
        cpus=cpus,
        memory=_text(memory),
        gpus=gpus,
        gpu_memory=_text(gpu_memory),
        labels=_pairs(labels),
        env=_pairs(env),
        requirements=None if requirements is None else os.fspath(requirements),
        python=python,
        workdir=None if workdir is None else os.fspath(workdir),
        retries=retries,
        time_limit=_text(time_limit),
        lease=_text(lease),
        on_isolation=on_isolation,
    )


def _text(value: float | str | None) -> str | None:
    return None if value is None else str(value)


def _pairs(values: Mapping[str, str] | None) -> tuple[str, ...]:
    return tuple(f"{key}={value}" for key, value in (values or {}).items())
