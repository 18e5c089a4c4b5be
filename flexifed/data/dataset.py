"""What a data set is to the rest of the project: two splits, and a small description that travels in their place.

A `Dataset` stays in the process that opened it. Between processes only `DatasetInfo` travels, never an image: each
process opens the data itself and takes the samples that its clients need.
"""

from __future__ import annotations

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
"""Samples as they are stored, of shape (n, ...), and labels, int64 of shape (n,).

Images are uint8 (n, channels, 32, 32), texts uint8 indices of characters (n, length), spoken words int16 waveforms
(n, samples). A `flexifed.data.pipeline.Pipeline` makes them what a model takes.
"""


class Split(Protocol):
    """The training or the test samples of a data set."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """All labels, shape (len,). May read the whole split."""
        ...

    def __len__(self) -> int:
        """The number of samples."""
        ...

    def take(self, indices: NDArray[np.int64]) -> LabelledSamples:
        """Copy the samples at `indices`, shape (n,), in that order, into contiguous tensors of their own.

        Raises:
            IndexError: an index below 0 or past the end.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """Which data they are, where they lie, and what they look like.

    Attributes:
        name: the data set's name in a config.
        source: `real`, `real-partial` (real samples, but not all that were published), `real-other` (all of another
            release than the paper's), or `synthetic`.
        location: the data folder it was found in, absolute; empty for synthetic data.
        layout: in which form it was found: one of its published ones, as `binary` and `python` for CIFAR-10, or
            `synthetic`.
        fingerprint: stands for the contents, wherever they lie and whatever the layout.
        num_train: training samples.
        num_test: test samples.
        num_classes: labels are 0 to `num_classes - 1`.
        in_channels: channels of what a model of images takes; None for texts.
        mean: what normalisation subtracts from each channel; pixels count from 0 to 1, a spectrogram's values are
            natural logarithms. Empty for texts.
        std: what it then divides by.
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
    """Real data are not all that was published, or something else.

    Args:
        title: the data set's.
        folder: where it lies.
        difference: from what was published, as a phrase.
    """

    def __init__(self, title: str, folder: Path, difference: str) -> None:
        super().__init__(title, folder, difference)  # all three in `args`, so that pickling keeps them
        self.title, self.folder, self.difference = title, folder, difference

    def __str__(self) -> str:
        what = f"{self.title} in {self.folder} is not the whole published set: {self.difference}"
        return f"{what}. Results say real-partial."


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
        noise: background noise to be mixed into training samples, int16, shape (noise samples,).
    """

    noise: NDArray[np.int16]


@dataclass(frozen=True, eq=False)
class ArraySplit:
    """A split held in two arrays, in memory or mapped from files.

    Attributes:
        samples: as they are stored, shape (len, ...); see `LabelledSamples`.
        labels: int64, shape (len,).
    """

    samples: NDArray[Any]
    labels: NDArray[np.int64]

    def __post_init__(self) -> None:
        if len(self.samples) != len(self.labels):
            raise ValueError(f"{len(self.samples)} samples don't go with {len(self.labels)} labels; give one for each")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: NDArray[np.int64]) -> LabelledSamples:
        """Copy samples; see `Split.take`."""
        check_indices(indices, len(self))
        # Indexing keeps the axes' order in memory, which need not be the logical one.
        samples = np.ascontiguousarray(self.samples[indices])
        return torch.from_numpy(samples), torch.from_numpy(self.labels[indices])


def check_indices(indices: NDArray[np.int64], num_samples: int) -> None:
    """Refuse indices that NumPy would count from the end, and those past it.

    Raises:
        IndexError: an index below 0 or at least `num_samples`.
    """
    outside = (indices < 0) | (indices >= num_samples)
    if outside.any():
        first = int(indices[outside][0])
        raise IndexError(f"sample {first} of a split of {num_samples}; indices are 0 to {num_samples - 1}")


def is_folder(path: Path) -> bool:
    """Whether a folder is there.

    Raises:
        DataError: that can't be found out.
    """
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise DataError(
            f"{path} can't be looked at ({error.strerror}); choose another data folder, or mend it"
        ) from error


def changed(path: Path, reason: str) -> DataError:
    """The error for data that are not as they were when the run began, or not the same on all machines."""
    return DataError(
        f"{path} was verified when the run began and can't be opened now, on {socket.gethostname()}: {reason}. "
        "Every machine of the cluster needs the same data under the same path, and they must stay while it runs."
    )
