"""What the documents take from the code and what they claim to do: generated tables, and the blocks that are run.

`python -m tests.documents` writes the table of limits in docs/operations.md and that of modules in docs/architecture.md anew.

A block fenced as `console` is run as it stands, in order, in one folder, against a mesh of one agent: `$ ` begins a
command, which must succeed; what follows is its output, where `…` stands for anything and a line of `…` for any lines.
Blocks with another fence are not run.
"""

import ast
import io
import re
import tokenize
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from meshq import config

ROOT = Path(__file__).parent.parent
UNITS = {"bytes": "bytes", "seconds": "s", "chars": "characters"}


@dataclass(frozen=True)
class Command:
    """One command of a document and the output that the document shows."""

    line: str
    output: str

    def pattern(self) -> re.Pattern[str]:
        """What matches the real output."""
        lines = self.output.splitlines()
        return re.compile("".join(r"(?:.*\n)*" if line == "…" else _line_pattern(line) for line in lines))


def _line_pattern(line: str) -> str:
    return ".*".join(re.escape(part) for part in line.split("…")) + r"\n"


def commands(document: Path) -> list[Command]:
    """The commands of all `console` blocks, in order."""
    blocks = re.findall(r"^```console\n(.*?)^```$", document.read_text(), re.MULTILINE | re.DOTALL)
    return [
        Command(line, output)
        for block in blocks
        for line, output in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE)
    ]


def limits_table() -> str:
    """Every number in `config.py`, with the reason that stands beside it there."""
    source = Path(config.__file__).read_text()
    reasons = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    rows = [
        f"| `{name}` | {_shown(name, getattr(config, name))} | {reasons.get(line, '')} |"
        for name, line in _constants(ast.parse(source))
        if isinstance(getattr(config, name), int | float)
    ]
    return "\n".join(["| limit | value | why |", "|---|---:|---|", *rows])


def _constants(tree: ast.Module) -> list[tuple[str, int]]:
    return [
        (node.target.id, node.lineno)
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id.isupper()
    ]


def _shown(name: str, value: float) -> str:
    words = name.lower().split("_")
    if "port" in words:
        return str(value)
    unit = next((text for word, text in UNITS.items() if word in words), "")
    if unit == "bytes":
        for power, prefix in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
            if value >= 1024**power and value % 1024**power == 0:
                return f"{value // 1024**power:,} {prefix}"
    number = f"{value:,.0f}" if float(value).is_integer() else f"{value:,}"
    return f"{number} {unit}".strip()


def modules_table() -> str:
    """Every module, by package, with the first sentences of its docstring."""
    rows = []
    for path in sorted((ROOT / "meshq").rglob("*.py"), key=lambda path: (path.parent, path.name)):
        if page := ast.get_docstring(ast.parse(path.read_text())):
            summary = " ".join(page.split("\n\n")[0].split())
            rows.append(f"| `{path.relative_to(ROOT).as_posix()}` | {summary} |")
    return "\n".join(["| module | what it is |", "|---|---|", *rows])


TABLES: dict[str, tuple[Path, Callable[[], str]]] = {
    "limits": (ROOT / "docs" / "operations.md", limits_table),
    "modules": (ROOT / "docs" / "architecture.md", modules_table),
}


def written_anew(table: str) -> str:
    """The document that holds this table, with the table as the code has it now."""
    document, make = TABLES[table]
    begin, end = f"<!-- {table}: written by python -m tests.documents -->", f"<!-- end of {table} -->"
    before, rest = document.read_text().split(begin)
    return f"{before}{begin}\n{make()}\n{end}{rest.split(end)[1]}"


if __name__ == "__main__":
    for name, (document, _) in TABLES.items():
        document.write_text(written_anew(name))
