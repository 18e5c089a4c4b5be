"""CINIC-10 from small folders of PNGs, written here or copied from the real ones."""

from __future__ import annotations

import contextlib
import io
import itertools
import multiprocessing
import shutil
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from caches import assert_same_from_every_cache
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from serving import Server

from flexifed.data import DatasetInfo, cinic10, find_dataset, open_dataset
from flexifed.data.cache import FOLDER as CACHE
from flexifed.errors import DataError, FlexifedWarning

CLASSES = cinic10.CLASSES


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set with two images of random pixels for each class in each split."""
    generator = np.random.default_rng(0)
    for split, name, index in itertools.product(cinic10.SPLITS, CLASSES, range(2)):
        image = Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        path = tmp_path / "cinic10" / split / name / f"image-{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return tmp_path / "cinic10"


def find_partial(data_dir: Path) -> DatasetInfo:
    """The description of an incomplete set."""
    with pytest.warns(FlexifedWarning, match="is not the complete published set"):
        return find_dataset("cinic10", data="real", data_dir=data_dir)


def pixels(path: Path) -> NDArray[np.uint8]:
    """Decode a file with another library, shape (3, 32, 32)."""
    return np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1)


def test_images_are_in_order_of_split_class_and_name(folder: Path) -> None:
    info = find_partial(folder.parent)
    assert (info.source, info.layout, info.num_train, info.num_test) == ("real-partial", "png", 40, 20)
    dataset = open_dataset(info)
    for split, parts in ((dataset.train, ("train", "valid")), (dataset.test, ("test",))):
        files = [
            folder / part / name / f"image-{index}.png" for part in parts for name in CLASSES for index in range(2)
        ]
        images, labels = split.take(np.arange(len(split)))
        np.testing.assert_array_equal(images.numpy(), [pixels(file) for file in files])
        assert labels.tolist() == [CLASSES.index(file.parent.name) for file in files] == split.labels.tolist()


def test_an_incomplete_set_is_marked_and_counted(folder: Path) -> None:
    with pytest.warns(FlexifedWarning) as caught:
        find_dataset("cinic10", data="auto", data_dir=folder.parent)
    (warning,) = caught
    assert "train 20 of 90,000, valid 20 of 90,000, test 20 of 90,000 images" in str(warning.message)


def test_complete_set_is_real(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cinic10, "PUBLISHED_PER_CLASS", 2)
    assert find_dataset("cinic10", data="real", data_dir=folder.parent).source == "real"
    (folder / "valid" / "frog" / "image-1.png").rename(folder / "valid" / "cat" / "image-2.png")
    with pytest.warns(FlexifedWarning):
        assert find_dataset("cinic10", data="real", data_dir=folder.parent).source == "real-partial"


def test_folder_as_the_publisher_names_it(folder: Path) -> None:
    expected = find_partial(folder.parent)
    folder.rename(folder.with_name("CINIC-10"))
    assert find_partial(folder.parent) == expected


def test_a_folder_without_the_set_gives_none(tmp_path: Path) -> None:
    assert cinic10.find(tmp_path) is None
    with pytest.raises(DataError, match=r"cinic10: no real data .* --download \(687.5 MB\)"):
        find_dataset("cinic10", data="real", data_dir=tmp_path)


def test_grey_images_are_decoded_and_hidden_files_skipped(folder: Path) -> None:
    grey = folder / "train" / "cat" / "image-0.png"
    Image.open(grey).convert("L").save(grey)
    (folder / "train" / "cat" / ".DS_Store").touch()
    images, _ = open_dataset(find_partial(folder.parent)).train.take(np.array([6]))
    np.testing.assert_array_equal(images[0].numpy(), pixels(grey))
    assert (images[0, 0] == images[0, 1]).all()


def test_same_arrays_from_warm_cold_and_deleted_caches(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_same_from_every_cache(lambda: find_partial(folder.parent), folder.parent)
    assert capsys.readouterr().err.count("decoding 60 images") == 3


def test_fingerprint_never_changes(tmp_path: Path) -> None:
    """Run ids contain it: a code change that changes it loses all runs."""
    for number, (split, name) in enumerate(itertools.product(cinic10.SPLITS, CLASSES)):
        path = tmp_path / "cinic10" / split / name / "image.png"
        path.parent.mkdir(parents=True)
        values = np.arange(3 * 32 * 32) * (2 * number + 1) % 256
        Image.fromarray(values.astype(np.uint8).reshape(32, 32, 3)).save(path)
    assert (
        find_partial(tmp_path).fingerprint == "cinic10-59e1fe36221a3e6b965163950c461dedbbfd379abf7a87a6385696ac392069e9"
    )


@pytest.mark.parametrize("on_a_terminal", [False, True])
def test_decoding_shows_a_bar_on_a_terminal(
    on_a_terminal: bool, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR" if on_a_terminal else "NO_COLOR", "1")
    find_partial(folder.parent)
    output = capsys.readouterr().err
    assert ("60/60" in output) == on_a_terminal
    if not on_a_terminal:
        assert [line.partition(" in ")[0] for line in output.splitlines()] == [
            "cinic10: decoding 60 images",
            "cinic10: decoded",
        ]


def test_changed_source_is_decoded_again(folder: Path) -> None:
    before = find_partial(folder.parent)
    shutil.copy(folder / "test" / "cat" / "image-0.png", folder / "test" / "dog" / "image-0.png")
    after = find_partial(folder.parent)
    assert before.fingerprint != after.fingerprint
    images, _ = open_dataset(after).test.take(np.array([6, 10]))
    assert (images[0] == images[1]).all()
    with pytest.raises(DataError, match=r"was verified when the run began .* holds different samples now"):
        open_dataset(before)


def test_source_that_is_deleted_after_it_was_found(folder: Path) -> None:
    info = find_partial(folder.parent)
    shutil.rmtree(folder)
    assert len(open_dataset(info).train) == 40, "the cache suffices"
    shutil.rmtree(folder.parent / CACHE)
    with pytest.raises(DataError, match=r"cinic10/train is missing"):
        open_dataset(info)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def not_a_png(path: Path) -> None:
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(path, format="JPEG")


def too_large(path: Path) -> None:
    Image.fromarray(np.zeros((64, 32, 3), np.uint8)).save(path)


def claim_huge_size(path: Path) -> None:
    """Write a header that declares 2 GB of pixels, with a correct checksum."""
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 30_000, 30_000)
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)


def sixteen_bits(path: Path) -> None:
    Image.fromarray(np.zeros((32, 32), np.uint16)).save(path)


def flip_pixel(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def rename_class(path: Path) -> None:
    path.parent.rename(path.parent.with_name("whale"))


def add_class(path: Path) -> None:
    shutil.copytree(path.parent, path.parent.with_name("whale"))


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"bird/image-1\.png is damaged: .* CINIC-10 holds PNGs of 32x32 pixels"),
        (flip_pixel, r"bird/image-1\.png is damaged"),
        (lambda path: path.write_bytes(b""), r"bird/image-1\.png is not a PNG"),
        (not_a_png, r"bird/image-1\.png is not a PNG"),
        (too_large, r"bird/image-1\.png has 32x64 pixels; CINIC-10 holds PNGs of 32x32"),
        (claim_huge_size, r"bird/image-1\.png has 30000x30000 pixels"),
        (sixteen_bits, r"bird/image-1\.png has 16 bits per channel"),
        (make_folder, r"bird/image-1\.png can't be read \(Is a directory\)"),
        (lambda path: shutil.copy(__file__, path.with_name("notes.txt")), r"bird/notes\.txt is not a PNG"),
        (rename_class, r"valid/bird is missing\. .* a folder of PNGs for each of airplane, .*truck"),
        (add_class, r"valid/whale is not a class of CINIC-10\. .*for each of airplane"),
        (lambda path: shutil.rmtree(path.parent), r"valid/bird is missing"),
        (
            lambda path: shutil.rmtree(path.parents[1]),
            r"cinic10/valid is missing\. .*must hold train, valid and test",
        ),
        (lambda path: [file.unlink() for file in path.parent.iterdir()], r"valid/bird holds no images"),
    ],
)
@pytest.mark.parametrize("data", ["auto", "real"])
def test_damage_is_an_error_with_the_files_name(
    damage: Callable[[Path], object], message: str, data: str, folder: Path
) -> None:
    damage(folder / "valid" / "bird" / "image-1.png")
    with pytest.raises(DataError, match=message) as caught:
        find_dataset("cinic10", data=data, data_dir=folder.parent)  # type: ignore[arg-type]
    assert str(folder) in str(caught.value)
    assert not list((folder.parent / CACHE).glob("*/*/")), "no unfinished build is left"


def test_download_replaces_an_incomplete_set(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cinic10, "PUBLISHED_PER_CLASS", 2)
    archive = shutil.make_archive(str(folder.parent / "made"), "gztar", folder)
    shutil.rmtree(folder / "train" / "bird")
    (folder / "train" / "bird").mkdir()
    shutil.copy(folder / "train" / "cat" / "image-0.png", folder / "train" / "bird")
    monkeypatch.setattr(cinic10, "fetch", lambda file, into: Path(archive))
    info = find_dataset("cinic10", data="real", data_dir=folder.parent, download=True)
    assert (info.source, info.num_train) == ("real", 40)
    assert len(list((folder.parent / "cinic10.old" / "train" / "bird").iterdir())) == 1


class QueueWriter(io.TextIOBase):
    """A text stream that puts everything written to it into a queue."""

    def __init__(self, texts: Any) -> None:
        self.texts = texts

    def write(self, text: str) -> int:
        self.texts.put(text)
        return len(text)


def download_and_report(data_dir: Path, output: Any, results: Any) -> None:
    sys.stderr = QueueWriter(output)  # type: ignore[assignment]
    results.put(find_dataset("cinic10", data="real", data_dir=data_dir, download=True))


@pytest.mark.timeout(120)
def test_two_processes_that_download_at_once_take_turns(
    folder: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cinic10, "PUBLISHED_PER_CLASS", 2)
    server.content = Path(shutil.make_archive(str(tmp_path / "made"), "gztar", folder)).read_bytes()
    monkeypatch.setattr(cinic10, "ARCHIVE", server.file(content=server.content))
    server.may_answer.clear()
    forked = multiprocessing.get_context("fork")
    results, data_dir, processes = forked.Queue(), tmp_path / "new", []
    for message in ("downloading set.tar.gz", f"waiting for another process that downloads into {data_dir}"):
        output = forked.Queue()
        processes.append(forked.Process(target=download_and_report, args=(data_dir, output, results)))
        processes[-1].start()
        assert output.get(timeout=60).startswith(message)
    server.may_answer.set()
    infos = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert infos[0] == infos[1]
    assert infos[0].source == "real"
    assert server.requested_ranges == [None], "the second process downloads nothing"
    assert {path.name for path in data_dir.iterdir() if path.name[0] != "."} == {"set.tar.gz", "cinic10"}


# The real files


@pytest.fixture(scope="module")
def real(data_dir: Path) -> Path:
    if not (data_dir / "cinic10").is_dir():
        pytest.skip(f"no cinic10 in {data_dir}")
    return data_dir / "cinic10"


def test_real_images(real: Path, tmp_path: Path) -> None:
    (tmp_path / "cinic10").symlink_to(real.absolute())
    with pytest.warns(FlexifedWarning):
        info = find_dataset("cinic10", data="real", data_dir=tmp_path)
    dataset = open_dataset(info)
    counts = {split: [len(list((real / split / name).iterdir())) for name in CLASSES] for split in cinic10.SPLITS}
    assert np.bincount(dataset.train.labels).tolist() == np.add(counts["train"], counts["valid"]).tolist()
    assert np.bincount(dataset.test.labels).tolist() == counts["test"]
    last_training_truck = sorted((real / "train" / "truck").iterdir())[-1]
    first_test_bird = sorted((real / "test" / "bird").iterdir())[0]
    images, labels = dataset.train.take(np.array([sum(counts["train"]) - 1]))
    np.testing.assert_array_equal(images[0].numpy(), pixels(last_training_truck))
    assert CLASSES[int(labels[0])] == "truck"
    images, labels = dataset.test.take(np.array([sum(counts["test"][:2])]))
    np.testing.assert_array_equal(images[0].numpy(), pixels(first_test_bird))
    assert CLASSES[int(labels[0])] == "bird"


def test_real_pixels_have_the_normalisation_that_is_stated(real: Path, tmp_path: Path) -> None:
    (tmp_path / "cinic10").symlink_to(real.absolute())
    info = find_partial(tmp_path)
    images, _ = open_dataset(info).train.take(np.arange(info.num_train))
    values = images.double().numpy() / 255
    np.testing.assert_allclose(values.mean((0, 2, 3)), info.mean, atol=0.02)
    np.testing.assert_allclose(values.std((0, 2, 3)), info.std, atol=0.02)


@pytest.fixture(scope="module")
def real_files(real: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((real / "test").glob("*/*.png"))[::50]]


@st.composite
def changes(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    kind = draw(st.sampled_from(["cut", "bytes", "header", "insert"]))
    places = draw(st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=8))
    values = draw(st.binary(min_size=8, max_size=8))

    def change(content: bytes) -> bytes:
        if kind == "cut":
            return content[: int(places[0] * len(content))]
        if kind == "insert":
            at = int(places[0] * len(content))
            return content[:at] + values + content[at:]
        changed = bytearray(content)
        for place, value in zip(places, values[: len(places)], strict=True):
            changed[24 + int(place * 5) if kind == "header" else int(place * len(content))] = value
        if kind == "header":
            changed[29:33] = zlib.crc32(changed[12:29]).to_bytes(4, "big")
        return bytes(changed)

    return change


@given(change=changes(), file_index=st.integers(0, 1000))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_changed_bytes_are_an_error_or_change_nothing(
    change: Callable[[bytes], bytes], file_index: int, real_files: list[bytes], tmp_path: Path
) -> None:
    content = real_files[file_index % len(real_files)]
    file = tmp_path / "image.png"
    file.write_bytes(content)
    expected = cinic10.decode_image(str(file))
    file.write_bytes(change(content))
    with contextlib.suppress(DataError):
        np.testing.assert_array_equal(cinic10.decode_image(str(file)), expected)


def test_several_chunks_of_files_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are more files than a thread decodes at a time."""
    monkeypatch.setattr(cinic10, "CHUNK", 4)
    generator = np.random.default_rng(1)
    expected = generator.integers(0, 256, (11, 3, 32, 32), dtype=np.uint8)
    files = [str(tmp_path / f"{index}.png") for index in range(11)]
    for file, image in zip(files, expected, strict=True):
        Image.fromarray(image.transpose(1, 2, 0)).save(file)
    images = np.zeros_like(expected)
    decoded: list[int] = []
    cinic10.decode_files(files, images, decoded.append)
    assert decoded == [4, 4, 3]
    np.testing.assert_array_equal(images, expected)
