"""The keys of a home in which no agent runs: what `meshq key` does for a machine that its mesh no longer accepts.

`python -m meshq.trust.offline` reads one request as JSON from stdin (a key may be in it, so it never stands in arguments or
environment) and answers with one document on stdout. It holds the home's lock meanwhile, so no agent starts in between.

Installed here, a key is known to this home and nobody else; used here, it is what this machine shows from its next start on. It
claims nothing for the mesh: the mesh's own choice counts as soon as it is seen.
"""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final

from meshq import config, home_lock
from meshq.config import Home
from meshq.errors import MeshqError, TaskFailed, UsageError
from meshq.ids import PeerId
from meshq.trust import hardening, keyring, keys, ring_file
from meshq.trust.keyring import Keyring

REQUEST_BYTES_MAX: Final = 64 * 1024
_NOBODY: Final = PeerId("a" * 52)  # stands for this peer where it does not matter who changes a ring


def main() -> int:
    """Entry point; the exit code."""
    hardening.hide_process()  # before a key is read
    home = config.home_from_environment()
    hardening.forget_settings()
    try:
        request = json.loads(sys.stdin.buffer.read(REQUEST_BYTES_MAX))
        with locked(home):
            answer = act(home, request)
        code = 0
    except MeshqError as error:
        answer = {"error": {"code": error.code, "message": error.message, "hint": error.hint}}
        code = error.exit_code
    print(json.dumps(answer))
    return code


def act(home: Home, request: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same documents as an agent's. The caller holds the home's lock."""
    ring = ring_file.load(home.key)
    match request["action"]:
        case "list":
            return _listed(ring)
        case "install":
            after, chosen = _installed(ring, request["key"])
        case "use":
            chosen = keyring.resolve(ring, request["id"])
            after = keyring.choose(ring, chosen)
        case action:
            raise UsageError(f"{action!r} is nothing that can be done without an agent", "start it with `meshq join`")
    if after != ring:
        ring_file.save(home.key, after)
    return {"id": chosen, "peers": [], "failed": []}


@contextmanager
def locked(home: Home) -> Iterator[None]:
    """TaskFailed if an agent runs in this home."""
    descriptor = home_lock.take(home)
    if descriptor is None:
        raise TaskFailed(f"an agent runs in {home.root}, but does not answer", "look into its log, `agent.log`")
    try:
        yield
    finally:
        os.close(descriptor)


def _installed(ring: Keyring, text: str) -> tuple[Keyring, str]:
    key = keys.parse(text)
    after, chosen = keyring.install(ring, _NOBODY, key, (), (), key)
    return replace(after, use=ring.use), chosen  # what is in use is the mesh's to say


def _listed(ring: Keyring) -> Mapping[str, Any]:
    return {
        "keys": [
            {"id": each.id, "in_use": each.id == ring.current.id, "peers": [], "used_by": [], "lacking": [], "off": []}
            for each in ring.ordered
        ],
        "removed": list(ring.removed),
    }


if __name__ == "__main__":
    sys.exit(main())
