"""Running a grid from a command line: check everything first, then start processes, then show the table."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from flexifed.config import CellName, DatasetName
from flexifed.errors import CellsFailedError, FlexifedError, FlexifedWarning, ResourceError
from flexifed.grid import GridOptions, parse_options, select_cells
from flexifed.stopping import sigterm_as_ctrl_c, stop_requests
from flexifed.wording import counted

if TYPE_CHECKING:  # torch, Ray and pandas are imported when a line has proved readable, so that --help is quick
    from flexifed.cells.run import CellRun
    from flexifed.data import DatasetInfo
    from flexifed.orchestra.placement import Resources
    from flexifed.request import GridRequest
    from flexifed.results.store import ResultsFolder

INTERRUPTED, BROKEN_PIPE = 130, 141  # 128 + the number of the signal, as a shell reports it


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
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at exit
        return BROKEN_PIPE
    return 0


def _run(name: str, grid: Sequence[CellName], options: GridOptions, console: Console) -> None:
    cells = select_cells(grid, options.only)
    from flexifed.request import GridRequest
    from flexifed.results.lock import locked
    from flexifed.results.store import ResultsFolder

    folder = ResultsFolder(_root(name, options, console))
    request = GridRequest(options, cells, _find_data(cells, options, console), folder)
    request.check_settings()
    if options.dry_run:
        _dry_run(request, console)
        return
    folder.prepare()
    with locked(folder.root):
        folder.tidy()
        runs, failures = _run_cells(request, console)
    _show_table(folder, options, [run for run in runs if run.name not in failures], console)
    if failures:
        raise CellsFailedError(
            f"{len(failures)} of {len(runs)} cells failed; each folder in {folder.root / 'runs'} has the cell's log:\n"
            + "\n".join(f"  {cell}: {reason.strip()}" for cell, reason in failures.items())
        )


def _find_data(cells: Sequence[CellName], options: GridOptions, console: Console) -> dict[DatasetName, DatasetInfo]:
    """The data that the cells need; says what was found, and what is wrong with it."""
    from flexifed.data import find_dataset

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
    return infos


def _describe_data(info: DatasetInfo, data_dir: Path) -> str:
    if info.source == "synthetic":
        missing = "" if data_dir.expanduser().exists() else ", which does not exist"
        return f"SYNTHETIC stand-in (--data real needs them in {data_dir}{missing}; --download gets them)"
    return f"{info.source}, {info.layout} version in {info.location}"


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


def _dry_run(request: GridRequest, console: Console) -> None:
    from flexifed.forecast import show_forecast
    from flexifed.orchestra import cluster
    from flexifed.orchestra.estimate import this_machine

    address = request.options.address
    if address is None:
        nodes, where = [this_machine()], "this machine"
    else:  # joining a cluster starts nothing
        with cluster.connected(address):
            nodes, where = _wait_for_nodes(request.options, console, ask=False), f"the cluster at {address}"
    show_forecast(request, nodes, where, console)


def _wait_for_nodes(options: GridOptions, console: Console, *, ask: bool = True) -> list[Resources]:
    """The nodes of the connected cluster, once there are as many as are asked for."""
    from flexifed.orchestra import cluster

    def say(present: int) -> None:
        console.print(f"waiting for nodes: {present} of {options.min_nodes}", highlight=False)

    return cluster.wait_for_nodes(options.min_nodes, say, ask=ask)


def _run_cells(request: GridRequest, console: Console) -> tuple[list[CellRun], dict[str, str]]:
    """Run what is not finished yet; returns all runs, and what failed and why. Ray is not started for nothing."""
    from flexifed.orchestra import cluster
    from flexifed.orchestra.estimate import this_machine

    address = request.options.address
    if address is None:
        here = [this_machine()]
        runs = request.runs_on(here)
        for run in {run.config.device: run for run in runs}.values():
            request.place(run, here)  # what can't fit is refused before anything starts
        unfinished = _unfinished(runs, console)
        if unfinished:
            with cluster.connected(None):
                return runs, _run_unfinished(unfinished, _wait_for_nodes(request.options, console), request, console)
        return runs, {}
    with cluster.connected(address):
        nodes = _wait_for_nodes(request.options, console)
        runs = request.runs_on(nodes)
        unfinished = _unfinished(runs, console)
        if unfinished:
            _check_nodes(request.folder, {run.info for run in unfinished})
            return runs, _run_unfinished(unfinished, nodes, request, console)
        return runs, {}


def _unfinished(runs: Sequence[CellRun], console: Console) -> list[CellRun]:
    """Those that have rounds to play; says how many others there are."""
    left = [run for run in runs if not run.is_finished]
    if len(left) < len(runs):
        console.print(f"{len(runs) - len(left)} of {counted(len(runs), 'cell')} finished already", highlight=False)
    return left


def _run_unfinished(
    runs: Sequence[CellRun], nodes: Sequence[Resources], request: GridRequest, console: Console
) -> dict[str, str]:
    """Run these to their last rounds; returns which of them failed, and why."""
    from flexifed.orchestra.sweep import run_grid
    from flexifed.orchestra.trial import PlacedRun
    from flexifed.progress import GridProgress

    options, folder = request.options, request.folder
    _say_what_differs(folder, runs, console)
    placed = [PlacedRun(run, request.place(run, nodes)) for run in runs]
    console.print(
        f"running {counted(len(placed), 'cell')} of {counted(options.rounds, 'round')}; "
        f"a cell is {placed[0].placement}, on {runs[0].config.device}",
        highlight=False,
        soft_wrap=True,
    )
    progress = GridProgress(console, options.rounds, {run.name: run.label for run in runs})
    with stop_requests() as stop, progress.shown():
        failures = run_grid(
            placed,
            progress,
            place=request.place,
            max_concurrent=options.max_concurrent,
            retry_out_of_memory=options.retry_out_of_memory,
            stop=stop,
        )
        left = [run.name for run in runs if run.name not in failures and not run.is_finished]
        if left and stop():
            raise KeyboardInterrupt
    reason = (
        f"its last round is not in {folder.rounds}: either a file {folder.stop_file} asked it to stop, and the "
        "same command goes on; or where it ran this is another folder, and on a cluster all nodes have to share it"
    )
    return failures | dict.fromkeys(left, reason)


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


def _show_table(folder: ResultsFolder, options: GridOptions, runs: Sequence[CellRun], console: Console) -> None:
    from flexifed.report.study import studies_of

    if not runs:
        return
    names = [run.name for run in runs]
    for study in studies_of(folder, names, profile=options.profile, rounds=options.rounds):
        for sheet in (study.table(seeds=options.seeds), study.differences()):
            if sheet.sections:
                console.print("", sheet, sep="\n", highlight=False)
    console.print(f"Rows: pandas.read_parquet({str(folder.rounds)!r})", highlight=False, soft_wrap=True)
