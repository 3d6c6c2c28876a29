"""Which files a submit takes, where the task starts, and what is sent the second time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from meshq.errors import UsageError
from meshq.exec.objects import ObjectStore
from meshq.submit.hashes import read_file
from meshq.submit.snapshot import Limits, snapshot
from tests.submit.repositories import commit_all, repository, write
from tests.submit.test_listing import paths_in


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_a_script_alone_goes_alone(tmp_path: Path, cache: Path) -> None:
    write(tmp_path / "plain" / "train.py", "import json\n")
    write(tmp_path / "plain" / "holiday.jpg", "1")
    taken = snapshot(Path("plain/train.py"), None, cwd=tmp_path, cache=cache)
    assert (taken.folder, taken.script, taken.files, paths_in(taken)) == ("", "train.py", 1, {b"train.py"})


def test_a_script_that_imports_from_its_folder_brings_the_folder(tmp_path: Path, cache: Path) -> None:
    write(tmp_path / "train.py", "from model.net import Net\n")
    write(tmp_path / "model" / "net.py", "")
    write(tmp_path / "config.yaml", "")
    taken = snapshot(Path("train.py"), None, cwd=tmp_path, cache=cache)
    assert paths_in(taken) == {b"train.py", b"model/net.py", b"config.yaml"}


def test_a_home_folder_is_never_taken_only_what_the_script_imports(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "train.py", "def f():\n    import helper\n")
    write(tmp_path / "helper.py", "import deeper\n")
    write(tmp_path / "deeper.py", "")
    write(tmp_path / "private.txt", "")
    taken = snapshot(Path("train.py"), None, cwd=tmp_path, cache=cache)
    assert paths_in(taken) == {b"train.py", b"helper.py", b"deeper.py"}


def test_a_script_in_a_repository_starts_where_it_was_submitted(tmp_path: Path, cache: Path) -> None:
    top = repository(tmp_path / "work")
    write(top / "experiments" / "deep" / "train.py")
    write(top / "other.py")

    def places(typed: str, cwd: Path) -> tuple[str, str]:
        taken = snapshot(Path(typed), None, cwd=cwd, cache=cache)
        assert paths_in(taken) == {b"experiments/deep/train.py", b"other.py"}
        return taken.folder, taken.script

    assert places("experiments/deep/train.py", top) == ("", "experiments/deep/train.py")
    assert places("deep/train.py", top / "experiments") == ("experiments", "deep/train.py")
    assert places("work/experiments/deep/train.py", tmp_path) == ("experiments/deep", "train.py")


def test_an_ignored_script_goes_anyway_with_the_modules_that_it_imports(tmp_path: Path, cache: Path) -> None:
    top = repository(tmp_path / "work")
    write(top / ".gitignore", "scratch/\n")
    write(top / "scratch" / "try.py", "import near\n")
    write(top / "scratch" / "near.py")
    write(top / "scratch" / "unrelated.bin")
    taken = snapshot(Path("scratch/try.py"), None, cwd=top, cache=cache)
    assert paths_in(taken) == {b".gitignore", b"scratch/try.py", b"scratch/near.py"}


NAMES_FILES = ["./s.sh q", "sh s.sh", "cat data", "prog --config=conf/a.yaml", "python -m pkg.train", "python -m pkg", "ls ."]
NAMES_NONE = [
    "echo hi",
    "nvidia-smi -L",
    "cat ../outside",
    "cat /etc/passwd",
    "sh -c ./s.sh;true",
    "python -m pkg.none",
    "x" * 5000,
]


def a_project(top: Path) -> Path:
    for name in ("s.sh", "data/x.csv", "conf/a.yaml", "pkg/train.py", "../outside"):
        write(top / name)
    return top


@pytest.mark.parametrize("command", NAMES_FILES)
def test_a_command_that_names_something_in_the_folder_takes_the_folder_along(tmp_path: Path, cache: Path, command: str) -> None:
    top = a_project(tmp_path / "plain")
    taken = snapshot(None, None, command=command.split(), cwd=top, cache=cache)
    assert paths_in(taken) == {b"s.sh", b"data/x.csv", b"conf/a.yaml", b"pkg/train.py"}
    [note] = taken.warnings
    assert note.startswith(f"{top} goes along, for the command names `")


@pytest.mark.parametrize("command", NAMES_NONE, ids=lambda command: command[:20])
def test_a_command_that_names_nothing_there_sends_nothing_and_says_so(tmp_path: Path, cache: Path, command: str) -> None:
    top = a_project(repository(tmp_path / "work"))
    nothing = snapshot(None, None, command=command.split(), cwd=top, cache=cache)
    assert (nothing.commit, dict(nothing.objects)) == (None, {})
    assert nothing.warnings == ("nothing of this folder is sent; `--workdir .` takes it along",)


def test_a_command_by_its_absolute_path_or_in_an_empty_folder_is_not_remarked_on(tmp_path: Path, cache: Path) -> None:
    write(tmp_path / "plain" / "a.txt")
    assert snapshot(None, None, command=["/bin/true"], cwd=tmp_path / "plain", cache=cache).warnings == ()
    (tmp_path / "empty").mkdir()
    assert snapshot(None, None, command=["true"], cwd=tmp_path / "empty", cache=cache).warnings == ()


def test_a_command_in_a_repository_takes_all_of_it_and_the_named_files_that_it_ignores(tmp_path: Path, cache: Path) -> None:
    top = repository(tmp_path / "work")
    for name, text in (
        (".gitignore", "build/\n"),
        ("sub/a.py", ""),
        ("other.py", ""),
        ("sub/build/prog", ""),
        ("sub/build/x", ""),
    ):
        write(top / name, text)
    taken = snapshot(None, None, command=["build/prog"], cwd=top / "sub", cache=cache)
    assert (taken.folder, taken.script) == ("sub", "")
    assert paths_in(taken) == {b".gitignore", b"sub/a.py", b"other.py", b"sub/build/prog"}


def test_of_a_home_folder_only_the_files_that_a_command_names_go(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "s.sh")
    write(tmp_path / "private.txt")
    write(tmp_path / "folder" / "x")
    taken = snapshot(None, None, command=["sh", "s.sh", "folder"], cwd=tmp_path, cache=cache)
    assert paths_in(taken) == {b"s.sh"}
    assert snapshot(None, None, command=["ls", "folder"], cwd=tmp_path, cache=cache).commit is None


def test_workdir_says_which_folder_goes_and_where_the_task_starts(tmp_path: Path, cache: Path) -> None:
    write(tmp_path / "project" / "src" / "train.py")
    write(tmp_path / "project" / "data.txt")
    taken = snapshot(Path("project/src/train.py"), Path("project"), cwd=tmp_path, cache=cache)
    assert (taken.folder, taken.script, paths_in(taken)) == ("", "src/train.py", {b"src/train.py", b"data.txt"})
    with pytest.raises(UsageError, match="does not lie in"):
        snapshot(Path("project/src/train.py"), Path("cache"), cwd=write(tmp_path / "cache" / "x").parent.parent, cache=cache)
    with pytest.raises(UsageError, match="is no folder"):
        snapshot(None, Path("nowhere"), cwd=tmp_path, cache=cache)


def test_the_home_of_the_agent_never_travels(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHQ_HOME", str(tmp_path / "work" / "home"))
    for name in ("home/trust/mesh.key", "home-made.py", "s.sh"):
        write(tmp_path / "work" / name)
    taken = snapshot(None, None, command=["./s.sh", "home/trust/mesh.key"], cwd=tmp_path / "work", cache=cache)
    assert paths_in(taken) == {b"home-made.py", b"s.sh"}


def test_the_same_files_give_the_same_commit_wherever_and_whenever(tmp_path: Path, cache: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name / "a.py", "a")
        write(tmp_path / name / "b" / "c.sh", "c", executable=True)
    os.utime(tmp_path / "one" / "a.py", (1, 1))
    first, second = (snapshot(None, tmp_path / name, cache=cache) for name in ("one", "two"))
    assert first.commit == second.commit
    assert first.commit != snapshot(None, tmp_path / "one" / "b", cache=cache).commit


def test_the_second_submit_sends_only_what_changed(tmp_path: Path, cache: Path) -> None:
    top = repository(tmp_path / "work")
    for number in range(30):
        write(top / f"package{number % 3}" / f"module{number}.py", f"x = {number}\n")
    commit_all(top)
    store = ObjectStore(tmp_path / "objects.git")
    first = snapshot(None, top, cache=cache)
    assert store.put(first.read(store.missing(first.objects))) == 30 + 3 + 1 + 1
    write(top / "package1" / "module1.py", "x = 'changed'\n")
    second = snapshot(None, top, cache=cache)
    sent = list(second.read(store.missing(second.objects)))
    assert sorted(kind for kind, _ in sent) == [1, 2, 2, 3]  # the commit, the top, one folder, one file
    store.put(sent)
    assert second.commit is not None
    assert store.complete(second.commit)


def test_files_that_did_not_change_are_not_read_again(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    top = tmp_path / "work"
    for number in range(250):
        os.utime(write(top / f"{number}.txt", str(number)), (1, 1))
    monkeypatch.setattr("meshq.submit.hashes.RACY_NS", -(10**18))  # the files' ctimes are of just now
    first = snapshot(None, top, cache=cache)
    read: list[bytes] = []

    def noted(path: bytes, size: int) -> bytes:
        read.append(path)
        return read_file(path, size)

    monkeypatch.setattr("meshq.submit.hashes.read_file", noted)
    write(top / "7.txt", "seven")
    second = snapshot(None, top, cache=cache)
    assert [os.path.basename(path) for path in read] == [b"7.txt"]
    assert first.commit != second.commit
    [remembered] = (cache / "hashes").iterdir()
    remembered.write_text('{"1.txt": ["nonsense"], "2.txt": 5}')
    assert snapshot(None, top, cache=cache).commit == second.commit


def test_a_file_that_changes_before_it_is_sent_is_an_error_not_a_mixture(tmp_path: Path, cache: Path) -> None:
    script = write(tmp_path / "work" / "train.py", "print(1)\n")
    taken = snapshot(script, None, cwd=tmp_path, cache=cache)
    script.write_text("print(2)\n")
    with pytest.raises(UsageError, match=r"train\.py changed while it was read"):
        list(taken.read(taken.objects))


def test_links_that_leave_the_folder_are_left_out_and_named(tmp_path: Path, cache: Path) -> None:
    top = tmp_path / "work"
    write(top / "main.py")
    (top / "datasets").symlink_to("/somewhere/large")
    (top / "up").symlink_to("../other")
    taken = snapshot(None, top, cache=cache)
    assert (paths_in(taken), taken.files) == ({b"main.py"}, 1)
    assert [warning.split(" leaves")[0] for warning in taken.warnings] == [
        "the link datasets -> /somewhere/large", "the link up -> ../other",
    ]  # fmt: skip


def test_what_is_too_big_is_named_before_anything_is_read(tmp_path: Path, cache: Path) -> None:
    top = tmp_path / "work"
    write(top / "main.py")
    with open(write(top / "big.bin"), "wb") as file:
        file.truncate(10**12)  # nobody reads a terabyte by mistake
    with pytest.raises(UsageError, match=r"big\.bin \(931 GiB\); one file may have 64 MiB") as caught:
        snapshot(None, top, cache=cache)
    assert ".meshqignore" in caught.value.hint
    (top / "big.bin").write_bytes(bytes(5000))
    with pytest.raises(UsageError, match=r"has 5 KiB where 4 KiB may be submitted; the largest: big\.bin"):
        snapshot(None, top, limits=Limits(total_bytes=4096), cache=cache)
    for number in range(5):
        write(top / "many" / f"{number}.txt")
    with pytest.raises(UsageError, match=r"has 7 files where 3 may be submitted; most are in many \(5\)"):
        snapshot(None, top, limits=Limits(files=3), cache=cache)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "became-a-link").symlink_to("elsewhere")
    with pytest.raises(UsageError, match=r"reading .*became-a-link") as caught:
        read_file(os.fsencode(tmp_path / "became-a-link"), 5)
    assert "make it readable" in caught.value.hint


def test_submitting_imports_no_agent_code_and_nothing_slow() -> None:
    code = (
        "import sys; import meshq.submit.spec; print(*[m for m in sys.modules if "
        "m.split('.')[0] in {'aiohttp', 'docker', 'zeroconf', 'cryptography', 'dulwich', 'uv'}"
        " or m.startswith(('meshq.exec', 'meshq.gossip', 'meshq.ledger', 'meshq.web', 'meshq.agent'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
