"""What the learnable stand-ins have in common: all that carries an index i is a hash of i, so a sample is a pure
function of its index, and only what is asked for is made."""

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

_ROOT_SEED = 0  # the data are one fixed set; a run's own seed has no part in them


@dataclass(frozen=True, eq=False, kw_only=True)
class StandInSplit(ABC):
    """A split whose samples are made when they are taken; classes take turns, so all are equally frequent.

    Attributes:
        num_samples: of the split.
        num_classes: sample i is of class i modulo this.
        seed: of the hashes that make the samples.
        block: samples made at a time, so that the temporaries stay small.
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
        """An array for so many samples, its values undefined."""

    @abstractmethod
    def make(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """Make a block of samples."""


def stream_seed(stream: int) -> int:
    """The seed of one of the streams that stand-ins draw from, or begin their hashes with."""
    return derive_seed(_ROOT_SEED, "synthetic", stream)


def random_bytes(stream: int, count: int) -> NDArray[np.int8]:
    """Random bytes of a stream, shape (count,): PCG64's raw bits, which NumPy promises not to change."""
    raw = np.random.PCG64(stream_seed(stream)).random_raw(-(-count // 8))
    return raw.astype("<u8").view(np.int8)[:count]


def hashes(indices: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """SplitMix64 (Steele, Lea and Flood 2014) at position `index` of the stream that `seed` begins; shape (n,)."""
    state = indices.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def field(bits: NDArray[np.uint64], first: int, width: int) -> NDArray[np.int64]:
    """`width` bits of each hash as a whole number."""
    return (bits >> np.uint64(first) & np.uint64((1 << width) - 1)).astype(np.int64)
