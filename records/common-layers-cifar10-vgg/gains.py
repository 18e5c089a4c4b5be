"""Print V4's gains by partner from this record's rows: `uv run python records/common-layers-cifar10-vgg/gains.py`."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from flexifed.report.compare import mean_with_interval
from flexifed.report.table import PICKS, per_seed, picked_rounds
from flexifed.results.rounds_file import read_metadata

ROUNDS = Path(__file__).parent / "rounds"
PARTNERS = {"v1": 1, "v2": 6, "v3": 7}
"""Convolutions that V4 has in common with each partner."""

rows_of: dict[tuple[str, str], list[pd.DataFrame]] = {}
for file in sorted(ROUNDS.glob("*.parquet")):
    partner, _ = read_metadata(file)["config"]["model"]["versions"]
    rows = pd.read_parquet(file)
    rows_of.setdefault((partner, rows["scheme"].iloc[0]), []).append(rows)
seeds = sorted(set.intersection(*({int(rows["seed"].iloc[0]) for rows in parts} for parts in rows_of.values())))
rounds = max(int(rows["round"].max()) for parts in rows_of.values() for rows in parts)
print(f"Seeds: {' '.join(map(str, seeds))}")


def accuracies(partner: str, scheme: str, pick: str) -> pd.DataFrame:
    """Accuracy in percent, by seed and version."""
    return per_seed(pd.concat(rows_of[partner, scheme]), rounds, pick).set_index("seed").loc[seeds]


def show(label: str, values: pd.Series) -> None:
    """Print a mean over seeds with its interval, and each seed's value."""
    count, mean, low, high = mean_with_interval(values.tolist())
    by_seed = " ".join(f"{value:+.1f}" for value in values)
    print(f"{label:42} {mean:+5.1f} ({low:+.1f} to {high:+.1f}), n = {count}: {by_seed}")


for pick in PICKS:
    print(f"\n{picked_rounds(rounds, pick).capitalize()}")
    baseline = accuracies("v1", "clustered_fl", pick)["v4"]
    print(f"{'V4 under Clustered-FL':42} {baseline.mean():5.1f}")
    gains = {partner: accuracies(partner, "max_common", pick)["v4"] - baseline for partner in PARTNERS}
    for partner, common in PARTNERS.items():
        show(f"V4's gain with {partner.upper()} ({common} in common)", gains[partner])
    for partner in ("v2", "v3"):
        show(f"the gain with {partner.upper()} minus that with V1", gains[partner] - gains["v1"])
