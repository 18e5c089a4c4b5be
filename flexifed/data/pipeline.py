"""Pipelines that turn stored samples into a model's input, on the device and many samples at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from flexifed.data.augment import CropAndFlip, ShiftAndNoise, Variation
from flexifed.data.wav import SAMPLE_RATE
from flexifed.errors import DataError

MEL_BANDS = 32
FFT_SAMPLES, HOP_SAMPLES = 1_024, 512
"""Frames of 64 ms every 32 ms, centred on samples 0, 512, ..., 15,872: 32 frames."""
FLOOR = 1e-6
"""Added to the power of a band before the logarithm, which would be minus infinity for silence."""

BLOCK = 32
"""Number of waveforms whose spectra are computed at a time: the intermediate tensors are large, and a processor's
caches are small."""


class Pipeline(Protocol):
    """Turns stored samples of a data set into a model's input."""

    def prepare(self, samples: torch.Tensor) -> torch.Tensor:
        """Turn stored samples (see `flexifed.data.LabelledSamples`) into a model's input."""
        ...

    def draw(self, count: int, generator: torch.Generator) -> Variation:
        """Draw the random variation of `count` samples from a CPU generator."""
        ...

    def augment(self, samples: torch.Tensor, variation: Variation) -> torch.Tensor:
        """Turn stored samples into a model's input for training, with a variation that is on their device."""
        ...


class ImagePipeline:
    """Per-channel normalisation of images; crop and flip for training.

    Args:
        mean: mean of each channel, in 0 to 1.
        std: standard deviation of each channel, in 0 to 1.
        device: device of the images.
        channels_last: memory format of the output.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device, channels_last: bool) -> None:
        self._mean = 255 * torch.tensor(mean, device=device).view(1, -1, 1, 1)
        self._std = 255 * torch.tensor(std, device=device).view(1, -1, 1, 1)
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._variation = CropAndFlip()

    def prepare(self, samples: torch.Tensor) -> torch.Tensor:
        """Turn uint8 (batch, channels, height, width) into float32, of mean 0 and deviation 1 over the data set.

        Raises:
            DataError: samples of another type.
        """
        if samples.dtype != torch.uint8:
            raise DataError(f"stored images are {samples.dtype}; a data set stores pixels as uint8, from 0 to 255")
        return ((samples.float() - self._mean) / self._std).contiguous(memory_format=self._memory_format)

    def draw(self, count: int, generator: torch.Generator) -> Variation:
        """See `CropAndFlip`."""
        return self._variation.draw(count, generator)

    def augment(self, samples: torch.Tensor, variation: Variation) -> torch.Tensor:
        """Apply `CropAndFlip`, then `prepare`."""
        return self.prepare(self._variation.apply(samples, variation))


class TextPipeline:
    """Texts truncated to the length that a family takes. Training does not vary them.

    Args:
        length: number of characters of an input, at most the stored length.
    """

    def __init__(self, length: int) -> None:
        self._length = length

    def prepare(self, samples: torch.Tensor) -> torch.Tensor:
        """Turn uint8 (batch, stored length) into int64 (batch, length)."""
        return samples[:, : self._length].long()

    def draw(self, count: int, generator: torch.Generator) -> Variation:
        """Draw nothing."""
        return ()

    def augment(self, samples: torch.Tensor, variation: Variation) -> torch.Tensor:
        """Return the same as `prepare`."""
        return self.prepare(samples)


class SpeechPipeline:
    """Log-mel spectrograms of waveforms, as images of one channel; time shift and background noise for training.

    Args:
        mean: mean of the log-mel values, one number.
        std: their standard deviation, one number.
        noise: background noise, int16 (noise samples,).
        device: device of the waveforms.
        channels_last: memory format of the output.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        noise: NDArray[np.int16],
        device: torch.device,
        channels_last: bool,
    ) -> None:
        from torchaudio.transforms import MelScale, Spectrogram  # slow to import, and only needed for speech

        self._spectrum: Any = Spectrogram(n_fft=FFT_SAMPLES, hop_length=HOP_SAMPLES, power=None).to(device)
        self._mel_scale: Any = MelScale(MEL_BANDS, SAMPLE_RATE, n_stft=FFT_SAMPLES // 2 + 1).to(device)
        (self._mean,), (self._std,) = mean, std
        self._variation = ShiftAndNoise(_in_unit_range(torch.tensor(noise, device=device)), SAMPLE_RATE)
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def prepare(self, samples: torch.Tensor) -> torch.Tensor:
        """Turn int16 (batch, 16000) into float32 (batch, 1, 32 bands, 32 frames), of mean 0 and deviation 1."""
        return self._features(_in_unit_range(samples))

    def draw(self, count: int, generator: torch.Generator) -> Variation:
        """See `ShiftAndNoise`."""
        return self._variation.draw(count, generator)

    def augment(self, samples: torch.Tensor, variation: Variation) -> torch.Tensor:
        """Apply `ShiftAndNoise` to the waveforms, then do the same as `prepare`."""
        return self._features(self._variation.apply(_in_unit_range(samples), variation))

    def _features(self, waveforms: torch.Tensor) -> torch.Tensor:
        log_mel = torch.cat([self._log_mel(block) for block in waveforms.split(BLOCK)])
        normalised = log_mel.sub_(self._mean).div_(self._std)
        return normalised[:, None].contiguous(memory_format=self._memory_format)

    def _log_mel(self, waveforms: torch.Tensor) -> torch.Tensor:
        spectrum = self._spectrum(waveforms)
        power = spectrum.real.square() + spectrum.imag.square()  # takes a fifth of the time of abs().square()
        log_mel: torch.Tensor = (self._mel_scale(power) + FLOOR).log_()
        return log_mel


def _in_unit_range(samples: torch.Tensor) -> torch.Tensor:
    """Turn int16 into float32 in -1 to 1."""
    return samples.float() / 2**15
