"""AG News from small files written here, and from the real files."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
from caches import assert_same_from_every_cache
from hypothesis import given
from hypothesis import strategies as st

from flexifed.config import TEXT_LENGTHS
from flexifed.data import DatasetInfo, agnews, find_dataset, make_pipeline, open_dataset
from flexifed.data.cache import FOLDER as CACHE
from flexifed.errors import DataError, FlexifedWarning

ROWS = ('"3","Oil Prices","A ""barrel"" of\\noil, \\$47"', '"1","Talks","über"', '"2","Win","0-1"', '"4","",""')
TRAIN = "".join(f"{row}\n" for row in ROWS * 2)
TEST = "".join(f"{row}\n" for row in ROWS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight training and four test texts."""
    folder = tmp_path / "ag_news_csv"
    folder.mkdir()
    (folder / "train.csv").write_text(TRAIN)
    (folder / "test.csv").write_text(TEST)
    return folder


def find_partial(data_dir: Path) -> DatasetInfo:
    """The description of an incomplete set."""
    with pytest.warns(FlexifedWarning, match="is not the complete published set"):
        return find_dataset("agnews", data="real", data_dir=data_dir)


def publish(monkeypatch: pytest.MonkeyPatch, train: str = TRAIN, test: str = TEST) -> None:
    """Make the loader accept these files as the published ones."""
    files = {
        split: replace(agnews.FILES[split], checksum=f"md5:{hashlib.md5(content.encode()).hexdigest()}")
        for split, content in (("train", train), ("test", test))
    }
    monkeypatch.setattr(agnews, "FILES", MappingProxyType(files))
    monkeypatch.setattr(agnews, "PUBLISHED", {"train": train.count("\n"), "test": test.count("\n")})


def decoded(text: torch.Tensor) -> str:
    """Decode a text from its indices. `_` stands for 0: the texts of these tests contain no underscore."""
    return "".join("_" if index == 0 else agnews.ALPHABET[index - 1] for index in text.tolist())


# The encoding


def test_alphabet_is_the_papers_without_its_second_hyphen() -> None:
    letters, digits = "abcdefghijklmnopqrstuvwxyz", "0123456789"
    punctuation = "-,;.!?:'\"/\\|_@#$%^&*~`+-=<>()[]{}"
    assert len(letters + digits + punctuation) + 1 == 70, "the newline is the last one"
    assert "".join(dict.fromkeys(letters + digits + punctuation)) + "\n" == agnews.ALPHABET
    assert len(agnews.ALPHABET) == 69


def test_encoding_equals_one_computed_by_hand() -> None:
    encoded = agnews.encode('Zoë\'s "1-0"', "a\\nB \\$5\t}")
    assert len(encoded) == agnews.LENGTH == 1024
    z_o, s, quoted = [26, 15, 0, 44, 19], [0], [45, 28, 37, 27, 45]
    assert list(encoded[:21]) == [*z_o, *s, *quoted, 0, 1, 69, 2, 0, 47, 52, 32, 0, 68]
    assert not any(encoded[21:])


@given(st.text(max_size=1200), st.text(max_size=1200))
def test_every_text_is_encoded_character_by_character(title: str, description: str) -> None:
    text = f"{title} {description}".replace("\\n", "\n").lower()
    expected = [agnews.ALPHABET.find(char) + 1 for char in text[:1024]]
    assert list(agnews.encode(title, description)) == expected + [0] * (1024 - len(expected))


# Files


def test_texts_are_read_in_their_order(folder: Path) -> None:
    info = find_partial(folder.parent)
    assert (info.source, info.layout, info.num_train, info.num_test) == ("real-partial", "csv", 8, 4)
    assert (info.num_classes, info.in_channels, info.mean, info.std) == (4, None, (), ())
    dataset = open_dataset(info)
    texts, labels = dataset.test.take(np.arange(4))
    assert labels.tolist() == [2, 0, 1, 3] == dataset.test.labels.tolist()
    assert (texts.dtype, texts.shape) == (torch.uint8, (4, 1024))
    assert [decoded(text).rstrip("_") for text in texts] == [
        'oil_prices_a_"barrel"_of\noil,_\\$47',
        "talks__ber",
        "win_0-1",
        "",
    ]
    assert dataset.train.labels.tolist() == [2, 0, 1, 3] * 2


@pytest.mark.parametrize("family", ["charcnn", "vdcnn"])
def test_families_read_their_own_length(family: str, folder: Path) -> None:
    (folder / "test.csv").write_text('"1","' + "a" * 2000 + '","b"\n')
    dataset = open_dataset(find_partial(folder.parent))
    pipeline = make_pipeline(dataset, family, device=torch.device("cpu"), channels_last=False)  # type: ignore[arg-type]
    texts = pipeline.prepare(dataset.test.take(np.array([0]))[0])
    assert texts.dtype == torch.int64
    assert texts.tolist() == [[1] * TEXT_LENGTHS[family]]


def test_complete_set_is_real(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(monkeypatch)
    assert find_dataset("agnews", data="real", data_dir=folder.parent).source == "real"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (TEST.replace("Win", "Won"), r"test\.csv has the MD5 \w+, but the published file has \w+"),
        (ROWS[0], r"test\.csv holds 1 of 4 texts"),
    ],
)
def test_an_incomplete_set_is_marked(content: str, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(monkeypatch)
    (folder / "test.csv").write_text(content)
    with pytest.warns(FlexifedWarning, match=message):
        assert find_dataset("agnews", data="auto", data_dir=folder.parent).source == "real-partial"


def test_a_folder_without_the_set_gives_none(tmp_path: Path) -> None:
    assert agnews.find(tmp_path) is None
    with pytest.raises(DataError, match=r"agnews: no real data .* --download \(31.3 MB\)"):
        find_dataset("agnews", data="real", data_dir=tmp_path)


def test_same_arrays_from_warm_cold_and_deleted_caches(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_same_from_every_cache(lambda: find_partial(folder.parent), folder.parent)
    assert capsys.readouterr().err.count("encoding the texts") == 3


def test_fingerprint_never_changes(folder: Path) -> None:
    """Run ids contain it: a code change that changes it loses all runs."""
    assert (
        find_partial(folder.parent).fingerprint
        == "agnews-ca6e28303cf1a8e88bc4f21ef9c621154a9869b50333b3ec45a1e7918e415d23"
    )


def test_changed_source_is_encoded_again(folder: Path) -> None:
    before = find_partial(folder.parent)
    (folder / "test.csv").write_text(TEST + '"2","Again",""\n')
    after = find_partial(folder.parent)
    assert (before.num_test, after.num_test) == (4, 5)
    assert before.fingerprint != after.fingerprint
    with pytest.raises(DataError, match=r"was verified when the run began .* holds different samples now"):
        open_dataset(before)


def write_lines(*lines: str) -> Callable[[Path], None]:
    return lambda file: file.write_bytes("".join(f"{line}\n" for line in lines).encode()) and None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (write_lines(*ROWS, '"5","title","description"'), r"train\.csv, line 5 has the class '5'"),
        (write_lines("Class Index,Title,Description", *ROWS), r"train\.csv, line 1 has the class 'Class Index'"),
        (
            write_lines(*ROWS, '"1","title, description"'),
            r"train\.csv, line 5 has 2 columns\. Each line must hold a class",
        ),
        (write_lines(*ROWS, "", ROWS[0]), r"train\.csv, line 5 has 0 columns"),
        (write_lines('"1","two\nlines","are one row"', '"1"'), r"train\.csv, line 3 has 1 columns"),
        (write_lines(*ROWS, '"1","a","never ends', ROWS[0], '"2","b","c'), r"train\.csv, line 5 can't be read as CSV"),
        (write_lines(*ROWS, '"1","a","b"c'), r"train\.csv, line 5 can't be read as CSV"),
        (
            write_lines(*ROWS, '"1","a","' + "x" * 200_000 + '"'),
            r"line 5 can't be read as CSV \(field larger than field",
        ),
        (lambda file: file.write_bytes(b'"1","a","b"\n"1","\xe9","b"\n'), r"train\.csv, line 2 is not UTF-8"),
        (lambda file: file.write_bytes(b""), r"train\.csv holds no texts"),
        (lambda file: file.write_bytes(b"\x89PNG\r\n\x1a\n"), r"train\.csv, line 1 is not UTF-8"),
        (lambda file: file.unlink(), r"train\.csv is missing\. .*\"3\",\"Title\",\"Description\""),
        (lambda file: (file.unlink(), file.mkdir()), r"train\.csv can't be read \(Is a directory\)"),
    ],
)
@pytest.mark.parametrize("data", ["auto", "real"])
def test_damage_is_an_error_with_file_and_line(
    damage: Callable[[Path], object], message: str, data: str, folder: Path
) -> None:
    damage(folder / "train.csv")
    with pytest.raises(DataError, match=message) as caught:
        find_dataset("agnews", data=data, data_dir=folder.parent)  # type: ignore[arg-type]
    assert str(folder / "train.csv") in str(caught.value)
    assert not list((folder.parent / CACHE).glob("*/*/")), "no unfinished build is left"


# The real files


@pytest.fixture(scope="module")
def real(data_dir: Path) -> Path:
    if not (data_dir / "ag_news_csv").is_dir():
        pytest.skip(f"no ag_news_csv in {data_dir}")
    return data_dir / "ag_news_csv"


def test_real_texts(real: Path, tmp_path: Path) -> None:
    (tmp_path / "ag_news_csv").symlink_to(real.absolute())
    train_lines = (real / "train.csv").read_bytes().count(b"\n")
    if train_lines == agnews.PUBLISHED["train"]:
        info = find_dataset("agnews", data="real", data_dir=tmp_path)
    else:
        info = find_partial(tmp_path)
    assert info.source == ("real" if train_lines == agnews.PUBLISHED["train"] else "real-partial")
    assert (info.num_train, info.num_test) == (train_lines, 7_600)
    dataset = open_dataset(info)
    assert np.bincount(dataset.test.labels).tolist() == [1_900] * 4
    texts, labels = dataset.test.take(np.array([0]))
    start = (
        "fears_for_t_n_pension_after_talks_unions_representing_workers_at_turner___newall_say_they_are_'disappointed'_"
    )
    assert decoded(texts[0]).startswith(start)
    assert agnews.CLASSES[int(labels[0])] == "Business"
    checksum = hashlib.md5((real / "test.csv").read_bytes()).hexdigest()
    assert agnews.FILES["test"].checksum == f"md5:{checksum}"
    assert agnews.FILES["test"].num_bytes == (real / "test.csv").stat().st_size


@pytest.fixture(scope="module")
def head(real: Path) -> bytes:
    """The first rows of the real test file."""
    with open(real / "test.csv", "rb") as file:
        return b"".join(file.readline() for _ in range(30))


@given(
    places=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=8),
    values=st.binary(min_size=8, max_size=8),
    kind=st.sampled_from(["bytes", "cut", "insert"]),
)
def test_changed_bytes_are_an_error_or_rows(places: list[float], values: bytes, kind: str, head: bytes) -> None:
    """Rows read from a changed file are those that another CSV reader finds, and each has a class."""
    changed = bytearray(head)
    at = int(places[0] * len(head))
    if kind == "cut":
        del changed[at:]
    elif kind == "insert":
        changed[at:at] = values
    else:
        for place, value in zip(places, values, strict=False):
            changed[int(place * len(head))] = value
    with contextlib.suppress(DataError):
        rows = list(agnews.read_rows(bytes(changed), Path("test.csv")))
        expected = list(csv.reader(io.StringIO(bytes(changed).decode(), newline="")))
        assert [[str(label + 1), *texts] for label, *texts in rows] == expected
        assert all(len(agnews.encode(title, description)) == 1024 for _, title, description in rows)
