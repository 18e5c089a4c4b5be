"""What computed a run, for the metadata of its rows' file."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from flexifed.cells.run import CellRun

_OF_AN_ATTEMPT = ("computed_on", "machine", "versions")
_PACKAGES = ("flexifed", "torch", "torchvision", "ray", "numpy", "pyarrow")


def provenance(run: CellRun, placement: str, exchange: str, computed_on: Iterable[str]) -> dict[str, Any]:
    """What a run is, where it runs, on which hardware and under which versions.

    Args:
        run: the run.
        placement: words that say where it runs.
        exchange: words that say how tensors get from process to process.
        computed_on: what each of its processes computes on.
    """
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # run from a folder that is not installed
            versions[package] = "not installed"
    return {
        "run_id": run.run_id,
        "profile": run.profile,
        "rounds": run.rounds,
        "config": asdict(run.config),
        "data": asdict(run.info),
        "placement": placement,
        "exchange": exchange,
        "machine": f"{platform.system()} {platform.machine()} {platform.node()}",
        "versions": versions,
        "computed_on": sorted(set(computed_on)),
    }


def merge_attempts(
    now: Mapping[str, Any], stored: Mapping[str, Any], next_round: int
) -> tuple[list[dict[str, Any]], bool]:
    """Say what computed which rounds of a run that may have begun elsewhere, or under other versions.

    Args:
        now: `provenance` of the run as it resumes.
        stored: metadata of the run's file; empty if there is none.
        next_round: the round with which the run resumes.

    Returns:
        An entry for each part of the rounds, and whether what computes the next rounds differs, in a way that can
        change the last bits, from what computed those before.
    """
    attempt = {"from_round": next_round, **{name: now[name] for name in _OF_AN_ATTEMPT}}
    if next_round == 0 or not stored:
        return [attempt], False
    first = {"from_round": 0, **{name: stored.get(name) for name in _OF_AN_ATTEMPT}}
    before = [entry for entry in stored.get("attempts", [first]) if entry["from_round"] < next_round]
    if before and _decides_bits(before[-1]) == _decides_bits(attempt):
        return before, False
    return [*before, attempt], bool(before)


def _decides_bits(attempt: Mapping[str, Any]) -> tuple[object, ...]:
    """What of an attempt can change the last bits: kinds of processor and of system, and versions, but no host."""
    kinds = {name.rsplit(" in ", 1)[0] for name in attempt["computed_on"] or ()}
    return kinds, str(attempt["machine"]).rsplit(" ", 1)[0], attempt["versions"]
