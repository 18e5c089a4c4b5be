"""Results folders of generated rows, as runs would leave them."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from flexifed.config import SCHEMES

GENERATOR = Path(__file__).parents[2] / "benchmarks" / "generate.py"


@pytest.fixture(scope="session")
def write_grid() -> Callable[..., int]:
    """The function of `benchmarks/generate.py` that writes generated results."""
    return runpy.run_path(str(GENERATOR))["write_grid"]


@pytest.fixture(scope="session")
def real_grid(write_grid: Callable[..., int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All 40 cells, called real, three seeds, 20 rounds."""
    folder = tmp_path_factory.mktemp("real-grid")
    write_grid(folder, rounds=20, source="real")
    return folder


@pytest.fixture(scope="session")
def mixed(write_grid: Callable[..., int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One row of the table in each kind of data, finished or not.

    cifar10/vgg real, seeds 0 and 1, and an unfinished seed 2 of one scheme; the same synthetic; cifar10/resnet real and
    unfinished; cinic10/vgg in part; speech_commands/vgg of another release.
    """
    folder = tmp_path_factory.mktemp("mixed")
    row = [("cifar10", "vgg", scheme) for scheme in SCHEMES]
    write_grid(folder, rounds=20, seeds=(0, 1), cells=row, source="real")
    write_grid(folder, rounds=20, seeds=(2,), cells=[("cifar10", "vgg", "max_common")], source="real", played=7)
    write_grid(folder, rounds=20, seeds=(0,), cells=[("cifar10", "resnet", "max_common")], source="real", played=5)
    write_grid(folder, rounds=20, seeds=(0,), cells=row, source="synthetic")
    part = [("cinic10", "vgg", scheme) for scheme in SCHEMES]
    write_grid(folder, rounds=20, seeds=(0,), cells=part, source="real-partial")
    spoken = [("speech_commands", "vgg", scheme) for scheme in SCHEMES]
    write_grid(folder, rounds=20, seeds=(0,), cells=spoken, source="real-other")
    return folder
