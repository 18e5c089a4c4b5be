"""From which checkpoint a run resumes, whatever was interrupted or damaged before."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexifed.federation.checkpoint import MANIFEST, SHARED, Checkpoints

FILES = ("clients-000000.safetensors", "clients-000004.safetensors", SHARED)
LAST_ROUND = 12


def save(checkpoints: Checkpoints, next_round: int, *, killed: bool = False) -> None:
    """Write a checkpoint, or only its files, as if the process had been killed before it wrote the manifest."""
    folder = checkpoints.begin(next_round)
    files = {name: write(folder / name, f"{name} {next_round}".encode()) for name in FILES}
    if not killed:
        checkpoints.commit(next_round, files)


def write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def opened(root: Path) -> tuple[Checkpoints, int]:
    """A session's checkpoints, and the round with which it resumes."""
    checkpoints = Checkpoints(root, "run", LAST_ROUND)
    latest = checkpoints.latest(lambda _: None)
    return checkpoints, latest.next_round if latest else 0


SESSIONS = st.lists(st.tuples(st.lists(st.integers(1, 4), max_size=3), st.integers(0, 4)), min_size=1, max_size=8)
"""Sessions: the rounds between checkpoints, and the rounds until one that a kill leaves unfinished (0: none)."""


@given(SESSIONS)
@settings(max_examples=200, deadline=None)
def test_a_session_resumes_from_the_checkpoint_committed_last(sessions: list[tuple[list[int], int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        expected = 0
        for steps, killed_in in sessions:
            checkpoints, next_round = opened(Path(folder))
            assert next_round == expected
            for step in steps:
                if next_round + step <= LAST_ROUND:
                    next_round += step
                    save(checkpoints, next_round)
            expected = next_round
            if killed_in and next_round + killed_in <= LAST_ROUND:
                save(checkpoints, next_round + killed_in, killed=True)


@pytest.mark.parametrize("keep_final", [True, False])
def test_unfinished_checkpoints_are_removed_when_the_cell_ends(tmp_path: Path, keep_final: bool) -> None:
    save(opened(tmp_path)[0], 7, killed=True)
    checkpoints, _ = opened(tmp_path)
    save(checkpoints, 5)
    save(checkpoints, 6)
    checkpoints.end(keep_final=keep_final)
    assert (sorted(os.listdir(tmp_path)) if tmp_path.exists() else []) == (["round-000006"] if keep_final else [])


def test_the_checkpoint_before_a_damaged_one_is_kept_beside_the_next(tmp_path: Path) -> None:
    checkpoints, _ = opened(tmp_path)
    for next_round in (4, 6):
        save(checkpoints, next_round)
    (tmp_path / "round-000006" / SHARED).write_bytes(b"")
    checkpoints, next_round = opened(tmp_path)
    assert next_round == 4
    save(checkpoints, 5)
    assert sorted(os.listdir(tmp_path)) == ["round-000004", "round-000005"]


def test_a_longer_runs_checkpoint_is_left_alone(tmp_path: Path) -> None:
    save(Checkpoints(tmp_path, "run"), LAST_ROUND + 8)
    checkpoints, next_round = opened(tmp_path)
    assert next_round == 0
    save(checkpoints, LAST_ROUND)
    checkpoints.end(keep_final=True)
    assert sorted(os.listdir(tmp_path)) == ["round-000012", "round-000020"]


def test_checkpoints_are_ordered_by_round_from_a_million_rounds_on_too(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "run", 1_000_001)
    for next_round in (999_998, 999_999, 1_000_000):
        save(checkpoints, next_round)
    assert sorted(os.listdir(tmp_path)) == ["round-1000000", "round-999999"]
    reopened = Checkpoints(tmp_path, "run", 1_000_001)
    assert reopened.newest_round() == 1_000_000
    newest = reopened.latest(pytest.fail)
    assert newest is not None
    assert newest.next_round == 1_000_000
    shorter = Checkpoints(tmp_path, "run", 999_999).latest(pytest.fail)
    assert shorter is not None
    assert shorter.next_round == 999_999


def test_a_checkpoint_that_was_not_committed_is_not_the_newest_round(tmp_path: Path) -> None:
    checkpoints, _ = opened(tmp_path)
    save(checkpoints, 4)
    save(checkpoints, 6, killed=True)
    assert Checkpoints(tmp_path, "run").newest_round() == 4


def test_a_checkpoint_without_its_rows_is_skipped(tmp_path: Path) -> None:
    checkpoints, _ = opened(tmp_path)
    for next_round in (4, 6):
        save(checkpoints, next_round)
    notes: list[str] = []
    latest = Checkpoints(tmp_path, "run").latest(notes.append, fits=lambda checkpoint: checkpoint.next_round < 6)
    assert latest is not None
    assert latest.next_round == 4
    assert notes == ["checkpoint round-000006 is skipped: rows of the rounds before it are missing"]


def test_a_file_in_the_place_of_a_checkpoint_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "round-000004").write_text("in the way")
    checkpoints, next_round = opened(tmp_path)
    assert next_round == 0
    save(checkpoints, 4)
    assert opened(tmp_path)[1] == 4


def test_no_bit_of_a_manifest_can_change_what_it_says(tmp_path: Path) -> None:
    checkpoints, _ = opened(tmp_path)
    save(checkpoints, 4)
    whole = Checkpoints(tmp_path, "run").latest(pytest.fail)
    path = tmp_path / "round-000004" / MANIFEST
    content = path.read_bytes()
    for position in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[position // 8] ^= 1 << position % 8
        path.write_bytes(flipped)
        assert Checkpoints(tmp_path, "run").latest(lambda _: None) in (None, whole)


def test_a_manifest_is_on_the_disk_before_it_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints, _ = opened(tmp_path)
    flushed: list[str] = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (flushed.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda old, new: (flushed.append(Path(new).name), rename(old, new)))
    save(checkpoints, 4)
    assert flushed == ["fsync", MANIFEST, "fsync"], "the file, then its name"
