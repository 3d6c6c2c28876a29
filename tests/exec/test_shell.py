"""The shell of the worker: whole attempts with real processes, and agents that come and go meanwhile."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from meshq.config import Home
from meshq.exec.attempts import Attempts
from meshq.exec.preparation import PreparationFailed
from meshq.exec.shell import Callbacks, ExecShell
from meshq.exec.worker import WorkerConfig
from meshq.ids import Fence
from meshq.task import Claimed, EndKind, Environment, Needs, Outcome, Source
from tests.exec.bench import LIMIT_SECONDS, claimed, fence_of, line_of

FENCE = fence_of(1)
SLEEP = "import signal; print('ready', flush=True); signal.pause()"


class Agent:
    """One run of an agent, as far as exec sees it: it hears the callbacks and starts what is ready."""

    def __init__(self, home: Path) -> None:
        self.home = Home(home)
        self.heard: asyncio.Queue[tuple[str, Fence, Outcome | None]] = asyncio.Queue()
        self.sources: list[Claimed] = []
        self.source: Callable[[Claimed, Path], Coroutine[Any, Any, None]] = self._no_source
        self.python: Callable[[Environment], Coroutine[Any, Any, str]] = self._this_python

    async def _no_source(self, claim: Claimed, folder: Path) -> None:
        self.sources.append(claim)
        (folder / "data").write_text("source")

    async def _this_python(self, environment: Environment) -> str:
        return sys.executable

    async def __aenter__(self) -> "Agent":
        async def source(claim: Claimed, folder: Path) -> None:
            await self.source(claim, folder)

        async def python(environment: Environment) -> str:
            return await self.python(environment)

        self.shell = ExecShell(
            home=self.home,
            config=WorkerConfig(slots=1, cpus=4, memory_bytes=2**33),
            peer_name=lambda: "bora",
            source=source,
            environment=python,
            callbacks=Callbacks(
                on_ready=lambda fence: self.heard.put_nowait(("ready", fence, None)),
                on_slow=lambda fence: self.heard.put_nowait(("slow", fence, None)),
                on_ended=lambda fence, outcome: self.heard.put_nowait(("ended", fence, outcome)),
                on_capacity=lambda: None,
            ),
            with_probe=False,
        )
        self.found = await self.shell.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.shell.close()

    async def hear(self, word: str, fence: Fence = FENCE) -> Outcome | None:
        async with asyncio.timeout(LIMIT_SECONDS):
            heard, of, outcome = await self.heard.get()
        assert (heard, of) == (word, fence), outcome
        return outcome

    async def ended(self, fence: Fence = FENCE) -> Outcome:
        outcome = await self.hear("ended", fence)
        assert outcome is not None
        return outcome

    async def run(self, claim: Claimed) -> Outcome:
        self.shell.prepare(claim)
        await self.hear("ready", claim.fence)
        self.shell.start_attempt(claim.fence)
        return await self.ended(claim.fence)

    async def begin(self) -> int:
        """Start a program that sleeps, and wait until it does; the pid of its shim."""
        self.shell.prepare(python_claim(SLEEP))
        await self.hear("ready")
        self.shell.start_attempt(FENCE)
        await line_of(self.files.log(FENCE), "ready")
        pid = self.files.shim_pid(FENCE)
        assert pid is not None
        return pid

    @property
    def files(self) -> Attempts:
        return Attempts(self.home.attempts)


def python_claim(code: str, number: int = 1, **fields: Any) -> Claimed:
    return claimed(number, argv=(sys.executable, "-I", "-S", "-c", code), **fields)


def test_an_attempt_goes_from_its_claim_to_its_outputs(tmp_path: Path) -> None:
    code = (
        "import os\nprint(open('data').read(), os.environ['MESHQ_PEER'], flush=True)\n"
        "open(os.environ['MESHQ_OUTPUT_DIR'] + '/model', 'w').write('abc')\nraise SystemExit(4)"
    )

    async def story() -> None:
        async with Agent(tmp_path) as agent:
            assert agent.found == ()
            outcome = await agent.run(python_claim(code, source=Source(commit="0" * 40)))  # type: ignore[arg-type]  # an id
            assert (outcome.kind, outcome.exit_code, outcome.reason) == (EndKind.FAILED, 4, "exit code 4")
            assert [(file.path, file.bytes) for file in outcome.outputs] == [("model", 3)]
            assert outcome.outputs_total == 1
            assert agent.files.log(FENCE).read_text() == "source bora\n"
            assert agent.shell.free().slots == 1

    asyncio.run(story())


def test_a_python_task_runs_in_its_environment_and_an_empty_source_is_not_fetched(tmp_path: Path) -> None:
    claim = claimed(1, argv=("-c", "import sys; print(sys.executable)"))
    claim = replace(claim, spec=replace(claim.spec, environment=Environment()))

    async def story() -> None:
        async with Agent(tmp_path) as agent:
            assert (await agent.run(claim)).kind is EndKind.SUCCEEDED
            assert agent.files.log(FENCE).read_text().strip() == sys.executable
            assert agent.sources == []

    asyncio.run(story())


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (PreparationFailed("no index answers", True), EndKind.RELEASED),
        (PreparationFailed("the source is hostile", False), EndKind.FAILED),
        (OSError(28, "disk is full"), EndKind.RELEASED),
        (RuntimeError("a bug"), EndKind.RELEASED),
    ],
)
def test_a_failed_preparation_ends_the_attempt_and_frees_the_slot(tmp_path: Path, error: Exception, kind: EndKind) -> None:
    async def fail(claim: Claimed, folder: Path) -> None:
        raise error

    async def never(environment: Environment) -> str:
        await asyncio.get_running_loop().create_future()
        return ""

    async def story() -> None:
        async with Agent(tmp_path) as agent:
            agent.source, agent.python = fail, never
            agent.shell.prepare(python_claim("", source=Source(commit="0" * 40)))  # type: ignore[arg-type]  # an id
            outcome = await agent.ended()
            assert outcome.kind is kind
            assert str(error.args[-1] if isinstance(error, OSError) else error) in outcome.reason
            assert outcome.ended_at > 0
            assert agent.shell.free().slots == 1

    asyncio.run(story())


def test_a_slow_preparation_is_told_and_a_stop_ends_it_at_once(tmp_path: Path) -> None:
    cancelled = asyncio.Event()

    async def forever(claim: Claimed, folder: Path) -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            cancelled.set()

    async def story() -> None:
        async with Agent(tmp_path) as agent:
            agent.source = forever
            agent.shell.prepare(python_claim("", source=Source(commit="0" * 40)))  # type: ignore[arg-type]  # an id
            await agent.hear("slow")
            agent.shell.stop(FENCE, "cancelled")
            assert (await agent.ended()).kind is EndKind.CANCELLED
            async with asyncio.timeout(LIMIT_SECONDS):
                await cancelled.wait()

    asyncio.run(story())


def test_a_stop_right_after_the_claim_leaves_nothing_behind(tmp_path: Path) -> None:
    async def story() -> None:
        async with Agent(tmp_path) as agent:
            agent.shell.prepare(python_claim(""))
            agent.shell.stop(FENCE, "superseded")
            assert (await agent.ended()).kind is EndKind.SUPERSEDED
            assert (await agent.run(python_claim("", 2))).kind is EndKind.SUCCEEDED

    asyncio.run(story())


def test_a_running_attempt_is_stopped(tmp_path: Path) -> None:
    async def story() -> None:
        async with Agent(tmp_path) as agent:
            await agent.begin()
            agent.shell.stop(FENCE, "cancelled")
            outcome = await agent.ended()
            assert (outcome.kind, outcome.exit_code) == (EndKind.CANCELLED, 128 + signal.SIGTERM)

    asyncio.run(story())


def test_an_attempt_whose_shim_stands_still_is_stopped_all_the_same(tmp_path: Path) -> None:
    """Somebody's SIGSTOP (a debugger, a frozen job) must not make a cancel wait for ever, or let a leave end nothing."""

    async def story() -> None:
        async with Agent(tmp_path) as agent:
            pid = await agent.begin()
            os.kill(pid, signal.SIGSTOP)
            try:
                agent.shell.stop(FENCE, "cancelled")
                assert (await agent.ended()).kind is EndKind.CANCELLED
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    asyncio.run(story())


def test_a_stop_that_comes_while_the_shim_is_started_reaches_it(tmp_path: Path) -> None:
    async def story() -> None:
        async with Agent(tmp_path) as agent:
            agent.shell.prepare(python_claim(SLEEP))
            await agent.hear("ready")
            agent.shell.start_attempt(FENCE)
            agent.shell.stop(FENCE, "superseded")
            assert (await agent.ended()).kind is EndKind.SUPERSEDED

    asyncio.run(story())


def test_the_next_agent_adopts_what_runs_and_reports_what_ended(tmp_path: Path) -> None:
    code = (
        "import signal, sys\nsignal.signal(10, lambda *_: sys.exit(0)); print('ready', flush=True)\nwhile True: signal.pause()"
    )

    async def story() -> None:
        async with Agent(tmp_path) as first:
            first.shell.prepare(python_claim(code, needs=Needs(cpus=3)))
            await first.hear("ready")
            first.shell.start_attempt(FENCE)
            await line_of(first.files.log(FENCE), "ready")
        async with Agent(tmp_path) as second:
            assert second.found == (FENCE,)
            assert second.heard.empty()
            second.shell.adopt()
            assert second.shell.free().cpus == 1
            os.kill(int(_task_pid(second.files, FENCE)), 10)
            assert (await second.ended()).kind is EndKind.SUCCEEDED
        async with Agent(tmp_path) as third:
            assert third.found == (FENCE,), "nobody said that the end is in the ledger"
            third.shell.adopt()
            assert (await third.ended()).kind is EndKind.SUCCEEDED
            third.shell.reported(FENCE)
        async with Agent(tmp_path) as fourth:
            assert fourth.found == ()

    asyncio.run(story())


def _task_pid(files: Attempts, fence: Fence) -> int:
    import json

    return int(json.loads((files.folder(fence) / "run.json").read_text())["pid"])


def test_what_an_agent_had_only_prepared_is_released_by_the_next(tmp_path: Path) -> None:
    async def story() -> None:
        async with Agent(tmp_path) as first:
            first.shell.prepare(python_claim("print('user code')"))
            await first.hear("ready")
        async with Agent(tmp_path) as second:
            second.shell.adopt()
            assert (await second.ended()).kind is EndKind.RELEASED

    asyncio.run(story())


def test_a_killed_shim_is_a_lost_attempt(tmp_path: Path) -> None:
    async def story() -> None:
        async with Agent(tmp_path) as agent:
            pid = await agent.begin()
            os.kill(pid, signal.SIGKILL)
            assert (await agent.ended()).kind is EndKind.LOST

    asyncio.run(story())
