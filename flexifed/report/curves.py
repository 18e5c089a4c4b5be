"""Accuracy over rounds, its band over seeds, the rounds that a target takes, and the bytes that it costs.

The score of round r is of what clients hold after r rounds of training. So "r rounds" and "round r" are one number.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any, TypeAlias

import pandas as pd

from flexifed.errors import ConfigError
from flexifed.report.sheet import Cell, Column, Section, Sheet
from flexifed.report.table import (
    CELL,
    DIGITS,
    Pick,
    in_paper_order,
    per_seed,
    picked_rounds,
    source_label,
)

BASELINE = "clustered_fl"
"""The scheme that others are compared with, as in the paper."""

REACHED = "Rounds to a target accuracy, and the speed-up"

Target: TypeAlias = float | None
"""An accuracy in percent; None for what the baseline ends at."""

_KEYS = [*CELL, "data_source", "seed"]


def version_curves(rows: pd.DataFrame) -> pd.DataFrame:
    """A row for each cell, seed, version and round.

    Columns beside those: `accuracy`, in percent, the mean over the clients of the version, and `sent`, the bytes that
    one of them (their mean) has sent in all rounds before.
    """
    keys = [*_KEYS, "version"]
    curves = rows.groupby([*keys, "round"])[["accuracy", "bytes_up"]].mean().reset_index()
    curves["accuracy"] *= 100
    curves["sent"] = curves.groupby(keys)["bytes_up"].cumsum() - curves["bytes_up"]
    return curves.drop(columns="bytes_up")


def scheme_curves(curves: pd.DataFrame) -> pd.DataFrame:
    """A row for each cell, seed and round: the mean over versions of what `version_curves` has."""
    return curves.groupby([*_KEYS, "round"])[["accuracy", "sent"]].mean().reset_index()


def bands(curves: pd.DataFrame) -> pd.DataFrame:
    """Curves over seeds: `accuracy` and `sent` are means, `low` and `high` one sample standard deviation of accuracy
    below and above; missing where there is one seed. `seeds` counts them.

    Args:
        curves: from `version_curves` or `scheme_curves`.
    """
    keys = [name for name in curves.columns if name not in ("seed", "accuracy", "sent")]
    groups = curves.groupby(keys)
    over = groups.agg(accuracy=("accuracy", "mean"), sent=("sent", "mean"), seeds=("accuracy", "size"))
    spread = groups["accuracy"].std()
    return over.assign(low=over["accuracy"] - spread, high=over["accuracy"] + spread).reset_index()


def check_target(target: Target) -> None:
    """Refuse what is no percentage, and what is one of 1 where one of 100 is meant.

    Raises:
        ConfigError: it is.
    """
    if target is None or 1 <= target <= 100:
        return
    meant = f"; for {100 * target:g} % give {100 * target:g}" if 0 < target < 1 else ""
    raise ConfigError(f"target is {target:g}; it must be an accuracy in percent, from 1 to 100{meant}")


def rounds_to_target(rows: pd.DataFrame, rounds: int, target: Target = None, pick: Pick = "last") -> pd.DataFrame:
    """How many rounds of training each cell and seed needed until the mean over its versions reached a target.

    Args:
        rows: as in the rounds files, of one profile.
        rounds: of training.
        target: accuracy in percent. None: for each data set, family and seed, what the baseline's mean over versions
            ends at under this seed, so that the baseline reaches it itself; cells without a baseline are left out.
        pick: which rounds of the baseline count as its end.

    Returns:
        Columns dataset, family, scheme, data_source, seed, target and rounds: the first round with a mean accuracy of
        at least the target; missing if there is none. It may fall below again later.

    Raises:
        ConfigError: a target that is no percentage.
    """
    check_target(target)
    curves = scheme_curves(version_curves(rows[rows["round"] <= rounds]))
    where = ["dataset", "family", "data_source", "seed"]
    if target is None:
        baseline = curves[curves["scheme"] == BASELINE]
        ends = per_seed(baseline.assign(accuracy=baseline["accuracy"] / 100, version="target"), rounds, pick)
        curves = curves.merge(ends.reindex(columns=[*where, "target"]), on=where)
    else:
        curves["target"] = float(target)
    # A mean of equal scores may differ from each of them in the last bits.
    reached = curves[curves["accuracy"] >= curves["target"] - 1e-9]
    first = reached.groupby(_KEYS)["round"].min().rename("rounds").astype(float)
    return curves[[*_KEYS, "target"]].drop_duplicates().merge(first.reset_index(), on=_KEYS, how="left")


def speedups(reached: pd.DataFrame) -> pd.DataFrame:
    """Over seeds, how many rounds each cell needed, and how much faster that is than the baseline.

    Args:
        reached: from `rounds_to_target`.

    Returns:
        Indexed by dataset, family and scheme in the paper's order. `target`: mean over its seeds. `seeds`, `reached`:
        how many there are, and how many of them reached the target. `rounds`: mean over those that did; missing if none
        did. `speedup`: the baseline's rounds by the cell's own, each the mean over those seeds in which both reached
        it; missing if there is none, or if the cell began above the target.
    """
    where = ["dataset", "family", "data_source", "seed"]
    baseline = reached[reached["scheme"] == BASELINE].set_index(where)["rounds"].rename("baseline")
    pairs = reached.merge(baseline.reset_index(), on=where, how="left")
    both = pairs.dropna(subset=["rounds", "baseline"]).groupby(CELL)[["rounds", "baseline"]].mean()
    groups = pairs.groupby([*CELL, "data_source"])
    table = groups.agg(
        target=("target", "mean"), seeds=("seed", "nunique"), reached=("rounds", "count"), rounds=("rounds", "mean")
    ).reset_index("data_source")
    table["speedup"] = both["baseline"] / both["rounds"].where(both["rounds"] > 0)
    return in_paper_order(table)


def shown_target(cells: pd.DataFrame) -> float:
    """The target of one data set and family in one number: the baseline's mean over all its seeds, where it was run.

    Args:
        cells: rows of `speedups`, with their index as columns.
    """
    baseline = cells[cells["scheme"] == BASELINE]
    return float((cells if baseline.empty else baseline)["target"].mean())


def render_speedups(table: pd.DataFrame, *, rounds: int, target: Target = None, pick: Pick = "last") -> Sheet:
    """The rounds to the target and the speed-up of each scheme, under its data set, family and target.

    Args:
        table: from `speedups`.
        rounds: of training.
        target: that was asked for.
        pick: which rounds the baseline's number is of, where it is the target.
    """
    sections = []
    for (dataset, family, source), cells in table.groupby(["dataset", "family", "data_source"], sort=False):
        level = f"{shown_target(cells.reset_index()):.{DIGITS}f} %"
        rows = [(str(key[2]), _cells(one)) for key, one in zip(cells.index, cells.to_dict("records"), strict=True)]
        sections.append(Section(f"{dataset} / {family}{source_label(str(source))}: {level}", tuple(rows)))
    which = (
        f"what {BASELINE}'s mean accuracy of all versions ends at under the same seed ({picked_rounds(rounds, pick)})"
        if target is None
        else "as asked for"
    )
    notes = (
        f"Target: {which}. Rounds: of training, until the mean accuracy of all versions first reached the target; mean "
        f"over the seeds that did, or none within {rounds}. Speed-up: {BASELINE}'s rounds by the scheme's, over the "
        "seeds in which both did.",
    )
    columns = tuple(map(Column, ("rounds", "speed-up", "seeds that reached it")))
    return Sheet(REACHED, columns, tuple(sections), notes)


def _cells(one: Mapping[Hashable, Any]) -> tuple[Cell, ...]:
    rounds = f"{one['rounds']:.1f}".removesuffix(".0") if one["reached"] else "none"
    speedup = "" if math.isnan(one["speedup"]) else f"{one['speedup']:.2f}×"
    if one["rounds"] == 0:
        speedup = "at the start"
    return (rounds,), (speedup,), (f"{one['reached']:g} of {one['seeds']:g}",)


def growing(rows: pd.DataFrame, finished: pd.DataFrame) -> pd.DataFrame:
    """The rows of curves that can be drawn: a cell's finished seeds; where it has none, the rounds that all its seeds
    have.

    Args:
        rows: of cells under way.
        finished: of cells that have all their rounds.
    """
    done = pd.MultiIndex.from_frame(finished[CELL].drop_duplicates())
    alone = rows[~pd.MultiIndex.from_frame(rows[CELL]).isin(done)]
    last = alone.groupby([*CELL, "seed"])["round"].max().groupby(CELL).min().rename("last")
    alone = alone.merge(last.reset_index(), on=CELL)
    return pd.concat([finished, alone[alone["round"] <= alone["last"]].drop(columns="last")], ignore_index=True)
