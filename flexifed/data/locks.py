"""File locks between processes. The kernel releases a lock when the process that holds it ends."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def locked(path: Path, waiting: str) -> Iterator[None]:
    """Hold the lock on a file in this block; wait for it if another process holds it.

    Args:
        path: path of the file, which is created if missing, and kept.
        waiting: message for stderr if another process holds the lock.

    Raises:
        OSError: the file can't be created or locked.
    """
    lock = FileLock(path, mode=0o666)  # all users who may write to the folder may lock it
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(waiting, file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
