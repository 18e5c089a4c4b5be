"""AG News as Zhang, Zhao and LeCun (2015) publish it: a class from 1 to 4, a title and a description a line.

A text is title, space, description, in lower case, as indices of characters. The 69 characters of Zhang's alphabet
have 1 to 69, in the paper's order with the new line last; his list of 70 has the hyphen twice, so 70 never occurs.
Everything else, the space too, is 0, and so is what lies past the end. Texts stand in reading order: Zhang's own
program reverses them, Conneau et al. (2017) do not, and one order serves both families here. 1,024 characters are
stored; CharCNN reads the first 1,014 (`flexifed.config.TEXT_LENGTHS`).

Quotes are doubled inside a column. A backslash and an n stand for a new line, as the publisher's readme says; any
other backslash stands for itself.

Source: https://github.com/zhangxiangxiao/Crepe, section 2.2 of the paper.
"""

from __future__ import annotations

import csv
import hashlib
import io
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
from rich.filesize import decimal

from flexifed.config import TEXT_LENGTHS
from flexifed.data import cache
from flexifed.data.dataset import ArraySplit, Dataset, DatasetInfo, PartialDataWarning, is_folder
from flexifed.data.download import RemoteFile, fetch
from flexifed.errors import DataError

NAME = "agnews"
FOLDER = "ag_news_csv"
CLASSES = ("World", "Sports", "Business", "Sci/Tech")
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789-,;.!?:'\"/\\|_@#$%^&*~`+=<>()[]{}\n"
LENGTH = max(TEXT_LENGTHS.values())

VERSION = 1
"""Raise it when the same files would give other arrays or facts."""

PUBLISHED: Mapping[str, int] = MappingProxyType({"train": 120_000, "test": 7_600})
"""Published texts of each split."""
ADDRESS = "https://raw.githubusercontent.com/mhjabreel/CharCnn_Keras/master/data/ag_news_csv"
FILES: Mapping[str, RemoteFile] = MappingProxyType(
    {
        "train": RemoteFile(
            name="train.csv",
            urls=(f"{ADDRESS}/train.csv",),
            num_bytes=29_470_338,
            checksum="md5:b1a00f826fdfbd249f79597b59e1dc12",
        ),
        "test": RemoteFile(
            name="test.csv",
            urls=(f"{ADDRESS}/test.csv",),
            num_bytes=1_857_427,
            checksum="md5:d52ea96a97a2d943681189a97654912d",
        ),
    }
)
"""The published files, at the address that torchtext uses: the publisher's own folder is open to browsers only."""

_LABELS: Mapping[str, int] = MappingProxyType({str(label + 1): label for label in range(len(CLASSES))})


class _Indices(dict[int, int]):
    """For `str.translate`: code points to indices; 0 for all that the alphabet hasn't."""

    def __missing__(self, code_point: int) -> int:
        return 0


_INDICES = _Indices(dict.fromkeys(range(128), 0) | {ord(char): index for index, char in enumerate(ALPHABET, start=1)})


def encode(title: str, description: str) -> bytes:
    """One text as its characters' indices, `LENGTH` bytes.

    >>> encode("Up-", "C3")[:7].hex(" ")
    '15 10 25 00 03 1e 00'
    """
    text = f"{title} {description}".replace("\\n", "\n").lower()
    return text[:LENGTH].translate(_INDICES).encode("latin-1").ljust(LENGTH, b"\0")


def find(data_dir: Path) -> DatasetInfo | None:
    """Look for both files under a folder, and encode them where that was not done yet.

    Returns:
        None where the set's folder does not exist.

    Raises:
        DataError: a file is missing, can't be read, or has a line that is not a text with its class.

    Warns:
        PartialDataWarning: they are not the published files.
    """
    folder = data_dir / FOLDER
    if not is_folder(folder):
        return None
    arrays = _encoded(data_dir)
    problems = list(_differences(arrays.facts))
    if problems:
        warnings.warn(PartialDataWarning("AG News", folder, "; ".join(problems)), stacklevel=2)
    return DatasetInfo(
        name=NAME,
        source="real-partial" if problems else "real",
        location=str(data_dir.absolute()),
        layout="csv",
        fingerprint=f"{NAME}-{arrays.fingerprint}",
        num_train=arrays.facts["train"]["texts"],
        num_test=arrays.facts["test"]["texts"],
        num_classes=len(CLASSES),
        in_channels=None,
        mean=(),
        std=(),
    )


def open_real(info: DatasetInfo) -> Dataset:
    """Map the texts that `find` has described, in any process; encode them on a machine that has not done so yet.

    Raises:
        DataError: they are not where they were found, or not as they were.
    """
    data_dir = Path(info.location)
    arrays = cache.reopen(
        data_dir,
        name=NAME,
        fingerprint=info.fingerprint.removeprefix(f"{NAME}-"),
        make=lambda: _encoded(data_dir),
    )
    train, test = (
        ArraySplit(arrays.array(f"{split}_texts"), np.array(arrays.array(f"{split}_labels"))) for split in PUBLISHED
    )
    return Dataset(info, train, test)


def remedy(data_dir: Path) -> str:
    """Both ways to get the data, as a sentence."""
    size = decimal(sum(file.num_bytes for file in FILES.values()))
    return f"Run with --download ({size}), or put train.csv and test.csv from {ADDRESS}/ into {data_dir / FOLDER}."


def layout(data_dir: Path) -> str:
    """What is looked for, as a sentence."""
    train, test = PUBLISHED["train"], PUBLISHED["test"]
    return (
        f"{data_dir / FOLDER} holds train.csv and test.csv: {train:,} and {test:,} lines of class (1 to 4), title and "
        "description."
    )


def download(data_dir: Path) -> None:
    """Fetch both files, and check them. A file that isn't the published one goes aside, as `train.csv.old`.

    Raises:
        DataError: no network, no space, a folder that can't be written, or a download that isn't the published file.
    """
    for file in FILES.values():
        fetch(file, data_dir / FOLDER)


def _differences(facts: Mapping[str, Mapping[str, object]]) -> Iterator[str]:
    """How the files that were encoded differ from the published ones."""
    for split, file in FILES.items():
        if facts[split]["texts"] != PUBLISHED[split]:
            yield f"{file.name} holds {facts[split]['texts']:,} of {PUBLISHED[split]:,} texts"
        elif f"md5:{facts[split]['md5']}" != file.checksum:
            expected = file.checksum.removeprefix("md5:")
            yield f"{file.name} has the MD5 {facts[split]['md5']}, and the published file has {expected}"


def _encoded(data_dir: Path) -> cache.CachedArrays:
    folder = data_dir / FOLDER
    files = [folder / file.name for file in FILES.values()]
    try:
        key = cache.source_key(folder, files)
    except OSError as error:
        raise _unreadable(Path(error.filename or folder), error) from error
    return cache.cached_arrays(
        data_dir,
        name=NAME,
        version=VERSION,
        source_key=key,
        build=lambda into: _encode_all(folder, into),
    )


def _encode_all(folder: Path, into: Path) -> dict[str, object]:
    """Write texts and labels of both files; returns for each the number of texts and its MD5."""
    print(f"{NAME}: encoding the texts in {folder}, once", file=sys.stderr, flush=True)
    facts: dict[str, object] = {}
    for split, file in FILES.items():
        path = folder / file.name
        try:
            content = path.read_bytes()
        except OSError as error:
            raise _unreadable(path, error) from error
        texts, labels = bytearray(), []
        for label, title, description in read_rows(content, path):
            labels.append(label)
            texts += encode(title, description)
        np.save(into / f"{split}_texts.npy", np.frombuffer(texts, np.uint8).reshape(-1, LENGTH))
        np.save(into / f"{split}_labels.npy", np.array(labels, np.int64))
        facts[split] = {"texts": len(labels), "md5": hashlib.md5(content, usedforsecurity=False).hexdigest()}
    return facts


def read_rows(content: bytes, path: Path) -> Iterator[tuple[int, str, str]]:
    """Label (0 to 3), title and description of each row of a file, new lines as they are escaped.

    Args:
        content: the file's.
        path: its name, for errors.

    Raises:
        DataError: it holds no rows, is not UTF-8, or has a row of another form; with the row's first line, from 1.
    """
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise _bad_line(path, content.count(b"\n", 0, error.start) + 1, "is not UTF-8") from error
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        for row in rows:
            if len(row) != 3:
                raise _bad_line(path, line, f"has {len(row)} columns")
            if row[0] not in _LABELS:
                raise _bad_line(path, line, f"has the class {row[0][:20]!r}")
            yield _LABELS[row[0]], row[1], row[2]
            line = rows.line_num + 1
    except csv.Error as error:
        raise _bad_line(path, line, f"can't be read as CSV ({error})") from error
    if line == 1:
        raise DataError(f"{path} holds no texts. {_EXPECTED}")


def _bad_line(path: Path, line: int, problem: str) -> DataError:
    return DataError(f"{path}, line {line:,}: it {problem}. {_EXPECTED}")


def _unreadable(path: Path, error: OSError) -> DataError:
    problem = "is missing" if isinstance(error, FileNotFoundError) else f"can't be read ({error.strerror})"
    return DataError(f"{path} {problem}. {_EXPECTED}")


_EXPECTED = (
    'Each line should be a class from 1 to 4, a title and a description, UTF-8, as in "3","Title","Description"; '
    f"get the published files from {ADDRESS}/train.csv and test.csv."
)
