"""The agent's side of the zygote: start it, ask it for shims, start it again if it died.

A request is the path of an attempt's folder, the answer the pid of the task. An answer that is lost with the zygote is no
harm: the request is repeated to a new one, and a shim refuses a folder that was started before, so nothing runs twice; what the
first one did stands in the folder.
"""

import asyncio
import json
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from meshq import failpoints
from meshq.errors import TaskFailed
from meshq.exec import zygote

log = logging.getLogger("meshq.exec")

CLOSE_SECONDS: Final = 5.0  # a zygote that got its end of file exits in milliseconds
PACKET_BYTES_MAX: Final = 16_384
ENVIRONMENT: Final = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"}  # nothing of the agent's gets into a shim


class SpawnFailed(TaskFailed):
    """No shim took this attempt. State: look into the folder; unless an earlier shim started it, no user code ran."""


class _ZygoteDied(Exception):
    """The connection ended before the answer came."""


class Zygote:
    """One zygote at a time, on one event loop."""

    def __init__(self) -> None:
        self._channel: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._requests = 0
        self._waiting: dict[int, asyncio.Future[int]] = {}
        self._starting = asyncio.Lock()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None and self._channel is not None else None

    async def start(self) -> None:
        """Have a zygote running. SpawnFailed if it can't be started."""
        async with self._starting:
            if self._channel is not None:
                return
            await self._reap()
            mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            mine.setblocking(False)
            try:
                self._process = await asyncio.to_thread(_start, theirs.fileno())
            except OSError as error:
                mine.close()
                raise SpawnFailed(f"starting the zygote with {sys.executable}: {error}") from None
            finally:
                theirs.close()
            self._channel = mine
            asyncio.get_running_loop().add_reader(mine, self._read)

    async def spawn(self, folder: Path) -> int:
        """Start the shim of this attempt; the answer is the pid of the task, which runs. SpawnFailed otherwise."""
        for _ in range(2):
            await self.start()
            try:
                return await self._request(str(folder))
            except _ZygoteDied:
                log.warning("the zygote died; starting another one")
        raise SpawnFailed("the zygote died twice in a row while starting a shim")

    async def close(self) -> None:
        """Let the zygote go. Shims and tasks go on."""
        self._hang_up()
        await self._reap()

    async def _request(self, folder: str) -> int:
        channel = self._channel
        assert channel is not None
        self._requests += 1
        number = self._requests
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            await asyncio.get_running_loop().sock_sendall(channel, b"%d %s" % (number, os.fsencode(folder)))
            return await answer
        except OSError:
            self._hang_up()
            raise _ZygoteDied from None
        finally:
            self._waiting.pop(number, None)

    def _read(self) -> None:
        assert self._channel is not None
        try:
            packet = self._channel.recv(PACKET_BYTES_MAX)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        if packet:
            self._handle(json.loads(packet))
        else:
            self._hang_up()

    def _handle(self, packet: dict[str, Any]) -> None:
        answer = self._waiting.get(packet["request"])
        if answer is None or answer.done():
            return
        if "ended" in packet:
            answer.set_exception(SpawnFailed(f"the shim died while it started (wait status {packet['ended']})"))
        elif packet["pid"]:
            answer.set_result(int(packet["pid"]))
        else:
            answer.set_exception(SpawnFailed(str(packet["error"])))

    def _hang_up(self) -> None:
        if self._channel is None:
            return
        asyncio.get_running_loop().remove_reader(self._channel)
        self._channel.close()
        self._channel = None
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(_ZygoteDied())

    async def _reap(self) -> None:
        if self._process is not None:
            await asyncio.to_thread(_wait, self._process)
            self._process = None


def _start(descriptor: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-I", "-S", os.path.abspath(zygote.__file__), str(descriptor), *failpoints.hand_down()],
        pass_fds=(descriptor,),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        cwd="/",
        env=ENVIRONMENT,
        start_new_session=True,  # Ctrl-C in the agent's terminal is for the agent
    )


def _wait(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(CLOSE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
