from __future__ import annotations

import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "experiments"


def test_twelve_classes_are_a_separate_experiment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = runpy.run_path(str(FOLDER / "speech_commands_12.py"))
    line = ["--data", "synthetic", "--profile", "smoke", "--dry-run", "--only", "*/*/max_common"]
    assert script["main"]([*line, "--results-dir", str(tmp_path / "results")]) == 0
    shown = capsys.readouterr().out
    assert "speech_commands_12/vgg/max_common" in shown
    assert "speech_commands_12/resnet/max_common" in shown
