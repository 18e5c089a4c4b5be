"""Where the results of an experiment are stored.

<results_dir>/<experiment>/rounds/<cell>.parquet    one file for each cell and seed; read the folder with pandas
<results_dir>/<experiment>/runs/<cell>/             its log, its shards, its TensorBoard events, its checkpoints
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from flexifed.errors import ResultsError
from flexifed.results.rounds_file import read_rows
from flexifed.results.schema import SCHEMA


@dataclass(frozen=True)
class ResultsFolder:
    """The results of one experiment.

    Args:
        root: absolute path; on a cluster, of a folder that all nodes share.
    """

    root: Path

    @property
    def rounds(self) -> Path:
        """The folder that `pandas.read_parquet` takes."""
        return self.root / "rounds"

    def rounds_file(self, cell: str) -> Path:
        """The rows of one cell and seed."""
        return self.rounds / f"{cell}.parquet"

    def run_folder(self, cell: str) -> Path:
        """Everything else of one cell and seed."""
        return self.root / "runs" / cell

    def checkpoints_folder(self, cell: str) -> Path:
        """The checkpoints of one cell and seed."""
        return self.run_folder(cell) / "checkpoints"

    def shards_file(self, cell: str) -> Path:
        """The samples of the clients of one cell and seed."""
        return self.run_folder(cell) / "shards.parquet"

    @classmethod
    def of_run(cls, run_folder: Path) -> ResultsFolder:
        """The experiment that has this folder of one cell and seed."""
        return cls(run_folder.parent.parent)

    @property
    def stop_file(self) -> Path:
        """While this file exists, running cells stop after their round, with a checkpoint, and no other cell begins."""
        return self.root / "stop"

    def prepare(self) -> None:
        """Create the folders, and check that they can be written.

        Raises:
            ResultsError: they can't be written.
        """
        try:
            for folder in (self.rounds, self.root / "runs"):
                folder.mkdir(parents=True, exist_ok=True)
                probe = folder / f".probe-{os.getpid()}"
                probe.write_bytes(b"")
                probe.unlink()
        except OSError as error:
            raise ResultsError(
                f"can't write results to {self.root}: {error.strerror or error}; choose another --results-dir"
            ) from error

    def tidy(self) -> None:
        """Remove temporary files left by killed processes. Only the holder of the folder's lock may call this."""
        for folder in (self.rounds, *(self.root / "runs").glob("*")):
            for path in folder.glob(".*.parquet.*"):
                path.unlink(missing_ok=True)

    def check_shared(self) -> None:
        """Check that this machine sees the folders that `prepare` created, possibly on another machine.

        Raises:
            ResultsError: it does not, so nobody would find what it writes here.
        """
        if not self.rounds.is_dir():
            raise ResultsError(
                f"{platform.node()} does not see {self.root}, where the results go; on a cluster, --results-dir (or "
                "FLEXIFED_RESULTS_DIR) has to be a folder that all nodes share under the same path"
            )

    def read(self, cells: Sequence[str], columns: Sequence[str] | None = None) -> pd.DataFrame:
        """Read the rows of cells; cells that have no file yet are left out.

        Args:
            cells: the names of their files, without the suffix.
            columns: the columns to read; None for all.

        Raises:
            ResultsError: a file is damaged.
        """
        schema = SCHEMA if columns is None else pa.schema([SCHEMA.field(name) for name in columns])
        tables = [read_rows(path, columns) for cell in cells if (path := self.rounds_file(cell)).exists()]
        return (pa.concat_tables(tables) if tables else schema.empty_table()).to_pandas()

    def rows_before(self, cell: str, round_index: int) -> pa.Table:
        """Read the rows of a cell's rounds before `round_index`.

        Raises:
            ResultsError: the file is damaged.
        """
        path = self.rounds_file(cell)
        table = read_rows(path) if path.exists() else SCHEMA.empty_table()
        return table.filter(pc.field("round") < round_index).cast(SCHEMA)

    def last_round(self, cell: str) -> int | None:
        """The last round for which a cell has scores, or None.

        Raises:
            ResultsError: the file is damaged.
        """
        path = self.rounds_file(cell)
        if not path.exists():
            return None
        last: int | None = pc.max(read_rows(path, columns=["round"])["round"]).as_py()
        return last
