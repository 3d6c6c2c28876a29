"""Which files a folder is made of: what git knows and does not ignore, or everything but the usual debris.

In a git repository that is the tracked files as they lie there now plus the untracked ones that no rule ignores. The git
command lists them if it is there and willing, else dulwich does. Both only read: no index, no HEAD and no object
is ever written. A repository inside (submodule or not) is listed by its own rules, as an ordinary part of the tree.
Elsewhere a walk takes everything except virtual environments and caches. `.meshqignore` at the top (the syntax of
.gitignore) takes away more in both cases.
"""

import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from meshq.errors import UsageError

IGNORE_FILE: Final = ".meshqignore"
REPOSITORIES_DEEP_MAX: Final = 8  # repositories inside each other
FOLDERS_MAX: Final = 20_000  # of a walk; nobody means to submit more, but a home folder is easily named by mistake
GIT_SECONDS: Final = 120.0
DEBRIS: Final = frozenset(
    {
        ".git", ".hg", ".svn", ".venv", "venv", "node_modules", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache",
        ".tox", ".nox", ".cache", ".ipynb_checkpoints", ".idea", ".vscode", ".eggs", ".hypothesis", ".DS_Store", ".direnv",
    }
)  # fmt: skip
GIT: Final = (
    "git", "-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false", "-c", "core.quotePath=false",
)  # fmt: skip


@dataclass(slots=True)
class Listing:
    """Paths relative to the top, with `/`, in any order and maybe twice; a path may be gone or be a folder."""

    paths: list[bytes] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


class _GitRefuses(Exception):
    """The git command is missing, too old, or distrusts the repository: dulwich lists it instead."""


def repository_of(folder: Path) -> Path | None:
    """The top of the innermost git working tree that holds `folder`."""
    return next((each for each in (folder, *folder.parents) if _is_repository(each)), None)


def list_files(top: Path) -> Listing:
    """The files below `top`. UsageError if a folder can't be read or there are too many of them."""
    listing = Listing()
    if _is_repository(top):
        _list_repository(top, b"", 0, listing)
    else:
        _list_folder(top, listing)
    ignored = _ignored_by(top / IGNORE_FILE)
    listing.paths = [path for path in listing.paths if not ignored(path)]
    return listing


def git_paths(top: Path) -> tuple[list[bytes], list[bytes]]:
    """Tracked and untracked paths by the git command; a repository inside ends in `/` or is the path of a folder."""
    return _git(top, "--cached"), _git(top, "--others", "--exclude-standard")


def dulwich_paths(top: Path) -> tuple[list[bytes], list[bytes]]:
    """The same by dulwich. An index that it can't read counts as empty. UsageError if this is no repository after all."""
    from dulwich.errors import ChecksumMismatch, NotGitRepository
    from dulwich.ignore import IgnoreFilterManager
    from dulwich.repo import Repo

    try:
        opened = Repo(str(top))
    except (NotGitRepository, ValueError, OSError) as error:
        raise UsageError(f"{top / '.git'} leads to no repository: {error}", "repair it, or remove it") from None
    with opened as repository:
        try:
            tracked = list(repository.open_index())
        except (FileNotFoundError, ChecksumMismatch):
            tracked = []  # a new repository has none; a split index is not supported
        manager = IgnoreFilterManager.from_repo(repository)
        untracked = list(_walk_untracked(top, b"", lambda path: bool(manager.is_ignored(os.fsdecode(path)))))
    known = set(tracked)
    return tracked, [path for path in untracked if path.rstrip(b"/") not in known]


def _list_repository(top: Path, prefix: bytes, depth: int, listing: Listing) -> None:
    try:
        tracked, untracked = git_paths(top)
    except _GitRefuses:
        tracked, untracked = dulwich_paths(top)
    listing.paths += (prefix + path for path in tracked)
    listing.paths += (prefix + path for path in _without_debris(top, untracked) if not path.endswith(b"/"))
    inner = {path.rstrip(b"/") for path in (*tracked, *untracked) if _is_folder(top, path)}
    for path in sorted(inner):
        folder = top / os.fsdecode(path)
        if not _is_repository(folder):
            if path in tracked and not any(folder.iterdir()):
                listing.warnings.append(
                    f"the submodule {os.fsdecode(prefix + path)} is not checked out, so it stays behind; "
                    "`git submodule update --init` would fill it"
                )
        elif depth < REPOSITORIES_DEEP_MAX:
            _list_repository(folder, prefix + path + b"/", depth + 1, listing)


def _list_folder(top: Path, listing: Listing) -> None:
    for path in _walk_untracked(top, b"", lambda path: _is_debris(top, path)):
        if path.endswith(b"/"):
            _list_repository(top / os.fsdecode(path), path, 1, listing)
        else:
            listing.paths.append(path)


def _walk_untracked(top: Path, prefix: bytes, skipped: Callable[[bytes], bool]) -> Iterator[bytes]:
    """Files below `top` that are not skipped, and repositories (as `path/`). `skipped` is asked for folders as `path/`."""
    left = [prefix]
    folders = 0
    while left:
        prefix = left.pop()
        folders += 1
        if folders > FOLDERS_MAX:
            raise UsageError(f"{top} has more than {FOLDERS_MAX} folders", "put the script into a folder of its own")
        for entry in _entries(os.path.join(os.fsencode(top), prefix)):
            path = prefix + entry.name
            if entry.name == b".git":
                continue
            if not entry.is_dir(follow_symlinks=False):
                if not skipped(path):
                    yield path
            elif not skipped(path + b"/"):
                if _is_repository(Path(os.fsdecode(entry.path))):
                    yield path + b"/"
                else:
                    left.append(path + b"/")


def _entries(folder: bytes) -> list[os.DirEntry[bytes]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UsageError(
            f"reading the folder {os.fsdecode(folder)}: {error.strerror}", f"make it readable or name it in {IGNORE_FILE}"
        ) from None


def _without_debris(top: Path, paths: list[bytes]) -> Iterator[bytes]:
    """Without virtual environments and byte code, which many repositories forget to ignore."""
    memory: dict[bytes, bool] = {}

    def inside_debris(folder: bytes) -> bool:
        if not folder:
            return False
        if folder not in memory:
            memory[folder] = inside_debris(os.path.dirname(folder)) or _is_debris(top, folder + b"/", always=False)
        return memory[folder]

    return (path for path in paths if not inside_debris(os.path.dirname(path.rstrip(b"/"))))


def _is_debris(top: Path, path: bytes, always: bool = True) -> bool:
    """A cache or a virtual environment. `always` goes by the usual names, too, not only by what is certain."""
    name = os.path.basename(path.rstrip(b"/"))
    certain = name == b"__pycache__" or (path.endswith(b"/") and (top / os.fsdecode(path) / "pyvenv.cfg").exists())
    return certain or (always and os.fsdecode(name) in DEBRIS)


def _is_repository(folder: Path) -> bool:
    """Has it a `.git` that leads to a repository? A submodule and a linked working tree have a file there."""
    git = folder / ".git"
    try:
        return git.is_file() or (git / "HEAD").exists()
    except OSError:
        return False


def _is_folder(top: Path, path: bytes) -> bool:
    full = os.path.join(os.fsencode(top), path.rstrip(b"/"))
    return os.path.isdir(full) and not os.path.islink(full)


def _git(top: Path, *options: str) -> list[bytes]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environ |= {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            [*GIT, "-C", str(top), "ls-files", "-z", *options],
            env=environ, capture_output=True, check=False, timeout=GIT_SECONDS, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _GitRefuses from error
    if done.returncode != 0:
        raise _GitRefuses
    return [path for path in done.stdout.split(b"\0") if path]


def _ignored_by(file: Path) -> Callable[[bytes], bool]:
    """Whether a path, or a folder above it, is named by this file."""
    if not file.is_file():
        return lambda path: False
    from dulwich.ignore import IgnoreFilter

    rules = IgnoreFilter.from_path(str(file))
    memory: dict[bytes, bool] = {b"": False}

    def ignored(path: bytes) -> bool:
        if path not in memory:
            above = os.path.dirname(path.rstrip(b"/"))
            memory[path] = ignored(above + b"/" if above else b"") or bool(rules.is_ignored(os.fsdecode(path)))
        return memory[path]

    return ignored
