"""The submitted files as git objects, without writing anything near them.

What is taken: of a script in a git repository the whole repository as it lies there now (see `listing`); of a script that
imports modules beside it their folder; of any other script itself; of a command with `--workdir`, or one of whose words
names something below the current folder, the same as if that folder were named by `--workdir`; of any other command nothing.

What you see is what runs: files go byte for byte as they lie in the working tree. Git's own snapshot would put them through
the filters of the repository, and the other machine would get the pointers of Git LFS or the ciphertext of git-crypt. So
contents are hashed here, which also leaves index, HEAD and object store untouched by construction. Without filters
the tree is the one that `git add -A && git write-tree` would make, except that repositories inside are there as files, not
as the name of a commit that nobody else has. The commit has no parents, author or time: equal files give an equal id,
and only what the receiver lacks is read a second time and sent.
"""

import os
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from meshq import config
from meshq.errors import UsageError
from meshq.gitobjects import (
    BLOB,
    COMMIT,
    MODE_EXECUTABLE,
    MODE_FILE,
    MODE_FOLDER,
    MODE_SYMLINK,
    TREE,
    Entry,
    encode_commit,
    encode_tree,
    object_id,
    symlink_stays,
)
from meshq.ids import ObjectId
from meshq.submit import imports, listing
from meshq.submit.cache import cache_folder
from meshq.submit.hashes import Hashes, changed, read_file

NAMED_MAX: Final = 5  # examples in a message


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much one submit may carry."""

    file_bytes: int = config.SOURCE_FILE_BYTES_MAX
    total_bytes: int = config.SOURCE_BYTES_MAX
    files: int = config.SOURCE_FILES_MAX


@dataclass(frozen=True, slots=True)
class Made:
    """An object that exists only here: a folder or the commit."""

    kind: int
    content: bytes


@dataclass(frozen=True, slots=True)
class File:
    """An object whose content lies in a file, or in the target of a link, and is read when it is sent."""

    path: bytes
    size: int
    link: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What is submitted. `commit` is None if there are no files; `script` is relative to `folder`, "" for a command."""

    commit: ObjectId | None = None
    folder: str = ""
    script: str = ""
    objects: Mapping[ObjectId, Made | File] = field(default_factory=dict)
    top: Path | None = None  # where the files lie here
    files: int = 0
    bytes_total: int = 0
    warnings: tuple[str, ...] = ()

    def read(self, ids: Iterable[ObjectId]) -> Iterator[tuple[int, bytes]]:
        """Kind and content of these objects. UsageError if a file is no longer what was hashed."""
        for each in ids:
            match self.objects[each]:
                case Made(kind, content):
                    yield kind, content
                case File(path, size, link):
                    content = os.readlink(path) if link else read_file(path, size)
                    if object_id(BLOB, content) != each:
                        raise changed(os.fsdecode(path))
                    yield BLOB, content


@dataclass(frozen=True, slots=True)
class _Scope:
    """Where the files lie, where the task starts, and which of the files to take (None: all that are listed)."""

    top: Path
    folder: Path
    script: Path | None
    only: tuple[Path, ...] | None = None
    named: tuple[Path, ...] = ()  # by the words of a command
    notes: tuple[str, ...] = ()


def snapshot(
    script: Path | None,
    workdir: Path | None,
    *,
    command: Sequence[str] = (),
    limits: Limits | None = None,
    cwd: Path | None = None,
    cache: Path | None = None,
) -> Snapshot:
    """The snapshot that `submit SCRIPT --workdir WORKDIR`, typed in `cwd`, stands for. UsageError if there can't be one.

    Without a script it is that of `submit --workdir WORKDIR -- COMMAND…`.
    """
    here = (cwd or Path.cwd()).resolve()
    if script is None and workdir is None:
        scope = _scope_of_command(command, here)
    else:
        scope = _scope(None if script is None else (here / script).resolve(), workdir and (here / workdir).resolve(), here)
    if scope is None:
        return Snapshot(warnings=_nothing_goes(command, here))
    builder = _Builder(scope.top, limits or Limits(), Hashes(scope.top, cache or cache_folder()))
    builder.warnings += scope.notes
    if scope.only is None:
        listed = listing.list_files(scope.top)
        builder.warnings += listed.warnings
        needed = (*_needed(scope.script, scope.top), *scope.named)
        paths = {*listed.paths, *_relative_paths(needed, scope.top)}
        builder.add(sorted(_without_home(paths, scope.top)))
    else:
        builder.add(sorted(_relative_paths(scope.only, scope.top)))
    return builder.finish(scope)


def _scope(script: Path | None, workdir: Path | None, here: Path) -> _Scope:
    if workdir is not None:
        return _chosen_scope(script, workdir)
    assert script is not None
    folder = script.parent
    top = listing.repository_of(folder)
    if top is not None:  # started where it was submitted, if that is a place in the repository
        inside = here.is_relative_to(top) and script.is_relative_to(here)
        return _Scope(top, here if inside else folder, script)
    modules = imports.scan(script).local
    if not modules:
        return _Scope(folder, folder, script, (script,))
    return _Scope(folder, folder, script, (script, *modules) if _is_everybodys(folder) else None)


def _chosen_scope(script: Path | None, workdir: Path) -> _Scope:
    if not workdir.is_dir():
        raise UsageError(f"--workdir: {workdir} is no folder", "name an existing folder that holds what the task needs")
    top = listing.repository_of(workdir) or workdir
    if script is not None and not script.is_relative_to(workdir):
        raise UsageError(f"--workdir: {script} does not lie in {workdir}", "name a folder that holds the script")
    return _Scope(top, workdir, script)


def _scope_of_command(command: Sequence[str], here: Path) -> _Scope | None:
    """The current folder, if one of the words names something in it."""
    named = dict(_named_below(command, here))
    files = tuple(path for path in named.values() if path.is_file())
    top = listing.repository_of(here)
    if top is None and _is_everybodys(here):
        return _Scope(here, here, None, files, notes=(f"of {here} only what the command names goes along",)) if files else None
    if not named:
        return None
    listed = ", ".join(f"`{word}`" for word in list(named)[:NAMED_MAX])
    return _Scope(top or here, here, None, named=files, notes=(f"{top or here} goes along, for the command names {listed}",))


def _named_below(command: Sequence[str], here: Path) -> Iterator[tuple[str, Path]]:
    """The words that are relative paths of what exists, also behind `=`, and those behind `-m` that are modules there."""
    for before, word in zip(("", *command), command, strict=False):
        module = word.replace(".", "/") if before == "-m" else ""
        for text in (word, word.partition("=")[2], module, module and f"{module}.py"):
            path = here / text
            if text and not os.path.isabs(text) and _exists(path) and path.resolve().is_relative_to(here):
                yield word, Path(os.path.normpath(path))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a word may be too long for a name, or hold a zero byte
        return False


def _nothing_goes(command: Sequence[str], here: Path) -> tuple[str, ...]:
    """What to say where the command might have wanted the files around it."""
    if not command or os.path.isabs(command[0]) or _is_everybodys(here):
        return ()
    try:
        with os.scandir(here) as entries:
            if not any(entry.is_file() for entry in entries):
                return ()
    except OSError:
        return ()
    return ("nothing of this folder is sent; `--workdir .` takes it along",)


def _is_everybodys(folder: Path) -> bool:
    """A home or temporary folder: only what the script imports is meant, not all that happens to lie there."""
    return folder in (Path.home().resolve(), Path(tempfile.gettempdir()).resolve(), Path(folder.anchor))


def _needed(script: Path | None, top: Path) -> Iterator[Path]:
    """The script and what it imports go even if they are ignored: without them nothing would run."""
    if script is not None:
        yield script
        yield from (path for path in imports.scan(script).local if path.is_relative_to(top))


def _without_home(paths: Iterable[bytes], top: Path) -> Iterator[bytes]:
    """The home of the agent holds the mesh key: it never travels, wherever somebody has put it."""
    home = config.home_from_environment().root.resolve()
    inside = os.fsencode(home.relative_to(top)) + b"/" if home.is_relative_to(top) else b"/"
    return (path for path in paths if not path.startswith(inside))


def _relative_paths(paths: Iterable[Path], top: Path) -> set[bytes]:
    return {os.fsencode(path.relative_to(top)) for path in paths}


class _Builder:
    """Collects files, then makes folders and the commit of them."""

    def __init__(self, top: Path, limits: Limits, hashes: Hashes) -> None:
        self.warnings: list[str] = []
        self._top = os.fsencode(top)
        self._limits = limits
        self._hashes = hashes
        self._objects: dict[ObjectId, Made | File] = {}
        self._folders: dict[bytes, dict[bytes, Entry]] = {b"": {}}
        self._real: dict[bytes, bool] = {b"": True}
        self._files = 0
        self._bytes = 0

    def add(self, paths: list[bytes]) -> None:
        """Take these files, given relative to the top. Sizes are checked before anything is read."""
        found = [(path, status) for path in paths if (status := self._status(path)) is not None]
        self._check(found)
        for path, status in found:
            if stat.S_ISLNK(status.st_mode):
                self._add_link(path)
            else:
                mode = MODE_EXECUTABLE if status.st_mode & stat.S_IXUSR else MODE_FILE
                full = os.path.join(self._top, path)
                self._put(path, mode, self._hashes.id_of(full, path, status), File(full, status.st_size, link=False))
        self._hashes.save()

    def finish(self, scope: _Scope) -> Snapshot:
        commit = encode_commit(self._tree())
        commit_id = object_id(COMMIT, commit)
        self._objects[commit_id] = Made(COMMIT, commit)
        return Snapshot(
            commit=commit_id,
            folder=_shown(scope.folder, scope.top),
            script="" if scope.script is None else _shown(scope.script, scope.folder),
            objects=self._objects,
            top=scope.top,
            files=self._files,
            bytes_total=self._bytes,
            warnings=tuple(self.warnings),
        )

    def _status(self, path: bytes) -> os.stat_result | None:
        """What lies there; None for what is gone, a folder, or reached only through a link."""
        try:
            status = os.lstat(os.path.join(self._top, path))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise UsageError(f"reading {os.fsdecode(path)}: {error.strerror}", "make it readable or ignore it") from None
        if not self._is_real_folder(os.path.dirname(path)) or stat.S_ISDIR(status.st_mode):
            return None
        if stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode):
            return status
        self.warnings.append(f"{os.fsdecode(path)} is no file (a pipe, socket or device): left out")
        return None

    def _is_real_folder(self, path: bytes) -> bool:
        """A tracked folder may have been replaced by a link; what lies behind it is not part of the tree."""
        if path not in self._real:
            real = stat.S_ISDIR(os.lstat(os.path.join(self._top, path)).st_mode)
            self._real[path] = real and self._is_real_folder(os.path.dirname(path))
        return self._real[path]

    def _check(self, found: list[tuple[bytes, os.stat_result]]) -> None:
        limits = self._limits
        hint = "name it in .gitignore or .meshqignore; data is better read from where it lies than sent with each task"
        sizes = sorted(((status.st_size, path) for path, status in found), reverse=True)
        named = ", ".join(f"{os.fsdecode(path)} ({_size(size)})" for size, path in sizes[:NAMED_MAX])
        if large := [path for size, path in sizes if size > limits.file_bytes]:
            named = ", ".join(f"{os.fsdecode(path)} ({_size(size)})" for size, path in sizes[: min(len(large), NAMED_MAX)])
            raise UsageError(f"too big to submit: {named}; one file may have {_size(limits.file_bytes)}", hint)
        if len(found) > limits.files:
            folders = _crowded(path for path, _ in found)
            raise UsageError(
                f"{os.fsdecode(self._top)} has {len(found)} files where {limits.files} may be submitted; most are in {folders}",
                hint,
            )
        if (total := sum(size for size, _ in sizes)) > limits.total_bytes:
            raise UsageError(
                f"{os.fsdecode(self._top)} has {_size(total)} where {_size(limits.total_bytes)} may be submitted; "
                f"the largest: {named}", hint
            )  # fmt: skip
        self._files, self._bytes = len(found), total

    def _add_link(self, path: bytes) -> None:
        full = os.path.join(self._top, path)
        target = os.readlink(full)
        if symlink_stays(target, path.count(b"/")):
            self._put(path, MODE_SYMLINK, object_id(BLOB, target), File(full, len(target), link=True))
        else:
            self._files -= 1
            self.warnings.append(
                f"the link {os.fsdecode(path)} -> {os.fsdecode(target)} leaves {os.fsdecode(self._top)}: left out"
            )

    def _put(self, path: bytes, mode: int, each: ObjectId, item: File) -> None:
        folder, _, name = path.rpartition(b"/")
        self._folder(folder)[name] = Entry(mode, name, each)
        self._objects.setdefault(each, item)

    def _folder(self, path: bytes) -> dict[bytes, Entry]:
        if path not in self._folders:
            self._folders[path] = {}
            self._folder(os.path.dirname(path))
        return self._folders[path]

    def _tree(self) -> ObjectId:
        """Make the folders' objects, those with the longest paths first, so that each finds its children named."""
        for folder in sorted(self._folders, key=lambda path: (path.count(b"/"), path != b""), reverse=True):
            content = encode_tree(self._folders[folder].values())
            each = object_id(TREE, content)
            self._objects[each] = Made(TREE, content)
            if folder:
                above, _, name = folder.rpartition(b"/")
                self._folders[above][name] = Entry(MODE_FOLDER, name, each)
        return each


def _shown(path: Path, folder: Path) -> str:
    """A path for the task's description: relative, and "" for the folder itself."""
    text = str(path.relative_to(folder))
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(
            f"the path {os.fsencode(path)!r} is not UTF-8", "rename it: the others could not even spell it"
        ) from None
    return "" if text == "." else text


def _size(count: int) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count = count // 1024 if count >= 10 * 1024 else round(count / 1024)
    return f"{count} {unit}"


def _crowded(paths: Iterable[bytes]) -> str:
    counts: dict[bytes, int] = {}
    for path in paths:
        first = path.partition(b"/")[0] if b"/" in path else b"."
        counts[first] = counts.get(first, 0) + 1
    top = sorted(counts.items(), key=lambda item: -item[1])[:NAMED_MAX]
    return ", ".join(f"{os.fsdecode(name)} ({count})" for name, count in top)
