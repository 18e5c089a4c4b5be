"""Table 1 from rows: numbers computed by hand, and which kinds of data may be compared with the paper."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from flexifed.config import SCHEMES, CellName
from flexifed.errors import ConfigError
from flexifed.report.runs import StoredCell
from flexifed.report.table import Pick, Summary, counted_rounds, paper_table, per_seed, render, summarise

KEY = ("cifar10", "vgg", "max_common")


def rows(curve: Mapping[int, Sequence[float]], **changes: object) -> pd.DataFrame:
    """Rows of a version's clients from {round: accuracy of each client}."""
    cell = {
        "dataset": "cifar10",
        "family": "vgg",
        "scheme": "max_common",
        "data_source": "real",
        "seed": 0,
        "version": "v1",
    }
    return pd.DataFrame(
        [
            {**cell, "round": index, "client": client, "accuracy": accuracy, **changes}
            for index, accuracies in curve.items()
            for client, accuracy in enumerate(accuracies)
        ]
    )


def grid(seeds: Sequence[int], source: str = "real", schemes: Sequence[str] = SCHEMES) -> pd.DataFrame:
    """All schemes and versions with accuracies of 12.5, 22.5, ... percent, ten more for each seed."""
    return pd.concat(
        rows(
            {index: [0.125 + 0.1 * version + 0.1 * position] for index in range(3)},
            scheme=scheme,
            version=f"v{version + 1}",
            seed=seed,
            data_source=source,
        )
        for position, seed in enumerate(seeds)
        for scheme in schemes
        for version in range(4)
    )


def table_text(
    summary: Summary, seeds: Sequence[int] = (0,), rounds: int = 2, pick: Pick = "last", width: int = 80
) -> str:
    """The table as a terminal of the given width shows it."""
    console = Console(file=io.StringIO(), width=width)
    console.print(render(summary, profile="quick", rounds=rounds, seeds=seeds, pick=pick), highlight=False)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# --------------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize(
    ("rounds", "counted"), [(1, 1), (9, 1), (19, 1), (20, 2), (60, 6), (499, 49), (500, 50), (502, 50), (10_000, 50)]
)
def test_a_tenth_of_the_rounds_counts_at_least_one_and_at_most_fifty(rounds: int, counted: int) -> None:
    assert counted_rounds(rounds) == counted


# Clients' means by round: 0.1 at first, 0.5, then 0.8 at round 18, 0.4 at 19 and 0.6 at 20.
CURVE = {0: [0.0, 0.2], **{index: [0.5, 0.5] for index in range(1, 18)}, 18: [0.9, 0.7], 19: [0.3, 0.5], 20: [0.7, 0.5]}


@pytest.mark.parametrize(("pick", "percent"), [("last", 50.0), ("best", 80.0), ("final", 60.0)])
def test_a_seeds_number_is_the_mean_of_its_clients_over_the_rounds_that_count(pick: Pick, percent: float) -> None:
    (number,) = per_seed(rows(CURVE), 20, pick).to_dict("records")
    assert number.pop("v1") == pytest.approx(percent)
    assert number == {
        "dataset": "cifar10",
        "family": "vgg",
        "scheme": "max_common",
        "data_source": "real",
        "seed": 0,
    }


@pytest.mark.parametrize("pick", ["last", "best", "final"])
def test_rounds_beyond_the_requested_ones_do_not_count(pick: Pick) -> None:
    longer = rows({**CURVE, 21: [1.0, 1.0], 22: [1.0, 1.0]})
    pd.testing.assert_frame_equal(per_seed(longer, 20, pick), per_seed(rows(CURVE), 20, pick))


def test_best_is_a_round_of_the_version_and_not_of_each_client() -> None:
    assert per_seed(rows({0: [1.0, 0.0], 1: [0.0, 1.0], 2: [0.6, 0.6]}), 2, "best")["v1"].item() == pytest.approx(60)


def test_an_unknown_pick_is_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match="pick is 'median'; choose one of: last, best, final"):
        per_seed(rows(CURVE), 20, "median")  # type: ignore[arg-type]


def test_mean_and_spread_are_over_seeds() -> None:
    summary = summarise(
        pd.concat(
            [
                *(rows({2: [accuracy, accuracy]}, seed=seed) for seed, accuracy in enumerate([0.5, 0.6, 0.8])),
                rows({2: [0.25]}, version="v2"),
                rows({2: [0.75]}, version="v2", seed=1),
            ]
        ),
        2,
    )
    assert list(summary.mean.columns) == ["v1", "v2"]
    assert summary.mean.loc[KEY, "v1"] == pytest.approx(190 / 3)
    assert summary.spread.loc[KEY, "v1"] == pytest.approx((700 / 3) ** 0.5)  # 40/3, 10/3 and 50/3 away; over n - 1
    assert summary.mean.loc[KEY, "v2"] == pytest.approx(50)
    assert summary.spread.loc[KEY, "v2"] == pytest.approx(1250**0.5)
    assert (summary.seeds[KEY], summary.sources[KEY]) == (3, "real")


def test_one_seed_has_no_spread() -> None:
    assert summarise(rows(CURVE), 20).spread.isna().all(axis=None)


def test_a_cell_of_two_data_sources_is_refused() -> None:
    mixed = pd.concat([rows(CURVE), rows(CURVE, data_source="synthetic", seed=1)])
    with pytest.raises(ConfigError, match=r"cifar10/vgg/max_common come from different data sources; select rows by"):
        summarise(mixed, 20)


# ------------------------------------------------------------------------------------------------- the paper's table


def test_the_papers_table_has_forty_rows_of_four_versions() -> None:
    paper = paper_table()
    assert paper.shape == (40, 4)
    assert paper.index.is_unique
    assert paper.index.names == ["dataset", "family", "scheme"]
    assert paper.loc[KEY].to_dict() == {"v1": 80.6, "v2": 85.2, "v3": 86.6, "v4": 86.8}
    assert set(paper.index.get_level_values("scheme")) == set(SCHEMES)
    assert paper.groupby(["dataset", "family"]).size().tolist() == [5] * 8
    assert paper.gt(20).all(axis=None)
    assert paper.lt(100).all(axis=None)


# ----------------------------------------------------------------------------------------------------------- rendered


def row_of(table: str, scheme: str) -> list[str]:
    """The words of a scheme's row."""
    (row,) = (line for line in table.splitlines() if scheme in line)
    return row.split()


def test_real_numbers_stand_beside_the_papers_and_no_word_is_cut() -> None:
    table = table_text(summarise(grid([0]), 2), width=100)
    assert row_of(table, "max_common") == [
        "max_common",
        *("12.5", "80.6", "-68.1"),
        *("22.5", "85.2", "-62.7"),
        *("32.5", "86.6", "-54.1"),
        *("42.5", "86.8", "-44.3"),
    ]
    assert row_of(table, "standalone")[1:4] == ["12.5", "64.4", "-51.9"]
    assert "Beside them: the paper's Table 1" in table
    assert "SYNTHETIC" not in table
    assert_within(table, 100)


def test_schemes_stand_in_the_papers_order() -> None:
    table = table_text(summarise(grid([0], schemes=SCHEMES[::-1]), 2))
    assert re.findall(rf"^({'|'.join(SCHEMES)}) ", table, re.MULTILINE) == list(SCHEMES)


def assert_within(table: str, width: int) -> None:
    assert max(map(len, table.splitlines())) <= width
    assert "…" not in table, "a number is cut short"


def test_three_seeds_of_synthetic_data_fit_80_columns_with_their_spread() -> None:
    table = table_text(summarise(grid([0, 1, 2], "synthetic"), 2), seeds=[0, 1, 2])
    assert row_of(table, "clustered_common") == ["clustered_common", *(f"{n}2.5±10.0" for n in (2, 3, 4, 5))]
    assert "mean ± standard deviation over 3 seeds" in " ".join(table.split())
    assert_within(table, 80)


def test_three_seeds_beside_the_papers_numbers_fit_80_columns() -> None:
    table = table_text(summarise(grid([0, 1, 2]), 2), seeds=[0, 1, 2])
    assert_within(table, 80)
    for number in ("22.5±10.0", "52.5±10.0", "80.6", "86.8", "clustered_common"):
        assert number in table


@pytest.mark.parametrize("source", ["synthetic", "real-partial"])
@pytest.mark.parametrize("seeds", [[0], [0, 1, 2]])
def test_no_number_of_the_papers_stands_beside_other_data_than_all_the_real(source: str, seeds: list[int]) -> None:
    table = table_text(summarise(grid(seeds, source), 2), seeds=seeds)
    assert f"cifar10 / vgg [{source.upper()} DATA]" in table.splitlines()
    assert "diff" not in table
    assert not [
        number
        for number in map(str, paper_table().sort_index().loc[("cifar10", "vgg")].to_numpy().flat)
        if number in table
    ]


def test_no_number_of_the_papers_stands_beside_another_experiment() -> None:
    table = " ".join(table_text(summarise(grid([0]), 2, compare=False)).split())
    assert "another experiment than the paper's Table 1" in table
    assert "(Table 1)" not in table
    assert "diff" not in table
    assert "diff" in table_text(summarise(grid([0]), 2))


@pytest.mark.parametrize(
    ("name", "usual", "other"),
    [
        ("model.versions", None, "v1 v4"),
        ("partition.dirichlet_alpha", None, 0.5),
        ("sharing.clients_per_round", None, 4),
        ("sharing.classifier", "prefix", "always"),
    ],
)
def test_settings_that_make_another_experiment(name: str, usual: object, other: object) -> None:
    assert stored_with({}).has_settings_of_table_1  # as in files that are older than the setting
    assert stored_with({name: usual, "training.batch_size": 7}).has_settings_of_table_1
    assert not stored_with({name: other}).has_settings_of_table_1


def stored_with(settings: dict[str, object]) -> StoredCell:
    return StoredCell(
        name="cell",
        cell=CellName("cifar10", "vgg", "max_common"),
        seed=0,
        last_round=2,
        rounds=2,
        extended_to=None,
        profile="thin",
        data_source="real",
        fingerprint="",
        settings=settings,
    )


def test_synthetic_data_are_named_in_title_and_caption() -> None:
    table = " ".join(table_text(summarise(grid([0], "synthetic"), 2)).split())
    assert "cifar10 / vgg [SYNTHETIC DATA] standalone" in table
    assert "Data: synthetic." in table
    warning = "SYNTHETIC data are a stand-in: these numbers show that the software runs and nothing about the paper."
    assert warning in table


def test_a_table_of_real_and_synthetic_cells_shows_no_paper_number_beside_the_synthetic_ones() -> None:
    mixed = pd.concat([grid([0], "real", ["basic_common"]), grid([0], "synthetic", ["standalone"])])
    table = table_text(summarise(mixed, 2))
    assert "64.4" not in " ".join(row_of(table, "standalone"))


def test_a_cell_with_fewer_seeds_than_requested_is_named() -> None:
    incomplete = pd.concat([grid([0, 1, 2], schemes=["max_common"]), grid([0, 1], schemes=["standalone"])])
    table = table_text(summarise(incomplete, 2), seeds=[0, 1, 2])
    assert "Fewer seeds: cifar10/vgg/standalone 2 of 3." in table


def test_every_number_is_rounded_once_and_no_difference_is_minus_zero() -> None:
    exact = rows({2: [0.80551]})  # 80.551 beside the paper's 80.6
    [number] = summarise(exact, 2).numbers().to_dict("records")
    assert (number["mean"], number["paper"]) == (80.6, 80.6)
    assert str(number["difference"]) == "0.0"
    assert row_of(table_text(summarise(exact, 2)), "max_common") == ["max_common", "80.6", "80.6", "+0.0"]


@pytest.mark.parametrize("percent", [78.05, 78.15, 78.25, 78.35, 80.549, 80.65])
def test_a_difference_is_that_of_the_numbers_that_are_shown(percent: float) -> None:
    [number] = summarise(rows({2: [percent / 100]}), 2).numbers().to_dict("records")
    assert f"{number['difference']:.1f}" == f"{round(number['mean'] * 10) / 10 - number['paper']:.1f}"


def test_rows_stand_in_the_papers_order_and_those_that_it_lacks_come_last() -> None:
    table = pd.concat(
        rows({2: [0.5]}, dataset=dataset, family=family)
        for dataset, family in [("svhn", "vgg"), ("agnews", "vdcnn"), ("cifar10", "resnet"), ("agnews", "charcnn")]
    )
    order = [key[:2] for key in summarise(table, 2).mean.index]
    assert order == [("cifar10", "resnet"), ("agnews", "charcnn"), ("agnews", "vdcnn"), ("svhn", "vgg")]


def test_a_family_that_the_paper_lacks_is_shown_alone() -> None:
    plain = grid([0]).assign(family="vgg_plain")
    assert row_of(table_text(summarise(plain, 2)), "max_common")[1:] == ["12.5", "22.5", "32.5", "42.5"]


def test_fewer_versions_make_fewer_columns() -> None:
    table = table_text(summarise(rows({2: [0.5]}), 2))
    assert row_of(table, "max_common") == ["max_common", "50.0", "80.6", "-30.6"]


@pytest.mark.parametrize(
    ("pick", "rounds", "description"),
    [
        ("last", 2, "last scored round"),
        ("last", 40, "mean of the last 4 scored rounds"),
        ("best", 40, "best round"),
        ("final", 40, "last scored round"),
    ],
)
def test_the_caption_names_the_number_that_is_shown(pick: Pick, rounds: int, description: str) -> None:
    table_rows: Any = rows({index: [0.5] for index in range(rounds + 1)})
    table = " ".join(table_text(summarise(table_rows, rounds, pick), rounds=rounds, pick=pick).split())
    assert f"Accuracy on the clients' test shards: {description}." in table
    assert f"Profile: quick. Rounds: {rounds}. Seeds: 0." in table
