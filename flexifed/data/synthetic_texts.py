"""A learnable stand-in of AG News's shape, for running where no real texts are: its results say nothing about Table 1.

A text is 20 to 51 words of 2 to 9 letters with spaces between them. Each class has four words of its own; of sixteen
words of a text, four to eleven are its class's, three another class's, so that some texts mislead, and the rest come
from a vocabulary that all classes use. All that carries an index i is a hash of i (`flexifed.data.stand_in`), so a text
is the same on all machines.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flexifed.config import TEXT_LENGTHS
from flexifed.data.dataset import Dataset, DatasetInfo
from flexifed.data.stand_in import StandInSplit, field, hashes, random_bytes, stream_seed

VERSION = 1
"""Raise it whenever a text's bytes change; it is part of the fingerprint."""

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
    """The stand-in's description."""
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
    """Open the stand-in: its words are drawn, no text is made."""
    words = Words.draw()
    train, test = (
        SyntheticTexts(words=words, num_samples=count, num_classes=NUM_CLASSES, seed=stream_seed(stream))
        for count, stream in ((info.num_train, _FIRST_STREAM + 1), (info.num_test, _FIRST_STREAM + 2))
    )
    return Dataset(info, train, test)


@dataclass(frozen=True, eq=False)
class Words:
    """What texts are put together from.

    Attributes:
        letters: uint8, shape (words, longest word): letters from 1 to 26, then 0. Common words come first, then those
            of each class.
        lengths: int64, shape (words,).
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
    """Texts made of words."""

    words: Words
    block = 512

    def empty(self, count: int) -> NDArray[np.uint8]:
        """Shape (count, `LENGTH`)."""
        return np.empty((count, LENGTH), np.uint8)

    def make(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Texts of shape (n, `LENGTH`)."""
        words, is_there = self._choose(indices)
        lengths = self.words.lengths[words] * is_there
        starts = np.cumsum(lengths + 1, axis=1) - (lengths + 1)
        text, word, letter = np.nonzero(np.arange(LONGEST_WORD) < lengths[:, :, None])
        texts = np.zeros((len(indices), LENGTH), np.uint8)
        texts[text, starts[text, word] + letter] = self.words.letters[words[text, word], letter]
        return texts

    def _choose(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The words of texts, by their position in the vocabulary, and which of them stand there: (n, `MAX_WORDS`)."""
        bits = hashes(indices[:, None] * MAX_WORDS + np.arange(MAX_WORDS), self.seed)
        text, kind = bits[:, :1], field(bits, 0, 4)
        num_words = MIN_WORDS + field(text, 32, 5)
        share = 4 + field(text, 40, 3)
        label = indices[:, None] % NUM_CLASSES
        other = (label + 1 + field(text, 48, 8) % (NUM_CLASSES - 1)) % NUM_CLASSES
        of_class = COMMON_WORDS + np.where(kind < share, label, other) * CLASS_WORDS + field(bits, 4, 2)
        words = np.where(kind < share + 3, of_class, field(bits, 16, 9))
        return words, np.arange(MAX_WORDS) < num_words
