"""Commands about this machine's part in the mesh: `join` and `leave`.

`join` checks its options and then becomes the agent: the options, the mesh key among them, travel through an inherited pipe,
for arguments and environment can be read by others.
"""

import json as json_codec
import os
import signal
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn

import typer

from meshq import config
from meshq.cli import screen
from meshq.client import Client
from meshq.errors import UsageError
from meshq.terminal import harmless

if TYPE_CHECKING:
    from ipaddress import IPv6Address

OPTIONS_BYTES_MAX: Final = 32 * 1024  # must fit into a pipe that nobody reads yet (64 KiB on Linux, 16 KiB at worst elsewhere)
KEY_FILE_BYTES_MAX: Final = 4_096

Text = str | None
Number = int | None


def join(
    name: Annotated[Text, typer.Option("--name", metavar="N", help="Name of this machine (default: its host name).")] = None,
    key_file: Annotated[
        Path | None, typer.Option("--key-file", metavar="F", help="File with the mesh key; `-` reads stdin. Or set MESHQ_KEY.")
    ] = None,
    seed: Annotated[
        list[str] | None, typer.Option("--seed", metavar="HOST:PORT", help="A machine of the mesh. May be repeated.")
    ] = None,
    bind: Annotated[Text, typer.Option("--bind", metavar="ADDR", help="Listen on this address only.")] = None,
    port: Annotated[
        Number, typer.Option("--port", metavar="P", help=f"Port for UDP and TCP (default: {config.PORT_DEFAULT}).")
    ] = None,
    mdns: Annotated[
        bool | None, typer.Option("--mdns/--no-mdns", help="Find machines of this network by mDNS (default: yes).")
    ] = None,
    new: Annotated[bool, typer.Option("--new", help="Start another mesh, whatever is in sight.")] = False,
    queue: Annotated[
        list[str] | None,
        typer.Option("--queue", metavar="Q", help="Serve this queue (default: default, and gpu with GPUs). May be repeated."),
    ] = None,
    order: Annotated[
        Text,
        typer.Option("--order", metavar="strict|fair", help="Serve queues in the order given, or in turns (default: strict)."),
    ] = None,
    slots: Annotated[
        Number, typer.Option("--slots", metavar="N", help="Tasks at the same time (default: one per GPU, else one).")
    ] = None,
    cpus: Annotated[Number, typer.Option("--cpus", metavar="N", help="Cores for tasks (default: all).")] = None,
    memory: Annotated[Text, typer.Option("--memory", metavar="SIZE", help="Memory for tasks (default: all).")] = None,
    gpus: Annotated[Text, typer.Option("--gpus", metavar="all|none|0,1,…", help="GPUs for tasks (default: all).")] = None,
    label: Annotated[
        list[str] | None, typer.Option("--label", metavar="K=V", help="Label that tasks can ask for. May be repeated.")
    ] = None,
    profile: Annotated[
        Text, typer.Option("--profile", metavar="lan|wan|fast", help="How quickly silence is noticed (default: lan).")
    ] = None,
    group: Annotated[Text, typer.Option("--group", metavar="G", help="Let this group of users talk to the agent.")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return as soon as the agent is a member.")] = False,
    config_file: Annotated[
        Path | None,
        typer.Option("--config", metavar="F", help="TOML file with these options as keys; what is given here wins."),
    ] = None,
) -> None:
    """Make this machine part of a mesh, or start a new one.

    Its agent runs until Ctrl-C or `meshq leave`; --detach lets it run in the background. The mesh and all settings that are
    left out are those of the last join in this home; the defaults below hold for the first.
    """
    given = {
        "name": name, "key-file": key_file, "seed": seed, "bind": bind, "port": port, "mdns": mdns, "new": new or None,
        "queue": queue, "order": order, "slots": slots, "cpus": cpus, "memory": memory, "gpus": gpus, "label": label,
        "profile": profile, "group": group, "detach": detach or None,
    }  # fmt: skip
    from_file = read_config(config_file) if config_file is not None else {}
    options = agent_options({**from_file, **{key: value for key, value in given.items() if value not in (None, [])}})
    _become_agent(options)


_KINDS: Final[dict[str, tuple[type, ...]]] = {
    "name": (str,), "key-file": (str,), "seed": (str, list), "bind": (str,), "port": (int,), "mdns": (bool,),
    "no-mdns": (bool,), "new": (bool,), "queue": (str, list), "order": (str,), "slots": (int,), "cpus": (int,),
    "memory": (str, int), "gpus": (str, list), "label": (dict, list), "profile": (str,), "group": (str,), "detach": (bool,),
}  # fmt: skip


def read_config(path: Path) -> dict[str, Any]:
    """The options in a TOML file. UsageError names the key that is none, or has a wrong type."""
    import tomllib

    try:
        found = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"--config: cannot read `{path}`: {getattr(error, 'strerror', None) or error}") from None
    for key, value in found.items():
        kinds = _KINDS.get(key)
        if kinds is None:
            raise UsageError(
                f"--config: `{path}` has the key `{key}`, which is no option of join", f"known: {', '.join(_KINDS)}"
            )
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise UsageError(f"--config: `{key}` in `{path}` must be a {' or a '.join(_type_name(kind) for kind in kinds)}")
    if "no-mdns" in found:
        found["mdns"] = not found.pop("no-mdns")
    return found


def _type_name(kind: type) -> str:
    return {str: "string", int: "number", bool: "true or false", list: "list", dict: "table"}[kind]


def agent_options(given: dict[str, Any]) -> dict[str, Any]:
    """What the agent is told, checked: the fields of `Settings` that were given, and `key`, `new` and `detach`."""
    wanted: dict[str, Any] = {
        key: given[key]
        for key in ("name", "bind", "port", "mdns", "order", "slots", "cpus", "profile", "group")
        if key in given
    }
    if "seed" in given:
        wanted["seeds"] = [check_seed(each) for each in _items(given["seed"])]
    if "queue" in given:
        wanted["queues"] = _items(given["queue"])
    if "memory" in given:
        wanted["memory_bytes"] = config.parse_size(str(given["memory"]), "--memory")
    if "gpus" in given:
        wanted["gpus"] = given["gpus"] if isinstance(given["gpus"], str) else ",".join(map(str, given["gpus"]))
    if "label" in given:
        wanted["labels"] = pairs(given["label"], "--label")
    if "bind" in wanted:
        check_address(wanted["bind"])
    from meshq import settings  # takes long to import: not for every command

    settings.merged(settings.Settings(), wanted)
    key = read_key(given.get("key-file"))
    return wanted | {"key": key, "new": bool(given.get("new")), "detach": bool(given.get("detach"))}


def _items(value: str | list[Any]) -> list[str]:
    return [value] if isinstance(value, str) else [str(each) for each in value]


def pairs(given: dict[str, Any] | list[str], what: str) -> dict[str, str]:
    """`K=V` each. UsageError otherwise."""
    if isinstance(given, dict):
        return {key: str(value) for key, value in given.items()}
    found = {}
    for each in given:
        key, equals, value = each.partition("=")
        if not key or not equals:
            raise UsageError(f"{what}: `{each}` is no K=V", f"write it as in `{what} room=b12`")
        found[key] = value
    return found


def check_address(text: str) -> str:
    """A numeric IP address. UsageError otherwise."""
    import ipaddress

    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise UsageError(
            f"--bind: `{text}` is no IP address", "write an address of this machine, such as 192.168.1.5"
        ) from None


def check_seed(text: str) -> str:
    """`HOST:PORT` with the default port filled in; IPv6 in brackets. UsageError otherwise."""
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text, str(config.PORT_DEFAULT)
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    v6 = _ipv6(bare)
    if any(each is not None and each.is_link_local for each in (v6, _ipv6(text))):
        raise UsageError(
            f"--seed: `{text}` is link-local: on each machine it means another cable",
            "name another address of that machine, or its host name",
        )
    wrong = not bare or (":" in bare and v6 is None) or (v6 is not None) != (host != bare)
    if wrong or not _is_port(port) or any(map(str.isspace, text)):
        form = "'[fd00::3]:7733'` (brackets, and quotes for the shell)" if text.count(":") > 1 else "lab-1:7733`"
        raise UsageError(f"--seed: `{text}` is no HOST:PORT", f"write it as in `--seed {form}")
    return f"{host}:{port}"


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and 0 < int(text) < 65_536


def _ipv6(text: str) -> "IPv6Address | None":
    """The address that the text is; None for what is none."""
    from ipaddress import AddressValueError, IPv6Address

    try:
        return IPv6Address(text)
    except AddressValueError:
        return None


def read_key(path: Path | str | None) -> str | None:
    """The mesh key from the file or from MESHQ_KEY; the agent checks its form."""
    if path is None:
        return config.key_from_environment()
    try:
        if str(path) == "-":
            data = sys.stdin.buffer.read(KEY_FILE_BYTES_MAX + 1)
        else:
            with Path(path).open("rb") as file:
                if os.fstat(file.fileno()).st_mode & (stat.S_IRGRP | stat.S_IROTH):
                    screen.warn(
                        f"`{path}` can be read by other users of this machine: whoever has the key can run code on the mesh"
                    )
                data = file.read(KEY_FILE_BYTES_MAX + 1)
        text = data.decode("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"--key-file: cannot read `{path}`: {getattr(error, 'strerror', None) or 'it holds no mesh key'}"
        ) from None
    if len(data) > KEY_FILE_BYTES_MAX or len(text.split()) != 1:
        raise UsageError(f"--key-file: `{path}` holds no mesh key", "`meshq key` on a machine of the mesh prints it")
    return text


def _become_agent(options: dict[str, Any]) -> NoReturn:
    """Replace this process by `python -m meshq.join`, which reads the options from a pipe."""
    data = json_codec.dumps(options).encode()
    if len(data) > OPTIONS_BYTES_MAX:
        raise UsageError(f"the options of join take {len(data)} bytes, at most {OPTIONS_BYTES_MAX} are possible")
    reading, writing = os.pipe()
    os.write(writing, data)
    os.close(writing)
    os.set_inheritable(reading, True)
    environment = {name: value for name, value in os.environ.items() if name != "MESHQ_KEY"}
    sys.stdout.flush()
    sys.stderr.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))  # Ctrl-C waits until the new program can be quiet about it
    try:
        os.execve(sys.executable, [sys.executable, "-m", "meshq.join", "--options-fd", str(reading)], environment)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT,))


def leave(
    drain: Annotated[bool, typer.Option("--drain", help="First let the tasks that run here end by themselves.")] = False,
    timeout: Annotated[
        Text, typer.Option("--timeout", metavar="T", help="With --drain: wait at most so long, such as 30m.")
    ] = None,
) -> None:
    """Take this machine out of the mesh, and stop its agent.

    What runs here is ended and goes on elsewhere; --drain lets it end by itself first.
    """
    if timeout is not None and not drain:
        raise UsageError("`--timeout` is only possible with `--drain`")
    seconds = config.parse_duration(timeout, "--timeout") if timeout is not None else None
    with Client() as client:
        name = client.me()["name"]
        screen.progress("Waiting for the tasks that run here" if drain else "Ending what runs here")
        stuck = client.leave(drain=drain, timeout=seconds)
    if stuck:
        screen.warn(
            f"processes of {', '.join(stuck)} could not be ended and still run here; another machine may begin them anew"
        )
    screen.say(f"{harmless(name)} left the mesh")
