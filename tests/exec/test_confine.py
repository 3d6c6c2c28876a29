"""Landlock hides the mesh's files from a task and leaves it everything else. With real tasks; root is confined too."""

import asyncio
import os
import shutil
import sys
from pathlib import Path

import pytest

from meshq.exec import confine
from tests.exec.bench import Bench, fence_of

pytestmark = pytest.mark.skipif(confine.landlock_abi() == 0, reason="this kernel has no Landlock, or only its first version")

TRY = """
import os, sys
def attempt(name, action):
    try:
        action()
        print(name, "allowed", flush=True)
    except OSError as error:
        print(name, type(error).__name__, flush=True)
"""


class Lab:
    """A home with secrets, a folder of the user beside it, and one attempt."""

    def __init__(self, tmp_path: Path) -> None:
        self.above = tmp_path / "user"
        self.home = self.above / "meshq"
        self.secret = self.home / "trust" / "mesh.key"
        self.beside = self.above / "project"
        self.environment = self.home / "environments" / "e1"
        for folder in (self.secret.parent, self.beside, self.environment):
            folder.mkdir(parents=True)
        self.secret.write_text("SECRET")
        (self.beside / "data").write_text("data")
        (self.environment / "module").write_text("module")

    def run(self, code: str = "", *, argv: tuple[str, ...] = ()) -> list[str]:
        """The lines of the log of a confined task."""

        async def story() -> list[str]:
            async with Bench(self.home) as bench:
                fence, files = fence_of(1), bench.attempts
                own = (files.work(fence), files.outputs(fence), files.tmp(fence), files.log(fence))
                rules = confine.landlock_rules(str(self.home), [str(self.environment)], map(str, own))
                env = {"TMPDIR": str(files.tmp(fence)), "HOME": str(files.tmp(fence)), "OUT": str(files.outputs(fence))}
                env |= {"PYTHON": sys.executable}
                bench.prepare(1, TRY + code, argv=argv, rules=tuple(rules), env=env)
                await bench.run(fence)
                return bench.log(fence).splitlines()

        return asyncio.run(story())


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


def test_a_task_can_neither_read_nor_change_what_belongs_to_the_mesh(lab: Lab) -> None:
    key, folder = str(lab.secret), str(lab.secret.parent)
    linked = str(lab.beside / "link")
    os.symlink(key, linked)
    log = lab.run(f"""
attempt("read", lambda: open({key!r}).read())
attempt("read by a link", lambda: open({linked!r}).read())
attempt("write", lambda: open({key!r}, "a"))
attempt("truncate", lambda: os.truncate({key!r}, 0))
attempt("remove", lambda: os.unlink({key!r}))
attempt("rename", lambda: os.rename({key!r}, {key!r} + "2"))
attempt("replace", lambda: os.symlink("/etc/passwd", {folder!r} + "/new"))
attempt("make a file", lambda: os.mknod({folder!r} + "/new"))
attempt("make a folder", lambda: os.mkdir({folder!r} + "/new"))
attempt("hard link", lambda: os.link({key!r}, os.environ["TMPDIR"] + "/key"))
attempt("write the environment", lambda: open({str(lab.environment / "module")!r}, "w"))
attempt("rewrite its own launch", lambda: open("../launch.json", "w"))
""")
    assert [line.rsplit(" ", 1)[1] for line in log] == ["PermissionError"] * 9 + ["OSError"] + ["PermissionError"] * 2
    assert lab.secret.read_text() == "SECRET"


def test_a_task_keeps_its_own_folders_its_environment_and_the_rest_of_the_machine(lab: Lab) -> None:
    beside = str(lab.beside)
    log = lab.run(f"""
import subprocess
attempt("work", lambda: open("file", "w"))
attempt("outputs", lambda: open(os.environ["OUT"] + "/file", "w"))
attempt("tmp", lambda: open(os.environ["TMPDIR"] + "/file", "w"))
attempt("environment", lambda: open({str(lab.environment / "module")!r}).read())
attempt("a project", lambda: open({beside!r} + "/data", "r+"))
attempt("a new file there", lambda: open({beside!r} + "/new", "w"))
attempt("a new folder there", lambda: os.makedirs({beside!r} + "/a/b"))
attempt("rename across folders", lambda: os.rename("file", {beside!r} + "/a/b/file"))
attempt("remove", lambda: os.unlink({beside!r} + "/data"))
attempt("list above", lambda: os.listdir({str(lab.above)!r}))
attempt("null", lambda: open("/dev/null", "w"))
attempt("shared memory", lambda: open("/dev/shm/meshq-test-" + str(os.getpid()), "w"))
attempt("shared memory removed", lambda: os.unlink("/dev/shm/meshq-test-" + str(os.getpid())))
attempt("proc", lambda: open("/proc/self/environ").read())
attempt("a library", lambda: open(os.__file__).read())
attempt("a process", lambda: subprocess.run(["sh", "-c", ":"], check=True))
attempt("stdout", lambda: open("/dev/stdout", "a"))
""")
    assert [line for line in log if not line.endswith(" allowed")] == []
    assert len(log) == 17


def test_directly_in_a_folder_above_the_home_nothing_new_can_be_made(lab: Lab) -> None:
    """The documented limit: if this ever passes differently, `confine` must say so."""
    log = lab.run(f"""
attempt("folder", lambda: os.mkdir({str(lab.above)!r} + "/new"))
attempt("file", lambda: open({str(lab.above)!r} + "/new", "w"))
""")
    assert log == ["folder PermissionError", "file PermissionError"]


def test_a_task_reaches_neither_the_memory_nor_the_environment_of_the_agent(lab: Lab) -> None:
    log = lab.run(f"""
attempt("mem", lambda: open("/proc/{os.getpid()}/mem", "rb"))
attempt("root", lambda: os.stat("/proc/{os.getpid()}/root/etc"))
attempt("environ", lambda: open("/proc/{os.getpid()}/environ", "rb").read())
""")
    assert log[:2] == ["mem PermissionError", "root PermissionError"]
    if os.geteuid() != 0:  # a documented limit of `confine` for tasks of root
        assert log[2] == "environ PermissionError"


@pytest.mark.skipif(confine.landlock_abi() < 6, reason="Landlock keeps signals from ABI 6 (Linux 6.12) on")
def test_a_task_can_signal_its_children_but_neither_the_agent_nor_its_shim(lab: Lab) -> None:
    log = lab.run(f"""
import subprocess
child = subprocess.Popen(["sleep", "1000"])
attempt("agent", lambda: os.kill({os.getpid()}, 0))
attempt("shim", lambda: os.kill(os.getppid(), 0))
attempt("child", lambda: child.kill())
child.wait()
""")
    assert log == ["agent PermissionError", "shim PermissionError", "child allowed"]


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_git_works_in_a_confined_task(lab: Lab) -> None:
    script = (
        "set -e; git init -q . ; echo a > a; git add a; git -c user.name=a -c user.email=a@a commit -qm a;"
        " git gc -q; git log --format=%s"
    )
    assert lab.run(argv=("sh", "-c", script)) == ["a"]


def test_the_rules_leave_out_only_what_leads_to_the_home(tmp_path: Path) -> None:
    for name in ("a/home/trust", "a/x", "b"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a" / "home")
    rules = confine.landlock_rules(str(tmp_path / "a" / "home"), [], [])
    paths = [path for path, _ in rules]
    assert str(tmp_path / "a" / "x") in paths
    assert str(tmp_path / "b") in paths
    assert not any(
        str(tmp_path / "a" / "home").startswith(path + "/") or path.startswith(str(tmp_path / "a" / "home")) for path in paths
    )
    assert str(tmp_path / "link") not in paths


def test_a_home_behind_a_link_is_hidden_where_it_really_is(tmp_path: Path) -> None:
    real = tmp_path / "real" / "home"
    real.mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert confine.landlock_rules(str(tmp_path / "link" / "home"), [], []) == confine.landlock_rules(str(real), [], [])
