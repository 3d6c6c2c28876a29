"""Becoming a member: from the options of `meshq join` to a running agent, or to one clear message and nothing left behind.

`python -m meshq.join --options-fd N` reads the options as JSON from that file descriptor (the mesh key is among them, so
they never stand in arguments or environment). Then it finds out which mesh is meant, writes key and settings into the home,
and becomes the agent, or starts it in the background and waits until it is a member.
"""

if __name__ == "__main__":
    from meshq import startup

    startup.interrupts_end()  # the imports below take half a second
    startup.open_streams()

import asyncio
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NoReturn

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meshq import agent, config, home_lock, machine, settings, startup
from meshq.config import Home, Switches
from meshq.errors import ERROR_KINDS, MeshqError, StoreError, TaskFailed, Unreachable, UsageError
from meshq.gossip.discovery import look_around, resolve_seed
from meshq.settings import Settings
from meshq.terminal import harmless
from meshq.trust import cookie, hardening, identity, keys, ring_file
from meshq.trust.certificates import Credentials
from meshq.trust.keys import MeshKey
from meshq.web import dialing

OPTIONS_BYTES_MAX: Final = 64 * 1024
LOOK_AROUND_SECONDS: Final = 2.5
SEED_SECONDS: Final = 8.0
DETACH_SECONDS: Final = 40.0
END_SECONDS: Final = 10.0  # for an agent that is of no use to end by itself


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What this `join` was given, besides settings."""

    key: str | None
    new: bool
    detach: bool
    given: Mapping[str, Any]


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry point; ends the process with the contract's exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        startup.interrupts_raise()
        hardening.hide_process()  # before the key is read
        options = _read_options(arguments)
        home = config.home_from_environment()
        switches = config.switches_from_environment()
        hardening.forget_settings()
        _join(home, options, switches)
        code = 0
    except MeshqError as error:
        report(error)
        code = error.exit_code
    except KeyboardInterrupt:
        code = startup.EXIT_INTERRUPTED
    startup.interrupts_end()
    sys.exit(code)


def report(error: MeshqError) -> None:
    """One message for people."""
    print(f"error: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)


def _read_options(arguments: Sequence[str]) -> Options:
    if len(arguments) != 2 or arguments[0] != "--options-fd" or not arguments[1].isdigit():
        raise UsageError("this module is started by `meshq join`", "run `meshq join --help`")
    with os.fdopen(int(arguments[1]), "rb") as file:
        data = file.read(OPTIONS_BYTES_MAX + 1)
    try:
        document = json.loads(data)
    except ValueError:
        raise UsageError("the options of join cannot be read") from None
    if len(data) > OPTIONS_BYTES_MAX or not isinstance(document, dict):
        raise UsageError("the options of join cannot be read")
    return Options(
        key=document.pop("key", None),
        new=document.pop("new", False) is True,
        detach=document.pop("detach", False) is True,
        given=document,
    )


def _join(home: Home, options: Options, switches: Switches) -> None:
    """Run the agent, or start it; raises and leaves everything as it was if it does not become a member.

    Once it is one, the home has a life of its own: however the agent ends, nothing in it is taken back.
    """
    fresh = not home.root.exists()
    before = settings.load(home.settings)
    wanted = settings.merged(replace(before, seeds=()) if options.new else before, options.given)
    machine.check(wanted, [name for name, value in options.given.items() if value is not None])
    cookie.prepare_home(home, wanted.group)
    lock = _take_lock(home)
    try:
        with ExitStack() as undo:
            if fresh:
                undo.callback(shutil.rmtree, home.root, ignore_errors=True)
            founded = _settle_in(home, wanted, before, options, undo)

            def ready(document: Mapping[str, Any]) -> None:
                undo.pop_all()
                _announce(document, founded, wanted.port)

            if options.detach:
                ready(_start_in_background(home, lock, switches))
            else:
                agent.run(home, ready, switches)
    finally:
        os.close(lock)


def _settle_in(home: Home, wanted: Settings, before: Settings, options: Options, undo: ExitStack) -> str:
    """Key and settings into the home, with what takes them out again; if a mesh begins now, why."""
    key, founded = _find_key(home, wanted, options)
    if options.new or not home.key.exists():
        _check_seeds(key, wanted)
        if home.key.exists():
            undo.callback(_take_back, home, _put_aside(home))
        undo.callback(home.settings.unlink, missing_ok=True)
        undo.callback(home.key.unlink, missing_ok=True)
        keys.write(home.key, key)
    else:
        undo.callback(settings.save, home.settings, before)
    settings.save(home.settings, wanted)
    return founded


def _take_lock(home: Home) -> int:
    descriptor = home_lock.take(home)
    if descriptor is None:
        raise TaskFailed(
            f"an agent runs already in {home.root}", "`meshq status` shows it; for a second one set another MESHQ_HOME"
        )
    return descriptor


def _find_key(home: Home, wanted: Settings, options: Options) -> tuple[MeshKey, str]:
    """The key of the mesh that is meant; and if that mesh begins now, why."""
    given = keys.parse(options.key) if options.key else None
    if home.key.exists() and not options.new:
        ring = ring_file.load(home.key)
        if given is not None and given.id in ring.removed:
            print(f"note: the key {given.id} was removed from this mesh; joining with {ring.current.id}", file=sys.stderr)
        elif given is not None and ring.get(given.id) is None:
            raise TaskFailed(
                f"{home.root} belongs to mesh {ring.use.mesh}, which has no such key as {given.id} as far as is known here",
                "if the mesh has changed its key: `meshq key install --key-file F`, then `meshq key use "
                f"{given.id}`; to leave the mesh behind add --new, or set another MESHQ_HOME",
            )
        return ring.current.key, ""
    if given is not None:
        return given, ""
    if options.new:
        return keys.generate(), "--new was given"
    return _key_without_key(wanted)


def _key_without_key(wanted: Settings) -> tuple[MeshKey, str]:
    """No key was given: ask for it if a mesh is in sight, begin one if there is none."""
    if wanted.seeds:
        raise UsageError(
            "to join a mesh by --seed, its key is needed", "give it by --key-file or MESHQ_KEY; `meshq key` prints it"
        )
    seen = asyncio.run(look_around(LOOK_AROUND_SECONDS, bind=wanted.bind or "")) if wanted.mdns else []
    if not seen:
        return keys.generate(), "no key was given and no mesh was in sight"
    where = ", ".join(sorted({str(address) for mesh in seen for address in mesh.addresses})[:4])
    if not sys.stdin.isatty():
        raise UsageError(
            f"a mesh is in sight at {where}, and no key was given",
            "give its key by --key-file or MESHQ_KEY (`meshq key` there prints it), or start another mesh with --new",
        )
    print(f"A mesh is in sight at {where}.", file=sys.stderr)
    while True:
        print("Its key (`meshq key` there prints it; empty to give up): ", end="", file=sys.stderr, flush=True)
        text = sys.stdin.readline().strip()
        if not text:
            raise UsageError("no key was given", "start another mesh with `meshq join --new`")
        try:
            return keys.parse(text), ""
        except UsageError as error:
            report(error)


def _check_seeds(key: MeshKey, wanted: Settings) -> None:
    """Before anything is written: a seed must answer, and it must be of the key's mesh."""
    if wanted.seeds:
        asyncio.run(_meet_a_seed(key, wanted.seeds))


async def _meet_a_seed(key: MeshKey, seeds: Sequence[str]) -> None:
    stranger = identity.Identity(Ed25519PrivateKey.generate())  # the handshake proves membership, nothing more
    context = Credentials(key, stranger).seed_context()
    results = await asyncio.gather(*(_meet(seed, context) for seed in seeds), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, MeshqError):
            raise result
    if None in results:
        return
    errors = [result for result in results if isinstance(result, MeshqError)]
    raise next((error for error in errors if isinstance(error, UsageError | TaskFailed)), errors[0])


async def _meet(seed: str, context: ssl.SSLContext) -> None:
    addresses = await resolve_seed(seed)
    why = "it has no address"
    for address in addresses:
        try:
            async with asyncio.timeout(SEED_SECONDS / len(addresses)):
                _, writer = await asyncio.open_connection(address.host, address.port, ssl=context, server_hostname="seed")
        except ssl.SSLCertVerificationError:
            raise TaskFailed(
                f"the seed {seed} belongs to another mesh than this key, or its mesh has changed its key, or no agent is there",
                "compare the key with `meshq key` on the seed",
            ) from None
        except (OSError, TimeoutError) as error:
            why = dialing.why(error)
            continue
        writer.close()
        with suppress(OSError, ssl.SSLError):
            await writer.wait_closed()
        return
    raise Unreachable(f"the seed {seed} does not answer: {why}", "check that its agent runs and that UDP and TCP may pass")


def _put_aside(home: Home) -> Path:
    """`--new` in a home that has a mesh: its key, identity, ledger and attempts go into a folder of their own."""
    aside = home.root / f"left-{ring_file.load(home.key).use.mesh}-{int(time.time())}"
    aside.mkdir(mode=0o700)
    for entry in _of_the_mesh(home):
        entry.rename(aside / entry.name)
    cookie.prepare_home(home)
    print(f"note: the old mesh was put aside in {aside}", file=sys.stderr)
    return aside


def _take_back(home: Home, aside: Path) -> None:
    """Undo `_put_aside`, in place of what was made since."""
    for entry in _of_the_mesh(home):
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink()
    for entry in sorted(aside.iterdir()):
        entry.rename(home.root / entry.name)
    aside.rmdir()
    print("note: the old mesh is back in its place", file=sys.stderr)


def _of_the_mesh(home: Home) -> list[Path]:
    """What in the home belongs to its mesh, and not to this machine or to a mesh before."""
    stay = {home.lock.name, home.environments.name, home.package_cache.name, home.socket.parent.name}
    return [each for each in sorted(home.root.iterdir()) if each.name not in stay and not each.name.startswith("left-")]


def _announce(document: Mapping[str, Any], founded: str, port: int | None) -> None:
    """What a person wants to know now. `founded`: why a new mesh begins, said loudly, for it may not be what was meant.
    `port`: the one that was asked for."""
    for warning in (*document["warnings"], *_troubles(document, founded)):
        _remark(f"warning: {warning}")
    if port is None and document["port"] != config.PORT_DEFAULT:
        _remark(
            f"note: another program uses port {config.PORT_DEFAULT}, so this agent listens on {document['port']}: that is the "
            "port for --seed elsewhere and in firewalls; to keep it, join with --port"
        )
    if founded:
        _remark(f"STARTED A NEW MESH: {founded}.")
        _remark("To add machines, copy what `meshq key` prints and run `meshq join` there.")
    others = document["peers_alive"] - 1
    facts = (
        f"{document['name']} is in mesh {document['mesh']['id']} with {others} other{'s' if others != 1 else ''}, "
        f"serves {', '.join(document['queues'])}, listens on port {document['port']}; tasks run as {document['user']}"
    )
    try:
        print(facts, flush=True)
    except OSError as error:  # a full disk, a reader that has gone: no reason for the agent to end
        startup.abandon_stdout()
        _remark(f"{facts}\nwarning: cannot write to standard output: {error.strerror}")


def _remark(text: str) -> None:
    with suppress(OSError):  # nowhere is left to say it, and the agent goes on
        print(text, file=sys.stderr, flush=True)


def _troubles(document: Mapping[str, Any], founded: str) -> list[str]:
    """A line for each check of the doctor that is not ok. That nobody else is there is no news to who began a mesh just now."""
    found = [check for check in document.get("findings", ()) if not (founded and check["name"] == "peers")]
    return [harmless(f"{check['name']}: {check['detail']}; {check['fix']}").replace("\n", " ") for check in found]


def _start_in_background(home: Home, lock: int, switches: Switches) -> Mapping[str, Any]:
    """Start the agent in a session of its own and wait for its word: the ready document, or why it failed."""
    mine, its = socket.socketpair()
    with mine, its:
        command = [sys.executable, "-m", "meshq.agent", str(home.root), str(its.fileno()), str(lock)]
        command += [switches.failpoints, "events" if switches.events else ""]
        with Path(home.root / "agent.out").open("ab") as output:
            before = output.tell()
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
                pass_fds=(its.fileno(), lock), cwd="/",
            )  # fmt: skip
        its.close()
        mine.settimeout(DETACH_SECONDS)
        try:
            with mine.makefile("rb") as stream:
                line = stream.readline(OPTIONS_BYTES_MAX)
        except TimeoutError:
            _end(child)
            raise TaskFailed("the agent did not become ready in time", f"see {home.log}") from None
        except KeyboardInterrupt:
            _end(child)  # its home is about to be taken back
            raise
    if not line:
        code, said = _end(child), (home.root / "agent.out").read_bytes()[before:].decode(errors="replace").splitlines()
        raise StoreError(f"the agent ended at once with code {code}", harmless(said[-1]) if said else f"see {home.log}")
    document: Mapping[str, Any] = json.loads(line)
    if "error" in document:
        error = document["error"]
        raise ERROR_KINDS[error["code"]](error["message"], error["hint"])
    return document


def _end(child: subprocess.Popen[bytes]) -> int:
    """Have the agent gone, for the home is about to be taken back; its exit code."""
    child.terminate()
    try:
        return child.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()


if __name__ == "__main__":
    main()
