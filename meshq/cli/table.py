"""Aligned columns of plain text, without lines around them. Pure: rows in, lines out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from meshq.terminal import harmless

GAP = "  "
SHORTEST = 6  # a column that must give way keeps this many characters, or its title

Paint = Callable[[str, str], str]


@dataclass(frozen=True, slots=True)
class Column:
    title: str
    right: bool = False
    gives_way: bool = False  # may be shortened with an ellipsis where the terminal is narrow
    keeps_end: bool = False  # and then loses its middle: of a file's name the end says most
    only_if_used: bool = False  # left out when no row has anything to say in it
    goes: int = 0  # left out where not even the shortened columns fit, the greatest first; 0: never


@dataclass(frozen=True, slots=True)
class Cell:
    text: str
    style: str = ""

    @property
    def empty(self) -> bool:
        return self.text in ("", "-", "0")


def table(columns: Sequence[Column], rows: Sequence[Sequence[Cell | str]], width: int, paint: Paint) -> list[str]:
    """A title line and one line per row, at most `width` wide as far as the columns that give way or go allow."""
    cells = [[each if isinstance(each, Cell) else Cell(each) for each in row] for row in rows]
    cells = [[Cell(harmless(each.text).replace("\n", " "), each.style) for each in row] for row in cells]
    shown = [i for i, column in enumerate(columns) if not column.only_if_used or any(not row[i].empty for row in cells)]
    natural = {i: max(len(each) for each in (columns[i].title, *(row[i].text for row in cells))) for i in shown}
    least = {i: min(natural[i], max(SHORTEST, len(columns[i].title))) if columns[i].gives_way else natural[i] for i in shown}
    for i in sorted((i for i in shown if columns[i].goes), key=lambda i: columns[i].goes, reverse=True):
        if _whole([least[each] for each in shown]) > width:
            shown.remove(i)
    columns = [columns[i] for i in shown]
    cells = [[row[i] for i in shown] for row in cells]
    widths = _fit([natural[i] for i in shown], [least[i] for i in shown], width)
    title = [Cell(column.title, "dim") for column in columns]
    return [_line(columns, row, widths, paint) for row in (title, *cells)]


def _whole(widths: Sequence[int]) -> int:
    return sum(widths) + len(GAP) * (len(widths) - 1)


def _fit(natural: Sequence[int], least: Sequence[int], width: int) -> list[int]:
    """The widest that may give way does, again and again."""
    widths = list(natural)
    while _whole(widths) > width:
        widest = max(range(len(widths)), key=lambda i: (widths[i] > least[i], widths[i]))
        if widths[widest] <= least[widest]:
            break
        widths[widest] -= 1
    return widths


def _line(columns: Sequence[Column], row: Sequence[Cell], widths: Sequence[int], paint: Paint) -> str:
    parts = []
    for column, cell, width in zip(columns, row, widths, strict=True):
        text = _shortened(cell.text, width, keeps_end=column.keeps_end)
        space = " " * (width - len(text))
        parts.append(space + paint(text, cell.style) if column.right else paint(text, cell.style) + space)
    return GAP.join(parts).rstrip()


def _shortened(text: str, width: int, *, keeps_end: bool) -> str:
    if len(text) <= width:
        return text
    end = (width - 1) // 2 if keeps_end else 0
    return f"{text[: width - 1 - end]}…{text[len(text) - end :]}"
