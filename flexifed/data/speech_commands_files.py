"""The published versions of Speech Commands, and the files of a version; see `flexifed.data.speech_commands`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from flexifed.errors import DataError

NAME = "speech_commands"
NOISE_FOLDER = "_background_noise_"
VALIDATION_LIST, TESTING_LIST = "validation_list.txt", "testing_list.txt"


@dataclass(frozen=True)
class Version:
    """A published version.

    Attributes:
        name: `v0.01` or `v0.02`.
        words: the words, in the order of their labels.
        num_clips: number of clips.
        num_test: number of test clips.
    """

    name: str
    words: tuple[str, ...]
    num_clips: int
    num_test: int

    @property
    def folder(self) -> str:
        """Name of the folder that holds the version."""
        return f"speech_commands_{self.name}"

    @property
    def url(self) -> str:
        """URL of the archive, which has no top-level folder."""
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


@dataclass(frozen=True)
class Files:
    """The files of a version, each kind in order of names.

    Attributes:
        clips: the clips of each word.
        noises: the background noises.
        lists: the lists of validation and test clips.
    """

    clips: Mapping[str, list[os.DirEntry[str]]]
    noises: list[os.DirEntry[str]]
    lists: list[os.DirEntry[str]]

    @classmethod
    def scan(cls, folder: Path, version: Version) -> Files:
        """List the files in a version's folder, without reading them.

        Raises:
            DataError: a folder or list is missing, or a folder is not a word of the version.
        """
        try:
            top = {entry.name: entry for entry in os.scandir(folder) if entry.name[0] != "."}
            unknown = [name for name in top if name[0] != "_" and top[name].is_dir() and name not in version.words]
            missing = [name for name in (*version.words, NOISE_FOLDER) if name not in top]
            lists = [top[name] for name in (VALIDATION_LIST, TESTING_LIST) if name in top]
            problems = [f"{name}/ is missing" for name in missing]
            problems += [f"{name} is missing" for name in (VALIDATION_LIST, TESTING_LIST) if name not in top]
            problems += [f"{name}/ is not a word of {version.name}" for name in sorted(unknown)]
            clips = {word: _wav_files(top[word]) for word in version.words if word in top}
            noises = _wav_files(top[NOISE_FOLDER]) if NOISE_FOLDER in top else []
        except OSError as error:
            raise DataError(f"{error.filename or folder} can't be read ({error.strerror})") from error
        wav_files = {**clips, NOISE_FOLDER: noises}
        problems += [f"{name}/ holds no wav file" for name in wav_files if name in top and not wav_files[name]]
        if problems:
            raise DataError(
                f"Speech Commands in {folder} is not as published: {'; '.join(problems)}. {version.name} has a folder "
                f"for each of {len(version.words)} words, {NOISE_FOLDER}, {VALIDATION_LIST} and {TESTING_LIST}; "
                f"{version.url} contains all of them."
            )
        return cls(clips, noises, lists)

    def __iter__(self) -> Iterator[os.DirEntry[str]]:
        for entries in (*self.clips.values(), self.noises, self.lists):
            yield from entries


def _wav_files(folder: os.DirEntry[str]) -> list[os.DirEntry[str]]:
    """The wav files of a folder in order of names, without hidden files, which some systems leave behind."""
    entries = (entry for entry in os.scandir(folder) if entry.name.endswith(".wav") and entry.name[0] != ".")
    return sorted(entries, key=lambda entry: entry.name)


def read_list(file: Path, words: Iterable[str]) -> frozenset[str]:
    """Return the clips named in a list, as `word/file.wav`; the clips need not exist.

    Raises:
        DataError: the list can't be read, or a line does not name a clip.
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
            raise DataError(f"{file}, line {number}: {line[:80]!r} is not a clip; expected word/file.wav")
        named.add(f"{word}/{name}")
    return frozenset(named)
