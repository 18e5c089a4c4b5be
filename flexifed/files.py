"""Atomic file writes, and clear errors where writing fails."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from flexifed.errors import ResultsError


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file next to `path`. At the end of the `with` block flush it, rename it, and flush its new name.

    Raises:
        ResultsError: the file can't be written. A previous file at `path` is kept.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            flush_to_disk(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on disk. Some network file systems can't flush a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError raised in this block into an error that names the file and the remedy.

    Raises:
        ResultsError: in place of the OSError.
    """
    try:
        yield
    except OSError as error:
        raise ResultsError(
            f"can't write {path}: {error.strerror or error}; make room or fix the folder, "
            "then run the same command again"
        ) from error
