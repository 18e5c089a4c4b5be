"""Two commands never write to the same results folder at the same time, and a lock does not outlive its process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import SoftFileLock

from flexifed.errors import ResultsError
from flexifed.results.lock import HOLDER, LOCK, locked

HOLD = """
import sys
from pathlib import Path
from flexifed.results.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    """Start another process that holds the lock until its standard input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_command_is_refused_with_the_process_and_host_of_the_first(tmp_path: Path) -> None:
    with hold(tmp_path) as first:
        with pytest.raises(ResultsError) as caught, locked(tmp_path):
            pytest.fail("both hold the lock")
        assert f"process {first.pid} on {socket.gethostname()} since " in str(caught.value)
        assert f"remove {tmp_path / LOCK}" in str(caught.value)
        first.communicate()
    with locked(tmp_path):
        assert json.loads((tmp_path / HOLDER).read_text())["pid"] == os.getpid()
    assert not (tmp_path / HOLDER).exists()


def test_a_lock_that_a_killed_process_left_is_taken_over(tmp_path: Path) -> None:
    with hold(tmp_path) as first:
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert (tmp_path / HOLDER).exists()
    with locked(tmp_path):
        assert json.loads((tmp_path / HOLDER).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("alive", [True, False])
def test_without_flock_the_lock_file_names_the_process_and_a_dead_process_is_recognised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alive: bool
) -> None:
    monkeypatch.setattr("flexifed.results.lock.FileLock", SoftFileLock)
    holder = HOLD.replace("import sys\n", "import sys, filelock\nfilelock.FileLock = filelock.SoftFileLock\n", 1)
    command = [sys.executable, "-c", holder, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout
        assert first.stdout.readline() == "held\n"
        assert (tmp_path / LOCK).read_text().splitlines()[:2] == [str(first.pid), socket.gethostname()]
        if alive:
            with pytest.raises(ResultsError, match=f"process {first.pid} on "), locked(tmp_path):
                pytest.fail("both hold the lock")
            first.communicate()
        else:
            first.kill()
            first.wait()
            with locked(tmp_path):
                assert (tmp_path / LOCK).read_text().splitlines()[0] == str(os.getpid())


def test_the_lock_of_a_process_on_another_machine_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without flock, this machine can't know whether that process is still alive."""
    monkeypatch.setattr("flexifed.results.lock.FileLock", SoftFileLock)
    (tmp_path / LOCK).write_text("1\nanother-machine\n")
    (tmp_path / HOLDER).write_text(
        json.dumps({"pid": 1, "host": "another-machine", "since": "2026-01-01", "command": "table1.py"})
    )
    with pytest.raises(ResultsError, match="process 1 on another-machine since 2026-01-01"), locked(tmp_path):
        pytest.fail("taken over")


def test_a_folder_that_cannot_be_locked_is_an_error_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResultsError, match=r"can.t lock .*fix the folder"), locked(tmp_path / "file" / "below"):
        pytest.fail("locked nothing")
