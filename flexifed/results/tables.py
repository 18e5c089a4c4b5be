"""Parquet files that are written atomically, and whose pages have checksums.

A file is written to a temporary file in the same folder, flushed to disk, and renamed, so that a reader sees either the
old or the new file, complete. Names of temporary files begin with a dot, which readers of Parquet folders skip.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from flexifed.errors import ResultsError
from flexifed.files import atomic_write, writing


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
        return read_at_once(path)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ResultsError(f"can't read {path}: {error}") from error


def read_at_once(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a file that is opened only once, and verify the checksum of each page.

    Given a path, pyarrow opens it once for the footer and again for the pages, and a run may replace it in between.
    """
    with pa.OSFile(os.fspath(path)) as file:
        return pq.read_table(file, columns=columns, page_checksum_verification=True)
