"""Shared by the benchmarks: a description of the machine and versions, median and spread, and playing a single cell."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from flexifed.config import CellConfig, PlacementOptions
    from flexifed.data import DatasetInfo
    from flexifed.orchestra.ledger import CellReport


def machine() -> str:
    """Describe the machine: its type, CPUs, the instruction set that PyTorch uses, load over 1, 5 and 15 minutes."""
    import torch

    load = ", ".join(f"{average:.1f}" for average in os.getloadavg())
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, {instructions}, load {load}"


def versions(*names: str) -> dict[str, str]:
    """The versions of Python and of installed packages. flexifed itself may be on the path without being installed."""
    return {"python": platform.python_version()} | {name: _version(name) for name in names}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        if name != "flexifed":
            raise
        return "not installed"


def spread(values: Sequence[float]) -> dict[str, float]:
    """The number of values, their median, minimum and maximum."""
    return {"n": len(values), "median": statistics.median(values), "min": min(values), "max": max(values)}


class RoundObserver:
    """An `Observer` for cells that only play rounds; subclasses define `reported`."""

    def cell_started(self, name: str) -> None:
        """Ignore it."""

    def reported(self, report: CellReport) -> None:
        """A cell has played a round."""
        raise NotImplementedError

    def noted(self, message: str, name: str | None = None) -> None:
        """Print the message, which no benchmark expects."""
        print(message, file=sys.stderr)


def play_cell(
    config: CellConfig,
    info: DatasetInfo,
    rounds: int,
    observer: RoundObserver,
    *,
    options: PlacementOptions | None = None,
    num_cpus: int | None = None,
    keep_final: bool = True,
) -> pd.DataFrame:
    """Play a cell as an experiment does, as a grid of one cell that writes its files, and return its rows.

    Args:
        config: the cell.
        info: its data.
        rounds: rounds of training.
        observer: is told about every round.
        options: where clients are placed.
        num_cpus: CPUs that Ray is told of; None for those of the machine.
        keep_final: whether the cell keeps its final state.
    """
    from flexifed.cells.run import CellRun
    from flexifed.config import PlacementOptions
    from flexifed.orchestra import cluster
    from flexifed.orchestra.placement import place_cell
    from flexifed.orchestra.sweep import run_grid
    from flexifed.orchestra.trial import PlacedRun
    from flexifed.results.store import ResultsFolder

    options = options or PlacementOptions()
    with tempfile.TemporaryDirectory(prefix="flexifed-benchmark-") as folder:
        results = ResultsFolder(Path(folder))
        results.prepare()
        run = CellRun(
            config=config, info=info, profile="benchmark", rounds=rounds, results=results.root, keep_final=keep_final
        )
        with cluster.connected(None, num_cpus=num_cpus, num_gpus=0):
            placed = PlacedRun(run, place_cell(config, options, cluster.nodes()))
            failures = run_grid([placed], observer, place=lambda run, nodes: place_cell(run.config, options, nodes))
        if failures:
            raise SystemExit(f"the cell failed: {failures}")
        return results.read([run.name])
