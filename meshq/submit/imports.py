"""What a script imports: modules that lie beside it, and packages that must be installed.

Only the syntax tree is read; nothing is run. Imports for type checkers don't count. An import in a function, or in a `try`
that handles something else, is late: it may never come to it. One that may fail (in a `try` that handles it) is optional:
wanted if it is installed here, else not missed. What a module imports comes no sooner than the module itself.
"""

import ast
import sys
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Final

LOCAL_FILES_MAX: Final = 2_000
IMPORT_ERRORS: Final = frozenset({"ImportError", "ModuleNotFoundError", "Exception", "BaseException"})


@dataclass(slots=True)
class Scan:
    """`needed`, `late` and `optional`: dotted names of modules, neither local nor of the standard library, and where."""

    local: list[Path] = field(default_factory=list)
    needed: dict[str, str] = field(default_factory=dict)
    late: dict[str, str] = field(default_factory=dict)
    optional: dict[str, str] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)  # files that this Python can't parse, with the reason


class _Kind(IntEnum):
    """How much an import is wanted: the greater, the less."""

    NEEDED = 0
    LATE = 1
    OPTIONAL = 2


@dataclass(frozen=True, slots=True)
class _Import:
    module: str  # dotted; "" for `from . import x`
    names: tuple[str, ...]  # what `from module import` names: perhaps modules themselves
    level: int
    line: int
    kind: _Kind


def scan(script: Path) -> Scan:
    """Follow the imports of `script` through the modules beside it. A file that is no Python is listed as unread."""
    result = Scan()
    top = script.parent
    left: dict[_Kind, list[Path]] = {kind: [] for kind in _Kind}
    left[_Kind.NEEDED].append(script)
    seen: set[Path] = set()
    while (kind := next((kind for kind in _Kind if left[kind]), None)) is not None and len(seen) <= LOCAL_FILES_MAX:
        file = left[kind].pop()
        if file in seen:
            continue
        seen.add(file)
        for each in _imports_of(file, kind, result):
            files = list(_local_files(each, file, top))
            if not files and each.level == 0:
                _note(each, file, result)
            left[each.kind] += files
    result.local = sorted(seen - {script})
    return result


def _imports_of(file: Path, kind: _Kind, result: Scan) -> list[_Import]:
    try:
        with tokenize.open(file) as source:
            tree = ast.parse(source.read(), str(file))
    except (SyntaxError, ValueError, OSError, RecursionError) as error:
        result.unread.append(f"{file.name}: {error}")
        return []
    return list(_walk(tree, kind))


def _note(each: _Import, file: Path, result: Scan) -> None:
    if each.module.split(".")[0] in sys.stdlib_module_names:
        return
    target = (result.needed, result.late, result.optional)[each.kind]
    # `from google.cloud import storage`: only the longer name says which package it is
    for name in [f"{each.module}.{name}" for name in each.names] or [each.module]:
        target.setdefault(name, f"{file.name}:{each.line}")


def _walk(node: ast.AST, kind: _Kind) -> Iterator[_Import]:
    match node:
        case ast.Import(names=aliases):
            yield from (_Import(alias.name, (), 0, node.lineno, kind) for alias in aliases)
        case ast.ImportFrom(module=module, names=aliases, level=level):
            names = tuple(alias.name for alias in aliases if alias.name != "*")
            yield _Import(module or "", names, level, node.lineno, kind)
        case _:
            if isinstance(node, ast.Call) and (name := _imported_by_call(node)):
                yield _Import(name, (), 0, node.lineno, kind)
            for child, least in _inside(node):
                yield from _walk(child, max(kind, least))


def _inside(node: ast.AST) -> Iterator[tuple[ast.AST, _Kind]]:
    """What stands in this node, and how much an import there is wanted at most."""
    least = _Kind.NEEDED
    match node:
        case ast.Try(finalbody=sure) | ast.TryStar(finalbody=sure):
            yield from ((child, _Kind.NEEDED) for child in sure)
            parts: Iterable[ast.AST] = (*node.body, *node.handlers, *node.orelse)
            least = _Kind.OPTIONAL if _may_fail(node) else _Kind.LATE
        case ast.If(test=test, orelse=other) if _is_type_checking(test):
            parts = other
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
            parts = ast.iter_child_nodes(node)
            least = _Kind.LATE
        case _:
            parts = ast.iter_child_nodes(node)
    yield from ((child, least) for child in parts)


def _may_fail(node: ast.Try | ast.TryStar) -> bool:
    for handler in node.handlers:
        kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
        if any(kind is None or _last_name(kind) in IMPORT_ERRORS for kind in kinds):
            return True
    return False


def _is_type_checking(test: ast.expr) -> bool:
    return _last_name(test) == "TYPE_CHECKING"


def _last_name(node: ast.expr) -> str:
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
        case _:
            return ""


def _imported_by_call(node: ast.Call) -> str:
    """The name in `importlib.import_module("name")` and `__import__("name")`."""
    match node:
        case ast.Call(func=func, args=[ast.Constant(value=str(name)), *_]) if _last_name(func) in (
            "import_module",
            "__import__",
        ):
            return "" if name.startswith(".") else name
        case _:
            return ""


def _local_files(each: _Import, file: Path, top: Path) -> Iterator[Path]:
    """The files that Python would load for this import from the script's folder."""
    base = top
    if each.level:
        base = file.parent
        for _ in range(each.level - 1):
            base = base.parent
    parts = tuple(part for part in each.module.split(".") if part)
    found = list(_files_of(base, parts))
    for name in each.names:
        found += _files_of(base, (*parts, name))
    yield from dict.fromkeys(path for path in found if path.is_relative_to(top))


def _files_of(base: Path, parts: tuple[str, ...]) -> Iterator[Path]:
    """The module of this dotted name and the packages that it lies in."""
    for count in range(1, len(parts) + 1):
        place = base.joinpath(*parts[:count])
        candidates = (place / "__init__.py", place.with_name(place.name + ".py"))
        if (path := next((path for path in candidates if path.is_file()), None)) is not None:
            yield path
        elif not place.is_dir():
            return
