"""Random variation of training samples, on their device and a whole batch at a time."""

from __future__ import annotations

import torch

CROP_PADDING = 4


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
