"""Print the seconds of each cell's round: `uv run python records/full-width-rounds/seconds.py`."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from flexifed.config import SCHEMES

rows = pd.read_parquet(Path(__file__).parent / "rounds")
trained = rows[rows["round"] == 0].assign(seconds=lambda frame: frame["round_s"])
print("Seconds of round 0 of each cell, in which all clients are scored, train, and are averaged")
print(
    trained.groupby(["dataset", "data_source", "family", "scheme"], sort=False)["seconds"]
    .first()
    .unstack()[[scheme for scheme in SCHEMES if scheme in set(trained["scheme"])]]
    .to_string(float_format="{:.1f}".format)
)
print(f"{trained.groupby(['dataset', 'family', 'scheme']).ngroups} cells")
