"""What a run was computed with, for the metadata of its Parquet file."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from flexifed.cells.run import CellRun

_OF_AN_ATTEMPT = ("computed_on", "machine", "versions")
_PACKAGES = ("flexifed", "torch", "torchvision", "torchaudio", "soundfile", "ray", "numpy", "pyarrow")


def provenance(run: CellRun, placement: str, exchange: str, computed_on: Iterable[str]) -> dict[str, Any]:
    """Describe a run: its settings, its data, where it runs, its hardware and its versions.

    Args:
        run: the run.
        placement: where the run's clients are, in words.
        exchange: how tensors get from process to process, in words.
        computed_on: the name of each process's device.
    """
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # it runs from a source folder
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
    """List what computed which rounds of a run. A run may resume on other hardware or under other versions.

    Args:
        now: `provenance` of the run as it resumes.
        stored: metadata of the run's existing file; empty if there is none.
        next_round: the round with which the run resumes.

    Returns:
        An entry for each part of the rounds, and whether hardware or versions have changed since the rounds before, so
        that the last bits may differ from those of an uninterrupted run.
    """
    attempt = {"from_round": next_round, **{name: now[name] for name in _OF_AN_ATTEMPT}}
    if next_round == 0 or not stored:
        return [attempt], False
    first = {"from_round": 0, **{name: stored.get(name) for name in _OF_AN_ATTEMPT}}
    before = [entry for entry in stored.get("attempts", [first]) if entry["from_round"] < next_round]
    if before and _have_same_bits(before[-1], attempt):
        return before, False
    return [*before, attempt], bool(before)


def _have_same_bits(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether processor models, system, and the versions that both attempts list are the same, on whatever hosts."""

    def hardware(attempt: Mapping[str, Any]) -> tuple[set[str], str]:
        kinds = {name.rsplit(" in ", 1)[0] for name in attempt["computed_on"] or ()}
        return kinds, str(attempt["machine"]).rsplit(" ", 1)[0]

    versions, others = (attempt["versions"] or {} for attempt in (first, second))
    listed_by_both = versions.keys() & others.keys()
    return hardware(first) == hardware(second) and all(versions[name] == others[name] for name in listed_by_both)
