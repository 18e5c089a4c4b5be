"""CINIC-10 as its authors publish it: PNGs of 32x32 pixels in a folder for each class, in train, valid and test.

Training uses train and valid together. Images are in order of split, class and file name. They are decoded once; see
`flexifed.data.cache`. Some of the published images are greyscale, and get three equal channels.

Source: https://github.com/BayesWatch/cinic-10 (Darlow, Crowley, Antoniou and Storkey 2018, "CINIC-10 is not ImageNet
or CIFAR-10"), which also gives the mean and the standard deviation.
"""

from __future__ import annotations

import os
import struct
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flexifed.data import cache
from flexifed.data.bars import count_bar
from flexifed.data.dataset import ArraySplit, Dataset, DatasetInfo, PartialDataWarning, is_folder
from flexifed.data.download import RemoteFile, fetch, unpack
from flexifed.errors import DataError

NAME = "cinic10"
FOLDERS = ("cinic10", "CINIC-10")
SPLITS = ("train", "valid", "test")
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PUBLISHED_PER_CLASS = 9_000
"""Number of published images of each class in each split."""
IMAGE_SHAPE = (3, 32, 32)

VERSION = 1
"""Increase it whenever the same files would give different arrays or facts."""

CHUNK = 512
"""Number of images that a thread decodes at a time."""

HOME = "https://datashare.ed.ac.uk/handle/10283/3192"
ARCHIVE = RemoteFile(
    name="CINIC-10.tar.gz",
    urls=(
        "https://datashare.ed.ac.uk/bitstream/handle/10283/3192/CINIC-10.tar.gz",
        "https://datashare.ed.ac.uk/server/api/core/bitstreams/e8e186cc-2688-48f1-aa5a-3fda1a43f8b6/content",
    ),
    num_bytes=687_544_992,
    checksum="md5:6ee4d0c996905fe93221de577967a372",
)

_SIGNATURE = b"\x89PNG\r\n\x1a\n"

Listing = Mapping[str, Sequence[Sequence[os.DirEntry[str]]]]


def find(data_dir: Path) -> DatasetInfo | None:
    """Look for the images in a data folder, and decode them on first use.

    Returns:
        None if the folder of the data set does not exist.

    Raises:
        DataError: a class is missing, a folder can't be read, or a file is not an image as published.

    Warns:
        PartialDataWarning: the number of images is not the published one.
    """
    folder = _folder(data_dir)
    if folder is None:
        return None
    arrays = _decoded(data_dir, folder)
    counts: Mapping[str, Sequence[int]] = arrays.facts["counts"]
    complete = all(count == PUBLISHED_PER_CLASS for split in SPLITS for count in counts[split])
    if not complete:
        published = PUBLISHED_PER_CLASS * len(CLASSES)
        totals = ", ".join(f"{split} {sum(counts[split]):,} of {published:,}" for split in SPLITS)
        warnings.warn(PartialDataWarning("CINIC-10", folder, f"{totals} images"), stacklevel=2)
    return DatasetInfo(
        name=NAME,
        source="real" if complete else "real-partial",
        location=str(data_dir.absolute()),
        layout="png",
        fingerprint=f"{NAME}-{arrays.fingerprint}",
        num_train=sum(counts["train"]) + sum(counts["valid"]),
        num_test=sum(counts["test"]),
        num_classes=len(CLASSES),
        in_channels=3,
        mean=(0.47889522, 0.47227842, 0.43047404),
        std=(0.24205776, 0.23828046, 0.25874835),
    )


def open_real(info: DatasetInfo) -> Dataset:
    """Open the images that `find` described, in any process; decode them first on a machine that has not done so yet.

    Raises:
        DataError: the files are missing, or have changed since they were found.
    """
    data_dir = Path(info.location)

    def make() -> cache.CachedArrays:
        return _decoded(data_dir, _folder(data_dir) or data_dir / FOLDERS[0])

    arrays = cache.reopen(data_dir, name=NAME, fingerprint=info.fingerprint.removeprefix(f"{NAME}-"), make=make)
    train, test = (
        ArraySplit(arrays.array(f"{split}_images"), np.array(arrays.array(f"{split}_labels")))
        for split in ("train", "test")
    )
    return Dataset(info, train, test)


def remedy(data_dir: Path) -> str:
    """How to get the data, by download or by hand, as a sentence."""
    target = data_dir / FOLDERS[0]
    return f"Run with --download ({ARCHIVE.size}), or unpack {ARCHIVE.name} from {HOME} to a new {target}."


def layout(data_dir: Path) -> str:
    """Which files are expected, as a sentence."""
    return (
        f"In {data_dir / FOLDERS[0]}, train, valid and test hold a folder for each of {', '.join(CLASSES)}, with 9,000 "
        "PNGs each."
    )


def download(data_dir: Path) -> None:
    """Download the published archive into a folder, check it and unpack it.

    An existing folder of the data set is renamed to `<name>.old`.

    Raises:
        DataError: no network, no space, a folder that can't be written, or a download that isn't the published file.
    """
    archive = fetch(ARCHIVE, data_dir)
    unpack(archive, _folder(data_dir) or data_dir / FOLDERS[0])


def _folder(data_dir: Path) -> Path | None:
    return next((data_dir / name for name in FOLDERS if is_folder(data_dir / name)), None)


def _decoded(data_dir: Path, folder: Path) -> cache.CachedArrays:
    try:
        listing = _list_images(folder)
        key = cache.source_key(folder, (entry for classes in listing.values() for files in classes for entry in files))
    except OSError as error:
        raise DataError(f"{error.filename or folder} can't be read ({error.strerror}). {_expected(folder)}") from error
    return cache.cached_arrays(
        data_dir,
        name=NAME,
        version=VERSION,
        source_key=key,
        build=lambda into: _decode_all(listing, into, folder),
    )


def _list_images(folder: Path) -> Listing:
    """List the files of each class in each split, in order of their names; hidden files are skipped.

    Raises:
        DataError: a class is missing, empty or unknown.
        OSError: a folder can't be read.
    """
    listing: dict[str, list[list[os.DirEntry[str]]]] = {}
    for split in SPLITS:
        if not (folder / split).is_dir():
            raise DataError(f"{folder / split} is missing. {_expected(folder)}")
        present = {entry.name for entry in os.scandir(folder / split) if entry.is_dir() and entry.name[0] != "."}
        for name in sorted(present ^ set(CLASSES)):
            problem = "is not a class of CINIC-10" if name in present else "is missing"
            raise DataError(f"{folder / split / name} {problem}. {_expected(folder)}")
        listing[split] = []
        for name in CLASSES:
            entries = [entry for entry in os.scandir(folder / split / name) if entry.name[0] != "."]
            if not entries:
                raise DataError(f"{folder / split / name} holds no images. {_expected(folder)}")
            listing[split].append(sorted(entries, key=lambda entry: entry.name))
    return listing


def _expected(folder: Path) -> str:
    return (
        f"{folder} must hold train, valid and test, and each of them a folder of PNGs for each of "
        f"{', '.join(CLASSES)}; get the missing files from {HOME}."
    )


def _decode_all(listing: Listing, into: Path, folder: Path) -> dict[str, object]:
    """Write images and labels of both splits; return the number of images of each class in each published split."""
    num_images = sum(len(files) for classes in listing.values() for files in classes)
    print(f"{NAME}: decoding {num_images:,} images in {folder}, once", file=sys.stderr, flush=True)
    began = time.monotonic()
    with count_bar() as bar:
        task = bar.add_task(NAME, total=num_images)
        for name, splits in (("train", ("train", "valid")), ("test", ("test",))):
            files = [entry.path for split in splits for entries in listing[split] for entry in entries]
            labels = [label for split in splits for label, entries in enumerate(listing[split]) for _ in entries]
            np.save(into / f"{name}_labels.npy", np.array(labels, np.int64))
            images = np.lib.format.open_memmap(into / f"{name}_images.npy", "w+", np.uint8, (len(files), *IMAGE_SHAPE))
            decode_files(files, images, decoded=lambda count: bar.advance(task, count))
            images.flush()
    print(f"{NAME}: decoded in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return {"counts": {split: [len(entries) for entries in classes] for split, classes in listing.items()}}


def decode_files(files: Sequence[str], images: NDArray[np.uint8], decoded: Callable[[int], None]) -> None:
    """Decode files into an array, on all cores.

    Args:
        files: paths of PNGs.
        images: output array for the pixels, shape (len(files), 3, 32, 32).
        decoded: called with the number of newly decoded files, at intervals.

    Raises:
        DataError: a file is not an image as published.
    """
    import torchvision.io  # noqa: F401 - once, before the threads, which would wait for each other's import

    def decode_chunk(start: int) -> int:
        chunk = range(start, min(start + CHUNK, len(files)))
        for index in chunk:
            images[index] = decode_image(files[index])
        return len(chunk)

    # Threads are enough: most of the time is spent reading and decoding, which release the interpreter's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for count in pool.map(decode_chunk, range(0, len(files), CHUNK)):
            decoded(count)


def decode_image(file: str) -> NDArray[np.uint8]:
    """Decode a PNG of 32x32 pixels, shape (3, 32, 32).

    Raises:
        DataError: the file can't be read, or is not such a PNG.
    """
    import torch
    from torchvision.io import ImageReadMode, decode_png

    try:
        with open(file, "rb") as opened:
            content = opened.read()
    except OSError as error:
        raise DataError(f"{file} can't be read ({error.strerror}); {_AS_PUBLISHED}") from error
    if content[:8] != _SIGNATURE or content[12:16] != b"IHDR" or len(content) < 33:
        raise DataError(f"{file} is not a PNG; {_AS_PUBLISHED}")
    width, height = struct.unpack(">II", content[16:24])  # checked before anything of that size is allocated
    if (width, height) != (32, 32):
        raise DataError(f"{file} has {width}x{height} pixels; {_AS_PUBLISHED}")
    try:
        # torchvision verifies the checksums of a PNG, which cover all pixels.
        image = decode_png(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)
    except RuntimeError as error:
        raise DataError(f"{file} is damaged: it begins like a PNG but can't be decoded; {_AS_PUBLISHED}") from error
    if image.dtype != torch.uint8:
        raise DataError(f"{file} has {image.dtype.itemsize * 8} bits per channel; {_AS_PUBLISHED}")
    return image.numpy()


_AS_PUBLISHED = f"CINIC-10 holds PNGs of 32x32 pixels, 8 bits per channel, and nothing else. Get it again from {HOME}."
