"""Which installed package provides a module, asked of the interpreter that the person works with.

That is the active virtual environment, else the active conda environment, else the first `python3` on the path; never the
one that meshq itself lives in. One short process there answers for all names at once.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from meshq.errors import UsageError

ASK_SECONDS: Final = 60.0  # a cold conda environment on a network drive has been seen to take 20
OUTPUT_BYTES_MAX: Final = 8 * 2**20

QUESTION: Final = """
import json, sys
try:
    from importlib import metadata
except ImportError:
    metadata = None

def providers():
    found = {}
    for dist in metadata.distributions() if metadata else ():
        if not dist.metadata["Name"]:
            continue
        files = [str(file) for file in dist.files or ()]
        tops = (dist.read_text("top_level.txt") or "").split()
        for file in files:
            head, _, rest = file.partition("/")
            if rest and not head.endswith((".dist-info", ".egg-info")) and head.isidentifier():
                tops.append(head)
            elif not rest and head.endswith((".py", ".so")):
                tops.append(head.split(".")[0])
        for top in dict.fromkeys(tops):
            found.setdefault(top, []).append((dist, files))
    return found

def narrowed(name, candidates):
    parts = name.split(".")
    for count in range(len(parts), 1, -1):
        path = "/".join(parts[:count])
        fitting = [(d, f) for d, f in candidates if any(x.startswith((path + "/", path + ".")) for x in f)]
        if fitting:
            return fitting
    return candidates

known = providers()
answer = {}
for name in json.load(sys.stdin):
    candidates = known.get(name.split(".")[0], [])
    unique = {}
    for dist, _ in narrowed(name, candidates) if len(candidates) > 1 else candidates:
        unique.setdefault(dist.metadata["Name"].lower(), dist)
    answer[name] = [(d.metadata["Name"], d.version, d.read_text("direct_url.json") or "{}") for d in unique.values()]
json.dump({"version": list(sys.version_info[:3]), "found": answer}, sys.stdout)
"""


@dataclass(frozen=True, slots=True)
class Package:
    """An installed distribution. `url` is where it came from if not from an index; `local` a folder of this machine."""

    name: str
    version: str
    url: str = ""
    local: str = ""


@dataclass(frozen=True, slots=True)
class Installed:
    """What the interpreter `python` has for each name that was asked for."""

    python: str
    version: tuple[int, int]
    packages: Mapping[str, tuple[Package, ...]]

    @property
    def at_least(self) -> str:
        """The pinned versions were made for this Python; newer ones may have wheels of them, too."""
        return f">={self.version[0]}.{self.version[1]}"


def find_installed(names: Iterable[str], environ: Mapping[str, str] = os.environ) -> Installed:
    """The packages behind these dotted names. UsageError if the interpreter does not answer."""
    python = _interpreter(environ)
    clean = {name: value for name, value in environ.items() if name != "PYTHONPATH" and not name.startswith("MESHQ_")}
    try:
        done = subprocess.run(
            [python, "-I", "-c", QUESTION],
            input=json.dumps(list(names)), env=clean, capture_output=True, text=True, check=False, timeout=ASK_SECONDS,
        )  # fmt: skip
        if done.returncode != 0:
            raise ValueError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}")
        answer = json.loads(done.stdout[:OUTPUT_BYTES_MAX])
        found = {name: tuple(_package(*each) for each in packages) for name, packages in answer["found"].items()}
        return Installed(python, (answer["version"][0], answer["version"][1]), found)
    except (OSError, ValueError, KeyError, TypeError, subprocess.TimeoutExpired) as error:
        raise UsageError(
            f"asking {python} what is installed: {error}", "name the requirements with --requirements instead"
        ) from None


def _interpreter(environ: Mapping[str, str]) -> str:
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        python = Path(environ.get(variable, "")) / "bin" / "python"
        if environ.get(variable) and python.exists():
            return str(python)
    found = shutil.which("python3", path=environ.get("PATH")) or shutil.which("python", path=environ.get("PATH"))
    if found is None:
        raise UsageError("no python3 is on the path, so nobody can say what the script's imports are", "use --requirements")
    return found


def _package(name: str, version: str, direct_url: str) -> Package:
    """PEP 610 says where a package came from that was not chosen from an index by version."""
    origin = json.loads(direct_url)
    url = str(origin.get("url", ""))
    if "dir_info" in origin:
        return Package(name, version, local=url.removeprefix("file://"))
    if vcs := origin.get("vcs_info"):
        return Package(name, version, url=f"{vcs['vcs']}+{url}@{vcs['commit_id']}")
    if url.startswith("https://"):
        return Package(name, version, url=url)
    return Package(name, version)  # a wheel file that somebody had: an index or folder of wheels may have the version
