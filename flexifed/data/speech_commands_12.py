"""The task of twelve classes that the author of Speech Commands trains on: ten commands, unknown words, silence."""

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
"""Raise it whenever the same clips would give other samples; it is part of the fingerprint."""

COMMANDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
SILENCE, UNKNOWN = 0, 1
"""Labels of the first two classes; the commands follow, in the order above."""
NUM_CLASSES = 2 + len(COMMANDS)


@dataclass(frozen=True, eq=False)
class TwelveSplit:
    """Twelve classes made of a split of all words.

    For every ten clips of commands there is one of another word, picked by a hash of its place among all clips, and one
    of silence. Silence is a second of background noise at some volume; where and how loud is a hash of its index. So
    the split is a fixed function of the clips, whatever the seed of a run. Silences come last.

    Attributes:
        clips: of all words.
        rows: which clips are in, int64, ascending.
        labels: of those and of the silences after them, int64.
        noise: what silence is cut from, int16, shape (noise samples,).
        seed: of the silences' hash.
    """

    clips: ArraySplit
    rows: NDArray[np.int64]
    labels: NDArray[np.int64]
    noise: NDArray[np.int16]
    seed: int

    @classmethod
    def from_clips(cls, clips: ArraySplit, words: Sequence[str], noise: NDArray[np.int16], seed: int) -> TwelveSplit:
        """Choose from a split of all words."""
        label_of_word = np.full(len(words), UNKNOWN)
        for label, command in enumerate(COMMANDS, start=2):
            label_of_word[words.index(command)] = label
        labels = label_of_word[clips.labels]
        commands, others = np.flatnonzero(labels != UNKNOWN), np.flatnonzero(labels == UNKNOWN)
        tenth = -(-len(commands) // 10)
        picked = others[np.argsort(hashes(others, seed), kind="stable")[:tenth]]
        rows = np.sort(np.concatenate([commands, picked]))
        return cls(clips, rows, np.concatenate([labels[rows], np.full(tenth, SILENCE)]), noise, seed + 1)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: NDArray[np.int64]) -> LabelledSamples:
        """Copy clips, and make silences; see `Split.take`."""
        check_indices(indices, len(self))
        waveforms = np.empty((len(indices), SAMPLE_RATE), np.int16)
        spoken = indices < len(self.rows)
        waveforms[spoken] = self.clips.samples[self.rows[indices[spoken]]]
        waveforms[~spoken] = self._silence(indices[~spoken] - len(self.rows))
        return torch.from_numpy(waveforms), torch.from_numpy(self.labels[indices])

    def _silence(self, indices: NDArray[np.int64]) -> NDArray[np.int32]:
        """Waveforms of shape (n, 16000), within the range of int16."""
        bits = hashes(indices, self.seed)
        windows = np.lib.stride_tricks.sliding_window_view(self.noise, SAMPLE_RATE)
        volume = 1 + field(bits, 48, 8).astype(np.int32)
        silence: NDArray[np.int32] = windows[field(bits, 0, 48) % len(windows)] * volume[:, None] >> 8
        return silence
