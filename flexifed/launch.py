"""Running a grid from a command line: check everything first, then start processes, then show the table."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.filesize import decimal

from flexifed.config import DatasetName, Device
from flexifed.errors import CellsFailedError, ConfigError, FlexifedError, FlexifedWarning, ResourceError
from flexifed.grid import CellName, GridOptions, parse_options, select_cells
from flexifed.stopping import sigterm_as_ctrl_c, stop_requests
from flexifed.wording import counted

if TYPE_CHECKING:  # torch, Ray and pandas are imported when a line has proved readable, so that --help is quick
    from flexifed.data import DatasetInfo
    from flexifed.orchestra.cell import CellRun
    from flexifed.orchestra.placement import CellPlacement, PlacementOptions, Resources
    from flexifed.results.store import ResultsFolder

INTERRUPTED = 130


def run_experiment(
    name: str, cells: Sequence[CellName], argv: Sequence[str] | None, *, prog: str, description: str
) -> int:
    """Run what a command line asks for, and show its table.

    Args:
        name: of the experiment, and of its folder in the results.
        cells: the whole grid, of which the line may select some.
        argv: the line; None reads the process's own.
        prog: what the help calls the command.
        description: what it says of it.

    Returns:
        Exit status: 0; 1 if cells failed; 2 for a line or data or a cluster that won't do; 130 after Ctrl-C.
    """
    console = Console()
    return guarded(
        lambda: _run(name, cells, parse_options(argv, prog=prog, description=description), console),
        when_stopped=": the same command goes on, cell by cell, from the last checkpoints",
    )


def guarded(action: Callable[[], None], when_stopped: str = "") -> int:
    """Run a command, and turn what a user can mend into one short message and an exit status.

    Args:
        action: the command.
        when_stopped: what to add to the message after Ctrl-C.
    """
    try:
        with sigterm_as_ctrl_c():
            action()
    except FlexifedError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print(f"stopped{when_stopped}", file=sys.stderr)
        return INTERRUPTED
    return 0


def _run(name: str, grid: Sequence[CellName], options: GridOptions, console: Console) -> None:
    cells = select_cells(grid, options.only)
    from flexifed.data import find_dataset
    from flexifed.results.lock import locked
    from flexifed.results.store import ResultsFolder

    folder = ResultsFolder(_root(name, options, console))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FlexifedWarning)
        infos = {
            dataset: find_dataset(dataset, data=options.data, data_dir=options.data_dir, download=options.download)
            for dataset in dict.fromkeys(cell.dataset for cell in cells)
        }
    for warning in caught:
        console.print(f"warning: {warning.message}", highlight=False, markup=False, soft_wrap=True)
    for dataset, info in infos.items():
        console.print(f"data: {dataset}: {_describe_data(info, options.data_dir)}", highlight=False, soft_wrap=True)
    check_settings(options, cells, infos)
    if options.dry_run:
        _dry_run(options, cells, infos, folder, console)
        return
    folder.prepare()
    with locked(folder.root):
        folder.tidy()
        runs, failures = _run_cells(options, cells, infos, folder, console)
    _show_table(folder, options, [run for run in runs if run.name not in failures], console)
    if failures:
        raise CellsFailedError(
            f"{len(failures)} of {len(runs)} cells failed; each folder in {folder.root / 'runs'} has the cell's log:\n"
            + "\n".join(f"  {cell}: {reason.strip()}" for cell, reason in failures.items())
        )


def _root(name: str, options: GridOptions, console: Console) -> Path:
    """The experiment's folder: the newest one, or a fresh one."""
    from flexifed.results.attempts import experiment_folders, fresh_folder, newest_folder

    results_dir = options.results_dir.expanduser().absolute()
    root = fresh_folder(results_dir, name) if options.fresh else newest_folder(results_dir, name)
    before = [folder for folder in experiment_folders(results_dir, name) if folder != root]
    if options.fresh:
        stays = f"; {before[-1].name} stays as it is" if before else ""
        console.print(
            f"fresh: results go to {root}{stays}. Leave --fresh out to go on there.", highlight=False, soft_wrap=True
        )
    elif before:
        console.print(f"results: {root}, the newest of {len(before) + 1}", highlight=False, soft_wrap=True)
    return root


def _wait_for_nodes(options: GridOptions, console: Console, *, ask: bool = True) -> list[Resources]:
    """The nodes of the connected cluster, once there are as many as are asked for. A started Ray has its one."""
    from flexifed.orchestra import cluster

    def say(present: int) -> None:
        console.print(f"waiting for nodes: {present} of {options.min_nodes}", highlight=False)

    return cluster.wait_for_nodes(options.min_nodes if options.address else 1, say, ask=ask)


def check_settings(options: GridOptions, cells: Sequence[CellName], infos: Mapping[DatasetName, DatasetInfo]) -> None:
    """Find out before anything is started whether the settings fit the data and each other.

    Raises:
        ConfigError: clients can't be dealt out to actors, or a round's part of a shard would be empty.
        DataError: more shards than samples.
    """
    from flexifed.data.partition import window
    from flexifed.federation.assignment import assign_clients
    from flexifed.federation.rounds import make_shards

    placement = _placement(options)
    if placement.clients_per_actor is not None:
        assign_clients(options.partition.num_clients, placement.clients_per_actor, options.sharing.reduce_block)
    device: Device = "cuda" if options.device == "auto" else options.device  # which may take more settings
    for cell in {cell.dataset: cell for cell in cells}.values():
        shards = make_shards(options.cell_config(cell, options.seeds[0], device), infos[cell.dataset])
        window(shards[0].train, 0, options.partition.windows_per_shard)


def make_runs(
    options: GridOptions,
    cells: Sequence[CellName],
    infos: Mapping[DatasetName, DatasetInfo],
    results: Path,
    device: Device,
) -> list[CellRun]:
    """One run for each cell and seed."""
    from flexifed.orchestra.cell import CellRun

    return [
        CellRun(
            config=options.cell_config(cell, seed, device),
            info=infos[cell.dataset],
            profile=options.profile,
            rounds=options.rounds,
            results=results,
            checkpoint_every=options.checkpoint_every,
            keep_final=options.keep_final,
        )
        for seed in options.seeds
        for cell in cells
    ]


def _run_cells(
    options: GridOptions,
    cells: Sequence[CellName],
    infos: Mapping[DatasetName, DatasetInfo],
    folder: ResultsFolder,
    console: Console,
) -> tuple[list[CellRun], dict[str, str]]:
    """Run what is not finished yet; returns all runs, and what failed and why. Ray is not started for nothing."""
    from flexifed.orchestra import cluster
    from flexifed.orchestra.estimate import this_machine
    from flexifed.orchestra.placement import place_cell
    from flexifed.orchestra.sweep import run_grid
    from flexifed.orchestra.trial import PlacedRun
    from flexifed.progress import GridProgress

    runs: list[CellRun] = []
    if options.address is None:
        here = [this_machine()]
        runs = _runs_on(here, options, cells, infos, folder)
        for config in {run.config.device: run.config for run in runs}.values():
            place_cell(config, _placement(options), here)  # what can't fit is refused before anything starts
        if all(_is_finished(folder, run) for run in runs):
            console.print(f"{len(runs)} of {counted(len(runs), 'cell')} finished already", highlight=False)
            return runs, {}
    with cluster.connected(options.address):
        nodes = _wait_for_nodes(options, console)
        runs = runs or _runs_on(nodes, options, cells, infos, folder)
        unfinished = [run for run in runs if not _is_finished(folder, run)]
        if skipped := len(runs) - len(unfinished):
            console.print(f"{skipped} of {counted(len(runs), 'cell')} finished already", highlight=False)
        if not unfinished:
            return runs, {}
        _say_what_differs(folder, unfinished, console)

        def place(run: CellRun, left: Sequence[Resources]) -> CellPlacement:
            return place_cell(run.config, _placement(options), left)

        if options.address is not None:
            _check_nodes(folder, {run.info for run in unfinished})
        placed = [PlacedRun(run, place(run, nodes)) for run in unfinished]
        console.print(
            f"running {counted(len(placed), 'cell')} of {counted(options.rounds, 'round')}; "
            f"a cell is {placed[0].placement}, on {unfinished[0].config.device}",
            highlight=False,
            soft_wrap=True,
        )
        progress = GridProgress(console, options.rounds, {run.name: _label(run) for run in unfinished})
        with stop_requests() as stop, progress.shown():
            failures = run_grid(
                placed,
                progress,
                place=place,
                max_concurrent=options.max_concurrent,
                retry_out_of_memory=options.retry_out_of_memory,
                stop=stop,
            )
            left = [run.name for run in unfinished if run.name not in failures and not _is_finished(folder, run)]
            if left and stop():
                raise KeyboardInterrupt
        reason = (
            f"its last round is not in {folder.rounds}: either a file {folder.stop_file} asked it to stop, and the "
            "same command goes on; or where it ran this is another folder, and on a cluster all nodes have to share it"
        )
        return runs, failures | dict.fromkeys(left, reason)


def _check_nodes(folder: ResultsFolder, infos: Iterable[DatasetInfo]) -> None:
    """Make sure that all nodes see the results and have the data. One that does not would fail cell after cell.

    Raises:
        ResourceError: some don't; it names them all.
    """
    from flexifed.data import open_dataset
    from flexifed.orchestra import cluster

    infos = list(infos)

    def check() -> None:
        folder.check_shared()
        for info in infos:
            open_dataset(info)

    if problems := cluster.check_nodes(check):
        raise ResourceError(
            f"{counted(len(problems), 'node')} can't run these cells; mend that, or take the node out of the cluster:\n"
            + "\n".join(f"  {node}: {problem}" for node, problem in problems.items())
        )


def _runs_on(
    nodes: Sequence[Resources],
    options: GridOptions,
    cells: Sequence[CellName],
    infos: Mapping[DatasetName, DatasetInfo],
    folder: ResultsFolder,
) -> list[CellRun]:
    """One run for each cell and seed, on the device that was asked for, or on the one that the nodes have.

    Raises:
        ConfigError: a run would begin anew only because nobody said on which device, and the nodes have another now.
    """
    from flexifed.orchestra import cluster

    has_gpus = cluster.has_gpus(nodes)
    device: Device = options.device if options.device != "auto" else "cuda" if has_gpus else "cpu"
    runs = make_runs(options, cells, infos, folder.root, device)
    for run in runs if options.device == "auto" else ():
        other = _on_the_other_device(run)
        if other and folder.rounds_file(other.name).exists() and not folder.rounds_file(run.name).exists():
            here, there = run.config.device, other.config.device
            raise ConfigError(
                f"--device auto is {here} here, but {_label(run)} has results of these settings on {there}: say "
                f"--device {there} to go on with them, or --device {here} to begin anew beside them"
            )
    return runs


def _on_the_other_device(run: CellRun) -> CellRun | None:
    """The same run there; None if its settings are for this one only."""
    device: Device = "cpu" if run.config.device == "cuda" else "cuda"
    try:
        return replace(run, config=replace(run.config, device=device))
    except ConfigError:
        return None


def _say_what_differs(folder: ResultsFolder, runs: Sequence[CellRun], console: Console) -> None:
    """Where a new run has forerunners under other settings, say which: their results are not gone on with."""
    from flexifed.report.runs import forerunner

    found: dict[str, list[str]] = {}
    for run in runs:
        if folder.rounds_file(run.name).exists():
            continue
        if before := forerunner(folder, run.config, run.profile, run.info.fingerprint):
            cell, differences = before
            found.setdefault(differences, []).append(cell.name)
    for differences, names in found.items():
        console.print(
            f"new settings, so {counted(len(names), 'new run')}; what lies there stays as it is. "
            f"Before and now: {differences}",
            highlight=False,
            soft_wrap=True,
        )


def _dry_run(
    options: GridOptions,
    cells: Sequence[CellName],
    infos: Mapping[DatasetName, DatasetInfo],
    folder: ResultsFolder,
    console: Console,
) -> None:
    """Print what would run where, and about how long it would take, judged by this machine."""
    from flexifed.federation.host import state_bytes
    from flexifed.orchestra import cluster
    from flexifed.orchestra.estimate import START_S, cell_seconds, concurrent_cells, this_machine
    from flexifed.orchestra.placement import place_cell
    from flexifed.progress import duration

    if options.address is None:
        nodes, where = [this_machine()], "this machine"
    else:  # joining a cluster starts nothing
        with cluster.connected(options.address):
            nodes, where = _wait_for_nodes(options, console, ask=False), f"the cluster at {options.address}"
    runs = _runs_on(nodes, options, cells, infos, folder)
    placement = place_cell(runs[0].config, _placement(options), nodes)
    unfinished = [run for run in runs if not _is_finished(folder, run)]
    for run in runs:
        state = "to run" if run in unfinished else "finished"
        console.print(
            f"  {_label(run):<44} {state}, {run.rounds} rounds, run {run.run_id}", highlight=False, soft_wrap=True
        )
    at_once = min(concurrent_cells(placement, nodes), options.max_concurrent or len(runs))
    console.print(
        f"resources: a cell is {placement}, on {runs[0].config.device}; {at_once} at a time on {where}", soft_wrap=True
    )
    if runs[0].config.device == "cuda" and not this_machine()["GPU"]:
        console.print("time: not estimated, because steps are timed in this process and it sees no GPU", soft_wrap=True)
        return
    seconds = sum(cell_seconds(run, placement, nodes, at_once) for run in unfinished) / at_once + START_S
    if options.keep_final:
        kept = decimal(sum(state_bytes(run.config, run.info) for run in runs))
        console.print(f"disk: {kept} of final states stay (none with --no-keep-final)", highlight=False)
    console.print(
        f"time: about {duration(seconds)}, from a few steps timed here and now; nothing was started",
        soft_wrap=True,
    )


def _show_table(folder: ResultsFolder, options: GridOptions, runs: Sequence[CellRun], console: Console) -> None:
    from flexifed.report.compare import PAIRED, PAIRED_BY_SEED, paired_differences, render_differences
    from flexifed.report.runs import changed_settings, stored_cell
    from flexifed.report.table import per_seed, render, summarise

    if not runs:
        return
    rows = folder.read([run.name for run in runs])
    summary = summarise(rows, options.rounds)
    first = stored_cell(folder.rounds_file(runs[0].name))
    changed = changed_settings(first) if first else {}
    for part in render(summary, profile=options.profile, rounds=options.rounds, seeds=options.seeds, changed=changed):
        console.print("", part, sep="\n", highlight=False)
    if len(options.seeds) > 1 and (differences := paired_differences(per_seed(rows, options.rounds))):
        console.print(render_differences(differences, PAIRED))
        by_seed = paired_differences(per_seed(rows, options.rounds), by_seed=True)
        console.print(render_differences(by_seed, PAIRED_BY_SEED))
    console.print(f"Rows: pandas.read_parquet({str(folder.rounds)!r})", highlight=False, soft_wrap=True)


def _is_finished(folder: ResultsFolder, run: CellRun) -> bool:
    last = folder.last_round(run.name)
    return last is not None and last >= run.rounds


def _placement(options: GridOptions) -> PlacementOptions:
    from flexifed.orchestra.placement import PlacementOptions

    return PlacementOptions(
        gpus_per_client=options.gpus_per_client,
        clients_per_actor=options.clients_per_actor,
        streams=options.streams,
    )


def _label(run: CellRun) -> str:
    config = run.config
    return f"{config.dataset}/{config.family}/{config.scheme} seed {config.seed}"


def _describe_data(info: DatasetInfo, data_dir: Path) -> str:
    if info.source == "synthetic":
        missing = "" if data_dir.expanduser().exists() else ", which does not exist"
        return f"SYNTHETIC stand-in (--data real needs them in {data_dir}{missing}; --download gets them)"
    return f"{info.source}, {info.layout} version in {info.location}"
