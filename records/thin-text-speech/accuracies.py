"""Mean accuracy over the eight clients, every sixth round and the last."""

from pathlib import Path

import pandas as pd

from flexifed.results.rounds_file import read_metadata

for path in sorted((Path(__file__).parent / "rounds").glob("*.parquet")):
    rows = pd.read_parquet(path)
    settings = read_metadata(path)["config"]
    mean = rows.groupby("round")["accuracy"].mean()
    shown = mean[(mean.index % 6 == 0) | (mean.index == mean.index.max())]
    shards, windows = (settings["partition"][key] for key in ("num_shards", "windows_per_shard"))
    samples = rows["num_train"].min() // windows
    print(f"\n{path.name.split('-seed')[0]}: {shards} shards, about {samples} samples a client and round, ", end="")
    print(f"{settings['training']['local_epochs']} local epochs, {rows['num_test'].min()} test samples a client")
    print(" ".join(f"{index}:{value:.3f}" for index, value in shown.items()))
    print(f"mean of the last ten rounds {mean.tail(10).mean():.3f}, of the first ten {mean.head(10).mean():.3f}")
