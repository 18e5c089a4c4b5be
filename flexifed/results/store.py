"""Where the results of an experiment are stored, and how they are written atomically.

    <results_dir>/<experiment>/rounds/<cell>.parquet    one file for each cell and seed; read the folder with pandas
    <results_dir>/<experiment>/runs/<cell>/             its log, its shards, its TensorBoard events, its checkpoints

A file is written to a temporary file in the same folder, flushed to disk, and renamed, so that a reader sees either the
old or the new file, complete. Names of temporary files begin with a dot, which readers of Parquet folders skip.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flexifed.config import CellName
from flexifed.errors import ResultsError
from flexifed.files import atomic_write, writing
from flexifed.results.schema import SCHEMA

_METADATA_KEY = b"flexifed"
_SAME_IN_ALL_ROWS = ["dataset", "family", "scheme", "seed", "profile", "data_source"]
_CHUNKS = 32  # rounds kept as separate tables; each costs kilobytes, however few rows it has
_WRITE_SHARE = 0.01  # the largest part of the time that may go into rewriting a file that grows with every round

Row = Mapping[str, object]


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
        tables = [_read(path, columns) for cell in cells if (path := self.rounds_file(cell)).exists()]
        return (pa.concat_tables(tables) if tables else schema.empty_table()).to_pandas()

    def rows_before(self, cell: str, round_index: int) -> pa.Table:
        """Read the rows of a cell's rounds before `round_index`.

        Raises:
            ResultsError: the file is damaged.
        """
        path = self.rounds_file(cell)
        table = _read(path) if path.exists() else SCHEMA.empty_table()
        return table.filter(pc.field("round") < round_index).cast(SCHEMA)

    def last_round(self, cell: str) -> int | None:
        """The last round for which a cell has scores, or None.

        Raises:
            ResultsError: the file is damaged.
        """
        path = self.rounds_file(cell)
        if not path.exists():
            return None
        rounds = _read(path, columns=["round"])["round"]
        return max(rounds.to_pylist(), default=None)


class RoundsWriter:
    """Rewrites a cell's file whenever rows are added.

    Args:
        path: the file.
        metadata: stored in the file with the rows: config, versions.
        at_least: the last round of an existing file, which is kept until there are as many rounds again.
        before: rows of earlier rounds, which are kept as they are.
    """

    def __init__(
        self,
        path: Path,
        metadata: Mapping[str, object],
        at_least: int | None = None,
        before: pa.Table | None = None,
    ) -> None:
        self._path = path
        self._at_least = -1 if at_least is None else at_least
        self._last_round = -1
        self._metadata = dict(metadata)
        self._rows: list[pa.Table] = [] if before is None else [before]
        self._write_after = 0.0

    def append(self, rows: Sequence[Row]) -> None:
        """Add the rows of a round, and write them; if writing has become slow, only with a later round."""
        table = pa.Table.from_pylist([dict(row) for row in rows], schema=SCHEMA)
        self._rows.append(table)
        if len(self._rows) >= _CHUNKS:
            self._rows = [self._all_rows()]
        self._last_round = max(self._last_round, pc.max(table["round"]).as_py() or 0)
        if time.monotonic() >= self._write_after:
            self.flush()

    def note(self, **metadata: object) -> None:
        """Add to the file's metadata."""
        self._metadata.update(metadata)

    def flush(self) -> None:
        """Write all rows, unless the existing file has more rounds.

        Raises:
            ResultsError: the file can't be written.
        """
        if self._last_round < self._at_least:
            return
        started = time.monotonic()
        self._rows = [self._all_rows()]
        metadata = {_METADATA_KEY: json.dumps(self._metadata)}
        write_table(self._path, self._rows[0].replace_schema_metadata(metadata))
        finished = time.monotonic()
        self._write_after = finished + (finished - started) / _WRITE_SHARE

    def _all_rows(self) -> pa.Table:
        return pa.concat_tables(self._rows).combine_chunks()


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table to a file atomically.

    Raises:
        ResultsError: the file can't be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        pq.write_table(table, file, compression="zstd", write_page_checksum=True)


def read_table(path: Path) -> pa.Table:
    """Read a table that `write_table` wrote, and verify the checksum of each page.

    Raises:
        ResultsError: the file can't be read.
    """
    try:
        return _read_at_once(path)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ResultsError(f"can't read {path}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class FileSummary:
    """A summary of a rounds file: the values that all its rows share, its last round, and its metadata.

    Attributes:
        cell: data set, family and scheme.
        seed, profile, data_source: as in every row.
        last_round: the last round for which the file has scores.
        metadata: as from `read_metadata`.
    """

    cell: CellName
    seed: int
    profile: str
    data_source: str
    last_round: int
    metadata: Mapping[str, Any]


def read_summary(path: Path) -> FileSummary | None:
    """Summarise a rounds file; None if it has no rows.

    Raises:
        ResultsError: the file is damaged.
    """
    table = _read(path, [*_SAME_IN_ALL_ROWS, "round"])
    if not table.num_rows:
        return None
    [row] = table.slice(0, 1).select(_SAME_IN_ALL_ROWS).to_pylist()
    cell = CellName(row.pop("dataset"), row.pop("family"), row.pop("scheme"))
    return FileSummary(cell=cell, **row, last_round=pc.max(table["round"]).as_py(), metadata=_metadata(table, path))


def read_metadata(path: Path) -> dict[str, Any]:
    """Read a file's metadata: config, versions, and, once the run has ended, the digests of its final states.

    Raises:
        ResultsError: the file is damaged.
    """
    return _metadata(_read(path, columns=["round"]), path)


def _metadata(table: pa.Table, path: Path) -> dict[str, Any]:
    """The metadata of a file. They lie outside of its pages, so no checksum covers them."""
    try:
        return dict(json.loads((table.schema.metadata or {}).get(_METADATA_KEY, b"{}")))
    except (TypeError, ValueError) as error:
        raise _unreadable(path, f"its metadata are damaged ({error})") from error


def _read(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read columns of a rounds file, and verify the checksum of each page. Column names lie outside of the pages."""
    wanted = SCHEMA.names if columns is None else list(columns)
    schema = pa.schema([SCHEMA.field(name) for name in wanted])
    try:
        table = _read_at_once(path, wanted)
        if missing := [name for name in wanted if name not in table.column_names]:
            raise pa.ArrowInvalid(f"it has no column {', '.join(missing)}")
        return table.select(wanted).cast(schema).replace_schema_metadata(table.schema.metadata)
    except PermissionError as error:
        raise ResultsError(f"can't read {path}: {error.strerror or error}; change its permissions") from error
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _unreadable(path, str(error)) from error


def _read_at_once(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a file that is opened only once.

    Given a path, pyarrow opens it once for the footer and again for the pages, and a run may replace it in between.
    """
    with pa.OSFile(os.fspath(path)) as file:
        return pq.read_table(file, columns=columns, page_checksum_verification=True)


def _unreadable(path: Path, reason: str) -> ResultsError:
    return ResultsError(f"can't read {path}: {reason}; move it away, and its cell is run again")
