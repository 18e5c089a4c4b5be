"""The interface of a data set: two splits, and a small description that is sent between processes in their place.

A `Dataset` stays in the process that opened it. Processes exchange a `DatasetInfo`, never samples: each process opens
the data itself and takes the samples that its clients need.
"""

from __future__ import annotations

import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from flexifed.errors import DataError, FlexifedWarning

LabelledSamples = tuple[torch.Tensor, torch.Tensor]
"""Stored samples, shape (n, ...), and their labels, int64, shape (n,).

Images are uint8 (n, channels, 32, 32), texts uint8 character indices (n, length), spoken words int16 waveforms
(n, samples). A `flexifed.data.pipeline.Pipeline` turns them into a model's input.
"""


class Split(Protocol):
    """The training or the test samples of a data set."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """All labels, shape (len,). This may read the whole split."""
        ...

    def __len__(self) -> int:
        """The number of samples."""
        ...

    def take(self, indices: NDArray[np.int64]) -> LabelledSamples:
        """Copy the samples at `indices`, shape (n,), in that order, into new contiguous tensors.

        Raises:
            IndexError: an index is below 0 or past the end.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """Identity, location and properties of a data set.

    Attributes:
        name: the data set's name in a config.
        source: `real`, `real-partial` (real samples, but not exactly those published), `real-other` (a complete release
            other than the paper's), or `synthetic`.
        location: absolute path of the data folder; empty for synthetic data.
        layout: the published form of the files, such as `binary` or `python` for CIFAR-10, or `synthetic`.
        fingerprint: identifies the contents, independent of location and layout.
        num_train: number of training samples.
        num_test: number of test samples.
        num_classes: number of classes; labels are 0 to `num_classes - 1`.
        in_channels: number of channels of a model's input; None for texts.
        mean: mean of each channel, which normalisation subtracts; pixels range from 0 to 1, spectrogram values are
            natural logarithms. Empty for texts.
        std: standard deviation of each channel, by which normalisation divides.
    """

    name: str
    source: Literal["real", "real-partial", "real-other", "synthetic"]
    location: str
    layout: str
    fingerprint: str
    num_train: int
    num_test: int
    num_classes: int
    in_channels: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]


class PartialDataWarning(FlexifedWarning):
    """Real data differ from what was published.

    Args:
        title: name of the data set, for people.
        folder: folder of the data set.
        difference: how the data differ from what was published, as a phrase.
    """

    def __init__(self, title: str, folder: Path, difference: str) -> None:
        super().__init__(title, folder, difference)  # all three in `args`, so that pickling keeps them
        self.title, self.folder, self.difference = title, folder, difference

    def __str__(self) -> str:
        return (
            f"{self.title} in {self.folder} is not the complete published set: {self.difference}. "
            "Results are marked real-partial."
        )


@dataclass(frozen=True)
class Dataset:
    """An opened data set."""

    info: DatasetInfo
    train: Split
    test: Split


@dataclass(frozen=True, eq=False)
class SpeechDataset(Dataset):
    """An opened data set of spoken words.

    Attributes:
        noise: background noise to mix into training samples, int16, shape (noise samples,).
    """

    noise: NDArray[np.int16]


@dataclass(frozen=True, eq=False)
class ArraySplit:
    """A split held in two arrays, in memory or mapped from files.

    Attributes:
        samples: stored samples, shape (len, ...); see `LabelledSamples`.
        labels: labels, int64, shape (len,).
    """

    samples: NDArray[Any]
    labels: NDArray[np.int64]

    def __post_init__(self) -> None:
        if len(self.samples) != len(self.labels):
            raise ValueError(
                f"{len(self.samples)} samples don't match {len(self.labels)} labels; pass one label for each"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: NDArray[np.int64]) -> LabelledSamples:
        """Copy samples; see `Split.take`."""
        check_indices(indices, len(self))
        # Indexing keeps the memory order of the axes, which may differ from their logical order.
        samples = np.ascontiguousarray(self.samples[indices])
        return torch.from_numpy(samples), torch.from_numpy(self.labels[indices])


def check_indices(indices: NDArray[np.int64], num_samples: int) -> None:
    """Reject indices outside of a split; NumPy would count negative ones from the end.

    Raises:
        IndexError: an index is below 0 or at least `num_samples`.
    """
    outside = (indices < 0) | (indices >= num_samples)
    if outside.any():
        first = int(indices[outside][0])
        raise IndexError(f"sample {first} of a split of {num_samples}; indices are 0 to {num_samples - 1}")


def is_folder(path: Path) -> bool:
    """Whether there is a folder at `path`; False if there is nothing.

    Raises:
        DataError: there is something else, such as a file or a link to nothing, or the path can't be accessed.
    """
    try:
        if stat.S_ISDIR(path.stat().st_mode):
            return True
        reason = "it is not a folder"
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not os.path.lexists(path):
            return False
        reason = error.strerror or str(error)
    raise DataError(f"{path} can't be used ({reason}); choose another data folder, or fix this one")


def data_changed(path: Path, reason: str) -> DataError:
    """The error for data that changed after the run began, or that are not the same on all machines."""
    return DataError(
        f"{path} was verified when the run began and can't be opened now, on {socket.gethostname()}: {reason}. "
        "Every machine of the cluster needs the same data under the same path, unchanged for the whole run."
    )
