"""Which Python a task asks for: `3.12`, `3.12.4`, or a specifier such as `>=3.10,<3.13`; nothing asks for any.

The client writes it into the task, the peer matches it against the interpreters that it has. Only CPython releases take
part, so versions are three numbers; what PEP 440 knows beyond that is refused.
"""

import re
from dataclasses import dataclass
from typing import Final

Version = tuple[int, int, int]

MINORS: Final = range(8, 31)  # Python 3.8 is the oldest that today's uv makes environments for
_CLAUSE: Final = re.compile(r"(===?|~=|!=|<=|>=|<|>|)\s*v?(\d{1,4}(?:\.\d{1,4}){0,2})(\.\*)?")


@dataclass(frozen=True, slots=True)
class _Clause:
    operator: str
    parts: tuple[int, ...]
    prefix: bool  # `3.12.*`, and a bare `3.12`

    def allows(self, version: Version) -> bool:
        full = (*self.parts, 0, 0)[:3]
        same = version[: len(self.parts)] == self.parts if self.prefix else version == full
        match self.operator:
            case "==" | "===":
                return same
            case "!=":
                return not same
            case "~=":
                return version >= full and version[: len(self.parts) - 1] == self.parts[:-1]
            case ">=":
                return version >= full
            case "<=":
                return version <= full
            case ">":
                return version > full
            case _:
                return version < full


@dataclass(frozen=True, slots=True)
class PythonRequest:
    """All clauses must hold; without any, every version does."""

    clauses: tuple[_Clause, ...]

    def allows(self, version: Version) -> bool:
        return all(clause.allows(version) for clause in self.clauses)

    def lowest_minor(self) -> tuple[int, int] | None:
        """The oldest Python 3 minor of which some release is allowed; None if there is none."""
        for minor in MINORS:
            if any(self.allows((3, minor, micro)) for micro in range(100)):
                return 3, minor
        return None


def parse_python(text: str) -> PythonRequest:
    """ValueError if the text is no version and no specifier."""
    clauses: list[_Clause] = []
    for part in filter(None, (each.strip() for each in text.split(","))):
        match = _CLAUSE.fullmatch(part)
        if match is None or (match[1] == "~=" and "." not in match[2]):
            raise ValueError(f"{text!r} is no version of Python")
        numbers = tuple(int(each) for each in match[2].split("."))
        bare = match[1] == ""
        clauses.append(_Clause(match[1] or "==", numbers, match[3] is not None or (bare and len(numbers) < 3)))
    return PythonRequest(tuple(clauses))
