"""One process at a time: locks on files, which are the kernel's and end with the process that holds them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def locked(path: Path, waiting: str) -> Iterator[None]:
    """Hold a file's lock for the length of a `with` block, after whoever holds it now.

    Args:
        path: of the file, which is made and stays.
        waiting: is said on stderr where another process holds the lock.

    Raises:
        OSError: the file can't be made or locked.
    """
    lock = FileLock(path, mode=0o666)  # whoever else may write to the folder may lock it too
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(waiting, file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
