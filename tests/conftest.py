from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("flexifed", deadline=None)  # a busy machine is no defect
settings.load_profile("flexifed")
# Threads that wait for each other at every small operation cost more than they bring, above all beside another process
# of tests.
torch.set_num_threads(1)

# Looking for doctests imports a conftest.py by its bare name, and takes the second one for the first.
collect_ignore_glob = ["conftest.py", "*/conftest.py"]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """What a test draws from PyTorch's global generator, as dropout does, does not depend on the tests before it."""
    torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--data-dir",
        type=Path,
        default=None,
        help="folder with real data in their publishers' layouts (see `flexifed data`); default: FLEXIFED_DATA_DIR",
    )


@pytest.fixture(scope="session")
def data_dir(pytestconfig: pytest.Config) -> Path:
    """A folder with real data. Tests that need one are skipped where none is named, and fail where it is wrong."""
    named = pytestconfig.getoption("--data-dir") or os.environ.get("FLEXIFED_DATA_DIR")
    if not named:
        pytest.skip("needs real data: name their folder with --data-dir or in FLEXIFED_DATA_DIR")
    return Path(named)
