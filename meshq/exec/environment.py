"""Virtual environments for tasks: built clean once for what is asked, kept, and found again without starting anything.

An environment is named by everything that decides what is in it: the resolved requirements, the interpreter, the platform,
how it is built. It is never changed afterwards, so two tasks that ask for the same share it and nothing else. Even a task
without requirements gets one of its own kind: never the agent's.

The requirements come from another member, so only lines of known forms get to uv: a line that names a file here
would have uv quote that file in its complaint, and that may be the key of the mesh. Building a source package runs its author's
code, so builds are confined like tasks: of the mesh's own files they see the new environment and the packages.

Safe at any moment: `.complete` is written last, and an environment without it is wiped and built anew. Who builds holds a
lock on a file beside it, and so does the uv process that it started; others, also other agents with the same folder, wait
for the one build. Files that were just installed are not yet on the disk; until they are, `.complete` names this boot,
and counts for nothing after a power cut.

Packages are copied out of uv's cache, or cloned where the file system shares blocks, never hard-linked: with
hard links, a task that writes to a file of a package changes it in every environment and in the cache (measured; uv's
issues 10579 and 15700). Byte code is compiled after the environment is ready, with the least priority: before, it would
keep the first task waiting for ten times the time of the installation.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Final

from meshq.errors import MeshqError
from meshq.exec.confined import command_for
from meshq.exec.interpreters import Interpreter, Interpreters
from meshq.exec.preparation import PreparationFailed
from meshq.exec.shim import boot_id
from meshq.packages import unsafe_line, uv_binary, uv_environment
from meshq.task import Environment

log = logging.getLogger("meshq.exec")

BUILDS_MAX: Final = 2  # at a time; one uv process already uses all cores
BUILD_SECONDS_MAX: Final = 3_600.0  # CUDA packages over a slow line take half of it
BUILD_NICENESS: Final = 10
COMPILE_NICENESS: Final = 19
LOCK_RETRY_SECONDS: Final = 0.1
LOG_TAIL_BYTES: Final = 16 * 1024
REASON_LINES: Final = 12
FICLONE: Final = 0x40049409  # linux/fs.h: share the blocks of another file
DURABLE: Final = "durable"
Confine = Callable[[Sequence[str]], list[str]]

MODE: Final = "uv 1"  # part of the name; changes when environments are built in another way


class EnvironmentCache:
    """The environments below `root`, with packages from `package_cache`. One for an agent; use from its loop only.

    `hidden` is the agent's home, which builds must not see; None only where there is no agent.
    """

    def __init__(
        self, root: Path, package_cache: Path, *, hidden: Path | None = None, interpreters: Interpreters | None = None
    ) -> None:
        self._root = root
        self._package_cache = package_cache
        self._hidden = hidden
        self._interpreters = interpreters or Interpreters()
        self._boot = boot_id()
        self._ready: dict[str, Path] = {}  # checked since the agent started
        self._locks: dict[str, asyncio.Lock] = {}
        self._builds = asyncio.Semaphore(BUILDS_MAX)
        self._finishing: set[asyncio.Task[None]] = set()
        self._link_mode = ""

    async def ready(self, environment: Environment) -> str:
        """The path of an interpreter that has what is asked for. PreparationFailed says what did not work.

        Cancelling it ends the build, unless somebody else waits for the same: then that one builds.
        """
        check_lock(environment.lock)
        interpreter = self._interpreters.known(environment.python)
        if interpreter is None:
            interpreter = await asyncio.to_thread(self._interpreters.choose, environment.python)
        key = environment_key(environment, interpreter)
        python = self._root / key / "bin" / "python"
        if not await self._is_ready(key, python):
            async with self._locks.setdefault(key, asyncio.Lock()):
                if not await self._is_ready(key, python):
                    await self._build(key, environment.lock, interpreter)
        return str(python)

    def build_log(self, python: str) -> Path:
        """What was said while the environment of this interpreter was built."""
        folder = Path(python).parent.parent
        return folder.with_name(folder.name + ".log")

    async def close(self) -> None:
        """Stop what goes on behind the tasks' backs. Environments stay usable."""
        for each in self._finishing:
            each.cancel()
        await asyncio.gather(*self._finishing, return_exceptions=True)

    async def _is_ready(self, key: str, python: Path) -> bool:
        """Without a subprocess, and after the first time with nothing but setting the time of last use."""
        state = await asyncio.to_thread(_used_now, python, DURABLE if key in self._ready else "")
        if state not in (self._boot, DURABLE):
            self._ready.pop(key, None)
            return False
        if key not in self._ready and state == self._boot:
            self._finish_later(python.parent.parent)
        self._ready[key] = python
        return True

    async def _build(self, key: str, lock: str, interpreter: Interpreter) -> None:
        folder = self._root / key
        try:
            for each in (self._root, self._package_cache):
                await asyncio.to_thread(each.mkdir, parents=True, exist_ok=True, mode=0o700)
            async with self._builds, _locked(folder.with_name(f"{key}.lock")) as held:
                if not await self._is_ready(key, folder / "bin" / "python"):  # another agent may have built it meanwhile
                    await self._build_locked(folder, lock, interpreter, held)
                    await self._is_ready(key, folder / "bin" / "python")
        except OSError as error:
            raise PreparationFailed(f"building an environment in {self._root}: {error.strerror or error}", True) from None

    async def _build_locked(self, folder: Path, lock: str, interpreter: Interpreter, held: int) -> None:
        started = time.monotonic()
        await asyncio.to_thread(_make_room, folder)
        try:
            uv = await asyncio.to_thread(uv_binary)
        except MeshqError as error:
            raise PreparationFailed(str(error), True) from None
        async with _opened(folder.with_name(f"{folder.name}.log")) as output:
            builder = _Builder(output, held, self._package_cache, self._confined(folder))
            await builder.run([uv, "venv", "--no-project", "--python", str(interpreter.path), str(folder)])
            if lock:
                await asyncio.to_thread((folder / "requirements.lock").write_text, lock, encoding="utf-8")
                await builder.run(
                    [uv, "pip", "sync", "--python", str(folder / "bin" / "python"), "--link-mode", await self._how_to_link(),
                     "--allow-empty-requirements", "requirements.lock"], cwd=folder
                )  # fmt: skip
        await asyncio.to_thread((folder / ".complete").write_text, self._boot)
        log.info("built environment %s in %.1f s", folder.name, time.monotonic() - started)

    async def _how_to_link(self) -> str:
        if not self._link_mode:
            self._link_mode = "clone" if await asyncio.to_thread(_can_clone, self._root) else "copy"
        return self._link_mode

    def _confined(self, folder: Path) -> Confine:
        """How a build of `folder` gets its commands."""
        if self._hidden is None:
            return list
        hidden, open_ones = str(self._hidden), [str(folder), str(self._package_cache)]
        return lambda command: command_for(hidden, open_ones, list(command))

    def _finish_later(self, folder: Path) -> None:
        finishing = asyncio.create_task(self._finish(folder), name=f"finish environment {folder.name}")
        self._finishing.add(finishing)
        finishing.add_done_callback(self._finishing.discard)

    async def _finish(self, folder: Path) -> None:
        """Compile byte code, then bring everything to the disk and say so. Nobody builds here meanwhile."""
        try:
            async with _locked(folder.with_name(f"{folder.name}.lock")) as held:
                if await asyncio.to_thread((folder / ".complete").read_text) != self._boot:
                    return  # another agent was quicker, or it is about to be built again
                async with _opened(Path(os.devnull)) as output:
                    builder = _Builder(output, held, self._package_cache, self._confined(folder))
                    command = [str(folder / "bin" / "python"), "-I", "-m", "compileall", "-q", str(folder / "lib")]
                    with contextlib.suppress(PreparationFailed):  # some packages carry templates that are no valid Python
                        await builder.run(command, niceness=COMPILE_NICENESS)
                await asyncio.to_thread(os.sync)
                await asyncio.to_thread(_replace, folder / ".complete", DURABLE)
        except FileNotFoundError:
            log.info("the environment %s is being built again", folder.name)
        except OSError as error:
            log.warning("the environment %s may have to be built again after a power cut: %s", folder.name, error)


class _Builder:
    """Runs the commands of one build. `held` is the lock's descriptor, which they inherit: it is free when all are gone."""

    def __init__(self, output: int, held: int, package_cache: Path, confined: Confine) -> None:
        self._output = output
        self._confined = confined
        self._held = (held,)
        self._environ = uv_environment(cache=package_cache)
        self._environ.pop("VIRTUAL_ENV", None)
        self._environ["UV_PYTHON_DOWNLOADS"] = "never"
        self._environ["TMPDIR"] = str(package_cache)  # the usual one may lie beside the home, where nothing can be made

    async def run(self, command: Sequence[str], *, cwd: Path | None = None, niceness: int = BUILD_NICENESS) -> None:
        """PreparationFailed with the last lines of output unless it succeeds. Cancelled: it is killed first."""
        begin = os.lseek(self._output, 0, os.SEEK_CUR)
        process = await asyncio.create_subprocess_exec(
            *self._confined(command), cwd=cwd, env=self._environ, stdin=asyncio.subprocess.DEVNULL,
            stdout=self._output, stderr=self._output, start_new_session=True, pass_fds=self._held,
        )  # fmt: skip
        with contextlib.suppress(OSError):  # it may be over already
            os.setpriority(os.PRIO_PROCESS, process.pid, niceness)
        try:
            async with asyncio.timeout(BUILD_SECONDS_MAX):
                code = await process.wait()
        except TimeoutError:
            raise PreparationFailed(
                f"building the environment took more than {BUILD_SECONDS_MAX / 60:.0f} minutes", True
            ) from None
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        if code != 0:
            raise PreparationFailed(f"building the environment failed: {_tail(self._output, begin)}", True)


def environment_key(environment: Environment, interpreter: Interpreter) -> str:
    """The name of the environment; the order of the lock's lines and its comments don't matter."""
    lines = sorted(line.strip() for line in environment.lock.splitlines() if line.strip() and not line.startswith("#"))
    facts = [
        MODE, environment.manager, lines, str(interpreter.path), interpreter.version,
        interpreter.implementation, interpreter.abi, interpreter.platform,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def check_lock(lock: str) -> None:
    """PreparationFailed if a line could make uv read anything but packages."""
    if (line := unsafe_line(lock)) is not None:
        raise PreparationFailed(f"the requirements are refused: {line[:200]!r} is no pinned package", False)


@contextlib.asynccontextmanager
async def _opened(path: Path) -> AsyncIterator[int]:
    """A descriptor to write to; nothing that was there stays."""
    descriptor = await asyncio.to_thread(os.open, path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _used_now(python: Path, known: str) -> str:
    """What the environment of this interpreter says of its state (`known`, if that is given), now that it is used; empty if it
    can't be used."""
    marker = python.parent.parent / ".complete"
    try:
        state = known or marker.read_text()
        os.utime(marker)
        os.stat(python)  # follows the link: the interpreter may be gone
    except OSError:
        return ""
    return state


def _make_room(folder: Path) -> None:
    """Make the empty folder of a new environment. What is there is renamed first: if the build is cancelled while its thread
    goes on to delete, the next build already has the place for itself."""
    with contextlib.suppress(FileNotFoundError):
        folder.rename(folder.with_name(f"{folder.name}.old-{secrets.token_hex(4)}"))
    folder.mkdir()
    for old in folder.parent.glob("*.old-*"):
        shutil.rmtree(old, ignore_errors=True)


@contextlib.asynccontextmanager
async def _locked(path: Path) -> AsyncIterator[int]:
    """Hold the lock on `path`; the descriptor is given so that children can hold it, too.

    Tried again and again instead of waiting in a thread: a thread in flock can't be cancelled. It is only ever waited for when
    another agent, or a uv process that a killed agent left behind, builds the very same environment.
    """
    descriptor = await asyncio.to_thread(os.open, path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while not _try_lock(descriptor):  # noqa: ASYNC110  # another process releases it: no event of this loop does
            await asyncio.sleep(LOCK_RETRY_SECONDS)
        yield descriptor
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _tail(output: int, begin: int) -> str:
    """The last lines that a command wrote, as one line."""
    end = os.lseek(output, 0, os.SEEK_CUR)
    with open(f"/proc/self/fd/{output}", "rb") as file:
        file.seek(max(begin, end - LOG_TAIL_BYTES))
        lines = file.read(LOG_TAIL_BYTES).decode("utf-8", "replace").splitlines()
    return " / ".join(line.strip() for line in lines[-REASON_LINES:] if line.strip()) or "it said nothing"


def _can_clone(folder: Path) -> bool:
    """Does this file system let two files share blocks until one is written?"""
    source, target = (folder / f"clone-{secrets.token_hex(4)}-{part}" for part in ("a", "b"))
    try:
        source.write_bytes(b"meshq" * 1000)
        with open(source, "rb") as original, open(target, "wb") as copy:
            fcntl.ioctl(copy.fileno(), FICLONE, original.fileno())
    except OSError:
        return False
    finally:
        source.unlink(missing_ok=True)
        target.unlink(missing_ok=True)
    return True


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}-{secrets.token_hex(4)}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
