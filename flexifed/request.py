"""A request for a grid: the command line with the data that were found for it, its runs, and their placement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from flexifed.cells.plans import check_plans
from flexifed.cells.run import CellRun
from flexifed.config import CellName, DatasetName, Device
from flexifed.data import DatasetInfo
from flexifed.data.partition import window_length
from flexifed.errors import ConfigError
from flexifed.federation.assignment import assign_clients
from flexifed.federation.cell import shard_sizes
from flexifed.grid import GridOptions
from flexifed.orchestra.cluster import has_gpus
from flexifed.orchestra.placement import CellPlacement, Resources, place_cell
from flexifed.results.store import ResultsFolder


@dataclass(frozen=True)
class GridRequest:
    """A request to run a grid.

    Attributes:
        options: the options of the command line.
        cells: the cells that it selects.
        infos: the data of each data set of these cells.
        folder: the results of the experiment.
    """

    options: GridOptions
    cells: Sequence[CellName]
    infos: Mapping[DatasetName, DatasetInfo]
    folder: ResultsFolder

    def check_settings(self) -> None:
        """Check, before anything is started, that the settings fit the data and each other.

        Raises:
            ConfigError: a placement option is invalid, or asks for GPUs for clients on CPUs; the clients can't be
                distributed to actors; or a round's part of a shard would be empty.
            DataError: there are more shards than samples.
        """
        options = self.options
        self._check_share(options.device)
        device: Device = "cuda" if options.device == "auto" else options.device  # which may take more settings
        for cell in {cell.dataset: cell for cell in self.cells}.values():
            config = options.cell_config(cell, options.seeds[0], device)
            if (per_actor := options.placement.clients_per_actor) is not None:
                assign_clients(config.client_versions, per_actor, options.sharing.reduce_block)
            num_train, _ = shard_sizes(config, self.infos[cell.dataset])
            window_length(num_train, options.partition.windows_per_shard)

    def runs_for(self, device: Device) -> list[CellRun]:
        """The runs of all cells and seeds."""
        options = self.options
        return [
            CellRun(
                config=options.cell_config(cell, seed, device),
                info=self.infos[cell.dataset],
                profile=options.profile,
                rounds=options.rounds,
                results=self.folder.root,
                checkpoint_every=options.checkpoint_every,
                keep_final=options.keep_final,
            )
            for seed in options.seeds
            for cell in self.cells
        ]

    def runs_on(self, nodes: Sequence[Resources]) -> list[CellRun]:
        """The runs of all cells and seeds, on the device of the options, or, for `auto`, on what the nodes have.

        Raises:
            ConfigError: a run has results on one device, but `auto` now means the other, so it would start again.
        """
        if self.options.device != "auto":
            return self.runs_for(self.options.device)
        runs = self.runs_for("cuda" if has_gpus(nodes) else "cpu")
        for run in runs:
            other = _on_the_other_device(run)
            if other and self._has_rounds(other) and not self._has_rounds(run):
                here, there = run.config.device, other.config.device
                raise ConfigError(
                    f"--device auto is {here} here, but {run.label} has results of these settings on {there}: say "
                    f"--device {there} to continue them, or --device {here} to start again beside them"
                )
        return runs

    def _has_rounds(self, run: CellRun) -> bool:
        return self.folder.rounds_file(run.name).exists()

    def place(self, run: CellRun, nodes: Sequence[Resources]) -> CellPlacement:
        """Place the clients of a run on the nodes.

        Raises:
            ConfigError: a share of a GPU is asked for clients that use none.
            ResourceError: see `place_cell`.
        """
        self._check_share(run.config.device)
        return place_cell(run.config, self.options.placement, nodes)

    def _check_share(self, device: str) -> None:
        """Refuse a share of a GPU for clients that compute on CPUs."""
        share = self.options.placement.gpus_per_client
        if share and device == "cpu":
            asked = self.options.device == "cpu"
            why = "device is 'cpu', which uses none" if asked else "no node has a GPU"
            remedy = "use --device cuda" if asked else "add nodes that have one"
            raise ConfigError(f"gpus_per_client is {share:g}, but {why}; leave --gpus-per-client out, or {remedy}")


def unfinished_of(runs: Sequence[CellRun]) -> list[CellRun]:
    """The runs that have rounds left.

    Raises:
        ResultsError: the scheme or the models of a finished run have been edited since.
    """
    finished = [run for run in runs if run.is_finished]
    check_plans(finished)
    names = {run.name for run in finished}
    return [run for run in runs if run.name not in names]


def _on_the_other_device(run: CellRun) -> CellRun | None:
    """The same run on the other device; None if its settings are only for this one."""
    device: Device = "cpu" if run.config.device == "cuda" else "cuda"
    try:
        return replace(run, config=replace(run.config, device=device))
    except ConfigError:
        return None
