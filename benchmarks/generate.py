"""Generated results: files of rounds as runs of the paper's table would leave them, for a benchmark and for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from flexifed.report.table import paper_table
from flexifed.results.rounds_file import RoundsWriter
from flexifed.results.schema import SCHEMA
from flexifed.results.store import ResultsFolder

Cell = tuple[str, str, str]
"""Data set, family, scheme."""

_BYTES_SENT = {"standalone": 0, "basic_common": 8_192}
_BYTES_SENT_BY_OTHERS = 112_000_000
_PERCENT_WITHOUT_PAPER = 80.0  # for schemes that the paper does not have
_NUM_VERSIONS = 4


def write_grid(
    results: Path,
    *,
    rounds: int = 502,
    clients: int = 8,
    seeds: Sequence[int] = (0, 1, 2),
    cells: Sequence[Cell] | None = None,
    source: str = "synthetic",
    profile: str = "authors",
    played: int | None = None,
) -> int:
    """Write a file for each cell and seed, as a run would; returns the total number of rows.

    Args:
        results: the --results-dir; the files belong to its experiment `table1`.
        rounds: rounds of training; after the last one, clients are scored once more.
        clients: clients of each cell; client k has version k modulo 4.
        seeds: the seeds of each cell.
        cells: the cells to write; None for all cells of the paper's table.
        source: the data source that the rows name.
        profile: the profile that the rows name.
        played: how many rounds of each run are in its file; None for all of them, as in a finished run.
    """
    folder = ResultsFolder(results / "table1")
    paper = paper_table()
    paper_percent = dict(zip(paper.index, paper.to_numpy(), strict=True))
    unknown = np.full(_NUM_VERSIONS, _PERCENT_WITHOUT_PAPER)
    scored = rounds + 1 if played is None else played
    total = 0
    for cell in paper_percent if cells is None else cells:
        for seed in seeds:
            table = _rows(
                cell,
                seed,
                paper_percent.get(cell, unknown),
                rounds=rounds,
                scored=scored,
                clients=clients,
                source=source,
                profile=profile,
            )
            dataset, family, scheme = cell
            writer = RoundsWriter(
                folder.rounds_file(f"{dataset}-{family}-{scheme}-seed{seed}-{source}"),
                {"rounds": rounds, "profile": profile, "data": {"fingerprint": f"{dataset}-{source}"}},
                before=table.slice(0, (scored - 1) * clients),
            )
            writer.append(table.slice((scored - 1) * clients).to_pylist())
            total += table.num_rows
    return total


def _rows(
    cell: Cell,
    seed: int,
    final_percent: np.ndarray,
    *,
    rounds: int,
    scored: int,
    clients: int,
    source: str,
    profile: str,
) -> pa.Table:
    """The rows of one run, whose accuracies rise from chance towards `final_percent`, one value for each version.

    The noise is that of a test shard of 500 samples. Of the run's `rounds` rounds, the first `scored` have rows.
    """
    dataset, family, scheme = cell
    generator = np.random.default_rng([seed, *f"{dataset}{family}{scheme}".encode()])
    index, client = np.divmod(np.arange(scored * clients), clients)
    version = client % _NUM_VERSIONS
    end = final_percent[version] / 100 + generator.normal(0, 0.006)
    mean = 0.1 + (end - 0.1) * (1 - np.exp(-8 * index / rounds))
    accuracy = np.clip(mean + generator.normal(0, 0.015, len(mean)), 0, 1)
    count = len(index)
    sent = np.where(index < rounds, _BYTES_SENT.get(scheme, _BYTES_SENT_BY_OTHERS), 0)
    constants = {
        "run_id": "generated", "dataset": dataset, "data_source": source, "family": family, "scheme": scheme,
        "seed": seed, "profile": profile, "num_train": 2500, "num_test": 500, "eval_s": 0.1, "round_s": 1.0,
        "device": "cpu", "actor": 0,
    }  # fmt: skip
    columns = {name: [value] * count for name, value in constants.items()} | {
        "round": index, "client": client, "accuracy": accuracy, "loss": 1 - accuracy, "bytes_up": sent,
        "bytes_down": sent, "version": [f"v{number + 1}" for number in version],
        "model": [f"{family}-{number + 1}" for number in version], "train_loss": 1 - accuracy, "train_s": [1.0] * count,
        "train_started": index * 1.0,
    }  # fmt: skip
    return pa.table({field.name: pa.array(columns[field.name], field.type) for field in SCHEMA}, schema=SCHEMA)
