"""Accuracy under each setting, paired by seed: the effect of another convolution algorithm and memory layout."""

from pathlib import Path

import pandas as pd

from flexifed.results.rounds_file import read_metadata

LAST = 5


def setting(numerics: dict[str, object]) -> str:
    """Name the setting in which a run differs."""
    if numerics.get("winograd"):
        return "winograd"
    return "default" if numerics["channels_last"] else "channels first"


curves = {}
for path in sorted((Path(__file__).parent / "rounds").glob("*.parquet")):
    config = read_metadata(path)["config"]
    curves[config["seed"], setting(config["numerics"])] = pd.read_parquet(path).groupby("round")["accuracy"].mean()
table = pd.DataFrame(curves).sort_index(axis=1)
print("Mean accuracy of the eight clients, by seed and setting\n")
print(table[table.index % 4 == 0].round(3).to_string())

last = table.tail(LAST).mean().unstack()
print(f"\nMean of the last {LAST} rounds\n\n{last.round(4).to_string()}")
print("\nMinus the default's, in points\n")
minus_default = 100 * last.drop(columns="default").sub(last["default"], axis=0)
print(minus_default.round(1).to_string())
print("\nTheir mean and standard deviation over seeds\n")
print(minus_default.agg(["mean", "std"]).round(2).to_string())
print("\nRoot mean square difference from the default's curve over all rounds, in points\n")
differences = table.T.groupby(level=0).apply(lambda frame: frame.droplevel(0).sub(frame.droplevel(0).loc["default"]))
print((100 * differences.pow(2).mean(axis=1).pow(0.5)).unstack().drop(columns="default").round(1).to_string())
