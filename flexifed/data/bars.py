"""Progress bars for work that takes minutes: on stderr if it is a terminal, and removed at the end."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


def byte_bar() -> Progress:
    """Make a bar for a download: bytes so far and in total, speed, time remaining."""
    return _bar(DownloadColumn(), TransferSpeedColumn())


def count_bar() -> Progress:
    """Make a bar for items: number so far and in total, time remaining."""
    return _bar(MofNCompleteColumn())


def _bar(*columns: ProgressColumn) -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
