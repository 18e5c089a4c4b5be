"""The benchmark of memory, with so few rounds that only the script itself is tested."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "memory.py"


@pytest.mark.slow
@pytest.mark.ray
def test_every_process_is_found_and_the_output_is_json() -> None:
    command = [sys.executable, str(SCRIPT), "--rounds", "12", "--base-round", "4", "--limit", "1"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    measured = json.loads(finished.stdout)
    kinds = [name.rstrip(" 0123456789") for name in measured["growth"]]
    assert sorted(kinds) == ["client actor", "client actor", "command", "driver"]
    assert [sample["round"] for sample in measured["samples"]] == [*range(4, 13)]
    assert all(value > 100 for sample in measured["samples"] for value in sample["uss_mib"].values())
    assert set(measured["median_round_s"]) == {"early", "late"}
