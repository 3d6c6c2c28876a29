"""The rules of the code that a machine can check: who imports whom, how big things get, and what is never called.

A ban is a line in a table: what it forbids, why, where. An exception to a ban is a line in another table, with its
reason. Sizes above the hard limit stand in `ratchet.json` and may only shrink.
"""

import ast
import functools
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import meshq

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "meshq"
FUNCTION_LINES_MAX = 60
MODULE_LINES_MAX = 600
CORES_MAIN = ("meshq.gossip.swim", "meshq.ledger.core", "meshq.exec.worker")
PAGE_PARTS = ("problem", "invariant", "algorithm", "limits", "reading")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def python_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


MODULES = python_files("meshq")
ALL_PYTHON = python_files("meshq", "tests", "scripts", "examples")


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _cores() -> list[Path]:
    """The modules that the import contract of cores names: there is one list, and it stands in pyproject.toml."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    [modules] = [contract["source_modules"] for contract in contracts if contract["name"].startswith("cores touch")]
    return [ROOT / (module.replace(".", "/") + ".py") for module in modules]


CORES = _cores()


# --- who imports whom -----------------------------------------------------------------------------------------------


def test_the_import_contracts_hold() -> None:
    linter = Path(sys.executable).parent / "lint-imports"
    result = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("path", CORES, ids=relative)
def test_a_core_exists_and_never_waits(path: Path) -> None:
    waits = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.AsyncFunctionDef | ast.Await)]
    assert waits == []


@pytest.mark.parametrize("module", CORES_MAIN)
def test_a_core_opens_with_its_page(module: str) -> None:
    page = (ast.get_docstring(tree_of(ROOT / (module.replace(".", "/") + ".py"))) or "").lower()
    assert [part for part in PAGE_PARTS if part not in page] == []


# --- the public surface ---------------------------------------------------------------------------------------------


def test_the_public_names_are_sorted_and_complete() -> None:
    init = tree_of(PACKAGE / "__init__.py")
    bound = {name for statement in init.body for name in _bound_names(statement) if not name.startswith("_")}
    assert list(meshq.__all__) == sorted(meshq.__all__)
    assert bound - set(meshq.__all__) == set()
    for name in meshq.__all__:
        assert getattr(meshq, name) is not None


def _bound_names(statement: ast.stmt) -> Iterator[str]:
    match statement:
        case ast.FunctionDef(name) | ast.AsyncFunctionDef(name) | ast.ClassDef(name):
            yield name
        case ast.ImportFrom(names=names):
            yield from (alias.asname or alias.name for alias in names)
        case ast.Assign(targets=targets):
            yield from (target.id for target in targets if isinstance(target, ast.Name))
        case ast.AnnAssign(target=ast.Name(id=name)):
            yield name
        case _:
            return


@pytest.mark.parametrize("path", [path for path in MODULES if path.read_text().strip()], ids=relative)
def test_a_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(tree_of(path))


# --- sizes ----------------------------------------------------------------------------------------------------------


def _functions(path: Path) -> Iterator[tuple[str, int]]:
    """Each function's name and the lines of its body without its docstring. A signature is a table: one line, one option."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
            yield f"{relative(path)}:{node.name}", (node.end_lineno or 0) - body[0].lineno + 1 if body else 0


def _too_big() -> dict[str, dict[str, int]]:
    functions = {name: lines for path in ALL_PYTHON for name, lines in _functions(path) if lines > FUNCTION_LINES_MAX}
    lines_of = {relative(path): len(path.read_text().splitlines()) for path in ALL_PYTHON}
    return {"functions": functions, "modules": {name: n for name, n in lines_of.items() if n > MODULE_LINES_MAX}}


def test_no_function_and_no_module_outgrows_its_limit() -> None:
    accepted = json.loads((ROOT / "tests" / "ratchet.json").read_text())
    assert _too_big() == accepted, "split what is new or grew; lower in ratchet.json what shrank, remove what is small now"


# --- what is never called -------------------------------------------------------------------------------------------

Found = Callable[[ast.AST], bool]


def dotted(node: ast.AST) -> str:
    """`a.b.c` for names and attributes; a call or anything else in the middle reads as `()`."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=attr):
            return f"{dotted(value)}.{attr}"
        case _:
            return "()"


def imports(*modules: str) -> Found:
    def found(node: ast.AST) -> bool:
        match node:
            case ast.Import(names=names):
                return any(alias.name.split(".")[0] in modules for alias in names)
            case ast.ImportFrom(module=str(module)):
                return module.split(".")[0] in modules
            case _:
                return False

    return found


def calls(*names: str) -> Found:
    return lambda node: isinstance(node, ast.Call) and dotted(node.func) in names


def keyword(name: str, value: object) -> Found:
    def found(node: ast.AST) -> bool:
        match node:
            case ast.keyword(arg=arg, value=ast.Constant(value=given)):
                return arg == name and given is value
            case _:
                return False

    return found


def attribute(name: str) -> Found:
    return lambda node: isinstance(node, ast.Attribute) and node.attr == name


def text_below(*folders: str) -> Found:
    """A string literal that names one of these folders or something in it."""

    def found(node: ast.AST) -> bool:
        match node:
            case ast.Constant(value=str(text)):
                return any(text == folder or text.startswith(f"{folder}/") for folder in folders)
            case _:
                return False

    return found


def imports_name(module: str, name: str) -> Found:
    def found(node: ast.AST) -> bool:
        return isinstance(node, ast.ImportFrom) and node.module == module and any(each.name == name for each in node.names)

    return found


def whole_body_read(node: ast.AST) -> bool:
    """`x.read()`, `x.text()` or `x.json()` without a limit, unless x is a file that was just opened by name."""
    match node:
        case ast.Call(func=ast.Attribute(value=value, attr="read" | "text" | "json"), args=[], keywords=[]):
            return not dotted(value).endswith("file")
        case _:
            return False


def dropped_loop_task(node: ast.AST) -> bool:
    """A loop task that nobody holds: its exception is lost and the collector may end it."""
    match node:
        case ast.Expr(value=ast.Call(func=func)):
            return dotted(func).split(".")[-1] in ("create_task", "ensure_future") and "group" not in dotted(func)
        case _:
            return False


def over_set(node: ast.AST) -> bool:
    match node:
        case ast.For(iter=each) | ast.comprehension(iter=each):
            return isinstance(each, ast.Set | ast.SetComp) or (
                isinstance(each, ast.Call) and dotted(each.func) in ("set", "frozenset")
            )
        case _:
            return False


@dataclass(frozen=True)
class Ban:
    what: str
    why: str
    found: Found
    where: tuple[str, ...] = ("meshq/",)  # beginnings of paths


CORE_PATHS = tuple(relative(path) for path in CORES)

BANS = (
    Ban("pickle", "reading it runs code", imports("pickle", "marshal", "shelve", "dill", "cloudpickle")),
    Ban("eval", "it runs text as code", calls("eval", "exec", "compile", "builtins.eval", "builtins.exec")),
    Ban("archives", "a member's path can leave the folder it is unpacked into", imports("tarfile", "zipfile")),
    Ban("unpack", "a member's path can leave the folder it is unpacked into", calls("shutil.unpack_archive")),
    Ban("shell", "what the user wrote would be read as shell", keyword("shell", True)),
    Ban("system", "what the user wrote would be read as shell", calls("os.system", "os.popen", "subprocess.getoutput")),
    Ban("mktemp", "somebody else can make the file first", calls("tempfile.mktemp")),
    Ban("/tmp", "a predictable name in a folder that everybody writes to", text_below("/tmp", "/var/tmp", "/dev/shm")),
    Ban("no certificate", "the other side could be anybody", attribute("CERT_NONE")),
    Ban("no TLS", "the other side could be anybody", keyword("ssl", False)),
    Ban("verify=False", "the other side could be anybody", keyword("verify", False)),
    Ban("uncapped read", "a peer that sends for ever fills the memory", whole_body_read, ("meshq/web/", "meshq/client.py")),
    Ban("dropped loop task", "its failure would go unseen", dropped_loop_task),
    Ban("from meshq import exec", "exec is a builtin (style rule 16)", imports_name("meshq", "exec")),
    Ban("wall clock", "time comes in as `now`; wall clocks lie", imports("datetime", "time", "calendar"), CORE_PATHS),
    Ban("hash", "differs from process to process, so runs would not replay", calls("hash", "id"), CORE_PATHS),
    Ban("set order", "differs from process to process, so runs would not replay", over_set, CORE_PATHS),
)  # fmt: skip

ALLOWED: dict[tuple[str, str], str] = {
    ("/tmp", "meshq/exec/gpulock.py"): "the users of a machine must meet somewhere; the file is nothing but its lock",
}
"""(ban, path): the reason why this file may."""


@pytest.mark.parametrize("ban", BANS, ids=lambda ban: ban.what)
def test_nothing_banned_is_used(ban: Ban) -> None:
    places = [
        f"{relative(path)}:{getattr(node, 'lineno', 0)}"
        for path in MODULES
        if relative(path).startswith(ban.where) and (ban.what, relative(path)) not in ALLOWED
        for node in _without_docstrings(tree_of(path))
        if ban.found(node)
    ]
    assert places == [], f"{ban.what}: {ban.why}"


def _without_docstrings(tree: ast.Module) -> Iterator[ast.AST]:
    texts = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }
    return (node for node in ast.walk(tree) if id(node) not in texts)


BAD_CODE = {
    "pickle": "import pickle",
    "eval": "eval('1')",
    "archives": "from tarfile import open",
    "unpack": "shutil.unpack_archive(name)",
    "shell": "run(command, shell=True)",
    "system": "os.system(command)",
    "mktemp": "tempfile.mktemp()",
    "/tmp": "open('/tmp/meshq.sock')",
    "no certificate": "context.verify_mode = ssl.CERT_NONE",
    "no TLS": "session.get(url, ssl=False)",
    "verify=False": "get(url, verify=False)",
    "uncapped read": "await response.read()",
    "dropped loop task": "asyncio.create_task(work())",
    "from meshq import exec": "from meshq import exec",
    "wall clock": "import time",
    "hash": "hash(name)",
    "set order": "[name for name in set(names)]",
}


@pytest.mark.parametrize("ban", BANS, ids=lambda ban: ban.what)
def test_each_ban_finds_what_it_forbids(ban: Ban) -> None:
    tree = ast.parse(BAD_CODE[ban.what], mode="exec")
    assert any(ban.found(node) for node in ast.walk(tree))


def test_each_exception_is_still_needed() -> None:
    bans = {ban.what: ban for ban in BANS}
    needed = [
        (what, path)
        for what, path in ALLOWED
        if any(bans[what].found(node) for node in _without_docstrings(tree_of(ROOT / path)))
    ]
    assert needed == list(ALLOWED)


# --- what is never left behind --------------------------------------------------------------------------------------

UNFINISHED = re.compile(r"\b(FIX" + r"ME|TO" + r"DO|XX" + r"X)\b")
BARE_EXEMPTION = re.compile(r"#\s*(type:\s*ignore(?!\[)|noqa(?!:))")


def _texts() -> list[Path]:
    shell = [path for path in sorted((ROOT / "scripts").iterdir()) if path.is_file()]
    return ALL_PYTHON + shell + sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").glob("*.md"))


def _lines_with(pattern: re.Pattern[str], paths: list[Path]) -> list[str]:
    return [
        f"{relative(path)}:{number}"
        for path in paths
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]


def test_nothing_is_left_for_later() -> None:
    assert _lines_with(UNFINISHED, _texts()) == []


def test_each_exemption_from_a_check_names_the_check() -> None:
    assert _lines_with(BARE_EXEMPTION, [path for path in ALL_PYTHON if path != Path(__file__)]) == []
