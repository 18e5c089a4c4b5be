"""What the benchmarks have in common: the machine, the versions, a median with its spread, an observer of a grid."""

from __future__ import annotations

import os
import platform
import statistics
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flexifed.orchestra.ledger import CellReport


def machine() -> str:
    """The kind of machine, its CPUs, the instructions that PyTorch uses, and its load over 1, 5 and 15 minutes."""
    import torch

    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, {instructions}, load {load}"


def versions(*names: str) -> dict[str, str]:
    """Python's version, and those of installed packages. This one may also lie on the path without being installed."""
    return {"python": platform.python_version()} | {name: _version(name) for name in names}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        if name != "flexifed":
            raise
        return "not installed"


def spread(values: Sequence[float]) -> dict[str, float]:
    """How many values there are, their median, the smallest and the largest."""
    return {"n": len(values), "median": statistics.median(values), "min": min(values), "max": max(values)}


class RoundObserver:
    """An `Observer` of cells that only play rounds; subclasses define `reported`."""

    def cell_started(self, name: str) -> None:
        """Ignore it."""

    def reported(self, report: CellReport) -> None:
        """A cell has played a round."""
        raise NotImplementedError

    def noted(self, message: str, name: str | None = None) -> None:
        """Print what should not have happened."""
        print(message, file=sys.stderr)
