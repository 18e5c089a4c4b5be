"""Run a grid from a command line: check everything first, then start processes, then print the table."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, TYPE_CHECKING

from rich.console import Console

from flexifed.config import CellName, DatasetName
from flexifed.errors import CellsFailedError, FlexifedError, FlexifedWarning, ResourceError
from flexifed.grid import GridOptions, parse_options, select_cells
from flexifed.stopping import sigterm_as_ctrl_c, stop_requests
from flexifed.wording import counted

if TYPE_CHECKING:  # torch, Ray and pandas are imported once the command line has been parsed, so that --help is quick
    from flexifed.cells.run import CellRun
    from flexifed.data import DatasetInfo
    from flexifed.orchestra.placement import Resources
    from flexifed.request import GridRequest
    from flexifed.results.store import ResultsFolder

INTERRUPTED, BROKEN_PIPE = 130, 141  # 128 + the number of the signal, as a shell reports it


def run_experiment(
    name: str, cells: Sequence[CellName], argv: Sequence[str] | None, *, prog: str, description: str
) -> int:
    """Run the grid that a command line asks for, and print its table.

    Args:
        name: name of the experiment, and of its folder in the results.
        cells: the whole grid, of which the command line may select a part.
        argv: the command line; None for that of the process.
        prog: name of the command, for its help.
        description: description of the command, for its help.

    Returns:
        Exit status: 0; 1 if cells failed; 2 for an invalid command line, or unusable data or cluster; 130 after Ctrl-C.
    """
    console = plain_console()
    return guarded(
        lambda: _run(name, cells, parse_options(argv, prog=prog, description=description), console),
        when_stopped="; run the same command again to resume, cell by cell, from the last checkpoints",
    )


def plain_console(file: IO[str] | None = None) -> Console:
    """A console that prints text as it is: paths may have brackets and colons, which rich would take for markup.

    Args:
        file: where to print; None for standard output.
    """
    return Console(file=file, markup=False, highlight=False, emoji=False)


def guarded(action: Callable[[], None], when_stopped: str = "") -> int:
    """Run a command, and turn errors that a user can fix into a short message and an exit status.

    Args:
        action: the command.
        when_stopped: added to the message after Ctrl-C.

    Returns:
        Exit status: 0; that of the error; 130 after Ctrl-C; 141 if standard output was closed, as by `head`.
    """
    try:
        with sigterm_as_ctrl_c():
            action()
        sys.stdout.flush()
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
    """Find the data of the cells, and print what was found, with warnings."""
    from flexifed.data import find_dataset

    with warnings.catch_warnings(record=True, action="always", category=FlexifedWarning) as caught:
        infos = {
            dataset: find_dataset(dataset, data=options.data, data_dir=options.data_dir, download=options.download)
            for dataset in dict.fromkeys(cell.dataset for cell in cells)
        }
    for warning in caught:
        console.print(f"warning: {warning.message}", soft_wrap=True)
    for dataset, info in infos.items():
        console.print(f"data: {dataset}: {_describe_data(info, options.data_dir)}", soft_wrap=True)
    return infos


def _describe_data(info: DatasetInfo, data_dir: Path) -> str:
    if info.source == "synthetic":
        missing = "" if data_dir.expanduser().exists() else ", which does not exist"
        return f"SYNTHETIC stand-in (--data real needs them in {data_dir}{missing}; --download gets them)"
    return f"{info.source}, {info.layout} version in {info.location}"


def _root(name: str, options: GridOptions, console: Console) -> Path:
    """The experiment's folder: the newest one, or a new one for `--fresh`."""
    from flexifed.results.attempts import experiment_folders, fresh_folder, newest_folder

    results_dir = options.results_dir.expanduser().absolute()
    root = fresh_folder(results_dir, name) if options.fresh else newest_folder(results_dir, name)
    before = [folder for folder in experiment_folders(results_dir, name) if folder != root]
    if options.fresh:
        stays = f"; {before[-1].name} is left as it is" if before else ""
        console.print(f"fresh: results go to {root}{stays}. Omit --fresh to continue there.", soft_wrap=True)
    elif before:
        console.print(f"results: {root}, the newest of {len(before) + 1}", soft_wrap=True)
    return root


def _dry_run(request: GridRequest, console: Console) -> None:
    from flexifed.forecast import show_forecast
    from flexifed.orchestra import cluster
    from flexifed.orchestra.estimate import this_machine

    address = request.options.address
    if not address:
        nodes, where = [this_machine()], "this machine"
    else:  # joining a cluster starts nothing
        with cluster.connected(address):
            nodes, where = _wait_for_nodes(request.options, console, ask=False), f"the cluster at {address}"
    show_forecast(request, nodes, where, console)


def _wait_for_nodes(options: GridOptions, console: Console, *, ask: bool = True) -> list[Resources]:
    """The nodes of the connected cluster, once there are as many as `--min-nodes` asks for."""
    from flexifed.orchestra import cluster

    def print_progress(present: int) -> None:
        console.print(f"waiting for nodes: {present} of {options.min_nodes}")

    return cluster.wait_for_nodes(options.min_nodes, print_progress, ask=ask)


def _run_cells(request: GridRequest, console: Console) -> tuple[list[CellRun], dict[str, str]]:
    """Run the unfinished cells; returns all runs, and the reasons of those that failed. Starts Ray only if needed."""
    from flexifed.orchestra import cluster
    from flexifed.orchestra.estimate import this_machine
    from flexifed.request import unfinished_of

    address = request.options.address
    with ExitStack() as connection:
        if address:
            connection.enter_context(cluster.connected(address))
            nodes = _wait_for_nodes(request.options, console)
        else:
            nodes = [this_machine()]
        runs = request.runs_on(nodes)
        unfinished = unfinished_of(runs)
        if num_finished := len(runs) - len(unfinished):
            console.print(f"{num_finished} of {counted(len(runs), 'cell')} finished already")
        if not unfinished:
            return runs, {}
        request.place(unfinished[0], nodes)  # refuses cells that can't fit before anything is started
        if address:
            _check_nodes(request.folder, {run.info for run in unfinished})
        else:
            connection.enter_context(cluster.connected(None))
            nodes = _wait_for_nodes(request.options, console)
        return runs, _run_unfinished(unfinished, nodes, request, console)


def _run_unfinished(
    runs: Sequence[CellRun], nodes: Sequence[Resources], request: GridRequest, console: Console
) -> dict[str, str]:
    """Run cells to their last round; returns the reasons of those that failed, by name."""
    from flexifed.orchestra.sweep import run_grid
    from flexifed.orchestra.trial import PlacedRun
    from flexifed.progress import GridProgress

    options, folder = request.options, request.folder
    _say_what_differs(folder, runs, console)
    placed = [PlacedRun(run, request.place(run, nodes)) for run in runs]
    console.print(
        f"running {counted(len(placed), 'cell')} of {counted(options.rounds, 'round')}; "
        f"a cell is {placed[0].placement}, on {runs[0].config.device}",
        soft_wrap=True,
    )
    next_rounds = {run.name: run.checkpoints().newest_round() for run in runs}
    progress = GridProgress(console, options.rounds, {run.name: run.label for run in runs}, next_rounds)
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
        f"its last round is not in {folder.rounds}: either a file {folder.stop_file} asked it to stop, and the same "
        "command resumes it; or that folder is another one on the node where it ran, and all nodes have to share it"
    )
    return failures | dict.fromkeys(left, reason)


def _check_nodes(folder: ResultsFolder, infos: Iterable[DatasetInfo]) -> None:
    """Check that all nodes see the results and have the data: one that does not would fail cell after cell.

    Raises:
        ResourceError: some nodes do not; it names them all.
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
            f"{counted(len(problems), 'node')} can't run these cells; fix that, or remove them from the cluster:\n"
            + "\n".join(f"  {node}: {problem}" for node, problem in problems.items())
        )


def _say_what_differs(folder: ResultsFolder, runs: Sequence[CellRun], console: Console) -> None:
    """Print how the settings of new runs differ from those of existing runs, whose results they do not continue."""
    from flexifed.report.runs import forerunner

    names_by_difference: dict[str, list[str]] = {}
    for run in runs:
        if folder.rounds_file(run.name).exists():
            continue
        if before := forerunner(folder, run.config, run.profile, run.info.fingerprint):
            cell, differences = before
            names_by_difference.setdefault(differences, []).append(cell.name)
    for differences, names in names_by_difference.items():
        console.print(
            f"new settings, so {counted(len(names), 'new run')}; existing results are left as they are. "
            f"Before and now: {differences}",
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
                console.print("", sheet, sep="\n")
    console.print(f"Rows: pandas.read_parquet({str(folder.rounds)!r})", soft_wrap=True)
