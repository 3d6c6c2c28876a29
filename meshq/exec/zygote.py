"""The zygote: a small Python process with the shim's code loaded, which the agent starts once and which forks the shims.

A fork of this takes well under a millisecond and shares its memory; a fork of the agent would drag its threads, sockets and
secrets along, and starting an interpreter takes 20 ms. It is run by path, as `python -I -S zygote.py FD`, and speaks packets
over the socket FD (SOCK_SEQPACKET): in comes "NUMBER FOLDER", a request and its attempt's folder; out go, as JSON,

- {"request", "pid", "error"}: from the shim itself, once the task is spawned or refused;
- {"request", "ended"}: from the zygote, when a shim has ended, so that one that dies without a word fails its request.

It ends when the socket does, which is when the agent does. The shims live on, as children of init.
"""

import contextlib
import os
import sys

REQUEST_BYTES_MAX = 8192


def _load_package() -> None:
    """Make `meshq.exec` importable without running `meshq/__init__.py`, which would load what no shim needs."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    package = type(sys)("meshq")
    package.__path__ = [root]
    sys.modules["meshq"] = package


def serve(channel: int) -> None:
    """Fork shims until the agent is gone."""
    import select
    import signal

    wake, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    poll.register(wake, select.POLLIN)
    requests: dict[int, int] = {}
    while True:
        for descriptor, _ in poll.poll():
            if descriptor == wake:
                os.read(wake, 4096)
                _reap(channel, requests)
            elif packet := os.read(channel, REQUEST_BYTES_MAX):
                number, _, folder = packet.partition(b" ")
                if pid := _fork(channel, int(number), os.fsdecode(folder), (wake, writer)):
                    requests[pid] = int(number)
            else:
                return


def _fork(channel: int, request: int, folder: str, private: tuple[int, int]) -> int:
    """Fork a shim for this folder; 0 if that failed, which is told."""
    import signal

    from meshq import failpoints
    from meshq.exec import shim

    failpoints.reach("forking")
    try:
        pid = os.fork()
    except OSError as error:
        _tell(channel, request=request, pid=0, error=f"forking a shim: {error.strerror}")
        return 0
    if pid:
        return pid

    def say(task: int, error: str) -> None:
        _tell(channel, request=request, pid=task, error=error)
        os.close(channel)  # held open, it would hide the agent's end from the zygote's

    code = 1
    try:
        signal.set_wakeup_fd(-1)
        for descriptor in private:
            os.close(descriptor)
        shim.supervise(folder, say)
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def _reap(channel: int, requests: dict[int, int]) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        _tell(channel, request=requests.pop(pid, 0), ended=status)


def _tell(channel: int, **packet: int | str) -> None:
    import json

    with contextlib.suppress(OSError):  # the agent is gone; the folder says it all
        os.write(channel, json.dumps(packet).encode())


def main() -> None:
    _load_package()
    import ctypes
    import gc

    from meshq import failpoints
    from meshq.exec import shim

    shim.descendants(set(), [])  # all modules are loaded by now; no fork shall pay for an import
    ctypes.CDLL(None).prctl(15, b"meshq-zygote", 0, 0, 0)  # PR_SET_NAME
    gc.freeze()  # no collection touches, and thereby copies, the pages that the forks share
    channel = int(sys.argv[1])
    failpoints.arm(*sys.argv[2:] or ("", ""))
    os.set_inheritable(channel, False)  # it came through an exec; no task may have it
    serve(channel)


if __name__ == "__main__":
    main()
