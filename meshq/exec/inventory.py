"""What is installed on this machine and rarely changes: versions, and the environments that are cached.

Asked in the probe's thread, after a sample. Docker's server is asked by hand over its socket: the docker package takes 0.3 s
and 36 MB to load, and a daemon that hangs may cost one second in a minute. What does not answer is unknown.
"""

import json
import os
import platform
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from meshq.exec.environment import DURABLE
from meshq.exec.shim import boot_id
from meshq.task import Versions

LOOK_SECONDS: Final = 60.0
ENVIRONMENTS_MAX: Final = 16  # told of, the one used last first
ENVIRONMENT_CHARS: Final = 8  # of its key: 32 bits tell a thousand apart
DOCKER_SECONDS: Final = 1.0  # for docker's whole answer
DOCKER_BYTES_MAX: Final = 64 * 1024
DOCKER_SOCKETS: Final = ("/run/docker.sock", f"/run/user/{os.geteuid()}/docker.sock")
VERSION_CHARS_MAX: Final = 40


class Inventory:
    """Looked at by one thread, now and then."""

    def __init__(self, environments: Path, docker_sockets: Sequence[str] = DOCKER_SOCKETS) -> None:
        self._folder = environments
        self._sockets = docker_sockets
        self._look_at = 0.0
        self._versions = Versions(
            python=platform.python_version()[:VERSION_CHARS_MAX],
            kernel=os.uname().release[:VERSION_CHARS_MAX],
            system=_system()[:VERSION_CHARS_MAX],
        )
        self.environments: tuple[str, ...] = ()

    def versions(self, driver: str, cuda: str) -> Versions:
        """With those that only NVML knows."""
        return replace(self._versions, driver=driver[:VERSION_CHARS_MAX], cuda=cuda[:VERSION_CHARS_MAX])

    def look(self, now: float) -> None:
        """Look again if it is time."""
        if now >= self._look_at:
            self._look_at = now + LOOK_SECONDS
            self.environments = cached_environments(self._folder)
            self._versions = replace(self._versions, docker=docker_version(self._sockets)[:VERSION_CHARS_MAX])


def _system() -> str:
    """`debian 12`; the name of the kernel where the distribution does not say what it is."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        return platform.system()
    return f"{release.get('ID', '')} {release.get('VERSION_ID', '')}".strip()


def cached_environments(folder: Path) -> tuple[str, ...]:
    """The heads of the keys of the environments that are complete, the one used last first."""
    found: list[tuple[float, str]] = []
    here = boot_id()
    try:
        names = [name for name in os.listdir(folder) if "." not in name]
    except OSError:
        return ()  # none was ever built
    for name in names:
        marker = folder / name / ".complete"
        try:
            if marker.read_text("ascii") in (DURABLE, here):  # else it was not on the disk when the power went
                found.append((-marker.stat().st_mtime, name[:ENVIRONMENT_CHARS]))
        except (OSError, ValueError):
            continue
    return tuple(key for _, key in sorted(found)[:ENVIRONMENTS_MAX])


def docker_version(sockets: Iterable[str]) -> str:
    """The version of the first server that answers, or empty. Takes at most DOCKER_SECONDS for each socket."""
    for path in sockets:
        try:
            return _docker_version(path)
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            continue  # none, not for this user, or no docker: `meshq doctor` says which
    return ""


def _docker_version(path: str) -> str:
    deadline = time.monotonic() + DOCKER_SECONDS
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(DOCKER_SECONDS)
        connection.connect(path)
        connection.sendall(b"GET /version HTTP/1.0\r\nHost: docker\r\n\r\n")  # 1.0: the answer ends with its body
        answer = b""
        while len(answer) < DOCKER_BYTES_MAX:
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            if not (chunk := connection.recv(DOCKER_BYTES_MAX)):
                break
            answer += chunk
    plain: Any = json.loads(answer.partition(b"\r\n\r\n")[2])
    version: object = plain["Version"]
    if not isinstance(version, str) or not version.isprintable():
        raise ValueError("no version")
    return version
