"""What `meshq join` was asked for: checked once, kept in the home, read again by the next bare `meshq join`."""

import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from meshq import codec, config
from meshq.durable import write_atomically
from meshq.errors import MalformedData, StoreError, UsageError
from meshq.task import QUEUE_DEFAULT, QUEUE_GPU

ORDERS = ("strict", "fair")
PROFILES = ("lan", "wan", "fast")
QUEUES_BYTES_MAX = 200  # queues and labels travel in every telemetry record, which must fit one packet
LABELS_BYTES_MAX = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The options of `join` that describe the agent. None and empty mean: the default, worked out at each start."""

    name: str | None = None
    seeds: tuple[str, ...] = ()
    bind: str | None = None
    port: int | None = None
    mdns: bool = True
    queues: tuple[str, ...] = ()
    order: str = "strict"
    slots: int | None = None
    cpus: int | None = None
    memory_bytes: int | None = None
    gpus: str = "all"  # all, none, or indices with commas
    labels: Mapping[str, str] = field(default_factory=dict)
    profile: str = "lan"
    group: str | None = None


def check(settings: Settings) -> Settings:
    """The same settings, or UsageError that names the option."""
    if settings.name is not None:
        config.check_name(settings.name, "--name")
    for queue in settings.queues:
        config.check_name(queue, "--queue")
    for key, value in settings.labels.items():
        config.check_name(key, "--label")
        config.check_name(value, f"--label {key}")
    _fits(sum(len(queue) + 1 for queue in settings.queues), QUEUES_BYTES_MAX, "--queue")
    _fits(sum(len(key) + len(value) + 2 for key, value in settings.labels.items()), LABELS_BYTES_MAX, "--label")
    _in(settings.order, ORDERS, "--order")
    _in(settings.profile, PROFILES, "--profile")
    _between(settings.port, 1, 65_535, "--port")
    _between(settings.slots, 0, config.SLOTS_MAX, "--slots")
    _between(settings.cpus, 1, 4_096, "--cpus")
    _between(settings.memory_bytes, 1, 2**50, "--memory")
    gpu_indices(settings.gpus)
    return settings


def gpu_indices(text: str) -> tuple[int, ...] | None:
    """The GPUs that the agent may give out; None for all of them."""
    if text == "all":
        return None
    if text == "none":
        return ()
    parts = text.split(",")
    if not all(part.isdigit() and len(part) < 4 for part in parts):
        raise UsageError(f"--gpus: {text!r} is neither `all`, `none` nor a list of indices such as 0,1")
    return tuple(sorted({int(part) for part in parts}))


def queues_served(settings: Settings, gpus: int) -> tuple[str, ...]:
    """`default`, and `gpu` where there are GPUs, unless `--queue` says otherwise."""
    if settings.queues:
        return tuple(dict.fromkeys(settings.queues))
    return (QUEUE_DEFAULT, QUEUE_GPU) if gpus else (QUEUE_DEFAULT,)


def default_name() -> str:
    """The host's name, made fit for a name."""
    host = socket.gethostname().split(".")[0]
    fit = "".join(char if char.isascii() and (char.isalnum() or char in "_-") else "-" for char in host).strip("-_")
    return fit[: config.NAME_CHARS_MAX] or "peer"


def merged(before: Settings, given: Mapping[str, Any]) -> Settings:
    """`before` with what this `join` gave; UsageError for what is no setting."""
    known = {each.name for each in fields(Settings)}
    plain = {name: value for name, value in given.items() if name in known and value is not None}
    try:
        new: Settings = codec.from_plain(Settings, plain)
    except MalformedData as error:
        raise UsageError(f"cannot read the options of join: {error}") from None
    return check(replace(before, **{name: getattr(new, name) for name in plain}))


def load(path: Path) -> Settings:
    """The settings of the last join; defaults if there was none."""
    try:
        settings: Settings = codec.from_plain(Settings, json.loads(path.read_text("utf-8")))
        return settings
    except FileNotFoundError:
        return Settings()
    except NotADirectoryError:
        file = next(each for each in path.parents if each.exists())
        raise UsageError(f"the home {path.parent} can be no folder: {file} is a file", "set MESHQ_HOME to a folder") from None
    except OSError as error:
        raise StoreError(f"cannot read the settings {path}: {error.strerror}", "make the file readable for you") from None
    except (ValueError, MalformedData) as error:
        raise StoreError(f"cannot read the settings {path}: {error}", "remove that file to join with defaults") from None


def save(path: Path, settings: Settings) -> None:
    """Replace the file in one step. StoreError if the disk refuses: the old one is still there."""
    try:
        write_atomically(path, json.dumps(codec.to_plain(settings), indent=1).encode())
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}", "check free space and permissions of the home") from None


def _in(value: str, allowed: tuple[str, ...], what: str) -> None:
    if value not in allowed:
        raise UsageError(f"{what}: {value!r} is none of {', '.join(allowed)}")


def _between(value: int | None, low: int, high: int, what: str) -> None:
    if value is not None and not low <= value <= high:
        raise UsageError(f"{what}: {value} is not between {low} and {high}")


def _fits(size: int, limit: int, what: str) -> None:
    if size > limit:
        raise UsageError(f"{what}: {size} bytes in all, at most {limit} are possible", "choose shorter names")
