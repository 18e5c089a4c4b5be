"""Table 1: accuracy of each version under each scheme, beside the paper's numbers."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any, Literal

import pandas as pd

from flexifed.config import SCHEMES, VERSIONS
from flexifed.errors import ConfigError, invalid_choice
from flexifed.report.sheet import Cell, Column, Section, Sheet

Pick = Literal["last", "best", "final"]
PICKS: tuple[Pick, ...] = ("last", "best", "final")
CELL = ["dataset", "family", "scheme"]
SCHEME_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "standalone": "Standalone",
        "clustered_fl": "Clustered-FL",
        "basic_common": "Basic-Common",
        "clustered_common": "Clustered-Common",
        "max_common": "Max-Common",
    }
)
"""The paper's names of the schemes."""
assert tuple(SCHEME_NAMES) == SCHEMES
NUMBERS = [*CELL, "version", "data_source", "seeds", "mean", "spread", "paper", "difference"]
"""The columns of `Summary.numbers`."""
ACCURACY, ACCURACY_OF_TABLE_1 = "Accuracy in percent", "Accuracy in percent (Table 1)"
DIGITS = 1
"""Digits after the decimal point of every accuracy that is shown, as in the paper."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Accuracies in percent, indexed by (dataset, family, scheme) in the paper's order, with a column per version.

    Attributes:
        mean: the mean over seeds; each seed's number is the mean over the clients of a version and over the picked
            rounds.
        spread: the sample standard deviation over seeds; missing for a single seed.
        sources: the `data_source` of each cell.
        seeds: the number of seeds of each cell.
        compare: whether the experiment is that of the paper's table, so that numbers may be compared.
    """

    mean: pd.DataFrame
    spread: pd.DataFrame
    sources: pd.Series[str]
    seeds: pd.Series[int]
    compare: bool = True

    def numbers(self) -> pd.DataFrame:
        """Compute the numbers that all formats show: a row for each cell and version, rounded here and nowhere else.

        Columns: dataset, family, scheme, version, data_source, seeds, mean, spread, paper, difference. Accuracies are
        in percent with `DIGITS` digits; `difference` is mean - paper, as they are shown. `paper` and `difference` are
        missing unless the data are the whole real data, and the experiment is the paper's: otherwise the comparison
        would mean nothing.
        """
        paper = paper_table().reindex(index=self.mean.index, columns=self.mean.columns)
        paper = paper.where(self.sources.eq("real") & self.compare)
        mean = self.mean.round(DIGITS)
        columns = {"mean": mean, "spread": self.spread, "paper": paper, "difference": mean - paper}
        long = pd.DataFrame({name: frame.stack(future_stack=True) for name, frame in columns.items()}).round(DIGITS)
        long = long.dropna(subset="mean") + 0.0  # no -0.0
        long.index = long.index.set_names([*CELL, "version"])
        cells = pd.DataFrame({"data_source": self.sources, "seeds": self.seeds})
        return long.reset_index().merge(cells.reset_index(), on=CELL)[NUMBERS]


def counted_rounds(rounds: int) -> int:
    """The number of last scored rounds that are averaged: a tenth of the rounds, at least 1, at most 50.

    >>> [counted_rounds(rounds) for rounds in (2, 30, 502)]
    [1, 3, 50]
    """
    return max(1, min(50, rounds // 10))


def paper_table() -> pd.DataFrame:
    """Read the paper's Table 1, in percent, indexed like `Summary.mean`."""
    with files("flexifed.report").joinpath("table1_paper.csv").open() as file:
        return pd.read_csv(file, index_col=CELL)


def in_paper_order(frame: pd.DataFrame) -> pd.DataFrame:
    """Sort rows by their columns or index levels dataset, family and scheme, in the paper's order; others come last."""
    names = [name for name in CELL if name in [*frame.columns, *frame.index.names]]
    ranks = {name: rank for rank, name in enumerate([*_paper_names(), *SCHEMES])}

    def rank(values: pd.Index) -> pd.Index:
        return pd.Index([(ranks.get(str(value), len(ranks)), str(value)) for value in values], tupleize_cols=False)

    return frame.sort_values(names, key=rank, kind="stable")  # type: ignore[call-overload]


@cache
def _paper_names() -> tuple[str, ...]:
    index = paper_table().index
    return tuple(dict.fromkeys(str(key[level]) for level in (0, 1) for key in index))


def per_seed(rows: pd.DataFrame, rounds: int, pick: Pick = "last") -> pd.DataFrame:
    """Compute one accuracy, in percent, for each cell, seed and version.

    Args:
        rows: rows of rounds files, all of one profile; rounds after `rounds` are ignored.
        rounds: the number of rounds of training. Clients are scored at the start of each, and once after the last.
        pick: `last`: the mean of the last `counted_rounds(rounds)` scores; `best`: the score of the version's best
            round; `final`: the very last score. The paper does not say which it shows; `last` is the default
            everywhere.

    Raises:
        ConfigError: `pick` is unknown.
    """
    if pick not in PICKS:
        raise ConfigError(invalid_choice("pick", pick, PICKS))
    first = {"last": rounds - counted_rounds(rounds) + 1, "best": 0, "final": rounds}[pick]
    counted = rows[rows["round"].between(first, rounds)]
    curves = counted.groupby([*CELL, "data_source", "seed", "version", "round"])["accuracy"].mean().mul(100)
    by_version = curves.groupby([*CELL, "data_source", "seed", "version"])
    return (by_version.max() if pick == "best" else by_version.mean()).unstack("version").reset_index()


def summarise(rows: pd.DataFrame, rounds: int, pick: Pick = "last", *, compare: bool = True) -> Summary:
    """Compute mean and spread over seeds; the arguments are those of `per_seed` and an attribute of `Summary`.

    Raises:
        ConfigError: rows of one cell come from different data sources, or `pick` is unknown.
    """
    numbers = in_paper_order(per_seed(rows, rounds, pick))
    groups = numbers.groupby(CELL, sort=False)
    if (mixed := groups["data_source"].nunique() > 1).any():
        cells = ", ".join("/".join(cell) for cell in mixed[mixed].index)
        raise ConfigError(f"rows of {cells} come from different data sources; select rows by data_source first")
    versions = [version for version in VERSIONS if version in numbers]
    return Summary(
        mean=groups[versions].mean(),
        spread=groups[versions].std(),
        sources=groups["data_source"].first(),
        seeds=groups["seed"].nunique(),
        compare=compare,
    )


def render(
    summary: Summary,
    *,
    profile: str,
    rounds: int,
    seeds: Sequence[int],
    pick: Pick = "last",
    changed: Mapping[str, object] = MappingProxyType({}),
) -> Sheet:
    """Lay out Table 1, with notes on its data and settings.

    Args:
        summary: from `summarise`.
        profile: the name of the profile.
        rounds: the number of rounds of training.
        seeds: the seeds that were requested; the notes name cells that have fewer.
        pick: the rounds that each number is taken from.
        changed: the settings that differ from the profile's.
    """
    numbers = summary.numbers()
    compared = numbers["paper"].notna().any()
    versions = [version for version in VERSIONS if version in set(numbers["version"])]
    columns = tuple(Column(version.upper(), ("paper", "diff") if compared else ()) for version in versions)
    sections = []
    for (dataset, family), cells in numbers.groupby(["dataset", "family"], sort=False):
        sources = cells["data_source"].unique()
        rows = []
        for (scheme, source), cell in cells.groupby(["scheme", "data_source"], sort=False):
            shown = {str(row["version"]): _table_cell(row) for row in cell.to_dict("records")}
            label = str(scheme) if len(sources) == 1 else f"{scheme}, {source}"
            rows.append((label, tuple(shown.get(version, ("",)) for version in versions)))
        sections.append(Section(f"{dataset} / {family}" + source_label(*sources), tuple(rows)))
    settings = profile + "".join(f", {name}={value}" for name, value in changed.items())
    notes = _notes(summary, settings=settings, rounds=rounds, seeds=seeds, pick=pick, compared=bool(compared))
    return Sheet(ACCURACY_OF_TABLE_1 if summary.compare else ACCURACY, columns, tuple(sections), notes)


def source_label(*sources: str) -> str:
    """The label that follows a name unless the data are the whole real data: ` [SYNTHETIC DATA]`."""
    return "" if set(sources) == {"real"} else f" [{' AND '.join(sorted(sources)).upper()} DATA]"


def picked_rounds(rounds: int, pick: Pick) -> str:
    """The rounds that a number is taken from, in words."""
    count = counted_rounds(rounds)
    return {
        "last": f"mean of the last {count} scored rounds" if count > 1 else "last scored round",
        "best": "best round",
        "final": "last scored round",
    }[pick]


def data_warnings(sources: Sequence[str]) -> list[str]:
    """The warnings that results need unless their data are the whole real data."""
    warnings = {
        "synthetic": "SYNTHETIC data are a stand-in: these numbers show that the software runs and nothing about "
        "the paper.",
        "real-partial": "REAL-PARTIAL data are a part of the real set: these numbers are not the paper's Table 1.",
        "real-other": "REAL-OTHER data are another release of the real set, with other classes than the paper's: these "
        "numbers are not the paper's Table 1.",
    }
    return [text for source, text in warnings.items() if source in sources]


def _table_cell(row: Mapping[Hashable, Any]) -> Cell:
    """The mean, with the spread over several seeds; then the paper's number and the difference, if there are any."""
    mean, spread, paper, difference = (float(row[name]) for name in ("mean", "spread", "paper", "difference"))
    number = f"{mean:.{DIGITS}f}" + ("" if math.isnan(spread) else f"±{spread:.{DIGITS}f}")
    return (number,) if math.isnan(paper) else (number, f"{paper:.{DIGITS}f}", f"{difference:+.{DIGITS}f}")


def _notes(
    summary: Summary, *, settings: str, rounds: int, seeds: Sequence[int], pick: Pick, compared: bool
) -> tuple[str, ...]:
    spread = f", mean ± standard deviation over {len(seeds)} seeds" if len(seeds) > 1 else ""
    sources = sorted(set(summary.sources))
    notes = [
        f"Data: {', '.join(sources)}. Profile: {settings}. Rounds: {rounds}. Seeds: {' '.join(map(str, seeds))}.",
        f"Accuracy on the clients' test shards: {picked_rounds(rounds, pick)}{spread}.",
    ]
    fewer = {
        "/".join(key): count for key, count in zip(summary.mean.index, summary.seeds, strict=True) if count < len(seeds)
    }
    if fewer:
        notes.append("Fewer seeds: " + ", ".join(f"{cell} {n} of {len(seeds)}" for cell, n in fewer.items()) + ".")
    if not summary.compare:
        notes.append("This is another experiment than the paper's Table 1, so its numbers are not shown beside these.")
    if compared:
        notes.append(
            "Beside them: the paper's Table 1, from its full protocol (profiles authors and paper), and the difference."
        )
    return (*notes, *data_warnings(sources))
