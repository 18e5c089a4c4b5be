"""What is printed while a grid runs, with a fake clock."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest

from flexifed.launch import plain_console
from flexifed.orchestra.ledger import CellReport, CellState
from flexifed.progress import GridProgress

ROUNDS = 502
Report = Callable[..., str]


@pytest.fixture
def report(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Report:
    """Reports a round some seconds after the last report; returns the last line that was printed."""
    next_rounds = getattr(request, "param", None)
    now, printed = [1000.0], io.StringIO()
    monkeypatch.setattr("flexifed.progress.time.monotonic", lambda: now[0])
    progress = GridProgress(plain_console(printed), ROUNDS, {"one": "cell one", "two": "cell two"}, next_rounds)

    def report_after(
        seconds: float, name: str, round_index: int | None, state: CellState = "playing", reason: str = ""
    ) -> str:
        now[0] += seconds
        progress.reported(CellReport(name, state, round_index, reason=reason, at=now[0]))
        return (printed.getvalue().splitlines() or [""])[-1]

    return report_after


def test_the_time_left_counts_the_rounds_of_all_cells_at_the_pace_so_far(report: Report) -> None:
    report(30, "one", 0)
    report(15, "one", 1)
    assert report(15, "one", 2) == "cell one: round 2/502    (0/2 cells, left: 4 h 10 min)", (
        "500 and 503 rounds of 15 s"
    )


def test_rounds_of_an_earlier_command_do_not_count_for_the_pace(report: Report) -> None:
    report(30, "one", 400)
    assert report(15, "one", 401).endswith("(0/2 cells, left: 2 h 31 min)"), "101 and 503 rounds of 15 s"


@pytest.mark.parametrize("report", [{"one": 400, "two": 490}], indirect=True)
def test_cells_that_wait_to_be_resumed_have_only_the_rounds_after_their_checkpoints(report: Report) -> None:
    report(30, "one", 400)
    assert report(60, "one", 401).endswith("(0/2 cells, left: 1 h 54 min)"), "101 and 13 rounds of a minute"


def test_a_cell_that_stops_keeps_what_it_has_played(report: Report) -> None:
    report(30, "one", 400)
    report(60, "one", 401)
    line = report(0, "one", None, "stopped")
    assert line == "cell one: stopped    (0/2 cells, left: 10 h 4 min)", "101 and 503 rounds of a minute"


def test_a_failed_or_finished_cell_has_no_rounds_left(report: Report) -> None:
    report(30, "one", 0)
    report(10, "one", 1)
    assert report(0, "two", None, "failed", "Traceback\nValueError: why") == "cell two: FAILED: ValueError: why"
    assert report(10, "one", 2).endswith("(1/2 cells, left: 1 h 23 min)"), "500 rounds of 10 s"
    assert report(0, "one", ROUNDS, "finished").endswith("done    (2/2 cells, left: 0 s)")


def test_a_lost_cell_has_to_play_its_rounds_again(report: Report) -> None:
    report(30, "one", 0)
    report(10, "one", 300)
    report(0, "one", None, "lost", "a process is gone")
    assert report(10, "one", 301).endswith("left: 1 h 57 min)"), "201 and 503 rounds of 10 s"


def test_reports_that_come_late_do_not_turn_the_pace_around(report: Report) -> None:
    report(30, "one", 0)
    report(20, "one", 1)
    report(-21, "two", 0)
    assert report(45, "one", 2).endswith("left: 4 h 10 min)"), "500 and 502 rounds of 15 s: three in 45 s"
