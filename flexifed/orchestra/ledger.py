"""What the command knows of each cell while it runs: how far it is, how often it was lost, and how it ended."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import Literal, Protocol

from flexifed.errors import ResultsError
from flexifed.orchestra.placement import CellPlacement
from flexifed.results.runlog import add_line

PATIENCE = 3
"""A cell that loses processes so many times in a row, without a round that it had not played before, is given up."""

_REASON_WIDTH = 300

CellState = Literal["playing", "lost", "finished", "failed", "out_of_memory", "stopped"]


@dataclass(frozen=True)
class CellReport:
    """What the command hears of a cell: after each round, and when something happens to it.

    Attributes:
        name: of the cell's files.
        state: a cell that is lost begins again at once; the last four end it for now.
        round_index: the round that was played, or -1.
        accuracies: by version, in that round.
        reason: why it is lost or has failed.
        roomier: where it could be tried again, if it is out of memory.
    """

    name: str
    state: CellState
    round_index: int = -1
    accuracies: Mapping[str, float] | None = None
    reason: str = ""
    roomier: CellPlacement | None = None

    @property
    def ends(self) -> bool:
        """Whether the cell plays no more rounds for now."""
        return self.state not in ("playing", "lost")


class Observer(Protocol):
    """Whoever wants to hear how the grid goes on."""

    def cell_started(self, name: str) -> None:
        """A cell has got its processes."""
        ...

    def round_played(self, report: CellReport) -> None:
        """A round has ended, or a cell has."""
        ...

    def noted(self, message: str, name: str | None = None) -> None:
        """Something has happened that a person should know, to a cell or to all."""
        ...


class Ledger:
    """Keeps count for one command; a later command counts anew.

    Args:
        observer: is told of all that is written down.
        run_folders: of each cell, by name; their logs get what the cells' own processes can't write any more.
        retry_out_of_memory: whether a cell that is out of memory is not over, if there is a roomier place.
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
        """Write down what a cell reports."""
        if report.state == "lost":
            self._lost(report)
            return
        if report.state == "out_of_memory":
            if self._retry_out_of_memory and report.roomier:
                self._note(report.name, f"{report.reason}; to be tried again: {report.roomier}")
            else:
                report = replace(report, state="failed")
        self._last[report.name] = report
        if report.round_index > self._furthest.get(report.name, -1):
            self._furthest[report.name] = report.round_index
            self._losses[report.name] = 0
        if report.state != "out_of_memory":
            self._observer.round_played(report)

    def has_ended(self, name: str) -> bool:
        """Whether a cell plays no more rounds for now."""
        return name in self._last and self._last[name].ends

    def is_over(self, name: str) -> bool:
        """Whether a cell plays no more rounds at all under this command."""
        return self.has_ended(name) and self._last[name].state != "out_of_memory"

    def begin_again(self, name: str) -> CellPlacement | None:
        """Forget how a cell ended; returns where it is tried again, if that is another place."""
        last = self._last.pop(name, None)
        return last.roomier if last else None

    @property
    def failures(self) -> dict[str, str]:
        """The cells that have failed, and why."""
        return {name: report.reason for name, report in self._last.items() if report.state == "failed"}

    def _lost(self, report: CellReport) -> None:
        losses = self._losses[report.name] = self._losses.get(report.name, 0) + 1
        if losses < PATIENCE:
            reason = shorten(report.reason, _REASON_WIDTH)  # Ray adds lists of possible causes
            self._note(report.name, f"{reason}; all its clients go back to the last checkpoint")
            return
        reason = f"lost {losses} times in a row without a new round, the last time because {report.reason}"
        self._add_line(report.name, f"failed: {reason}")
        self.heard(CellReport(report.name, "failed", reason=reason))

    def _note(self, name: str, message: str) -> None:
        self._add_line(name, message)
        self._observer.noted(message, name)

    def _add_line(self, name: str, message: str) -> None:
        """Into the cell's log, if that can still be written: whoever watches hears of it in any case."""
        with suppress(ResultsError):
            add_line(self._run_folders[name], message)
