"""Speech Commands as its author publishes it: spoken words of up to a second, a folder of wav files for each word.

v0.01 has 30 words, and is the version of the paper; v0.02 has 35. Where both lie in a data folder, v0.01 is used. As
`speech_commands` every word is a class. As `speech_commands_12` the classes are ten commands, all other words, and
silence (see `flexifed.data.speech_commands_12`).

`testing_list.txt` names the test clips. All others are for training, those of `validation_list.txt` too: nothing is
selected on them here. The author lists all clips of a speaker in one place, so nobody is heard in both sets.

Clips lie in the order of words and file names, as they are: int16, 16,000 samples, with zeros after a clip that is
shorter. They are decoded once (`flexifed.data.cache`).

Source: Warden 2018, "Speech Commands: A dataset for limited-vocabulary speech recognition", arXiv 1804.03209.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from flexifed.data.cache import FOLDER, CachedArrays, cached_arrays, reopen, source_key
from flexifed.data.dataset import (
    ArraySplit,
    Dataset,
    DatasetInfo,
    SpeechDataset,
    Split,
    changed,
)
from flexifed.data.download import RemoteFile, fetch, unpack
from flexifed.data.pipeline import SpeechPipeline
from flexifed.data.speech_commands_12 import NUM_CLASSES as NUM_TWELVE
from flexifed.data.speech_commands_12 import VERSION as TWELVE_VERSION
from flexifed.data.speech_commands_12 import TwelveSplit
from flexifed.data.wav import SAMPLE_RATE, read_clip, read_wav
from flexifed.errors import DataError, FlexifedWarning
from flexifed.seeding import derive_seed

DECODER_VERSION = 1
"""Raise it whenever the same files would give other arrays or facts."""

NAME, NAME_12 = "speech_commands", "speech_commands_12"
CLIP_SAMPLES = SAMPLE_RATE
NOISE_FOLDER = "_background_noise_"
VALIDATION_LIST, TESTING_LIST = "validation_list.txt", "testing_list.txt"

READERS = 8
"""Threads that read wav files; they wait for the disk more than they compute."""
BLOCK = 1_024
"""Clips that are read before they are written."""
MEASURED_CLIPS = 4_096
"""About so many training clips, evenly spread, are what normalisation is measured on."""

_ROOT_SEED = 0  # which clips and noises the twelve classes get is fixed; a run's own seed has no part in it


@dataclass(frozen=True)
class Version:
    """What was published: its name, its words in the order of their labels, and how many clips it has."""

    name: str
    words: tuple[str, ...]
    num_clips: int
    num_test: int

    @property
    def folder(self) -> str:
        """The folder of the version's words."""
        return f"speech_commands_{self.name}"

    @property
    def url(self) -> str:
        """The archive's address. It holds the words themselves, no folder around them."""
        return f"http://download.tensorflow.org/data/{self.folder}.tar.gz"


# fmt: off
_FIRST_WORDS = (
    "bed", "bird", "cat", "dog", "down", "eight", "five", "four", "go", "happy", "house", "left", "marvin", "nine",
    "no", "off", "on", "one", "right", "seven", "sheila", "six", "stop", "three", "tree", "two", "up", "wow", "yes",
    "zero",
)
# fmt: on
V1 = Version("v0.01", _FIRST_WORDS, num_clips=64_721, num_test=6_835)
V2 = Version(
    "v0.02",
    tuple(sorted((*_FIRST_WORDS, "backward", "follow", "forward", "learn", "visual"))),
    num_clips=105_829,
    num_test=11_005,
)
VERSIONS = (V1, V2)

V1_ARCHIVE = RemoteFile(
    name=f"{V1.folder}.tar.gz",
    urls=(V1.url, V1.url.replace("http://", "https://storage.googleapis.com/")),
    num_bytes=1_489_096_277,
    checksum="sha256:743935421bb51cccdb6bdd152e04c5c70274e935c82119ad7faeec31780d811d",
)
"""Its checksum is the one that torchaudio has."""


def find(data_dir: Path, name: str = NAME) -> DatasetInfo | None:
    """Look for a version under a folder, v0.01 first, as torchaudio unpacks it or bare; decode it on first use.

    Args:
        data_dir: holds `SpeechCommands/speech_commands_v0.01` or `speech_commands_v0.01`, or one of v0.02.
        name: `speech_commands`, or `speech_commands_12` for the task of twelve classes.

    Returns:
        None where there is no such folder.

    Raises:
        DataError: the folder lacks a word or a list, or a file is damaged.

    Warns:
        FlexifedWarning: there are more or fewer clips than were published, so the data are `real-partial`.
    """
    if (found := _locate(data_dir)) is None:
        return None
    version, folder = found
    cached = _decoded(data_dir, version, folder)
    num_train, num_test = len(cached.array("train_labels")), len(cached.array("test_labels"))
    whole = (num_train + num_test, num_test) == (version.num_clips, version.num_test)
    if not whole:
        message = (
            f"Speech Commands in {folder} has {num_train + num_test:,} clips, {num_test:,} of them for testing; "
            f"{version.name} as published has {version.num_clips:,} and {version.num_test:,}. Results say real-partial."
        )
        warnings.warn(message, FlexifedWarning, stacklevel=2)
    train, test = _splits(cached, version, name)
    return DatasetInfo(
        name=name,
        source="real" if whole else "real-partial",
        location=str(data_dir.absolute()),
        layout=version.name,
        fingerprint=_prefix(version, name) + cached.fingerprint,
        num_train=len(train),
        num_test=len(test),
        num_classes=len(version.words) if name == NAME else NUM_TWELVE,
        in_channels=1,
        mean=(cached.facts["mean"],),
        std=(cached.facts["std"],),
    )


def open_real(info: DatasetInfo) -> Dataset:
    """Open what `find` has found, in this process or in another one; it costs no memory.

    On a machine where the same files were not decoded yet, they are now.

    Raises:
        DataError: the files are not there, or not as they were found.
    """
    data_dir = Path(info.location)
    version = next(version for version in VERSIONS if version.name == info.layout)

    def make() -> CachedArrays:
        if (found := _locate(data_dir)) is None or found[0] != version:
            raise changed(data_dir / version.folder, "it is not there")
        return _decoded(data_dir, *found)

    fingerprint = info.fingerprint.removeprefix(_prefix(version, info.name))
    cached = reopen(data_dir / FOLDER / version.folder, name=version.folder, fingerprint=fingerprint, make=make)
    train, test = _splits(cached, version, info.name)
    return SpeechDataset(info, train, test, cached.array("train_noise"))


def remedy(data_dir: Path) -> str:
    """Both ways to get the data, as a sentence."""
    first, second = (data_dir / "SpeechCommands" / version.folder for version in VERSIONS)
    return (
        f"Run with --download to fetch v0.01, the paper's, into {data_dir} ({V1_ARCHIVE.size}), or get {V1.url} or "
        f"{V2.url} and unpack it to {first} or {second}: a folder for each word, {NOISE_FOLDER}, {VALIDATION_LIST} and "
        f"{TESTING_LIST}."
    )


def download(data_dir: Path) -> None:
    """Fetch the archive of v0.01, check it and unpack it to `SpeechCommands`, as torchaudio does.

    Raises:
        DataError: no network, no space, a folder that can't be written, or a download that isn't the published file.
    """
    archive = fetch(V1_ARCHIVE, data_dir)
    unpack(archive, data_dir / "SpeechCommands" / V1.folder)


def _splits(cached: CachedArrays, version: Version, name: str) -> tuple[Split, Split]:
    """The training and the test set of a task."""
    train, test = (
        ArraySplit(cached.array(f"{split}_samples"), np.array(cached.array(f"{split}_labels")))
        for split in ("train", "test")
    )
    if name == NAME:
        return train, test
    first, second = (
        TwelveSplit.of(
            clips, version.words, cached.array(f"{split}_noise"), derive_seed(_ROOT_SEED, "synthetic", stream)
        )
        for split, clips, stream in (("train", train, 34), ("test", test, 36))
    )
    return first, second


def _prefix(version: Version, name: str) -> str:
    """Of a fingerprint."""
    return f"{NAME}-{version.name}-" if name == NAME else f"{NAME_12}-{TWELVE_VERSION}-{version.name}-"


def _locate(data_dir: Path) -> tuple[Version, Path] | None:
    """The version that is there, and its folder."""
    try:
        for version in VERSIONS:
            for folder in (data_dir / "SpeechCommands" / version.folder, data_dir / version.folder):
                if folder.is_dir():
                    return version, folder
    except OSError as error:
        raise DataError(f"{data_dir} can't be read ({error.strerror}). {remedy(data_dir)}") from error
    return None


@dataclass(frozen=True)
class _Files:
    """What a version's folder holds, each in the order of names."""

    clips: Mapping[str, list[os.DirEntry[str]]]
    noises: list[os.DirEntry[str]]
    lists: list[os.DirEntry[str]]

    @classmethod
    def scan(cls, folder: Path, version: Version) -> _Files:
        """List the files; contents are not read.

        Raises:
            DataError: what should be there isn't, or a word isn't one of the version's.
        """
        try:
            top = {entry.name: entry for entry in os.scandir(folder) if entry.name[0] != "."}
            unknown = [name for name in top if name[0] != "_" and top[name].is_dir() and name not in version.words]
            missing = [name for name in (*version.words, NOISE_FOLDER) if name not in top]
            lists = [top[name] for name in (VALIDATION_LIST, TESTING_LIST) if name in top]
            problems = [f"{name}/ is missing" for name in missing]
            problems += [f"{name} is missing" for name in (VALIDATION_LIST, TESTING_LIST) if name not in top]
            problems += [f"{name}/ is no word of {version.name}" for name in sorted(unknown)]
            clips = {word: _wav_files(top[word]) for word in version.words if word in top}
            noises = _wav_files(top[NOISE_FOLDER]) if NOISE_FOLDER in top else []
        except OSError as error:
            raise DataError(f"{error.filename or folder} can't be read ({error.strerror})") from error
        found = {**clips, NOISE_FOLDER: noises}
        problems += [f"{name}/ holds no wav file" for name in found if name in top and not found[name]]
        if problems:
            raise DataError(
                f"Speech Commands in {folder} is not as published: {'; '.join(problems)}. {version.name} has a folder "
                f"for each of {len(version.words)} words, {NOISE_FOLDER}, {VALIDATION_LIST} and {TESTING_LIST}; "
                f"{version.url} has all of it."
            )
        return cls(clips, noises, lists)

    def __iter__(self) -> Iterator[os.DirEntry[str]]:
        for entries in (*self.clips.values(), self.noises, self.lists):
            yield from entries


def _wav_files(folder: os.DirEntry[str]) -> list[os.DirEntry[str]]:
    """A folder's wav files in the order of names; hidden ones, which some systems leave behind, are none."""
    entries = (entry for entry in os.scandir(folder) if entry.name.endswith(".wav") and entry.name[0] != ".")
    return sorted(entries, key=lambda entry: entry.name)


def _decoded(data_dir: Path, version: Version, folder: Path) -> CachedArrays:
    files = _Files.scan(folder, version)
    try:
        key = source_key(folder, files)
    except OSError as error:
        raise DataError(f"{error.filename} can't be read ({error.strerror})") from error
    return cached_arrays(
        data_dir / FOLDER / version.folder,
        name=version.folder,
        version=DECODER_VERSION,
        source_key=key,
        build=partial(_decode, files, folder, version),
    )


def _decode(files: _Files, folder: Path, version: Version, into: Path) -> dict[str, object]:
    """Write both splits' clips and labels and the background noise; returns the normalisation."""
    num_clips = sum(map(len, files.clips.values()))
    print(f"{NAME}: decoding {num_clips:,} clips in {folder}, once", file=sys.stderr, flush=True)
    began = time.monotonic()
    testing = read_list(folder / TESTING_LIST, version.words)
    if both := testing & read_list(folder / VALIDATION_LIST, version.words):
        raise DataError(
            f"{folder / TESTING_LIST} and {folder / VALIDATION_LIST} both name {min(both)}; a clip belongs to one"
        )
    splits: dict[str, list[tuple[os.DirEntry[str], int]]] = {"train": [], "test": []}
    for label, (word, entries) in enumerate(files.clips.items()):
        for entry in entries:
            splits["test" if f"{word}/{entry.name}" in testing else "train"].append((entry, label))
    for split, named in (("train", "all"), ("test", "none")):
        if not splits[split]:
            raise DataError(
                f"{folder / TESTING_LIST} names {named} of the clips in {folder}, so the {split}ing set is empty"
            )
    for split, clips in splits.items():
        _write_clips(into / f"{split}_samples.npy", [Path(entry) for entry, _ in clips])
        np.save(into / f"{split}_labels.npy", np.array([label for _, label in clips], np.int64))
    train_noise, test_noise = _read_noise([Path(entry) for entry in files.noises])
    np.save(into / "train_noise.npy", train_noise)
    np.save(into / "test_noise.npy", test_noise)
    mean, std = measure_normalisation(np.load(into / "train_samples.npy", mmap_mode="r"))
    print(f"{NAME}: decoded in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return {"mean": mean, "std": std}


def read_list(file: Path, words: Iterable[str]) -> frozenset[str]:
    """The clips that a list names, as `word/file.wav`; they need not be there.

    Raises:
        DataError: the list can't be read, or a line names no clip.
    """
    words = frozenset(words)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} can't be read as a list of clips: {error}") from error
    named = set()
    for number, line in enumerate(lines, start=1):
        word, slash, name = line.strip().partition("/")
        if not line.strip():
            continue
        if word not in words or not slash or not name.endswith(".wav") or "/" in name:
            raise DataError(f"{file}, line {number}: {line[:80]!r} names no clip; expected a word/file.wav")
        named.add(f"{word}/{name}")
    return frozenset(named)


def measure_normalisation(samples: NDArray[np.int16]) -> tuple[float, float]:
    """Mean and deviation of log-mel values over evenly spread clips, rounded to what every machine agrees on.

    Args:
        samples: clips, shape (clips, 16000).
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


def _write_clips(target: Path, files: Sequence[Path]) -> None:
    clips = np.lib.format.open_memmap(target, mode="w+", dtype=np.int16, shape=(len(files), CLIP_SAMPLES))
    with ThreadPoolExecutor(READERS) as readers:
        for start in range(0, len(files), BLOCK):
            for row, clip in enumerate(readers.map(read_clip, files[start : start + BLOCK]), start):
                clips[row] = clip
    clips.flush()


def _read_noise(files: Sequence[Path]) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    """Background noises end to end: the first four fifths of each for training, the last fifth of each for testing."""
    noises = [read_wav(file) for file in files]
    train = np.concatenate([noise[: len(noise) * 4 // 5] for noise in noises])
    test = np.concatenate([noise[len(noise) * 4 // 5 :] for noise in noises])
    if len(test) < CLIP_SAMPLES:
        seconds = sum(map(len, noises)) / SAMPLE_RATE
        raise DataError(f"{files[0].parent} holds {seconds:.1f} s of background noise; expected at least 5 s")
    return train, test
