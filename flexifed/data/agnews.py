"""AG News as Zhang, Zhao and LeCun (2015) publish it: each line has a class from 1 to 4, a title and a description.

A text is the title, a space and the description, in lower case, as character indices. The 69 characters of Zhang's
alphabet have indices 1 to 69, in the paper's order with the newline last; his list of 70 contains the hyphen twice, so
70 never occurs. All other characters, including the space, are 0, and so is the padding. Texts are in reading order:
Zhang's own program reverses them, Conneau et al. (2017) do not, and here one order serves both families. 1,024
characters are stored; CharCNN reads the first 1,014 (`flexifed.config.TEXT_LENGTHS`).

Within a column, quotes are doubled. A backslash followed by n is a newline, as the publisher's readme says; any other
backslash is literal.

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
"""Increase it whenever the same files would give different arrays or facts."""

PUBLISHED: Mapping[str, int] = MappingProxyType({"train": 120_000, "test": 7_600})
"""Number of published texts in each split."""
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
"""The published files, at the URL that torchtext uses: the publisher's own folder can only be reached by a browser."""

_LABELS: Mapping[str, int] = MappingProxyType({str(label + 1): label for label in range(len(CLASSES))})


class _Indices(dict[int, int]):
    """Maps code points to indices for `str.translate`; 0 for characters outside of the alphabet."""

    def __missing__(self, code_point: int) -> int:
        return 0


_INDICES = _Indices(dict.fromkeys(range(128), 0) | {ord(char): index for index, char in enumerate(ALPHABET, start=1)})


def encode(title: str, description: str) -> bytes:
    """Encode a text as character indices, `LENGTH` bytes.

    >>> encode("Up-", "C3")[:7].hex(" ")
    '15 10 25 00 03 1e 00'
    """
    text = f"{title} {description}".replace("\\n", "\n").lower()
    return text[:LENGTH].translate(_INDICES).encode("latin-1").ljust(LENGTH, b"\0")


def find(data_dir: Path) -> DatasetInfo | None:
    """Look for both files in a data folder, and encode them on first use.

    Returns:
        None if the folder `ag_news_csv` does not exist.

    Raises:
        DataError: a file is missing, can't be read, or has a line that is not a text with its class.

    Warns:
        PartialDataWarning: the files are not the published ones.
    """
    folder = data_dir / FOLDER
    if not is_folder(folder):
        return None
    arrays = _encoded(data_dir)
    differences = list(_differences(arrays.facts))
    if differences:
        warnings.warn(PartialDataWarning("AG News", folder, "; ".join(differences)), stacklevel=2)
    return DatasetInfo(
        name=NAME,
        source="real-partial" if differences else "real",
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
    """Open the texts that `find` described, in any process; encode them first on a machine that has not done so yet.

    Raises:
        DataError: the files are missing, or have changed since they were found.
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
    """How to get the data, by download or by hand, as a sentence."""
    size = decimal(sum(file.num_bytes for file in FILES.values()))
    return f"Run with --download ({size}), or put train.csv and test.csv from {ADDRESS}/ into {data_dir / FOLDER}."


def layout(data_dir: Path) -> str:
    """Which files are expected, as a sentence."""
    train, test = PUBLISHED["train"], PUBLISHED["test"]
    return (
        f"{data_dir / FOLDER} holds train.csv and test.csv: {train:,} and {test:,} lines of class (1 to 4), title and "
        "description."
    )


def download(data_dir: Path) -> None:
    """Download and check both files. An existing file that isn't the published one is renamed to `train.csv.old`.

    Raises:
        DataError: no network, no space, a folder that can't be written, or a download that isn't the published file.
    """
    for file in FILES.values():
        fetch(file, data_dir / FOLDER)


def _differences(facts: Mapping[str, Mapping[str, object]]) -> Iterator[str]:
    """How the encoded files differ from the published ones, one phrase per file."""
    for split, file in FILES.items():
        if facts[split]["texts"] != PUBLISHED[split]:
            yield f"{file.name} holds {facts[split]['texts']:,} of {PUBLISHED[split]:,} texts"
        elif f"md5:{facts[split]['md5']}" != file.checksum:
            expected = file.checksum.removeprefix("md5:")
            yield f"{file.name} has the MD5 {facts[split]['md5']}, but the published file has {expected}"


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
    """Write texts and labels of both files; return the number of texts and the MD5 of each file."""
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
    """Yield the label (0 to 3), title and description of each row of a file; newlines are still escaped.

    Args:
        content: contents of the file.
        path: path of the file, for error messages.

    Raises:
        DataError: the file holds no rows, is not UTF-8, or has an invalid row; the message gives the row's first line,
            counted from 1.
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
    return DataError(f"{path}, line {line:,} {problem}. {_EXPECTED}")


def _unreadable(path: Path, error: OSError) -> DataError:
    problem = "is missing" if isinstance(error, FileNotFoundError) else f"can't be read ({error.strerror})"
    return DataError(f"{path} {problem}. {_EXPECTED}")


_EXPECTED = (
    'Each line must hold a class from 1 to 4, a title and a description, in UTF-8, as in "3","Title","Description"; '
    f"get the published files from {ADDRESS}/train.csv and test.csv."
)
