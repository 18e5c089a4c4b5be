"""Progress bars for what takes minutes: on stderr, gone when it is done, and only where that is a terminal."""

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
    """For bytes that come: how many of how many, how fast, how long still."""
    return _bar(DownloadColumn(), TransferSpeedColumn())


def count_bar() -> Progress:
    """For things that are counted: how many of how many, how long still."""
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
