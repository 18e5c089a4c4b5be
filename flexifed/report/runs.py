"""The contents of a results folder: which cells it has, their progress, and which of them may share a table.

Only cells that ran with the same settings on the same data for the same number of rounds can be compared. So cells are
grouped into editions by what their files record, and each edition has its own table.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from flexifed.config import CellConfig, CellName, NumericsConfig, SharingConfig
from flexifed.errors import ResultsError
from flexifed.profiles import PROFILES
from flexifed.results.rounds_file import read_summary
from flexifed.results.store import ResultsFolder

_CELL_FIELDS = ("dataset", "family", "scheme", "seed")
_OF_TABLE_1 = {
    "model.versions": None,
    "partition.dirichlet_alpha": None,
    "sharing.classifier": "prefix",
    "sharing.clients_per_round": None,
}
"""Settings that make another experiment than the paper's Table 1, with the values that they have there. Files that are
older than a setting have these values too."""


@dataclass(frozen=True, kw_only=True)
class StoredCell:
    """The file of one cell and seed.

    Attributes:
        name: the name of the file, without its extension.
        cell: data set, family and scheme.
        seed: the seed of the run.
        last_round: the last round that the file has scores of.
        rounds: the number of rounds of training that were requested; for a finished run that is being trained further,
            the number it had finished before.
        extended_to: the number of rounds that a finished run is being trained to; None for all other runs.
        profile: the name of the profile that the run was started with.
        data_source: `real`, `real-partial`, `real-other` or `synthetic`.
        fingerprint: the fingerprint of the data; empty if the file records none.
        settings: the config without data set, family, scheme and seed, as a flat mapping with keys such as
            `training.batch_size`.
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
    def has_settings_of_table_1(self) -> bool:
        """Whether the settings are those of the paper's Table 1, if only in a smaller version."""
        return all(self.settings.get(name, value) == value for name, value in _OF_TABLE_1.items())

    @property
    def progress(self) -> str:
        """The run and its latest round, as text."""
        return f"{self.cell} seed {self.seed}: round {self.last_round} of {self.extended_to or self.rounds}"


@dataclass(frozen=True)
class Edition:
    """Cells that may share a table.

    `fingerprint` identifies their data if another edition differs from this one only in its data, else it is empty.
    """

    cells: tuple[StoredCell, ...]
    fingerprint: str = ""

    @property
    def finished(self) -> tuple[StoredCell, ...]:
        """The cells that have all their scores."""
        return tuple(cell for cell in self.cells if cell.is_finished)

    @property
    def unfinished(self) -> tuple[StoredCell, ...]:
        """The cells that lack scores."""
        return tuple(cell for cell in self.cells if not cell.is_finished)

    @property
    def title(self) -> str:
        """Profile, number of rounds, data, device, and the settings that differ from the profile's."""
        cell = self.cells[0]
        device = cell.settings.get("device")
        data = f"{cell.data_source} data" + (f" ({self.fingerprint})" if self.fingerprint else "")
        parts = [f"profile {cell.profile}", f"{cell.rounds} rounds", data]
        parts += [str(device)] if device else []
        changed = [f"{name}={value}" for name, value in changed_settings(cell).items()]
        return ", ".join(parts) + (f"; not the profile's: {', '.join(changed)}" if changed else "")


def stored_cells(folder: ResultsFolder) -> list[StoredCell]:
    """Read the summaries of all cells that have a file, sorted by file name.

    Raises:
        ResultsError: the folder can't be read, or a file is damaged.
    """
    return [cell for path in rounds_files(folder.rounds) if (cell := stored_cell(path)) is not None]


def rounds_files(folder: Path) -> list[Path]:
    """The Parquet files in a folder, sorted by name; none if the folder does not exist.

    Raises:
        ResultsError: the folder can't be read.
    """
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise ResultsError(
            f"can't look for results in {folder}: {error.strerror or error}; make it readable, or choose another folder"
        ) from error
    return [folder / name for name in sorted(names) if name.endswith(".parquet") and not name.startswith(".")]


def editions(cells: Sequence[StoredCell]) -> list[Edition]:
    """Group cells by all that has to be the same within a table: profile, rounds, data and settings."""
    fingerprints: dict[tuple[str, ...], set[str]] = {}
    for cell in cells:
        fingerprints.setdefault((*_common_key(cell), cell.cell.dataset), set()).add(cell.fingerprint)
    groups: dict[tuple[str, ...], list[StoredCell]] = {}
    for cell in cells:
        key = _common_key(cell)
        # Fingerprints always differ between data sets; cells are kept apart only if one data set has several.
        has_several = len(fingerprints[*key, cell.cell.dataset]) > 1
        groups.setdefault((*key, cell.fingerprint if has_several else ""), []).append(cell)
    return [Edition(tuple(members), fingerprint) for (*_, fingerprint), members in sorted(groups.items())]


def changed_settings(cell: StoredCell) -> dict[str, object]:
    """The settings that differ from the profile's defaults; empty if flexifed has no profile of this name."""
    profile = PROFILES.get(cell.profile)
    if profile is None:
        return {}
    defaults = _flat({name: asdict(getattr(profile, name)) for name in ("model", "partition", "training")})
    defaults |= _flat({"sharing": asdict(SharingConfig()), "numerics": asdict(NumericsConfig())})
    return {name: value for name, value in cell.settings.items() if name in defaults and value != defaults[name]}


def forerunner(
    folder: ResultsFolder, config: CellConfig, profile: str, fingerprint: str
) -> tuple[StoredCell, str] | None:
    """Find the stored run of the same cell, seed and profile that differs from a new run in the fewest settings.

    Args:
        folder: the folder of the experiment.
        config: the config of the new run.
        profile: the profile of the new run.
        fingerprint: the fingerprint of the new run's data.

    Returns:
        The stored run and a text that lists the differences; None if there is no such run. Damaged files are passed
        over: they do not concern the new run, and `flexifed report` names them.
    """
    new = _settings(asdict(config)) | {"data": fingerprint}
    closest: tuple[StoredCell, dict[str, str]] | None = None
    for path in folder.rounds.glob(f"{config.dataset}-*-{config.family}-{config.scheme}-seed{config.seed}-*.parquet"):
        cell = None
        with suppress(ResultsError):
            cell = stored_cell(path)
        if cell is None or cell.profile != profile:
            continue
        stored = {**cell.settings, "data": cell.fingerprint}
        differences = {
            name: f"{name} {stored.get(name, 'not set')} -> {new.get(name, 'not set')}"
            for name in sorted({*stored, *new})
            if stored.get(name) != new.get(name)
        }
        if differences and (closest is None or len(differences) < len(closest[1])):
            closest = cell, differences
    return (closest[0], ", ".join(closest[1].values())) if closest else None


def stored_cell(path: Path) -> StoredCell | None:
    """Read the summary of a rounds file; None if it has no rows.

    Raises:
        ResultsError: the file is damaged or lacks its metadata.
    """
    summary = read_summary(path)
    if summary is None:
        return None
    metadata = summary.metadata
    if "rounds" not in metadata:
        raise ResultsError(
            f"{path} does not say how many rounds its run has: it lacks the metadata that flexifed stores in it, which "
            "pandas, for example, drops when it rewrites a file; restore the file, or move it away, and its cell is "
            "run again"
        )
    requested = int(metadata["rounds"])
    is_extended = summary.last_round < requested and "finished_rounds" in metadata
    return StoredCell(
        name=path.stem,
        cell=summary.cell,
        seed=summary.seed,
        last_round=summary.last_round,
        rounds=int(metadata["finished_rounds"]) if is_extended else requested,
        extended_to=requested if is_extended else None,
        profile=summary.profile,
        data_source=summary.data_source,
        fingerprint=str(metadata.get("data", {}).get("fingerprint", "")),
        settings=_settings(metadata.get("config", {})),
    )


def _settings(config: Mapping[str, object]) -> dict[str, object]:
    """Flatten a config, without the fields that name the cell.

    As in a run's id, recorded steps (CUDA graphs) and Winograd's algorithm count only where they are used. Files that
    are older than these settings did not use them.
    """
    settings = _flat({name: value for name, value in config.items() if name not in _CELL_FIELDS})
    by_winograd = settings.pop("numerics.winograd", None)
    if settings.get("device") == "cpu" and settings.get("numerics.precision") is None:
        settings["numerics.winograd"] = bool(by_winograd)
    if not settings.get("numerics.cuda_graph"):
        settings.pop("numerics.cuda_graph", None)
    return settings


def _common_key(cell: StoredCell) -> tuple[str, ...]:
    # As in a run's id, a setting of None counts as absent, so older files without the setting are in the same edition.
    settings = json.dumps({name: value for name, value in cell.settings.items() if value is not None}, sort_keys=True)
    return (cell.profile, f"{cell.rounds:09}", cell.data_source, settings)


def _flat(nested: Mapping[str, object]) -> dict[str, object]:
    """`{"model": {"width": 1.0}}` as `{"model.width": 1.0}`; sequences become text, as on a command line."""
    flat: dict[str, object] = {}
    for name, value in nested.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{key}": inner for key, inner in _flat(value).items()}
        else:
            flat[name] = " ".join(map(str, value)) if isinstance(value, list | tuple) else value
    return flat


def _experiments(results_dir: Path) -> list[str]:
    """The names of the experiments that have results; unreadable folders are left out."""
    names: list[str] = []
    with suppress(OSError):
        names = sorted(os.listdir(results_dir))
    experiments = []
    for name in names:
        with suppress(ResultsError):
            if rounds_files(results_dir / name / "rounds"):
                experiments.append(name)
    return experiments


def no_results_message(folder: ResultsFolder) -> str:
    """The error message for a folder without results: which other experiments have some, or how to get some."""
    results_dir = folder.root.parent
    if others := _experiments(results_dir):
        return (
            f"no results in {folder.rounds}; {results_dir} has results of: {', '.join(others)} (choose with "
            "--experiment, in Python with experiment=)"
        )
    if results_dir.name in ("rounds", "runs") and rounds_files(results_dir.parent / "rounds"):
        return f"{results_dir} is a part of an experiment's folder; give the whole folder, {results_dir.parent}"
    return (
        f"no results in {folder.rounds}; give the --results-dir of a run, or run an experiment, such as uv run python "
        f"experiments/table1.py --results-dir {results_dir}"
    )
