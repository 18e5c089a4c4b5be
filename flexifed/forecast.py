"""A dry run: which cells would run where, and roughly how long they would take."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.filesize import decimal

from flexifed.federation.cell import state_bytes
from flexifed.federation.checkpoint import KEPT
from flexifed.orchestra import estimate
from flexifed.orchestra.placement import Resources
from flexifed.request import GridRequest, unfinished_of
from flexifed.wording import duration

CHECKPOINTS_AT_ONCE = KEPT + 1
"""Checkpoints of a cell that exist at the same time: those that are kept, and the one that is being written."""


def show_forecast(request: GridRequest, nodes: Sequence[Resources], where: str, console: Console) -> None:
    """Print what a grid would need on the given nodes, estimated from training steps timed in this process.

    Args:
        request: the grid.
        nodes: the nodes that would run it.
        where: where the nodes are, in words.
        console: the console to print to.

    Raises:
        ConfigError, ResourceError, ResultsError: as the command itself would.
    """
    options = request.options
    runs = request.runs_on(nodes)
    unfinished = unfinished_of(runs)
    names = {run.name for run in unfinished}
    for run in runs:
        next_round = run.checkpoints().newest_round()
        resumes = f"to resume with round {next_round}" if next_round else "to run"
        state = resumes if run.name in names else "finished"
        console.print(f"  {run.label:<44} {state}, {run.rounds} rounds, run {run.run_id}", soft_wrap=True)
    if not unfinished:
        console.print("nothing is left to run")
        return
    placement, device = request.place(unfinished[0], nodes), unfinished[0].config.device
    most = len(unfinished)
    at_once = min(estimate.concurrent_cells(placement, nodes), options.max_concurrent or most, most)
    console.print(f"resources: a cell is {placement}, on {device}; {at_once} at a time on {where}", soft_wrap=True)
    kept = decimal(sum(state_bytes(run.config, run.info, run.rounds) for run in runs))
    disk = [f"{kept} of final states stay (none with --no-keep-final)"] if options.keep_final else []
    checkpoint = max(state_bytes(run.config, run.info, next_round=1) for run in unfinished)  # the largest
    most_at_once = decimal(CHECKPOINTS_AT_ONCE * at_once * checkpoint)
    disk.append(f"while cells run, up to {most_at_once} of checkpoints{' beside them' if disk else ''}")
    console.print(f"disk: {'; '.join(disk)}", soft_wrap=True)
    if device == "cuda" and not estimate.this_machine()["GPU"]:
        console.print("time: not estimated, because steps are timed in this process and it sees no GPU", soft_wrap=True)
        return
    seconds = estimate.grid_seconds(unfinished, placement, nodes, at_once)
    console.print(
        f"time: about {duration(seconds + estimate.START_S)}, from a few steps timed here and now; nothing was started",
        soft_wrap=True,
    )
