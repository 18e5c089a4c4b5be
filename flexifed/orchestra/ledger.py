"""What the command knows about each cell: the last round it played, how often it was lost, and how it ended."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from textwrap import shorten
from typing import Literal, Protocol

from flexifed.errors import ResultsError
from flexifed.orchestra.placement import CellPlacement
from flexifed.results.runlog import add_line

PATIENCE = 3
"""A cell that loses processes this many times in a row, without playing a new round in between, is given up."""

_REASON_WIDTH = 300

CellState = Literal["playing", "lost", "finished", "failed", "out_of_memory", "stopped"]


@dataclass(frozen=True)
class CellReport:
    """What a cell reports to the command: after each round, and when something happens to it.

    Attributes:
        name: the name of the cell's files.
        state: a cell that is lost begins again at once; the last four states end it for now.
        round_index: the round that was played; None if the report is not about a round.
        accuracies: the accuracy of each version in that round.
        reason: why the cell is lost or has failed.
        roomier: a placement in which the cell can be tried again, if it is out of memory.
        notes: what the user should know besides.
        at: the Unix time of what is reported, by the clock of the cell's driver.
    """

    name: str
    state: CellState
    round_index: int | None = None
    accuracies: Mapping[str, float] | None = None
    reason: str = ""
    roomier: CellPlacement | None = None
    notes: Sequence[str] = ()
    at: float = field(default_factory=time.time)

    @property
    def is_over_for_now(self) -> bool:
        """Whether the cell plays no more rounds for now."""
        return self.state not in ("playing", "lost")


class Observer(Protocol):
    """Follows the progress of a grid."""

    def cell_started(self, name: str) -> None:
        """A cell has got its processes."""
        ...

    def reported(self, report: CellReport) -> None:
        """A cell has played a round, has finished, failed or stopped. Reports may come up to a second late."""
        ...

    def noted(self, message: str, name: str | None = None) -> None:
        """Something has happened, to one cell or to the grid, that the user should know."""
        ...


class Ledger:
    """Keeps the state of every cell for one command; a later command counts from scratch.

    Args:
        observer: is told about every change.
        run_folders: each cell's folder, by name; its log gets what the cell's own processes can no longer write.
        retry_out_of_memory: whether a cell that is out of memory is tried again, if there is a roomier placement.
    """

    def __init__(
        self, observer: Observer, run_folders: Mapping[str, Path], *, retry_out_of_memory: bool = False
    ) -> None:
        self._last: dict[str, CellReport] = {}
        self._retry_out_of_memory = retry_out_of_memory
        self._observer = observer
        self._run_folders = run_folders
        self._furthest: dict[str, int] = {}
        self._losses: dict[str, int] = {}

    def heard(self, report: CellReport) -> None:
        """Record a cell's report."""
        for note in report.notes:
            self._observer.noted(note, report.name)
        if report.state == "lost":
            self._lost(report)
            return
        if report.state == "out_of_memory":
            if self._retry_out_of_memory and report.roomier:
                self._note(report.name, f"{report.reason}; to be tried again: {report.roomier}")
            else:
                report = replace(report, state="failed")
        self._last[report.name] = report
        if report.round_index is not None and report.round_index > self._furthest.get(report.name, -1):
            self._furthest[report.name] = report.round_index
            self._losses[report.name] = 0
        if report.state != "out_of_memory":
            self._observer.reported(report)

    def is_over_for_now(self, name: str) -> bool:
        """Whether a cell plays no more rounds until `begin_again`."""
        return name in self._last and self._last[name].is_over_for_now

    def is_over_for_good(self, name: str) -> bool:
        """Whether a cell plays no more rounds under this command."""
        return self.is_over_for_now(name) and self._last[name].state != "out_of_memory"

    def begin_again(self, name: str) -> CellPlacement | None:
        """Forget how a cell ended; returns the placement in which it is tried again, if that is another one."""
        last = self._last.pop(name, None)
        return last.roomier if last else None

    @property
    def failures(self) -> dict[str, str]:
        """The reason of each cell that has failed, by name."""
        return {name: report.reason for name, report in self._last.items() if report.state == "failed"}

    def _lost(self, report: CellReport) -> None:
        losses = self._losses[report.name] = self._losses.get(report.name, 0) + 1
        if losses < PATIENCE:
            reason = shorten(report.reason, _REASON_WIDTH)  # Ray appends lists of possible causes
            self._note(report.name, f"{reason}; all its clients go back to the last checkpoint")
            return
        reason = f"lost {losses} times in a row without a new round, the last time because {report.reason}"
        self._add_line(report.name, f"failed: {reason}")
        self.heard(CellReport(report.name, "failed", reason=reason))

    def _note(self, name: str, message: str) -> None:
        self._add_line(name, message)
        self._observer.noted(message, name)

    def _add_line(self, name: str, message: str) -> None:
        """Add a line to the cell's log, if it can still be written; the observer hears about it in any case."""
        with suppress(ResultsError):
            add_line(self._run_folders[name], message)
