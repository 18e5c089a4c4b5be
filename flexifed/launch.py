"""Running a grid from a command line: check everything first, then start processes, then show the table."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from flexifed.config import DatasetName, Device
from flexifed.errors import CellsFailedError, FlexifedError
from flexifed.grid import CellName, GridOptions, parse_options, select_cells

if TYPE_CHECKING:  # torch, Ray and pandas are imported when a line has proved readable, so that --help is quick
    from flexifed.data import DatasetInfo
    from flexifed.orchestra.cell import CellRun
    from flexifed.orchestra.placement import PlacementOptions, Resources
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
    from flexifed.orchestra import cluster
    from flexifed.results.store import ResultsFolder

    folder = ResultsFolder((options.results_dir.expanduser() / name).absolute())
    infos = {
        dataset: find_dataset(dataset, data=options.data, data_dir=options.data_dir, download=options.download)
        for dataset in dict.fromkeys(cell.dataset for cell in cells)
    }
    for dataset, info in infos.items():
        console.print(f"data: {dataset}: {_describe_data(info, options.data_dir)}", highlight=False, soft_wrap=True)
    check_settings(options, cells, infos)
    if options.dry_run:
        _dry_run(options, cells, infos, folder.root, console)
        return
    folder.prepare()
    with cluster.connected(options.address):
        nodes = cluster.nodes()
        runs = make_runs(options, cells, infos, folder.root, _device(options, cluster.has_gpus(nodes)))
        failures = _run_cells(options, runs, nodes, console)
    _show_table(folder, options, [run for run in runs if run.name not in failures], console)
    if failures:
        raise CellsFailedError(
            f"{len(failures)} of {len(runs)} cells failed; each folder in {folder.root / 'runs'} has the cell's log:\n"
            + "\n".join(f"  {cell}: {reason.strip()}" for cell, reason in failures.items())
        )


def check_settings(options: GridOptions, cells: Sequence[CellName], infos: Mapping[DatasetName, DatasetInfo]) -> None:
    """Find out before anything is started whether the settings fit the data and each other.

    Raises:
        ConfigError: clients can't be dealt out to actors, or a round's part of a shard would be empty.
        DataError: more shards than samples.
    """
    from flexifed.data.partition import window
    from flexifed.federation.host import assign_clients
    from flexifed.federation.rounds import make_shards

    placement = _placement(options)
    if placement.clients_per_actor is not None:
        assign_clients(options.partition.num_clients, placement.clients_per_actor, options.sharing.reduce_block)
    for cell in {cell.dataset: cell for cell in cells}.values():
        shards = make_shards(options.cell_config(cell, options.seeds[0], "cpu"), infos[cell.dataset])
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
        )
        for seed in options.seeds
        for cell in cells
    ]


def _run_cells(
    options: GridOptions, runs: Sequence[CellRun], nodes: list[Resources], console: Console
) -> dict[str, str]:
    """Run what is not finished yet, and return what failed and why."""
    from flexifed.orchestra.placement import place_cell
    from flexifed.orchestra.sweep import PlacedRun, run_grid
    from flexifed.progress import GridProgress, counted
    from flexifed.results.store import ResultsFolder

    placed = [PlacedRun(run, place_cell(run.config, _placement(options), nodes)) for run in runs]
    unfinished = [cell for cell in placed if not _is_finished(ResultsFolder(cell.run.results), cell.run)]
    if skipped := len(placed) - len(unfinished):
        console.print(f"{skipped} of {counted(len(placed), 'cell')} finished already", highlight=False)
    if not unfinished:
        return {}
    console.print(
        f"running {counted(len(unfinished), 'cell')} of {counted(options.rounds, 'round')}; "
        f"a cell is {unfinished[0].placement}",
        highlight=False,
        soft_wrap=True,
    )
    labels = {cell.run.name: _label(cell.run) for cell in unfinished}
    progress = GridProgress(console, options.rounds, labels)
    with progress.shown():
        return run_grid(unfinished, progress, max_concurrent=options.max_concurrent)


def _dry_run(
    options: GridOptions,
    cells: Sequence[CellName],
    infos: Mapping[DatasetName, DatasetInfo],
    results: Path,
    console: Console,
) -> None:
    """Print what would run where, and about how long it would take, judged by this machine."""
    from flexifed.orchestra import cluster
    from flexifed.orchestra.estimate import START_S, cell_seconds, concurrent_cells, this_machine
    from flexifed.orchestra.placement import place_cell
    from flexifed.progress import duration
    from flexifed.results.store import ResultsFolder

    if options.address is None:
        nodes, where = [this_machine()], "this machine"
    else:  # joining a cluster starts nothing
        with cluster.connected(options.address):
            nodes, where = cluster.nodes(), f"the cluster at {options.address}"
    runs = make_runs(options, cells, infos, results, _device(options, cluster.has_gpus(nodes)))
    placement = place_cell(runs[0].config, _placement(options), nodes)
    unfinished = [run for run in runs if not _is_finished(ResultsFolder(run.results), run)]
    for run in runs:
        state = "to run" if run in unfinished else "finished"
        console.print(
            f"  {_label(run):<44} {state}, {run.rounds} rounds, run {run.run_id}", highlight=False, soft_wrap=True
        )
    at_once = min(concurrent_cells(placement, nodes), options.max_concurrent or len(runs))
    console.print(
        f"resources: a cell is {placement}, on {runs[0].config.device}; {at_once} at a time on {where}", soft_wrap=True
    )
    seconds = sum(cell_seconds(run, placement, nodes, at_once) for run in unfinished) / at_once + START_S
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


def _device(options: GridOptions, has_gpus: bool) -> Device:
    if options.device == "auto":
        return "cuda" if has_gpus else "cpu"
    return options.device


def _placement(options: GridOptions) -> PlacementOptions:
    from flexifed.orchestra.placement import PlacementOptions

    return PlacementOptions(gpus_per_client=options.gpus_per_client, clients_per_actor=options.clients_per_actor)


def _label(run: CellRun) -> str:
    config = run.config
    return f"{config.dataset}/{config.family}/{config.scheme} seed {config.seed}"


def _describe_data(info: DatasetInfo, data_dir: Path) -> str:
    if info.source == "synthetic":
        return f"SYNTHETIC stand-in (--data real needs them in {data_dir}; --download gets them)"
    return f"{info.source}, {info.layout} version in {info.location}"
