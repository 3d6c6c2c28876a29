"""The Python that a task asks for is found by running what looks like one, and the closest is chosen."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshq.exec.interpreters import Interpreters, own_interpreter
from meshq.exec.preparation import PreparationFailed
from meshq.pyversion import parse_python
from tests.submit.repositories import write

OWN = own_interpreter()


def pretend(folder: Path, name: str, version: str, implementation: str = "cpython") -> Path:
    """A program that answers as a Python of this version would."""
    numbers = version.replace(".", ", ")
    path = folder / "bin" / name
    answer = f'[[{numbers}], "{implementation}", "abi", "linux", "{path}"]'
    return write(path, f"#!/bin/sh\necho '{answer}'\n", executable=True)


@pytest.fixture
def lab(tmp_path: Path) -> Interpreters:
    """A machine with Pythons on the path, of pyenv and of uv, and with some that are none."""
    home = tmp_path / "home"
    pretend(tmp_path / "path", "python3.30", "3.30.1")
    pretend(tmp_path / "path", "python3.29", "3.29.0", "pypy")
    write(tmp_path / "path" / "bin" / "python3.28", "#!/bin/sh\necho no such version >&2\nexit 127\n", executable=True)
    write(tmp_path / "path" / "bin" / "python3.27", "#!/bin/sh\necho '[\"what\"]'\n", executable=True)
    write(tmp_path / "path" / "bin" / "python3.26-config", "#!/bin/sh\nexit 1\n", executable=True)
    pretend(home / ".pyenv" / "versions" / "3.30.7", "python3", "3.30.7")
    pretend(home / ".local" / "share" / "uv" / "python" / "cpython-3.25", "python3", "3.25.2")
    return Interpreters({"HOME": str(home), "PATH": str(tmp_path / "path" / "bin")})


def test_the_agents_own_is_taken_without_looking_further_if_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("looked further")

    monkeypatch.setattr("meshq.exec.interpreters._scan", fail)
    own = f"3.{sys.version_info.minor}"
    for version in ("", own, f">={own}", f">={own},<4"):
        assert Interpreters().choose(version) == OWN
    assert not (OWN.path.parent.parent / "pyvenv.cfg").exists()


@pytest.mark.parametrize(
    ("version", "found"),
    [("3.30", "3.30.7"), ("3.30.1", "3.30.1"), (">=3.25", "3.25.2"), (">3.25.2", "3.30.7"), ("3.25", "3.25.2")],
)
def test_the_oldest_minor_that_will_do_in_its_latest_release(lab: Interpreters, version: str, found: str) -> None:
    chosen = lab.choose(version)
    assert ".".join(map(str, chosen.version)) == found
    assert lab.known(version) is chosen


@pytest.mark.parametrize("version", ["3.29", "3.28", "3.27"])
def test_what_is_missing_is_reported_with_what_there_is(lab: Interpreters, version: str) -> None:
    with pytest.raises(PreparationFailed, match=rf"no Python {version} on this machine, only .*3\.25\.2.*3\.30\.7") as caught:
        lab.choose(version)
    assert caught.value.retryable


def test_nonsense_is_nobodys_to_retry(lab: Interpreters) -> None:
    with pytest.raises(PreparationFailed) as caught:
        lab.choose("latest")
    assert not caught.value.retryable


def test_a_virtual_environment_answers_with_what_it_was_made_from(tmp_path: Path) -> None:
    assert sys.prefix != sys.base_prefix, "the tests run in a virtual environment"
    path = f"{Path(sys.executable).parent}{os.pathsep}{OWN.path.parent}"
    interpreters = Interpreters({"HOME": str(tmp_path), "PATH": path})
    with pytest.raises(PreparationFailed):
        interpreters.choose("3.30")
    assert interpreters._found is not None
    assert all(not (each.path.parent.parent / "pyvenv.cfg").exists() for each in interpreters._found)


versions = st.tuples(st.just(3), st.integers(8, 16), st.integers(0, 20))


@given(versions, versions)
def test_specifiers_mean_what_pep_440_says(asked: tuple[int, int, int], got: tuple[int, int, int]) -> None:
    from packaging.specifiers import SpecifierSet

    full = ".".join(map(str, asked))
    minor = f"{asked[0]}.{asked[1]}"
    texts = [f"{operator}{full}" for operator in ("==", "!=", "<=", ">=", "<", ">", "~=")]
    texts += [f"=={minor}.*", f"!={minor}.*", f">={minor}", f"<{minor}", f">={minor},<{asked[0]}.{asked[1] + 2}", f"~={minor}"]
    for text in texts:
        assert parse_python(text).allows(got) == (".".join(map(str, got)) in SpecifierSet(text)), text
