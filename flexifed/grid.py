"""A grid of cells, and the command-line options for running it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import tyro

from flexifed.config import (
    SCHEMES,
    CellConfig,
    CellName,
    DatasetName,
    Device,
    FamilyName,
    ModelConfig,
    NumericsConfig,
    PartitionConfig,
    PlacementOptions,
    SchemeName,
    SharingConfig,
    TrainingConfig,
)
from flexifed.errors import ConfigError, invalid_choice
from flexifed.profiles import PROFILES, ProfileName

_INT32_BOUND = 2**31  # rounds and clients are int32 columns
_FLAT: Any = tyro.conf.OmitArgPrefixes


@dataclass(frozen=True, kw_only=True)
class GridOptions:
    """Options for running a grid. The groups at the end are settings that decide numbers."""

    profile: ProfileName = "quick"
    """smoke: seconds. quick: minutes. thin: half an hour a row and seed. authors: as published. paper: 40 clients."""
    only: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="DATASET/FAMILY/SCHEME")] = ()
    """Run only these cells, as --dry-run lists them; wildcards in quotes: 'cifar10/*/max_common'. Repeatable."""
    seeds: tuple[int, ...] = (0,)
    """Run every cell once under each of these seeds."""
    rounds: int = PROFILES["quick"].rounds
    """Rounds of training. A longer run begins with exactly the numbers of a shorter one."""
    data: Literal["auto", "real", "synthetic"] = "auto"
    """auto: real data where they are found, otherwise a synthetic stand-in; the output says which."""
    data_dir: Path = Path("data")
    """Folder of the data sets. Default: $FLEXIFED_DATA_DIR, or ./data."""
    download: bool = False
    """Download missing data from their publishers."""
    results_dir: Path = Path("results")
    """Folder for results; on a cluster, one that all nodes see. Default: $FLEXIFED_RESULTS_DIR, or ./results."""
    address: str | None = None
    """A running Ray cluster to join ('auto' finds one here). Default: $RAY_ADDRESS; if unset, Ray is started here."""
    min_nodes: int = 1
    """On a cluster, wait until this many nodes that can hold clients have joined it, for at most half an hour."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where clients compute. auto: cuda if the cluster has a GPU."""
    max_concurrent: int | None = None
    """Largest number of cells to run at once. Default: as many as fit."""
    checkpoint_every: int | None = None
    """Rounds between checkpoints. Default: by time, at least a minute apart, taking less than 3 % of the run."""
    retry_out_of_memory: bool = False
    """If clients that share a GPU run out of its memory, run their cell again with half as many of them at a time."""
    keep_final: bool = True
    """Keep each cell's final state, so that the same command with more --rounds continues from it."""
    fresh: bool = False
    """Start over in a new folder beside the existing results; nothing is deleted."""
    dry_run: bool = False
    """Print the cells, resources and estimated time. Nothing is trained; with --download, data are fetched."""
    placement: Annotated[PlacementOptions, _FLAT] = field(default_factory=PlacementOptions)
    model: Annotated[ModelConfig, _FLAT] = field(default_factory=ModelConfig)
    partition: Annotated[PartitionConfig, _FLAT] = field(default_factory=PartitionConfig)
    training: Annotated[TrainingConfig, _FLAT] = field(default_factory=TrainingConfig)
    sharing: Annotated[SharingConfig, _FLAT] = field(default_factory=SharingConfig)
    numerics: Annotated[NumericsConfig, _FLAT] = field(default_factory=NumericsConfig)

    def __post_init__(self) -> None:
        for name in ("rounds", "max_concurrent", "checkpoint_every", "min_nodes"):
            value = getattr(self, name)
            if value is not None and not 1 <= value < _INT32_BOUND:
                raise ConfigError(f"{name} is {value}; it must be a whole number of at least 1 and below 2**31")
        if self.min_nodes > 1 and not self.address:
            raise ConfigError(
                f"min_nodes is {self.min_nodes}, but Ray is started on this machine alone; name a cluster by --address "
                "or RAY_ADDRESS, or leave --min-nodes out"
            )
        distinct = len(set(self.seeds)) == len(self.seeds) > 0
        if not distinct or min(self.seeds) < 0 or max(self.seeds) >= 2**63:
            raise ConfigError(f"seeds is {list(self.seeds)}; give at least one, all different, from 0 to 2**63 - 1")

    def cell_config(self, cell: CellName, seed: int, device: Device) -> CellConfig:
        """The config of one cell under one seed."""
        return CellConfig(
            dataset=cell.dataset,
            family=cell.family,
            scheme=cell.scheme,
            seed=seed,
            device=device,
            model=self.model,
            partition=self.partition,
            training=self.training,
            sharing=self.sharing,
            numerics=self.numerics,
        )


def make_cells(rows: Sequence[tuple[str, str]]) -> list[CellName]:
    """The cells of all schemes for each (data set, family).

    Raises:
        ConfigError: there is no row, or a row is there twice.
    """
    if not rows or len({tuple(row) for row in rows}) < len(rows):
        raise ConfigError(f"rows is {rows!r}; give at least one (data set, family), each once")
    return [
        CellName(cast(DatasetName, dataset), cast(FamilyName, family), cast(SchemeName, scheme))
        for dataset, family in rows
        for scheme in SCHEMES
    ]


def select_cells(cells: Sequence[CellName], only: Sequence[str]) -> list[CellName]:
    """Select the cells that match any of the patterns, or all cells if there are no patterns.

    Raises:
        ConfigError: a pattern matches no cell.

    >>> [str(cell) for cell in select_cells(make_cells([("cifar10", "vgg")]), ["*/vgg/max*"])]
    ['cifar10/vgg/max_common']
    """
    for pattern in only:
        if not any(fnmatchcase(str(cell), pattern) for cell in cells):
            parts = (
                f"{field_name} {', '.join(dict.fromkeys(getattr(cell, field_name) for cell in cells))}"
                for field_name in ("dataset", "family", "scheme")
            )
            raise ConfigError(
                f"--only {pattern!r} matches no cell; write DATASET/FAMILY/SCHEME with {'; '.join(parts)}; or * for any"
            )
    return [cell for cell in cells if not only or any(fnmatchcase(str(cell), pattern) for pattern in only)]


def parse_options(
    argv: Sequence[str] | None, *, prog: str, description: str, environ: Mapping[str, str] = os.environ
) -> GridOptions:
    """Parse a command line. Defaults are those of the profile that it names.

    Raises:
        ConfigError: a setting has an invalid value.
        SystemExit: the line can't be parsed (status 2), or asks for `--help` (status 0).
    """
    first_look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first_look.add_argument("--profile", default="quick", nargs="?")
    name = first_look.parse_known_args(argv)[0].profile
    if name not in PROFILES:
        raise ConfigError(invalid_choice("profile", name, PROFILES))
    profile = PROFILES[name]
    defaults = GridOptions(
        profile=cast(ProfileName, name),
        rounds=profile.rounds,
        data_dir=Path(environ.get("FLEXIFED_DATA_DIR") or "data"),
        results_dir=Path(environ.get("FLEXIFED_RESULTS_DIR") or "results"),
        address=environ.get("RAY_ADDRESS") or None,
        model=profile.model,
        partition=profile.partition,
        training=profile.training,
    )
    return tyro.cli(GridOptions, prog=prog, description=description, args=argv, default=defaults)
