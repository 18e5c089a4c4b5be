"""Speech Commands as its author publishes it: spoken words of up to a second, a folder of wav files for each word.

v0.01 has 30 words and is the paper's version; v0.02 has 35. If a data folder holds both, v0.01 is used. In the
data set `speech_commands` every word is a class. In `speech_commands_12` the classes are ten commands, all other words,
and silence (see `flexifed.data.speech_commands_12`).

`testing_list.txt` names the test clips. All others are training clips, even those in `validation_list.txt`: nothing is
selected on a validation set here. The author's lists keep all clips of a speaker together, so no speaker is in both
splits.

Clips are in the order of words and file names, unprocessed: int16, 16,000 samples, with zeros after a clip that is
shorter. They are decoded once (`flexifed.data.cache`).

Source: Warden 2018, "Speech Commands: A dataset for limited-vocabulary speech recognition", arXiv 1804.03209.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from flexifed.data.cache import CachedArrays, cached_arrays, reopen, source_key
from flexifed.data.dataset import (
    ArraySplit,
    Dataset,
    DatasetInfo,
    PartialDataWarning,
    SpeechDataset,
    Split,
    data_changed,
    is_folder,
)
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
"""Increase it whenever the same files would give different arrays or facts."""

NAME_12 = "speech_commands_12"
V1_ARCHIVE = RemoteFile(
    name=f"{V1.folder}.tar.gz",
    urls=(V1.url, V1.url.replace("http://", "https://storage.googleapis.com/")),
    num_bytes=1_489_096_277,
    checksum="sha256:743935421bb51cccdb6bdd152e04c5c70274e935c82119ad7faeec31780d811d",
)
"""The checksum is the one in torchaudio."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A classification task on the clips.

    Attributes:
        key: start of the fingerprint of its data.
        num_classes: number of classes; None if each word of the version is a class.
        make_split: makes a split from the clips of all words, the words in label order, background noise, and a seed.
    """

    key: str
    num_classes: int | None
    make_split: Callable[[ArraySplit, Sequence[str], NDArray[np.int16], int], Split]

    def fingerprint_prefix(self, version: Version) -> str:
        """What precedes the digest of the clips in a fingerprint."""
        return f"{self.key}-{version.name}-"

    def splits(self, cached: CachedArrays, version: Version) -> tuple[Split, Split]:
        """The training and the test split."""
        train, test = (
            self.make_split(
                ArraySplit(cached.array(f"{split}_samples"), np.array(cached.array(f"{split}_labels"))),
                version.words,
                cached.array(f"{split}_noise"),
                stream_seed(stream),
            )
            for split, stream in (("train", 34), ("test", 36))
        )
        return train, test


TASKS: Mapping[str, Task] = MappingProxyType(
    {
        NAME: Task(key=NAME, num_classes=None, make_split=lambda clips, words, noise, seed: clips),
        NAME_12: Task(key=f"{NAME_12}-{TWELVE_VERSION}", num_classes=NUM_TWELVE, make_split=TwelveSplit.from_clips),
    }
)
"""The tasks by data set name."""


def find(data_dir: Path, name: str = NAME) -> DatasetInfo | None:
    """Look for a version in a folder, v0.01 first, as torchaudio unpacks it or directly; decode it on first use.

    Args:
        data_dir: holds `SpeechCommands/speech_commands_v0.01` or `speech_commands_v0.01`, or the same of v0.02.
        name: `speech_commands`, or `speech_commands_12` for the task with twelve classes.

    Returns:
        None if there is no such folder.

    Raises:
        DataError: the folder lacks a word or a list, or a file is damaged.

    Warns:
        PartialDataWarning: the number of clips is not the published one, so the data are `real-partial`.
    """
    if (located := _locate(data_dir)) is None:
        return None
    version, folder = located
    task = TASKS[name]
    cached = _decoded(data_dir, version, folder)
    num_test = len(cached.array("test_labels"))
    num_clips = len(cached.array("train_labels")) + num_test
    whole = (num_clips, num_test) == (version.num_clips, version.num_test)
    if not whole:
        counts = f"{num_clips:,} of {version.num_clips:,} clips, {num_test:,} of {version.num_test:,} test clips"
        warnings.warn(PartialDataWarning("Speech Commands", folder, counts), stacklevel=2)
    other_classes = task.num_classes is None and version.name != V1.name
    train, test = task.splits(cached, version)
    return DatasetInfo(
        name=name,
        source="real-partial" if not whole else "real-other" if other_classes else "real",
        location=str(data_dir.absolute()),
        layout=version.name,
        fingerprint=task.fingerprint_prefix(version) + cached.fingerprint,
        num_train=len(train),
        num_test=len(test),
        num_classes=task.num_classes or len(version.words),
        in_channels=1,
        mean=(cached.facts["mean"],),
        std=(cached.facts["std"],),
    )


def open_real(info: DatasetInfo) -> Dataset:
    """Open the data that `find` described, in any process; the clips are mapped, so this takes no memory.

    On a machine that has not decoded the files yet, they are decoded first.

    Raises:
        DataError: the files are missing, or have changed since they were found.
    """
    data_dir = Path(info.location)
    task = TASKS[info.name]
    version = next(version for version in VERSIONS if version.name == info.layout)

    def make() -> CachedArrays:
        if (located := _locate(data_dir)) is None or located[0] != version:
            raise data_changed(data_dir / version.folder, "it is not there")
        return _decoded(data_dir, *located)

    fingerprint = info.fingerprint.removeprefix(task.fingerprint_prefix(version))
    cached = reopen(data_dir, name=version.folder, fingerprint=fingerprint, make=make)
    train, test = task.splits(cached, version)
    return SpeechDataset(info, train, test, cached.array("train_noise"))


def remedy(data_dir: Path) -> str:
    """How to get the data, by download or by hand, as a sentence."""
    target = data_dir / "SpeechCommands" / V1.folder
    return f"Run with --download ({V1_ARCHIVE.size}: v0.01, the paper's), or unpack {V1.url} to {target}."


def layout(data_dir: Path) -> str:
    """Which files are expected, as a sentence."""
    return (
        f"That folder holds a folder for each word, {NOISE_FOLDER}, {VALIDATION_LIST} and {TESTING_LIST}; v0.02 "
        f"({V2.url}) in {data_dir / 'SpeechCommands' / V2.folder} works too."
    )


def download(data_dir: Path) -> None:
    """Fetch the archive of v0.01, check it and unpack it to `SpeechCommands`, as torchaudio does.

    Raises:
        DataError: no network, no space, a folder that can't be written, or a download that isn't the published file.
    """
    archive = fetch(V1_ARCHIVE, data_dir)
    unpack(archive, data_dir / "SpeechCommands" / V1.folder)


def _locate(data_dir: Path) -> tuple[Version, Path] | None:
    """The version in a data folder, and the version's folder."""
    parents = [parent for parent in (data_dir / "SpeechCommands", data_dir) if is_folder(parent)]
    for version in VERSIONS:
        for parent in parents:
            if is_folder(parent / version.folder):
                return version, parent / version.folder
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
