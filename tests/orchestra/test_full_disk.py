"""A disk that fills up: a clear error, no corrupt file, and with room made the same command ends with equal numbers."""

from __future__ import annotations

import errno
import os
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from test_resume import TIMINGS, cell, digests, play, rows

from flexifed.cells.run import CellRun
from flexifed.cells.session import CellSession, log_failure, open_log
from flexifed.config import PlacementOptions
from flexifed.errors import ResourceError, ResultsError
from flexifed.federation.cell import make_shards
from flexifed.federation.rounds import LocalHosts
from flexifed.orchestra import sweep
from flexifed.orchestra.ledger import CellReport
from flexifed.orchestra.placement import place_cell
from flexifed.orchestra.trial import PlacedRun
from flexifed.results.store import ResultsFolder

SCRIPT = Path(__file__).parents[2] / "experiments" / "table1.py"
DISK_BYTES = 4 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, small enough to be filled."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a small file system takes Linux and root")
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path, leave_bytes: int) -> Path:
    """Write a file that leaves only `leave_bytes` of free space."""
    filler = disk / "filler"
    available = os.statvfs(disk)
    with open(filler, "wb") as file:
        file.write(bytes(max(0, available.f_bavail * available.f_frsize - leave_bytes)))
    return filler


def play_until_it_fails(run: CellRun, rounds_before: int, disk: Path, leave_bytes: int) -> str | None:
    """Play some rounds, then with little room to the end or to an error, as a trial does; returns the error."""
    shards = make_shards(run.config, run.info)
    log = open_log(run, "in process")
    try:
        session = CellSession(run, "in process", LocalHosts(run.config, run.info, shards), shards, log)
        for _ in range(rounds_before):
            session.play_round()
        fill(disk, leave_bytes)
        while session.play_round().round_index < run.rounds:
            pass
    except ResultsError as error:
        log_failure(log, str(error))
        return str(error)
    finally:
        log.close()
    return None


@pytest.mark.parametrize("leave_bytes", [0, 4 << 10, 64 << 10, 160 << 10, 400 << 10])
def test_a_cell_on_a_full_disk_stops_with_a_clear_error_and_goes_on_when_there_is_room(
    tmp_path: Path, disk: Path, leave_bytes: int
) -> None:
    undisturbed, full = cell(tmp_path / "elsewhere"), cell(disk / "results")
    play(undisturbed)
    error = play_until_it_fails(full, 3, disk, leave_bytes)
    assert error is not None
    assert "No space left on device; make room" in error
    assert str(disk) in error
    log = ResultsFolder(full.results).run_folder(full.name) / "log.txt"
    assert log.read_text().endswith("\n"), "no unfinished line"
    written_rows = pd.read_parquet(ResultsFolder(full.results).rounds)
    assert set(written_rows.groupby("round").size()) == {4}
    assert [path for path in disk.rglob(".*") if path.is_file()] == [], "no unfinished file is left"

    (disk / "filler").unlink()
    play(full)
    columns = [*TIMINGS, "actor"]
    pd.testing.assert_frame_equal(rows(full).drop(columns=columns), rows(undisturbed).drop(columns=columns))
    assert digests(full) == digests(undisturbed)
    assert re.search("resuming with round [24], ", log.read_text())


ARGUMENTS = ["--profile", "smoke", "--data", "synthetic", "--only", "cifar10/vgg/max_common", "--device", "cpu"]


@pytest.mark.slow
@pytest.mark.ray
def test_the_command_on_a_full_disk(
    tmp_path: Path, disk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    main = runpy.run_path(str(SCRIPT))["main"]
    arguments = [*ARGUMENTS, "--results-dir", str(disk)]
    filler = fill(disk, 0)
    assert main(arguments) == 2, "not even a lock can be made"
    filler.unlink()
    assert "No space left on device; make room" in capsys.readouterr().err

    filler = fill(disk, 200 << 10)
    assert main(arguments) == 1
    assert "No space left on device; make room" in capsys.readouterr().err
    filler.unlink()
    assert main(arguments) == 0
    assert main([*ARGUMENTS, "--results-dir", str(tmp_path / "elsewhere")]) == 0
    actual, expected = (
        pd.read_parquet(results / "table1" / "rounds").drop(columns=TIMINGS)
        for results in (disk, tmp_path / "elsewhere")
    )
    pd.testing.assert_frame_equal(actual, expected)


def test_a_full_folder_of_tune_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run = cell(tmp_path)
    placed = PlacedRun(run, place_cell(run.config, PlacementOptions(), [{"CPU": 1.0}]))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(sweep.tune, "Tuner", lambda *_, **__: SimpleNamespace(fit=full))
    with pytest.raises(ResourceError, match=f"can't write to {tmp_path}/flexifed-tune-.*No space left.*TMPDIR"):
        sweep.run_grid([placed], Silent(), place=lambda *_: placed.placement)
    assert not list(tmp_path.glob("flexifed-tune-*"))


class Silent:
    """An observer that ignores everything."""

    def cell_started(self, name: str) -> None: ...

    def reported(self, report: CellReport) -> None: ...

    def noted(self, message: str, name: str | None = None) -> None: ...
