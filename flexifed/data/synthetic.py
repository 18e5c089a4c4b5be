"""Learnable stand-ins for image data sets, for runs without real data: their results say nothing about Table 1. Those
for CIFAR-10 and CINIC-10 differ in their patterns and numbers of samples.

Sample i of class c is a smooth pattern of the class, shifted and scaled, on a smooth background that is independent of
the class, with noise:

    pixel = 128 + a_i * pattern_c[shifted by s_i] + b_i * background_j(i)[shifted by t_i] + noise[from offset o_i]

All quantities with index i are hashes of i (`flexifed.data.stand_in`). Everything is integer arithmetic on random
bytes, so all machines get the same images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from flexifed.data.dataset import Dataset, DatasetInfo
from flexifed.data.stand_in import StandInSplit, field, hashes, random_bytes, stream_seed

VERSION = 1
"""Increase it whenever the bytes of a sample change; it is part of the fingerprint."""

NUM_CLASSES, NUM_BACKGROUNDS = 10, 16
SIDE, CHANNELS = 32, 3
GRID = 8
"""Side of the coarse grid from which patterns are interpolated."""
STEP = SIDE // GRID
"""Pixels between neighbouring grid points; 32 pixels are one period of the grid."""
MAX_SHIFT = 16
"""The pattern of a class is shifted by 0 to `MAX_SHIFT - 1` pixels in each direction."""
NOISE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class StandIn:
    """Parameters of the stand-in for one data set.

    Attributes:
        first_stream: first of five random streams: patterns, backgrounds, noise, training and test samples.
        num_train: number of training samples.
        num_test: number of test samples.
        mean: mean of each channel, for pixels in 0 to 1.
        std: standard deviation over all pixels.
    """

    first_stream: int
    num_train: int
    num_test: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


STAND_INS: Mapping[str, StandIn] = MappingProxyType(
    {
        "cifar10": StandIn(
            first_stream=0,
            num_train=50_000,
            num_test=10_000,
            mean=(0.495, 0.493, 0.497),
            std=(0.173, 0.173, 0.173),
        ),
        "cinic10": StandIn(
            first_stream=10,
            num_train=180_000,
            num_test=90_000,
            mean=(0.498, 0.496, 0.498),
            std=(0.172, 0.172, 0.172),
        ),
    }
)


def info(name: str = "cifar10") -> DatasetInfo:
    """Describe the stand-in for `cifar10` or `cinic10`."""
    stand_in = STAND_INS[name]
    return DatasetInfo(
        name=name,
        source="synthetic",
        location="",
        layout="synthetic",
        fingerprint=f"{name}-synthetic-{VERSION}",
        num_train=stand_in.num_train,
        num_test=stand_in.num_test,
        num_classes=NUM_CLASSES,
        in_channels=CHANNELS,
        mean=stand_in.mean,
        std=stand_in.std,
    )


def open_synthetic(info: DatasetInfo) -> Dataset:
    """Open a stand-in. This draws 1 MiB of noise and a few patterns, but makes no sample."""
    first = STAND_INS[info.name].first_stream
    patterns = Patterns.draw(first)
    train, test = (
        SyntheticImages(patterns=patterns, num_samples=count, num_classes=NUM_CLASSES, seed=stream_seed(stream))
        for count, stream in ((info.num_train, first + 3), (info.num_test, first + 4))
    )
    return Dataset(info, train, test)


@dataclass(frozen=True, eq=False)
class Patterns:
    """The components of the samples.

    Attributes:
        classes: pattern of each class, int16, shape (classes, 3, side, side), where side is that of an image plus
            `MAX_SHIFT`.
        backgrounds: backgrounds, int16, shape (backgrounds, 3, side, side), where side is twice that of an image.
        noise: noise, int8, shape (`NOISE_BYTES`,).
    """

    classes: NDArray[np.int16]
    backgrounds: NDArray[np.int16]
    noise: NDArray[np.int8]

    @classmethod
    def draw(cls, first_stream: int) -> Patterns:
        """Draw the patterns of a stand-in from three streams."""
        return cls(
            _smooth(random_bytes(first_stream, NUM_CLASSES * CHANNELS * GRID * GRID), SIDE + MAX_SHIFT),
            _smooth(random_bytes(first_stream + 1, NUM_BACKGROUNDS * CHANNELS * GRID * GRID), 2 * SIDE),
            random_bytes(first_stream + 2, NOISE_BYTES),
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class SyntheticImages(StandInSplit):
    """Images composed of patterns."""

    patterns: Patterns
    block = 512

    def empty(self, count: int) -> NDArray[np.uint8]:
        """Return an uninitialised array of shape (count, 3, 32, 32)."""
        return np.empty((count, CHANNELS, SIDE, SIDE), np.uint8)

    def make(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Make images, shape (n, 3, 32, 32)."""
        where, how = hashes(indices, self.seed), hashes(indices, self.seed + 1)
        row, column = field(where, 0, 8) % MAX_SHIFT, field(where, 8, 8) % MAX_SHIFT
        background_row, background_column = field(where, 16, 5), field(where, 21, 5)
        noise_offset = field(where, 32, 20) % (NOISE_BYTES - CHANNELS * SIDE * SIDE)
        contrast = _scale(16 + field(how, 0, 4))
        background_contrast = _scale(field(how, 8, 6) - 32)
        background = field(how, 16, 4)

        pattern = _windows(self.patterns.classes)[self.labels[indices], :, row, column]
        behind = _windows(self.patterns.backgrounds)[background, :, background_row, background_column]
        noise = np.lib.stride_tricks.sliding_window_view(self.patterns.noise, CHANNELS * SIDE * SIDE)[noise_offset]
        pixels = (
            128 + (contrast * pattern >> 6) + (background_contrast * behind >> 6) + (noise.reshape(pattern.shape) >> 1)
        )
        return np.clip(pixels, 0, 255).astype(np.uint8)


def _smooth(coarse: NDArray[np.int8], side: int) -> NDArray[np.int16]:
    """Interpolate grids of `GRID` by `GRID` values bilinearly to 32 by 32 pixels, repeated to `side` by `side`.

    Returns:
        Shape (patterns, 3, side, side), values from -128 to 127.
    """
    grid = coarse.reshape(-1, CHANNELS, GRID, GRID).astype(np.int16)
    pixel = np.arange(side)
    near = pixel // STEP % GRID
    far = (near + 1) % GRID
    weight = (pixel % STEP).astype(np.int16)
    rows = grid[:, :, near, :] * (STEP - weight)[:, None] + grid[:, :, far, :] * weight[:, None]
    both = rows[:, :, :, near] * (STEP - weight) + rows[:, :, :, far] * weight
    return (both // STEP**2).astype(np.int16, copy=False)


def _windows(patterns: NDArray[np.int16]) -> NDArray[np.int16]:
    """A view of all crops of image size: shape (patterns, 3, rows, columns, 32, 32)."""
    return np.lib.stride_tricks.sliding_window_view(patterns, (SIDE, SIDE), axis=(2, 3))


def _scale(values: NDArray[np.int64]) -> NDArray[np.int16]:
    return values.astype(np.int16)[:, None, None, None]
