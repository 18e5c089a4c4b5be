"""Random variation of training samples, on their device and a whole batch at a time."""

from __future__ import annotations

import torch

CROP_PADDING = 4

MAX_SHIFT = 1_600
"""Samples that a waveform is shifted by at most, each way: 100 ms."""
NOISE_PROBABILITY = 0.8
MAX_NOISE_VOLUME = 0.1
"""Background noise is added at a volume from 0 to this. All three as in the data set's own training program (Warden
2018, "Speech Commands: A dataset for limited-vocabulary speech recognition")."""


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


def shift_and_add_noise(
    waveforms: torch.Tensor,
    noise: torch.Tensor,
    generator: torch.Generator,
    *,
    max_shift: int = MAX_SHIFT,
    noise_probability: float = NOISE_PROBABILITY,
    max_volume: float = MAX_NOISE_VOLUME,
) -> torch.Tensor:
    """Shift each waveform in time, with silence beyond its ends, and mix background noise into most of them.

    A sum is clipped to -1 to 1. With a shift of 0 and a volume of 0 a waveform stays as it is, bit for bit.

    Args:
        waveforms: float (batch, samples), in -1 to 1, on any device.
        noise: float (noise samples,), on the same device, at least as long as a waveform; each waveform gets a random
            part of it.
        generator: on the CPU, so that the draws are the same whatever the device.
        max_shift: samples, each way.
        noise_probability: of a waveform to get noise at all.
        max_volume: volumes are uniform from 0 to this.

    Returns:
        New waveforms of the same shape and type.
    """
    count, length = waveforms.shape
    device = waveforms.device
    starts = torch.randint(2 * max_shift + 1, (count,), generator=generator)
    noisy = torch.rand(count, generator=generator) < noise_probability
    volumes = torch.rand(count, generator=generator) * max_volume * noisy
    places = torch.randint(len(noise) - length + 1, (count,), generator=generator)
    padded = torch.nn.functional.pad(waveforms, (max_shift, max_shift))
    shifted = padded.unfold(1, length, 1)[torch.arange(count, device=device), starts.to(device)]
    background = noise.unfold(0, length, 1)[places.to(device)]
    return (shifted + volumes.to(device)[:, None] * background).clamp_(-1, 1)
