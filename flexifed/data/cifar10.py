"""CIFAR-10 as its author publishes it, in the binary or the Python version.

Both hold the same 50,000 + 10,000 images in the same order. `find` verifies them once against published checksums; the
processes that train open the verified files. No file is unpickled before its checksum has been compared.

Source: https://www.cs.toronto.edu/~kriz/cifar.html (Krizhevsky 2009, "Learning multiple layers of features from tiny
images").
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray

from flexifed.data.dataset import (
    ArraySplit,
    Dataset,
    DatasetInfo,
    LabelledSamples,
    check_indices,
    data_changed,
    is_folder,
)
from flexifed.data.download import RemoteFile, fetch, unpack
from flexifed.errors import DataError, FlexifedWarning

HOME = "https://www.cs.toronto.edu/~kriz/cifar.html"
BINARY_FOLDER = "cifar-10-batches-bin"
PYTHON_FOLDER = "cifar-10-batches-py"

TRAIN_FILES = tuple(f"data_batch_{batch}" for batch in range(1, 6))
TEST_FILES = ("test_batch",)

SAMPLES_PER_FILE = 10_000
IMAGE_SHAPE = (3, 32, 32)
RECORD_BYTES = 1 + 3 * 32 * 32  # the label, then the red, the green and the blue plane, row by row

BINARY_SHA256: Mapping[str, str] = MappingProxyType(
    {
        "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
        "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
        "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
        "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
        "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
        "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
    }
)

FINGERPRINT = "cifar10-" + hashlib.sha256("".join(BINARY_SHA256.values()).encode()).hexdigest()
"""Fingerprint of the published contents; both versions have the same, since only published files are accepted."""

ARCHIVE = RemoteFile(
    name="cifar-10-python.tar.gz",
    urls=("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",),
    num_bytes=170_498_071,
    checksum="md5:c58f30108f718f92721af3b95e74349a",
)


def find(data_dir: Path) -> DatasetInfo | None:
    """Look for either version in a data folder and verify it; the binary version is tried first.

    Returns:
        None if neither version's folder exists.

    Raises:
        DataError: files are missing or damaged and the other version can't be used either, or can't be accessed.

    Warns:
        FlexifedWarning: the binary version is damaged, so the Python version is used.
    """
    damage: list[str] = []
    for version, (folder, check) in _LAYOUTS.items():
        if not is_folder(data_dir / folder):
            continue
        problems = check(data_dir / folder)
        if not problems:
            if damage:
                message = f"{' '.join(damage)} Using the complete copy in {data_dir / folder} instead."
                warnings.warn(message, FlexifedWarning, stacklevel=2)
            return _info(data_dir, version)
        damage.append(f"CIFAR-10 in {data_dir / folder} is not the published set: {'; '.join(problems)}.")
    if damage:
        raise DataError(f"{' '.join(damage)} {remedy(data_dir)} {layout(data_dir)}")
    return None


def remedy(data_dir: Path) -> str:
    """How to get the data, by download or by hand, as a sentence."""
    return f"Run with --download ({ARCHIVE.size}), or unpack either version from {HOME} in {data_dir}."


def layout(data_dir: Path) -> str:
    """Which files are expected, as a sentence."""
    return (
        f"{data_dir / BINARY_FOLDER} holds data_batch_1.bin to data_batch_5.bin and test_batch.bin, "
        f"{data_dir / PYTHON_FOLDER} holds data_batch_1 to data_batch_5, test_batch and batches.meta."
    )


def open_real(info: DatasetInfo) -> Dataset:
    """Open the files that `find` verified, in any process.

    The binary version is not hashed again and takes no memory. The Python version is hashed again (by torchvision,
    before it unpickles anything) and held in memory, 180 MB.

    Raises:
        DataError: the files are missing, or have changed since they were found.
    """
    return _open_binary(info) if info.layout == "binary" else _open_python(info)


def download(data_dir: Path) -> None:
    """Download the Python version from its author's site into a folder, check it and unpack it.

    An intact archive that is already there is used. A damaged copy is renamed to `cifar-10-batches-py.old`.

    Raises:
        DataError: no network, no space, a folder that can't be written, or a download that isn't the published file.
    """
    archive = fetch(ARCHIVE, data_dir)
    unpack(archive, data_dir / PYTHON_FOLDER, within=PYTHON_FOLDER)


@dataclass(frozen=True)
class RecordSplit:
    """A split in files of the binary version, which are mapped into memory only while samples are taken.

    An open split therefore takes no memory, and is pickled as the names of its files.
    """

    files: tuple[Path, ...]

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """All labels, shape (len,); the first use reads all files."""
        return np.concatenate([_map_records(file)[:, 0] for file in self.files], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.files) * SAMPLES_PER_FILE

    def take(self, indices: NDArray[np.int64]) -> LabelledSamples:
        """Copy samples; see `Split.take`.

        Raises:
            DataError: a file is missing or its size has changed.
        """
        check_indices(indices, len(self))
        images = np.empty((len(indices), *IMAGE_SHAPE), np.uint8)
        labels = np.empty(len(indices), np.int64)
        file_index, record_index = np.divmod(indices, SAMPLES_PER_FILE)
        for index in np.unique(file_index):
            in_file = file_index == index
            records = _map_records(self.files[index])[record_index[in_file]]
            labels[in_file] = records[:, 0]
            images[in_file] = records[:, 1:].reshape(-1, *IMAGE_SHAPE)
        return torch.from_numpy(images), torch.from_numpy(labels)


def _info(data_dir: Path, layout: str) -> DatasetInfo:
    return DatasetInfo(
        name="cifar10",
        source="real",
        location=str(data_dir.absolute()),
        layout=layout,
        fingerprint=FINGERPRINT,
        num_train=len(TRAIN_FILES) * SAMPLES_PER_FILE,
        num_test=len(TEST_FILES) * SAMPLES_PER_FILE,
        num_classes=10,
        in_channels=3,
        # From the authors' program. It averages the deviation within each image; over all pixels it would be 0.247.
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
    )


def _binary_problems(folder: Path) -> list[str]:
    return _problems(folder, BINARY_SHA256, hashlib.sha256, num_bytes=SAMPLES_PER_FILE * RECORD_BYTES)


def _python_problems(folder: Path) -> list[str]:
    """Check the files that torchvision will unpickle against its own checksums."""
    from torchvision.datasets import CIFAR10

    checksums = dict([*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])])
    return _problems(folder, checksums, partial(hashlib.md5, usedforsecurity=False))


def _problems(
    folder: Path, checksums: Mapping[str, str], algorithm: Callable[..., hashlib._Hash], num_bytes: int | None = None
) -> list[str]:
    """Find out what is wrong with the files of a folder, one phrase per file; empty if they are the published ones.

    Args:
        folder: folder of the files.
        checksums: published checksum of each file, in hexadecimal.
        algorithm: makes the hash object for the checksums.
        num_bytes: size of each file, if all have the same; checked first, since that is quick.
    """
    problems = []
    for name, expected in checksums.items():
        try:
            actual_bytes = (folder / name).stat().st_size
            if num_bytes is not None and actual_bytes != num_bytes:
                problems.append(f"{name} has {actual_bytes:,} bytes and should have {num_bytes:,}")
                continue
            with open(folder / name, "rb") as file:
                hashed = hashlib.file_digest(file, algorithm)
        except FileNotFoundError:
            problems.append(f"{name} is missing")
        except OSError as error:
            problems.append(f"{name} can't be read ({error.strerror})")
        else:
            if hashed.hexdigest() != expected:
                kind = {"sha256": "SHA-256", "md5": "MD5"}[hashed.name]
                problems.append(f"{name} has the {kind} {hashed.hexdigest()} and should have {expected}")
    return problems


_LAYOUTS: Mapping[str, tuple[str, Callable[[Path], list[str]]]] = MappingProxyType(
    {"binary": (BINARY_FOLDER, _binary_problems), "python": (PYTHON_FOLDER, _python_problems)}
)


def _open_binary(info: DatasetInfo) -> Dataset:
    folder = Path(info.location) / BINARY_FOLDER
    train = RecordSplit(tuple(folder / f"{name}.bin" for name in TRAIN_FILES))
    test = RecordSplit(tuple(folder / f"{name}.bin" for name in TEST_FILES))
    for file in (*train.files, *test.files):
        _map_records(file)
    return Dataset(info, train, test)


def _map_records(file: Path) -> NDArray[np.uint8]:
    """Map a file of the binary version, read-only, shape (samples, bytes per record).

    Raises:
        DataError: the file is missing, or its size has changed since it was verified.
    """
    num_bytes = SAMPLES_PER_FILE * RECORD_BYTES
    try:
        if (actual_bytes := file.stat().st_size) != num_bytes:
            raise data_changed(file, f"it has {actual_bytes:,} bytes and should have {num_bytes:,}")
        return np.memmap(file, np.uint8, mode="r", shape=(SAMPLES_PER_FILE, RECORD_BYTES))
    except OSError as error:
        raise data_changed(file, error.strerror or str(error)) from error


def _open_python(info: DatasetInfo) -> Dataset:
    from torchvision.datasets import CIFAR10

    folder = Path(info.location) / PYTHON_FOLDER
    try:
        loaded = [CIFAR10(info.location, train=train) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise data_changed(folder, str(error)) from error
    # torchvision moves the channels to the end; moving them back gives a view that is contiguous as in the file.
    train, test = (
        ArraySplit(split.data.transpose(0, 3, 1, 2), np.asarray(split.targets, np.int64)) for split in loaded
    )
    return Dataset(info, train, test)
