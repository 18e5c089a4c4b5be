"""Shared by the benchmarks: a description of the machine and versions, median and spread, an observer of a grid."""

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
    """Describe the machine: its type, CPUs, the instruction set that PyTorch uses, load over 1, 5 and 15 minutes."""
    import torch

    load = ", ".join(f"{average:.1f}" for average in os.getloadavg())
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, {instructions}, load {load}"


def versions(*names: str) -> dict[str, str]:
    """The versions of Python and of installed packages. flexifed itself may be on the path without being installed."""
    return {"python": platform.python_version()} | {name: _version(name) for name in names}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        if name != "flexifed":
            raise
        return "not installed"


def spread(values: Sequence[float]) -> dict[str, float]:
    """The number of values, their median, minimum and maximum."""
    return {"n": len(values), "median": statistics.median(values), "min": min(values), "max": max(values)}


class RoundObserver:
    """An `Observer` for cells that only play rounds; subclasses define `reported`."""

    def cell_started(self, name: str) -> None:
        """Ignore it."""

    def reported(self, report: CellReport) -> None:
        """A cell has played a round."""
        raise NotImplementedError

    def noted(self, message: str, name: str | None = None) -> None:
        """Print the message, which no benchmark expects."""
        print(message, file=sys.stderr)
