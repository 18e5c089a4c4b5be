import math

import pandas as pd
import pytest
from scipy import stats

from flexifed.report.compare import paired_differences, render_differences


def numbers(**by_scheme: list[tuple[float, float]]) -> pd.DataFrame:
    """A table like that of `per_seed`: for each scheme and seed the accuracies of two versions."""
    return pd.DataFrame(
        [
            {
                "dataset": "cifar10",
                "family": "vgg",
                "data_source": "real",
                "scheme": scheme,
                "seed": seed,
                "v1": v1,
                "v2": v2,
            }
            for scheme, seeds in by_scheme.items()
            for seed, (v1, v2) in enumerate(seeds)
        ]
    )


def test_differences_are_paired_by_seed_and_version() -> None:
    table = numbers(standalone=[(10, 20), (30, 40)], basic_common=[(11, 22), (33, 44)])
    [difference] = paired_differences(table)
    assert (difference.scheme, difference.against, difference.pairs, difference.mean) == (
        "basic_common",
        "standalone",
        4,
        2.5,
    )
    interval = stats.ttest_1samp([1, 2, 3, 4], 0).confidence_interval(0.95)
    assert (difference.low, difference.high) == pytest.approx((interval.low, interval.high))


def test_by_seed_a_pair_is_the_mean_over_versions() -> None:
    table = numbers(standalone=[(10, 20), (30, 40)], basic_common=[(11, 22), (33, 44)])
    [difference] = paired_differences(table, by_seed=True)
    interval = stats.ttest_1samp([1.5, 3.5], 0).confidence_interval(0.95)
    assert (difference.pairs, difference.mean) == (2, 2.5)
    assert (difference.low, difference.high) == pytest.approx((interval.low, interval.high))


def test_the_table_shows_the_interval_by_seed_beside_the_other() -> None:
    table = numbers(standalone=[(10, 20), (30, 40)], basic_common=[(11, 22), (33, 44)])
    pairs, seeds = paired_differences(table), paired_differences(table, by_seed=True)
    sheet = render_differences(pairs, "Title", seeds)
    [(label, cells)] = sheet.sections[0].rows
    assert label == "basic_common - standalone"
    assert [cell[0] for cell in cells] == ["+2.5", "+0.4 to +4.6", "4", "-10.2 to +15.2", "2"]
    assert [column.name for column in sheet.columns][3:] == ["by seed", "n"]


def test_seeds_that_one_scheme_lacks_are_left_out() -> None:
    [difference] = paired_differences(numbers(standalone=[(10, 20)], basic_common=[(11, 22), (90, 90)]))
    assert (difference.pairs, difference.mean) == (2, 1.5)


def test_one_pair_has_no_interval() -> None:
    [difference] = paired_differences(numbers(standalone=[(10, 20)], basic_common=[(11, 22)]), by_seed=True)
    assert difference.mean == 1.5
    assert math.isnan(difference.low)
    assert math.isnan(difference.high)


def test_a_scheme_without_rows_is_not_compared() -> None:
    assert paired_differences(numbers(max_common=[(1, 2)], clustered_common=[])) == []
