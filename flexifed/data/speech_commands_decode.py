"""Decode the wav files of Speech Commands into arrays; see `flexifed.data.speech_commands`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from flexifed.data.bars import count_bar
from flexifed.data.pipeline import SpeechPipeline
from flexifed.data.speech_commands_files import NAME, TESTING_LIST, VALIDATION_LIST, Files, Version, read_list
from flexifed.data.wav import SAMPLE_RATE, read_clip, read_wav
from flexifed.errors import DataError

CLIP_SAMPLES = SAMPLE_RATE
READERS = 8
"""Number of threads that read wav files; they mostly wait for the disk."""
BLOCK = 1_024
"""Number of clips that are read before they are written."""
MEASURED_CLIPS = 4_096
"""Approximate number of training clips, evenly spaced, on which normalisation is measured."""


def decode(files: Files, folder: Path, version: Version, into: Path) -> dict[str, object]:
    """Write the clips and labels of both splits, and the background noise.

    Args:
        files: files of the version.
        folder: folder of the version.
        version: the version.
        into: folder for the arrays.

    Returns:
        `mean` and `std` for normalisation.

    Raises:
        DataError: a file is damaged, or the lists leave a split empty.
    """
    num_clips = sum(map(len, files.clips.values()))
    print(f"{NAME}: decoding {num_clips:,} clips in {folder}, once", file=sys.stderr, flush=True)
    began = time.monotonic()
    testing = read_list(folder / TESTING_LIST, version.words)
    if in_both := testing & read_list(folder / VALIDATION_LIST, version.words):
        raise DataError(
            f"{folder / TESTING_LIST} and {folder / VALIDATION_LIST} both name {min(in_both)}; a clip must be in one"
        )
    splits: dict[str, list[tuple[os.DirEntry[str], int]]] = {"train": [], "test": []}
    for label, (word, entries) in enumerate(files.clips.items()):
        for entry in entries:
            splits["test" if f"{word}/{entry.name}" in testing else "train"].append((entry, label))
    for split, quantity in (("train", "all"), ("test", "none")):
        if not splits[split]:
            raise DataError(
                f"{folder / TESTING_LIST} names {quantity} of the clips in {folder}, so the {split}ing set is empty"
            )
    with count_bar() as bar:
        task = bar.add_task(NAME, total=num_clips)
        for split, clips in splits.items():
            paths = [Path(entry) for entry, _ in clips]
            _write_clips(into / f"{split}_samples.npy", paths, written=lambda: bar.advance(task))
            np.save(into / f"{split}_labels.npy", np.array([label for _, label in clips], np.int64))
    train_noise, test_noise = _read_noise([Path(entry) for entry in files.noises])
    np.save(into / "train_noise.npy", train_noise)
    np.save(into / "test_noise.npy", test_noise)
    mean, std = measure_normalisation(np.load(into / "train_samples.npy", mmap_mode="r"))
    print(f"{NAME}: decoded in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return {"mean": mean, "std": std}


def measure_normalisation(samples: NDArray[np.int16]) -> tuple[float, float]:
    """Measure the mean and standard deviation of log-mel values over evenly spaced clips.

    They are rounded so that all machines get the same values.

    Args:
        samples: waveforms, shape (clips, 16000).
    """
    pipeline = SpeechPipeline((0.0,), (1.0,), np.empty(0, np.int16), torch.device("cpu"), channels_last=False)
    step = max(1, len(samples) // MEASURED_CLIPS)
    count, total, squares = 0, 0.0, 0.0
    for start in range(0, len(samples), step * 64):
        values = pipeline.prepare(torch.from_numpy(np.array(samples[start : start + step * 64 : step]))).double()
        count += values.numel()
        total += values.sum().item()
        squares += values.square().sum().item()
    mean = total / count
    return round(mean, 2), round((squares / count - mean**2) ** 0.5, 2)


def _write_clips(target: Path, files: Sequence[Path], written: Callable[[], None]) -> None:
    """Write the clips to an array file; call `written` after each."""
    clips = np.lib.format.open_memmap(target, mode="w+", dtype=np.int16, shape=(len(files), CLIP_SAMPLES))
    with ThreadPoolExecutor(READERS) as readers:
        for start in range(0, len(files), BLOCK):
            for row, clip in enumerate(readers.map(read_clip, files[start : start + BLOCK]), start):
                clips[row] = clip
                written()
    clips.flush()


def _read_noise(files: Sequence[Path]) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    """Concatenate the background noises: the first four fifths of each for training, the last fifth for testing."""
    noises = [read_wav(file) for file in files]
    train = np.concatenate([noise[: len(noise) * 4 // 5] for noise in noises])
    test = np.concatenate([noise[len(noise) * 4 // 5 :] for noise in noises])
    if len(test) < CLIP_SAMPLES:
        seconds = sum(map(len, noises)) / SAMPLE_RATE
        raise DataError(f"{files[0].parent} holds {seconds:.1f} s of background noise; expected at least 5 s")
    return train, test
