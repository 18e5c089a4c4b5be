"""The driver of a cell, as a Ray Tune trial, which keeps its client actors from one cell to the next."""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass
from typing import Any

import ray
from ray import tune

from flexifed.cells.run import CellRun
from flexifed.cells.session import CellSession, accuracy_by_version, log_failure, open_log
from flexifed.errors import DeviceMemoryError, FlexifedError
from flexifed.federation.cell import make_shards
from flexifed.orchestra import cluster
from flexifed.orchestra.actors import ActorHosts, GroupLostError, LostError
from flexifed.orchestra.client_actor import first_line, full_device
from flexifed.orchestra.ledger import CellReport, CellState
from flexifed.orchestra.lending import has_broken_gpu
from flexifed.orchestra.placement import CellPlacement, memory_advice, roomier_placement
from flexifed.results.runlog import RunLog
from flexifed.results.store import ResultsFolder

STEP_S = 1.0  # how long a step goes on playing rounds


@dataclass(frozen=True)
class PlacedRun:
    """A cell and its placement."""

    run: CellRun
    placement: CellPlacement


class CellTrial(tune.Trainable):
    """The driver of one cell after another: Tune sets it up once, and resets it to each next cell.

    One step is a second of rounds, or one round if that takes longer, because Tune takes milliseconds from one step to
    the next. An error in a cell ends only that cell, and is reported as a result.
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Take the first cell. Client actors are created when they are first needed."""
        self._hosts: ActorHosts | None = None
        self._log: RunLog | None = None
        self._session: CellSession | None = None
        self._placed: PlacedRun = config["placed"]

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next cell, and keep nothing of the previous one but the processes."""
        self._close_session()
        self._placed = new_config["placed"]
        return True

    def step(self) -> dict[str, Any]:
        """Play rounds; returns what happened. A cell that is lost begins again in the next step."""
        ends = time.monotonic() + STEP_S
        reports = [self._next_report()]
        while reports[-1].state == "playing" and time.monotonic() < ends:
            reports.append(self._next_report())
        return {"reports": reports, "done": reports[-1].is_over_for_now}

    def cleanup(self) -> None:
        """Close the session, and end the actors."""
        self._close_session()
        hosts, self._hosts = self._hosts, None
        if hosts:
            hosts.shut_down()

    def _next_report(self) -> CellReport:
        """Play a round, and report it or the error that prevented it."""
        try:
            return self._play_round()
        except GroupLostError:
            self.cleanup()
            raise  # only Tune can get another group
        except Exception as error:
            message, (state, reason) = first_line(error), _outcome(error)
        # After the handler, so that tensors in the error's frames are gone when this process and its actors clean up.
        if has_broken_gpu():
            self.cleanup()
            # Another process may be able to use it.
            raise GroupLostError(f"the driver's process can't use its GPU any more: {message}")
        return self._interrupted(state, reason)

    def _play_round(self) -> CellReport:
        run = self._placed.run
        stop_file = ResultsFolder(run.results).stop_file
        if self._session is None:
            if stop_file.exists():
                return CellReport(run.name, "stopped")
            ResultsFolder(run.results).check_shared()
            self._session = self._begin(run)
        result = self._session.play_round()
        state: CellState = "finished" if result.round_index == run.rounds else "playing"
        if state == "playing" and stop_file.exists():
            self._session.stop()
            state = "stopped"
        notes, self._session.notes = self._session.notes, []
        accuracies = accuracy_by_version(run.config, result)
        return CellReport(run.name, state, result.round_index, accuracies, notes=notes)

    def _begin(self, run: CellRun) -> CellSession:
        placement, shards = self._placed.placement, make_shards(run.config, run.info)
        self._log = open_log(run, str(placement))
        if self._hosts is None:
            group = ray.util.get_current_placement_group()
            assert group is not None
            self._hosts = ActorHosts(group)
        self._hosts.begin(run.config, run.info, placement, shards)
        return CellSession(run, str(placement), self._hosts, shards, self._log)

    def _interrupted(self, state: CellState, reason: str) -> CellReport:
        """Log an error's outcome, and end the actors, whose state is unknown."""
        roomier = None
        if state == "out_of_memory":
            placement, config = self._placed.placement, self._placed.run.config
            roomier = roomier_placement(placement, config, cluster.nodes())
            reason = f"{reason}; {memory_advice(placement, config, roomier)}"
        if self._log and state != "lost":  # the command logs losses, because it hears of all of them
            log_failure(self._log, reason)
        self.cleanup()
        return CellReport(self._placed.run.name, state, reason=reason, roomier=roomier)

    def _close_session(self) -> None:
        self._session = None
        if self._log:
            self._log.close()
            self._log = None


def _outcome(error: Exception) -> tuple[CellState, str]:
    """The state that an error leaves a cell in, and the reason to report."""
    if isinstance(error, LostError):
        return "lost", str(error)
    if isinstance(error, DeviceMemoryError):
        return "out_of_memory", str(error)
    if isinstance(error, FlexifedError):
        return "failed", str(error)
    if shortage := full_device(error):  # averaging on its clients' GPU
        return "out_of_memory", f"the driver: {shortage}"
    return "failed", "".join(traceback.format_exception(error))
