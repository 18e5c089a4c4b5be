"""Memory of a process that trains on CPUs."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let this process keep the memory that its tensors free, for those that come next.

    A training step frees and asks for the same gigabyte again. By default glibc hands large blocks back to the system,
    which clears every page before it is used again: about a tenth of the step of a full-width VGG. Bits don't change,
    and neither does the most memory that is held at a time, but it is held until the process ends.

    Returns:
        Whether the C library could be told; only glibc can.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(
        mallopt(option, _LARGEST) == 1 for option in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD)
    )
