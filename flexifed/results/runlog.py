"""The log of a cell, with a line per round, and its TensorBoard events. Both are flushed to disk once a second."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from flexifed.files import writing

LOG = "log.txt"
SYNC_EVERY_S = 1.0
"""Seconds between flushes to disk, which take milliseconds, or tens of them on a network file system."""


class RunLog:
    """Appends to `<folder>/log.txt` and to an event file in the same folder.

    Events are written by the caller and not by a thread, so that errors reach it. An event file begins with the first
    value, and makes TensorBoard drop the values of earlier files from that round on.

    Args:
        folder: created if it is missing.

    Raises:
        ResultsError: from every method but `close`: the files can't be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / LOG
        self._events: EventsWriter | None = None
        self._file = _opened(folder)
        self._sync_lines, self._sync_events = _Due(), _Due()

    def write(self, message: str) -> None:
        """Add a line with the time (UTC)."""
        _write(self._file, self._path, message, sync=self._sync_lines())

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add values, by tag, to the event file of a round."""
        with writing(self._folder):
            events = self._events or self._begin_events(step)
            for tag, value in values.items():
                events.write_event(Event(wall_time=time.time(), step=step, summary=scalar(tag, value)))
            if self._sync_events():
                events.flush()

    def close(self) -> None:
        """Flush both files to disk, and close them."""
        if self._events:
            with suppress(OSError):
                self._events.close()
        with suppress(OSError, ValueError):  # it may be closed already
            os.fsync(self._file.fileno())
        self._file.close()

    def _begin_events(self, step: int) -> EventsWriter:
        self._events = EventsWriter(str(self._folder / "events"), f".{time.time_ns()}")
        self._events.write_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
        return self._events


class _Due:
    """Says when something is due that is done at most every `SYNC_EVERY_S` seconds."""

    def __init__(self) -> None:
        self._next = 0.0

    def __call__(self) -> bool:
        """Whether it is due now; if so, it is done."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + SYNC_EVERY_S
        return True


def add_line(folder: Path, message: str) -> None:
    """Add a line to the log of a run whose own process can no longer write it.

    Raises:
        ResultsError: the log can't be written.
    """
    with _opened(folder) as file:
        _write(file, folder / LOG, message, sync=True)


def _opened(folder: Path) -> FileIO:
    with writing(folder / LOG):
        folder.mkdir(parents=True, exist_ok=True)
        return FileIO(folder / LOG, "ab")


def _write(file: FileIO, path: Path, message: str, *, sync: bool) -> None:
    """Add a line, whole or not at all, and with `sync` flush the file to disk."""
    line = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {message}\n".encode()
    with writing(path):
        length = os.fstat(file.fileno()).st_size
        try:
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if sync:
                os.fsync(file.fileno())
        except OSError:
            file.truncate(length)
            raise
