"""Data sets. Formats are tested on a small set of random pixels, made here, whose checksums replace those of CIFAR-10;
the tests with the fixture `data_dir` read the real CIFAR-10. Nothing is downloaded."""

from __future__ import annotations

import hashlib
import io
import itertools
import pickle
import socket
import tarfile
import tracemalloc
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torchvision.datasets import CIFAR10

from flexifed.data import (
    SOURCES,
    DataChoice,
    Dataset,
    DatasetInfo,
    cifar10,
    download,
    find_dataset,
    open_dataset,
    synthetic,
    synthetic_texts,
)
from flexifed.data.dataset import ArraySplit
from flexifed.data.partition import dirichlet_proportions, iid_shards, skewed_shards, window
from flexifed.errors import ConfigError, DataError, FlexifedWarning
from flexifed.models import build_model

NAMES = (*cifar10.TRAIN_FILES, *cifar10.TEST_FILES)
FILE_SAMPLES = 20
BINARY, PYTHON = cifar10.BINARY_FOLDER, cifar10.PYTHON_FOLDER
Records = Mapping[str, NDArray[np.uint8]]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("a test tried to reach the network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(download, "urlopen", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> Records:
    """A small published set: the records of each file, shape (20, 3073)."""
    generator = np.random.default_rng(0)
    records = {}
    for name in NAMES:
        records[name] = generator.integers(0, 256, (FILE_SAMPLES, cifar10.RECORD_BYTES), dtype=np.uint8)
        records[name][:, 0] %= 10
    publish(monkeypatch, records)
    return records


def publish(monkeypatch: pytest.MonkeyPatch, records: Records) -> None:
    """Make the loaders, including torchvision's, accept these records as the published ones."""
    checksums = {name: hashlib.md5(encoded).hexdigest() for name, encoded in python_version(records).items()}
    hashes = {f"{name}.bin": hashlib.sha256(batch.tobytes()).hexdigest() for name, batch in records.items()}
    monkeypatch.setattr(cifar10, "SAMPLES_PER_FILE", len(records["test_batch"]))
    monkeypatch.setattr(cifar10, "BINARY_SHA256", hashes)
    monkeypatch.setattr(CIFAR10, "train_list", [[name, checksums[name]] for name in cifar10.TRAIN_FILES])
    monkeypatch.setattr(CIFAR10, "test_list", [[name, checksums[name]] for name in cifar10.TEST_FILES])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": checksums["batches.meta"]})


def python_version(records: Records) -> dict[str, bytes]:
    """Pickle the same samples as in the Python version."""
    batches = {
        name: {"batch_label": name, "labels": batch[:, 0].tolist(), "data": batch[:, 1:].copy(), "filenames": []}
        for name, batch in records.items()
    }
    meta = {"label_names": [f"class {label}" for label in range(10)], "num_vis": 3072}
    return {name: pickle.dumps(content, protocol=2) for name, content in {**batches, "batches.meta": meta}.items()}


def write_binary(data_dir: Path, records: Records) -> Path:
    folder = data_dir / BINARY
    folder.mkdir()
    for name, batch in records.items():
        (folder / f"{name}.bin").write_bytes(batch.tobytes())
    return folder


def write_python(data_dir: Path, records: Records) -> Path:
    folder = data_dir / PYTHON
    folder.mkdir()
    for name, encoded in python_version(records).items():
        (folder / name).write_bytes(encoded)
    return folder


def flip_byte(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def find(data_dir: Path) -> DatasetInfo:
    info = cifar10.find(data_dir)
    assert info is not None
    return info


WRITERS = {"binary": write_binary, "python": write_python}


@pytest.fixture(params=["binary", "python", "synthetic"])
def dataset(request: pytest.FixtureRequest, records: Records, tmp_path: Path) -> Dataset:
    if request.param == "synthetic":
        return open_dataset(synthetic.info("cifar10"))
    WRITERS[request.param](tmp_path, records)
    return open_dataset(find(tmp_path))


# Every split


def test_info_describes_the_splits(dataset: Dataset) -> None:
    assert len(dataset.train) == len(dataset.train.labels) == dataset.info.num_train
    assert len(dataset.test) == len(dataset.test.labels) == dataset.info.num_test
    assert dataset.train.labels.dtype == np.int64
    assert sorted(set(dataset.train.labels.tolist())) == list(range(dataset.info.num_classes))
    with pytest.raises(FrozenInstanceError):
        dataset.info.name = "other"  # type: ignore[misc]


def test_info_is_small_and_survives_pickling(dataset: Dataset) -> None:
    encoded = pickle.dumps(dataset.info)
    assert len(encoded) < 2000
    assert pickle.loads(encoded) == dataset.info


def test_take_is_a_pure_function_of_each_index(dataset: Dataset) -> None:
    everything = np.arange(60)
    images, labels = dataset.train.take(everything)
    indices = np.array([59, 0, 21, 40, 21, 19, 20])  # unsorted, from several files, one twice
    taken_images, taken_labels = dataset.train.take(indices)
    torch.testing.assert_close(taken_images, images[indices], rtol=0, atol=0)
    torch.testing.assert_close(taken_labels, labels[indices], rtol=0, atol=0)
    assert labels.tolist() == dataset.train.labels[:60].tolist()
    assert len({image.numpy().tobytes() for image in images}) == 60


def test_take_returns_new_contiguous_tensors(dataset: Dataset) -> None:
    indices = np.array([3, 1])
    images, labels = dataset.test.take(indices)
    assert images.shape == (2, 3, 32, 32)
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
    assert images.is_contiguous()
    before = images.clone()
    images.add_(1)  # the process would crash here if the memory were read-only
    labels.add_(1)
    again, again_labels = dataset.test.take(indices)
    torch.testing.assert_close(again, before, rtol=0, atol=0)
    assert (again_labels + 1).tolist() == labels.tolist()


def test_take_of_nothing_is_empty(dataset: Dataset) -> None:
    images, labels = dataset.test.take(np.array([], np.int64))
    assert images.shape == (0, 3, 32, 32)
    assert labels.shape == (0,)


@pytest.mark.parametrize("outside", ["below", "above"])
def test_take_rejects_indices_outside_of_the_split(dataset: Dataset, outside: str) -> None:
    index = -1 if outside == "below" else len(dataset.test)
    with pytest.raises(IndexError, match=f"sample {index} of a split of {len(dataset.test)}"):
        dataset.test.take(np.array([0, index]))


def test_array_split_needs_a_label_for_each_image() -> None:
    with pytest.raises(ValueError, match="2 samples don't match 3 labels"):
        ArraySplit(np.zeros((2, 3, 32, 32), np.uint8), np.zeros(3, np.int64))


def test_array_split_of_a_view_returns_contiguous_images() -> None:
    channels_last = np.arange(4 * 32 * 32 * 3, dtype=np.uint8).reshape(4, 32, 32, 3)
    images, _ = ArraySplit(channels_last.transpose(0, 3, 1, 2), np.arange(4)).take(np.array([2, 0]))
    assert images.is_contiguous()
    assert images[1, 2, 5, 7] == channels_last[0, 5, 7, 2]


# CIFAR-10


@pytest.mark.parametrize("layout", WRITERS)
def test_published_samples_are_read_unchanged(layout: str, records: Records, tmp_path: Path) -> None:
    WRITERS[layout](tmp_path, records)
    info = find(tmp_path)
    assert (info.source, info.layout, info.location) == ("real", layout, str(tmp_path))
    dataset = open_dataset(info)
    train = np.concatenate([records[name] for name in cifar10.TRAIN_FILES])
    for split, expected in ((dataset.train, train), (dataset.test, records["test_batch"])):
        images, labels = split.take(np.arange(len(split)))
        assert len(split) == len(expected)
        assert images.numpy().reshape(-1, 3072).tobytes() == expected[:, 1:].tobytes()
        assert labels.tolist() == split.labels.tolist() == expected[:, 0].tolist()


def test_fingerprint_depends_on_the_contents_only(records: Records, tmp_path: Path) -> None:
    for folder, write in (("one", write_binary), ("two", write_binary), ("three", write_python)):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, records)
    infos = [find(tmp_path / folder) for folder in ("one", "two", "three")]
    assert len({info.location for info in infos}) == 3
    assert len({info.fingerprint for info in infos}) == 1
    assert synthetic.info("cifar10").fingerprint != infos[0].fingerprint


def test_location_is_absolute(records: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_binary(tmp_path, records)
    monkeypatch.chdir(tmp_path)
    assert find(Path(".")).location == str(tmp_path)


def test_nothing_there_is_none(tmp_path: Path) -> None:
    assert cifar10.find(tmp_path) is None
    assert cifar10.find(tmp_path / "absent") is None


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("data", ["auto", "real"])
@pytest.mark.parametrize("data_dir", ["file", "file/below", "link"])
def test_data_folder_that_is_not_a_folder(name: str, data: DataChoice, data_dir: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(DataError, match=rf"{data_dir} can't be used \(.*\); choose another data folder"):
        find_dataset(name, data=data, data_dir=tmp_path / data_dir)


@pytest.mark.parametrize("is_link", [False, True])
@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("cifar10", "cifar-10-batches-bin"),
        ("cifar10", "cifar-10-batches-py"),
        ("cinic10", "cinic10"),
        ("agnews", "ag_news_csv"),
        ("speech_commands", "SpeechCommands"),
        ("speech_commands_12", "speech_commands_v0.02"),
    ],
)
def test_data_that_are_no_folder_are_no_reason_for_a_stand_in(
    name: str, folder: str, is_link: bool, tmp_path: Path
) -> None:
    if is_link:
        (tmp_path / folder).symlink_to(tmp_path / "not mounted")
    else:
        (tmp_path / folder).touch()
    with pytest.raises(DataError, match=r"can't be used \(.*\); choose another data folder, or fix this one"):
        find_dataset(name, data="auto", data_dir=tmp_path)


def remove(file: Path) -> None:
    file.unlink()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


def flip_label(file: Path) -> None:
    flip_byte(file, 0)


def flip_pixel(file: Path) -> None:
    flip_byte(file, file.stat().st_size // 2)


def make_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    ("layout", "file", "damage", "message"),
    [
        ("binary", "data_batch_3.bin", remove, "data_batch_3.bin is missing"),
        ("binary", "test_batch.bin", cut, "test_batch.bin has 61,455 bytes and should have 61,460"),
        ("binary", "data_batch_1.bin", flip_label, "data_batch_1.bin has the SHA-256 "),
        ("binary", "data_batch_5.bin", flip_pixel, "data_batch_5.bin has the SHA-256 "),
        ("binary", "data_batch_2.bin", make_folder, "data_batch_2.bin "),
        ("python", "data_batch_2", remove, "data_batch_2 is missing"),
        ("python", "batches.meta", remove, "batches.meta is missing"),
        ("python", "data_batch_4", cut, "data_batch_4 has the MD5 "),
        ("python", "test_batch", flip_pixel, "test_batch has the MD5 "),
        ("python", "batches.meta", flip_pixel, "batches.meta has the MD5 "),
    ],
)
@pytest.mark.parametrize("data", ["auto", "real"])
def test_damage_is_an_error_that_names_file_and_remedy(
    layout: str, file: str, damage: Callable[[Path], None], message: str, data: str, records: Records, tmp_path: Path
) -> None:
    folder = WRITERS[layout](tmp_path, records)
    damage(folder / file)
    with pytest.raises(DataError) as caught:
        find_dataset("cifar10", data=data, data_dir=tmp_path)  # type: ignore[arg-type]
    text = str(caught.value)
    assert f"CIFAR-10 in {folder} is not the published set: {message}" in text
    assert text.count(";") == 0, "only the damaged file is named"
    check_remedy(text, tmp_path)


def check_remedy(text: str, data_dir: Path) -> None:
    assert "Run with --download (170.5 MB), or unpack either version from https://www.cs.toronto.edu" in text
    assert f"{data_dir / BINARY} holds data_batch_1.bin to data_batch_5.bin and test_batch.bin" in text
    assert f"{data_dir / PYTHON} holds data_batch_1 to data_batch_5, test_batch and batches.meta" in text


def test_checksum_error_shows_both_checksums(records: Records, tmp_path: Path) -> None:
    file = write_binary(tmp_path, records) / "test_batch.bin"
    flip_label(file)
    wrong, right = hashlib.sha256(file.read_bytes()).hexdigest(), cifar10.BINARY_SHA256["test_batch.bin"]
    with pytest.raises(DataError, match=f"test_batch.bin has the SHA-256 {wrong} and should have {right}"):
        cifar10.find(tmp_path)


def test_all_missing_files_are_named(records: Records, tmp_path: Path) -> None:
    (tmp_path / BINARY).mkdir()
    with pytest.raises(DataError) as caught:
        cifar10.find(tmp_path)
    assert all(f"{name}.bin is missing" in str(caught.value) for name in NAMES)


def test_python_version_replaces_a_damaged_binary_version(records: Records, tmp_path: Path) -> None:
    flip_pixel(write_binary(tmp_path, records) / "data_batch_1.bin")
    write_python(tmp_path, records)
    with pytest.warns(
        FlexifedWarning, match=rf"{BINARY} is not the published set.*Using the complete copy in .*{PYTHON}"
    ):
        info = find(tmp_path)
    assert info.layout == "python"


def test_binary_version_is_used_if_the_python_version_is_damaged(records: Records, tmp_path: Path) -> None:
    write_binary(tmp_path, records)
    flip_pixel(write_python(tmp_path, records) / "data_batch_1")
    assert find(tmp_path).layout == "binary"


def test_both_versions_damaged(records: Records, tmp_path: Path) -> None:
    flip_pixel(write_binary(tmp_path, records) / "data_batch_1.bin")
    remove(write_python(tmp_path, records) / "data_batch_2")
    with pytest.raises(DataError, match=rf"{BINARY} is not .* SHA-256 .*{PYTHON} is not .*data_batch_2 is missing"):
        cifar10.find(tmp_path)


class Explosive:
    """Unpickling this creates a file."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.witness,)


@pytest.mark.parametrize("file", ["data_batch_1", "batches.meta"])
def test_nothing_is_unpickled_before_it_is_verified(file: str, records: Records, tmp_path: Path) -> None:
    folder = write_python(tmp_path, records)
    info = find(tmp_path)
    witness = tmp_path / "witness"
    (folder / file).write_bytes(pickle.dumps(Explosive(witness)))
    with pytest.raises(DataError, match="is not the published set"):
        cifar10.find(tmp_path)
    with pytest.raises(DataError, match="verified when the run began and can't be opened now"):
        open_dataset(info)
    assert not witness.exists()
    pickle.loads((folder / file).read_bytes())
    assert witness.exists(), "the file does run code when unpickled"


@pytest.mark.parametrize(
    ("layout", "file", "damage"),
    [("binary", "data_batch_4.bin", remove), ("binary", "test_batch.bin", cut), ("python", "data_batch_4", remove)],
)
def test_data_that_change_after_they_were_verified(
    layout: str, file: str, damage: Callable[[Path], None], records: Records, tmp_path: Path
) -> None:
    folder = WRITERS[layout](tmp_path, records)
    info = find(tmp_path)
    damage(folder / file)
    with pytest.raises(DataError, match="verified when the run began") as caught:
        open_dataset(info)
    assert str(folder) in str(caught.value)
    assert "the same data under the same path" in str(caught.value)


def test_binary_file_that_changes_while_the_set_is_open(records: Records, tmp_path: Path) -> None:
    folder = write_binary(tmp_path, records)
    dataset = open_dataset(find(tmp_path))
    cut(folder / "data_batch_2.bin")
    dataset.train.take(np.array([0, 45]))
    with pytest.raises(DataError, match=r"data_batch_2\.bin was verified .* it has 61,455 bytes"):
        dataset.train.take(np.array([0, FILE_SAMPLES]))


def test_open_binary_split_holds_no_samples(records: Records, tmp_path: Path) -> None:
    write_binary(tmp_path, records)
    dataset = open_dataset(find(tmp_path))
    dataset.train.take(np.arange(50))
    assert len(pickle.dumps(dataset.train)) < 2000


# The real CIFAR-10


def test_real_binary_version(data_dir: Path) -> None:
    if not (data_dir / BINARY).exists():
        pytest.skip(f"no {BINARY} in {data_dir}")
    info = find_dataset("cifar10", data="auto", data_dir=data_dir)
    assert (info.source, info.layout, info.num_train, info.num_test) == ("real", "binary", 50_000, 10_000)
    dataset = open_dataset(info)
    assert np.bincount(dataset.train.labels).tolist() == [5000] * 10
    assert np.bincount(dataset.test.labels).tolist() == [1000] * 10
    for split, file, first in ((dataset.train, "data_batch_4.bin", 30_000), (dataset.test, "test_batch.bin", 0)):
        chosen = [9_999, 0, 1234]
        images, labels = split.take(np.array(chosen) + first)
        with open(data_dir / BINARY / file, "rb") as opened:
            for position, image, label in zip(chosen, images, labels, strict=True):
                opened.seek(position * 3073)
                record = opened.read(3073)
                assert record[0] == label
                assert record[1 + 1024 * 2 + 32 * 5 + 7] == image[2, 5, 7], "blue, sixth row, eighth column"
                assert record[1:] == image.numpy().tobytes()


def test_real_pixels_have_the_normalisation_that_is_stated(data_dir: Path) -> None:
    info = find_dataset("cifar10", data="real", data_dir=data_dir)
    images, _ = open_dataset(info).train.take(np.arange(0, 50_000, 25))
    pixels = images.double() / 255
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.tensor(info.mean).double(), rtol=0, atol=0.01)
    mean_of_image_stds = pixels.std((2, 3)).mean(0)
    torch.testing.assert_close(mean_of_image_stds, torch.tensor(info.std).double(), rtol=0, atol=0.005)


def test_real_images_in_the_python_version(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = open_dataset(find_dataset("cifar10", data="real", data_dir=data_dir))
    batches = {}
    for index, name in enumerate(NAMES):
        split, first = (real.test, 0) if name == "test_batch" else (real.train, index * 10_000)
        images, labels = split.take(np.arange(first, first + 300))
        batches[name] = torch.cat([labels[:, None].to(torch.uint8), images.flatten(1)], dim=1).numpy()
    publish(monkeypatch, batches)
    write_python(tmp_path, batches)
    dataset = open_dataset(find_dataset("cifar10", data="real", data_dir=tmp_path))
    images, labels = dataset.train.take(np.arange(600, 900))  # the first 300 of the third file
    monkeypatch.undo()
    expected, expected_labels = real.train.take(np.arange(20_000, 20_300))
    torch.testing.assert_close(images, expected, rtol=0, atol=0)
    torch.testing.assert_close(labels, expected_labels, rtol=0, atol=0)


def test_real_set_without_one_file(data_dir: Path, tmp_path: Path) -> None:
    if not (data_dir / BINARY).exists():
        pytest.skip(f"no {BINARY} in {data_dir}")
    (tmp_path / BINARY).mkdir()
    for name in cifar10.TRAIN_FILES:
        (tmp_path / BINARY / f"{name}.bin").symlink_to(data_dir.absolute() / BINARY / f"{name}.bin")
    (tmp_path / BINARY / "test_batch.bin").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=rf"{BINARY} is not the published set: test_batch.bin is missing\. Run with"):
        find_dataset("cifar10", data="auto", data_dir=tmp_path)


# The choice of data


def test_auto_takes_real_data_if_present(records: Records, tmp_path: Path) -> None:
    assert find_dataset("cifar10", data="auto", data_dir=tmp_path) == synthetic.info("cifar10")
    write_binary(tmp_path, records)
    assert find_dataset("cifar10", data="auto", data_dir=tmp_path).source == "real"
    assert find_dataset("cifar10", data="real", data_dir=str(tmp_path)).source == "real"
    assert find_dataset("cifar10", data="synthetic", data_dir=tmp_path) == synthetic.info("cifar10")


def test_real_data_are_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"cifar10: no real data in {tmp_path}") as caught:
        find_dataset("cifar10", data="real", data_dir=tmp_path)
    check_remedy(str(caught.value), tmp_path)
    assert "data=synthetic" in str(caught.value)
    with pytest.raises(DataError, match=r"no real data in .*/mistyped, which does not exist\. Run with"):
        find_dataset("cifar10", data="real", data_dir=tmp_path / "mistyped")


@pytest.mark.parametrize("name", SOURCES)
def test_data_folder_that_cannot_be_accessed(name: str) -> None:
    with pytest.raises(DataError, match=r"can't be .*\(File name too long\)"):
        find_dataset(name, data="auto", data_dir=Path("x" * 300))


def test_unknown_names_and_choices(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dataset is 'cifar'; choose one of: cifar10, cinic10, agnews"):
        find_dataset("cifar", data="auto", data_dir=tmp_path)
    with pytest.raises(ConfigError, match="data is 'fake'; choose one of: auto, real, synthetic"):
        find_dataset("cifar10", data="fake", data_dir=tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="download goes with real data"):
        find_dataset("cifar10", data="synthetic", data_dir=tmp_path, download=True)


def test_home_folder_is_expanded(records: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_binary(tmp_path, records)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_dataset("cifar10", data="real", data_dir=Path("~")).location == str(tmp_path)


def write_archive(data_dir: Path, records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the archive to where a download would put it, so that nothing has to be downloaded."""
    data_dir.mkdir(exist_ok=True)
    archive = data_dir / cifar10.ARCHIVE.name
    with tarfile.open(archive, "w:gz") as opened:
        for name, content in python_version(records).items():
            member = tarfile.TarInfo(f"{PYTHON}/{name}")
            member.size = len(content)
            opened.addfile(member, io.BytesIO(content))
    checksum = f"md5:{hashlib.md5(archive.read_bytes()).hexdigest()}"
    monkeypatch.setattr(cifar10, "ARCHIVE", replace(cifar10.ARCHIVE, checksum=checksum))


@pytest.mark.parametrize("damaged", [False, True])
def test_download_gets_what_is_missing_or_damaged(
    damaged: bool, records: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_archive(tmp_path, records, monkeypatch)
    if damaged:
        cut(write_python(tmp_path, records) / "data_batch_1")
    info = find_dataset("cifar10", data="auto", data_dir=tmp_path, download=True)
    assert (info.source, info.layout) == ("real", "python")
    assert open_dataset(info).test.labels.tolist() == records["test_batch"][:, 0].tolist()


def test_download_keeps_complete_data(records: Records, tmp_path: Path) -> None:
    write_binary(tmp_path, records)
    assert find_dataset("cifar10", data="real", data_dir=tmp_path, download=True).layout == "binary"


@pytest.mark.parametrize("data", ["auto", "real"])
def test_download_without_network(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(download, "urlopen", unreachable)
    with pytest.raises(DataError, match=r"could not be downloaded from https.* Name or service not known") as caught:
        find_dataset("cifar10", data=data, data_dir=tmp_path / "new", download=True)  # type: ignore[arg-type]
    check_remedy(str(caught.value), tmp_path / "new")


def test_download_is_the_file_of_torchvision() -> None:
    assert cifar10.ARCHIVE.urls == (CIFAR10.url,)
    assert cifar10.ARCHIVE.name == CIFAR10.filename
    assert cifar10.ARCHIVE.checksum == f"md5:{CIFAR10.tgz_md5}"


def test_download_into_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"could not be downloaded .* a folder that you may write to"):
        cifar10.download(tmp_path / "file" / "below")


# The stand-in


@pytest.mark.parametrize(
    ("info", "digest"),
    [
        (synthetic.info("cifar10"), "9a0453a98258a52700d8e4c0ccfcebaa9e1c79bd0f051ebb32075a6ce4372e99"),
        (synthetic.info("cinic10"), "744a75cfa48229580a71621ac67c9de90c2064772dd154199958d9a09b62276a"),
        (synthetic_texts.info(), "f51f66bd0fe0fb45d66557a6ab5a007e31a35b8cb07d15b32ce96eff8bef24ca"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_stand_in_never_changes(info: DatasetInfo, digest: str) -> None:
    """The fingerprint stands for the bytes: if a digest changes, increase the module's `VERSION`."""
    dataset = open_dataset(info)
    indices = np.arange(0, 7_600, 757) if info.name == "agnews" else np.arange(0, 10_000, 997)
    content = b"".join(split.take(indices)[0].numpy().tobytes() for split in (dataset.train, dataset.test))
    assert info.fingerprint == f"{info.name}-synthetic-1"
    assert hashlib.sha256(content).hexdigest() == digest


def test_stand_in_is_made_block_by_block() -> None:
    train = open_dataset(synthetic.info("cifar10")).train
    indices = np.random.default_rng(0).permutation(len(train))[: train.block + 3]
    images, _ = train.take(indices)
    torch.testing.assert_close(images[-5:], train.take(indices[-5:])[0], rtol=0, atol=0)


def test_stand_in_is_not_made_when_opened() -> None:
    tracemalloc.start()
    try:
        open_dataset(synthetic.info("cifar10"))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 1 << 20 < peak_bytes < 8 << 20, "the noise takes 1 MiB, all samples would take 184"


@pytest.mark.parametrize("name", ["cifar10", "cinic10", "agnews"])
def test_stand_in_has_different_training_and_test_samples(name: str) -> None:
    dataset = open_dataset(SOURCES[name].stand_in.info(name))
    indices = np.arange(1000)
    images = torch.cat([dataset.train.take(indices)[0], dataset.test.take(indices)[0]])
    assert len({image.numpy().tobytes() for image in images}) == 2000


@pytest.mark.parametrize("name", synthetic.STAND_INS)
def test_stand_in_has_the_normalisation_that_is_stated(name: str) -> None:
    info = synthetic.info(name)
    images, _ = open_dataset(info).train.take(np.arange(2000))
    pixels = images.double() / 255
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.tensor(info.mean).double(), rtol=0, atol=0.01)
    torch.testing.assert_close(pixels.std((0, 2, 3)), torch.tensor(info.std).double(), rtol=0, atol=0.01)
    clipped = (images == 0) | (images == 255)
    assert clipped.double().mean() < 0.01


@pytest.mark.parametrize("name", synthetic.STAND_INS)
def test_stand_in_can_be_learned(name: str) -> None:
    """The nearest class mean, fitted on training samples, is far above chance on test samples, and not perfect."""
    dataset = open_dataset(synthetic.info(name))
    images, labels = dataset.train.take(np.arange(2000))
    images = images.double().flatten(1)
    means = torch.stack([images[labels == label].mean(0) for label in range(10)])
    test_images, test_labels = dataset.test.take(np.arange(1000))
    scores = (test_images.double().flatten(1) - images.mean(0)) @ (means - images.mean(0)).T
    accuracy = (scores.argmax(1) == test_labels).double().mean()
    assert 0.5 < accuracy < 0.95


@pytest.mark.parametrize(("name", "sizes"), [("cinic10", (180_000, 90_000)), ("agnews", (120_000, 7_600))])
def test_stand_in_has_the_published_size(name: str, sizes: tuple[int, int]) -> None:
    info = SOURCES[name].stand_in.info(name)
    dataset = open_dataset(info)
    assert (info.num_train, info.num_test) == (len(dataset.train), len(dataset.test)) == sizes
    last, labels = dataset.train.take(np.array([sizes[0] - 1]))
    assert last.any()
    assert labels.tolist() == dataset.train.labels[-1:].tolist() == [info.num_classes - 1]


def test_texts_are_made_of_words_that_reveal_their_class() -> None:
    dataset = open_dataset(synthetic_texts.info())
    texts, labels = dataset.train.take(np.arange(600))
    taken, _ = dataset.train.take(np.array([599, 3]))
    torch.testing.assert_close(taken, texts[[599, 3]], rtol=0, atol=0)
    assert texts.max() == synthetic_texts.LETTERS
    spoken = [bytes(text.tolist()).rstrip(b"\0").split(b"\0") for text in texts]
    assert {len(words) for words in spoken} <= set(range(20, 52))
    assert {len(word) for words in spoken for word in words} == set(range(2, 10))
    training, test = spoken[:400], spoken[400:]
    frequent = [Counter(itertools.chain(*training[label::4])) for label in range(4)]
    guesses = [max(range(4), key=lambda label: sum(frequent[label][word] for word in words)) for words in test]
    assert 0.8 < np.mean(np.array(guesses) == labels[400:].numpy()) < 1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "length"), [("charcnn3", 1014), ("vdcnn9", 1024)])
def test_text_stand_in_teaches_thin_networks(name: str, length: int) -> None:
    dataset = open_dataset(synthetic_texts.info())
    (texts, labels), (test_texts, test_labels) = dataset.train.take(np.arange(500)), dataset.test.take(np.arange(400))
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # dropout has no generator of its own
        model = build_model(name, num_classes=4, width=1 / 16, generator=generator)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        for _ in range(16):
            for batch in torch.randperm(500, generator=generator).split(16):
                optimizer.zero_grad()
                scores = model(texts[batch, :length].long())
                torch.nn.functional.cross_entropy(scores, labels[batch]).backward()
                optimizer.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(test_texts[:, :length].long()).argmax(1) == test_labels).double().mean()
    assert 0.45 < accuracy < 0.98


@pytest.mark.slow
def test_stand_in_teaches_a_thin_network() -> None:
    dataset = open_dataset(synthetic.info("cifar10"))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (dataset.info.mean, dataset.info.std))
    images, labels = dataset.train.take(np.arange(2000))
    test_images, test_labels = dataset.test.take(np.arange(1000))
    images, test_images = ((pixels / 255 - mean) / std for pixels in (images, test_images))
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # dropout has no generator of its own
        model = build_model("vgg11_bn", num_classes=10, width=0.1, generator=generator)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        for _ in range(6):
            for batch in torch.randperm(2000, generator=generator).split(64):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(test_images).argmax(1) == test_labels).double().mean()
    assert 0.4 < accuracy < 0.98


# Shards and windows


@given(st.data())
def test_shards_are_disjoint_equal_and_reproducible(data: st.DataObject) -> None:
    num_shards = data.draw(st.integers(1, 40), "shards")
    num_clients = data.draw(st.integers(1, num_shards), "clients")
    num_samples = data.draw(st.integers(num_shards, 500), "samples")
    seed = data.draw(st.integers(0, 2**32), "seed")
    shards, again = (
        iid_shards(num_samples, num_shards, num_clients, np.random.default_rng(seed), split="training")
        for _ in range(2)
    )
    assert [shard.tolist() for shard in shards] == [shard.tolist() for shard in again]
    assert [shard.size for shard in shards] == [num_samples // num_shards] * num_clients
    assert {shard.dtype for shard in shards} == {np.dtype(np.int64)}
    assigned = np.concatenate(shards)
    assert len(set(assigned.tolist())) == assigned.size
    assert 0 <= assigned.min() <= assigned.max() < num_samples
    permutation = np.random.default_rng(seed).permutation(num_samples)
    assert assigned.tolist() == permutation[: assigned.size].tolist()


def test_shards_depend_on_the_generator_and_not_on_the_clients() -> None:
    few = iid_shards(100, 10, 2, np.random.default_rng(0), split="training")
    many = iid_shards(100, 10, 8, np.random.default_rng(0), split="training")
    other = iid_shards(100, 10, 2, np.random.default_rng(1), split="training")
    assert [shard.tolist() for shard in few] == [shard.tolist() for shard in many[:2]]
    assert few[0].tolist() != other[0].tolist()
    assert few[0].tolist() != sorted(few[0].tolist())


@given(st.data())
def test_skewed_shards_are_disjoint_equal_and_reproducible(data: st.DataObject) -> None:
    """Whatever the proportions, even if the classes that the clients want run out."""
    num_shards = data.draw(st.integers(1, 12), "shards")
    num_clients = data.draw(st.integers(1, num_shards), "clients")
    labels = np.array(data.draw(st.lists(st.integers(0, 4), min_size=num_shards, max_size=200), "labels"))
    alpha = data.draw(st.floats(1e-3, 1e6), "alpha")
    seed = data.draw(st.integers(0, 2**32), "seed")

    def draw() -> tuple[NDArray[np.int64], ...]:
        generator = np.random.default_rng(seed)
        proportions = dirichlet_proportions(np.bincount(labels, minlength=5), num_clients, alpha, generator)
        return skewed_shards(labels, proportions, num_shards, generator, split="training")

    shards = draw()
    assert [shard.tolist() for shard in shards] == [shard.tolist() for shard in draw()]
    assert [shard.size for shard in shards] == [len(labels) // num_shards] * num_clients
    assert {shard.dtype for shard in shards} == {np.dtype(np.int64)}
    assigned = np.concatenate(shards)
    assert len(set(assigned.tolist())) == assigned.size
    assert 0 <= assigned.min() <= assigned.max() < len(labels)


@given(st.integers(0, 2**32), st.sampled_from([0.001, 0.1, 10.0]))
def test_proportions_sum_to_one_and_leave_absent_classes_out(seed: int, alpha: float) -> None:
    proportions = dirichlet_proportions(np.array([30, 0, 10]), 6, alpha, np.random.default_rng(seed))
    assert proportions.shape == (6, 3)
    np.testing.assert_allclose(proportions.sum(axis=1), 1)
    assert (proportions >= 0).all()
    assert (proportions[:, 1] == 0).all()


def test_proportions_have_the_moments_of_their_distribution() -> None:
    """Their mean is the frequency of the class; `alpha` for each class is their variance's usual parameter."""
    counts, alpha = np.array([10, 30, 20]), 0.5
    proportions = dirichlet_proportions(counts, 100_000, alpha, np.random.default_rng(0))
    mean = counts / counts.sum()
    np.testing.assert_allclose(proportions.mean(axis=0), mean, atol=0.01)
    np.testing.assert_allclose(proportions.var(axis=0), mean * (1 - mean) / (alpha * 3 + 1), rtol=0.02)


def test_skewed_shards_follow_the_proportions_and_are_shuffled() -> None:
    labels = np.repeat(np.arange(3), 10_000)
    proportions = np.array([[0.7, 0.3, 0.0], [0.0, 0.1, 0.9]])
    shards = skewed_shards(labels, proportions, 10, np.random.default_rng(0), split="training")
    for shard, expected in zip(shards, proportions, strict=True):
        drawn = labels[shard]
        np.testing.assert_allclose(np.bincount(drawn, minlength=3) / len(shard), expected, atol=0.03)
        halves = (np.bincount(half, minlength=3) / len(half) for half in (drawn[:1500], drawn[1500:]))
        for half in halves:
            np.testing.assert_allclose(half, expected, atol=0.05)


def test_the_draws_of_skewed_shards_are_those_of_the_records() -> None:
    """Other draws from the same seed would change results under unchanged run ids."""
    generator, labels = np.random.default_rng(0), np.repeat([0, 1, 2], [30, 20, 10])
    proportions = dirichlet_proportions(np.bincount(labels), 2, 0.5, generator)
    np.testing.assert_allclose(proportions, [[0.615, 0.0014, 0.3836], [0.4169, 0.1875, 0.3957]], atol=5e-5)
    shards = skewed_shards(labels, proportions, 10, generator, split="test")
    assert [shard.tolist() for shard in shards] == [[22, 56, 4, 50, 21, 20], [52, 54, 55, 13, 2, 53]]


def test_a_class_that_runs_out_is_replaced_by_the_clients_other_classes() -> None:
    labels = np.array([0] * 3 + [1] * 20 + [2] * 20)
    shards = skewed_shards(labels, np.array([[0.9, 0.1, 0.0]]), 2, np.random.default_rng(0), split="test")
    assert np.bincount(labels[shards[0]], minlength=3).tolist() == [3, 18, 0]
    only_first = skewed_shards(labels, np.array([[1.0, 0.0, 0.0]]), 2, np.random.default_rng(0), split="test")
    assert np.bincount(labels[only_first[0]], minlength=3)[0] == 3
    assert len(only_first[0]) == 21


def test_no_client_always_draws_last() -> None:
    """Two clients want the same class, which is enough for one: over the seeds, both get it equally often."""
    labels = np.repeat([0, 1], 50)
    wanted = np.array([[1.0, 0.0], [1.0, 0.0]])
    served = [
        int(labels[skewed_shards(labels, wanted, 2, np.random.default_rng(seed), split="test")[0]].max() == 0)
        for seed in range(200)
    ]
    assert 70 < sum(served) < 130


def test_too_many_shards() -> None:
    with pytest.raises(DataError, match="num_shards is 20, but there are only 19 test samples; ask for at most 19"):
        iid_shards(19, 20, 8, np.random.default_rng(0), split="test")
    with pytest.raises(ConfigError, match="num_shards is 7, fewer than the 8 clients"):
        iid_shards(100, 7, 8, np.random.default_rng(0), split="test")
    with pytest.raises(DataError, match="num_shards is 20, but there are only 19 training samples"):
        skewed_shards(np.zeros(19, np.int64), np.ones((8, 1)), 20, np.random.default_rng(0), split="training")


@given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 100))
def test_windows_cover_the_shard_and_wrap(windows_per_shard: int, length: int, first_round: int) -> None:
    shard = np.random.default_rng(length).permutation(windows_per_shard * length) + 7
    rounds = [window(shard, first_round + step, windows_per_shard) for step in range(windows_per_shard + 1)]
    assert {part.size for part in rounds} == {length}
    assert sorted(np.concatenate(rounds[:-1]).tolist()) == sorted(shard.tolist())
    assert rounds[-1].tolist() == rounds[0].tolist()
    assert window(shard, 0, windows_per_shard).tolist() == shard[:length].tolist()


@given(st.integers(1, 12), st.integers(1, 60), st.integers(0, 100))
def test_windows_go_round_a_shard_that_does_not_divide(windows_per_shard: int, size: int, first_round: int) -> None:
    """Concatenated, the windows of all rounds repeat the shard over and over: a window may wrap around its end."""
    size = max(size, windows_per_shard)
    shard = np.arange(size) + 7
    length = size // windows_per_shard
    windows = np.concatenate([window(shard, round_index, windows_per_shard) for round_index in range(first_round + 2)])
    assert windows.tolist() == list(itertools.islice(itertools.cycle(shard.tolist()), (first_round + 2) * length))


def test_window_in_the_middle_of_a_wrap() -> None:
    assert window(np.arange(10, 15), 2, 2).tolist() == [14, 10]


def test_empty_window() -> None:
    with pytest.raises(ConfigError, match=r"windows_per_shard is 10, but a shard has only 9 samples.* at most 9"):
        window(np.arange(9), 0, 10)
