"""Memory of a training process."""

from __future__ import annotations

import ctypes

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST_C_INT = 2**31 - 1
_MOST_MAPPED = 32 * 2**20  # the most that some versions of glibc accept for M_MMAP_THRESHOLD; they return larger blocks


def keep_freed_memory() -> bool:
    """Let this process keep the memory of freed tensors for later ones.

    Every training step allocates and frees the same gigabyte. By default glibc returns large blocks to the system,
    which clears every page before it is used again; that takes about a tenth of a step of a full-width VGG. Results and
    peak memory don't change, but the memory is held until the process ends.

    Returns:
        Whether the C library accepted the setting; only glibc has it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # In this order: once glibc has accepted either setting, it no longer adapts both by itself.
    accepted = any(mallopt(_M_MMAP_THRESHOLD, threshold) == 1 for threshold in (_LARGEST_C_INT, _MOST_MAPPED))
    return accepted and mallopt(_M_TRIM_THRESHOLD, _LARGEST_C_INT) == 1


def device_shortages(device: torch.device) -> int:
    """Number of times that this process could not get the memory it requested from a GPU; 0 on CPUs.

    When a cuDNN convolution lacks memory, it silently uses another algorithm, which needs less and rounds differently.
    """
    return int(torch.cuda.memory_stats(device).get("num_ooms", 0)) if device.type == "cuda" else 0
