"""A cell's durable log, one line a round, and its TensorBoard events beside it."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from flexifed.results.store import explained


class RunLog:
    """Appends to `<folder>/log.txt` and to an event file in the same folder.

    Events are written where they arise, not by a thread, so that what goes wrong is heard of. An event file begins with
    the first value, and hides what earlier files hold of that round and later ones.

    Args:
        folder: made if it is missing.

    Raises:
        ResultsError: of every method but `close`: the files can't be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / "log.txt"
        self._events: EventsWriter | None = None
        with explained(self._path):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 - closed by close()

    def write(self, message: str) -> None:
        """Add a line with the time (UTC), and see it onto the disk."""
        line = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {message}\n".encode()
        with explained(self._path):
            length = os.fstat(self._file.fileno()).st_size
            try:
                if self._file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(self._file.fileno())
            except OSError:
                self._file.truncate(length)  # no half lines
                raise

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add values to the event file, by tag, at a round."""
        with explained(self._folder):
            events = self._events or self._begin_events(step)
            for tag, value in values.items():
                events.write_event(Event(wall_time=time.time(), step=step, summary=scalar(tag, value)))
            events.flush()

    def close(self) -> None:
        """Close both files. What could be written of them is."""
        if self._events:
            with suppress(OSError):
                self._events.close()
        self._file.close()

    def _begin_events(self, step: int) -> EventsWriter:
        self._events = EventsWriter(str(self._folder / "events"), f".{time.time_ns()}")
        self._events.write_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
        return self._events
