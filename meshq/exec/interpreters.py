"""Which Pythons this machine has, and the best of them for a task.

Looked for once, when a task asks for another version than the agent's own: beside the agent, on the path, where Debian,
pyenv and uv put theirs. Each candidate is asked for its version by running it: names lie (pyenv's shims answer with an
error), and a virtual environment answers with the interpreter that it was made from.
"""

import json
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from meshq.exec.preparation import PreparationFailed
from meshq.pyversion import Version, parse_python

ASK_SECONDS: Final = 10.0
NAMED_MAX: Final = 12
_NAME: Final = re.compile(r"python3(\.\d+)?")
_QUESTION: Final = """
import json, sys, sysconfig
print(json.dumps([list(sys.version_info[:3]), sys.implementation.name, sysconfig.get_config_var("SOABI") or "",
                  sysconfig.get_platform(), getattr(sys, "_base_executable", sys.executable)]))
"""


@dataclass(frozen=True, slots=True)
class Interpreter:
    """One Python; all fields together say whether what was built for it still fits."""

    path: Path
    version: Version
    implementation: str
    abi: str
    platform: str


class Interpreters:
    """Remembers what was found until the agent ends. Blocking: for a thread, except `known`."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._environ = environ
        self._chosen: dict[str, Interpreter] = {}
        self._found: tuple[Interpreter, ...] | None = None

    def known(self, version: str) -> Interpreter | None:
        """What `choose` answered before."""
        return self._chosen.get(version)

    def choose(self, version: str) -> Interpreter:
        """The interpreter for a request as `Environment.python` has it. PreparationFailed names those that there are.

        The oldest minor that will do, since packages were chosen for it; there the agent's own, then the latest release.
        """
        if version not in self._chosen:
            self._chosen[version] = self._choose(version)
        return self._chosen[version]

    def _choose(self, version: str) -> Interpreter:
        own = own_interpreter()
        try:
            request = parse_python(version)
        except ValueError as error:
            raise PreparationFailed(str(error), False) from None
        if not request.clauses or (request.allows(own.version) and request.lowest_minor() == own.version[:2]):
            return own
        if self._found is None:
            self._found = tuple(_scan(own, self._environ))
        fitting = [each for each in self._found if request.allows(each.version) and each.implementation == "cpython"]
        if not fitting:
            raise PreparationFailed(f"no Python {version} on this machine, only {_named(self._found)}", True)
        return min(fitting, key=lambda each: (each.version[:2], each != own, -each.version[2], str(each.path)))


def own_interpreter() -> Interpreter:
    """The one that the agent's own environment was made from."""
    path = Path(getattr(sys, "_base_executable", None) or sys.executable)
    version = (sys.version_info.major, sys.version_info.minor, sys.version_info.micro)
    abi = str(sysconfig.get_config_var("SOABI") or "")
    return Interpreter(path.absolute(), version, sys.implementation.name, abi, sysconfig.get_platform())


def _scan(own: Interpreter, environ: Mapping[str, str]) -> Iterator[Interpreter]:
    yield own
    seen = {own.path.resolve()}
    for candidate in _candidates(environ):
        real = candidate.resolve()
        if real in seen:
            continue
        seen.add(real)
        found = _ask(candidate, environ)
        if found is not None and (found.path.resolve() == real or found.path.resolve() not in seen):
            seen.add(found.path.resolve())
            yield found


def _candidates(environ: Mapping[str, str]) -> Iterator[Path]:
    home = Path(environ.get("HOME") or Path.home())
    data = Path(environ.get("XDG_DATA_HOME") or home / ".local" / "share")
    folders = [Path(each) for each in environ.get("PATH", "").split(os.pathsep) if each.startswith("/")]
    for folder in dict.fromkeys([*folders, Path("/usr/bin"), Path("/usr/local/bin")]):
        yield from _listed(folder, lambda name: _NAME.fullmatch(name) is not None)
    for versions in (Path(environ.get("PYENV_ROOT") or home / ".pyenv") / "versions", data / "uv" / "python"):
        for folder in _listed(versions, lambda name: not name.startswith(".")):
            if (folder / "bin" / "python3").exists():
                yield folder / "bin" / "python3"


def _listed(folder: Path, wanted: Callable[[str], bool]) -> list[Path]:
    try:
        return [folder / name for name in sorted(os.listdir(folder)) if wanted(name)]
    except OSError:
        return []


def _ask(candidate: Path, environ: Mapping[str, str]) -> Interpreter | None:
    clean = {name: value for name, value in environ.items() if not name.startswith(("MESHQ_", "PYTHON"))}
    try:
        done = subprocess.run(
            [candidate, "-I", "-S", "-c", _QUESTION],
            env=clean, capture_output=True, text=True, check=True, timeout=ASK_SECONDS, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        version, implementation, abi, platform, path = json.loads(done.stdout)
        major, minor, micro = version
        return Interpreter(Path(path), (major, minor, micro), implementation, abi, platform)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def _named(found: Iterable[Interpreter]) -> str:
    versions = sorted({each.version for each in found})
    return ", ".join(".".join(map(str, version)) for version in versions[-NAMED_MAX:])
