"""A table of finished strings, and how it looks in a terminal, in Markdown and in LaTeX.

Whoever makes a `Sheet` has decided what each number looks like; a renderer only places strings. So every format says
the same.
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
"""A number, and what stands beside it: `("80.6±0.3", "80.6", "+0.0")`."""

_GAP = "  "
_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}",
        "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "×": r"$\times$", "–": "--",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Column:
    """A column of cells: its name, and the names of the parts that stand beside the first."""

    name: str
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Section:
    """Rows, as (label, cells), under a heading; without one where it is empty."""

    heading: str
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


@dataclass(frozen=True)
class Sheet:
    """A table. Every row has a cell for each column; a cell may have fewer parts than its column names."""

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
    """The lines of a table and the style of each.

    Parts stand side by side where the width has room for them, else what stands beside a number goes below it.
    """
    rows = [row for section in sheet.sections for row in section.rows]
    label = max((len(text) for text, _ in rows), default=0)
    layouts = [_Layout.of(column, [cells[index] for _, cells in rows]) for index, column in enumerate(sheet.columns)]
    below = label + sum(len(_GAP) + layout.side_by_side for layout in layouts) > width

    def lines(text: str, placed: list[tuple[str, str]]) -> list[str]:
        """One line, or two."""
        found = [text.ljust(label) + "".join(_GAP + first for first, _ in placed)]
        found += [" " * label + "".join(_GAP + second for _, second in placed)]
        return [line.rstrip() for index, line in enumerate(found) if index == 0 or line.strip()]

    found = [(sheet.title, "bold")] if sheet.title else []
    if sheet.columns:
        found += [(line, "") for line in lines("", [layout.header(below) for layout in layouts])]
    for section in sheet.sections:
        found += [(section.heading, "bold")] if section.heading else []
        for text, cells in section.rows:
            placed = [layout.cell(cell, below) for layout, cell in zip(layouts, cells, strict=True)]
            found += [(line, "") for line in lines(text, placed)]
    return found + [(note, "") for note in sheet.notes]


@dataclass(frozen=True)
class _Layout:
    """The widths of a column: of its numbers, of each part beside them, and of all these parts together."""

    column: Column
    number: int
    parts: tuple[int, ...]
    beside: int

    @classmethod
    def of(cls, column: Column, cells: list[Cell]) -> _Layout:
        """The widths that a column's cells need."""
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
        """Side by side in one line, or in two."""
        if not self.parts:
            return number.rjust(self.number), " " * self.number
        if below:
            width = max(self.number, self.beside, len(self.column.name))
            return number.rjust(width), beside.rjust(width)
        return f"{number.rjust(self.number)} {beside.rjust(self.beside)}", ""


def markdown(sheet: Sheet) -> str:
    """The table in GitHub's Markdown: title, table, notes. What stands beside a number follows in brackets."""
    title = [f"**{_in_markdown(sheet.title)}**"] if sheet.title else []
    if not sheet.columns:
        return "\n\n".join([*title, *map(_in_markdown, sheet.notes)])
    headed = any(section.heading for section in sheet.sections)
    lead = ["", ""] if headed else [""]
    columns = [_in_brackets((one.name, *one.beside)) for one in sheet.columns]
    lines = [[*lead, *columns], [":--"] * len(lead) + ["--:"] * len(columns)]
    for section in sheet.sections:
        heading = [f"**{section.heading}**"] if headed else []
        for label, cells in section.rows:
            lines.append([*heading, label, *map(_in_brackets, cells)])
            heading = [""] if headed else []
    table = "\n".join(f"| {' | '.join(_in_markdown(one) for one in line)} |" for line in lines)
    return "\n\n".join([*title, table, *map(_in_markdown, sheet.notes)])


def _in_brackets(cell: Cell) -> str:
    return f"{cell[0]} ({', '.join(cell[1:])})" if len(cell) > 1 else cell[0]


def _in_markdown(text: str) -> str:
    return text.replace("|", "\\|").replace("_", "\\_")


def latex(sheet: Sheet, names: Mapping[str, str] = MappingProxyType({})) -> str:
    r"""The table as a `table*` that needs the package booktabs; what stands beside a number has columns of its own.

    Args:
        sheet: the table.
        names: words of labels and column names that are written in another way in print.
    """
    counts = [1 + len(one.beside) for one in sheet.columns]
    total = 1 + sum(counts)

    def line(label: str, cells: list[str]) -> str:
        return " & ".join([_name_in_latex(label, names), *cells]) + r" \\"

    over = [rf"\multicolumn{{{n}}}{{c}}{{{_name_in_latex(one.name, names)}}}"
            for one, n in zip(sheet.columns, counts, strict=True)]  # fmt: skip
    beside = [part for one in sheet.columns for part in ("", *map(_in_latex, one.beside))]
    lines = [line("", over)] + ([line("", beside)] if any(beside) else []) + [r"\midrule"]
    for index, section in enumerate(sheet.sections):
        if section.heading:
            lines += [r"\addlinespace"] * bool(index)
            lines.append(rf"\multicolumn{{{total}}}{{l}}{{\textbf{{{_in_latex(section.heading)}}}}} \\")
        for label, cells in section.rows:
            numbers = [
                _number_in_latex(part)
                for cell, n in zip(cells, counts, strict=True)
                for part in (*cell, *[""] * (n - len(cell)))
            ]
            lines.append(line(label, numbers))
    caption = " ".join(
        _in_latex(text) for text in (sheet.title and sheet.title.rstrip(".") + ".", *sheet.notes) if text
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


def _in_latex(text: str) -> str:
    return text.translate(_LATEX)


def _number_in_latex(text: str) -> str:
    """Signed numbers in math mode, so that a minus is one."""
    return re.sub(r"(?<!\S)[+-]\d[\d.]*", r"$\g<0>$", _in_latex(text))


def _name_in_latex(text: str, names: Mapping[str, str]) -> str:
    """Words that are written in another way in print, and all the rest with what LaTeX reads escaped."""
    return "".join(_in_latex(names.get(part, part)) for part in re.split(r"(\w+)", text))
