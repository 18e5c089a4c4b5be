"""Compare schemes: paired differences with confidence intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import pandas as pd
from scipy.special import stdtrit

from flexifed.config import VERSIONS
from flexifed.report.sheet import Cell, Column, Section, Sheet
from flexifed.report.table import DIGITS, in_paper_order, source_label

COMPARISONS = (
    ("clustered_fl", "standalone"),
    ("max_common", "clustered_fl"),
    ("max_common", "clustered_common"),
    ("basic_common", "standalone"),
)
"""The comparisons that the paper's claims rest on: (scheme, scheme it is compared with)."""

CONFIDENCE = 0.95
PAIRED = "Paired differences, a pair for each version and seed"
BY_SEED_NOTE = (
    "The first interval treats the pairs of one seed as independent. The versions of a seed are trained together, so "
    "the interval by seed, with one pair per seed (the mean over its versions), is the more conservative one."
)


@dataclass(frozen=True)
class PairedDifference:
    """The mean of `scheme - against` in points of accuracy, over pairs that differ in nothing else.

    `low` and `high` bound Student's 95 % interval for the mean of n independent pairs; they are nan for a single pair.
    """

    dataset: str
    family: str
    data_source: str
    scheme: str
    against: str
    pairs: int
    mean: float
    low: float
    high: float


def paired_differences(
    numbers: pd.DataFrame, comparisons: Sequence[tuple[str, str]] = COMPARISONS, *, by_seed: bool = False
) -> list[PairedDifference]:
    """Compare schemes under the same seed and version, hence with the same shards and initial weights.

    Args:
        numbers: from `flexifed.report.table.per_seed`.
        comparisons: (scheme, scheme it is compared with); those without rows are left out.
        by_seed: whether a pair is the mean over the versions of a seed, instead of one version under one seed. The
            versions of a seed are trained together, so this is the more conservative choice.
    """
    versions = [version for version in VERSIONS if version in numbers]
    results = []
    for (dataset, family, source), cells in in_paper_order(numbers).groupby(
        ["dataset", "family", "data_source"], sort=False
    ):
        by_scheme = {scheme: rows.set_index("seed")[versions] for scheme, rows in cells.groupby("scheme")}
        for scheme, against in comparisons:
            if scheme in by_scheme and against in by_scheme:
                differences = (by_scheme[scheme] - by_scheme[against]).dropna()
                values = differences.mean(axis=1).tolist() if by_seed else differences.to_numpy().ravel().tolist()
                if values:
                    results.append(
                        PairedDifference(
                            str(dataset), str(family), str(source), scheme, against, *mean_with_interval(values)
                        )
                    )
    return results


def mean_with_interval(values: Sequence[float]) -> tuple[int, float, float, float]:
    """The number of values, their mean, and the bounds of its interval (Student's t; nan for a single value)."""
    count = len(values)
    mean = sum(values) / count
    if count < 2:
        return count, mean, math.nan, math.nan
    error = statistics.stdev(values) / math.sqrt(count)
    half_width = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2)) * error
    return count, mean, mean - half_width, mean + half_width


def render_differences(
    differences: Sequence[PairedDifference], title: str, by_seed: Sequence[PairedDifference] = ()
) -> Sheet:
    """Lay out differences as a table.

    Args:
        differences: from `paired_differences`.
        title: the title of the table.
        by_seed: the same comparisons with one pair per seed. If given, their intervals stand beside the others.
    """
    sections = []
    intervals_by_seed = {_key(difference): _cells(difference)[1:] for difference in by_seed}
    for (dataset, family, source), group in groupby(differences, key=lambda row: _key(row)[:3]):
        rows = [
            (f"{row.scheme} - {row.against}", (*_cells(row), *intervals_by_seed.get(_key(row), ()))) for row in group
        ]
        sections.append(Section(f"{dataset} / {family}{source_label(source)}", tuple(rows)))
    names = ("points", "95 % interval", "n") + (("by seed", "n") if by_seed else ())
    notes = (BY_SEED_NOTE,) if by_seed else ()
    return Sheet(title, tuple(map(Column, names)), tuple(sections), notes)


def _key(row: PairedDifference) -> tuple[str, ...]:
    return (row.dataset, row.family, row.data_source, row.scheme, row.against)


def _cells(row: PairedDifference) -> tuple[Cell, ...]:
    interval = "" if math.isnan(row.low) else f"{row.low:+z.{DIGITS}f} to {row.high:+z.{DIGITS}f}"
    return (f"{row.mean:+z.{DIGITS}f}",), (interval,), (str(row.pairs),)
