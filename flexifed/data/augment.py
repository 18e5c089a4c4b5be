"""Random variation of training samples: drawn on the CPU, applied on the samples' device to any number at once.

What is drawn are a few numbers a sample, so an epoch's variation can be drawn batch by batch and moved in one go.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

Variation = tuple[torch.Tensor, ...]
"""What was drawn for some samples: tensors whose first axis counts the samples. It is drawn on the CPU, so that draws
are the same whatever the device, and moved to the samples' device before it is applied."""

CROP_PADDING = 4

MAX_SHIFT = 1_600
"""Samples that a waveform is shifted by at most, each way: 100 ms."""
NOISE_PROBABILITY = 0.8
MAX_NOISE_VOLUME = 0.1
"""Background noise is added at a volume from 0 to this. All three as in the data set's own training program (Warden
2018, "Speech Commands: A dataset for limited-vocabulary speech recognition")."""


@dataclass(frozen=True)
class CropAndFlip:
    """Shift each image by up to `padding` pixels with black beyond its edge, and mirror every other one.

    The distribution is that of torchvision's `RandomCrop(size, padding)` and `RandomHorizontalFlip()` applied image by
    image, for all of them at once.

    Attributes:
        padding: pixels, each way.
    """

    padding: int = CROP_PADDING

    def draw(self, count: int, generator: torch.Generator) -> Variation:
        """First row and column of each image's cut, int64 (count, 2), and whether it is mirrored, bool (count, 1)."""
        offsets = torch.randint(2 * self.padding + 1, (2, count, 1), generator=generator)
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        return offsets.squeeze(2).T, mirrored

    def apply(self, images: torch.Tensor, variation: Variation) -> torch.Tensor:
        """New images of the same type and shape, (count, channels, height, width)."""
        offsets, mirrored = variation
        count, _, height, width = images.shape
        padded = torch.nn.functional.pad(images, (self.padding,) * 4)
        # A view of every cut that there is, of which each image gets one: rows are then copied whole.
        cuts = padded.unfold(2, height, 1).unfold(3, width, 1)
        cut = cuts[torch.arange(count, device=images.device), :, offsets[:, 0], offsets[:, 1]]
        return torch.where(mirrored[:, :, None, None], cut.flip(3), cut)


@dataclass(frozen=True)
class ShiftAndNoise:
    """Shift each waveform in time, with silence beyond its ends, and mix background noise into most of them.

    A sum is clipped to -1 to 1. With a shift of 0 and a volume of 0 a waveform stays as it is, bit for bit.

    Attributes:
        noise: float (noise samples,), on the waveforms' device, at least as long as a waveform; each waveform gets a
            random part of it.
        length: samples of a waveform.
        max_shift: samples, each way.
        noise_probability: of a waveform to get noise at all.
        max_volume: volumes are uniform from 0 to this.
    """

    noise: torch.Tensor
    length: int
    max_shift: int = MAX_SHIFT
    noise_probability: float = NOISE_PROBABILITY
    max_volume: float = MAX_NOISE_VOLUME

    def draw(self, count: int, generator: torch.Generator) -> Variation:
        """Each waveform's shift, int64, the volume of its noise, float, and where that begins, int64; each (count,)."""
        starts = torch.randint(2 * self.max_shift + 1, (count,), generator=generator)
        noisy = torch.rand(count, generator=generator) < self.noise_probability
        volumes = torch.rand(count, generator=generator) * self.max_volume * noisy
        places = torch.randint(len(self.noise) - self.length + 1, (count,), generator=generator)
        return starts, volumes, places

    def apply(self, waveforms: torch.Tensor, variation: Variation) -> torch.Tensor:
        """New waveforms of the same type and shape, float (count, length), in -1 to 1."""
        starts, volumes, places = variation
        padded = torch.nn.functional.pad(waveforms, (self.max_shift, self.max_shift))
        each = torch.arange(len(waveforms), device=waveforms.device)
        shifted = padded.unfold(1, self.length, 1)[each, starts]
        background = self.noise.unfold(0, self.length, 1)[places]
        return (shifted + volumes[:, None] * background).clamp_(-1, 1)
