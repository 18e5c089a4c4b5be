"""Files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from flexifed.errors import ResultsError


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Write a file beside its place; at the end of the `with` block flush it, and rename it.

    Raises:
        ResultsError: it can't be written. What was there stays as it was.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with explained(path):
        try:
            with open(beside, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an OSError into an error that says which file, and what to do.

    Raises:
        ResultsError: instead of the OSError.
    """
    try:
        yield
    except OSError as error:
        raise ResultsError(
            f"can't write {path}: {error.strerror or error}; make room or mend the folder, "
            "then the same command goes on"
        ) from error
