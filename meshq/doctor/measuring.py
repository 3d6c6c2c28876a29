"""What must be looked at anew for each check-up, each look within its time limit, all at the same time.

A docker daemon that hangs, a disk that does not answer or a network that swallows multicast must not keep anybody waiting: what
could not be found out in time is left at its default, and the checks say so.
"""

import asyncio
import json
import os
import resource
import shutil
from collections.abc import Awaitable, Mapping, Sequence
from pathlib import Path
from typing import Final, TypeVar

import psutil

from meshq.doctor import multicast
from meshq.doctor.facts import Disk, Docker, Files, Measured, Probe
from meshq.errors import TaskFailed
from meshq.gossip.addresses import Interface, interfaces, search_hosts
from meshq.packages import uv_binary

LOOK_SECONDS: Final = 1.0  # for each look
ANSWER_BYTES_MAX: Final = 64 * 1024
VERSION_CHARS_MAX: Final = 32
DOCKER_SOCKET: Final = "/var/run/docker.sock"

Found = TypeVar("Found")


async def measure(home: Path, *, mdns: bool, bind: str, seconds: float = LOOK_SECONDS) -> Measured:
    """Look at everything, for at most twice `seconds`; nothing that goes wrong is raised. `bind`: what `join` was given."""
    (found, probes), docker, disk, files, git = await asyncio.gather(
        _look_at_network(mdns, bind, seconds),
        ask_docker(docker_socket(), seconds),
        _within(seconds, asyncio.to_thread(look_at_disk, home), Disk()),
        _within(seconds, asyncio.to_thread(count_files), Files()),
        _within(seconds, asyncio.to_thread(shutil.which, "git"), None),
    )
    return Measured(interfaces=found, probes=probes, docker=docker, disk=disk, files=files, git=git)


async def _within(seconds: float, work: Awaitable[Found], otherwise: Found) -> Found:
    try:
        return await asyncio.wait_for(work, seconds)
    except (TimeoutError, OSError, ValueError):
        return otherwise


async def _look_at_network(mdns: bool, bind: str, seconds: float) -> tuple[Sequence[Interface], tuple[Probe, ...]]:
    found = await _within(seconds, asyncio.to_thread(interfaces), [])
    if not mdns or not found:
        return found, ()
    names = {host: interface.name for interface in found for host in interface.hosts}
    chosen = [(names[host], host) for host in search_hosts(found, bind)]
    return found, await _within(seconds, multicast.probe_all(chosen, frozenset(names)), ())


def docker_socket(environ: Mapping[str, str] = os.environ) -> str:
    """Where docker would be asked: what DOCKER_HOST says, else the usual places; empty if there is nothing."""
    chosen = environ.get("DOCKER_HOST", "")
    if chosen:
        return chosen.removeprefix("unix://") if chosen.startswith("unix://") else ""
    return next((path for path in (DOCKER_SOCKET, f"/run/user/{os.geteuid()}/docker.sock") if os.path.exists(path)), "")


async def ask_docker(path: str, seconds: float = LOOK_SECONDS) -> Docker:
    """The daemon's version, or why it can't be had."""
    if not path:
        return Docker()
    try:
        async with asyncio.timeout(seconds):
            version = _version(await _get(path, "/version"))
    except PermissionError:
        return Docker(path=path, problem="this user may not use it", denied=True)
    except TimeoutError:
        return Docker(path=path, problem="it does not answer")
    except (OSError, ValueError, RecursionError) as error:
        return Docker(path=path, problem=getattr(error, "strerror", None) or "its answer cannot be read")
    return Docker(path=path, version=version)


async def _get(path: str, resource_path: str) -> bytes:
    """The body of the answer. HTTP/1.0, so that it comes in one piece and the end of the connection is its end."""
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        writer.write(f"GET {resource_path} HTTP/1.0\r\nHost: docker\r\n\r\n".encode("ascii"))
        answer = bytearray()
        while len(answer) < ANSWER_BYTES_MAX and (chunk := await reader.read(ANSWER_BYTES_MAX)):
            answer += chunk
    finally:
        writer.close()
    head, _, body = bytes(answer).partition(b"\r\n\r\n")
    if b" 200 " not in head.partition(b"\r\n")[0]:
        raise ValueError("no answer of a docker daemon")
    return body


def _version(body: bytes) -> str:
    document = json.loads(body)
    version = document.get("Version") if isinstance(document, dict) else None
    if not isinstance(version, str) or not version.isprintable():
        raise ValueError("no version")
    return version[:VERSION_CHARS_MAX]


def look_at_disk(home: Path) -> Disk:
    """Blocking, for as long as the file system likes."""
    usage = os.statvfs(home)
    real = os.path.realpath(home)
    mounted = [part for part in psutil.disk_partitions(all=True) if _lies_in(real, part.mountpoint)]
    kind = max(mounted, key=lambda part: len(part.mountpoint)).fstype if mounted else ""
    free_files = usage.f_favail if usage.f_files else None  # some (btrfs) have no such limit
    return Disk(free_bytes=usage.f_bavail * usage.f_frsize, free_files=free_files, kind=kind)


def _lies_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def count_files() -> Files:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return Files(open=len(os.listdir("/proc/self/fd")), limit=2**20 if limit == resource.RLIM_INFINITY else limit)


def find_uv() -> str | None:
    """The uv binary that builds environments."""
    try:
        return uv_binary()
    except TaskFailed:
        return None
