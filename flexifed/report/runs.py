"""The contents of a results folder: its cells, their progress, and which of them may share a table.

Only cells with the same settings, data and number of rounds can be compared. So cells are grouped into editions, by the
metadata of their files, and each edition gets its own table.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from flexifed.config import CellConfig, CellName, NumericsConfig, SharingConfig
from flexifed.errors import ResultsError
from flexifed.profiles import PROFILES
from flexifed.results.store import ResultsFolder, read_summary

_CELL_FIELDS = ("dataset", "family", "scheme", "seed")


@dataclass(frozen=True, kw_only=True)
class StoredCell:
    """A file of rounds: a cell under one seed.

    Attributes:
        name: the file's name, without the suffix.
        cell: data set, family and scheme.
        seed: the seed.
        last_round: the last round for which the file has scores.
        rounds: the number of rounds of training that were asked for; while a finished run is trained further, the
            number with which it finished.
        extended_to: the number of rounds to which a finished run is being trained further; None for other runs.
        profile: name of the profile.
        data_source: `real`, `real-partial`, `real-other` or `synthetic`.
        fingerprint: fingerprint of the data; empty if the file has none.
        settings: the config without data set, family, scheme and seed, flattened: `training.batch_size`.
    """

    name: str
    cell: CellName
    seed: int
    last_round: int
    rounds: int
    extended_to: int | None
    profile: str
    data_source: str
    fingerprint: str
    settings: Mapping[str, object]

    @property
    def is_finished(self) -> bool:
        """Whether the file has the scores after the last round of training."""
        return self.last_round >= self.rounds

    @property
    def progress(self) -> str:
        """The progress of the run, in words."""
        return f"{self.cell} seed {self.seed}: round {self.last_round} of {self.extended_to or self.rounds}"


@dataclass(frozen=True)
class Edition:
    """Cells that may share a table. `fingerprint` is that of their data, if other cells differ in nothing else."""

    cells: tuple[StoredCell, ...]
    fingerprint: str = ""

    @property
    def finished(self) -> tuple[StoredCell, ...]:
        """The finished cells."""
        return tuple(cell for cell in self.cells if cell.is_finished)

    @property
    def unfinished(self) -> tuple[StoredCell, ...]:
        """The unfinished cells."""
        return tuple(cell for cell in self.cells if not cell.is_finished)

    @property
    def title(self) -> str:
        """What distinguishes the edition: profile, rounds, data, and settings that differ from the profile's."""
        cell = self.cells[0]
        device = cell.settings.get("device")
        data = f"{cell.data_source} data" + (f" ({self.fingerprint})" if self.fingerprint else "")
        words = [f"profile {cell.profile}", f"{cell.rounds} rounds", data]
        words += [str(device)] if device else []
        changed = [f"{name}={value}" for name, value in changed_settings(cell).items()]
        return ", ".join(words) + (f"; not the profile's: {', '.join(changed)}" if changed else "")


def stored_cells(folder: ResultsFolder) -> list[StoredCell]:
    """Read what every file of rounds says about itself, in the order of their names.

    Raises:
        ResultsError: the folder can't be read, or a file is damaged.
    """
    try:
        names = sorted(os.listdir(folder.rounds))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ResultsError(
            f"can't look for results in {folder.rounds}: {error.strerror or error}; choose another --results-dir"
        ) from error
    paths = [folder.rounds / name for name in names if name.endswith(".parquet") and not name.startswith(".")]
    return [cell for path in paths if (cell := stored_cell(path)) is not None]


def editions(cells: Sequence[StoredCell]) -> list[Edition]:
    """Group cells by everything that must be the same in a table: profile, rounds, data and settings."""
    fingerprints: dict[tuple[str, ...], set[str]] = {}
    for cell in cells:
        fingerprints.setdefault((*_common_key(cell), cell.cell.dataset), set()).add(cell.fingerprint)
    members: dict[tuple[str, ...], list[StoredCell]] = {}
    for cell in cells:
        key = _common_key(cell)
        # Each data set has its own fingerprint; cells are only kept apart if one data set has several.
        several = len(fingerprints[*key, cell.cell.dataset]) > 1
        members.setdefault((*key, cell.fingerprint if several else ""), []).append(cell)
    return [Edition(tuple(group), fingerprint) for (*_, fingerprint), group in sorted(members.items())]


def changed_settings(cell: StoredCell) -> dict[str, object]:
    """The settings that differ from the profile's defaults; empty for an unknown profile."""
    profile = PROFILES.get(cell.profile)
    if profile is None:
        return {}
    defaults = _flat({name: asdict(getattr(profile, name)) for name in ("model", "partition", "training")})
    defaults |= _flat({"sharing": asdict(SharingConfig()), "numerics": asdict(NumericsConfig())})
    return {name: value for name, value in cell.settings.items() if name in defaults and value != defaults[name]}


def forerunner(
    folder: ResultsFolder, config: CellConfig, profile: str, fingerprint: str
) -> tuple[StoredCell, str] | None:
    """Find the stored run of the same cell, seed and profile that differs least from a new run.

    Args:
        folder: the results of the experiment.
        config: the config of the new run.
        profile: its profile.
        fingerprint: the fingerprint of its data.

    Returns:
        The stored run and the differences, in words; None if there is no such run.

    Raises:
        ResultsError: a file is damaged.
    """
    now = _settings(asdict(config)) | {"data": fingerprint}
    closest: tuple[StoredCell, dict[str, str]] | None = None
    for path in folder.rounds.glob(f"{config.dataset}-*-{config.family}-{config.scheme}-seed{config.seed}-*.parquet"):
        cell = stored_cell(path)
        if cell is None or cell.profile != profile:
            continue
        before = {**cell.settings, "data": cell.fingerprint}
        differences = {
            name: f"{name} {before.get(name, 'not there')} -> {now.get(name, 'not there')}"
            for name in sorted({*before, *now})
            if before.get(name) != now.get(name)
        }
        if differences and (closest is None or len(differences) < len(closest[1])):
            closest = cell, differences
    return (closest[0], ", ".join(closest[1].values())) if closest else None


def stored_cell(path: Path) -> StoredCell | None:
    """Read what a file says about itself; None if it has no rows.

    Raises:
        ResultsError: the file is damaged, or its metadata are missing.
    """
    summary = read_summary(path)
    if summary is None:
        return None
    metadata = summary.metadata
    if "rounds" not in metadata:
        raise ResultsError(
            f"{path} does not say under which settings its rows were made: another program has saved it without its "
            "metadata; put back the file that the run wrote, or move this one away"
        )
    asked_for = int(metadata["rounds"])
    is_extended = summary.last_round < asked_for and "finished_rounds" in metadata
    return StoredCell(
        name=path.stem,
        cell=summary.cell,
        seed=summary.seed,
        last_round=summary.last_round,
        rounds=int(metadata["finished_rounds"]) if is_extended else asked_for,
        extended_to=asked_for if is_extended else None,
        profile=summary.profile,
        data_source=summary.data_source,
        fingerprint=str(metadata.get("data", {}).get("fingerprint", "")),
        settings=_settings(metadata.get("config", {})),
    )


def _settings(config: Mapping[str, object]) -> dict[str, object]:
    """Flatten a config, without the fields that name the cell.

    As in a run's id, recorded steps and Winograd's algorithm only count if they are used. Files that are older than
    these settings did not use them.
    """
    settings = _flat({name: value for name, value in config.items() if name not in _CELL_FIELDS})
    by_winograd = settings.pop("numerics.winograd", None)
    if settings.get("device") == "cpu" and settings.get("numerics.precision") is None:
        settings["numerics.winograd"] = bool(by_winograd)
    if not settings.get("numerics.cuda_graph"):
        settings.pop("numerics.cuda_graph", None)
    return settings


def _common_key(cell: StoredCell) -> tuple[str, ...]:
    # As in a run's id, settings that are None are left out: files that are older than such a setting share the edition.
    settings = json.dumps({name: value for name, value in cell.settings.items() if value is not None}, sort_keys=True)
    return (cell.profile, f"{cell.rounds:09}", cell.data_source, settings)


def _flat(nested: Mapping[str, object]) -> dict[str, object]:
    """`{"model": {"width": 1.0}}` as `{"model.width": 1.0}`."""
    flat: dict[str, object] = {}
    for name, value in nested.items():
        inner = value if isinstance(value, Mapping) else None
        flat |= {name: value} if inner is None else {f"{name}.{key}": item for key, item in inner.items()}
    return flat


def nothing_there(folder: ResultsFolder) -> str:
    """The message for a folder without results, with the remedy."""
    above = folder.root.parent
    if any((above / "rounds").glob("*.parquet")):  # somebody has named an experiment's own folder
        return f"no results in {folder.rounds}; {above} itself has some (choose them with --experiment .)"
    others = sorted(rounds.parent.name for rounds in above.glob("*/rounds") if any(rounds.glob("*.parquet")))
    if others:
        return f"no results in {folder.rounds}; {above} has results of: {', '.join(others)} (choose with --experiment)"
    return (
        f"no results in {folder.rounds}; give the --results-dir of a run, or run an experiment, such as uv run python "
        f"experiments/table1.py --results-dir {above}"
    )
