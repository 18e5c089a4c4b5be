"""The array cache: built once even if the builder dies, and never used if it was damaged."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexifed.data.cache import FOLDER, MANIFEST, CachedArrays, cached_arrays, reopen, source_key
from flexifed.errors import DataError

ARRAYS = {
    "samples": np.random.default_rng(0).integers(0, 256, (50, 3, 4), dtype=np.uint8),
    "labels": np.arange(50, dtype=np.int64),
}


class Builder:
    """Builds `arrays` and counts the builds."""

    def __init__(self, arrays: Mapping[str, Any] = ARRAYS) -> None:
        self.arrays = arrays
        self.calls = 0

    def __call__(self, folder: Path) -> dict[str, object]:
        self.calls += 1
        for name, array in self.arrays.items():
            np.save(folder / f"{name}.npy", array)
        return {"num_classes": 50}


@pytest.fixture
def builder() -> Builder:
    return Builder()


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def folder(data_dir: Path) -> Path:
    """The folder of the data set `set` in the cache."""
    return data_dir / FOLDER / "set"


def opened(data_dir: Path, builder: Any, *, name: str = "set", version: int = 1, key: str = "source") -> CachedArrays:
    return cached_arrays(data_dir, name=name, version=version, source_key=key, build=builder)


def assert_holds(cached: CachedArrays, arrays: Mapping[str, Any]) -> None:
    for name, expected in arrays.items():
        assert cached.array(name).dtype == expected.dtype
        np.testing.assert_array_equal(cached.array(name), expected)


def built(folder: Path) -> Path:
    (arrays,) = folder.glob("set-*")
    return arrays


def test_arrays_are_built_once_and_mapped(data_dir: Path, folder: Path, builder: Builder) -> None:
    first, second = opened(data_dir, builder), opened(data_dir, builder)
    assert builder.calls == 1
    assert first.fingerprint == second.fingerprint
    assert dict(second.facts) == {"num_classes": 50}
    assert_holds(first, ARRAYS)
    assert_holds(second, ARRAYS)
    assert isinstance(second.array("samples"), np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        second.array("samples")[0] = 0
    with pytest.raises(KeyError):
        second.array("other")
    assert {path.name for path in folder.iterdir()} == {"lock", built(folder).name}


def test_fingerprint_depends_on_the_contents_only(data_dir: Path, tmp_path: Path, builder: Builder) -> None:
    fingerprints = {
        opened(data_dir, builder).fingerprint,
        opened(tmp_path / "elsewhere", builder).fingerprint,
        opened(data_dir, builder, key="other source").fingerprint,
        opened(data_dir, builder, name="other", version=2).fingerprint,
    }
    assert len(fingerprints) == 1
    changes: list[Mapping[str, Any]] = [
        {**ARRAYS, "labels": ARRAYS["labels"][::-1]},
        {**ARRAYS, "labels": ARRAYS["labels"].view(np.uint64)},
        {**ARRAYS, "samples": ARRAYS["samples"].reshape(50, 4, 3)},
        {"samples": ARRAYS["labels"], "labels": ARRAYS["samples"]},
        {"samples": ARRAYS["samples"]},
    ]
    for index, arrays in enumerate(changes):
        fingerprints.add(opened(tmp_path / str(index), Builder(arrays)).fingerprint)
    assert len(fingerprints) == 1 + len(changes)


@pytest.mark.parametrize("change", [{"version": 2}, {"key": "changed"}])
def test_another_source_or_version_is_built_and_the_old_one_deleted(
    data_dir: Path, folder: Path, change: dict[str, Any]
) -> None:
    opened(data_dir, Builder())
    old = built(folder)
    new_builder = Builder({"samples": np.zeros(3)})
    assert_holds(opened(data_dir, new_builder, **change), new_builder.arrays)
    assert new_builder.calls == 1
    assert not old.exists()
    assert_holds(opened(data_dir, new_builder, **change), new_builder.arrays)
    assert new_builder.calls == 1


def test_names_share_a_data_folder(data_dir: Path) -> None:
    first, second = Builder(), Builder({"samples": np.zeros(3)})
    for _ in range(2):
        assert_holds(opened(data_dir, first, name="set-v1"), first.arrays)
        assert_holds(opened(data_dir, second, name="set-v2"), second.arrays)
    assert (first.calls, second.calls) == (1, 1)


def test_mapped_arrays_outlive_their_files(data_dir: Path, folder: Path, builder: Builder) -> None:
    cached = opened(data_dir, builder)
    shutil.rmtree(folder)
    assert_holds(cached, ARRAYS)
    again = opened(data_dir, builder)
    assert builder.calls == 2
    assert again.fingerprint == cached.fingerprint


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def break_header(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content.replace(b")", b" ", 1))


def change_a_fact(file: Path) -> None:
    file.write_text(file.read_text().replace('"num_classes": 50', '"num_classes": 51'))


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("samples.npy", cut),
        ("samples.npy", flip),
        ("samples.npy", break_header),
        ("labels.npy", Path.unlink),
        (MANIFEST, cut),
        (MANIFEST, change_a_fact),
        (MANIFEST, Path.unlink),
    ],
)
def test_damaged_arrays_are_built_again(data_dir: Path, folder: Path, builder: Builder, file: str, damage: Any) -> None:
    fingerprint = opened(data_dir, builder).fingerprint
    damage(built(folder) / file)
    cached = opened(data_dir, builder)
    assert builder.calls == 2
    assert cached.fingerprint == fingerprint
    assert dict(cached.facts) == {"num_classes": 50}
    assert_holds(cached, ARRAYS)


def test_touched_files_are_used_if_their_contents_are_unchanged(data_dir: Path, folder: Path, builder: Builder) -> None:
    opened(data_dir, builder)
    os.utime(built(folder) / "samples.npy", ns=(0, 0))
    assert_holds(opened(data_dir, builder), ARRAYS)
    assert builder.calls == 1


def test_opening_reads_no_contents(data_dir: Path, folder: Path, builder: Builder) -> None:
    """A changed byte goes unnoticed if the file's time is unchanged: starting a run must not hash gigabytes."""
    opened(data_dir, builder)
    file = built(folder) / "samples.npy"
    stat = file.stat()
    flip(file)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert opened(data_dir, builder).array("samples")[-1, -1, -1] == ARRAYS["samples"][-1, -1, -1] ^ 1
    assert builder.calls == 1


def test_known_contents_are_opened_without_their_source(data_dir: Path) -> None:
    fingerprint = opened(data_dir, Builder()).fingerprint

    def fail() -> CachedArrays:
        pytest.fail("the cached arrays were not found")

    assert_holds(reopen(data_dir, name="set", fingerprint=fingerprint, make=fail), ARRAYS)


def test_known_contents_are_made_if_they_are_missing(data_dir: Path, folder: Path, builder: Builder) -> None:
    fingerprint = opened(data_dir, Builder()).fingerprint
    cut(built(folder) / "labels.npy")
    assert_holds(reopen(data_dir, name="set", fingerprint=fingerprint, make=lambda: opened(data_dir, builder)), ARRAYS)
    assert builder.calls == 1


def test_different_contents_are_rejected(data_dir: Path, builder: Builder) -> None:
    with pytest.raises(DataError, match=rf"{data_dir} was verified .* its set holds different samples now"):
        reopen(data_dir, name="set", fingerprint="0" * 64, make=lambda: opened(data_dir, builder))


def test_failed_build_leaves_nothing(data_dir: Path, folder: Path, builder: Builder) -> None:
    def fail(into: Path) -> dict[str, object]:
        np.save(into / "samples.npy", ARRAYS["samples"])
        raise DataError("bird.png is not a PNG")

    with pytest.raises(DataError, match="is not a PNG"):
        opened(data_dir, fail)
    assert [path.name for path in folder.iterdir()] == ["lock"]
    assert_holds(opened(data_dir, builder), ARRAYS)


def test_full_disk_is_explained(data_dir: Path, folder: Path) -> None:
    def fill(into: Path) -> dict[str, object]:
        raise OSError(28, "No space left on device", str(into / "samples.npy"))

    with pytest.raises(DataError, match=r"set: decoded arrays can't be written to .*No space left.*Make room"):
        opened(data_dir, fill)
    assert [path.name for path in folder.iterdir()] == ["lock"]


# Several processes

Forked = multiprocessing.get_context("fork")


def build_slowly(folder: Path, started: Any, resume: Any) -> dict[str, object]:
    started.release()
    np.save(folder / "samples.npy", ARRAYS["samples"])
    resume.wait()
    np.save(folder / "labels.npy", ARRAYS["labels"])
    return {"num_classes": 50}


def open_and_report(data_dir: Path, started: Any, resume: Any, results: Any) -> None:
    cached = opened(data_dir, lambda into: build_slowly(into, started, resume))
    results.put((cached.fingerprint, cached.array("labels").tolist()))


def test_several_processes_at_once_build_once(data_dir: Path) -> None:
    started, resume, results = Forked.Semaphore(0), Forked.Event(), Forked.Queue()
    processes = [Forked.Process(target=open_and_report, args=(data_dir, started, resume, results)) for _ in range(4)]
    for process in processes:
        process.start()
    started.acquire()
    resume.set()
    answers = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert not started.acquire(block=False), "a second build was started"
    assert answers == [(opened(data_dir, Builder()).fingerprint, list(range(50)))] * 4


def test_unfinished_arrays_of_a_killed_builder_are_not_used(data_dir: Path, folder: Path, builder: Builder) -> None:
    started, resume, results = Forked.Semaphore(0), Forked.Event(), Forked.Queue()
    process = Forked.Process(target=open_and_report, args=(data_dir, started, resume, results))
    process.start()
    started.acquire()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert list(folder.glob("building-*"))
    assert_holds(opened(data_dir, builder), ARRAYS)
    assert builder.calls == 1
    assert not list(folder.glob("building-*"))


# Folders that can't be written


def forbid(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Make a folder reject new files, even from the superuser."""
    mkdir = Path.mkdir

    def refuse(path: Path, *args: Any, **kwargs: Any) -> None:
        if path.is_relative_to(folder):
            raise PermissionError(13, "Permission denied", str(path))
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", refuse)


def test_user_folder_is_used_if_the_data_folder_cannot_be_written(
    data_dir: Path,
    folder: Path,
    user_cache: Path,
    builder: Builder,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    forbid(monkeypatch, folder)
    opened(data_dir, builder)
    message = capsys.readouterr().err
    assert f"set: {folder} can't be written (Permission denied), so decoded arrays go to {user_cache}" in message
    assert_holds(opened(data_dir, builder), ARRAYS)
    assert builder.calls == 1
    assert capsys.readouterr().err == "", "printed once, when something is written"
    assert not folder.exists()


def test_user_folder_keeps_data_folders_apart(
    data_dir: Path, tmp_path: Path, builder: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid(monkeypatch, tmp_path / "data")
    opened(data_dir, builder, key="one")
    opened(tmp_path / "data" / "other", builder, key="two")
    assert_holds(opened(data_dir, builder, key="one"), ARRAYS)
    assert builder.calls == 2


def test_folder_that_cannot_be_written_can_be_read(
    data_dir: Path, folder: Path, user_cache: Path, builder: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(data_dir, builder)
    forbid(monkeypatch, folder)
    assert_holds(opened(data_dir, builder), ARRAYS)
    assert builder.calls == 1
    assert not user_cache.exists()


def test_a_folder_chosen_by_the_user_is_used(
    data_dir: Path, folder: Path, tmp_path: Path, builder: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLEXIFED_CACHE_DIR", str(tmp_path / "chosen"))
    opened(data_dir, builder)
    assert not folder.exists()
    assert list((tmp_path / "chosen").glob(f"*/set-*/{MANIFEST}"))


def test_without_a_writable_folder_nothing_is_built(
    data_dir: Path, tmp_path: Path, builder: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid(monkeypatch, tmp_path)
    with pytest.raises(
        DataError, match=r"set: no folder for decoded arrays .*cache/set can't.*user.* FLEXIFED_CACHE_DIR"
    ):
        opened(data_dir, builder)
    assert builder.calls == 0


# Sources


def test_source_key_follows_names_sizes_and_times(tmp_path: Path) -> None:
    def key(root: Path) -> str:
        return source_key(root, sorted(os.scandir(root), key=lambda entry: entry.name))

    root = tmp_path / "one"
    root.mkdir()
    keys = [key(root)]
    (root / "a.png").write_bytes(b"12")
    os.utime(root / "a.png", ns=(0, 10))
    keys.append(key(root))
    (root / "a.png").write_bytes(b"123")
    os.utime(root / "a.png", ns=(0, 10))
    keys.append(key(root))
    os.utime(root / "a.png", ns=(0, 11))
    keys.append(key(root))
    (root / "a.png").rename(root / "b.png")
    keys.append(key(root))
    assert len(set(keys)) == 5
    shutil.copytree(root, tmp_path / "two")
    assert key(tmp_path / "two") == keys[-1], "it does not depend on the location"


def test_manifest_is_readable(data_dir: Path, folder: Path, builder: Builder) -> None:
    opened(data_dir, builder)
    content = json.loads((built(folder) / MANIFEST).read_text())["content"]
    assert set(content["arrays"]) == set(ARRAYS)
    assert content["facts"] == {"num_classes": 50}


def test_arrays_are_on_disk_before_the_manifest_says_so(
    data_dir: Path, folder: Path, builder: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    monkeypatch.setattr("flexifed.data.cache.flush_to_disk", lambda path: flushed.append(path.name))
    opened(data_dir, builder)
    arrays = sorted(path.name for path in built(folder).glob("*.npy"))
    assert flushed[:-2] == [*arrays, MANIFEST]
    assert flushed[-2].startswith("building-")
    assert flushed[-1] == folder.name
