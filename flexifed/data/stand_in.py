"""Common parts of the learnable stand-ins. Everything random about sample i is a hash of i, so a sample is a pure
function of its index, and only the requested samples are made."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from flexifed.data.dataset import LabelledSamples, check_indices
from flexifed.seeding import derive_seed

_ROOT_SEED = 0  # the data are fixed, independent of a run's seed


@dataclass(frozen=True, eq=False, kw_only=True)
class StandInSplit(ABC):
    """A split whose samples are made when they are taken. All classes are equally frequent.

    Attributes:
        num_samples: number of samples.
        num_classes: number of classes; sample i has the label i modulo `num_classes`.
        seed: seed of the hashes that determine the samples.
        block: number of samples made at a time, which keeps temporary arrays small.
    """

    num_samples: int
    num_classes: int
    seed: int
    block: ClassVar[int]

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """All labels, shape (len,)."""
        return np.arange(self.num_samples, dtype=np.int64) % self.num_classes

    def __len__(self) -> int:
        return self.num_samples

    def take(self, indices: NDArray[np.int64]) -> LabelledSamples:
        """Make samples; see `Split.take`."""
        check_indices(indices, len(self))
        samples = self.empty(len(indices))
        for start in range(0, len(indices), self.block):
            samples[start : start + self.block] = self.make(indices[start : start + self.block])
        return torch.from_numpy(samples), torch.from_numpy(self.labels[indices])

    @abstractmethod
    def empty(self, count: int) -> NDArray[Any]:
        """Return an uninitialised array for `count` samples."""

    @abstractmethod
    def make(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """Make a block of samples."""


def stream_seed(stream: int) -> int:
    """Return the seed of a random stream, for `random_bytes` or `hashes`."""
    return derive_seed(_ROOT_SEED, "synthetic", stream)


def random_bytes(stream: int, count: int) -> NDArray[np.int8]:
    """Return random bytes of a stream, shape (count,): PCG64's raw bits, which NumPy guarantees not to change."""
    raw = np.random.PCG64(stream_seed(stream)).random_raw(-(-count // 8))
    return raw.astype("<u8").view(np.int8)[:count]


def hashes(indices: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """Hash indices by SplitMix64 (Steele, Lea and Flood 2014): element `index` of the stream seeded with `seed`."""
    state = indices.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def field(bits: NDArray[np.uint64], first: int, width: int) -> NDArray[np.int64]:
    """Extract `width` bits of each hash, from bit `first`, as an integer."""
    return (bits >> np.uint64(first) & np.uint64((1 << width) - 1)).astype(np.int64)
