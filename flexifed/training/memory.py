"""Memory of a process that trains."""

from __future__ import annotations

import ctypes

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST_C_INT = 2**31 - 1
_MOST_MAPPED = 32 * 2**20  # some versions of glibc take no more for M_MMAP_THRESHOLD, and hand larger blocks back


def keep_freed_memory() -> bool:
    """Let this process keep the memory that its tensors free, for those that come next.

    A training step frees and asks for the same gigabyte again. By default glibc hands large blocks back to the system,
    which clears every page before it is used again: about a tenth of the step of a full-width VGG. Bits don't change,
    and neither does the most memory that is held at a time, but it is held until the process ends.

    Returns:
        Whether the C library could be told; only glibc can.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # Not the other way round: after a call that it takes, for either, glibc no longer adapts both by itself.
    mapped = any(mallopt(_M_MMAP_THRESHOLD, most) == 1 for most in (_LARGEST_C_INT, _MOST_MAPPED))
    return mapped and mallopt(_M_TRIM_THRESHOLD, _LARGEST_C_INT) == 1


def device_shortages(device: torch.device) -> int:
    """How often this process could not have the memory that it asked a GPU for; 0 on CPUs.

    cuDNN's convolutions then try another algorithm, which needs less and rounds otherwise, and nothing is raised.
    """
    return int(torch.cuda.memory_stats(device).get("num_ooms", 0)) if device.type == "cuda" else 0
