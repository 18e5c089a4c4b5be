"""Whether stored runs averaged the layers that they would average now: a scheme's code is not part of a run's id."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from flexifed.cells.run import CellRun
from flexifed.config import CellConfig
from flexifed.core.schemes import SharingPlan
from flexifed.errors import ResultsError
from flexifed.federation.cell import cell_plan
from flexifed.results.rounds_file import read_metadata
from flexifed.results.store import ResultsFolder
from flexifed.wording import counted


def shared_otherwise(metadata: Mapping[str, Any], plan: SharingPlan) -> bool:
    """Whether a run, whose file has this metadata, averaged other layers than this plan. Older files do not say."""
    return bool(metadata.get("plan_sha256", plan.digest) != plan.digest)


def check_plans(finished: Iterable[CellRun]) -> None:
    """Check that finished runs averaged the layers that they would average now.

    Raises:
        ResultsError: some did not, so their scheme or models have been edited since; it names them all.
    """
    plans: dict[CellConfig, SharingPlan] = {}
    edited = []
    for run in finished:
        config = replace(run.config, seed=0)  # which plans don't depend on
        if config not in plans:
            plans[config] = cell_plan(config, run.info)
        if shared_otherwise(read_metadata(ResultsFolder(run.results).rounds_file(run.name)), plans[config]):
            edited.append(run.label)
    if edited:
        raise ResultsError(
            f"{counted(len(edited), 'finished run')} shared other layers in training than now ({', '.join(edited)}); "
            "undo edits of the scheme or the models, or start over with --fresh"
        )
