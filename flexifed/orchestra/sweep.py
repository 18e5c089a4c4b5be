"""A grid of cells as Ray Tune trials: each trial is a cell's driver, whose placement group holds its client actors.

Tune schedules, and stores nothing. Processes are reused from cell to cell, because starting them is expensive.

Whatever is lost, recovery is the same: the cell begins again, which resumes from its last checkpoint. If a client's
process dies, processes start again in the same placement group. If the driver's process or a node dies, the whole trial
ends, and Tune starts it again in a new group.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune import CheckpointConfig, FailureConfig, RunConfig
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler

from flexifed.cells.run import CellRun
from flexifed.errors import ResourceError
from flexifed.files import writing
from flexifed.orchestra import cluster
from flexifed.orchestra.actors import GroupLostError
from flexifed.orchestra.ledger import CellReport, Ledger, Observer
from flexifed.orchestra.placement import CellPlacement, Resources, holds
from flexifed.orchestra.trial import CellTrial, PlacedRun
from flexifed.results.store import ResultsFolder

NODES_EVERY_S = 5.0
WAIT_FOR_NODES_S = 600.0
_SCRATCH = "flexifed-tune-"

Place = Callable[[CellRun, Sequence[Resources]], CellPlacement]


class _NotKept:
    """Is pickled empty: Tune pickles its callbacks into a state that is never restored here."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Starts(_NotKept, tune.Callback):
    """Tells the observer when a trial has got its processes."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._observer.cell_started(trial.config["placed"].run.name)


class _Reports(_NotKept, tune.Stopper):
    """Records the trials' reports, and stops trials whose cell is over."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        reports: Sequence[CellReport] = result["reports"]
        for report in reports:
            self._ledger.heard(report)
        return self._ledger.is_over_for_now(reports[-1].name)

    def stop_all(self) -> bool:
        return False


class _Scheduler(_NotKept, FIFOScheduler):
    """First come, first served, except that no cell starts that should not, and none waits for lost resources."""

    def __init__(self, placement: CellPlacement, ledger: Ledger, stop: Callable[[], bool]) -> None:
        super().__init__()
        self._placement = placement
        self._ledger = ledger
        self._stop = stop
        self._next_check = 0.0

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Record that a trial has lost its own process or its actors' placement group. Tune starts it again."""
        name = trial.config["placed"].run.name
        line = _last_line(trial.error_file)
        _, is_from_driver, reason = line.partition(f"{GroupLostError.__name__}: ")
        self._ledger.heard(
            CellReport(name, "lost", reason=reason if is_from_driver else f"its driver's process is gone: {line}")
        )

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """Stop trials that should not wait or start any more. Tune calls this several times a second."""
        has_room = self._has_room()
        stop = self._stop()
        for trial in list(tune_controller.get_live_trials()):
            waits = trial.status == Trial.PENDING
            if not has_room or (waits and (stop or self._ledger.is_over_for_now(trial.config["placed"].run.name))):
                tune_controller.stop_trial(trial)
        return super().choose_trial_to_run(tune_controller)

    def _has_room(self) -> bool:
        """Whether these cells would still fit the cluster if it were empty. Ray would let them wait silently."""
        now = time.monotonic()
        if now < self._next_check:
            return True
        self._next_check = now + NODES_EVERY_S
        return holds(cluster.nodes(), self._placement)


def run_grid(
    cells: Sequence[PlacedRun],
    observer: Observer,
    *,
    place: Place,
    max_concurrent: int | None = None,
    retry_out_of_memory: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, str]:
    """Run cells, as many at a time as the cluster holds. Ray must be connected; see `flexifed.orchestra.cluster`.

    Args:
        cells: the cells, with placements that fit the cluster.
        observer: is told about every round.
        place: returns another placement for a cell when the cluster has lost nodes.
        max_concurrent: the maximum number of cells at a time; None for no limit.
        retry_out_of_memory: whether to retry cells whose GPUs were full, with half as many clients at a time on each.
        stop: is called several times a second; once it returns True, running cells stop after their round, and no
            others start.

    Returns:
        The reason of each cell that failed, by name. The others are complete, unless the grid was stopped.

    Raises:
        ResourceError: the cluster has lost nodes, and can no longer hold a cell.
    """
    folders = {cell.run.name: ResultsFolder(cell.run.results) for cell in cells}
    run_folders = {name: folder.run_folder(name) for name, folder in folders.items()}
    ledger = Ledger(observer, run_folders, retry_out_of_memory=retry_out_of_memory)
    unfinished = list(cells)
    with _stop_files({folder.stop_file for folder in folders.values()}, stop, observer) as stopping:
        while unfinished and not stopping():
            by_shape: dict[tuple[object, ...], list[PlacedRun]] = {}
            for cell in unfinished:
                bundles = cell.placement.bundles
                by_shape.setdefault(tuple(tuple(sorted(bundle.items())) for bundle in bundles), []).append(cell)
            for same_shape in by_shape.values():  # Tune reuses processes only for trials with equal bundles
                _run_tune(same_shape, observer, ledger, max_concurrent or 0, stopping)
            unfinished = [_for_retry(cell, ledger) for cell in unfinished if not ledger.is_over_for_good(cell.run.name)]
            unfinished = _fitted_to_cluster(unfinished, place, observer, stopping)
    return ledger.failures


def _run_tune(
    cells: Sequence[PlacedRun], observer: Observer, ledger: Ledger, max_concurrent: int, stopping: Callable[[], bool]
) -> None:
    """Let Tune run cells of one shape. A cell whose trial Tune gives up has no final report.

    Raises:
        ResourceError: Tune can't write its own state, which it keeps apart from the results.
    """
    scratch = _make_scratch()
    try:
        tune.Tuner(
            tune.with_resources(CellTrial, tune.PlacementGroupFactory(cells[0].placement.bundles)),
            param_space={"placed": tune.grid_search(list(cells))},
            tune_config=tune.TuneConfig(
                reuse_actors=True,
                max_concurrent_trials=max_concurrent,
                scheduler=_Scheduler(cells[0].placement, ledger, stopping),
                trial_dirname_creator=lambda trial: str(trial.trial_id),
            ),
            run_config=RunConfig(
                name="grid",
                storage_path=str(scratch),
                verbose=0,
                stop=_Reports(ledger),
                callbacks=[_Starts(observer)],
                failure_config=FailureConfig(max_failures=-1),  # the ledger counts
                checkpoint_config=CheckpointConfig(checkpoint_at_end=False),
            ),
        ).fit()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        raise ResourceError(
            f"Ray Tune can't write to {scratch} ({error.strerror or error}): make room there, or set TMPDIR to "
            "another folder; then run the same command again to resume"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _make_scratch() -> Path:
    """Make a folder for Tune's state, named after this process, and remove those of processes that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*"):
        with suppress(ValueError, OSError):  # another program's name, or another user's folder
            if not _is_alive(int(folder.name.removeprefix(_SCRATCH).split("-")[0])):
                shutil.rmtree(folder)
    return Path(tempfile.mkdtemp(prefix=f"{_SCRATCH}{os.getpid()}-"))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _for_retry(cell: PlacedRun, ledger: Ledger) -> PlacedRun:
    """The cell as it is tried again: in a roomier placement, if it ran out of memory."""
    roomier = ledger.begin_again(cell.run.name)
    return replace(cell, placement=roomier) if roomier else cell


def _fitted_to_cluster(
    cells: Sequence[PlacedRun], place: Place, observer: Observer, stopping: Callable[[], bool]
) -> list[PlacedRun]:
    """The cells, with new placements for those that the cluster can no longer hold, because it has lost nodes.

    Raises:
        ResourceError: no placement of some cell fits, and no node came back in time.
    """
    wait_until: float | None = None
    with ExitStack() as demands:
        while not stopping():
            nodes = cluster.nodes()
            try:
                placed = [
                    cell if holds(nodes, cell.placement) else replace(cell, placement=place(cell.run, nodes))
                    for cell in cells
                ]
            except ResourceError as error:
                if wait_until is None:
                    wait_until = time.monotonic() + WAIT_FOR_NODES_S
                    observer.noted(f"nodes are gone: {error}; waiting {WAIT_FOR_NODES_S / 60:g} minutes for more")
                    demands.enter_context(cluster.demand(cells[0].placement.bundles))
                elif time.monotonic() > wait_until:
                    raise
                time.sleep(1.0)
                continue
            if moved := [new for new, old in zip(placed, cells, strict=True) if new.placement != old.placement]:
                observer.noted(f"nodes are gone: cells continue in new placements; a cell is now {moved[0].placement}")
            return placed
    return []


@contextmanager
def _stop_files(files: Set[Path], stop: Callable[[], bool], observer: Observer) -> Iterator[Callable[[], bool]]:
    """Pass a request to stop to running cells by files in their results folders, which all nodes see."""

    def stopping() -> bool:
        """Whether to stop. Create the files when it is first True."""
        if not stop():
            return False
        if missing := [file for file in files if not file.exists()]:
            for file in missing:
                with writing(file):
                    file.touch()
            observer.noted("stopping after the round, with a checkpoint; Ctrl-C again stops at once")
        return True

    _remove(files)
    try:
        yield stopping
    finally:
        _remove(files)


def _remove(files: Set[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)


def _last_line(path: str) -> str:
    """The last line of the error that Tune has recorded for a trial."""
    try:
        return Path(path).read_text(errors="replace").strip().splitlines()[-1]
    except (OSError, IndexError):
        return "Ray gives no reason"
