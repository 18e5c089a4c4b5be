"""Turning batches of stored images into what a model is fed, on the device and a whole batch at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

CROP_PADDING = 4


class ImagePipeline:
    """Random crop and flip for training, per-channel normalisation for training and scoring.

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

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """From uint8 (batch, channels, height, width) to float32 of mean 0 and deviation 1 over the data set."""
        return ((images.float() - self._mean) / self._std).contiguous(memory_format=self._memory_format)

    def augment(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """`random_crop_and_flip`, then `normalise`."""
        return self.normalise(random_crop_and_flip(images, generator))


def random_crop_and_flip(images: torch.Tensor, generator: torch.Generator, padding: int = CROP_PADDING) -> torch.Tensor:
    """Shift each image by up to `padding` pixels with black beyond its edge, and mirror every other one.

    The distribution is that of torchvision's `RandomCrop(size, padding)` and `RandomHorizontalFlip()` applied image by
    image, in one gather for the whole batch.

    Args:
        images: (batch, channels, height, width), on any device.
        generator: on the CPU, so that the draws are the same whatever the device.

    Returns:
        New images of the same shape and type.
    """
    count, _, height, width = images.shape
    offsets = torch.randint(2 * padding + 1, (2, count, 1), generator=generator)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.arange(width)
    rows = offsets[0] + torch.arange(height)
    columns = offsets[1] + torch.where(mirrored, columns.flip(0), columns)
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    # Index tensors around a slice bring their dimensions to the front: (batch, height, width, channels).
    batch = torch.arange(count, device=images.device)[:, None, None]
    rows, columns = rows.to(images.device), columns.to(images.device)
    return padded[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
