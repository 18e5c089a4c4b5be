"""Accuracy over rounds, its band over seeds, the rounds needed to reach a target, and the bytes sent until then.

Clients are scored at the start of a round, so the score of round r is that after r rounds of training.
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
"""The scheme that the others are compared with, as in the paper."""

REACHED = "Rounds to a target accuracy, and the speed-up"

Target: TypeAlias = float | None
"""An accuracy in percent; None for the final accuracy of the baseline."""

_KEYS = [*CELL, "data_source", "seed"]


def version_curves(rows: pd.DataFrame) -> pd.DataFrame:
    """Compute a row for each cell, seed, version and round.

    Further columns: `accuracy`, in percent, and `sent`, the bytes that a client has sent in all earlier rounds. Both
    are means over the clients of the version.
    """
    keys = [*_KEYS, "version"]
    curves = rows.groupby([*keys, "round"])[["accuracy", "bytes_up"]].mean().reset_index()
    curves["accuracy"] *= 100
    curves["sent"] = curves.groupby(keys)["bytes_up"].cumsum() - curves["bytes_up"]
    return curves.drop(columns="bytes_up")


def scheme_curves(curves: pd.DataFrame) -> pd.DataFrame:
    """Compute a row for each cell, seed and round: the mean over versions of the columns of `version_curves`."""
    return curves.groupby([*_KEYS, "round"])[["accuracy", "sent"]].mean().reset_index()


def bands(curves: pd.DataFrame) -> pd.DataFrame:
    """Summarise curves over seeds.

    `accuracy` and `sent` are means over seeds, `seeds` is their number. `low` and `high` are one sample standard
    deviation below and above the mean accuracy; missing for a single seed.

    Args:
        curves: from `version_curves` or `scheme_curves`.
    """
    keys = [name for name in curves.columns if name not in ("seed", "accuracy", "sent")]
    groups = curves.groupby(keys)
    means = groups.agg(accuracy=("accuracy", "mean"), sent=("sent", "mean"), seeds=("accuracy", "size"))
    spread = groups["accuracy"].std()
    return means.assign(low=means["accuracy"] - spread, high=means["accuracy"] + spread).reset_index()


def check_target(target: Target) -> None:
    """Check that a target is a percentage; a fraction of 1 is refused with the percentage that was probably meant.

    Raises:
        ConfigError: it is not a percentage from 1 to 100.
    """
    if target is None or 1 <= target <= 100:
        return
    hint = f"; for {100 * target:g} % give {100 * target:g}" if 0 < target < 1 else ""
    raise ConfigError(f"target is {target:g}; it must be an accuracy in percent, from 1 to 100{hint}")


def rounds_to_target(rows: pd.DataFrame, rounds: int, target: Target = None, pick: Pick = "last") -> pd.DataFrame:
    """Count the rounds of training until the mean accuracy over versions reached a target, for each cell and seed.

    Args:
        rows: rows of rounds files, all of one profile.
        rounds: the number of rounds of training.
        target: accuracy in percent. None: for each data set, family and seed, the baseline's final accuracy under this
            seed (mean over versions), which the baseline itself therefore reaches; cells without a baseline are left
            out.
        pick: the rounds that count as the end of the baseline.

    Returns:
        Columns dataset, family, scheme, data_source, seed, target and rounds. `rounds` is the first round with a mean
        accuracy of at least the target, missing if there is none. Later rounds may fall below the target again.

    Raises:
        ConfigError: `target` is not a percentage.
    """
    check_target(target)
    curves = scheme_curves(version_curves(rows[rows["round"] <= rounds]))
    row_keys = ["dataset", "family", "data_source", "seed"]
    if target is None:
        baseline = curves[curves["scheme"] == BASELINE]
        ends = per_seed(baseline.assign(accuracy=baseline["accuracy"] / 100, version="target"), rounds, pick)
        curves = curves.merge(ends.reindex(columns=[*row_keys, "target"]), on=row_keys)
    else:
        curves["target"] = float(target)
    # A mean of equal scores may differ from each of them in the last bits.
    reached = curves[curves["accuracy"] >= curves["target"] - 1e-9]
    first = reached.groupby(_KEYS)["round"].min().rename("rounds").astype(float)
    return curves[[*_KEYS, "target"]].drop_duplicates().merge(first.reset_index(), on=_KEYS, how="left")


def speedups(reached: pd.DataFrame) -> pd.DataFrame:
    """Summarise over seeds how many rounds each cell needed, and its speed-up over the baseline.

    Args:
        reached: from `rounds_to_target`.

    Returns:
        A table indexed by dataset, family and scheme in the paper's order. `target`: mean over seeds. `seeds` and
        `reached`: the number of seeds, and of those that reached the target. `rounds`: mean over the seeds that reached
        it; missing if none did. `pairs`: the number of seeds in which both the cell and the baseline reached the
        target. `speedup`: the baseline's rounds divided by the cell's, each the mean over these seeds; missing if there
        is no such seed, or if the cell began above the target.
    """
    row_keys = ["dataset", "family", "data_source", "seed"]
    baseline = reached[reached["scheme"] == BASELINE].set_index(row_keys)["rounds"].rename("baseline")
    pairs = reached.merge(baseline.reset_index(), on=row_keys, how="left")
    both = pairs.dropna(subset=["rounds", "baseline"]).groupby(CELL)[["rounds", "baseline"]]
    means = both.mean()
    groups = pairs.groupby([*CELL, "data_source"])
    table = groups.agg(
        target=("target", "mean"), seeds=("seed", "nunique"), reached=("rounds", "count"), rounds=("rounds", "mean")
    ).reset_index("data_source")
    table["pairs"] = both.size().reindex(table.index, fill_value=0)
    table["speedup"] = means["baseline"] / means["rounds"].where(means["rounds"] > 0)
    return in_paper_order(table)


def shown_target(cells: pd.DataFrame) -> float:
    """The target of one data set and family as one number: the baseline's mean over all its seeds, where it was run.

    Args:
        cells: rows of `speedups`, with their index as columns.
    """
    baseline = cells[cells["scheme"] == BASELINE]
    return float((cells if baseline.empty else baseline)["target"].mean())


def render_speedups(table: pd.DataFrame, *, rounds: int, target: Target = None, pick: Pick = "last") -> Sheet:
    """Lay out the rounds to the target and the speed-up of each scheme, by data set and family.

    Args:
        table: from `speedups`.
        rounds: the number of rounds of training.
        target: the target that was asked for.
        pick: the rounds that the baseline's accuracy is taken from, where it is the target.
    """
    sections = []
    for (dataset, family, source), cells in table.groupby(["dataset", "family", "data_source"], sort=False):
        level = f"{shown_target(cells.reset_index()):.{DIGITS}f} %"
        rows = [(str(key[2]), _cells(row)) for key, row in zip(cells.index, cells.to_dict("records"), strict=True)]
        sections.append(Section(f"{dataset} / {family}{source_label(str(source))}: {level}", tuple(rows)))
    definition = (
        f"the final mean accuracy of {BASELINE} over all versions under the same seed ({picked_rounds(rounds, pick)})"
        if target is None
        else "as asked for"
    )
    notes = (
        f"Target: {definition}. Rounds: rounds of training until the mean accuracy over all versions first reached the "
        f"target, as the mean over the seeds that reached it within {rounds}. Speed-up: {BASELINE}'s rounds divided by "
        "the scheme's, over the n seeds in which both reached the target.",
    )
    columns = tuple(map(Column, ("rounds", "speed-up", "n", "seeds that reached it")))
    return Sheet(REACHED, columns, tuple(sections), notes)


def _cells(row: Mapping[Hashable, Any]) -> tuple[Cell, ...]:
    rounds = f"{row['rounds']:.1f}".removesuffix(".0") if row["reached"] else "none"
    speedup, pairs = ("", "") if math.isnan(row["speedup"]) else (f"{row['speedup']:.2f}×", f"{row['pairs']:g}")
    if row["rounds"] == 0:
        speedup = "at the start"
    return (rounds,), (speedup,), (pairs,), (f"{row['reached']:g} of {row['seeds']:g}",)


def drawable_rows(unfinished: pd.DataFrame, finished: pd.DataFrame) -> pd.DataFrame:
    """Select the rows that curves are drawn from: a cell's finished seeds or, if it has none, the rounds that all its
    seeds have reached.

    Args:
        unfinished: rows of runs that are under way.
        finished: rows of runs that have all their rounds.
    """
    cells_with_finished_seeds = pd.MultiIndex.from_frame(finished[CELL].drop_duplicates())
    others = unfinished[~pd.MultiIndex.from_frame(unfinished[CELL]).isin(cells_with_finished_seeds)]
    last = others.groupby([*CELL, "seed"])["round"].max().groupby(CELL).min().rename("last")
    others = others.merge(last.reset_index(), on=CELL)
    return pd.concat([finished, others[others["round"] <= others["last"]].drop(columns="last")], ignore_index=True)
