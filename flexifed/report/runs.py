"""What lies in a results folder: which cells, how far they have got, and which of them may stand in one table.

A table is true only of cells that ran under the same settings on the same data for the same rounds. So cells are sorted
into editions, by what their files say about themselves; each edition gets its own table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from flexifed.config import CellConfig, CellName, NumericsConfig, SharingConfig
from flexifed.profiles import PROFILES
from flexifed.results.store import ResultsFolder, read_summary

_OF_THE_CELL = ("dataset", "family", "scheme", "seed")


@dataclass(frozen=True, kw_only=True)
class StoredCell:
    """One file: a cell under one seed.

    Attributes:
        name: of the file, without its ending.
        cell: data set, family and scheme.
        seed: its seed.
        last_round: the last round it has scores of.
        rounds: of training, that it was asked for; while a run that has ended is trained on, those that it ended with.
        extended_to: rounds that it is trained on to; None where it is not.
        profile: the name it was run under.
        data_source: `real`, `real-partial`, `real-other` or `synthetic`.
        fingerprint: of the data; empty where the file does not say.
        settings: its config without data set, family, scheme and seed, flat: `training.batch_size`.
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
        """Whether the score after its last round is there."""
        return self.last_round >= self.rounds

    @property
    def progress(self) -> str:
        """How far it has got, in words."""
        return f"{self.cell} seed {self.seed}: round {self.last_round} of {self.extended_to or self.rounds}"


@dataclass(frozen=True)
class Edition:
    """Cells that may stand in one table. `fingerprint` is of their data, where other cells differ in nothing else."""

    cells: tuple[StoredCell, ...]
    fingerprint: str = ""

    @property
    def finished(self) -> tuple[StoredCell, ...]:
        """The cells that have all their scores."""
        return tuple(cell for cell in self.cells if cell.is_finished)

    @property
    def unfinished(self) -> tuple[StoredCell, ...]:
        """The others."""
        return tuple(cell for cell in self.cells if not cell.is_finished)

    @property
    def title(self) -> str:
        """What tells it from other editions: profile, rounds, data, and settings that are not the profile's."""
        one = self.cells[0]
        device = one.settings.get("device")
        data = f"{one.data_source} data" + (f" ({self.fingerprint})" if self.fingerprint else "")
        words = [f"profile {one.profile}", f"{one.rounds} rounds", data]
        words += [str(device)] if device else []
        changed = [f"{name}={value}" for name, value in changed_settings(one).items()]
        return ", ".join(words) + (f"; not the profile's: {', '.join(changed)}" if changed else "")


def stored_cells(folder: ResultsFolder) -> list[StoredCell]:
    """Every cell that has a file, in the order of their names.

    Raises:
        ResultsError: a file is damaged.
    """
    paths = sorted(path for path in folder.rounds.glob("*.parquet") if not path.name.startswith("."))
    return [one for path in paths if (one := stored_cell(path)) is not None]


def editions(cells: Sequence[StoredCell]) -> list[Edition]:
    """Sort cells by all that has to be the same in one table: profile, rounds, data and settings."""
    fingerprints: dict[tuple[str, ...], set[str]] = {}
    for one in cells:
        fingerprints.setdefault((*_common_key(one), one.cell.dataset), set()).add(one.fingerprint)
    found: dict[tuple[str, ...], list[StoredCell]] = {}
    for one in cells:
        key = _common_key(one)
        # Each data set has its own fingerprint; only one that comes in two contents can't stand in one table.
        several = len(fingerprints[*key, one.cell.dataset]) > 1
        found.setdefault((*key, one.fingerprint if several else ""), []).append(one)
    return [Edition(tuple(members), fingerprint) for (*_, fingerprint), members in sorted(found.items())]


def changed_settings(cell: StoredCell) -> dict[str, object]:
    """The settings that are not its profile's defaults; empty for a profile that is not known here."""
    profile = PROFILES.get(cell.profile)
    if profile is None:
        return {}
    defaults = _flat({name: asdict(getattr(profile, name)) for name in ("model", "partition", "training")})
    defaults |= _flat({"sharing": asdict(SharingConfig()), "numerics": asdict(NumericsConfig())})
    return {name: value for name, value in cell.settings.items() if name in defaults and value != defaults[name]}


def forerunner(
    folder: ResultsFolder, config: CellConfig, profile: str, fingerprint: str
) -> tuple[StoredCell, str] | None:
    """The stored run of the same cell, seed and profile that differs least from a new one, and in what.

    Args:
        folder: of one experiment.
        config: of the new run.
        profile: its profile.
        fingerprint: of its data.

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
    """What a file says about itself; None where it has no rows.

    Raises:
        ResultsError: the file is damaged.
    """
    summary = read_summary(path)
    if summary is None:
        return None
    metadata = summary.metadata
    asked_for = int(metadata.get("rounds", summary.last_round))
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
    """A config, flat, without what names the cell.

    As in a run's id, recorded steps and Winograd's algorithm count where they are used. Files from before these were
    there did not use them.
    """
    settings = _flat({name: value for name, value in config.items() if name not in _OF_THE_CELL})
    by_winograd = settings.pop("numerics.winograd", None)
    if settings.get("device") == "cpu" and settings.get("numerics.precision") is None:
        settings["numerics.winograd"] = bool(by_winograd)
    if not settings.get("numerics.cuda_graph"):
        settings.pop("numerics.cuda_graph", None)
    return settings


def _common_key(cell: StoredCell) -> tuple[str, ...]:
    # Like a run's id: a setting that is None is none, so files from before it was thought of are of the same edition.
    settings = json.dumps({name: value for name, value in cell.settings.items() if value is not None}, sort_keys=True)
    return (cell.profile, f"{cell.rounds:09}", cell.data_source, settings)


def _flat(nested: Mapping[str, object]) -> dict[str, object]:
    """`{"model": {"width": 1.0}}` as `{"model.width": 1.0}`."""
    flat: dict[str, object] = {}
    for name, value in nested.items():
        inner = value if isinstance(value, Mapping) else None
        flat |= {name: value} if inner is None else {f"{name}.{key}": one for key, one in inner.items()}
    return flat


def nothing_there(folder: ResultsFolder) -> str:
    """What to say, and what to do, where a folder has no results."""
    above = folder.root.parent
    others = sorted(one.parent.name for one in above.glob("*/rounds") if any(one.glob("*.parquet")))
    if others:
        return f"no results in {folder.rounds}; {above} has results of: {', '.join(others)} (choose with --experiment)"
    return (
        f"no results in {folder.rounds}; give the --results-dir of a run, or run an experiment, such as uv run python "
        f"experiments/table1.py --results-dir {above}"
    )
