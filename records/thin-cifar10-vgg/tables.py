"""Print the tables of this record from its rows: `uv run python records/thin-cifar10-vgg/tables.py`."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from rich.console import Console

from flexifed.report.compare import PAIRED, paired_differences, render_differences
from flexifed.report.table import per_seed, render, summarise
from flexifed.results.rounds_file import read_metadata

ROUNDS = Path(__file__).parent / "rounds"
PAIRED_BY_SEED = "The same, a pair for each seed (its versions are trained together)"

console = Console(width=80)
everything = pd.read_parquet(ROUNDS)
rounds = int(everything["round"].max())
for first, last in ((0, 2), (3, 8), (0, 8)):
    rows = everything[everything["seed"].between(first, last)]
    seeds = sorted(rows["seed"].unique())
    print(f"======== Seeds {first} to {last} ========")
    console.print(render(summarise(rows, rounds), profile="thin", rounds=rounds, seeds=seeds), highlight=False)
    numbers = per_seed(rows, rounds)
    console.print(render_differences(paired_differences(numbers), PAIRED), highlight=False)
    console.print(render_differences(paired_differences(numbers, by_seed=True), PAIRED_BY_SEED), highlight=False)
    for pick in ("best", "final"):
        differences = paired_differences(per_seed(rows, rounds, pick))
        console.print(render_differences(differences, f"{PAIRED}; the {pick} round"), highlight=False)
print(read_metadata(next(ROUNDS.glob("*.parquet")))["versions"])
