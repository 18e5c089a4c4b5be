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


def attempts(now: Mapping[str, Any], stored: Mapping[str, Any], next_round: int) -> list[dict[str, Any]]:
    """What computed which rounds: a run that goes on elsewhere, or under other versions, says so of both parts.

    Args:
        now: `provenance` of what goes on.
        stored: metadata of the file that is there; empty if there is none.
        next_round: that it goes on with.
    """
    attempt = {"from_round": next_round, **{name: now[name] for name in _OF_AN_ATTEMPT}}
    if next_round == 0 or not stored:
        return [attempt]
    first = {"from_round": 0, **{name: stored.get(name) for name in _OF_AN_ATTEMPT}}
    before = [one for one in stored.get("attempts", [first]) if one["from_round"] < next_round]
    if before and _decides_bits(before[-1]) == _decides_bits(attempt):
        return before
    return [*before, attempt]


def _decides_bits(attempt: Mapping[str, Any]) -> tuple[object, ...]:
    """What of an attempt can change the last bits: kinds of processor and of system, and versions, but no host."""
    kinds = {name.rsplit(" in ", 1)[0] for name in attempt["computed_on"] or ()}
    return kinds, str(attempt["machine"]).rsplit(" ", 1)[0], attempt["versions"]
