"""A learnable stand-in with the shape of AG News, for runs without real texts: its results say nothing about Table 1.

A text is 20 to 51 words of 2 to 9 letters, separated by spaces. Each class has four words of its own. Of sixteen words
in a text, four to eleven belong to its class, three to another class, so that some texts are misleading, and the rest
come from a vocabulary common to all classes. Everything random about text i is a hash of i (`flexifed.data.stand_in`),
so a text is the same on all machines.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flexifed.config import TEXT_LENGTHS
from flexifed.data.dataset import Dataset, DatasetInfo
from flexifed.data.stand_in import StandInSplit, field, hashes, random_bytes, stream_seed

VERSION = 1
"""Increase it whenever the bytes of a text change; it is part of the fingerprint."""

NUM_TRAIN, NUM_TEST, NUM_CLASSES = 120_000, 7_600, 4
LENGTH = max(TEXT_LENGTHS.values())
LETTERS = 26
"""Letters are 1 to 26 in the encoding of `flexifed.data.agnews`, a space is 0."""
COMMON_WORDS = 512
CLASS_WORDS = 4
LONGEST_WORD = 9
MIN_WORDS, MAX_WORDS = 20, 51

_FIRST_STREAM = 20


def info(name: str = "agnews") -> DatasetInfo:
    """Describe the stand-in."""
    return DatasetInfo(
        name=name,
        source="synthetic",
        location="",
        layout="synthetic",
        fingerprint=f"{name}-synthetic-{VERSION}",
        num_train=NUM_TRAIN,
        num_test=NUM_TEST,
        num_classes=NUM_CLASSES,
        in_channels=None,
        mean=(),
        std=(),
    )


def open_synthetic(info: DatasetInfo) -> Dataset:
    """Open the stand-in. This draws the words, but makes no text."""
    words = Words.draw()
    train, test = (
        SyntheticTexts(words=words, num_samples=count, num_classes=NUM_CLASSES, seed=stream_seed(stream))
        for count, stream in ((info.num_train, _FIRST_STREAM + 1), (info.num_test, _FIRST_STREAM + 2))
    )
    return Dataset(info, train, test)


@dataclass(frozen=True, eq=False)
class Words:
    """The vocabulary of the texts.

    Attributes:
        letters: letters of each word from 1 to 26, padded with 0, uint8, shape (words, longest word). Common words come
            first, then those of each class.
        lengths: length of each word, int64, shape (words,).
    """

    letters: NDArray[np.uint8]
    lengths: NDArray[np.int64]

    @classmethod
    def draw(cls) -> Words:
        """Draw the words of this version of the stand-in."""
        count = COMMON_WORDS + NUM_CLASSES * CLASS_WORDS
        drawn = random_bytes(_FIRST_STREAM, count * (1 + LONGEST_WORD)).view(np.uint8).reshape(count, -1)
        lengths = 2 + drawn[:, 0].astype(np.int64) % (LONGEST_WORD - 1)
        letters = 1 + drawn[:, 1:] % LETTERS
        letters[np.arange(LONGEST_WORD) >= lengths[:, None]] = 0
        return cls(letters, lengths)


@dataclass(frozen=True, eq=False, kw_only=True)
class SyntheticTexts(StandInSplit):
    """Texts composed of words."""

    words: Words
    block = 512

    def empty(self, count: int) -> NDArray[np.uint8]:
        """Return an uninitialised array of shape (count, `LENGTH`)."""
        return np.empty((count, LENGTH), np.uint8)

    def make(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Make texts, shape (n, `LENGTH`)."""
        words, is_used = self._choose(indices)
        lengths = self.words.lengths[words] * is_used
        starts = np.cumsum(lengths + 1, axis=1) - (lengths + 1)
        text, word, letter = np.nonzero(np.arange(LONGEST_WORD) < lengths[:, :, None])
        texts = np.zeros((len(indices), LENGTH), np.uint8)
        texts[text, starts[text, word] + letter] = self.words.letters[words[text, word], letter]
        return texts

    def _choose(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Choose the words of texts, as vocabulary indices, and which of them are used; each (n, `MAX_WORDS`)."""
        bits = hashes(indices[:, None] * MAX_WORDS + np.arange(MAX_WORDS), self.seed)
        text, kind = bits[:, :1], field(bits, 0, 4)
        num_words = MIN_WORDS + field(text, 32, 5)
        share = 4 + field(text, 40, 3)
        label = indices[:, None] % NUM_CLASSES
        other = (label + 1 + field(text, 48, 8) % (NUM_CLASSES - 1)) % NUM_CLASSES
        class_words = COMMON_WORDS + np.where(kind < share, label, other) * CLASS_WORDS + field(bits, 4, 2)
        words = np.where(kind < share + 3, class_words, field(bits, 16, 9))
        return words, np.arange(MAX_WORDS) < num_words
