"""From what somebody typed to a task: every option is checked here, before anything is stored or sent anywhere.

`build` fills in all of a `TaskSpec` except who submits it, when and where: the agent knows that for certain.
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from meshq import codec, config
from meshq.errors import UsageError
from meshq.ids import PeerId
from meshq.submit import lock, requirements
from meshq.submit.snapshot import Snapshot, snapshot
from meshq.task import QUEUE_DEFAULT, QUEUE_GPU, Environment, Isolation, Needs, Source, TaskSpec

MANAGERS: Final = ("uv",)
CPUS_MAX: Final = 4_096
GPUS_MAX: Final = 64
SECONDS_MAX: Final = 10 * 365 * 86400.0
HEAD_BYTES: Final = 4_096
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_NOT_IN_NAMES: Final = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitOptions:
    """One `meshq submit`, as typed: either `script` with `args`, or `command`. Sizes and durations are still text."""

    script: str | None = None
    args: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    queue: str = QUEUE_DEFAULT
    name: str | None = None
    priority: int = 0
    cpus: int | None = None
    memory: str | None = None
    gpus: int | None = None
    gpu_memory: str | None = None
    labels: tuple[str, ...] = ()  # K=V
    env: tuple[str, ...] = ()  # K=V, or K to pass on the value here
    requirements: str | None = None
    python: str | None = None
    manager: str = "uv"
    workdir: str | None = None
    retries: int = 0
    time_limit: str | None = None
    lease: str | None = None
    on_isolation: str = Isolation.CONTINUE.value


def build(
    options: SubmitOptions, *, cwd: Path | None = None, cache: Path | None = None, environ: Mapping[str, str] = os.environ
) -> tuple[TaskSpec, Snapshot, list[str]]:
    """The task, its files, and what the person should know about both. UsageError if it can't be what was meant."""
    here = cwd or Path.cwd()
    needs = _needs(options)
    variables = _variables(options.env, environ)
    isolation = _choice(options.on_isolation, [each.value for each in Isolation], "--on-isolation")
    _choice(options.manager, MANAGERS, "--manager")
    config.check_name(options.queue, "--queue")
    name = config.check_name(options.name, "--name") if options.name is not None else _default_name(options)
    script = _script(options, here)
    is_python = script is not None and script.suffix == ".py"
    workdir = None if options.workdir is None else Path(options.workdir)
    source = snapshot(script, workdir, command=options.command, cwd=here, cache=cache)
    argv, needs_python = _argv(options, source, is_python)
    environment, notes = _environment(options, script if is_python else None, source, here, cache, environ, needs_python)
    spec = TaskSpec(
        name=name,
        argv=argv,
        submitted_by="",
        submitted_at=0.0,
        submitted_peer=PeerId(""),
        queue=options.queue,
        priority=_between(options.priority, -config.PRIORITY_MAX, config.PRIORITY_MAX, "--priority"),
        needs=needs,
        source=Source(commit=source.commit, folder=source.folder),
        environment=environment,
        env=variables,
        retries=_between(options.retries, 0, config.RETRIES_MAX, "--retries"),
        time_limit=_seconds(options.time_limit, "--time-limit"),
        lease=_seconds(options.lease, "--lease"),
        isolation=isolation,
    )
    _check_size(spec)
    return spec, source, [*source.warnings, *notes]


def _needs(options: SubmitOptions) -> Needs:
    gpus = options.gpus if options.gpus is not None else int(options.queue == QUEUE_GPU)
    return Needs(
        cpus=_between(options.cpus or 0, 0, CPUS_MAX, "--cpus"),
        memory_bytes=_bytes(options.memory, "--memory"),
        gpus=_between(gpus, 0, GPUS_MAX, "--gpus"),
        gpu_memory_bytes=_bytes(options.gpu_memory, "--gpu-memory"),
        labels=_labels(options.labels),
    )


def _script(options: SubmitOptions, here: Path) -> Path | None:
    """The script, which exists and can be read; a program that is no Python must be executable."""
    if options.script is None:
        if not options.command:
            raise UsageError("nothing to run", "name a script, or a command behind `--`")
        return None
    path = here / options.script
    shown = options.script
    try:
        if path.is_dir():
            raise UsageError(
                f"{shown} is a folder, not a script", "name the script in it, and --workdir if it must start there"
            )
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
    except FileNotFoundError:
        raise UsageError(f"the script {shown} does not exist in {here}", "check the spelling, or give its path") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"reading the script {shown}: {getattr(error, 'strerror', None) or error}") from None
    if path.suffix == ".py":
        if b"\0" in head:
            raise UsageError(f"{shown} is no Python text: it has zero bytes in it", "name the source file, not a compiled one")
    elif not os.access(path, os.X_OK):
        raise UsageError(
            f"{shown} is neither a .py file nor executable", f"run `chmod +x {shown}`, or submit `-- INTERPRETER {shown}`"
        )
    return path


def _argv(options: SubmitOptions, source: Snapshot, is_python: bool) -> tuple[tuple[str, ...], bool]:
    """What the task runs, and whether an environment's Python runs it."""
    if options.script is None:
        program, *rest = options.command
        if options.requirements is None and options.python is None:
            return options.command, False
        if not re.fullmatch(r"python(3(\.\d+)?)?", program) or not rest:
            raise UsageError(
                f"--requirements and --python are for Python, and the command is {program}",
                "begin the command with `python`: it then runs in the environment that is built",
            )
        return tuple(rest), True
    return ((source.script if is_python else f"./{source.script}"), *options.args), is_python


def _environment(
    options: SubmitOptions,
    script: Path | None,
    source: Snapshot,
    here: Path,
    cache: Path | None,
    environ: Mapping[str, str],
    needs_python: bool,
) -> tuple[Environment, list[str]]:
    if not needs_python:
        if options.requirements is not None or options.python is not None:
            raise UsageError(f"--requirements and --python are for Python, and {options.script} is no .py file")
        return Environment(manager=options.manager, needs_python=False), []
    chosen = None if options.requirements is None else here / options.requirements
    if script is None:
        assert options.command
        found = requirements.Requirements((), "", "the command") if chosen is None else requirements.from_file(chosen)
    else:
        found = requirements.find_requirements(script.resolve(), source.top, chosen, environ=environ)
    locked = lock.resolve(found, options.python or "", cache=cache, environ=environ)
    notes = [*found.notes, f"requirements: {found.origin}"]
    return Environment(manager=options.manager, python=locked.python, lock=locked.text), notes


def _default_name(options: SubmitOptions) -> str:
    """The script's or program's name, as far as it is a name."""
    words = [options.script] if options.script is not None else list(options.command[:1])
    stem = Path(words[0] if words else "").stem
    clean = _NOT_IN_NAMES.sub("-", stem).strip("-._")[: config.NAME_CHARS_MAX]
    return clean or "task"


def _labels(pairs: Iterable[str]) -> dict[str, str]:
    labels: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"--label: {pair!r} has no value", "write it as KEY=VALUE")
        labels[config.check_name(key, "--label")] = config.check_name(value, "--label")
    if len(labels) > config.LABELS_MAX:
        raise UsageError(f"--label: {len(labels)} labels where at most {config.LABELS_MAX} are allowed")
    return labels


def _variables(pairs: Iterable[str], environ: Mapping[str, str]) -> dict[str, str]:
    variables: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if _VARIABLE.fullmatch(key) is None:
            raise UsageError(f"--env: {key!r} is no name of a variable", "write it as NAME=VALUE")
        if key.startswith("MESHQ_"):
            raise UsageError(f"--env: {key} belongs to meshq", "choose a name that does not begin with MESHQ_")
        if not equals and key not in environ:
            raise UsageError(f"--env: {key} has no value and is not set here", f"write {key}=VALUE")
        variables[key] = _text(value if equals else environ[key], f"--env {key}")
    size = sum(len(f"{key}={value}".encode()) + 1 for key, value in variables.items())
    if size > config.ENV_BYTES_MAX:
        raise UsageError(f"--env: {size} bytes of variables where at most {config.ENV_BYTES_MAX} are allowed", "use a file")
    return variables


def _text(value: str, what: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(f"{what}: {value!r} is not UTF-8", "pass it in a file") from None
    if "\0" in value:
        raise UsageError(f"{what}: there is a zero byte in it", "pass it in a file")
    return value


def _check_size(spec: TaskSpec) -> None:
    for word in spec.argv:
        _text(word, "the arguments")
    size = sum(len(word.encode()) + 1 for word in spec.argv)
    if size > config.ARGV_BYTES_MAX:
        raise UsageError(f"the arguments have {size} bytes where at most {config.ARGV_BYTES_MAX} are allowed", "pass a file")
    if (size := len(codec.encode(spec))) > config.SPEC_BYTES_MAX:
        raise UsageError(
            f"the task has {size} bytes where at most {config.SPEC_BYTES_MAX} are allowed; the largest part is its "
            f"{max((len(spec.environment.lock), 'list of requirements'), (size // 3, 'arguments and variables'))[1]}",
            "leave out requirements that the script does not use, or pass long values in a file",
        )


def _between(value: int, lowest: int, highest: int, what: str) -> int:
    if not lowest <= value <= highest:
        raise UsageError(f"{what}: {value} is out of range", f"choose a number from {lowest} to {highest}")
    return value


def _bytes(text: str | None, what: str) -> int:
    if text is None:
        return 0
    size = config.parse_size(text, what)
    if not 0 < size < 2**60:
        raise UsageError(f"{what}: {text} is out of range", "write bytes or a unit, such as 512M or 16G")
    return size


def _seconds(text: str | None, what: str) -> float | None:
    if text is None:
        return None
    seconds = config.parse_duration(text, what)
    if not 0 < seconds <= SECONDS_MAX:
        raise UsageError(f"{what}: {text} is out of range", "write seconds or a unit, such as 90s, 15m, 2h or 1:30:00")
    return seconds


def _choice(value: str, choices: Iterable[str], what: str) -> str:
    allowed = list(choices)
    if value not in allowed:
        raise UsageError(f"{what}: {value!r} is none of the choices", f"choose {' or '.join(allowed)}")
    return value
