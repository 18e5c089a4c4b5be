"""Schemes against each other: paired differences with confidence intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import pandas as pd
from scipy.special import stdtrit

from flexifed.report.sheet import Cell, Column, Section, Sheet
from flexifed.report.table import DIGITS, VERSIONS, in_paper_order, source_label

COMPARISONS = (
    ("clustered_fl", "standalone"),
    ("max_common", "clustered_fl"),
    ("max_common", "clustered_common"),
    ("basic_common", "standalone"),
)
"""The comparisons that the paper's claims rest on: (scheme, against which)."""

CONFIDENCE = 0.95
PAIRED = "Paired differences, a pair for each version and seed"
BY_SEED_NOTE = (
    "The first interval takes the pairs of one seed as independent. Its versions are trained together, so the interval "
    "by seed, with one pair for each (the mean over its versions), is the more careful one."
)


@dataclass(frozen=True)
class PairedDifference:
    """The mean of `scheme - against` in points of accuracy, over pairs that agree in all else.

    `low` and `high` bound Student's interval of 95 % for the mean of n independent pairs; nan for one pair.
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
    """Compare schemes on the same seed and version, so with the same shards and initial weights.

    Args:
        numbers: from `flexifed.report.table.per_seed`.
        comparisons: (scheme, against which); those for which rows are missing are left out.
        by_seed: one pair for each seed, the mean over its versions, instead of one for each seed and version. The
            versions of one seed are trained together, so this is the more careful count.
    """
    versions = [version for version in VERSIONS if version in numbers]
    found = []
    for (dataset, family, source), cells in in_paper_order(numbers).groupby(
        ["dataset", "family", "data_source"], sort=False
    ):
        by_scheme = {scheme: rows.set_index("seed")[versions] for scheme, rows in cells.groupby("scheme")}
        for scheme, against in comparisons:
            if scheme in by_scheme and against in by_scheme:
                differences = (by_scheme[scheme] - by_scheme[against]).dropna()
                values = differences.mean(axis=1).tolist() if by_seed else differences.to_numpy().ravel().tolist()
                if values:
                    found.append(
                        PairedDifference(str(dataset), str(family), str(source), scheme, against, *_interval(values))
                    )
    return found


def _interval(values: Sequence[float]) -> tuple[int, float, float, float]:
    """Number of values, mean, and the bounds of its interval."""
    count = len(values)
    mean = sum(values) / count
    if count < 2:
        return count, mean, math.nan, math.nan
    error = statistics.stdev(values) / math.sqrt(count)
    half = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2)) * error
    return count, mean, mean - half, mean + half


def render_differences(
    differences: Sequence[PairedDifference], title: str, by_seed: Sequence[PairedDifference] = ()
) -> Sheet:
    """The differences as a table.

    Args:
        differences: with a pair for each version and seed, or for each seed.
        title: above it.
        by_seed: the same comparisons with a pair for each seed, whose intervals then stand beside the others.
    """
    sections = []
    careful = {_key(one): _cells(one)[1:] for one in by_seed}
    for where, group in groupby(differences, key=lambda one: (one.dataset, one.family, one.data_source)):
        rows = [(f"{one.scheme} - {one.against}", (*_cells(one), *careful.get(_key(one), ()))) for one in group]
        dataset, family, source = where
        sections.append(Section(f"{dataset} / {family}{source_label(source)}", tuple(rows)))
    names = ("points", "95 % interval", "n") + (("by seed", "n by seed") if by_seed else ())
    notes = (BY_SEED_NOTE,) if by_seed else ()
    return Sheet(title, tuple(map(Column, names)), tuple(sections), notes)


def _key(one: PairedDifference) -> tuple[str, ...]:
    return (one.dataset, one.family, one.data_source, one.scheme, one.against)


def _cells(one: PairedDifference) -> tuple[Cell, ...]:
    interval = "" if math.isnan(one.low) else f"{one.low:+z.{DIGITS}f} to {one.high:+z.{DIGITS}f}"
    return (f"{one.mean:+z.{DIGITS}f}",), (interval,), (str(one.pairs),)
