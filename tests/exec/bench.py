"""What the tests of attempts build on: claims, launches, and a bench that runs real ones without a mesh."""

import asyncio
import os
import select
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meshq.exec import logs, shim
from meshq.exec.attempts import Attempts
from meshq.exec.launcher import Zygote
from meshq.exec.worker import Exited, Vanished
from meshq.ids import ActorId, Dot, Fence, PeerId, TaskId, base32, fence
from meshq.task import Claimed, Environment, Needs, TaskSpec

LIMIT_SECONDS = 30.0  # for anything that should take milliseconds: a busy machine is no failure
PYTHON = (sys.executable, "-I", "-S", "-c")


# Fences are unique for ever, and a shim kills all that carries its own: tests that run side by side must differ in them.
ACTOR = ActorId(base32(os.urandom(20))[:26] + ".1")


def fence_of(number: int) -> Fence:
    return fence(1, Dot(ACTOR, number))


def claimed(number: int = 1, *, argv: tuple[str, ...] = ("true",), needs: Needs | None = None, **fields: Any) -> Claimed:
    spec = TaskSpec(
        name=f"task-{number}", argv=argv, submitted_by="ada@a", submitted_at=0.0, submitted_peer=PeerId("a" * 52),
        needs=needs or Needs(), environment=Environment(needs_python=False), **fields,
    )  # fmt: skip
    return Claimed(task=TaskId("a" * 15 + "abcdefghijklmnop"[number % 16]), fence=fence_of(number), attempt=1, spec=spec)


def wait_gone(pid: int) -> None:
    """Until this process has ended (it may be nobody's zombie)."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        poller = select.poll()
        poller.register(handle, select.POLLIN)
        assert poller.poll(LIMIT_SECONDS * 1000), f"process {pid} still runs"
    finally:
        os.close(handle)


class Bench:
    """Prepares and runs attempts below one home, as the agent would, on the loop of the test."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.attempts = Attempts(home / "attempts")
        self.zygote = Zygote()

    async def __aenter__(self) -> "Bench":
        await self.zygote.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.zygote.close()

    def prepare(
        self,
        number: int,
        code: str = "",
        *,
        argv: tuple[str, ...] = (),
        env: Mapping[str, str] | None = None,
        time_limit: float | None = None,
        grace: float = 10.0,
        log_bytes_max: int = 2**26,
        log_head_bytes: int = 2**23,
        rules: tuple[tuple[str, str], ...] = (("/", "write"),),
        limits: tuple[tuple[int, int], ...] = (),
        until_valid: bool = False,
    ) -> Fence:
        """The folder of an attempt that runs this Python code (or this command)."""
        claim = claimed(number)
        self.attempts.create(claim)
        self.attempts.write_launch(
            shim.Launch(
                fence=claim.fence,
                argv=argv or (*PYTHON, code),
                env={"MESHQ_FENCE": claim.fence, "PATH": os.environ["PATH"]} | dict(env or {}),
                cwd=str(self.attempts.work(claim.fence)),
                gpus=(),
                time_limit=time_limit,
                grace=grace,
                log_bytes_max=log_bytes_max,
                log_head_bytes=log_head_bytes,
                rules=rules,
                limits=limits,
                until_valid=until_valid,
            )
        )
        return claim.fence

    async def spawn(self, fence: Fence) -> int:
        async with asyncio.timeout(LIMIT_SECONDS):
            return await self.zygote.spawn(self.attempts.folder(fence))

    async def end(self, fence: Fence) -> Exited | Vanished:
        async with asyncio.timeout(LIMIT_SECONDS):
            return await self.attempts.watch(fence)

    async def run(self, fence: Fence) -> Exited:
        await self.spawn(fence)
        ended = await self.end(fence)
        assert isinstance(ended, Exited)
        return ended

    def log(self, fence: Fence) -> str:
        return self.attempts.log(fence).read_text()

    async def line(self, fence: Fence, beginning: str) -> str:
        """The rest of the first line of the log that begins like this, as soon as it is whole."""
        return await line_of(self.attempts.log(fence), beginning)


async def line_of(path: Path, beginning: str) -> str:
    text = ""
    async with asyncio.timeout(LIMIT_SECONDS):
        async for chunk in logs.follow(path, 0, lambda: False):
            text += chunk.data.decode()
            for line in text.splitlines(keepends=True):
                if line.startswith(beginning) and line.endswith("\n"):
                    return line[len(beginning) :].strip()
    raise AssertionError("the log ended without that line")
