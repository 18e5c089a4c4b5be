"""The command from end to end, with clients in this process: which folder, which runs, and what stays as it was."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import ray

from flexifed.cells.session import CellSession, open_log
from flexifed.cli import main as flexifed_main
from flexifed.core.schemes import SCHEMES, max_common
from flexifed.data import find_dataset
from flexifed.errors import ConfigError, ResultsError
from flexifed.federation.cell import make_shards
from flexifed.federation.rounds import LocalHosts
from flexifed.grid import make_cells, parse_options
from flexifed.launch import run_experiment
from flexifed.orchestra.estimate import CellTimes
from flexifed.orchestra.trial import PlacedRun
from flexifed.request import GridRequest
from flexifed.results.store import ResultsFolder

SMALL = ["--profile", "smoke", "--data", "synthetic", "--only", "*/*/standalone", "--device", "cpu", "--rounds", "1"]
SMALL += ["--width", "0.02", "--num-clients", "4", "--num-shards", "2000", "--windows-per-shard", "1"]
KEY = ["round", "client"]


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Cells are played here instead of on Ray; returns the names of those that were."""
    played: list[str] = []

    def run_grid(cells: Sequence[PlacedRun], *_: Any, **__: Any) -> dict[str, str]:
        for placed in cells:
            played.append(placed.run.name)
            shards = make_shards(placed.run.config, placed.run.info)
            hosts = LocalHosts(placed.run.config, placed.run.info, shards)
            with closing(open_log(placed.run, "in process")) as log:
                session = CellSession(placed.run, "in process", hosts, shards, log)
                while session.play_round().round_index < placed.run.rounds:
                    pass
        return {}

    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray was reached"))
    monkeypatch.setattr("flexifed.orchestra.cluster.connected", lambda _: nullcontext())
    monkeypatch.setattr("flexifed.orchestra.cluster.nodes", lambda: [{"CPU": 2.0}])
    monkeypatch.setattr("flexifed.orchestra.sweep.run_grid", run_grid)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return played


def run(results: Path, *options: str) -> int:
    line = [*SMALL, "--results-dir", str(results), *options]
    return run_experiment("table1", make_cells([("cifar10", "vgg")]), line, prog="table1.py", description="")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_fresh_starts_over_in_a_new_folder_which_the_next_command_goes_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], in_process: list[str]
) -> None:
    assert run(tmp_path) == 0
    before = contents(tmp_path / "table1")
    capsys.readouterr()

    assert run(tmp_path, "--fresh") == 0
    told = capsys.readouterr().out
    assert f"fresh: results go to {tmp_path / 'table1-2'}; table1 is left as it is" in told
    assert f"Rows: pandas.read_parquet('{tmp_path / 'table1-2' / 'rounds'}')" in told
    assert contents(tmp_path / "table1") == before
    assert len(in_process) == 2
    first, second = (pd.read_parquet(tmp_path / name / "rounds") for name in ("table1", "table1-2"))
    assert first["accuracy"].tolist() == second["accuracy"].tolist()
    assert first["train_started"].max() < second["train_started"].min(), "it was run again"

    assert run(tmp_path) == 0
    told = capsys.readouterr().out
    assert f"results: {tmp_path / 'table1-2'}, the newest of 2" in told
    assert "1 of 1 cell finished already" in told
    assert len(in_process) == 2

    assert flexifed_main(["report", str(tmp_path)]) == 0
    assert f"{tmp_path / 'table1-2'}; there are also (choose with --experiment): table1\n" in capsys.readouterr().out
    assert flexifed_main(["report", str(tmp_path), "--experiment", "table1"]) == 0
    assert f"{tmp_path / 'table1'}; there are also (choose with --experiment): table1-2\n" in capsys.readouterr().out


def test_finished_runs_whose_scheme_has_been_edited_are_not_taken_for_new_ones(
    tmp_path: Path, in_process: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tmp_path) == 0
    with monkeypatch.context() as patch:
        patch.setattr("flexifed.core.schemes.SCHEMES", {**SCHEMES, "standalone": max_common})
        assert run(tmp_path, "--dry-run") == run(tmp_path) == 2
    message = capsys.readouterr().err
    assert "1 finished run shared other layers in training than now (cifar10/vgg/standalone seed 0); undo" in message
    assert message.rstrip().endswith("or start over with --fresh")
    assert run(tmp_path) == 0
    assert len(in_process) == 1


def test_a_fresh_dry_run_names_the_folder_and_makes_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path) == 0
    assert run(tmp_path, "--fresh", "--dry-run") == 0
    told = capsys.readouterr().out
    assert f"fresh: results go to {tmp_path / 'table1-2'}" in told
    assert "to run, 1 rounds" in told
    assert [path.name for path in tmp_path.iterdir()] == ["table1"]


def test_changed_settings_are_another_run_and_the_command_says_which(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], in_process: list[str]
) -> None:
    assert run(tmp_path) == 0
    assert "new settings" not in capsys.readouterr().out
    assert run(tmp_path, "--learning-rate", "0.5", "--no-augment") == 0
    assert (
        "new settings, so 1 new run; existing results are left as they are. Before and now: "
        "training.augment True -> False, training.learning_rate 0.01 -> 0.5\n"
    ) in capsys.readouterr().out
    assert len(set(in_process)) == 2
    assert pd.read_parquet(tmp_path / "table1" / "rounds")["run_id"].nunique() == 2

    assert run(tmp_path, "--learning-rate", "0.5") == 0
    assert "Before and now: training.augment False -> True\n" in capsys.readouterr().out, "the nearest one is named"
    assert run(tmp_path, "--learning-rate", "0.5") == 0
    assert "new settings" not in capsys.readouterr().out
    assert run(tmp_path, "--seeds", "1") == 0
    assert "new settings" not in capsys.readouterr().out, "another seed is no other setting"


def test_more_rounds_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path) == 0
    before = pd.read_parquet(tmp_path / "table1" / "rounds").sort_values(KEY)
    assert run(tmp_path, "--rounds", "2") == 0
    after = pd.read_parquet(tmp_path / "table1" / "rounds").sort_values(KEY)
    pd.testing.assert_frame_equal(after[after["round"] < 1], before[before["round"] < 1])
    assert "new settings" not in capsys.readouterr().out
    [log] = tmp_path.glob("table1/runs/*/log.txt")
    assert "resuming with round 1, from round-000001" in log.read_text()


def test_the_table_after_a_run_shows_its_rounds_seeds_data_and_changed_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["--only", "*/*/clustered_fl", "--seeds", "0", "1"]
    assert run(tmp_path, *line, "--rounds", "2") == 0
    capsys.readouterr()
    assert run(tmp_path, *line) == 0, "the stored runs have one round more"
    shown = " ".join(capsys.readouterr().out.split())
    assert "cifar10 / vgg [SYNTHETIC DATA]" in shown
    assert "Data: synthetic. Profile: smoke, model.width=0.02, partition.num_clients=4" in shown
    assert "Rounds: 1. Seeds: 0 1." in shown
    assert shown.count("clustered_fl - standalone") == 1
    assert "by seed" in shown


def test_nothing_stays_of_a_final_state_that_is_not_wanted(tmp_path: Path) -> None:
    assert run(tmp_path, "--no-keep-final") == 0
    assert [*tmp_path.rglob("*.safetensors")] == []


def test_a_second_command_in_one_folder_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], in_process: list[str]
) -> None:
    assert run(tmp_path) == 0
    program = "import sys, pathlib, flexifed.results.lock as lock\n"
    program += "with lock.locked(pathlib.Path(sys.argv[1])): print('held', flush=True), sys.stdin.read()"
    command = [sys.executable, "-c", program, str(tmp_path / "table1")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout
        assert first.stdout.readline() == "held\n"
        assert run(tmp_path, "--rounds", "2") == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {tmp_path / 'table1'} is being written by process {first.pid} on ")
        assert run(tmp_path, "--rounds", "2", "--fresh") == 0, "another folder has another lock"
        first.communicate()
    assert len(in_process) == 2


def test_cells_that_failed_are_listed_and_the_status_is_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(cells: Sequence[PlacedRun], *_: Any, **__: Any) -> dict[str, str]:
        return {cells[0].run.name: "client 3, round 1, training: the training loss is nan"}

    monkeypatch.setattr("flexifed.orchestra.sweep.run_grid", failing)
    assert run(tmp_path) == 1
    said = capsys.readouterr().err
    assert "error: 1 of 1 cells failed; each folder in " in said
    assert "-standalone-seed0-" in said
    assert "client 3, round 1, training: the training loss is nan" in said


@pytest.mark.parametrize("ended_by", ["a signal", "Ray, which turns it into an exit"])
def test_sigterm_before_the_first_round_is_as_ctrl_c(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, ended_by: str
) -> None:
    def terminated(*_: Any, **__: Any) -> None:
        if ended_by != "a signal":
            sys.exit(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("the signal was not heard")

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("flexifed.orchestra.cluster.connected", terminated)
    assert run(tmp_path) == 130
    assert "stopped; run the same command again to resume" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


def test_settings_of_gpus_are_accepted_with_gpus_and_with_auto(tmp_path: Path) -> None:
    cells = make_cells([("cifar10", "vgg")])
    infos = {"cifar10": find_dataset("cifar10", data="synthetic", data_dir=Path("nowhere"))}

    def check(line: Sequence[str], device: str) -> None:
        options = parse_options([*line, "--device", device], prog="", description="")
        GridRequest(options, cells, infos, ResultsFolder(tmp_path)).check_settings()

    for line in (["--precision", "tf32"], ["--cuda-graph"]):
        for device in ("cuda", "auto"):
            check(line, device)
        with pytest.raises(ConfigError, match="which CPUs do not have"):
            check(line, "cpu")


def test_auto_does_not_begin_anew_because_the_machine_has_another_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tmp_path) == 0
    before = contents(tmp_path / "table1" / "rounds")
    gpu_here = [{"CPU": 2.0, "GPU": 1.0}]
    monkeypatch.setattr("flexifed.orchestra.cluster.nodes", lambda: gpu_here)
    monkeypatch.setattr("flexifed.orchestra.estimate.this_machine", lambda: gpu_here[0])
    monkeypatch.setattr("flexifed.orchestra.estimate.cell_times", lambda *_: CellTimes(1.0, 1.0))
    connected: list[str | None] = []
    monkeypatch.setattr(
        "flexifed.orchestra.cluster.connected", lambda address: connected.append(address) or nullcontext()
    )
    for line in (["--device", "auto"], ["--device", "auto", "--dry-run"]):
        assert run(tmp_path, *line) == 2
        told = capsys.readouterr().err
        assert "--device auto is cuda here, but cifar10/vgg/standalone seed 0 has results of these settings" in told
        assert "say --device cpu to continue them, or --device cuda to start again" in told
        assert connected == [], "Ray is not started for nothing"
    assert contents(tmp_path / "table1" / "rounds") == before
    for settings in (["--no-winograd"], ["--learning-rate", "0.5"]):  # CPUs have no results of these
        assert run(tmp_path, "--device", "auto", "--dry-run", *settings) == 0
    assert run(tmp_path, "--device", "cpu", "--rounds", "2") == 0


def test_finished_cells_need_no_gpu_to_show_their_table(
    tmp_path: Path, in_process: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tmp_path) == 0
    monkeypatch.setattr("flexifed.request.GridRequest.place", lambda *_: pytest.fail("nothing is left to be placed"))
    assert run(tmp_path) == 0
    assert "1 of 1 cell finished already" in capsys.readouterr().out
    assert run(tmp_path, "--dry-run") == 0
    assert capsys.readouterr().out.endswith("nothing is left to run\n")
    assert len(in_process) == 1


def test_paths_are_printed_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "res[old]" / "a [/b] :bug:"
    assert run(folder) == 0
    assert f"Rows: pandas.read_parquet({str(folder / 'table1' / 'rounds')!r})" in capsys.readouterr().out


def test_a_cell_that_ends_without_its_last_round_is_no_success(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexifed.orchestra.sweep.run_grid", lambda *_, **__: {})
    assert run(tmp_path) == 1
    told = capsys.readouterr().err
    assert "1 of 1 cells failed" in told
    assert (
        f"its last round is not in {tmp_path / 'table1' / 'rounds'}: either a file {tmp_path / 'table1' / 'stop'}"
        in told
    )


def test_nodes_that_would_fail_cell_after_cell_are_named_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, in_process: list[str]
) -> None:
    checks: list[Callable[[], None]] = []

    def check_nodes(check: Callable[[], None]) -> dict[str, str]:
        checks.append(check)
        return {"worker-2 (10.0.0.2)": "worker-2 does not see /shared/results"}

    monkeypatch.setattr("flexifed.orchestra.cluster.check_nodes", check_nodes)
    assert run(tmp_path, "--address", "10.0.0.1:6379") == 2
    told = capsys.readouterr().err
    assert "error: 1 node can't run these cells" in told
    assert "\n  worker-2 (10.0.0.2): worker-2 does not see /shared/results\n" in told
    assert in_process == []
    checks[0]()  # holds on this machine
    shutil.rmtree(tmp_path / "table1" / "rounds")
    with pytest.raises(ResultsError, match="does not see"):
        checks[0]()


def test_what_a_killed_process_has_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    assert run(tmp_path) == 0
    before = contents(tmp_path / "table1")
    [shards] = tmp_path.glob("table1/runs/*/shards.parquet")
    for table in (*tmp_path.glob("table1/rounds/*.parquet"), shards):
        table.with_name(f".{table.name}.4711").write_bytes(b"half")
    assert run(tmp_path) == 0
    assert contents(tmp_path / "table1") == before


@pytest.mark.parametrize("length", [1, 1_000_000], ids=["written at exit", "written at once"])
def test_a_reader_that_closes_the_pipe_ends_the_command_quietly_as_sigpipe_would(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # which would write short output at once too
    script = f"import sys; from flexifed.launch import guarded; sys.exit(guarded(lambda: print('x' * {length})))"
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ended = subprocess.run([sys.executable, "-c", script], stdout=writer, stderr=subprocess.PIPE, check=False)
    finally:
        os.close(writer)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, b"")
