from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("flexifed", deadline=None)  # a test that is slow on a busy machine is not a failure
settings.load_profile("flexifed")
# The tests' operations are small: threads that wait for each other at each of them cost more time than they save,
# especially next to other test processes.
torch.set_num_threads(1)

# The doctest collector imports every conftest.py by its bare name, and confuses the second one with the first.
collect_ignore_glob = ["conftest.py", "*/conftest.py"]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Seed PyTorch's global generator, which dropout draws from, so that a test does not depend on those before it."""
    torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--data-dir",
        type=Path,
        default=None,
        help="folder with real data in the publishers' layouts (see `flexifed data`); default: FLEXIFED_DATA_DIR",
    )


@pytest.fixture(scope="session")
def data_dir(pytestconfig: pytest.Config) -> Path:
    """A folder with real data. Tests that need it are skipped if none is given, and fail if it is wrong."""
    folder = pytestconfig.getoption("--data-dir") or os.environ.get("FLEXIFED_DATA_DIR")
    if not folder:
        pytest.skip("needs real data: set their folder with --data-dir or FLEXIFED_DATA_DIR")
    return Path(folder)
