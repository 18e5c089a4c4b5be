"""A grid of cells as Ray Tune trials: each trial is a cell's driver, with the cell's client actors in its own group.

Tune schedules; it keeps nothing. Processes are kept from cell to cell, because starting them is what costs.
"""

from __future__ import annotations

import shutil
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ray
from ray import tune
from ray.tune import CheckpointConfig, RunConfig

from flexifed.errors import FlexifedError
from flexifed.orchestra.actors import ActorHosts
from flexifed.orchestra.cell import CellRun, CellSession, accuracy_by_version
from flexifed.orchestra.placement import CellPlacement
from flexifed.results.store import ResultsFolder


@dataclass(frozen=True)
class PlacedRun:
    """A cell and its actors."""

    run: CellRun
    placement: CellPlacement


@dataclass(frozen=True)
class CellReport:
    """What the command hears of a cell after each round. `failure` ends the cell."""

    name: str
    round_index: int
    accuracies: dict[str, float]
    finished: bool
    failure: str | None = None


class Observer(Protocol):
    """Whoever wants to hear how the grid goes on."""

    def cell_started(self, name: str) -> None:
        """A cell has got its processes."""
        ...

    def round_played(self, report: CellReport) -> None:
        """A round has ended, or a cell has failed."""
        ...


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
        """Play a round."""
        try:
            report = self._play_round()
        except Exception as error:
            # Actors whose state is unknown are not used again.
            reason = str(error) if isinstance(error, FlexifedError) else traceback.format_exc()
            report = CellReport(self._placed.run.name, -1, {}, finished=True, failure=reason)
            if self._session:
                self._session.fail(reason)
            self._close_session()
            self._shut_down()
        return {"report": report, "done": report.finished}

    def cleanup(self) -> None:
        """Leave no process behind."""
        self._close_session()
        self._shut_down()

    def _play_round(self) -> CellReport:
        run = self._placed.run
        if self._session is None:
            ResultsFolder(run.results).check_shared()
            self._session = CellSession(run, str(self._placed.placement))
            if self._hosts is None:
                group = ray.util.get_current_placement_group()
                assert group is not None
                self._hosts = ActorHosts(group)
            self._hosts.begin(run.config, run.info, self._placed.placement, self._session.shards)
            self._session.start(self._hosts)
        result = self._session.play_round()
        return CellReport(
            run.name,
            result.round_index,
            accuracy_by_version(run.config, result),
            finished=result.round_index == run.rounds,
        )

    def _close_session(self) -> None:
        if self._session:
            self._session.close()
            self._session = None

    def _shut_down(self) -> None:
        if self._hosts:
            self._hosts.shut_down()
            self._hosts = None


class _Listener(tune.Callback):
    """Passes on what trials report."""

    def __init__(self, observer: Observer, heard: Callable[[CellReport], None]) -> None:
        self._observer = observer
        self._heard = heard

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks into a state from which nothing is ever restored

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._observer.cell_started(trial.config["placed"].run.name)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self._heard(result["report"])
        self._observer.round_played(result["report"])


def run_grid(cells: Sequence[PlacedRun], observer: Observer, *, max_concurrent: int | None = None) -> dict[str, str]:
    """Run cells, as many at a time as the cluster holds. Ray must be connected; see `flexifed.orchestra.cluster`.

    Args:
        cells: with placements that fit the cluster.
        observer: hears of every round.
        max_concurrent: at most so many at a time; None for no bound.

    Returns:
        For each cell that failed, by name, why. The others are complete.
    """
    failures: dict[str, str] = {}

    def heard(report: CellReport) -> None:
        if report.failure is not None:
            failures[report.name] = report.failure

    by_shape: dict[tuple[object, ...], list[PlacedRun]] = {}
    for cell in cells:
        bundles = cell.placement.bundles
        by_shape.setdefault(tuple(tuple(sorted(bundle.items())) for bundle in bundles), []).append(cell)
    for same_shape in by_shape.values():  # Tune reuses a process only for a trial that asks for the same
        _run_tune(same_shape, _Listener(observer, heard), max_concurrent or 0, failures)
    return failures


def _run_tune(cells: Sequence[PlacedRun], listener: _Listener, max_concurrent: int, failures: dict[str, str]) -> None:
    scratch = Path(tempfile.mkdtemp(prefix="flexifed-tune-"))
    try:
        tuner = tune.Tuner(
            tune.with_resources(CellTrial, tune.PlacementGroupFactory(cells[0].placement.bundles)),
            param_space={"placed": tune.grid_search(list(cells))},
            tune_config=tune.TuneConfig(
                reuse_actors=True,
                max_concurrent_trials=max_concurrent,
                trial_dirname_creator=lambda trial: str(trial.trial_id),
            ),
            run_config=RunConfig(
                name="grid",
                storage_path=str(scratch),
                verbose=0,
                callbacks=[listener],
                checkpoint_config=CheckpointConfig(checkpoint_at_end=False),
            ),
        )
        results = tuner.fit()
        for index, cell in enumerate(cells):
            result = results[index]
            if result.error is not None:  # a trial's own process was lost: nothing was left to report
                failures.setdefault(cell.run.name, str(result.error))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
