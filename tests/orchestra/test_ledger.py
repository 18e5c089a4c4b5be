"""How the command counts reports: which cells begin again, which are given up, and which have failed."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexifed.orchestra.ledger import PATIENCE, CellReport, Ledger
from flexifed.orchestra.placement import CellPlacement

ROOMIER = CellPlacement(clients=((0, 1, 2, 3),), cpus_per_actor=1, gpus_per_actor=0.5)


class RecordingObserver:
    """An observer that records its calls."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.reports: list[CellReport] = []

    def cell_started(self, name: str) -> None: ...

    def reported(self, report: CellReport) -> None:
        self.reports.append(report)

    def noted(self, message: str, name: str | None = None) -> None:
        self.notes.append(f"{name}: {message}")


@pytest.fixture
def observer() -> RecordingObserver:
    return RecordingObserver()


def make_ledger(observer: RecordingObserver, tmp_path: Path, **options: bool) -> Ledger:
    return Ledger(observer, {name: tmp_path / name for name in "ab"}, **options)


def lost(name: str = "a") -> CellReport:
    return CellReport(name, "lost", reason="the process of clients 0 to 3 is gone: why")


def played(round_index: int) -> CellReport:
    return CellReport("a", "playing", round_index, {"v1": 0.1})


def test_only_losses_in_a_row_without_a_new_round_count(observer: RecordingObserver, tmp_path: Path) -> None:
    ledger = make_ledger(observer, tmp_path)
    for round_index in range(10):  # every round is lost twice, and then continued
        ledger.heard(played(round_index))
        for _ in range(PATIENCE - 1):
            ledger.heard(lost())
            ledger.heard(played(max(0, round_index - 1)))  # a round that was played before is not progress
    assert not ledger.is_over_for_now("a")
    assert ledger.failures == {}
    assert len(observer.notes) == 10 * (PATIENCE - 1)
    ledger.heard(lost())
    assert ledger.is_over_for_now("a")
    assert ledger.failures == {
        "a": "lost 3 times in a row without a new round, the last time because "
        "the process of clients 0 to 3 is gone: why"
    }
    assert observer.reports[-1].state == "failed"
    log = (tmp_path / "a" / "log.txt").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in log[-2:]] == [
        "the process of clients 0 to 3 is gone: why; all its clients go back to the last checkpoint",
        f"failed: {ledger.failures['a']}",
    ]


def test_cells_are_counted_separately(observer: RecordingObserver, tmp_path: Path) -> None:
    ledger = make_ledger(observer, tmp_path)
    for _ in range(PATIENCE - 1):
        ledger.heard(lost("a"))
        ledger.heard(lost("b"))
    assert ledger.failures == {}
    assert not ledger.is_over_for_good("b")


@pytest.mark.parametrize(("retry", "roomier"), [(False, ROOMIER), (True, None), (False, None)])
def test_out_of_memory_is_a_failure_unless_it_can_be_tried_again(
    observer: RecordingObserver, tmp_path: Path, retry: bool, roomier: CellPlacement | None
) -> None:
    ledger = make_ledger(observer, tmp_path, retry_out_of_memory=retry)
    ledger.heard(CellReport("a", "out_of_memory", reason="client 3: CUDA out of memory", roomier=roomier))
    assert ledger.is_over_for_good("a")
    assert ledger.failures == {"a": "client 3: CUDA out of memory"}
    assert [report.state for report in observer.reports] == ["failed"]


def test_out_of_memory_is_tried_again_in_a_roomier_place(observer: RecordingObserver, tmp_path: Path) -> None:
    ledger = make_ledger(observer, tmp_path, retry_out_of_memory=True)
    ledger.heard(CellReport("a", "out_of_memory", reason="full", roomier=ROOMIER))
    assert ledger.is_over_for_now("a")
    assert not ledger.is_over_for_good("a")
    assert ledger.failures == {}
    assert observer.notes == [f"a: full; to be tried again: {ROOMIER}"]
    assert ledger.begin_again("a") == ROOMIER
    assert not ledger.is_over_for_now("a")
    assert ledger.begin_again("a") is None


def test_a_log_that_cannot_be_written_does_not_end_other_cells(observer: RecordingObserver, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("where the folder of its log would be")
    ledger = make_ledger(observer, tmp_path)
    for _ in range(PATIENCE):
        ledger.heard(lost())
    assert set(ledger.failures) == {"a"}
    assert len(observer.notes) == PATIENCE - 1
