"""Curves, bands, rounds to a target, speed-ups and bytes, compared with values computed by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexifed.errors import ConfigError
from flexifed.report.curves import (
    bands,
    drawable_rows,
    render_speedups,
    rounds_to_target,
    scheme_curves,
    shown_target,
    speedups,
    version_curves,
)
from flexifed.report.sheet import Column
from flexifed.report.table import PICKS, Pick

CELL = {"dataset": "cifar10", "family": "vgg", "data_source": "real"}


def rows(scheme: str, curves: Mapping[str, Sequence[float]], *, seed: int = 0, sent: int = 10) -> pd.DataFrame:
    """Rows from {version: accuracy at each round}, one client each; the last round is scored only."""
    return pd.DataFrame(
        [
            {**CELL, "scheme": scheme, "seed": seed, "version": version, "round": index, "client": client,
             "accuracy": accuracy, "bytes_up": sent if index < len(curve) - 1 else 0}
            for client, (version, curve) in enumerate(curves.items())
            for index, accuracy in enumerate(curve)
        ]
    )  # fmt: skip


def one_version(scheme: str, curve: Sequence[float], seed: int = 0) -> pd.DataFrame:
    return rows(scheme, {"v1": curve}, seed=seed)


# ------------------------------------------------------------------------------------------------------------- curves


def test_a_versions_curve_is_the_mean_of_its_clients_and_counts_bytes_of_the_rounds_before() -> None:
    clients = pd.concat(
        [rows("max_common", {"v1": [0.1, 0.2, 0.6]}, sent=10), rows("max_common", {"v1": [0.3, 0.4, 0.8]}, sent=30)]
    )
    curves = version_curves(clients)
    assert curves["accuracy"].tolist() == pytest.approx([20, 30, 70])
    assert curves["sent"].tolist() == [0, 20, 40]


def test_a_schemes_curve_counts_versions_alike_however_many_clients_they_have() -> None:
    both_versions = rows("max_common", {"v1": [0.2], "v2": [0.9]})
    second_v1_client = rows("max_common", {"v1": [0.4]})
    assert scheme_curves(version_curves(pd.concat([both_versions, second_v1_client])))[
        "accuracy"
    ].item() == pytest.approx(60)


def test_a_band_is_one_sample_standard_deviation_over_seeds() -> None:
    seeds = pd.concat(one_version("max_common", [accuracy], seed) for seed, accuracy in enumerate([0.4, 0.5, 0.9]))
    band = bands(scheme_curves(version_curves(seeds))).iloc[0]
    spread = math.sqrt((20**2 + 10**2 + 30**2) / 2)  # about their mean, 60
    assert (band["accuracy"], band["low"], band["high"]) == pytest.approx((60, 60 - spread, 60 + spread))
    assert band["seeds"] == 3


def test_one_seed_has_no_band() -> None:
    assert bands(version_curves(one_version("max_common", [0.4, 0.5])))[["low", "high"]].isna().all(axis=None)


def test_seeds_are_not_mixed_when_bytes_are_counted() -> None:
    curves = version_curves(pd.concat([one_version("max_common", [0.1, 0.2, 0.3], seed) for seed in (0, 1)]))
    assert curves["sent"].tolist() == [0, 10, 20, 0, 10, 20]


# --------------------------------------------------------------------------------------------------- rounds to a target


def first_rounds(
    table: pd.DataFrame, rounds: int, target: float | None = None, pick: Pick = "last"
) -> dict[object, float]:
    """The first round that reaches the target, by scheme and seed."""
    runs = rounds_to_target(table, rounds, target, pick)
    return dict(zip(zip(runs["scheme"], runs["seed"], strict=True), runs["rounds"], strict=True))


def test_the_first_round_counts_though_accuracy_falls_again() -> None:
    assert first_rounds(one_version("max_common", [0.1, 0.5, 0.3, 0.6]), 3, 45)["max_common", 0] == 1


def test_a_target_that_is_met_exactly_is_reached() -> None:
    assert first_rounds(one_version("max_common", [0.1, 0.2, 0.3]), 2, 30)["max_common", 0] == 2


def test_the_mean_over_versions_has_to_reach_the_target() -> None:
    table = rows("max_common", {"v1": [0.9, 0.9, 0.9], "v2": [0.1, 0.2, 0.5]})
    assert first_rounds(table, 2, 60)["max_common", 0] == 2


def test_a_target_never_reached_has_no_round() -> None:
    assert math.isnan(first_rounds(one_version("max_common", [0.1, 0.2]), 1, 99)["max_common", 0])


def test_by_default_the_target_is_the_baselines_final_accuracy_under_the_same_seed() -> None:
    table = pd.concat(
        [
            one_version("clustered_fl", [0.1, 0.3, 0.4], 0),
            one_version("clustered_fl", [0.1, 0.2, 0.6], 1),
            one_version("max_common", [0.1, 0.5, 0.5], 0),
            one_version("max_common", [0.1, 0.5, 0.5], 1),
            one_version("standalone", [0.1, 0.4, 0.6], 2),  # no baseline under this seed
        ]
    )
    by_seed = first_rounds(table, 2)
    assert [by_seed["clustered_fl", seed] for seed in (0, 1)] == [2, 2]
    assert by_seed["max_common", 0] == 1
    assert math.isnan(by_seed["max_common", 1])
    assert ("standalone", 2) not in by_seed


@given(st.lists(st.tuples(*[st.integers(0, 100)] * 3), min_size=2, max_size=25), st.sampled_from(PICKS))
def test_the_baseline_always_reaches_its_own_target(curves: list[tuple[int, ...]], pick: Pick) -> None:
    """A mean of some scores is not above the best of them."""
    versions = {f"v{index + 1}": [scores[index] / 100 for scores in curves] for index in range(3)}
    table = rows("clustered_fl", versions)
    assert not math.isnan(first_rounds(table, len(curves) - 1, None, pick)["clustered_fl", 0])


@given(st.lists(st.integers(0, 100), min_size=1, max_size=20), st.integers(1, 100))
def test_rounds_are_those_of_a_plain_search(scores: list[int], target: int) -> None:
    expected = next((index for index, score in enumerate(scores) if score >= target), None)
    table = one_version("max_common", [score / 100 for score in scores])
    actual = first_rounds(table, len(scores) - 1, target)["max_common", 0]
    assert (None if math.isnan(actual) else actual) == expected


@pytest.mark.parametrize(
    ("target", "end"), [(0, "100"), (-1, "100"), (101, "100"), (math.nan, "100"), (0.8, "for 80 % give 80")]
)
def test_a_target_that_is_no_percentage_is_refused(target: float, end: str) -> None:
    with pytest.raises(ConfigError, match=rf"it must be an accuracy in percent, from 1 to .*{end}$"):
        rounds_to_target(one_version("max_common", [0.1]), 0, target)


# ----------------------------------------------------------------------------------------------------------- speed-ups


def step(at: int | None) -> list[float]:
    """Accuracy of 10 % before a round, 90 % from it on; never for None."""
    return [0.9 if at is not None and index >= at else 0.1 for index in range(13)]


def reached_at(**by_scheme: list[int | None]) -> pd.DataFrame:
    """`speedups` for a target of 50 % from the round at which each seed reaches it."""
    table = pd.concat(
        one_version(scheme, step(at), seed) for scheme, seeds in by_scheme.items() for seed, at in enumerate(seeds)
    )
    return speedups(rounds_to_target(table, 12, 50))


def speedups_by_scheme(**by_scheme: list[int | None]) -> pd.DataFrame:
    """Like `reached_at`, indexed by scheme alone."""
    return reached_at(**by_scheme).droplevel(["dataset", "family"])


def test_a_speedup_is_the_ratio_of_mean_rounds() -> None:
    table = speedups_by_scheme(clustered_fl=[8, 12], max_common=[2, 6])
    assert table.loc["max_common", ["rounds", "speedup", "reached", "seeds"]].tolist() == [4, 2.5, 2, 2]
    assert table.loc["clustered_fl", ["rounds", "speedup"]].tolist() == [10, 1]


def test_a_speedup_is_over_the_seeds_in_which_both_reached_the_target() -> None:
    table = speedups_by_scheme(clustered_fl=[8, None, 12], max_common=[2, 3, None], standalone=[None, 4, None])
    assert table.loc["max_common", ["rounds", "speedup", "reached", "seeds"]].tolist() == [2.5, 4, 2, 3]
    assert table["pairs"].to_dict() == {"standalone": 0, "clustered_fl": 2, "max_common": 1}
    assert table.loc["standalone", "rounds"] == 4
    assert math.isnan(table.loc["standalone", "speedup"])


def test_the_number_of_pairs_stands_beside_the_speedup() -> None:
    table = reached_at(
        clustered_fl=[8, None, None], max_common=[2, 3, 4], standalone=[0, 0, 0], basic_common=[None] * 3
    )
    sheet = render_speedups(table, rounds=12, target=50)
    assert sheet.columns[1:3] == (Column("speed-up"), Column("n"))
    [section] = sheet.sections
    assert {label: cells[1:3] for label, cells in section.rows} == {
        "standalone": (("at the start",), ("",)),
        "clustered_fl": (("1.00×",), ("1",)),
        "basic_common": (("",), ("",)),
        "max_common": (("4.00×",), ("1",)),
    }
    assert "over the n seeds in which both reached the target" in sheet.notes[0]


def test_a_target_that_is_never_reached_has_neither_rounds_nor_speedup() -> None:
    table = speedups_by_scheme(clustered_fl=[8], basic_common=[None])
    assert table.loc["basic_common", ["rounds", "speedup"]].isna().all()
    assert table.loc["basic_common", "reached"] == 0


def test_without_a_baseline_there_are_rounds_but_no_speedup() -> None:
    table = speedups_by_scheme(max_common=[3])
    assert table.loc["max_common", "rounds"] == 3
    assert math.isnan(table.loc["max_common", "speedup"])


def test_a_scheme_that_begins_above_the_target_has_no_speedup() -> None:
    assert math.isnan(speedups_by_scheme(clustered_fl=[8], max_common=[0]).loc["max_common", "speedup"])


# ---------------------------------------------------------------------------------------------- rows of the figures


def test_unfinished_seeds_are_left_out_where_there_are_finished_ones() -> None:
    drawn = drawable_rows(
        one_version("max_common", [0.1, 0.2], seed=1), one_version("max_common", [0.1, 0.2, 0.3], seed=0)
    )
    assert set(drawn["seed"]) == {0}


def test_where_no_seed_is_finished_curves_end_where_the_shortest_does() -> None:
    unfinished = pd.concat(
        [one_version("max_common", [0.1, 0.2, 0.3, 0.4], seed=0), one_version("max_common", [0.1, 0.2], seed=1)]
    )
    drawn = drawable_rows(unfinished, one_version("standalone", [0.1, 0.2, 0.3, 0.4, 0.5]))
    ends = drawn.groupby(["scheme", "seed"])["round"].max().to_dict()
    assert ends == {("max_common", 0): 1, ("max_common", 1): 1, ("standalone", 0): 4}


def test_the_target_that_is_shown_is_the_baselines_over_all_its_seeds() -> None:
    cells = pd.DataFrame({"scheme": ["standalone", "clustered_fl"], "target": [40.0, 39.0]})
    assert shown_target(cells) == 39.0
    assert shown_target(cells[cells["scheme"] == "standalone"]) == 40.0
