"""A table of formatted strings, and its layout in a terminal, in Markdown and in LaTeX.

Numbers are formatted when a `Sheet` is made; a renderer only places strings. So all formats show the same numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from types import MappingProxyType

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

Cell = tuple[str, ...]
"""A number, and the parts that are shown beside it: `("80.6±0.3", "80.6", "+0.0")`."""

_GAP = "  "
_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}",
        "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "×": r"$\times$", "–": "--",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Column:
    """The name of a column, and the names of the parts that are shown beside its numbers."""

    name: str
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Section:
    """Rows, as (label, cells), under a heading, which may be empty."""

    heading: str
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


@dataclass(frozen=True)
class Sheet:
    """A table. Every row has a cell for each column; a cell may have fewer parts than its column."""

    title: str
    columns: tuple[Column, ...]
    sections: tuple[Section, ...]
    notes: tuple[str, ...] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line, style in terminal_lines(self, options.max_width):
            yield Text(line, style=style)

    def _repr_markdown_(self) -> str:
        return markdown(self)


def terminal_lines(sheet: Sheet, width: int) -> list[tuple[str, str]]:
    """Lay out a table for a terminal; return its lines, each with its style.

    The parts of a cell are placed beside its number if `width` has room for that, otherwise below it.
    """
    rows = [row for section in sheet.sections for row in section.rows]
    label = max((len(text) for text, _ in rows), default=0)
    layouts = [_Layout.of(column, [cells[index] for _, cells in rows]) for index, column in enumerate(sheet.columns)]
    below = label + sum(len(_GAP) + layout.side_by_side for layout in layouts) > width

    def lines(text: str, placed: list[tuple[str, str]]) -> list[str]:
        first_line = text.ljust(label) + "".join(_GAP + first for first, _ in placed)
        second_line = " " * label + "".join(_GAP + second for _, second in placed)
        return [first_line.rstrip()] + ([second_line.rstrip()] if second_line.strip() else [])

    result = [(sheet.title, "bold")] if sheet.title else []
    if sheet.columns:
        result += [(line, "") for line in lines("", [layout.header(below) for layout in layouts])]
    for section in sheet.sections:
        result += [(section.heading, "bold")] if section.heading else []
        for text, cells in section.rows:
            placed = [layout.cell(cell, below) for layout, cell in zip(layouts, cells, strict=True)]
            result += [(line, "") for line in lines(text, placed)]
    return result + [(note, "") for note in sheet.notes]


@dataclass(frozen=True)
class _Layout:
    """The widths of a column's numbers, of each part beside them, and of all these parts together."""

    column: Column
    number: int
    parts: tuple[int, ...]
    beside: int

    @classmethod
    def of(cls, column: Column, cells: list[Cell]) -> _Layout:
        """Measure the cells of a column."""
        number, *parts = [max(map(len, part)) for part in zip_longest(*cells, fillvalue="")] or [0]
        beside = max(sum(parts) + len(parts) - 1, len(" ".join(column.beside)))
        total = number + bool(parts) * (1 + beside)
        named_alone = len(column.name) if column.beside else len(column.name) - (total - number)
        return cls(column, max(number, named_alone), tuple(parts), beside)

    @property
    def side_by_side(self) -> int:
        return self.number + bool(self.parts) * (1 + self.beside)

    def header(self, below: bool) -> tuple[str, str]:
        if self.column.beside:
            return self._placed(self.column.name, " ".join(self.column.beside), below)
        width = max(self.number, self.beside) if below and self.parts else self.side_by_side
        return self.column.name.rjust(width), ""

    def cell(self, cell: Cell, below: bool) -> tuple[str, str]:
        beside = " ".join(part.rjust(width) for part, width in zip(cell[1:], self.parts, strict=False))
        return self._placed(cell[0], beside, below)

    def _placed(self, number: str, beside: str, below: bool) -> tuple[str, str]:
        """Place a number and its parts on one line, or on two."""
        if not self.parts:
            return number.rjust(self.number), " " * self.number
        if below:
            width = max(self.number, self.beside, len(self.column.name))
            return number.rjust(width), beside.rjust(width)
        return f"{number.rjust(self.number)} {beside.rjust(self.beside)}", ""


def markdown(sheet: Sheet) -> str:
    """Render the table in GitHub's Markdown: title, table, notes. The parts beside a number follow it in brackets."""
    title = [f"**{_escape_markdown(sheet.title)}**"] if sheet.title else []
    if not sheet.columns:
        return "\n\n".join([*title, *map(_escape_markdown, sheet.notes)])
    has_headings = any(section.heading for section in sheet.sections)
    lead = ["", ""] if has_headings else [""]
    columns = [_join_parts((column.name, *column.beside)) for column in sheet.columns]
    lines = [[*lead, *columns], [":--"] * len(lead) + ["--:"] * len(columns)]
    for section in sheet.sections:
        heading = [f"**{section.heading}**"] if has_headings else []
        for label, cells in section.rows:
            lines.append([*heading, label, *map(_join_parts, cells)])
            heading = [""] if has_headings else []
    table = "\n".join(f"| {' | '.join(_escape_markdown(text) for text in line)} |" for line in lines)
    return "\n\n".join([*title, table, *map(_escape_markdown, sheet.notes)])


def _join_parts(cell: Cell) -> str:
    return f"{cell[0]} ({', '.join(cell[1:])})" if len(cell) > 1 else cell[0]


def _escape_markdown(text: str) -> str:
    return text.replace("|", "\\|").replace("_", "\\_")


def latex(sheet: Sheet, names: Mapping[str, str] = MappingProxyType({})) -> str:
    r"""Render the table as a `table*`, which needs the package booktabs. Parts beside a number have their own columns.

    Args:
        sheet: the table.
        names: words of labels and column names, each with its replacement in print.
    """
    counts = [1 + len(column.beside) for column in sheet.columns]
    total = 1 + sum(counts)

    def line(label: str, cells: list[str]) -> str:
        return " & ".join([_latex_name(label, names), *cells]) + r" \\"

    over = [rf"\multicolumn{{{n}}}{{c}}{{{_latex_name(column.name, names)}}}"
            for column, n in zip(sheet.columns, counts, strict=True)]  # fmt: skip
    beside = [part for column in sheet.columns for part in ("", *map(_escape_latex, column.beside))]
    lines = [line("", over)] + ([line("", beside)] if any(beside) else []) + [r"\midrule"]
    for index, section in enumerate(sheet.sections):
        if section.heading:
            lines += [r"\addlinespace"] * bool(index)
            lines.append(rf"\multicolumn{{{total}}}{{l}}{{\textbf{{{_escape_latex(section.heading)}}}}} \\")
        for label, cells in section.rows:
            numbers = [
                _latex_number(part)
                for cell, n in zip(cells, counts, strict=True)
                for part in (*cell, *[""] * (n - len(cell)))
            ]
            lines.append(line(label, numbers))
    caption = " ".join(
        _escape_latex(text) for text in (sheet.title and sheet.title.rstrip(".") + ".", *sheet.notes) if text
    )
    return "\n".join(
        [
            r"\begin{table*}",
            r"\centering\footnotesize\setlength{\tabcolsep}{3pt}",
            rf"\caption{{{caption}}}",
            rf"\begin{{tabular}}{{l{'r' * (total - 1)}}}",
            r"\toprule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table*}",
        ]
    )


def _escape_latex(text: str) -> str:
    return text.translate(_LATEX)


def _latex_number(text: str) -> str:
    """Escape a cell, with signed numbers in math mode, which has a proper minus sign."""
    return re.sub(r"(?<!\S)[+-]\d[\d.]*", r"$\g<0>$", _escape_latex(text))


def _latex_name(text: str, names: Mapping[str, str]) -> str:
    """Replace the words that are in `names`, and escape all others."""
    return "".join(_escape_latex(names.get(part, part)) for part in re.split(r"(\w+)", text))
