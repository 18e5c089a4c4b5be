"""What a cell's run is called, where its results go, and how far it has come."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flexifed.config import CellConfig
from flexifed.data import DatasetInfo
from flexifed.federation.checkpoint import Checkpoints
from flexifed.results.store import ResultsFolder


@dataclass(frozen=True, kw_only=True)
class CellRun:
    """A cell, the data it runs on, how long it runs, and where its results go.

    Attributes:
        profile: the name under which its rows are found; it decides nothing.
        rounds: rounds of training; one more is scored.
        results: absolute path of the experiment's results.
        checkpoint_every: rounds between checkpoints; None: by time.
        keep_final: keep the state after the last round of training, from which more rounds can go on.
    """

    config: CellConfig
    info: DatasetInfo
    profile: str
    rounds: int
    results: Path
    checkpoint_every: int | None = None
    keep_final: bool = True

    @property
    def run_id(self) -> str:
        """See `CellConfig.run_id`."""
        return self.config.run_id(self.info.fingerprint)

    @property
    def name(self) -> str:
        """Under which its files are kept: words for people, and the run id."""
        config = self.config
        source = self.info.source
        return f"{config.dataset}-{source}-{config.family}-{config.scheme}-seed{config.seed}-{self.run_id}"

    @property
    def label(self) -> str:
        """What people call it."""
        config = self.config
        return f"{config.dataset}/{config.family}/{config.scheme} seed {config.seed}"

    @property
    def is_finished(self) -> bool:
        """Whether its last round has been written."""
        last = ResultsFolder(self.results).last_round(self.name)
        return last is not None and last >= self.rounds

    def checkpoints(self) -> Checkpoints:
        """Those of this run; there may be none."""
        return Checkpoints(ResultsFolder(self.results).run_folder(self.name) / "checkpoints", self.run_id, self.rounds)
