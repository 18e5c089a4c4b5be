"""The file with the rows of one cell and seed, which is rewritten while the cell runs."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from flexifed.config import CellName
from flexifed.errors import ResultsError
from flexifed.results.schema import SCHEMA
from flexifed.results.tables import read_at_once, write_table

_METADATA_KEY = b"flexifed"
_SAME_IN_ALL_ROWS = ["dataset", "family", "scheme", "seed", "profile", "data_source"]
_CHUNKS = 32  # rounds kept as separate tables; each costs kilobytes, however few rows it has
_WRITE_SHARE = 0.01  # the largest part of the time that may go into rewriting a file that grows with every round

Row = Mapping[str, object]


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
    table = read_rows(path, [*_SAME_IN_ALL_ROWS, "round"])
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
    return _metadata(read_rows(path, columns=["round"]), path)


def _metadata(table: pa.Table, path: Path) -> dict[str, Any]:
    """The metadata of a file. They lie outside of its pages, so no checksum covers them."""
    try:
        return dict(json.loads((table.schema.metadata or {}).get(_METADATA_KEY, b"{}")))
    except (TypeError, ValueError) as error:
        raise _unreadable(path, f"its metadata are damaged ({error})") from error


def read_rows(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read columns of a rounds file, and verify the checksum of each page. Column names lie outside of the pages."""
    wanted = SCHEMA.names if columns is None else list(columns)
    schema = pa.schema([SCHEMA.field(name) for name in wanted])
    try:
        table = read_at_once(path, wanted)
        if missing := [name for name in wanted if name not in table.column_names]:
            raise pa.ArrowInvalid(f"it has no column {', '.join(missing)}")
        return table.select(wanted).cast(schema).replace_schema_metadata(table.schema.metadata)
    except PermissionError as error:
        raise ResultsError(f"can't read {path}: {error.strerror or error}; change its permissions") from error
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _unreadable(path, str(error)) from error


def _unreadable(path: Path, reason: str) -> ResultsError:
    return ResultsError(f"can't read {path}: {reason}; move it away, and its cell is run again")
