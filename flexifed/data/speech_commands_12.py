"""The task with twelve classes that the author of Speech Commands uses: ten commands, unknown words, silence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from flexifed.data.dataset import ArraySplit, LabelledSamples, check_indices
from flexifed.data.stand_in import field, hashes
from flexifed.data.wav import SAMPLE_RATE

VERSION = 1
"""Increase it whenever the same clips would give different samples; it is part of the fingerprint."""

COMMANDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
SILENCE, UNKNOWN = 0, 1
"""Labels of the first two classes; the commands follow in the order above."""
NUM_CLASSES = 2 + len(COMMANDS)


@dataclass(frozen=True, eq=False)
class TwelveSplit:
    """A split with twelve classes, made from a split of all words.

    For every ten clips of commands there is one clip of another word, chosen by a hash of its index among all clips,
    and one of silence. Silence is a second of background noise; its position and volume are a hash of its index. The
    split is thus a fixed function of the clips, independent of a run's seed. Silences come last.

    Attributes:
        clips: the clips of all words.
        rows: indices of the chosen clips, int64, ascending.
        labels: labels of the chosen clips, then of the silences, int64.
        noise: background noise, int16, shape (noise samples,).
        seed: seed of the hash for the silences.
    """

    clips: ArraySplit
    rows: NDArray[np.int64]
    labels: NDArray[np.int64]
    noise: NDArray[np.int16]
    seed: int

    @classmethod
    def from_clips(cls, clips: ArraySplit, words: Sequence[str], noise: NDArray[np.int16], seed: int) -> TwelveSplit:
        """Choose clips from a split of all words."""
        label_of_word = np.full(len(words), UNKNOWN)
        for label, command in enumerate(COMMANDS, start=2):
            label_of_word[words.index(command)] = label
        labels = label_of_word[clips.labels]
        commands, unknown = np.flatnonzero(labels != UNKNOWN), np.flatnonzero(labels == UNKNOWN)
        tenth = -(-len(commands) // 10)
        chosen = unknown[np.argsort(hashes(unknown, seed), kind="stable")[:tenth]]
        rows = np.sort(np.concatenate([commands, chosen]))
        return cls(clips, rows, np.concatenate([labels[rows], np.full(tenth, SILENCE)]), noise, seed + 1)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: NDArray[np.int64]) -> LabelledSamples:
        """Copy clips and make silences; see `Split.take`."""
        check_indices(indices, len(self))
        waveforms = np.empty((len(indices), SAMPLE_RATE), np.int16)
        is_clip = indices < len(self.rows)
        waveforms[is_clip] = self.clips.samples[self.rows[indices[is_clip]]]
        waveforms[~is_clip] = self._silence(indices[~is_clip] - len(self.rows))
        return torch.from_numpy(waveforms), torch.from_numpy(self.labels[indices])

    def _silence(self, indices: NDArray[np.int64]) -> NDArray[np.int32]:
        """Make waveforms of shape (n, 16000), within the range of int16."""
        bits = hashes(indices, self.seed)
        windows = np.lib.stride_tricks.sliding_window_view(self.noise, SAMPLE_RATE)
        volume = 1 + field(bits, 48, 8).astype(np.int32)
        silence: NDArray[np.int32] = windows[field(bits, 0, 48) % len(windows)] * volume[:, None] >> 8
        return silence
