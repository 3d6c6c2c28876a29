"""What a script needs installed, found where people write it down, else read off its imports.

In this order: `--requirements`; the script's own metadata (PEP 723); the nearest of `uv.lock`, `pylock.toml`, a
`pyproject.toml` with dependencies, `requirements.txt`, from the script's folder up to the top of what is submitted; else
the imports, resolved to the very versions in the environment that the person works in. A name that is neither installed
there nor well known is asked for, never guessed: a guess installs whatever somebody has registered under that name. Only an
import that the script may never come to is no reason to stop: a note names it.
"""

import os
import re
import subprocess
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from meshq.errors import UsageError
from meshq.packages import has_credentials, uv_binary, uv_environment
from meshq.submit import imports
from meshq.submit.installed import Installed, find_installed

INCLUDES_DEEP_MAX: Final = 8
FILE_BYTES_MAX: Final = 4 * 2**20
EXPORT_SECONDS: Final = 60.0
DECLARE: Final = "name what it needs in a file and pass it with --requirements"
_METADATA: Final = re.compile(r"^# /// script\s*$\n((?:^#(?: .*)?$\n)+?)^# ///\s*$", re.MULTILINE)
_INCLUDE: Final = re.compile(r"(?:-r|--requirement)[ =]*(\S+)")
_CONSTRAINT: Final = re.compile(r"(?:-c|--constraint)[ =]*(\S+)")
_LOCAL: Final = re.compile(r"(?:-e|--editable)\b|\.{0,2}/|.*@\s*file:|file:")
_COMMENT: Final = re.compile(r"(^|\s+)#.*$")
_INDEX_OPTION: Final = re.compile(r"(?:-i|--index-url|--extra-index-url|-f|--find-links|--no-index)\b")
_BUILD_LABEL: Final = re.compile(r"\+(cpu|cu\d+|rocm[\d.]+|xpu)$")  # one build of a version for some hardware

WELL_KNOWN: Final[Mapping[str, str]] = {
    "PIL": "pillow", "OpenSSL": "pyopenssl", "Crypto": "pycryptodome", "attr": "attrs", "bs4": "beautifulsoup4",
    "cv2": "opencv-python-headless", "dateutil": "python-dateutil", "dotenv": "python-dotenv", "fitz": "pymupdf",
    "git": "gitpython", "google.protobuf": "protobuf", "jwt": "pyjwt", "magic": "python-magic",
    "mpl_toolkits": "matplotlib", "pkg_resources": "setuptools", "psycopg2": "psycopg2-binary",
    "pynvml": "nvidia-ml-py", "serial": "pyserial", "skimage": "scikit-image", "sklearn": "scikit-learn",
    "umap": "umap-learn", "usb": "pyusb", "yaml": "pyyaml", "zmq": "pyzmq", "hydra": "hydra-core", "gi": "pygobject",
    "Bio": "biopython", "docx": "python-docx", "pptx": "python-pptx", "faiss": "faiss-cpu",
} | {
    name: name.replace("_", "-")
    for name in (
        "accelerate", "aiohttp", "attrs", "catboost", "click", "datasets", "diffusers", "einops", "fastapi", "flask",
        "flax", "h5py", "httpx", "jax", "joblib", "keras", "lightgbm", "lightning", "matplotlib", "mlflow", "networkx",
        "nltk", "numba", "numpy", "omegaconf", "onnx", "onnxruntime", "optuna", "pandas", "peft", "plotly", "polars",
        "psutil", "pyarrow", "pydantic", "pytest", "pytorch_lightning", "requests", "rich", "safetensors", "scipy",
        "seaborn", "sentencepiece", "six", "spacy", "statsmodels", "sympy", "tensorboard", "tensorflow", "timm",
        "tokenizers", "torch", "torchaudio", "torchvision", "tqdm", "transformers", "typer", "typing_extensions", "wandb",
        "xarray", "xgboost",
    )
}  # fmt: skip
"""Names of modules whose package nobody doubts, for machines where it is not installed."""


@dataclass(frozen=True, slots=True)
class Requirements:
    """Lines as in requirements.txt, the versions of Python that will do ("": any), and where that is written, for people.

    `folder` is where relative paths in the lines start.
    """

    lines: tuple[str, ...]
    python: str
    origin: str
    folder: Path | None = None
    notes: tuple[str, ...] = ()


def find_requirements(
    script: Path, top: Path | None, chosen: Path | None = None, *, environ: Mapping[str, str] = os.environ
) -> Requirements:
    """What `script` needs; `top` is the folder that is submitted. UsageError names the file and line that make no sense."""
    if chosen is not None:
        if not chosen.is_file():
            raise UsageError(f"--requirements: {chosen} is no file", "name a requirements.txt, a pyproject.toml or a lock file")
        return from_file(chosen)
    if (metadata := _from_metadata(script)) is not None:
        return metadata
    for folder in _folders(script.parent, top):
        if (declared := _from_folder(folder)) is not None:
            return declared
    return _from_imports(script, environ)


def _folders(start: Path, top: Path | None) -> Iterable[Path]:
    yield start
    if top is not None and start.is_relative_to(top):
        yield from (folder for folder in start.parents if folder.is_relative_to(top))


def _from_folder(folder: Path) -> Requirements | None:
    project = folder / "pyproject.toml"
    if project.is_file() and (folder / "uv.lock").is_file():
        return _from_uv_lock(folder)
    if (folder / "pylock.toml").is_file():
        return _from_pylock(folder / "pylock.toml")
    if project.is_file() and "dependencies" in _table(_toml(project), "project"):
        return _from_project(project)
    if (folder / "requirements.txt").is_file():
        return _from_text(folder / "requirements.txt")
    return None


def from_file(path: Path) -> Requirements:
    """What this file declares; its name says how to read it. UsageError if it can't be read."""
    match path.name:
        case "pyproject.toml":
            return _from_project(path)
        case "uv.lock":
            return _from_uv_lock(path.parent)
        case name if name.startswith("pylock.") and name.endswith(".toml"):
            return _from_pylock(path)
        case name if name.endswith((".toml", ".lock", ".yml", ".yaml", ".json")):
            raise UsageError(
                f"--requirements: {path} is in a format that meshq can't read",
                "requirements.txt, pyproject.toml, uv.lock and pylock.toml can be read",
            )
        case _:
            return _from_text(path)


# ---- files that declare requirements


def _from_metadata(script: Path) -> Requirements | None:
    """The block `# /// script` of PEP 723, if the script has one."""
    blocks = _METADATA.findall(_read(script).replace("\r\n", "\n") + "\n")
    if not blocks:
        return None
    if len(blocks) > 1:
        raise UsageError(f"{script.name} has more than one `# /// script` block", "keep one")
    text = "".join(line.removeprefix("#").removeprefix(" ") for line in blocks[0].splitlines(keepends=True))
    table = _parse(text, f"the metadata of {script.name}")
    lines = _strings(table, "dependencies", script.name)
    python = str(table.get("requires-python", ""))
    return _checked(_indexes(table) + lines, python, f"the metadata of {script.name}", script.parent)


def _from_project(path: Path) -> Requirements:
    table = _toml(path)
    project = _table(table, "project")
    if not project:
        raise UsageError(f"{path} has no [project] table", DECLARE)
    lines = _strings(project, "dependencies", path.name)
    return _checked(_indexes(table) + lines, str(project.get("requires-python", "")), path.name, path.parent)


def _from_uv_lock(folder: Path) -> Requirements:
    """What uv locked for the project, without its development groups and without the project itself."""
    command = [
        uv_binary(), "export", "--frozen", "--no-dev", "--no-emit-project", "--no-emit-local",
        "--no-header", "--no-annotate", "--no-hashes", "--quiet", "--directory", str(folder),
    ]  # fmt: skip
    done = subprocess.run(command, env=uv_environment(), capture_output=True, text=True, check=False, timeout=EXPORT_SECONDS)
    if done.returncode != 0:
        raise UsageError(f"reading {folder / 'uv.lock'}: {' '.join(done.stderr.split())}", "run `uv lock` there")
    table = _toml(folder / "pyproject.toml")
    python = str(_table(table, "project").get("requires-python", ""))
    return _checked(_indexes(table) + done.stdout.splitlines(), python, "uv.lock", folder)


def _from_pylock(path: Path) -> Requirements:
    """The packages of a PEP 751 lock, pinned."""
    table = _toml(path)
    lines: list[str] = []
    for package in table.get("packages", []):
        name, version, vcs = package.get("name"), package.get("version"), package.get("vcs", {})
        marker = f" ; {package['marker']}" if "marker" in package else ""
        if "commit-id" in vcs and "url" in vcs:
            lines.append(f"{name} @ {vcs.get('type', 'git')}+{vcs['url']}@{vcs['commit-id']}{marker}")
        elif name and version and "directory" not in package and "archive" not in package:
            lines.append(f"{name}=={version}{marker}")
        else:
            raise UsageError(f"{path.name}: {name} has no version that another machine could install", DECLARE)
    return _checked(lines, str(table.get("requires-python", "")), path.name, path.parent)


def _from_text(path: Path) -> Requirements:
    return _checked(_flat(path, 0), "", path.name, path.parent)


def _flat(path: Path, depth: int) -> list[str]:
    """The lines of a requirements.txt with the files that it includes, without comments and continuations."""
    if depth > INCLUDES_DEEP_MAX:
        raise UsageError(f"{path} includes itself", "remove the -r that closes the circle")
    lines: list[str] = []
    for raw in re.sub(r"\\\r?\n", " ", _read(path)).splitlines():
        line = re.sub(r"\s+--hash[ =]\S+", "", _COMMENT.sub("", raw)).strip()
        if match := _INCLUDE.fullmatch(line):
            lines += _flat(path.parent / match[1], depth + 1)
        elif match := _CONSTRAINT.fullmatch(line):
            lines.append(f"-c {(path.parent / match[1]).resolve()}")
        elif line:
            lines.append(line)
    return lines


def _checked(lines: Iterable[str], python: str, origin: str, folder: Path) -> Requirements:
    kept = tuple(line for line in (each.strip() for each in lines) if line and not line.startswith("#"))
    for line in kept:
        if has_credentials(line):
            raise UsageError(
                f"{origin} has a password or token in {line.split('://')[0]}://…, and every machine of the mesh would read it",
                "put it into each machine's pip.conf or ~/.netrc instead",
            )
        local = "://" not in line or "file:" in line if _INDEX_OPTION.match(line) else _LOCAL.match(line)
        if local and line != "--no-index":
            raise UsageError(
                f"{origin}: {line} exists on this machine only", "submit the folder that holds it, and remove the line"
            )
    return Requirements(kept, python, origin, folder)


# ---- imports


def _from_imports(script: Path, environ: Mapping[str, str]) -> Requirements:
    found = imports.scan(script)
    notes = tuple(f"the imports of {each} could not be read" for each in found.unread)
    if not found.needed and not found.late and not found.optional:
        return Requirements((), "", f"{script.name} imports nothing that must be installed", notes=notes)
    installed = find_installed([*found.needed, *found.late, *found.optional], environ)
    lines: set[str] = set()
    unknown: dict[str, str] = {}
    for name, where in found.needed.items():
        if got := _installed_lines(name, installed, where) or _well_known(name):
            lines |= got
        else:
            unknown.setdefault(name.split(".")[0], where)
    if unknown:
        raise UsageError(
            f"cannot tell which package provides {_listed(unknown)}: it is not installed in {installed.python}",
            f"activate the environment in which the script works, or {DECLARE}",
        )
    dispensable, missed = _dispensable(found, installed)
    if missed:
        notes += (f"no package is known for {_listed(missed)}: should the task come to that import, {DECLARE}",)
    origin = f"the imports of {script.name}, with the versions of {installed.python}"
    return Requirements(tuple(sorted(lines | dispensable)), installed.at_least, origin, script.parent, notes)


def _dispensable(found: imports.Scan, installed: Installed) -> tuple[set[str], dict[str, str]]:
    """Lines for the imports that the script may never come to, or can do without; and what a person should know is missing."""
    lines: set[str] = set()
    missed: dict[str, str] = {}
    for name, where in {**found.optional, **found.late}.items():
        try:
            got = _installed_lines(name, installed, where)
        except UsageError:  # only this machine has it: here the script would find it
            missed.setdefault(name.split(".")[0], where)
            continue
        if name in found.late:
            got = got or _well_known(name)
            if not got:
                missed.setdefault(name.split(".")[0], where)
        lines |= got
    return lines, missed


def _listed(names: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({where})" for name, where in sorted(names.items()))


def _installed_lines(name: str, installed: Installed, where: str) -> set[str]:
    lines: set[str] = set()
    for package in installed.packages.get(name, ()):
        if package.local:
            raise UsageError(
                f"{name.split('.')[0]} ({where}) is installed from {package.local}, which only this machine has",
                f"submit from there so that it travels with the script, or {DECLARE}",
            )
        lines.add(
            f"{package.name} @ {package.url}" if package.url else f"{package.name}=={_BUILD_LABEL.sub('', package.version)}"
        )
    return lines


def _well_known(name: str) -> set[str]:
    parts = name.split(".")
    known = next((WELL_KNOWN[key] for key in (".".join(parts[:2]), parts[0]) if key in WELL_KNOWN), None)
    return set() if known is None else {known}


# ---- reading


def _indexes(table: Mapping[str, Any]) -> list[str]:
    """Package indexes that a project names for uv; uv sees only the lines that it is given."""
    listed = _table(_table(table, "tool"), "uv").get("index", [])
    return [f"--extra-index-url {index['url']}" for index in listed if isinstance(index, dict) and "url" in index]


def _strings(table: Mapping[str, Any], key: str, where: str) -> list[str]:
    value = table.get(key, [])
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise UsageError(f"{where}: `{key}` must be a list of strings")
    return value


def _table(table: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = table.get(key, {})
    return value if isinstance(value, dict) else {}


def _toml(path: Path) -> dict[str, Any]:
    return _parse(_read(path), str(path))


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{where} is not valid TOML: {error}") from None


def _read(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
        if len(data) > FILE_BYTES_MAX:
            raise UsageError(
                f"{path} has more than {FILE_BYTES_MAX // 2**20} MiB: that is no list of requirements and no script"
            )
        return data.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"reading {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is no text in UTF-8") from None
