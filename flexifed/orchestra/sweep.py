"""A grid of cells as Ray Tune trials: each trial is a cell's driver, with the cell's client actors in its own group.

Tune schedules; it keeps nothing. Processes are kept from cell to cell, because starting them is what costs.

Whatever is lost, the way back is the same: the cell begins again, and so goes on from its last checkpoint. A client's
process that dies is replaced where it was. With the driver's process or a node the whole trial goes, and Tune starts it
anew in a new group.
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
from flexifed.files import explained
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
    """Tune pickles what it is given into a state from which nothing is ever restored."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Starts(_NotKept, tune.Callback):
    """Passes on that trials have got their processes."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._observer.cell_started(trial.config["placed"].run.name)


class _Reports(_NotKept, tune.Stopper):
    """Writes down what trials report, and stops those that are given up."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        report: CellReport = result["report"]
        self._ledger.heard(report)
        return self._ledger.is_over_for_now(report.name)

    def stop_all(self) -> bool:
        return False


class _Scheduler(_NotKept, FIFOScheduler):
    """First come, first served; but no cell starts that must not, and none waits for what will not come."""

    def __init__(self, placement: CellPlacement, ledger: Ledger, stop: Callable[[], bool]) -> None:
        super().__init__()
        self._placement = placement
        self._ledger = ledger
        self._stop = stop
        self._look_after = 0.0

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Hear that a trial's own process is gone, or the place for its actors. Tune will start it anew."""
        name = trial.config["placed"].run.name
        line = _last_line(trial.error_file)
        _, told_by_driver, reason = line.partition(f"{GroupLostError.__name__}: ")
        self._ledger.heard(
            CellReport(name, "lost", reason=reason if told_by_driver else f"its driver's process is gone: {line}")
        )

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """Tune asks several times a second."""
        has_room = self._has_room()
        stop = self._stop()
        for trial in list(tune_controller.get_live_trials()):
            waits = trial.status == Trial.PENDING
            if not has_room or (waits and (stop or self._ledger.is_over_for_now(trial.config["placed"].run.name))):
                tune_controller.stop_trial(trial)
        return super().choose_trial_to_run(tune_controller)

    def _has_room(self) -> bool:
        """Whether these cells still fit the cluster, were it empty. Ray would let them wait without a word."""
        now = time.monotonic()
        if now < self._look_after:
            return True
        self._look_after = now + NODES_EVERY_S
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
        cells: with placements that fit the cluster.
        observer: hears of every round.
        place: places a cell anew, when the cluster has lost nodes.
        max_concurrent: at most so many at a time; None for no bound.
        retry_out_of_memory: try cells whose clients' GPUs are full again, with half as many clients at a time on each.
        stop: asked several times a second; True lets running cells stop after their round, and starts no others.

    Returns:
        For each cell that failed, by name, why. The others are complete, unless the grid was stopped.

    Raises:
        ResourceError: the cluster has lost nodes, and no longer holds a cell.
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
            for same_shape in by_shape.values():  # Tune reuses a process only for a trial that asks for the same
                _run_tune(same_shape, observer, ledger, max_concurrent or 0, stopping)
            unfinished = [_roomier(cell, ledger) for cell in unfinished if not ledger.is_over_for_good(cell.run.name)]
            unfinished = _placed_anew(unfinished, place, observer, stopping)
    return ledger.failures


def _run_tune(
    cells: Sequence[PlacedRun], observer: Observer, ledger: Ledger, max_concurrent: int, stopping: Callable[[], bool]
) -> None:
    """Let Tune run cells of one shape. A trial that it gives up leaves its cell without a last word.

    Raises:
        ResourceError: Tune can't write its own state, which it needs beside the results.
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
            f"Ray Tune can't write to {scratch} ({error.strerror or error}): make room there, or name another folder "
            "by TMPDIR; then the same command goes on"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _make_scratch() -> Path:
    """A folder for Tune's state, with this process's number; those of processes that were killed are removed."""
    for left in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*"):
        with suppress(ValueError, OSError):  # named by someone else, or somebody else's
            if not _is_alive(int(left.name.removeprefix(_SCRATCH).split("-")[0])):
                shutil.rmtree(left)
    return Path(tempfile.mkdtemp(prefix=f"{_SCRATCH}{os.getpid()}-"))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _roomier(cell: PlacedRun, ledger: Ledger) -> PlacedRun:
    """The cell as it is tried again: with more of a GPU for each process, where it ran out of memory."""
    roomier = ledger.begin_again(cell.run.name)
    return replace(cell, placement=roomier) if roomier else cell


def _placed_anew(
    cells: Sequence[PlacedRun], place: Place, observer: Observer, stopping: Callable[[], bool]
) -> list[PlacedRun]:
    """The cells, with other placements for those that the cluster has lost too many nodes for.

    Raises:
        ResourceError: it holds some of them in no way, and no node came back in time.
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
            if moved := [one for one, before in zip(placed, cells, strict=True) if one.placement != before.placement]:
                observer.noted(f"nodes are gone: cells go on with other places; a cell is {moved[0].placement}")
            return placed
    return []


@contextmanager
def _stop_files(files: Set[Path], stop: Callable[[], bool], observer: Observer) -> Iterator[Callable[[], bool]]:
    """Pass a request to stop on to running cells, on whatever node: their results folders are what all of them see."""

    def stopping() -> bool:
        """Whether to stop; the first time that it is so, the cells are told."""
        if not stop():
            return False
        if missing := [file for file in files if not file.exists()]:
            for file in missing:
                with explained(file):
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
    """What Tune has noted last of what went wrong with a trial."""
    try:
        return Path(path).read_text(errors="replace").strip().splitlines()[-1]
    except (OSError, IndexError):
        return "Ray gives no reason"
