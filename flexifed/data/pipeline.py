"""From stored samples to what a model is fed, on the device and a whole batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from flexifed.data.augment import random_crop_and_flip


class Pipeline(Protocol):
    """What lies between a data set's stored samples and a model's input."""

    def prepare(self, samples: torch.Tensor) -> torch.Tensor:
        """From stored samples (see `flexifed.data.Samples`) to what a model takes."""
        ...

    def augment(self, samples: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The same for training, with random variation drawn from a CPU generator."""
        ...


class ImagePipeline:
    """Per-channel normalisation of images; crop and flip for training.

    Args:
        mean: for each channel, in 0 to 1.
        std: for each channel, in 0 to 1.
        device: where the images are.
        channels_last: memory format of what comes out.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device, channels_last: bool) -> None:
        self._mean = 255 * torch.tensor(mean, device=device).view(1, -1, 1, 1)
        self._std = 255 * torch.tensor(std, device=device).view(1, -1, 1, 1)
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def prepare(self, samples: torch.Tensor) -> torch.Tensor:
        """From uint8 (batch, channels, height, width) to float32 of mean 0 and deviation 1 over the data set."""
        return ((samples.float() - self._mean) / self._std).contiguous(memory_format=self._memory_format)

    def augment(self, samples: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """`random_crop_and_flip`, then `prepare`."""
        return self.prepare(random_crop_and_flip(samples, generator))


class TextPipeline:
    """Texts cut to the length that a family takes. They are not varied for training.

    Args:
        length: characters of an input, at most those that are stored.
    """

    def __init__(self, length: int) -> None:
        self._length = length

    def prepare(self, samples: torch.Tensor) -> torch.Tensor:
        """From uint8 (batch, stored length) to int64 (batch, length)."""
        return samples[:, : self._length].long()

    def augment(self, samples: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """As `prepare`; nothing is drawn."""
        return self.prepare(samples)
