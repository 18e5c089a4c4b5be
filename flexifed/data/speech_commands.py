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

import warnings
from functools import partial
from pathlib import Path

import numpy as np

from flexifed.data.cache import CachedArrays, cached_arrays, reopen, source_key
from flexifed.data.dataset import ArraySplit, Dataset, DatasetInfo, PartialDataWarning, SpeechDataset, Split, changed
from flexifed.data.download import RemoteFile, fetch, unpack
from flexifed.data.speech_commands_12 import NUM_CLASSES as NUM_TWELVE
from flexifed.data.speech_commands_12 import VERSION as TWELVE_VERSION
from flexifed.data.speech_commands_12 import TwelveSplit
from flexifed.data.speech_commands_decode import decode
from flexifed.data.speech_commands_files import (
    NAME,
    NOISE_FOLDER,
    TESTING_LIST,
    V1,
    V2,
    VALIDATION_LIST,
    VERSIONS,
    Files,
    Version,
)
from flexifed.data.stand_in import stream_seed
from flexifed.errors import DataError

DECODER_VERSION = 1
"""Raise it whenever the same files would give other arrays or facts."""

NAME_12 = "speech_commands_12"
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
        PartialDataWarning: there are more or fewer clips than were published, so the data are `real-partial`.
    """
    if (found := _locate(data_dir)) is None:
        return None
    version, folder = found
    cached = _decoded(data_dir, version, folder)
    num_test = len(cached.array("test_labels"))
    num_clips = len(cached.array("train_labels")) + num_test
    whole = (num_clips, num_test) == (version.num_clips, version.num_test)
    if not whole:
        there = f"{num_clips:,} of {version.num_clips:,} clips, {num_test:,} of {version.num_test:,} test clips"
        warnings.warn(PartialDataWarning("Speech Commands", folder, there), stacklevel=2)
    train, test = _splits(cached, version, name)
    return DatasetInfo(
        name=name,
        source="real-partial" if not whole else "real-other" if version.name != V1.name and name == NAME else "real",
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
    cached = reopen(data_dir, name=version.folder, fingerprint=fingerprint, make=make)
    train, test = _splits(cached, version, info.name)
    return SpeechDataset(info, train, test, cached.array("train_noise"))


def remedy(data_dir: Path) -> str:
    """Both ways to get the data, as a sentence."""
    target = data_dir / "SpeechCommands" / V1.folder
    return f"Run with --download ({V1_ARCHIVE.size}: v0.01, the paper's), or unpack {V1.url} to {target}."


def layout(data_dir: Path) -> str:
    """What is looked for, as a sentence."""
    return (
        f"That holds a folder for each word, {NOISE_FOLDER}, {VALIDATION_LIST} and {TESTING_LIST}; v0.02 ({V2.url}) in "
        f"{data_dir / 'SpeechCommands' / V2.folder} will do too."
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
        TwelveSplit.of(clips, version.words, cached.array(f"{split}_noise"), stream_seed(stream))
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


def _decoded(data_dir: Path, version: Version, folder: Path) -> CachedArrays:
    files = Files.scan(folder, version)
    try:
        key = source_key(folder, files)
    except OSError as error:
        raise DataError(f"{error.filename} can't be read ({error.strerror})") from error
    return cached_arrays(
        data_dir,
        name=version.folder,
        version=DECODER_VERSION,
        source_key=key,
        build=partial(decode, files, folder, version),
    )
