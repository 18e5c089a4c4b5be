"""Random variation of training samples: drawn on the CPU, applied to many samples at once on their device.

Only a few numbers are drawn for each sample, so the variation of an epoch can be drawn batch by batch and moved to the
device in one transfer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

Variation = tuple[torch.Tensor, ...]
"""The random numbers drawn for a batch of samples: tensors whose first axis is the sample. They are drawn on the CPU,
so that they are the same for all devices, and moved to the samples' device before they are applied."""

CROP_PADDING = 4

MAX_SHIFT = 1_600
"""Maximum shift of a waveform in samples, in both directions: 100 ms."""
NOISE_PROBABILITY = 0.8
MAX_NOISE_VOLUME = 0.1
"""Background noise is added at a volume from 0 to this. All three values are those of the data set's own training
program (Warden 2018, "Speech Commands: A dataset for limited-vocabulary speech recognition")."""


@dataclass(frozen=True)
class CropAndFlip:
    """Shift each image by up to `padding` pixels, with black beyond its edges, and mirror it with probability 1/2.

    The distribution is that of torchvision's `RandomCrop(size, padding)` and `RandomHorizontalFlip()` applied to each
    image, but all images are processed at once.

    Attributes:
        padding: maximum shift in pixels, in all directions.
    """

    padding: int = CROP_PADDING

    def draw(self, count: int, generator: torch.Generator) -> Variation:
        """Draw the first row and column of each crop, int64 (count, 2), and whether to mirror it, bool (count, 1)."""
        offsets = torch.randint(2 * self.padding + 1, (2, count, 1), generator=generator)
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        return offsets.squeeze(2).T, mirrored

    def apply(self, images: torch.Tensor, variation: Variation) -> torch.Tensor:
        """Return new images of the same type and shape, (count, channels, height, width)."""
        offsets, mirrored = variation
        count, _, height, width = images.shape
        padded = torch.nn.functional.pad(images, (self.padding,) * 4)
        # A view of all possible crops, of which one is indexed for each image: this copies whole rows.
        crops = padded.unfold(2, height, 1).unfold(3, width, 1)
        cropped = crops[torch.arange(count, device=images.device), :, offsets[:, 0], offsets[:, 1]]
        return torch.where(mirrored[:, :, None, None], cropped.flip(3), cropped)


@dataclass(frozen=True)
class ShiftAndNoise:
    """Shift each waveform in time, with silence beyond its ends, and mix background noise into most of them.

    The result is clipped to -1 to 1. A shift of 0 and a volume of 0 leave a waveform unchanged, bit for bit.

    Attributes:
        noise: background noise, float (noise samples,), on the waveforms' device, at least as long as a waveform; a
            random part of it is added to each waveform.
        length: number of samples of a waveform.
        max_shift: maximum shift in samples, in both directions.
        noise_probability: probability that noise is added to a waveform.
        max_volume: volumes are uniform from 0 to this.
    """

    noise: torch.Tensor
    length: int
    max_shift: int = MAX_SHIFT
    noise_probability: float = NOISE_PROBABILITY
    max_volume: float = MAX_NOISE_VOLUME

    def draw(self, count: int, generator: torch.Generator) -> Variation:
        """Draw each waveform's shift, int64, and its noise's volume, float, and start, int64; each (count,)."""
        starts = torch.randint(2 * self.max_shift + 1, (count,), generator=generator)
        noisy = torch.rand(count, generator=generator) < self.noise_probability
        volumes = torch.rand(count, generator=generator) * self.max_volume * noisy
        noise_starts = torch.randint(len(self.noise) - self.length + 1, (count,), generator=generator)
        return starts, volumes, noise_starts

    def apply(self, waveforms: torch.Tensor, variation: Variation) -> torch.Tensor:
        """Return new waveforms of the same type and shape, float (count, length), in -1 to 1."""
        starts, volumes, noise_starts = variation
        padded = torch.nn.functional.pad(waveforms, (self.max_shift, self.max_shift))
        rows = torch.arange(len(waveforms), device=waveforms.device)
        shifted = padded.unfold(1, self.length, 1)[rows, starts]
        background = self.noise.unfold(0, self.length, 1)[noise_starts]
        return (shifted + volumes[:, None] * background).clamp_(-1, 1)
