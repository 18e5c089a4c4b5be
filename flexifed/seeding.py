"""One named random generator for each purpose, all derived from one root seed.

A generator is created from (root seed, purpose, indices) wherever it is needed, so that no stream of random numbers
depends on where a client runs, in which order clients finish, or how often a process was restarted.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy
    import torch

Purpose = Literal["init", "partition", "participants", "batches", "augmentation", "dropout", "scoring", "synthetic"]


def derive_seed(root_seed: int, purpose: Purpose, *indices: int) -> int:
    """Derive the 63-bit seed of a stream: the first bits of SHA-256 over the root seed, the purpose and the indices.

    >>> derive_seed(0, "init", 3) == derive_seed(0, "init", 3)
    True
    >>> derive_seed(0, "init", 3) == derive_seed(0, "batches", 3)
    False
    """
    text = "/".join([str(root_seed), purpose, *map(str, indices)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def torch_generator(root_seed: int, purpose: Purpose, *indices: int) -> torch.Generator:
    """A CPU `torch.Generator` for a stream. Numbers are drawn on the CPU and then moved to the device.

    PyTorch's CPU generator (mt19937) uses the lower 32 bits of its seed.
    """
    import torch

    return torch.Generator().manual_seed(derive_seed(root_seed, purpose, *indices))


def numpy_generator(root_seed: int, purpose: Purpose, *indices: int) -> numpy.random.Generator:
    """A NumPy generator (PCG64) for a stream."""
    import numpy

    return numpy.random.default_rng(derive_seed(root_seed, purpose, *indices))
