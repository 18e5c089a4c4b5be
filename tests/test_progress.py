"""What a person is told while a grid runs, by a clock of the test's own."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from rich.console import Console

from flexifed.orchestra.ledger import CellReport, CellState
from flexifed.progress import GridProgress

ROUNDS = 502
Tell = Callable[..., str]


@pytest.fixture
def tell(monkeypatch: pytest.MonkeyPatch) -> Tell:
    """Tells of a round some seconds after the last one; returns the line that was printed last."""
    now, printed = [1000.0], io.StringIO()
    monkeypatch.setattr("flexifed.progress.time.monotonic", lambda: now[0])
    progress = GridProgress(Console(file=printed), ROUNDS, {"one": "cell one", "two": "cell two"})

    def later(
        seconds: float, name: str, round_index: int | None, state: CellState = "playing", reason: str = ""
    ) -> str:
        now[0] += seconds
        progress.reported(CellReport(name, state, round_index, reason=reason))
        return (printed.getvalue().splitlines() or [""])[-1]

    return later


def test_time_is_left_for_the_rounds_of_all_cells_at_the_pace_so_far(tell: Tell) -> None:
    tell(30, "one", 0)
    tell(15, "one", 1)
    assert tell(15, "one", 2) == "cell one: round 2/502    (0/2 cells, left: 4 h 10 min)", "500 and 503 rounds of 15 s"


def test_rounds_that_were_played_before_say_nothing_about_the_pace(tell: Tell) -> None:
    tell(30, "one", 400)
    assert tell(15, "one", 401).endswith("(0/2 cells, left: 2 h 31 min)"), "101 and 503 rounds of 15 s"


def test_a_cell_that_has_failed_or_ended_has_no_rounds_left(tell: Tell) -> None:
    tell(30, "one", 0)
    tell(10, "one", 1)
    assert tell(0, "two", None, "failed", "Traceback\nValueError: why") == "cell two: FAILED: ValueError: why"
    assert tell(10, "one", 2).endswith("(1/2 cells, left: 1 h 23 min)"), "500 rounds of 10 s"
    assert tell(0, "one", ROUNDS, "finished").endswith("done    (2/2 cells, left: 0 s)")


def test_a_cell_that_is_lost_has_its_rounds_to_play_again(tell: Tell) -> None:
    tell(30, "one", 0)
    tell(10, "one", 300)
    tell(0, "one", None, "lost", "a process is gone")
    assert tell(10, "one", 301).endswith("left: 1 h 57 min)"), "201 and 503 rounds of 10 s"
