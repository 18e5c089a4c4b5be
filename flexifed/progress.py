"""The progress of a grid: a live display in a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from flexifed.orchestra.ledger import CellReport
from flexifed.wording import accuracy_text, duration

_LINE_EVERY_S = 10.0


class GridProgress:
    """Shows the progress of a grid's cells. An `Observer`.

    Args:
        console: where to show it.
        rounds: number of rounds of training of every cell.
        cells: the cells' labels, by the names of their files.
        next_rounds: the rounds with which cells resume; those left out begin with round 0.
    """

    def __init__(
        self, console: Console, rounds: int, cells: Mapping[str, str], next_rounds: Mapping[str, int] | None = None
    ) -> None:
        self._console = console
        self._rounds = rounds
        self._labels = cells
        self._left = {name: rounds + 1 - (next_rounds or {}).get(name, 0) for name in cells}  # rounds to play
        self._first_round, self._last_round = math.inf, -math.inf  # when they were played
        self._reported = 0  # rounds
        self._ended = 0
        self._last_line: dict[str, float] = {}
        self._bars: dict[str, TaskID] = {}
        self._live = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        whole = len(cells) * (rounds + 1)
        self._whole = self._live.add_task(
            "all rounds", total=whole, completed=whole - sum(self._left.values()), note=""
        )

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the live display for the length of a `with` block."""
        if self._console.is_terminal:
            with self._live:
                yield
        else:
            yield

    def cell_started(self, name: str) -> None:
        """See `Observer.cell_started`."""
        if name not in self._bars:
            self._bars[name] = self._live.add_task(
                self._labels[name],
                total=self._rounds + 1,
                completed=self._rounds + 1 - self._left[name],
                note="starting",
            )
            self._last_line[name] = time.monotonic()

    def reported(self, report: CellReport) -> None:
        """See `Observer.reported`."""
        self.cell_started(report.name)
        bar = self._bars[report.name]
        if report.state == "failed":
            self._left[report.name] = 0
        elif report.round_index is not None:
            self._left[report.name] = self._rounds - report.round_index
        self._reported += report.round_index is not None
        self._ended += report.state in ("finished", "failed")
        self._first_round = min(self._first_round, report.at)  # a cell's reports may come after later ones of another
        self._last_round = max(self._last_round, report.at)
        note = accuracy_text(report.accuracies or {})
        whole = len(self._left) * (self._rounds + 1) - sum(self._left.values())
        self._live.update(bar, completed=self._rounds + 1 - self._left[report.name], note=note)
        self._live.update(self._whole, completed=whole, note=f"left: {self._time_left()}")
        if report.is_over_for_now:
            self._live.update(bar, visible=False)
        self._print_line(report, note)

    def noted(self, message: str, name: str | None = None, style: str = "yellow") -> None:
        """See `Observer.noted`."""
        label = f"{self._labels[name]}: " if name else ""
        self._console.print(label + message, style=style, soft_wrap=True)

    def _print_line(self, report: CellReport, note: str) -> None:
        now = time.monotonic()
        label = self._labels[report.name]
        if report.state == "failed":
            self.noted(f"FAILED: {report.reason.strip().splitlines()[-1]}", report.name, style="red")
        elif report.is_over_for_now or (
            not self._console.is_terminal and now - self._last_line[report.name] >= _LINE_EVERY_S
        ):
            words = {"finished": "done", "stopped": "stopped"}
            state = words.get(report.state, f"round {report.round_index}/{self._rounds}")
            ended = f"{self._ended}/{len(self._labels)} cells"
            self._console.print(f"{label}: {state}  {note}  ({ended}, left: {self._time_left()})", soft_wrap=True)
            self._last_line[report.name] = now

    def _time_left(self) -> str:
        """Estimate the remaining time from all rounds but the first, most of which is the start of processes."""
        if self._reported < 2:
            return "?"
        seconds_per_round = (self._last_round - self._first_round) / (self._reported - 1)
        return duration(seconds_per_round * sum(self._left.values()))
