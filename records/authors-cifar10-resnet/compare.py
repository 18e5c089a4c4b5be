"""Compare the schemes over the last tenth of the rounds that all of them have. Prints compare.txt."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

rows = pd.read_parquet(Path(__file__).parent / "rounds")
last = rows.groupby("scheme")["round"].max().min()
window = max(1, last // 10)
chosen = rows[(rows["round"] > last - window) & (rows["round"] <= last)]
by_client = 100 * chosen.groupby(["version", "client", "scheme"])["accuracy"].mean().unstack()
for scheme in ("standalone", "clustered_fl"):
    by_client[f"max_common - {scheme}"] = by_client["max_common"] - by_client[scheme]
print(f"accuracy in percent, mean of the scores of rounds {last - window + 1} to {last}\n")
print(by_client.groupby("version").mean().round(1).to_string(), "\n")
print(by_client.round(1).to_string(), "\n")
print(by_client.mean().round(1).to_string(), "\n")
print("mean over all clients, by round\n")
by_round = 100 * rows.groupby(["round", "scheme"])["accuracy"].mean().unstack()
print(by_round.loc[[index for index in by_round.index if index % 10 == 0 and index <= last]].round(1).to_string())
