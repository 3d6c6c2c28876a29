"""The shim and the zygote, with real processes: what runs, runs once, ends in time, and its story is in the folder."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from meshq.exec import logs, shim
from meshq.exec.attempts import Alive, Attempts, Unstarted
from meshq.exec.launcher import SpawnFailed, Zygote
from meshq.exec.worker import Exited, Vanished
from tests.exec.bench import LIMIT_SECONDS, Bench, line_of, wait_gone

ROOT = Path(__file__).parent.parent.parent

SLEEP = "import signal; print('ready', flush=True); signal.pause()"
DEAF = "import signal; signal.signal(15, signal.SIG_IGN); print('ready', flush=True)\nwhile True: signal.pause()"
DAEMON = """
import os, sys
reader, writer = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork():
        os._exit(0)
    os.write(writer, str(os.getpid()).encode())
    os.set_inheritable(writer, False)
    os.execve({sleep!r}, ["sleep", "1000"], {env})
os.wait()
os.close(writer)
pid = b""
while part := os.read(reader, 100):  # ends when the daemon has become `sleep`
    pid += part
print("daemon", pid.decode(), flush=True)
"""


def daemon_code(env: str) -> str:
    """Leaves a process behind that forked twice, has its own session and this environment."""
    return DAEMON.format(sleep=subprocess.check_output(["which", "sleep"], text=True).strip(), env=env)


@pytest.mark.parametrize(("code", "exit_code"), [("", 0), ("raise SystemExit(3)", 3), ("1/0", 1)])
def test_the_exit_code_of_the_task_is_recorded(tmp_path: Path, code: str, exit_code: int) -> None:
    async def story() -> None:
        async with Bench(tmp_path) as bench:
            ended = await bench.run(bench.prepare(1, code))
            assert (ended.exit_code, ended.signal, ended.stopped, ended.timed_out) == (exit_code, 0, "", False)
            assert 0 < ended.started_at <= ended.ended_at

    asyncio.run(story())


def test_a_task_that_a_signal_killed_has_128_and_the_signal(tmp_path: Path) -> None:
    async def story() -> None:
        async with Bench(tmp_path) as bench:
            ended = await bench.run(bench.prepare(1, "import os, signal; os.kill(os.getpid(), signal.SIGUSR1)"))
            assert (ended.exit_code, ended.signal) == (128 + signal.SIGUSR1, signal.SIGUSR1)

    asyncio.run(story())


def test_a_program_that_is_missing_is_127_and_the_log_says_so(tmp_path: Path) -> None:
    async def story() -> None:
        async with Bench(tmp_path) as bench:
            fence = bench.prepare(1, argv=("no-such-program", "x"))
            assert (await bench.run(fence)).exit_code == 127
            assert "cannot start 'no-such-program'" in bench.log(fence)

    asyncio.run(story())


def test_both_streams_are_in_the_log_in_their_order(tmp_path: Path) -> None:
    async def story() -> None:
        async with Bench(tmp_path) as bench:
            fence = bench.prepare(1, "import os\nfor i in range(4): os.write(1 + i % 2, b'%d\\n' % i)")
            await bench.run(fence)
            assert bench.log(fence) == "0\n1\n2\n3\n"

    asyncio.run(story())


def test_a_task_gets_its_own_session_a_clean_environment_no_input_and_default_signals(tmp_path: Path) -> None:
    code = (
        "import os, sys, signal\n"
        "print(os.getsid(0) == os.getpid(), sorted(os.environ), repr(sys.stdin.read()), sorted(os.listdir('/proc/self/fd')),"
        " hex(int(open('/proc/self/status').read().split('SigIgn:')[1].split()[0], 16) & ~(3 << 31)), oct(os.umask(0)))"
    )

    async def story() -> None:
        async with Bench(tmp_path) as bench:
            fence = bench.prepare(1, "", argv=(sys.executable, "-I", "-S", "-c", "import signal; " + code))
            await bench.run(fence)
            # Python itself ignores SIGPIPE (13) and SIGXFSZ (25); nothing else may be ignored. 3 is the listing's own.
            # 32 and 33 are the C library's own, inherited from whoever runs the tests: no program can set them.
            ignored = hex(1 << 12 | 1 << 24)
            environment = sorted({"MESHQ_FENCE", "PATH", "LC_CTYPE"})
            assert bench.log(fence).strip() in (
                f"True {environment} '' ['0', '1', '2', '3'] {ignored} 0o22",
                f"True {[each for each in environment if each != 'LC_CTYPE']} '' ['0', '1', '2', '3'] {ignored} 0o22",
            )

    asyncio.run(story())


def test_limits_of_the_launch_hold_in_the_task(tmp_path: Path) -> None:
    import resource

    async def story() -> None:
        async with Bench(tmp_path) as bench:
            code = "import resource; print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
            fence = bench.prepare(1, code, limits=((resource.RLIMIT_NOFILE, 123),))
            await bench.run(fence)
            assert bench.log(fence) == "123\n"

    asyncio.run(story())


def test_the_time_limit_ends_a_task_that_ignores_sigterm(tmp_path: Path) -> None:
    async def story() -> None:
        async with Bench(tmp_path) as bench:
            ended = await bench.run(bench.prepare(1, DEAF, time_limit=0.5, grace=0.1))
            assert (ended.timed_out, ended.exit_code, ended.stopped) == (True, 137, "")

    asyncio.run(story())


def test_stop_lets_the_task_end_well_and_the_reason_is_recorded(tmp_path: Path) -> None:
    code = (
        "import signal, sys\nsignal.signal(15, lambda *_: sys.exit(5)); print('ready', flush=True)\nwhile True: signal.pause()"
    )

    async def story() -> None:
        async with Bench(tmp_path) as bench:
            fence = bench.prepare(1, code)
            await bench.spawn(fence)
            await bench.line(fence, "ready")
            assert bench.attempts.signal(fence, b"stop superseded")
            ended = await bench.end(fence)
            assert isinstance(ended, Exited)
            assert (ended.exit_code, ended.stopped) == (5, "superseded")
            assert not bench.attempts.signal(fence, b"stop cancelled"), "nobody listens any more"

    asyncio.run(story())


def test_stop_reaches_what_a_shell_script_runs(tmp_path: Path) -> None:
    async def story() -> None:
        async with Bench(tmp_path) as bench:
            script = f'{sys.executable} -I -S -c "$CODE"; echo after'
            fence = bench.prepare(1, argv=("sh", "-c", script), env={"CODE": SLEEP})
            await bench.spawn(fence)
            await bench.line(fence, "ready")
            bench.attempts.signal(fence, b"stop cancelled")
            ended = await bench.end(fence)
            assert isinstance(ended, Exited)
            assert ended.signal == signal.SIGTERM
            assert "after" not in bench.log(fence)

    asyncio.run(story())


def test_kill_does_not_wait_for_the_grace(tmp_path: Path) -> None:
    async def story() -> None:
        async with Bench(tmp_path) as bench:
            fence = bench.prepare(1, DEAF, grace=10_000.0)
            await bench.spawn(fence)
            await bench.line(fence, "ready")
            bench.attempts.signal(fence, b"kill")
            ended = await bench.end(fence)
            assert isinstance(ended, Exited)
            assert (ended.signal, ended.stopped) == (signal.SIGKILL, "cancelled")

    asyncio.run(story())


@pytest.mark.parametrize("env", ["{}", "os.environ"], ids=["without the fence", "with the fence"])
def test_daemons_that_a_task_leaves_behind_are_killed(tmp_path: Path, env: str) -> None:
    async def story() -> None:
        async with Bench(tmp_path) as bench:
            fence = bench.prepare(1, daemon_code(env))
            assert (await bench.run(fence)).exit_code == 0
            wait_gone(int(await bench.line(fence, "daemon ")))

    asyncio.run(story())


def test_a_killed_shim_takes_its_task_along_and_its_attempt_has_vanished(tmp_path: Path) -> None:
    async def story() -> None:
        async with Bench(tmp_path) as bench:
            fence = bench.prepare(1, daemon_code("os.environ") + SLEEP)
            task = await bench.spawn(fence)
            daemon = int(await bench.line(fence, "daemon "))
            alive = bench.attempts.inspect(fence)
            assert isinstance(alive, Alive)
            os.kill(alive.shim, signal.SIGKILL)
            assert await bench.end(fence) == Vanished()
            wait_gone(task)
            wait_gone(daemon)
            assert bench.attempts.inspect(fence) == Vanished()

    asyncio.run(story())


def test_sigterm_to_the_shim_is_told_apart_from_a_stop_of_ours(tmp_path: Path) -> None:
    async def story() -> None:
        async with Bench(tmp_path) as bench:
            fence = bench.prepare(1, SLEEP)
            await bench.spawn(fence)
            alive = bench.attempts.inspect(fence)
            assert isinstance(alive, Alive)
            os.kill(alive.shim, signal.SIGTERM)
            ended = await bench.end(fence)
            assert isinstance(ended, Exited)
            assert ended.stopped == "terminated"

    asyncio.run(story())


def test_an_attempt_never_starts_twice(tmp_path: Path) -> None:
    async def story() -> None:
        async with Bench(tmp_path) as bench:
            fence = bench.prepare(1, "print('user code')")
            await bench.run(fence)
            (bench.attempts.folder(fence) / shim.EXIT).unlink()
            with pytest.raises(SpawnFailed, match="started before"):
                await bench.spawn(fence)
            assert bench.log(fence) == "user code\n"

    asyncio.run(story())


def test_of_two_zygotes_that_are_asked_for_one_attempt_exactly_one_starts_it(tmp_path: Path) -> None:
    async def story() -> None:
        async with Bench(tmp_path) as bench:
            rival = Zygote()
            for number in range(1, 11):
                fence = bench.prepare(number, "print('user code')")
                folder = bench.attempts.folder(fence)
                answers = await asyncio.gather(bench.spawn(fence), rival.spawn(folder), return_exceptions=True)
                assert [type(each) for each in answers if not isinstance(each, int)] == [SpawnFailed]
                await bench.end(fence)
                assert bench.log(fence) == "user code\n"
            await rival.close()

    asyncio.run(story())


def test_what_was_found_unstarted_can_never_start_any_more(tmp_path: Path) -> None:
    async def story() -> None:
        async with Bench(tmp_path) as bench:
            fence = bench.prepare(1, "print('user code')")
            assert bench.attempts.inspect(fence) == Unstarted()
            with pytest.raises(SpawnFailed):
                await bench.spawn(fence)
            assert bench.log(fence) == ""
            assert bench.attempts.inspect(fence) == Unstarted()

    asyncio.run(story())


def test_an_unreadable_launch_is_refused_and_nothing_was_started(tmp_path: Path) -> None:
    async def story() -> None:
        async with Bench(tmp_path) as bench:
            fence = bench.prepare(1, "print('user code')")
            (bench.attempts.folder(fence) / shim.LAUNCH).write_text('{"fence": "x"}')
            with pytest.raises(SpawnFailed, match="argv"):
                await bench.spawn(fence)
            assert bench.attempts.inspect(fence) == Unstarted()

    asyncio.run(story())


def test_a_killed_zygote_is_replaced_and_its_shims_live_on(tmp_path: Path) -> None:
    async def story() -> None:
        async with Bench(tmp_path) as bench:
            first = bench.prepare(1, SLEEP)
            await bench.spawn(first)
            zygote = bench.zygote.pid
            assert zygote is not None
            os.kill(zygote, signal.SIGKILL)
            second = bench.prepare(2, "print('user code')")
            await bench.run(second)
            assert bench.zygote.pid != zygote
            assert isinstance(bench.attempts.inspect(first), Alive)
            bench.attempts.signal(first, b"kill")
            assert isinstance(await bench.end(first), Exited)

    asyncio.run(story())


AGENT = """
import asyncio, pathlib, sys
from tests.exec.bench import Bench

async def agent():
    async with Bench(pathlib.Path(sys.argv[1])) as bench:
        fence = bench.prepare(1, sys.argv[2])
        await bench.spawn(fence)
        print("zygote", bench.zygote.pid, flush=True)
        await asyncio.Event().wait()

asyncio.run(agent())
"""


def test_a_killed_agent_does_not_hurt_the_task_and_another_agent_adopts_it(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\nsignal.signal(10, lambda *_: sys.exit(7))\n"
        "print('pid', os.getpid(), flush=True)\nwhile True: signal.pause()"
    )
    agent = subprocess.Popen(
        [sys.executable, "-c", AGENT, str(tmp_path), code], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert agent.stdout is not None
    zygote = int(agent.stdout.readline().split()[1])
    attempts = Attempts(tmp_path / "attempts")
    [found] = attempts.scan()
    os.killpg(agent.pid, signal.SIGKILL)
    agent.wait()
    agent.stdout.close()
    wait_gone(zygote)

    async def adopt() -> None:
        fence = found.claimed.fence
        pid = int(await line_of(attempts.log(fence), "pid "))
        assert [each.state for each in attempts.scan()] == [found.state]
        assert isinstance(found.state, Alive)
        watching = asyncio.ensure_future(attempts.watch(fence))
        os.kill(pid, 10)
        async with asyncio.timeout(LIMIT_SECONDS):
            ended = await watching
        assert isinstance(ended, Exited)
        assert ended.exit_code == 7

    asyncio.run(adopt())


def test_an_agent_that_looks_while_the_request_of_another_is_under_way_decides_it_or_finds_it_decided(tmp_path: Path) -> None:
    """As after the death of an agent whose zygote still has a request: O_EXCL lets exactly one of the two win."""

    async def story() -> None:
        async with Bench(tmp_path) as bench:
            for number in range(1, 13):
                fence = bench.prepare(number, "print('user code', flush=True)")
                spawning = asyncio.ensure_future(bench.spawn(fence))
                await asyncio.sleep(0)  # the request is sent, no answer was read
                state = Attempts(tmp_path / "attempts").inspect(fence)
                [answer] = await asyncio.gather(spawning, return_exceptions=True)
                assert isinstance(answer, SpawnFailed if state == Unstarted() else int)
                await bench.end(fence)
                assert bench.log(fence) == ("" if state == Unstarted() else "user code\n")

    asyncio.run(story())


def test_a_log_that_grew_too_long_keeps_its_head_and_its_tail(tmp_path: Path) -> None:
    line = 64
    code = f"import sys\nfor i in range(65536): sys.stdout.write(str(i).zfill({line - 1}) + '\\n')"

    async def story() -> None:
        async with Bench(tmp_path) as bench:
            fence = bench.prepare(1, code, log_bytes_max=2**20, log_head_bytes=2**18)
            await bench.run(fence)
            path = bench.attempts.log(fence)
            shown = [chunk async for chunk in logs.follow(path, 0, lambda: True)]
            assert path.stat().st_size == 65536 * line
            assert path.stat().st_blocks * 512 <= 2**20 + 2**17
            [at] = [at for at in range(1, len(shown)) if shown[at].offset > shown[at - 1].end]
            assert shown[0].data.startswith(b"0" * 63 + b"\n") and shown[at - 1].end == 2**18
            assert shown[-1].data.endswith(b"65535".zfill(63) + b"\n") and shown[-1].end == 65536 * line

    asyncio.run(story())


def test_a_full_disk_does_not_lose_the_exit_code(tmp_path: Path) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a small file system needs root")
    code = (
        "import os\nfile = os.open('../outputs/big', os.O_WRONLY | os.O_CREAT)\n"
        "try:\n    while True: os.write(file, bytes(4096))\nexcept OSError as error: raise SystemExit(error.errno)"
    )

    async def story() -> None:
        async with Bench(tmp_path) as bench:
            ended = await bench.run(bench.prepare(1, code))
            assert ended.exit_code == 28  # ENOSPC: the disk was full indeed

    try:
        asyncio.run(story())
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
