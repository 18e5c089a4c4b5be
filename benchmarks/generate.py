"""Generated results: files of rounds as runs of the paper's table would leave them, for a benchmark and for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from flexifed.report.table import paper_table
from flexifed.results.schema import SCHEMA
from flexifed.results.store import ResultsFolder, RoundsWriter

_SENT = {"standalone": 0, "basic_common": 8_192}
_SENT_ELSE = 112_000_000


def write_grid(
    results: Path,
    *,
    rounds: int = 502,
    clients: int = 8,
    seeds: Sequence[int] = (0, 1, 2),
    cells: Sequence[tuple[str, str, str]] | None = None,
    source: str = "synthetic",
    profile: str = "authors",
    played: int | None = None,
) -> int:
    """Write a file for each cell and seed, as runs do, and return the number of rows.

    Args:
        results: the --results-dir; files go to its experiment `table1`.
        rounds: of training; they are scored once more after the last.
        clients: of each cell; client k has version k modulo 4.
        seeds: of each cell.
        cells: (data set, family, scheme); None for all of the paper's table.
        source: what the rows say of their data.
        profile: what they say of their settings.
        played: rounds that are there; None for all, as in a finished run.
    """
    folder = ResultsFolder(results / "table1")
    paper = paper_table()
    scored = rounds + 1 if played is None else played
    total = 0
    for dataset, family, scheme in [*paper.index] if cells is None else cells:
        ends = paper.loc[(dataset, family, scheme)].to_numpy()
        for seed in seeds:
            table = _rows(dataset, family, scheme, seed, ends, rounds, scored, clients, source, profile)
            writer = RoundsWriter(
                folder.rounds_file(f"{dataset}-{family}-{scheme}-seed{seed}-{source}"),
                {"rounds": rounds, "profile": profile, "data": {"fingerprint": f"{dataset}-{source}"}},
                before=table.slice(0, (scored - 1) * clients),
            )
            writer.append(table.slice((scored - 1) * clients).to_pylist())
            total += table.num_rows
    return total


def _rows(
    dataset: str,
    family: str,
    scheme: str,
    seed: int,
    ends: np.ndarray,
    rounds: int,
    scored: int,
    clients: int,
    source: str,
    profile: str,
) -> pa.Table:
    """Accuracies that rise from chance towards `ends`, percent by version, with noise of a test shard of 500."""
    generator = np.random.default_rng([seed, *f"{dataset}{family}{scheme}".encode()])
    index, client = np.divmod(np.arange(scored * clients), clients)
    end = ends[client % 4] / 100 + generator.normal(0, 0.006)
    mean = 0.1 + (end - 0.1) * (1 - np.exp(-8 * index / rounds))
    accuracy = np.clip(mean + generator.normal(0, 0.015, len(mean)), 0, 1)
    count = len(index)
    sent = np.where(index < rounds, _SENT.get(scheme, _SENT_ELSE), 0)
    same = {
        "run_id": "generated", "dataset": dataset, "data_source": source, "family": family, "scheme": scheme,
        "seed": seed, "profile": profile, "num_train": 2500, "num_test": 500, "eval_s": 0.1, "round_s": 1.0,
        "device": "cpu", "actor": 0,
    }  # fmt: skip
    columns = {name: [value] * count for name, value in same.items()} | {
        "round": index, "client": client, "accuracy": accuracy, "loss": 1 - accuracy, "bytes_up": sent,
        "bytes_down": sent, "version": [f"v{one % 4 + 1}" for one in client],
        "model": [f"{family}-{one % 4 + 1}" for one in client], "train_loss": 1 - accuracy, "train_s": [1.0] * count,
        "train_started": index * 1.0,
    }  # fmt: skip
    return pa.table({field.name: pa.array(columns[field.name], field.type) for field in SCHEMA}, schema=SCHEMA)
