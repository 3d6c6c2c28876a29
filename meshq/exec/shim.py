"""The shim: one small process that supervises one attempt and outlives the agent.

It is forked by the zygote, runs user code at most once (P2), and leaves the whole story in the attempt's folder, so that
any later agent can take over. In order:

1. open `log`; take the flock on `lock` (proof of life: it is free exactly when this process is gone, whatever the pid
   became) and the locks of its GPUs; write into `lock` who holds it; make the FIFO `ctl`; write `exit.tmp` in its full size,
   so that reporting the end needs no free block of the disk;
2. create `started` with O_EXCL and fsync the folder. Whoever creates it first decides: a second shim refuses, and an agent that
   wants to be sure that an attempt will never start creates it itself;
3. fork; the child leads its own session, dies with the shim (PDEATHSIG), is confined (see `confine`) and becomes the task;
   `run.json` says who it is;
4. wait, without polling, for the child, for `ctl` ("stop REASON", "kill"), for SIGTERM, for the time limit; and, of a task
   under `--on-isolation stop`, for the moment by which it must be dead. `valid` says when that is; the agent moves it on as
   long as a majority of the task's voters agrees. An agent that is cut off, stopped, killed or gone moves nothing on, and
   then this process ends the task in time, by itself (see `Shim._mind_grants`);
5. kill what the task left behind: everything that descends from it (this process is a subreaper, so nothing escapes by
   forking twice) or carries its MESHQ_FENCE; then `exit.json`, by rename.

The log is the task's own file descriptor: no bytes pass through here, so nothing is lost with this process or slowed by it.
When it passes its limit, the middle becomes a hole of the file; offsets stay what they are and `logs` shows one line there.

Time is CLOCK_BOOTTIME: a time limit goes on while the machine sleeps. Only the standard library, and little of it: each module
costs every shim.
"""

import ctypes
import errno
import fcntl
import json
import os
import resource
import select
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

from meshq import failpoints
from meshq.exec import confine, gpulock

LAUNCH, LOCK, STARTED, RUN, LOG, CTL, EXIT = "launch.json", "lock", "started", "run.json", "log", "ctl", "exit.json"
VALID = "valid"
NEVER = b"never\n"  # in `started`: an agent made sure that this attempt will not start

GRACE_SECONDS = 10.0  # between SIGTERM and SIGKILL; Docker and Kubernetes: 10 and 30
ISOLATED = "isolated"  # why it was stopped: no majority of its voters has granted it to go on
ISOLATED_GRACE_SECONDS = 5.0  # between SIGTERM and SIGKILL then
ISOLATED_KILL_SECONDS = 1.0  # between SIGKILL and the moment by which all must be dead
VALID_CHECK_SECONDS = 0.5  # a poll does not count the time for which the machine was suspended: this is how late it may wake
LOG_CHECK_SECONDS = 2.0
LOG_STEP_BYTES = 4 * 2**20  # the hole grows in steps of this
LOG_ALIGN = 2**16  # the largest block size of common file systems
LEFTOVER_SECONDS = 5.0  # how long to go on killing what does not go away (uninterruptible sleep)
EXIT_BYTES = 4096
EXIT_WRITE_SECONDS = 600.0  # how long to go on trying when the disk refuses
OOM_SCORE = b"500"  # the kernel takes the task before the agent
NOT_FOUND, NOT_STARTED = 127, 126  # as shells have it

_PR_SET_PDEATHSIG, _PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 1, 15, 36
_PUNCH_HOLE_KEEP_SIZE = 0x03

_libc = ctypes.CDLL(None, use_errno=True)


class Launch(NamedTuple):
    """`launch.json`: all that the shim must know. The agent wrote it; it holds no secret but the task's environment."""

    fence: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    cwd: str
    gpus: tuple[int, ...]  # for the agent that adopts
    time_limit: float | None
    grace: float
    log_bytes_max: int
    log_head_bytes: int
    rules: tuple[tuple[str, str], ...]  # of `confine`
    limits: tuple[tuple[int, int], ...] = ()  # (RLIMIT_…, value)
    gpu_names: tuple[str, ...] = ()  # of `gpus`, as all agents of this machine name them
    until_valid: bool = False  # it may run only as long as `valid` says


class Process(NamedTuple):
    """A process as /proc shows it; (pid, ticks) name it uniquely until the next boot."""

    pid: int
    parent: int
    state: str
    ticks: int


class Refused(Exception):
    """The attempt does not start here and now; no user code ran."""


def boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read(64).strip()


def now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def process(pid: int) -> Process | None:
    """What runs under this pid, or None."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            fields = file.read(4096).rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return Process(pid, int(fields[1]), fields[0], int(fields[19]))


def processes() -> Iterator[Process]:
    for name in os.listdir("/proc"):
        if name.isdigit() and (found := process(int(name))) is not None:
            yield found


def descendants(roots: set[int], everybody: list[Process]) -> list[Process]:
    """All below these pids, the roots excluded."""
    children: dict[int, list[Process]] = {}
    for each in everybody:
        children.setdefault(each.parent, []).append(each)
    found: list[Process] = []
    open_pids = list(roots)
    while open_pids:
        for child in children.pop(open_pids.pop(), ()):
            found.append(child)
            open_pids.append(child.pid)
    return found


def carriers(fence: str, everybody: list[Process]) -> list[Process]:
    """The processes whose environment names the fence, whoever their parent is by now."""
    mark = b"MESHQ_FENCE=" + fence.encode()
    found = []
    for each in everybody:
        try:
            with open(f"/proc/{each.pid}/environ", "rb") as file:
                environ = file.read(2**20)
        except OSError:
            continue  # gone, or another user's
        if mark in environ.split(b"\0"):
            found.append(each)
    return found


def kill(victim: Process) -> bool:
    """SIGKILL to exactly this process; False if it is gone, dead already, or not ours to kill."""
    try:
        handle = os.pidfd_open(victim.pid)
    except OSError:
        return False
    try:
        if (alive := process(victim.pid)) is None or alive.ticks != victim.ticks or alive.state in "ZX":
            return False
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        return True
    except OSError:
        return False
    finally:
        os.close(handle)


def kill_all(fence: str, below: int | None) -> int:
    """SIGKILL to all that carry the fence, and to all that descend from `below`. How many were alive."""
    everybody = list(processes())
    victims = {each.pid: each for each in carriers(fence, everybody)}
    if below is not None:
        victims |= {each.pid: each for each in descendants({below}, everybody)}
    victims.pop(os.getpid(), None)
    return sum(kill(victim) for victim in victims.values())


def read_launch(text: bytes) -> Launch:
    plain: dict[str, Any] = json.loads(text)
    return Launch(
        fence=plain["fence"],
        argv=tuple(plain["argv"]),
        env=plain["env"],
        cwd=plain["cwd"],
        gpus=tuple(plain["gpus"]),
        time_limit=plain["time_limit"],
        grace=plain["grace"],
        log_bytes_max=plain["log_bytes_max"],
        log_head_bytes=plain["log_head_bytes"],
        rules=tuple((path, access) for path, access in plain["rules"]),
        limits=tuple((which, value) for which, value in plain["limits"]),
        gpu_names=tuple(plain["gpu_names"]),
        until_valid=plain.get("until_valid", False),
    )


def valid_text(until: float) -> bytes:
    """What `valid` holds. Twice, because it is written in place (a full disk must not stop what runs) while it is read."""
    return f"{until:020.6f} {until:020.6f}\n".encode()


def read_valid() -> float:
    """Until when the task may run, in seconds of CLOCK_BOOTTIME; -inf if the file does not say it, also for a moment."""
    for _ in range(3):
        try:
            one, other = _read(VALID).split()
            if one == other:
                return float(one)
        except (OSError, ValueError):
            return float("-inf")
        time.sleep(0.001)
    return float("-inf")


def supervise(folder: str, say: Callable[[int, str], None]) -> None:
    """The life of a shim, from the fork to the end. `say(pid, "")` once the task is spawned, or `say(0, why not)`."""
    os.setsid()
    _libc.prctl(_PR_SET_NAME, b"meshq-shim", 0, 0, 0)
    failpoints.reach("spawned")
    try:
        os.chdir(folder)
        shim = Shim(read_launch(_read(LAUNCH)))
        shim.take()
        pid = shim.spawn()
    except (Refused, OSError, ValueError, KeyError, TypeError) as error:
        say(0, f"{type(error).__name__}: {error}" if isinstance(error, KeyError | TypeError) else str(error))
        return
    say(pid, "")
    failpoints.reach("running")
    shim.wait()
    shim.sweep()
    failpoints.reach("exiting")
    shim.report()
    failpoints.reach("exit-written")


class Shim:
    """One attempt. The current folder is the attempt's."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._pid = 0
        self._status: int | None = None
        self._usage: resource.struct_rusage | None = None
        self._stopped = ""  # why it was told to stop; empty: it was not
        self._timed_out = False
        self._kill_at: float | None = None
        self._deadline: float | None = None
        self._valid_until = float("inf")
        self._isolated = False
        self._hole_end = 0
        self._left_behind = 0
        self._started_at = 0.0
        self._oom_kills = 0

    def take(self) -> None:
        """Make this process the attempt's only shim, for ever. Refused if there is or was another one."""
        self._log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        self._lock = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused("another shim runs this attempt") from None
        if os.path.lexists(STARTED):
            raise Refused("this attempt was started before")  # before anything of the first shim is written over
        if self._launch.until_valid:
            self._valid_until = read_valid()
            if now() >= self._isolated_at():
                raise Refused("what its voters granted has run out before it was started")
        self._take_gpus()
        me = process(os.getpid())
        assert me is not None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{me.pid} {me.ticks} {boot_id()}\n".encode(), 0)
        if not os.path.lexists(CTL):
            os.mkfifo(CTL, 0o600)
        self._ctl = os.open(CTL, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)  # RDWR: it never reads as ended
        _write(EXIT + ".tmp", b" " * EXIT_BYTES, os.O_CREAT | os.O_TRUNC, sync=False)
        try:
            _write(STARTED, f"{me.pid}\n".encode(), os.O_CREAT | os.O_EXCL, sync=False)
        except FileExistsError:
            raise Refused("this attempt was started before") from None
        _sync_folder()  # that it exists is what must survive a power cut; what it says need not
        failpoints.reach("started")

    def _take_gpus(self) -> None:
        """Refused if a task of another agent has one of them. Held, like `lock`, until this process is gone."""
        for name in self._launch.gpu_names:
            try:
                gpulock.take(name)
            except BlockingIOError:
                raise Refused(f"the GPU {name} is in use by a task of another agent on this machine") from None

    def spawn(self) -> int:
        """Fork the task. From here on this process answers for it."""
        self._quiet()
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._listen()
        self._oom_kills = _oom_kills()
        self._started_at = time.time()
        shim = os.getpid()
        # A stop may come at once. Unblocked, the child would answer it with the shim's handler, which does nothing.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
        self._pid = os.fork()
        if self._pid == 0:
            become_task(self._launch, shim)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM,))
        if self._launch.time_limit is not None:
            self._deadline = now() + self._launch.time_limit
        child = process(self._pid)
        about = {
            "shim": shim, "pid": self._pid, "start_ticks": child.ticks if child else 0, "boot_id": boot_id(),
            "started_at": self._started_at,
        }  # fmt: skip
        _write(RUN + ".tmp", json.dumps(about).encode(), os.O_CREAT | os.O_TRUNC, sync=False)
        os.rename(RUN + ".tmp", RUN)
        return self._pid

    def _quiet(self) -> None:
        """Let go of the agent's terminal; a failure of the shim itself is told in the log."""
        nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        os.dup2(nothing, 0)
        os.dup2(self._log, 1)
        os.dup2(self._log, 2)
        os.close(nothing)

    def _listen(self) -> None:
        """Signals become bytes in a pipe, so that one poll waits for everything."""
        self._wake, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, lambda _number, _frame: None)
        self._poll = select.poll()
        self._poll.register(self._wake, select.POLLIN)
        self._poll.register(self._ctl, select.POLLIN)

    def wait(self) -> None:
        """Until the task's first process has ended."""
        while self._status is None:
            if self._wait_event(self._wait_seconds()):
                self._obey()
            self._reap()
            self._mind_grants()
            self._mind_time()
            self._mind_log()

    def _wait_seconds(self) -> float:
        due = [at for at in (self._deadline, self._kill_at) if at is not None]
        if self._launch.until_valid and not self._isolated:
            due.append(self._isolated_at())
        most = VALID_CHECK_SECONDS if self._launch.until_valid else LOG_CHECK_SECONDS
        return max(0.0, min([at - now() for at in due] + [most]))

    def _wait_event(self, seconds: float) -> bool:
        """True if something was told through `ctl`."""
        told = False
        for descriptor, _ in self._poll.poll(int(seconds * 1000) + 1):
            if descriptor == self._ctl:
                told = True
            elif signal.SIGTERM in os.read(self._wake, 4096):
                self._stop("terminated")
        return told

    def _obey(self) -> None:
        try:
            commands = os.read(self._ctl, 4096).decode("ascii", "replace").splitlines()
        except BlockingIOError:
            return
        for command in commands:
            word, _, reason = command.partition(" ")
            if word == "stop":
                self._stop(reason or "cancelled")
            elif word == "kill":
                self._stop(reason or "cancelled")
                self._kill_at = now()

    def _reap(self) -> bool:
        """Take the dead children; whether there are others. With none left, nothing descends from this process any more."""
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == self._pid:
                self._status, self._usage = status, usage

    def _stop(self, reason: str) -> None:
        if not self._stopped and not self._timed_out:
            self._stopped = reason
            self._terminate()

    def _terminate(self) -> None:
        """SIGTERM to the task's process group, as Ctrl-C and Slurm do: a shell script would not pass it on."""
        self._kill_at = now() + self._launch.grace
        for number in (signal.SIGTERM, signal.SIGCONT):
            try:
                os.killpg(self._pid, number)
            except ProcessLookupError:
                os.kill(self._pid, number)  # it has not come as far as its own session; it is not reaped, so the pid is its

    def _isolated_at(self) -> float:
        """When the stop must begin, unless `valid` is moved on until then."""
        return self._valid_until - ISOLATED_KILL_SECONDS - ISOLATED_GRACE_SECONDS

    def _mind_grants(self) -> None:
        """End in time what its voters don't grant any more. Whatever it was stopped for before: by then it must be dead.

        Who slept past that moment, because the machine did, kills at once. A later grant does not call the task back.
        """
        if self._isolated or now() < self._isolated_at():
            return
        self._valid_until = max(self._valid_until, read_valid())
        if self._status is None and now() >= self._isolated_at():
            self._isolated = True
            self._stop(ISOLATED)
            kill_at = self._valid_until - ISOLATED_KILL_SECONDS
            self._kill_at = kill_at if self._kill_at is None else min(self._kill_at, kill_at)

    def _mind_time(self) -> None:
        if self._status is not None:
            return
        if self._deadline is not None and self._kill_at is None and now() >= self._deadline:
            self._timed_out = True
            self._terminate()
        if self._kill_at is not None and now() >= self._kill_at:
            kill_all(self._launch.fence, os.getpid())
            self._kill_at = now() + 1.0

    def _mind_log(self) -> None:
        """Keep the head and the tail of a log that grew too long."""
        head = self._launch.log_head_bytes // LOG_ALIGN * LOG_ALIGN
        size = os.fstat(self._log).st_size
        end = (size - (self._launch.log_bytes_max - head)) // LOG_ALIGN * LOG_ALIGN
        if size <= self._launch.log_bytes_max or end < max(self._hole_end, head) + min(LOG_STEP_BYTES, head):
            return
        self._hole_end = end
        arguments = (ctypes.c_int(_PUNCH_HOLE_KEEP_SIZE), ctypes.c_int64(head), ctypes.c_int64(end - head))
        if _libc.fallocate(ctypes.c_int(self._log), *arguments) != 0 and ctypes.get_errno() == errno.EOPNOTSUPP:
            os.ftruncate(self._log, head)  # a file system without holes: the tail so far is the price
            os.write(self._log, f"\n[meshq: {size - head} bytes of the log were dropped here]\n".encode())
            self._hole_end = 0

    def sweep(self) -> None:
        """Kill what the task left behind, as often as it takes: /proc is read while processes fork and die."""
        until = now() + LEFTOVER_SECONDS
        while now() < until:
            alive = kill_all(self._launch.fence, os.getpid())
            self._left_behind = max(self._left_behind, alive)
            if not self._reap() and not alive:
                break
            self._poll.poll(20)  # the deaths of orphans arrive as SIGCHLD
            _drain(self._wake)

    def report(self) -> None:
        """Write `exit.json`. A disk that refuses is tried again: the end of a task is not lost for a full disk."""
        assert self._status is not None and self._usage is not None
        code = os.waitstatus_to_exitcode(self._status)
        story = {
            "exit_code": code if code >= 0 else 128 - code,
            "signal": -code if code < 0 else 0,
            "stopped": self._stopped,
            "timed_out": self._timed_out,
            "out_of_memory": code == -signal.SIGKILL and self._kill_at is None and _oom_kills() > self._oom_kills,
            "started_at": self._started_at,
            "ended_at": time.time(),
            "leftovers_killed": self._left_behind,
            "max_rss_bytes": self._usage.ru_maxrss * 1024,
            "user_seconds": self._usage.ru_utime,
            "system_seconds": self._usage.ru_stime,
        }
        until = now() + EXIT_WRITE_SECONDS
        while True:
            try:
                _write(EXIT + ".tmp", json.dumps(story).encode().ljust(EXIT_BYTES), os.O_CREAT)
                os.rename(EXIT + ".tmp", EXIT)
                _sync_folder()
                break
            except OSError:
                if now() > until:
                    raise
                time.sleep(1.0)
        os.unlink(CTL)


def become_task(launch: Launch, shim: int) -> NoReturn:
    """In the child: shed what belongs to the shim and run the user's program. The log is on 1 and 2 already."""
    code = NOT_STARTED
    try:
        os.setsid()
        _libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != shim:
            os._exit(NOT_STARTED)  # the shim died before PDEATHSIG could say so
        signal.set_wakeup_fd(-1)
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_DFL)  # Python ignores SIGPIPE, and an exec would keep that
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.umask(0o022)
        for which, value in launch.limits:
            resource.setrlimit(which, (value, max(value, resource.getrlimit(which)[1])))
        _offer_to_oom_killer()
        confine.restrict(launch.rules)
        os.chdir(launch.cwd)
        os.execvpe(launch.argv[0], launch.argv, dict(launch.env))
    except FileNotFoundError as error:
        code = NOT_FOUND
        _complain(launch, error)
    except BaseException as error:  # whatever it is, this process must not go on as a second shim
        _complain(launch, error)
    finally:
        os._exit(code)


def _complain(launch: Launch, error: BaseException) -> None:
    os.write(2, f"meshq: cannot start {launch.argv[0]!r} in {launch.cwd}: {error}\n".encode(errors="replace"))


def _offer_to_oom_killer() -> None:
    try:
        with open("/proc/self/oom_score_adj", "wb") as file:
            file.write(OOM_SCORE)
    except OSError:
        pass  # best effort: some containers mount /proc read-only


def _oom_kills() -> int:
    try:
        with open("/proc/vmstat", encoding="ascii") as file:
            return next((int(line.split()[1]) for line in file if line.startswith("oom_kill ")), 0)
    except OSError:
        return 0


def _drain(descriptor: int) -> None:
    try:
        while os.read(descriptor, 4096):
            pass
    except BlockingIOError:
        return


def _read(name: str) -> bytes:
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        return file.read(2**24)


def _write(name: str, data: bytes, flags: int, *, sync: bool = True) -> None:
    descriptor = os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o600)
    try:
        os.write(descriptor, data)
        if sync:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder() -> None:
    descriptor = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
