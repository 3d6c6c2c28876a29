"""Requirements are resolved once, by the real uv; what was resolved is remembered."""

import os
import sys
from pathlib import Path

import pytest

from meshq.errors import TaskFailed, UsageError
from meshq.packages import unsafe_line, uv_environment
from meshq.submit import lock
from meshq.submit.lock import choose_python, resolve
from meshq.submit.requirements import Requirements
from tests.wheels import make_wheel, only_from

HERE = f"3.{sys.version_info.minor}"


class Lab:
    """A cache, a folder of wheels that is all there is, and the variables for both."""

    def __init__(self, folder: Path) -> None:
        self.cache = folder / "cache"
        self.wheels = folder / "wheels"
        self.environ = {**os.environ, **only_from(self.wheels)}
        make_wheel(self.wheels, "alpha", "1.0", requires=["beta>=2", "gamma ; sys_platform == 'win32'"])
        make_wheel(self.wheels, "beta", "2.0")
        make_wheel(self.wheels, "gamma", "1.0")

    def resolve(self, *lines: str, python: str = "", required: str = "") -> lock.Lock:
        return resolve(Requirements(lines, required, "the test"), python, cache=self.cache, environ=self.environ)


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


def test_a_lock_names_every_version_for_every_platform(lab: Lab) -> None:
    made = lab.resolve("alpha")
    assert made.text.splitlines() == ["alpha==1.0", "beta==2.0", "gamma==1.0 ; sys_platform == 'win32'"]
    assert made.python == f">={HERE}"


def test_nothing_required_is_an_empty_lock_without_running_anything(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "uv_binary", lambda: "/nowhere/uv")
    assert lab.resolve().text == ""
    assert lab.resolve("--extra-index-url https://wheels.example/simple").text == ""


def test_what_was_resolved_is_remembered_a_day_or_if_pinned_for_ever(lab: Lab) -> None:
    lab.resolve("alpha")
    lab.resolve("alpha==1.0")
    make_wheel(lab.wheels, "beta", "2.5")
    assert "beta==2.0" in lab.resolve("alpha").text
    for file in (lab.cache / "locks").iterdir():
        os.utime(file, (1, 1))
    assert "beta==2.5" in lab.resolve("alpha").text
    assert "beta==2.0" in lab.resolve("alpha==1.0").text
    assert "beta==2.5" in lab.resolve("alpha", python="3.12").text  # another question, another answer


def test_a_constraint_is_part_of_the_question(lab: Lab, tmp_path: Path) -> None:
    make_wheel(lab.wheels, "beta", "2.5")
    limits = tmp_path / "limits.txt"
    limits.write_text("beta<2.5\n")
    assert "beta==2.0" in lab.resolve("alpha", f"-c {limits}").text
    limits.write_text("beta<3\n")
    assert "beta==2.5" in lab.resolve("alpha", f"-c {limits}").text
    limits.unlink()
    with pytest.raises(UsageError, match="reading the constraints"):
        lab.resolve("alpha", f"-c {limits}")


def test_what_cannot_be_solved_is_explained_in_uvs_words(lab: Lab) -> None:
    with pytest.raises(UsageError, match="the test cannot be solved for Python") as caught:
        lab.resolve("alpha", "beta<2")
    assert "beta" in caught.value.message
    assert "×" not in caught.value.message and "\n" not in caught.value.message
    with pytest.raises(UsageError, match="not-there"):
        lab.resolve("not-there")
    with pytest.raises(UsageError, match="===="):
        lab.resolve("alpha ====")
    assert not list((lab.cache / "locks").glob("*"))


def test_an_index_that_does_not_answer_is_no_fault_of_the_requirements(lab: Lab) -> None:
    del lab.environ["UV_NO_INDEX"]
    lab.environ |= {"UV_DEFAULT_INDEX": "http://127.0.0.1:9/simple", "UV_HTTP_RETRIES": "0"}
    with pytest.raises(TaskFailed, match="the package index does not answer"):
        lab.resolve("not-there")


def test_a_lock_that_a_task_cannot_carry_is_refused(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshq.config.SPEC_BYTES_MAX", 40)
    with pytest.raises(UsageError, match="resolves to 3 packages, more than a task can carry"):
        lab.resolve("alpha")


def test_a_real_index_answers(tmp_path: Path) -> None:
    text = resolve(Requirements(("iniconfig==2.0.0", "six<1.17"), "", "the test"), cache=tmp_path).text
    assert text.splitlines()[0] == "iniconfig==2.0.0"
    assert unsafe_line(text) is None


@pytest.mark.parametrize(
    ("chosen", "required", "here", "expected"),
    [
        ("", "", (3, 12), ("3.12", ">=3.12")),
        ("3.11", "", (3, 12), ("3.11", "3.11")),
        ("3.11.4", "", (3, 12), ("3.11", "3.11.4")),
        ("3.13", ">=3.8", (3, 12), ("3.13", "3.13")),
        ("", ">=3.8", (3, 12), ("3.12", ">=3.12,>=3.8")),
        ("", ">=3.12", (3, 12), ("3.12", ">=3.12")),
        ("", ">=3.13", (3, 12), ("3.13", ">=3.13")),
        ("", ">=3.8,<3.11", (3, 12), ("3.8", ">=3.8,<3.11")),
        ("", "~=3.10", (3, 12), ("3.12", ">=3.12,~=3.10")),
        ("", "==3.11.*", (3, 12), ("3.11", "==3.11.*")),
    ],
)
def test_the_python_is_the_submitters_or_newer_within_what_is_allowed(
    chosen: str, required: str, here: tuple[int, int], expected: tuple[str, str]
) -> None:
    assert choose_python(chosen, required, here) == expected


@pytest.mark.parametrize("chosen", ["three", "2.7", ">=3.12,<3.11", "3.12rc1", "/usr/bin/python3", "~=3"])
def test_a_python_that_cannot_be_is_refused(chosen: str) -> None:
    with pytest.raises(UsageError, match=r"--python|no Python 3"):
        choose_python(chosen, "")


def test_pips_configuration_is_translated_and_uvs_own_wins(tmp_path: Path) -> None:
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "pip.conf").write_text(
        "[global]\nindex-url = https://a.example/simple\nextra-index-url =\n    https://b.example\n    https://c.example\n"
        "[install]\nfind-links = /srv/wheels /srv/more\n"
    )
    given = {
        "HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path), "MESHQ_KEY": "secret", "PIP_TRUSTED_HOST": "b.example",
        "UV_FIND_LINKS": "/mine",
    }  # fmt: skip
    made = uv_environment(given, cache=tmp_path / "cache")
    assert made["UV_DEFAULT_INDEX"] == "https://a.example/simple"
    assert made["UV_INDEX"] == "https://b.example https://c.example"
    assert made["UV_INDEX_STRATEGY"] == "unsafe-best-match"
    assert made["UV_INSECURE_HOST"] == "b.example"
    assert made["UV_FIND_LINKS"] == "/mine"
    assert made["UV_CACHE_DIR"] == str(tmp_path / "cache")
    assert "MESHQ_KEY" not in made
    assert uv_environment({**given, "PIP_INDEX_URL": "https://d.example"})["UV_DEFAULT_INDEX"] == "https://d.example"
    assert "UV_INDEX" not in uv_environment({**given, "PIP_CONFIG_FILE": os.devnull})


def test_a_mirror_or_a_folder_of_wheels_that_pip_knows_is_used_by_uv(lab: Lab, tmp_path: Path) -> None:
    config = tmp_path / "pip.conf"
    config.write_text(f"[global]\nno-index = true\nfind-links = {lab.wheels}\n")
    lab.environ = {name: value for name, value in os.environ.items() if not name.startswith(("UV_", "PIP_"))}
    lab.environ["PIP_CONFIG_FILE"] = str(config)
    assert "alpha==1.0" in lab.resolve("alpha").text
