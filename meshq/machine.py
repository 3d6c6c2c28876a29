"""What this machine is when the agent starts: its capacity, its ports, the count of its starts, its last name."""

import errno
import json
import os
import socket
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from meshq import codec, config
from meshq.durable import write_atomically
from meshq.errors import MalformedData, StoreError, TaskFailed, UsageError
from meshq.exec import gpus as gpu_driver
from meshq.gossip.addresses import ALL_HOSTS, BIND_HINT, interfaces, normal_bind
from meshq.gossip.transport import open_socket
from meshq.ids import Epoch, PeerId
from meshq.names import STEPS, HeldName
from meshq.settings import Settings, gpu_indices

GPU_PATIENCE_SECONDS: Final = 10.0  # for `join --gpus`; the agent itself never waits for a driver
PORTS_TRIED: Final = 16  # from the default on, if none was asked for: several users of one machine each have an agent
BACKLOG: Final = 512
EVERYBODY: Final = "255.255.255.255"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What this peer may give to tasks, worked out once at the start."""

    slots: int
    cpus: int
    memory_bytes: int


def measure(settings: Settings) -> Machine:
    """All that there is, unless `join` said less. One slot; exec makes it one for each GPU as soon as it knows them."""
    return Machine(
        slots=1 if settings.slots is None else settings.slots,
        cpus=settings.cpus or len(os.sched_getaffinity(0)),
        memory_bytes=settings.memory_bytes or psutil.virtual_memory().total,
    )


def check(settings: Settings, given: Collection[str]) -> None:
    """UsageError if `join` was just asked to give away what this machine does not have. Blocking, like `measure`.

    Only what is `given` now: hardware that was taken out since must not keep an agent from starting again.
    """
    cpus, memory = len(os.sched_getaffinity(0)), psutil.virtual_memory().total
    if "cpus" in given and settings.cpus is not None and settings.cpus > cpus:
        raise UsageError(f"--cpus: {settings.cpus} of the {cpus} cores that this machine has")
    if "memory_bytes" in given and settings.memory_bytes is not None and settings.memory_bytes > memory:
        raise UsageError(f"--memory: {settings.memory_bytes >> 20} MiB of the {memory >> 20} MiB that this machine has")
    if "bind" in given and (unusable := bind_problem(settings.bind or "")):
        raise UsageError(*unusable)
    indices = gpu_indices(settings.gpus)
    if "gpus" in given and indices:
        gpus, problem = gpu_driver.look(GPU_PATIENCE_SECONDS)
        missing = [index for index in indices if index not in {gpu.index for gpu in gpus}]
        if missing:
            has = f"GPUs 0 to {len(gpus) - 1}" if gpus else f"no GPU ({problem or 'NVML sees none'})"
            raise UsageError(f"--gpus: this machine has {has}, so not {', '.join(map(str, missing))}")


def gpus_allowed(settings: Settings) -> frozenset[int] | None:
    """The indices that may be given to tasks; None for all."""
    indices = gpu_indices(settings.gpus)
    return None if indices is None else frozenset(indices)


def open_ports(bind: str, port: int | None) -> tuple[socket.socket, socket.socket, int]:
    """A UDP and a listening TCP socket on the same port. TaskFailed if `port` is taken, or all those tried are, or if this
    machine has no (more) the address that `bind` names; UsageError if that is none."""
    bind = normal_bind(bind)
    if problem := bind_problem(bind):
        raise TaskFailed(*problem)
    wanted = range(config.PORT_DEFAULT, config.PORT_DEFAULT + PORTS_TRIED) if port is None else (port,)
    failure: TaskFailed | None = None
    for each in wanted:
        try:
            udp = open_socket(bind, each)
        except TaskFailed as error:
            failure = error
            continue
        try:
            return udp, _listen(udp, each), each
        except TaskFailed as error:
            udp.close()
            failure = error
    assert failure is not None
    raise failure


def bind_problem(bind: str) -> tuple[str, str] | None:
    """Why this machine cannot listen on that address, and what to do; None if it can. UsageError for what is no address."""
    bind = normal_bind(bind)
    family = socket.AF_INET6 if ":" in bind else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((bind, 0))
        if bind not in ALL_HOSTS and _is_broadcast(family, bind):
            return f"--bind: {bind} is a broadcast address: it means all machines of a network", BIND_HINT
    except OSError as error:
        have = ", ".join(host for interface in interfaces() for host in interface.hosts if not interface.loopback)
        hint = f"it has {have or 'no address but loopback'}; without --bind all are used"
        if error.errno == errno.EADDRNOTAVAIL:
            return f"--bind: this machine does not have the address {bind}", hint
        why = "it has no IPv6" if error.errno == errno.EAFNOSUPPORT else error.strerror
        return f"--bind: this machine cannot listen on {bind}: {why}", hint
    return None


def _is_broadcast(family: socket.AddressFamily, host: str) -> bool:
    """Linux lets one bind such an address, and even listen on it, but reaches it only if told that broadcast is meant."""
    if host == EVERYBODY:  # where there is no network at all there is no way there either
        return True
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, config.PORT_DEFAULT))  # UDP: nothing is sent
        except OSError as error:
            return error.errno == errno.EACCES
    return False


def _listen(udp: socket.socket, port: int) -> socket.socket:
    """TCP on the address that the UDP socket has."""
    host = udp.getsockname()[0]
    tcp = socket.socket(udp.family, socket.SOCK_STREAM)
    try:
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if udp.family == socket.AF_INET6:
            tcp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        tcp.bind((host, port))
        tcp.listen(BACKLOG)
    except OSError as error:
        tcp.close()
        why = "another program uses it" if error.errno == errno.EADDRINUSE else str(error.strerror)
        raise TaskFailed(
            f"cannot listen on TCP port {port}: {why}", "choose another with --port, or stop that program"
        ) from None
    return tcp


def load_name(path: Path, peer: PeerId, wanted: str) -> HeldName | None:
    """The name that this peer had when it wanted the same; None if there is none, or it cannot be read."""
    try:
        held: HeldName = codec.from_plain(HeldName, json.loads(path.read_text("utf-8")))
        config.check_name(held.name, str(path))
    except (OSError, ValueError, MalformedData, UsageError):  # then it comes as one that is new
        return None
    return held if (held.peer, held.wanted) == (peer, wanted) and 0 <= held.named <= len(STEPS) else None


def store_name(path: Path, held: HeldName) -> None:
    """Remember it for the next start. StoreError if the disk refuses."""
    _replace(path, json.dumps(codec.to_plain(held)))


def next_epoch(path: Path) -> Epoch:
    """One more than at the last start, durable before it is used. StoreError if the disk refuses."""
    try:
        before = int(path.read_text("ascii"))
    except (FileNotFoundError, ValueError):
        before = 0  # a lost count is caught by gossip: others know a higher epoch, and this peer goes above it
    store_epoch(path, Epoch(before + 1))
    return Epoch(before + 1)


def store_epoch(path: Path, epoch: Epoch) -> None:
    """Make this the last epoch that was used. StoreError if the disk refuses."""
    _replace(path, str(epoch))


def _replace(path: Path, text: str) -> None:
    try:
        write_atomically(path, text.encode("ascii"))
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}", "check free space and permissions of the home") from None
