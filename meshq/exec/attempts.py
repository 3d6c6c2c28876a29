"""The folders of attempts, as the agent sees them: it prepares them, finds them again, watches and signals their shims.

A folder is named by the attempt's fence and holds all that must outlive the agent (`shim` says what and in which order). The
state of an attempt is read from facts that only one process can have made:

    exit.json                          Exited
    else `started` by an agent         Unstarted: it will never start
    else `started` and the lock held   Alive
    else `started`                     Vanished: the shim was killed, or the machine went down
    else                               undecided: `inspect` creates `started` itself, then it is Unstarted for ever

The last line closes the race with the zygote of a dead agent, which may still hold a request for this folder: O_EXCL lets
exactly one of the two win. A pid is trusted only together with its start ticks, the boot, and the lock.

All here is blocking, and cheap, except for `watch`; the shell runs it in threads where it may touch the disk. User code may
have written into the folder where tasks aren't confined, so nothing in it is opened through a link.
"""

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import signal
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from meshq import codec, config
from meshq.durable import sync_folder
from meshq.errors import MalformedData, StoreError
from meshq.exec import shim
from meshq.exec.worker import Exited, Vanished
from meshq.ids import Fence, base32, is_fence
from meshq.task import Claimed

log = logging.getLogger("meshq.exec")

CLAIMED: Final = "claimed"
REPORTED: Final = "reported"
WORK: Final = "work"
OUTPUTS: Final = "outputs"
TMP_CHARS: Final = 7
KEEP_SECONDS: Final = 7 * 86_400.0  # log and outputs of an attempt whose end is in the ledger
KEEP_MAX: Final = 2_000  # such attempts, the newest
JSON_BYTES_MAX: Final = 2**24
CLAIMED_BYTES_MAX: Final = config.SPEC_BYTES_MAX + 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Alive:
    """Its shim runs."""

    shim: int
    ticks: int
    gpus: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Unstarted:
    """No user code ran, and none will."""


State = Alive | Exited | Vanished | Unstarted


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """An attempt that an earlier run of the agent left behind and whose end it did not report."""

    claimed: Claimed
    state: State


class Attempts:
    """All attempts below one folder."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def folder(self, fence: Fence) -> Path:
        assert is_fence(fence), fence
        return self._root / fence

    def log(self, fence: Fence) -> Path:
        return self.folder(fence) / shim.LOG

    def outputs(self, fence: Fence) -> Path:
        return self.folder(fence) / OUTPUTS

    def work(self, fence: Fence) -> Path:
        return self.folder(fence) / WORK

    def tmp(self, fence: Fence) -> Path:
        """The task's TMPDIR. Beside the attempt's folder and short, because programs bind Unix sockets in it.

        Such a path has at most 107 bytes, of which `multiprocessing` alone uses 32; the fence would use 40 more.
        """
        return self._root / ("t" + base32(hashlib.sha256(fence.encode()).digest())[:TMP_CHARS])

    def create(self, claimed: Claimed) -> Path:
        """Make the folder of a new attempt. StoreError if it is there already or the disk refuses."""
        folder = self.folder(claimed.fence)
        try:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.mkdir(mode=0o700)
            for each in (self.work(claimed.fence), self.outputs(claimed.fence), self.tmp(claimed.fence)):
                each.mkdir(mode=0o700)
            _write(folder / CLAIMED, codec.encode(claimed))
        except OSError as error:
            raise StoreError(f"making the folder of attempt {claimed.fence} in {self._root}: {error.strerror}") from None
        return folder

    def write_launch(self, launch: shim.Launch) -> None:
        """Put `launch.json` in place, so that starting is one request to the zygote."""
        plain = launch._asdict() | {"env": dict(launch.env)}
        try:
            _write(self.folder(Fence(launch.fence)) / shim.LAUNCH, json.dumps(plain).encode())
        except OSError as error:
            raise StoreError(f"writing launch.json of attempt {launch.fence}: {error.strerror}") from None

    def keep(self, fence: Fence, until: float) -> None:
        """Let the attempt run until then, in seconds of CLOCK_BOOTTIME; its shim looks before it stops it.

        Written in place: after the first time that needs no free block of the disk.
        """
        try:
            descriptor = os.open(
                self.folder(fence) / shim.VALID, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
            )
        except FileNotFoundError:
            return  # its folder is gone, and it with it
        except OSError as error:
            raise StoreError(f"telling the shim of attempt {fence} to go on: {error.strerror}") from None
        try:
            os.pwrite(descriptor, shim.valid_text(until), 0)
        except OSError as error:
            raise StoreError(f"telling the shim of attempt {fence} to go on: {error.strerror}") from None
        finally:
            os.close(descriptor)

    def scan(self) -> list[Found]:
        """Every attempt whose end was not reported; each Unstarted one is decided hereby."""
        found = []
        for fence in self._fences():
            if (self.folder(fence) / REPORTED).exists():
                continue
            try:
                claimed = codec.decode(Claimed, _read(self.folder(fence) / CLAIMED, 2**20), bytes_max=CLAIMED_BYTES_MAX)
                found.append(Found(claimed=claimed, state=self.inspect(fence)))
            except (OSError, ValueError, KeyError, TypeError, MalformedData) as error:
                # A crash while the folder was made, or a power cut before the claim reached the disk. The ledger knows
                # the claim and ends it as lost, so nothing of it may run on; the folder is kept for its log until it expires.
                log.warning("the attempt's folder %s can't be read and is not adopted: %s", self.folder(fence), error)
                self.signal(fence, b"kill")
                kill_leftovers(fence)
                self.mark_reported(fence)
        return found

    def inspect(self, fence: Fence) -> State:
        """What became of this attempt."""
        folder = self.folder(fence)
        if _exists(folder / shim.STARTED):
            held = _lock_held(folder / shim.LOCK)  # before exit.json is read: a shim writes it first and lets go then
        else:
            try:
                _write(folder / shim.STARTED, shim.NEVER, sync=True)
                sync_folder(folder)
            except FileExistsError:
                return self.inspect(fence)
            return Unstarted()
        if (ended := self._exit(fence)) is not None:
            return ended
        if _read(folder / shim.STARTED, 64) == shim.NEVER:
            return Unstarted()
        return self._alive(fence) if held else Vanished()

    def _alive(self, fence: Fence) -> State:
        folder = self.folder(fence)
        pid, ticks, boot = _read(folder / shim.LOCK, 256).decode("ascii", "replace").split()
        if boot != shim.boot_id():
            return Vanished()
        return Alive(shim=int(pid), ticks=int(ticks), gpus=self._gpus(fence))

    def shim_pid(self, fence: Fence) -> int | None:
        """The pid of the shim that holds the attempt, if one does."""
        with contextlib.suppress(OSError, ValueError):
            pid, ticks, boot = _read(self.folder(fence) / shim.LOCK, 256).decode("ascii", "replace").split()
            found = shim.process(int(pid))
            if found is not None and found.state not in "ZX" and found.ticks == int(ticks) and boot == shim.boot_id():
                return int(pid)
        return None

    def _gpus(self, fence: Fence) -> tuple[int, ...]:
        return shim.read_launch(_read(self.folder(fence) / shim.LAUNCH, JSON_BYTES_MAX)).gpus

    def _exit(self, fence: Fence) -> Exited | None:
        try:
            plain: dict[str, Any] = json.loads(_read(self.folder(fence) / shim.EXIT, JSON_BYTES_MAX))
            return Exited(
                exit_code=int(plain["exit_code"]),
                signal=int(plain["signal"]),
                stopped=str(plain["stopped"]),
                timed_out=bool(plain["timed_out"]),
                out_of_memory=bool(plain["out_of_memory"]),
                started_at=float(plain["started_at"]),
                ended_at=float(plain["ended_at"]),
            )
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("exit.json of attempt %s is damaged, so it counts as lost: %s", fence, error)
            return None

    async def watch(self, fence: Fence) -> Exited | Vanished:
        """Wait until the shim of this attempt has ended. What it left running, if it was killed, is killed here."""
        state = await asyncio.to_thread(self.inspect, fence)
        if isinstance(state, Alive):
            with contextlib.suppress(ProcessLookupError):
                await _ended(state)
            state = await asyncio.to_thread(self.inspect, fence)
        if isinstance(state, Exited):
            return state
        await asyncio.to_thread(kill_leftovers, fence)
        return Vanished()

    def signal(self, fence: Fence, command: bytes) -> bool:
        """Tell the shim `stop REASON` or `kill`; never blocks. False if no shim listens (any more)."""
        try:
            descriptor = os.open(self.folder(fence) / shim.CTL, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            if error.errno not in (errno.ENXIO, errno.ENOENT):
                log.warning("telling the shim of attempt %s to %s: %s", fence, command.decode(), error)
            return False
        try:
            written = stat.S_ISFIFO(os.fstat(descriptor).st_mode) and os.write(descriptor, command + b"\n") > 0
        except OSError:
            return False
        finally:
            os.close(descriptor)
        if written and (pid := self.shim_pid(fence)) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)  # one that somebody stopped would never read it, and its task go on
        return written

    def mark_reported(self, fence: Fence) -> None:
        """The outcome is in the ledger: later runs of the agent need not look at this attempt again."""
        with contextlib.suppress(FileExistsError, FileNotFoundError):
            _write(self.folder(fence) / REPORTED, b"")

    def clear(self, fence: Fence) -> None:
        """Remove what only the running task needed; log and outputs stay."""
        remove(self.work(fence))
        remove(self.tmp(fence))
        with contextlib.suppress(FileNotFoundError):
            (self.folder(fence) / shim.LAUNCH).unlink()  # it holds the task's environment

    def expire(self, wall: float) -> list[Fence]:
        """Remove reported attempts that are older than they are kept, or too many. The removed ones."""
        ended = []
        for fence in self._fences():
            with contextlib.suppress(OSError):
                ended.append(((self.folder(fence) / REPORTED).stat().st_mtime, fence))
        ended.sort(reverse=True)
        old = [fence for rank, (at, fence) in enumerate(ended) if at < wall - KEEP_SECONDS or rank >= KEEP_MAX]
        for fence in old:
            remove(self.tmp(fence))
            remove(self.folder(fence))
        return old

    def _fences(self) -> list[Fence]:
        try:
            return [Fence(name) for name in sorted(os.listdir(self._root)) if is_fence(name)]
        except FileNotFoundError:
            return []


def kill_leftovers(fence: Fence) -> None:
    """Kill everything that carries this fence: its shim is gone and can't. Blocking."""
    until = time.monotonic() + shim.LEFTOVER_SECONDS
    while shim.kill_all(fence, None) and time.monotonic() < until:
        time.sleep(0.02)


def remove(folder: Path) -> None:
    """Remove a tree that user code may have made, even where it took its own permissions away. Blocking, best effort."""
    shutil.rmtree(folder, ignore_errors=True)
    if not os.path.lexists(folder):
        return
    try:
        _unlock(str(folder))
        shutil.rmtree(folder)
    except FileNotFoundError:
        pass
    except OSError as error:
        log.warning("removing %s: %s", folder, error)


def _unlock(folder: str) -> None:
    """Give the owner of this tree its permissions on all folders back. O_PATH needs none, and pins what is changed."""
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.chmod(f"/proc/self/fd/{descriptor}", 0o700)
    finally:
        os.close(descriptor)
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                _unlock(entry.path)


async def _ended(state: Alive) -> None:
    """Wait for the end of this very process. ProcessLookupError if it is gone."""
    handle = os.pidfd_open(state.shim)
    try:
        current = shim.process(state.shim)
        if current is None or current.ticks != state.ticks:
            return
        loop = asyncio.get_running_loop()
        ended = loop.create_future()
        loop.add_reader(handle, lambda: None if ended.done() else ended.set_result(None))
        try:
            await ended
        finally:
            loop.remove_reader(handle)
    finally:
        os.close(handle)


def _lock_held(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


def _exists(path: Path) -> bool:
    return os.path.lexists(path)


def _read(path: Path, limit: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        return file.read(limit)


def _write(path: Path, data: bytes, *, sync: bool = False) -> None:
    """A new file; on the disk when this returns, if `sync`. What only a living boot needs is not worth the wait."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as file:
        file.write(data)
        if sync:
            file.flush()
            os.fsync(descriptor)
