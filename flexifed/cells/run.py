"""A run of a cell: its names, the place of its results, and whether it has finished."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from flexifed.config import CellConfig
from flexifed.data import DatasetInfo
from flexifed.federation.checkpoint import Checkpoints
from flexifed.results.store import ResultsFolder


@dataclass(frozen=True, kw_only=True)
class CellRun:
    """A cell, its data, its number of rounds, and where its results go.

    Attributes:
        config: the cell.
        info: its data set.
        profile: the name that the run's rows carry; it changes no number.
        rounds: rounds of training; one more round is only scored.
        results: absolute path of the experiment's results.
        checkpoint_every: rounds between checkpoints; None to write checkpoints by time.
        keep_final: keep the state after the last round of training, from which a longer run can resume.
    """

    config: CellConfig
    info: DatasetInfo
    profile: str
    rounds: int
    results: Path
    checkpoint_every: int | None = None
    keep_final: bool = True

    @cached_property
    def run_id(self) -> str:
        """See `CellConfig.run_id`."""
        return self.config.run_id(self.info.fingerprint)

    @property
    def name(self) -> str:
        """The name of the run's files: a readable description, and the run id."""
        config = self.config
        source = self.info.source
        return f"{config.dataset}-{source}-{config.family}-{config.scheme}-seed{config.seed}-{self.run_id}"

    @property
    def label(self) -> str:
        """A short name of the cell for messages, with its seed."""
        config = self.config
        return f"{config.dataset}/{config.family}/{config.scheme} seed {config.seed}"

    @property
    def is_finished(self) -> bool:
        """Whether the rows of the last round have been written."""
        last = ResultsFolder(self.results).last_round(self.name)
        return last is not None and last >= self.rounds

    def checkpoints(self) -> Checkpoints:
        """The checkpoints of this run, of which there may be none."""
        return Checkpoints(ResultsFolder(self.results).checkpoints_folder(self.name), self.run_id, self.rounds)
