"""A cell's durable log, one line a round, and its TensorBoard events beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from tensorboardX import SummaryWriter


class RunLog:
    """Appends to `<folder>/log.txt` and to an event file in the same folder.

    Args:
        folder: made if it is missing.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = _opened(folder)
        self._events = SummaryWriter(str(folder), flush_secs=30)

    def write(self, message: str) -> None:
        """Add a line with the time (UTC), and see it onto the disk."""
        _write(self._file, message)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add values to the event file, by tag, at a round."""
        for tag, value in values.items():
            self._events.add_scalar(tag, value, step)

    def close(self) -> None:
        """Flush and close both."""
        self._events.close()
        self._file.close()


def add_line(folder: Path, message: str) -> None:
    """Add a line to the log of a run whose own process can't do it."""
    with _opened(folder) as file:
        _write(file, message)


def _opened(folder: Path) -> TextIO:
    folder.mkdir(parents=True, exist_ok=True)
    return open(folder / "log.txt", "a", encoding="utf-8", buffering=1)


def _write(file: TextIO, message: str) -> None:
    file.write(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {message}\n")
    os.fsync(file.fileno())
