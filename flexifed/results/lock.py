"""A lock that lets one command at a time write to a results folder.

Where the file system supports it, NFS included, it is a kernel lock (`flock`), which ends with its process, however
that ends. Elsewhere it is a file that names its process; a file left by a dead process of the same machine is replaced.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from flexifed.errors import ResultsError

LOCK = ".lock"
HOLDER = ".lock-holder.json"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder for the length of a `with` block.

    Raises:
        ResultsError: another command holds the lock, or the lock can't be created.
    """
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the missing flock; the fallback is described above
            lock.acquire()
    except Timeout as error:
        raise ResultsError(
            f"{folder} is being written by {_holder(folder)}; wait until it has ended, or choose another "
            f"--results-dir. If it has certainly ended, remove {folder / LOCK}"
        ) from error
    except OSError as error:
        raise ResultsError(
            f"can't lock {folder}: {error.strerror or error}; make room or fix the folder, or choose another "
            "--results-dir"
        ) from error
    try:
        _name_holder(folder)
        yield
    finally:
        (folder / HOLDER).unlink(missing_ok=True)
        lock.release()


def _name_holder(folder: Path) -> None:
    """Write down which process holds the lock. This is only used in messages, never to decide who holds it."""
    content = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
        "command": shlex.join(sys.argv),
    }
    try:
        (folder / HOLDER).write_text(json.dumps(content))
    except OSError as error:
        raise ResultsError(
            f"can't write {folder / HOLDER}: {error.strerror or error}; make room or fix the folder"
        ) from error


def _holder(folder: Path) -> str:
    try:
        content = json.loads((folder / HOLDER).read_text())
        return f"process {content['pid']} on {content['host']} since {content['since']} ({content['command']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another command"
