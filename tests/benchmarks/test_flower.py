"""The benchmark against Flower: the parts that don't need Flower, and a whole small run if its Python is given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from flexifed.errors import ConfigError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def flower(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import flower as module

    return module


def round_figures(ended: float, accuracies: list[float], computing_s: float = 1.0) -> dict[str, Any]:
    return {"ended": ended, "accuracies": accuracies, "losses": [0.5] * len(accuracies), "computing_s": computing_s}


def test_both_sides_get_the_same_cell(flower: ModuleType) -> None:
    job = flower.Job(clients=60, width=0.25, max_train=8, seed=3)
    decoded = flower.Job.from_json(job.to_json())
    assert decoded.config() == job.config()
    assert decoded.config().scheme == "clustered_fl"
    assert decoded.config().partition.num_shards == 60
    assert decoded.info().source == "synthetic"


def test_an_invalid_job_is_refused(flower: ModuleType) -> None:
    with pytest.raises(ConfigError, match="width is 0"):
        flower.Job(width=0).config()


def test_neither_the_first_round_nor_the_start_is_timed(flower: ModuleType) -> None:
    rounds = [
        round_figures(100.0, [0.1, 0.2], 9.0),
        round_figures(102.0, [0.2, 0.3], 3.0),
        round_figures(104.0, [0.3, 0.5], 3.0),
    ]
    assert flower.describe_rounds(rounds, wall_s=30.0, at_a_time=2) == pytest.approx(
        {
            "rounds_per_minute": 30.0,
            "round_s": 2.0,
            "outside_s": 0.5,
            "outside_share": 0.25,
            "wall_s": 30.0,
            "startup_s": 24.0,
            "final_accuracy": 0.4,
        }
    )


def test_with_two_cpus_a_client_half_as_many_clients_run_at_a_time(
    flower: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = [round_figures(100.0, [0.5]), round_figures(104.0, [0.5], computing_s=4.0)]
    monkeypatch.setattr(flower, "play_flexifed", lambda job: (rounds, 9.0))
    monkeypatch.setattr(flower, "play_flower", lambda job, program, python: (rounds, 9.0))
    monkeypatch.setattr(flower, "flower_versions", lambda python: {})
    measured = flower.measure(flower.Job(cpus=2), 1, flower.parse(["--cpus", "2"])[1].program, Path())
    outside = {side: measured[side]["outside_share"]["median"] for side in measured["ratio"]}
    assert outside == {"defaults": 0.0, "tutorial": 0.5, "lean": 0.5}
    assert measured["same_numbers"]["equal"]


def test_programs_that_need_more_cpus_are_left_out(flower: ModuleType) -> None:
    assert flower.parse(["--cpus", "1"])[1].program == ["tutorial", "lean"]


def test_scores_at_the_start_of_a_round_belong_to_the_round_before(flower: ModuleType) -> None:
    rows = [
        {"round": index, "client": client, "accuracy": index + client / 10, "loss": -index, "train_s": 1, "eval_s": 2}
        for client in (1, 0)
        for index in range(3)
    ]
    rounds = flower.rounds_of_rows(rows, ended=[5.0, 6.0, 6.5])
    assert rounds == [
        {"ended": 5.0, "accuracies": [1.0, 1.1], "losses": [-1, -1], "computing_s": 6},
        {"ended": 6.0, "accuracies": [2.0, 2.1], "losses": [-2, -2], "computing_s": 6},
    ]


def test_a_difference_in_any_round_is_found(flower: ModuleType) -> None:
    ours = [round_figures(1.0, [0.5, 0.5]), round_figures(2.0, [0.5, 0.5])]
    theirs = [round_figures(1.0, [0.5, 0.25]), round_figures(2.0, [0.5, 0.5])]
    assert flower.largest_difference(ours, ours) == {"accuracies": 0, "losses": 0}
    assert flower.largest_difference(ours, theirs) == {"accuracies": 0.25, "losses": 0}


def test_ratios_are_taken_within_a_repetition(flower: ModuleType) -> None:
    """The machine's load changes from one repetition to the next."""
    repetitions = [
        {"flexifed": {"rounds_per_minute": ours}, "lean": {"rounds_per_minute": theirs}}
        for ours, theirs in ((30.0, 10.0), (8.0, 4.0), (100.0, 20.0))
    ]
    described = flower.describe_repetitions(repetitions)
    assert described["ratio"] == {"lean": {"n": 3, "median": 3.0, "min": 2.0, "max": 5.0}}
    assert described["flexifed"]["rounds_per_minute"]["median"] == 30.0


def test_an_environment_is_reused_unless_it_has_other_versions(
    flower: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.touch()
    (tmp_path / "pyvenv.cfg").touch()
    (tmp_path / "flexifed-requirements.txt").write_text("\n".join(flower.requirements()))
    assert flower.prepare_environment(tmp_path) == python
    monkeypatch.setattr(flower, "FLOWER", "0.0.0")
    with pytest.raises(flower.FlowerError, match="install uv, or name the Python"):
        flower.prepare_environment(tmp_path)


def test_a_folder_that_is_not_an_environment_is_left_alone(flower: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(flower.FlowerError, match="something other than an environment"):
        flower.prepare_environment(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "1"], "--rounds is 1; it must be at least 2"),
        (["--cpus", "1", "--program", "defaults"], "--cpus is 1; defaults has 2 for each client"),
        (["--repeat", "0"], "--repeat is 0; it must be at least 1"),
        (["--width", "-1"], "width is -1.0"),
        (["--clients", "0"], "num_clients is 0"),
        (["--data-dir", "/nowhere"], "no real data in /nowhere"),
        (["--flower-python", "/nowhere/python"], "can't run /nowhere/python"),
        (["--flower-python", "a", "--flower-env", "b"], "not allowed with"),
        (["--flower-python", sys.executable], "has no Flower with its simulation engine"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(
    flower: ModuleType,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "--data-dir" not in arguments and "--flower-python" not in arguments:
        monkeypatch.setattr(flower, "prepare_environment", lambda folder: pytest.fail("an environment was made"))
    monkeypatch.setattr(sys, "argv", ["flower.py", *arguments])
    with pytest.raises(SystemExit) as exiting:
        flower.main()
    assert exiting.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_flower_and_flexifed_get_the_same_numbers() -> None:
    python = os.environ.get("FLEXIFED_FLOWER_PYTHON")
    if not python:
        pytest.skip("set FLEXIFED_FLOWER_PYTHON to the Python of an environment with flwr[simulation]")
    size = ["--rounds", "2", "--repeat", "1", "--max-train", "16", "--max-test", "8", "--width", "0.03125"]
    command = [sys.executable, str(BENCHMARKS / "flower.py"), *size, "--cpus", "2", "--flower-python", python]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    measured = json.loads(finished.stdout)
    assert measured["same_numbers"] == {"equal": True, "largest_difference": {"accuracies": 0, "losses": 0}}
    assert set(measured["ratio"]) == {"defaults", "tutorial", "lean"}
