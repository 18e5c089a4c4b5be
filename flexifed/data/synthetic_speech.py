"""A learnable stand-in with the shape of Speech Commands, for runs without real data; see `flexifed.data.synthetic`.

A class is a "word" of three syllables, each of two gliding tones, said by eight "speakers" of different pitch. Sample i
is a word shifted in time, mixed with another word that is independent of the class, and with noise:

    sample = a_i * word_c[speaker s_i, shifted by t_i]
           + b_i * word_d(i)[speaker u_i, shifted by v_i] + l_i * noise[from o_i]

As with images, all quantities with index i are hashes of i, and everything, including the sine, is integer arithmetic
on random bytes, so all machines get the same waveforms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from flexifed.data.dataset import DatasetInfo, SpeechDataset
from flexifed.data.stand_in import StandInSplit, field, hashes, random_bytes, stream_seed
from flexifed.data.wav import SAMPLE_RATE

VERSION = 1
"""Increase it whenever the bytes of a sample change; it is part of the fingerprint."""

SIZES: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {"speech_commands": (30, 57_886, 6_835), "speech_commands_12": (12, 25_339, 3_081)}
)
"""Numbers of classes, training samples and test samples, about as in v0.01 of the real data."""

CLIP_SAMPLES = SAMPLE_RATE
SYLLABLE_SAMPLES, NUM_SYLLABLES = 3_200, 3
WORD_BEGIN = 3_200
"""First sample of a word in its clip, give or take half of `MAX_SHIFT`."""
MAX_SHIFT = 2_048
"""A word is shifted by 0 to `MAX_SHIFT - 1` samples."""
TONES = ((0, 1), (1, 2))
"""For each tone of a syllable: index of the glide that it follows, and divisor of its amplitude."""
PITCHES = (28, 29, 30, 31, 33, 34, 35, 36)
"""Pitch of each speaker, in 32nds."""
SINE_STEPS, AMPLITUDE = 1_024, 255
NOISE_BYTES = 1 << 20

_WORDS, _NOISE, _TRAIN, _TEST = range(30, 34)  # random streams; the other stand-ins use the lower numbers


def info(name: str) -> DatasetInfo:
    """Describe the stand-in for one of the data sets in `SIZES`."""
    num_classes, num_train, num_test = SIZES[name]
    return DatasetInfo(
        name=name,
        source="synthetic",
        location="",
        layout="synthetic",
        fingerprint=f"{name}-synthetic-{VERSION}",
        num_train=num_train,
        num_test=num_test,
        num_classes=num_classes,
        in_channels=1,
        mean=(-0.7,),
        std=(2.1,),
    )


def open_synthetic(info: DatasetInfo) -> SpeechDataset:
    """Open the stand-in. This makes the words (a few MB), but no sample."""
    words, noise = make_words(info.num_classes), random_bytes(_NOISE, NOISE_BYTES)
    train, test = (
        SyntheticSpeech(
            words=words, noise=noise, num_samples=count, num_classes=info.num_classes, seed=stream_seed(stream)
        )
        for count, stream in ((info.num_train, _TRAIN), (info.num_test, _TEST))
    )
    return SpeechDataset(info, train, test, noise.astype(np.int16) << 4)


@dataclass(frozen=True, eq=False, kw_only=True)
class SyntheticSpeech(StandInSplit):
    """Clips composed of words.

    Attributes:
        words: the words, int16, shape (classes, speakers, `CLIP_SAMPLES + MAX_SHIFT`).
        noise: noise, int8, shape (`NOISE_BYTES`,).
    """

    words: NDArray[np.int16]
    noise: NDArray[np.int8]
    block = 64

    def empty(self, count: int) -> NDArray[np.int16]:
        """Return an uninitialised array of shape (count, 16000)."""
        return np.empty((count, CLIP_SAMPLES), np.int16)

    def make(self, indices: NDArray[np.int64]) -> NDArray[np.int16]:
        """Make waveforms, shape (n, 16000)."""
        where, how = hashes(indices, self.seed), hashes(indices, self.seed + 1)
        word = self._moved(self.labels[indices], field(where, 0, 3), field(where, 3, 16))
        behind = self._moved(field(how, 0, 8) % len(self.words), field(where, 19, 3), field(where, 22, 16))
        noise_from = field(where, 38, 20) % (NOISE_BYTES - CLIP_SAMPLES)
        noise = np.lib.stride_tricks.sliding_window_view(self.noise, CLIP_SAMPLES)[noise_from]
        volumes = (8 + field(how, 8, 4), field(how, 12, 2), 1 + field(how, 14, 3))
        word_volume, behind_volume, noise_volume = (volume.astype(np.int16)[:, None] for volume in volumes)
        return word * word_volume + behind * behind_volume + noise * noise_volume

    def _moved(
        self, word: NDArray[np.int64], speaker: NDArray[np.int64], shift: NDArray[np.int64]
    ) -> NDArray[np.int16]:
        windows = np.lib.stride_tricks.sliding_window_view(self.words, CLIP_SAMPLES, axis=-1)
        moved: NDArray[np.int16] = windows[word, speaker, shift % MAX_SHIFT]
        return moved


def make_words(num_classes: int) -> NDArray[np.int16]:
    """Make each word for each speaker, with silence before and after it; shape (classes, speakers, samples)."""
    glides = random_bytes(_WORDS, num_classes * NUM_SYLLABLES * len(TONES) * 2).view(np.uint8)
    hertz = 200 + 13 * glides.reshape(num_classes, NUM_SYLLABLES, len(TONES), 2).astype(np.int64)
    words = np.zeros((num_classes, len(PITCHES), CLIP_SAMPLES + MAX_SHIFT), np.int16)
    time = np.arange(SYLLABLE_SAMPLES)
    envelope = np.minimum(time, time[::-1])
    sine = sine_table()
    for speaker, pitch in enumerate(PITCHES):
        for syllable in range(NUM_SYLLABLES):
            first = WORD_BEGIN + MAX_SHIFT // 2 + syllable * SYLLABLE_SAMPLES
            for tone, divisor in TONES:
                begin, end = (hertz[:, syllable, tone, which, None] for which in (0, 1))
                now = begin * (SYLLABLE_SAMPLES - time) + end * time
                turns = (now * pitch << 32) // (SYLLABLE_SAMPLES * 32 * SAMPLE_RATE)
                phase = np.cumsum(turns, axis=1) % (1 << 32) * SINE_STEPS >> 32
                loud = sine[phase] * envelope * 2 // (SYLLABLE_SAMPLES * divisor)
                words[:, speaker, first : first + SYLLABLE_SAMPLES] += loud.astype(np.int16)
    return words


def sine_table() -> NDArray[np.int64]:
    """Return one period of a sine in `SINE_STEPS` steps, int64, accurate to half a percent of the amplitude.

    Bhaskara I's approximation, 16 x (pi - x) / (5 pi^2 - 4 x (pi - x)) on half a period: rational, exact in integers.
    """
    half = SINE_STEPS // 2
    x = np.arange(half)
    product = x * (half - x)
    positive = AMPLITUDE * 16 * product // (5 * half**2 - 4 * product)
    return np.concatenate([positive, -positive])
