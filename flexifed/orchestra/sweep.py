"""A grid of cells as Ray Tune trials: each trial is a cell's driver, with the cell's client actors in its own group.

Tune schedules; it keeps nothing. Processes are kept from cell to cell, because starting them is what costs.

Whatever is lost, the way back is the same: the cell begins again, and so goes on from its last checkpoint. A client's
process that dies is replaced where it was. With the driver's process or a node the whole trial goes, and Tune starts it
anew in a new group.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune import CheckpointConfig, FailureConfig, RunConfig
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler

from flexifed.errors import DeviceMemoryError, FlexifedError, ResourceError
from flexifed.orchestra import cluster
from flexifed.orchestra.actors import ActorHosts, GroupLostError, LostError
from flexifed.orchestra.cell import CellRun, CellSession, accuracy_by_version
from flexifed.orchestra.ledger import CellReport, CellState, Ledger, Observer
from flexifed.orchestra.placement import CellPlacement, Resources, halved, holds
from flexifed.results.store import ResultsFolder

NODES_EVERY_S = 5.0
WAIT_FOR_NODES_S = 600.0
_SCRATCH = "flexifed-tune-"

Place = Callable[[CellRun, Sequence[Resources]], CellPlacement]


@dataclass(frozen=True)
class PlacedRun:
    """A cell and its actors."""

    run: CellRun
    placement: CellPlacement


class CellTrial(tune.Trainable):
    """The driver of one cell after another: Tune sets it up once, and resets it to the next cell.

    One step is one round. What goes wrong in a cell ends this cell alone, and is reported as a result.
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Begin with a first cell. Client actors are made when they are first needed."""
        self._hosts: ActorHosts | None = None
        self._session: CellSession | None = None
        self._placed: PlacedRun = config["placed"]

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Go on to another cell, with nothing left of the one before but the processes."""
        self._close_session()
        self._placed = new_config["placed"]
        return True

    def step(self) -> dict[str, Any]:
        """Play a round. A cell that is lost begins again in the next step."""
        try:
            report = self._play_round()
        except GroupLostError:
            self.cleanup()
            raise  # only Tune can get another group
        except LostError as error:
            report = self._interrupted("lost", str(error))
        except DeviceMemoryError as error:
            roomier = halved(self._placed.placement, self._placed.run.config, cluster.nodes())
            reason = f"{error}; {_memory_advice(self._placed, roomier)}"
            report = replace(self._interrupted("out_of_memory", reason), roomier=roomier)
        except FlexifedError as error:
            report = self._interrupted("failed", str(error))
        except Exception:
            report = self._interrupted("failed", traceback.format_exc())
        return {"report": report, "done": report.ends}

    def cleanup(self) -> None:
        """Leave no process behind."""
        self._close_session()
        if self._hosts:
            self._hosts.shut_down()
            self._hosts = None

    def _play_round(self) -> CellReport:
        run = self._placed.run
        stop_file = ResultsFolder(run.results).stop_file
        if self._session is None:
            if stop_file.exists():
                return CellReport(run.name, "stopped")
            ResultsFolder(run.results).check_shared()
            self._begin(run)
        assert self._session is not None
        result = self._session.play_round()
        state: CellState = "finished" if result.round_index == run.rounds else "playing"
        if state == "playing" and stop_file.exists():
            self._session.stop()
            state = "stopped"
        return CellReport(run.name, state, result.round_index, accuracy_by_version(run.config, result))

    def _begin(self, run: CellRun) -> None:
        self._session = CellSession(run, str(self._placed.placement))
        if self._hosts is None:
            group = ray.util.get_current_placement_group()
            assert group is not None
            self._hosts = ActorHosts(group)
        self._hosts.begin(run.config, run.info, self._placed.placement, self._session.shards)
        self._session.start(self._hosts)

    def _interrupted(self, state: CellState, reason: str) -> CellReport:
        """Note it, and end the actors: their state is unknown, so they are not used again."""
        if self._session and state != "lost":  # of losses the command keeps the log, as it hears of all of them
            self._session.fail(reason)
        self.cleanup()
        return CellReport(self._placed.run.name, state, reason=reason)

    def _close_session(self) -> None:
        if self._session:
            self._session.close()
            self._session = None


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
        return self._ledger.has_ended(report.name)

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
            if not has_room or (waits and (stop or self._ledger.has_ended(trial.config["placed"].run.name))):
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
        retry_out_of_memory: try cells whose clients' devices are full again, with half as many processes on each.
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
            unfinished = [_roomier(cell, ledger) for cell in unfinished if not ledger.is_over(cell.run.name)]
            unfinished = _placed_anew(unfinished, place, observer, stopping)
    return ledger.failures


def _run_tune(
    cells: Sequence[PlacedRun], observer: Observer, ledger: Ledger, max_concurrent: int, stopping: Callable[[], bool]
) -> None:
    """Let Tune run cells of one shape. A trial that it gives up leaves its cell without a last word."""
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
            elif time.monotonic() > wait_until:
                raise
            time.sleep(1.0)
            continue
        if moved := [cell for cell, before in zip(placed, cells, strict=True) if cell.placement != before.placement]:
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


def _memory_advice(placed: PlacedRun, roomier: CellPlacement | None) -> str:
    """How many clients share a GPU, and what to ask for instead."""
    placement, block = placed.placement, placed.run.config.sharing.reduce_block
    each = max(len(clients) for clients in placement.clients)
    sharing = int(1 / placement.gpus_per_actor + 1e-6) if placement.gpus_per_actor else 1
    now = f"up to {sharing * each} clients, in {sharing} processes, share a GPU"
    if roomier is None:
        return f"{now}; use a smaller --width or --batch-size"
    if placement.streams > 1:
        return f"{now}; ask for --streams {roomier.streams}, or let --retry-out-of-memory do so"
    hosted = block * math.ceil(max(map(len, roomier.clients)) / block)
    return (
        f"{now}; ask for --gpus-per-client {roomier.gpus_per_actor / hosted:g} --clients-per-actor {hosted}, "
        "or let --retry-out-of-memory do so"
    )


def _last_line(path: str) -> str:
    """What Tune has noted last of what went wrong with a trial."""
    try:
        return Path(path).read_text(errors="replace").strip().splitlines()[-1]
    except (OSError, IndexError):
        return "Ray gives no reason"
