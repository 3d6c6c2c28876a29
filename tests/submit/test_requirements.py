"""Requirements are found where people write them down, in the order that the documentation promises."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from meshq.errors import UsageError
from meshq.packages import uv_binary
from meshq.submit.requirements import WELL_KNOWN, find_requirements, from_file
from tests.submit.repositories import write
from tests.wheels import make_wheel, only_from

METADATA = """
# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "from-metadata>=1",
# ]
# ///
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return write(tmp_path / "top" / "sub" / "train.py", "import from_imports\n")


def lines(script: Path, chosen: Path | None = None) -> tuple[str, ...]:
    return find_requirements(script, script.parent.parent, chosen).lines


def test_what_is_closer_to_the_person_wins(script: Path, tmp_path: Path) -> None:
    top = script.parent.parent
    write(tmp_path / "requirements.txt", "outside\n")
    write(top / "requirements.txt", "from-top-text\n")
    assert lines(script) == ("from-top-text",)
    write(top / "pyproject.toml", '[project]\nname = "x"\ndependencies = ["from-top-project"]\n')
    assert lines(script) == ("from-top-project",)
    write(script.parent / "requirements.txt", "from-near-text\n")
    assert lines(script) == ("from-near-text",)
    write(script.parent / "pyproject.toml", "[tool.ruff]\nline-length = 100\n")
    assert lines(script) == ("from-near-text",)
    write(script.parent / "pylock.toml", 'lock-version = "1.0"\n[[packages]]\nname = "from-pylock"\nversion = "2"\n')
    assert lines(script) == ("from-pylock==2",)
    write(script, METADATA)
    assert lines(script) == ("from-metadata>=1",)
    assert lines(script, write(tmp_path / "chosen.txt", "chosen\n")) == ("chosen",)


def test_metadata_brings_its_python_and_its_indexes(script: Path) -> None:
    index = '# [[tool.uv.index]]\n# url = "https://wheels.example/simple"\n# ///\n'
    write(script, METADATA.replace("# ///\n", index))
    found = find_requirements(script, None)
    assert found.python == ">=3.11"
    assert found.lines == ("--extra-index-url https://wheels.example/simple", "from-metadata>=1")


def test_a_text_file_is_flattened_with_what_it_includes(tmp_path: Path) -> None:
    write(tmp_path / "base" / "common.txt", "six  # for old code\n-c limits.txt\n")
    path = write(
        tmp_path / "requirements.txt",
        "# everything\n-r base/common.txt\nnumpy>=1,\\\n  <3\n\niniconfig==2.0.0 --hash=sha256:00\n"
        "--extra-index-url https://wheels.example/cpu\ntool @ https://wheels.example/tool#egg=tool\n",
    )
    assert from_file(path).lines == (
        "six", f"-c {tmp_path / 'base' / 'limits.txt'}", "numpy>=1,   <3", "iniconfig==2.0.0",
        "--extra-index-url https://wheels.example/cpu", "tool @ https://wheels.example/tool#egg=tool",
    )  # fmt: skip


def test_a_pylock_gives_pins_markers_and_commits(tmp_path: Path) -> None:
    path = write(
        tmp_path / "pylock.dev.toml",
        """
lock-version = "1.0"
requires-python = ">=3.10"
[[packages]]
name = "six"
version = "1.17.0"
marker = "python_version < '3.12'"
[[packages]]
name = "tool"
vcs = { type = "git", url = "https://code.example/tool", commit-id = "0123456789012345678901234567890123456789" }
""",
    )
    found = from_file(path)
    assert found.python == ">=3.10"
    assert found.lines == (
        "six==1.17.0 ; python_version < '3.12'",
        "tool @ git+https://code.example/tool@0123456789012345678901234567890123456789",
    )
    with pytest.raises(UsageError, match="mine has no version that another machine could install"):
        from_file(write(tmp_path / "pylock.toml", '[[packages]]\nname = "mine"\ndirectory = { path = "." }\n'))


def test_a_uv_lock_is_taken_as_it_stands_without_development_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheel(tmp_path / "wheels", "alpha", "1.0", requires=["beta"])
    make_wheel(tmp_path / "wheels", "beta", "2.0")
    make_wheel(tmp_path / "wheels", "gamma", "3.0")
    for name, value in only_from(tmp_path / "wheels").items():
        monkeypatch.setenv(name, value)
    script = write(tmp_path / "work" / "train.py")
    write(
        tmp_path / "work" / "pyproject.toml",
        '[project]\nname = "mine"\nversion = "1"\nrequires-python = ">=3.11"\ndependencies = ["alpha"]\n'
        '[dependency-groups]\ndev = ["gamma"]\n',
    )
    subprocess.run([uv_binary(), "lock", "-q", "--directory", tmp_path / "work"], check=True)
    make_wheel(tmp_path / "wheels", "beta", "2.1")
    found = find_requirements(script, None)
    assert (found.lines, found.python, found.origin) == (("alpha==1.0", "beta==2.0"), ">=3.11", "uv.lock")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("-e .\n", "exists on this machine only"),
        ("./vendored/tool\n", "exists on this machine only"),
        ("tool @ file:///home/me/tool\n", "exists on this machine only"),
        ("--find-links ./wheels\n", "exists on this machine only"),
        ("--index-url https://me:secret@wheels.example/simple\n", "password or token"),
        ("tool @ git+https://token@code.example/tool\n", "password or token"),
        ("-r requirements.txt\n", "includes itself"),
        ("-r nowhere.txt\n", "No such file"),
    ],
)
def test_what_no_other_machine_could_use_or_should_see_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        from_file(write(tmp_path / "requirements.txt", text))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("pyproject.toml", "[project\n", "is not valid TOML"),
        ("pyproject.toml", "[tool.x]\n", r"has no \[project\] table"),
        ("pyproject.toml", "[project]\ndependencies = 5\n", "must be a list of strings"),
        ("poetry.lock", "", "in a format that meshq can't read"),
        ("environment.yml", "", "in a format that meshq can't read"),
    ],
)
def test_a_file_that_makes_no_sense_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        from_file(write(tmp_path / name, text))


def test_files_that_are_missing_or_no_text_are_named(script: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--requirements: .*nowhere\.txt is no file"):
        find_requirements(script, None, tmp_path / "nowhere.txt")
    script.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="is no text in UTF-8"):
        find_requirements(script, None)
    write(script, METADATA + METADATA)
    with pytest.raises(UsageError, match="more than one"):
        find_requirements(script, None)


@pytest.fixture(scope="module")
def activated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The variables of a person who works in a virtual environment with some packages in it."""
    base = tmp_path_factory.mktemp("activated")
    wheels = base / "wheels"
    made = [
        make_wheel(wheels, "Some-Thing", "1.5", files={"thing/__init__.py": "", "thing_speedups.py": ""}),
        make_wheel(wheels, "torchish", "2.13.0+cpu"),
        make_wheel(wheels, "cloud-storage", "3", files={"cloud/storage/__init__.py": ""}),
        make_wheel(wheels, "cloud-queue", "4", files={"cloud/queue.py": ""}),
    ]
    folder = base / "source"
    write(folder / "pyproject.toml", '[project]\nname = "editable"\nversion = "1"\n')
    environ = {**os.environ, **only_from(wheels), "UV_CACHE_DIR": str(base / "cache")}
    venv = str(base / "venv")
    for words in (["venv", venv, "--python", sys.executable], ["pip", "install", "--python", venv, *map(str, made)]):
        subprocess.run([uv_binary(), *words, "-q"], env=environ, check=True)
    info = base / "venv" / "lib" / f"python3.{sys.version_info.minor}" / "site-packages" / "editable-1.dist-info"
    write(info / "METADATA", "Metadata-Version: 2.1\nName: editable\nVersion: 1\n")
    write(info / "top_level.txt", "editable\n")
    write(info / "direct_url.json", '{"url": "file:///home/me/editable", "dir_info": {"editable": true}}')
    return {**os.environ, "VIRTUAL_ENV": str(base / "venv")}


def test_imports_become_the_versions_that_the_person_works_with(tmp_path: Path, activated: dict[str, str]) -> None:
    script = write(
        tmp_path / "train.py",
        "import os, thing, torchish\nfrom cloud import storage\nimport PIL.Image\n"
        "try:\n    import thing_speedups, never_installed\nexcept ImportError:\n    pass\n",
    )
    found = find_requirements(script, None, environ=activated)
    assert found.lines == ("Some-Thing==1.5", "cloud-storage==3", "pillow", "torchish==2.13.0")
    assert found.python == f">=3.{sys.version_info.minor}"
    assert found.origin.startswith("the imports of train.py, with the versions of ")


def test_a_name_that_nobody_knows_is_asked_for_never_guessed(tmp_path: Path, activated: dict[str, str]) -> None:
    script = write(tmp_path / "train.py", "import thing\nimport unheard_of.deep\n")
    with pytest.raises(UsageError, match=r"which package provides unheard_of \(train.py:2\)") as caught:
        find_requirements(script, None, environ=activated)
    assert "--requirements" in caught.value.hint


def test_an_import_that_may_never_be_reached_is_named_and_stops_nothing(tmp_path: Path, activated: dict[str, str]) -> None:
    script = write(
        tmp_path / "train.py",
        "import thing\ndef plot():\n    import unheard_of.deep, editable, torchish, PIL\n"
        "try:\n    import another\nfinally:\n    pass\ntry:\n    import speedups\nexcept ImportError:\n    pass\n",
    )
    found = find_requirements(script, None, environ=activated)
    assert found.lines == ("Some-Thing==1.5", "pillow", "torchish==2.13.0")
    [note] = found.notes
    assert "no package is known for another (train.py:5), editable (train.py:3), unheard_of (train.py:3)" in note


def test_a_package_that_is_only_a_folder_here_is_refused(tmp_path: Path, activated: dict[str, str]) -> None:
    script = write(tmp_path / "train.py", "import editable\n")
    with pytest.raises(UsageError, match=r"editable \(train.py:1\) is installed from /home/me/editable"):
        find_requirements(script, None, environ=activated)


def test_a_script_without_imports_asks_nobody(tmp_path: Path) -> None:
    found = find_requirements(write(tmp_path / "train.py", "import os\n"), None, environ={"PATH": ""})
    assert (found.lines, found.python) == ((), "")
    with pytest.raises(UsageError, match="no python3 is on the path"):
        find_requirements(write(tmp_path / "train.py", "import numpy\n"), None, environ={"PATH": ""})


def test_an_interpreter_that_does_not_answer_is_named(tmp_path: Path) -> None:
    write(tmp_path / "venv" / "bin" / "python", "#!/bin/sh\necho broken >&2\nexit 3\n", executable=True)
    script = write(tmp_path / "train.py", "import numpy\n")
    with pytest.raises(UsageError, match="venv/bin/python what is installed: broken"):
        find_requirements(script, None, environ={"VIRTUAL_ENV": str(tmp_path / "venv")})


def test_well_known_names_are_names_of_packages() -> None:
    assert all(value == value.lower() and "_" not in value and " " not in value for value in WELL_KNOWN.values())
