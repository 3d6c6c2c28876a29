"""Environments are built by the real uv, once, clean, and for whoever asks for the same."""

import asyncio
import os
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from meshq.exec import environment as module
from meshq.exec.confine import landlock_abi
from meshq.exec.environment import EnvironmentCache, environment_key
from meshq.exec.interpreters import own_interpreter
from meshq.exec.preparation import PreparationFailed
from meshq.task import Environment
from tests.wheels import make_source_package, make_wheel, only_from


class Lab:
    """Wheels that are all there is, and as many agents on one folder of environments as a test wants."""

    def __init__(self, folder: Path) -> None:
        self.wheels = folder / "wheels"
        self.home = folder / "home"
        self.root = self.home / "environments"
        self.packages = self.home / "packages"
        make_wheel(self.wheels, "alpha", "1.0", requires=["beta"])
        make_wheel(self.wheels, "beta", "2.0")

    def run(self, scenario: Callable[[EnvironmentCache], Awaitable[None]]) -> None:
        async def main() -> None:
            cache = self.agent()
            try:
                await scenario(cache)
            finally:
                await cache.close()

        asyncio.run(main())

    def agent(self) -> EnvironmentCache:
        return EnvironmentCache(self.root, self.packages, hidden=self.home)


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    made = Lab(tmp_path)
    for name, value in only_from(made.wheels).items():
        monkeypatch.setenv(name, value)
    return made


def installed(python: str) -> list[str]:
    code = "import importlib.metadata as m; print(*sorted(d.metadata['Name'] + '==' + d.version for d in m.distributions()))"
    return said_by(python, code).split()


def said_by(python: str, code: str) -> str:
    return subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=True).stdout


def replace_by_dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/nowhere/python")


def forbid_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(asyncio, "create_subprocess_exec", fail)


ALPHA = Environment(lock="alpha==1.0\nbeta==2.0 ; python_version >= '3'\nnever==1 ; sys_platform == 'win32'\n")


def test_an_environment_has_what_the_lock_says_and_nothing_else(lab: Lab) -> None:
    async def scenario(cache: EnvironmentCache) -> None:
        python = await cache.ready(ALPHA)
        assert installed(python) == ["alpha==1.0", "beta==2.0"]
        assert "alpha==1.0" in cache.build_log(python).read_text()

    lab.run(scenario)


def test_a_second_task_gets_it_without_any_process(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(cache: EnvironmentCache) -> None:
        first = await cache.ready(ALPHA)
        await asyncio.gather(*cache._finishing)
        marker = Path(first).parent.parent / ".complete"
        os.utime(marker, (1, 1))
        forbid_processes(monkeypatch)
        same = Environment(lock="never==1 ; sys_platform == 'win32'\nbeta==2.0 ; python_version >= '3'\n\n# why\nalpha==1.0\n")
        assert await cache.ready(same) == first
        assert marker.stat().st_mtime > time.time() - 3600  # the time of last use
        other_agent = lab.agent()
        assert await other_agent.ready(ALPHA) == first

    lab.run(scenario)


def test_different_wishes_get_different_environments(lab: Lab) -> None:
    own = own_interpreter()
    wishes = [ALPHA, Environment(lock="alpha==1.0\n"), Environment(lock="beta==2.0\n"), Environment()]
    assert len({environment_key(wish, own) for wish in wishes}) == 4


def test_no_requirements_is_an_empty_environment_not_the_agents(lab: Lab) -> None:
    async def scenario(cache: EnvironmentCache) -> None:
        python = await cache.ready(Environment())
        assert installed(python) == []

    lab.run(scenario)


def test_a_task_that_writes_into_a_package_changes_no_other_environment(lab: Lab) -> None:
    async def scenario(cache: EnvironmentCache) -> None:
        first = await cache.ready(Environment(lock="beta==2.0\n"))
        [file] = Path(first).parent.parent.rglob("beta.py")
        file.write_text(file.read_text() + "VERSION = 'changed'\n")
        second = await cache.ready(ALPHA)
        assert said_by(second, "import beta; print(beta.VERSION)") == "2.0\n"

    lab.run(scenario)


def test_many_who_want_the_same_wait_for_one_build(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = count_commands(monkeypatch)

    async def scenario(cache: EnvironmentCache) -> None:
        agents = [cache, lab.agent(), lab.agent()]
        pythons = await asyncio.gather(*(agent.ready(ALPHA) for agent in agents for _ in range(4)))
        assert len(set(pythons)) == 1
        for agent in agents[1:]:
            await agent.close()

    lab.run(scenario)
    assert [command for command in commands if command in ("venv", "pip")] == ["venv", "pip"]


def count_commands(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    commands: list[str] = []
    start = asyncio.create_subprocess_exec

    async def noted(*words: str, **options: object) -> asyncio.subprocess.Process:
        commands.append(words[words.index("--") + 2])
        return await start(*words, **options)  # type: ignore[arg-type]  # passed on as they came

    monkeypatch.setattr(asyncio, "create_subprocess_exec", noted)
    return commands


def test_a_build_that_was_killed_is_wiped_and_done_again(lab: Lab) -> None:
    async def scenario(cache: EnvironmentCache) -> None:
        python = Path(await cache.ready(ALPHA))
        folder = python.parent.parent
        (folder / ".complete").unlink()
        [module_file] = folder.rglob("beta.py")
        module_file.unlink()
        again = lab.agent()
        assert await again.ready(ALPHA) == str(python)
        assert module_file.exists()
        await again.close()
        assert [path.name for path in lab.root.iterdir() if ".old-" in path.name] == []

    lab.run(scenario)


def test_what_was_not_yet_on_the_disk_counts_for_nothing_after_a_power_cut(lab: Lab) -> None:
    async def scenario(cache: EnvironmentCache) -> None:
        marker = Path(await cache.ready(ALPHA)).parent.parent / ".complete"
        await asyncio.gather(*cache._finishing)
        assert marker.read_text() == "durable"
        assert list(marker.parent.rglob("alpha.*.pyc"))
        marker.write_text("the boot before this one")
        stray = marker.parent / "stray"
        stray.touch()
        again = lab.agent()
        await again.ready(ALPHA)
        assert not stray.exists()
        await again.close()

    lab.run(scenario)


def test_an_environment_whose_interpreter_is_gone_is_built_again(lab: Lab) -> None:
    async def scenario(cache: EnvironmentCache) -> None:
        python = Path(await cache.ready(ALPHA))
        replace_by_dangling_link(python)
        assert await cache.ready(ALPHA) == str(python)
        assert installed(str(python)) == ["alpha==1.0", "beta==2.0"]

    lab.run(scenario)


def test_a_failure_says_what_uv_said_and_leaves_nothing_that_looks_ready(lab: Lab) -> None:
    async def scenario(cache: EnvironmentCache) -> None:
        wish = Environment(lock="not-there==1.0\n")
        for _ in range(2):
            with pytest.raises(PreparationFailed, match=r"building the environment failed: .*not-there") as caught:
                await cache.ready(wish)
            assert caught.value.retryable

    lab.run(scenario)
    assert list(lab.root.rglob(".complete")) == []


@pytest.mark.parametrize(
    "line",
    [
        "-r /etc/passwd", "-e /srv/tool", "./tool", "/srv/tool", "tool @ file:///srv/tool", "--find-links /srv",
        "-c /etc/passwd", "tool", "tool>=1", "tool @ git+file:///srv/tool", "tool @ ext::sh -c x",
        "--config-settings x", "tool==1 --global-option=x", "tool @ ${HOME}", "--index-url file:///srv",
    ],
)  # fmt: skip
def test_a_lock_that_names_more_than_packages_never_gets_to_uv(lab: Lab, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    forbid_processes(monkeypatch)

    async def scenario(cache: EnvironmentCache) -> None:
        with pytest.raises(PreparationFailed, match="is no pinned package") as caught:
            await cache.ready(Environment(lock=f"alpha==1.0\n{line}\n"))
        assert not caught.value.retryable

    lab.run(scenario)


@pytest.mark.skipif(landlock_abi() == 0, reason="this kernel has no Landlock")
def test_building_a_source_package_does_not_show_its_author_the_mesh(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.home.mkdir()
    (lab.home / "mesh.key").write_text("secret")
    make_source_package(lab.wheels, "nosy", f"print(open({str(lab.home / 'mesh.key')!r}).read())")
    make_source_package(lab.wheels, "vandal", f"open({str(lab.home / 'mesh.key')!r}, 'w')")
    make_source_package(lab.wheels, "honest", "import tempfile; tempfile.TemporaryFile()")

    async def scenario(cache: EnvironmentCache) -> None:
        for name in ("nosy", "vandal"):
            with pytest.raises(PreparationFailed, match="Permission denied"):
                await cache.ready(Environment(lock=f"{name}==1.0\n"))
        assert installed(await cache.ready(Environment(lock="honest==1.0\n"))) == ["honest==1.0"]

    lab.run(scenario)
    assert (lab.home / "mesh.key").read_text() == "secret"


def test_a_cancelled_build_ends_its_process_and_the_next_one_starts_clean(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tmp_path / "pid"
    os.mkfifo(pipe)
    hanging = tmp_path / "uv"
    hanging.write_text(f"#!/bin/sh\necho $$ > {pipe}\nsleep 1000\n")
    hanging.chmod(0o755)

    async def scenario(cache: EnvironmentCache) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(module, "uv_binary", lambda: str(hanging))
            build = asyncio.ensure_future(cache.ready(ALPHA))
            pid = int(await asyncio.to_thread(pipe.read_text))
            waiting = asyncio.ensure_future(cache.ready(ALPHA))
            await asyncio.sleep(0)
        build.cancel()
        with pytest.raises(asyncio.CancelledError):
            await build
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        assert installed(await waiting) == ["alpha==1.0", "beta==2.0"]

    lab.run(scenario)


def test_real_packages_are_installed_from_a_real_index(tmp_path: Path) -> None:
    lab = Lab(tmp_path)

    async def scenario(cache: EnvironmentCache) -> None:
        python = await cache.ready(Environment(lock="iniconfig==2.0.0\nsix==1.16.0\n"))
        assert installed(python) == ["iniconfig==2.0.0", "six==1.16.0"]

    lab.run(scenario)
