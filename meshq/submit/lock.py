"""Resolve requirements once, so that every machine that runs the task installs the same.

uv resolves for all platforms and for the asked Python and newer, so one lock serves a mixed lab. What was resolved is
remembered by its input: for ever if every line is pinned, else for a day, since new releases change the answer.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from meshq import config
from meshq.errors import TaskFailed, UsageError
from meshq.packages import has_credentials, unsafe_line, uv_binary, uv_environment
from meshq.pyversion import parse_python
from meshq.submit.cache import cache_folder, remember
from meshq.submit.requirements import Requirements

REMEMBER_SECONDS: Final = 24 * 3600.0
RESOLVE_SECONDS: Final = 600.0  # a resolution that builds old source packages to learn their dependencies
EXPLANATION_CHARS_MAX: Final = 1_500
_PINNED: Final = re.compile(r"[A-Za-z0-9._-]+(\[[^\]]*\])?\s*==\s*[^*,;\s]+(\s*;.*)?|.* @ \w+\+.*@[0-9a-f]{40}.*")
_NETWORK: Final = ("error sending request", "dns error", "Failed to fetch", "tcp connect", "timed out", "Request failed")
_INDEXES: Final = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_INDEX", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS", "UV_TORCH_BACKEND")


@dataclass(frozen=True, slots=True)
class Lock:
    """Resolved lines for `Environment.lock` (with the index options that belong to them) and for `Environment.python`."""

    text: str
    python: str


def resolve(
    requirements: Requirements, python: str = "", *, cache: Path | None = None, environ: Mapping[str, str] = os.environ
) -> Lock:
    """Lock `requirements` for `python` (as `--python` has it). UsageError if they contradict each other."""
    floor, wanted = choose_python(python, requirements.python)
    options = [line for line in requirements.lines if line.startswith(("-i", "-f", "--"))]
    if len(options) == len(requirements.lines):
        return Lock("", wanted)
    environment = uv_environment(environ)
    file = (cache or cache_folder(environ)) / "locks" / f"{_key(requirements, floor, environment)}.txt"
    text = _remembered(file, for_ever=all(_PINNED.fullmatch(line) for line in requirements.lines))
    if text is None:
        text = "".join(f"{line}\n" for line in options) + _compile(requirements, floor, environment)
        _check(text, requirements)
        remember(file, text)
    return Lock(text, wanted)


def choose_python(chosen: str, required: str, here: tuple[int, int] = sys.version_info[:2]) -> tuple[str, str]:
    """The oldest Python to resolve for, and what the task asks for.

    Without `--python` that is the submitter's own version or newer, within what the project allows: an older one has not
    been tried by anybody, even where the project says it would do.
    """
    text = chosen or required
    try:
        request = parse_python(text)
        lowest = request.lowest_minor()
        own = parse_python(f">={here[0]}.{here[1]}" + (f",{required}" if required else "")).lowest_minor()
    except ValueError as error:
        what = "--python" if chosen else "requires-python"
        raise UsageError(f"{what}: {error}", "write 3.12 or a range such as >=3.10,<3.13") from None
    if lowest is None:
        raise UsageError(f"no Python 3 satisfies {text}", "correct --python or requires-python")
    if chosen:
        return _minor(lowest), chosen
    if required and own in (None, lowest):  # None: the project is for older ones only
        return _minor(lowest), required
    assert own is not None  # without `required`, the own version is allowed
    return _minor(own), f">={_minor(own)}" + (f",{required}" if required else "")


def _minor(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _key(requirements: Requirements, floor: str, environment: Mapping[str, str]) -> str:
    constraints = [_constraint(line) for line in requirements.lines if line.startswith("-c ")]
    indexes = [environment.get(name, "") for name in _INDEXES]
    facts = json.dumps([1, requirements.lines, constraints, floor, indexes])
    return hashlib.sha256(facts.encode()).hexdigest()[:40]


def _constraint(line: str) -> str:
    path = Path(line.removeprefix("-c "))
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"reading the constraints {path}: {error}") from None


def _remembered(file: Path, *, for_ever: bool) -> str | None:
    try:
        fresh = for_ever or abs(time.time() - file.stat().st_mtime) < REMEMBER_SECONDS
        return file.read_text(encoding="utf-8") if fresh else None
    except (OSError, UnicodeDecodeError):
        return None


def _compile(requirements: Requirements, floor: str, environment: Mapping[str, str]) -> str:
    command = [
        uv_binary(), "pip", "compile", "--universal", "--no-header", "--no-annotate", "--quiet", "--no-python-downloads",
        "--python", sys.executable, "--python-version", floor, "-",
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, input="\n".join(requirements.lines) + "\n", env=dict(environment), cwd=requirements.folder,
            capture_output=True, text=True, check=False, timeout=RESOLVE_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise TaskFailed(
            f"resolving {requirements.origin}: uv found no answer in {RESOLVE_SECONDS:.0f} s", "pin the versions"
        ) from None
    except OSError as error:
        raise TaskFailed(f"running uv: {error.strerror}", "reinstall meshq in a fresh virtual environment") from None
    if done.returncode != 0:
        raise _explained(requirements, floor, done.stderr)
    return done.stdout


def _explained(requirements: Requirements, floor: str, stderr: str) -> UsageError | TaskFailed:
    parts = [re.sub(r"^\s*(?:error:|cause:|[×╰─▶│├]+)\s*", "", line).strip() for line in stderr.splitlines()]
    text = ": ".join(part.rstrip(":") for part in parts if part)[:EXPLANATION_CHARS_MAX]
    if any(sign in stderr for sign in _NETWORK):
        return TaskFailed(
            f"resolving {requirements.origin}: the package index does not answer: {text}",
            "check this machine's network, proxy and pip.conf; a lock that was made before would be used without asking",
        )
    return UsageError(
        f"{requirements.origin} cannot be solved for Python {floor}: {text}", "change the versions, or choose another --python"
    )


def _check(text: str, requirements: Requirements) -> None:
    if len(text.encode()) > config.SPEC_BYTES_MAX // 2:
        raise UsageError(
            f"{requirements.origin} resolves to {len(text.splitlines())} packages, more than a task can carry",
            "leave out what the script does not use",
        )
    if (line := unsafe_line(text)) is not None:
        raise UsageError(f"{requirements.origin}: other machines cannot install {line[:200]}", "require a released version")
    if has_credentials(text):
        raise UsageError(f"{requirements.origin} resolves to an address with a password in it", "use ~/.netrc instead")
