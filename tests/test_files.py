"""Files are whole and on disk, or not there."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from flexifed.errors import ResultsError
from flexifed.files import atomic_write


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is flushed and renamed, in order."""
    calls: list[str] = []
    replace, fsync = os.replace, os.fsync

    def flush(descriptor: int) -> None:
        calls.append("flush folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "flush file")
        fsync(descriptor)

    def rename(source: Path, target: Path) -> None:
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", rename)
    return calls


def test_a_file_and_its_name_are_on_disk_when_it_is_written(tmp_path: Path, calls: list[str]) -> None:
    with atomic_write(tmp_path / "file") as file:
        file.write(b"content")
        assert not (tmp_path / "file").exists()
    assert (tmp_path / "file").read_bytes() == b"content"
    assert calls == ["flush file", "rename", "flush folder"]


@pytest.mark.parametrize(("number", "is_refused"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_only_a_file_system_that_cannot_flush_folders_need_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, is_refused: bool
) -> None:
    def flush(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", flush)
    if is_refused:
        with pytest.raises(ResultsError, match="Input/output error"), atomic_write(tmp_path / "file"):
            pass
    else:
        with atomic_write(tmp_path / "file"):
            pass


def test_a_failure_keeps_the_file_before_and_leaves_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"before")
    with pytest.raises(TypeError), atomic_write(tmp_path / "file") as file:
        file.write("not bytes")  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"before"
