"""Table 1: accuracy of each version under each scheme, beside the paper's numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

import pandas as pd
from rich.markup import escape
from rich.table import Table

from flexifed.config import SCHEMES
from flexifed.errors import ConfigError, invalid_choice

Pick = Literal["last", "best", "final"]
PICKS: tuple[Pick, ...] = ("last", "best", "final")
VERSIONS = ("v1", "v2", "v3", "v4")
CELL = ["dataset", "family", "scheme"]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Accuracies in percent, indexed by (dataset, family, scheme), one column for each version.

    Attributes:
        mean: over seeds; each seed's number is the mean over the clients of a version and over the rounds that count.
        spread: sample standard deviation over seeds; missing where there is one seed.
        sources: `data_source` of each cell.
        seeds: number of seeds of each cell.
    """

    mean: pd.DataFrame
    spread: pd.DataFrame
    sources: pd.Series[str]
    seeds: pd.Series[int]


def counted_rounds(rounds: int) -> int:
    """How many of the last scored rounds a number is the mean of: a tenth of the rounds, at least 1, at most 50.

    >>> [counted_rounds(rounds) for rounds in (2, 30, 502)]
    [1, 3, 50]
    """
    return max(1, min(50, rounds // 10))


def paper_table() -> pd.DataFrame:
    """The paper's Table 1, in percent, indexed like `Summary.mean`."""
    with files("flexifed.report").joinpath("table1_paper.csv").open() as file:
        return pd.read_csv(file, index_col=CELL)


def per_seed(rows: pd.DataFrame, rounds: int, pick: Pick = "last") -> pd.DataFrame:
    """One accuracy, in percent, for each cell, seed and version.

    Args:
        rows: as in the rounds files, of one profile; later rounds than `rounds` are passed over.
        rounds: rounds of training; they are scored at their start, and once more after the last.
        pick: `last`: mean of the last `counted_rounds(rounds)` scores; `best`: of the version's best round; `final`: of
            the very last score. The paper does not say which it shows; `last` is the default everywhere.

    Raises:
        ConfigError: an unknown `pick`.
    """
    if pick not in PICKS:
        raise ConfigError(invalid_choice("pick", pick, PICKS))
    rows = rows[rows["round"] <= rounds]
    curves = rows.groupby([*CELL, "data_source", "seed", "version", "round"])["accuracy"].mean().mul(100)
    if pick == "last":
        curves = curves[curves.index.get_level_values("round") > rounds - counted_rounds(rounds)]
    elif pick == "final":
        curves = curves[curves.index.get_level_values("round") == rounds]
    by_version = curves.groupby([*CELL, "data_source", "seed", "version"])
    return (by_version.max() if pick == "best" else by_version.mean()).unstack("version").reset_index()


def summarise(rows: pd.DataFrame, rounds: int, pick: Pick = "last") -> Summary:
    """Mean and spread over seeds; arguments as for `per_seed`.

    Raises:
        ConfigError: rows of one cell come from different data, or an unknown `pick`.
    """
    numbers = per_seed(rows, rounds, pick)
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
    )


def render(
    summary: Summary, *, profile: str, rounds: int, seeds: Sequence[int], pick: Pick = "last"
) -> list[Table | str]:
    """Table 1 for a terminal of 80 columns: a table for each data set and family, and a line that says what it is.

    The paper's numbers stand in brackets beside those from real data. Beside synthetic data they would mean nothing.
    """
    paper = paper_table().to_dict("index")
    parts: list[Table | str] = []
    for dataset, family in dict.fromkeys((str(key[0]), str(key[1])) for key in summary.mean.index):
        cells = {
            scheme: (dataset, family, scheme) for scheme in SCHEMES if (dataset, family, scheme) in summary.mean.index
        }
        sources = {str(summary.sources.loc[key]) for key in cells.values()}
        named = "" if sources == {"real"} else escape(f"  [{' AND '.join(sorted(sources)).upper()} DATA]")
        table = Table(title=f"{dataset} / {family}{named}", title_justify="left", title_style="bold")
        table.add_column("accuracy, %" + ("\n(paper)" if "real" in sources else ""), no_wrap=True)
        for version in summary.mean.columns:
            table.add_column(version.upper(), justify="right", no_wrap=True)
        for scheme, key in cells.items():
            source = str(summary.sources.loc[key])
            beside = paper.get(key) if source == "real" else None
            label = scheme if len(sources) == 1 else f"{scheme}, {source}"
            table.add_row(label, *(_number(summary, key, version, beside) for version in summary.mean.columns))
        parts.append(table)
    parts.append(_caption(summary, profile=profile, rounds=rounds, seeds=seeds, pick=pick))
    return parts


def _number(summary: Summary, key: tuple[str, str, str], version: str, paper: Mapping[Any, float] | None) -> str:
    """Mean, spread where there are several seeds, and the paper's number: below, where a line has no room for three."""
    mean, spread = (float(numbers.to_dict("index")[key][version]) for numbers in (summary.mean, summary.spread))
    several = not math.isnan(spread)
    text = f"{mean:.1f}±{spread:.1f}" if several else f"{mean:.1f}"
    return text if paper is None else text + ("\n" if several else " ") + f"({paper[version]:.1f})"


def _caption(summary: Summary, *, profile: str, rounds: int, seeds: Sequence[int], pick: Pick) -> str:
    count = counted_rounds(rounds)
    what = {
        "last": f"mean of the last {count} scored rounds" if count > 1 else "last scored round",
        "best": "best round",
        "final": "last scored round",
    }[pick]
    several = len(seeds) > 1
    spread = f", mean ± standard deviation over {len(seeds)} seeds" if several else ""
    sources = ", ".join(sorted(set(summary.sources)))
    lines = [
        f"Data: {sources}. Profile: {profile}. Rounds: {rounds}. Seeds: {' '.join(map(str, seeds))}.",
        f"Accuracy on the clients' test shards: {what}{spread}.",
    ]
    fewer = {
        "/".join(key): count for key, count in zip(summary.mean.index, summary.seeds, strict=True) if count < len(seeds)
    }
    if fewer:
        lines.append("Fewer seeds: " + ", ".join(f"{cell} {n} of {len(seeds)}" for cell, n in fewer.items()) + ".")
    if "real" in sources.split(", "):
        lines.append("In brackets: the paper's Table 1, from its full protocol (profiles authors and paper).")
    if "synthetic" in sources:
        lines.append(
            "SYNTHETIC data are a stand-in: these numbers show that the line works and nothing about the paper."
        )
    return "\n".join(lines)
