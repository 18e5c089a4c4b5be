"""Studies: results that may be compared, with their rows and the tables made from them."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from flexifed.config import CellName
from flexifed.errors import ResultsError
from flexifed.profiles import PROFILES
from flexifed.report.compare import PAIRED, paired_differences, render_differences
from flexifed.report.curves import BASELINE, REACHED, Target, drawable_rows, render_speedups, rounds_to_target, speedups
from flexifed.report.runs import (
    Edition,
    StoredCell,
    changed_settings,
    editions,
    no_results_message,
    rounds_files,
    stored_cell,
    stored_cells,
)
from flexifed.report.sheet import Sheet
from flexifed.report.table import (
    ACCURACY,
    ACCURACY_OF_TABLE_1,
    CELL,
    Pick,
    Summary,
    data_warnings,
    paper_table,
    per_seed,
    picked_rounds,
    render,
    summarise,
)
from flexifed.results.attempts import newest_folder
from flexifed.results.store import ResultsFolder
from flexifed.wording import counted

COLUMNS = [*CELL, "data_source", "seed", "version", "round", "accuracy", "bytes_up"]
"""The columns of rounds files that reports use."""
_MAX_NAMED = 8  # unfinished cells that are listed; of the others only the number is given
_PROFILE_CHARACTERS = 60  # of a profile's name in the name of a folder


@dataclass(frozen=True)
class Study:
    """One edition of results. Its tables show finished cells only.

    Attributes:
        edition: the cells.
        finished: the rows of the finished cells, with the columns `COLUMNS`.
        unfinished: the rows of the unfinished cells, with the same columns.
        has_namesake: whether another study of the folder would have the same slug without a digest.
    """

    edition: Edition
    finished: pd.DataFrame
    unfinished: pd.DataFrame
    has_namesake: bool = False

    @property
    def title(self) -> str:
        """Profile, rounds, data, device, and the settings that differ from the profile's."""
        return self.edition.title

    @property
    def rounds(self) -> int:
        """The number of rounds of training that were requested."""
        return self.edition.cells[0].rounds

    @property
    def data_source(self) -> str:
        """`real`, `real-partial`, `real-other` or `synthetic`; the same for all cells."""
        return self.edition.cells[0].data_source

    @property
    def seeds(self) -> list[int]:
        """The seeds of the finished cells, or of all cells if none is finished."""
        return sorted({cell.seed for cell in self.edition.finished or self.edition.cells})

    @property
    def slug(self) -> str:
        """A name for files: profile, rounds, data source and device, with a digest if they do not identify the study.

        The parts are read from files, so characters that are not safe in a file name are replaced with `_`.
        """
        cell = self.edition.cells[0]
        profile = _file_name(cell.profile)[:_PROFILE_CHARACTERS]
        words = [profile, str(cell.rounds), _file_name(cell.data_source)]
        is_changed = bool(changed_settings(cell)) or cell.profile not in PROFILES
        if is_changed or self.edition.fingerprint or self.has_namesake:
            renamed = [cell.profile] if profile != cell.profile else []
            content = json.dumps([dict(cell.settings), self.edition.fingerprint, *renamed], sort_keys=True)
            words.append(hashlib.sha256(content.encode()).hexdigest()[:8])
        return "-".join(
            [*words, *[_file_name(str(cell.settings[name])) for name in ("device",) if name in cell.settings]]
        )

    def contents(self) -> list[str]:
        """Lines that say how many cells, runs and seeds the study has, how much of the paper's table it covers, and
        which runs are unfinished.
        """
        cells = self.edition.cells
        finished, names = self.edition.finished, {cell.cell for cell in cells}
        paper = _paper_cells()
        coverage = "another experiment than the paper's Table 1"
        if self.is_of_table_1:
            coverage = f"{len(names.intersection(paper))} of the {len(paper)} cells of the paper's Table 1"
        lines = [
            f"Here: {counted(len(names), 'cell')}, {counted(len(finished), 'finished run')} of {len(cells)}"
            f" ({counted(len({cell.seed for cell in cells}), 'seed')}); "
            f"{coverage}."
        ]
        if not finished:
            lines.append("No cell is finished.")
        extended = [cell for cell in finished if cell.extended_to]
        return [
            *lines,
            *_progress_lines("Unfinished, left out of the tables:", self.edition.unfinished),
            *_progress_lines(f"Being trained further; the tables show them with {self.rounds} rounds:", extended),
        ]

    @property
    def is_of_table_1(self) -> bool:
        """Whether cells are of the paper's Table 1, if only in a smaller version."""
        cells = self.edition.cells
        return cells[0].has_settings_of_table_1 and not {cell.cell for cell in cells}.isdisjoint(_paper_cells())

    def summary(self, pick: Pick = "last") -> Summary:
        """The numbers of Table 1, or of another experiment in the same form."""
        return summarise(self.finished, self.rounds, pick, compare=self.is_of_table_1)

    def describe(self) -> Sheet:
        """The title and the lines of `contents`, as a sheet."""
        return Sheet(self.title, (), (), tuple(self.contents()))

    def table(self, pick: Pick = "last", seeds: Sequence[int] | None = None) -> Sheet:
        """Lay out Table 1, with the paper's numbers if the data are real and the experiment is the paper's.

        Args:
            pick: the rounds that each number is taken from.
            seeds: the seeds that were requested; the notes name cells that have fewer. None: the seeds of the study.
        """
        if self.finished.empty:
            return self._empty(ACCURACY_OF_TABLE_1 if self.is_of_table_1 else ACCURACY)
        cell = self.edition.cells[0]
        return render(
            self.summary(pick),
            profile=cell.profile,
            rounds=self.rounds,
            seeds=self.seeds if seeds is None else seeds,
            pick=pick,
            changed=changed_settings(cell),
        )

    def differences(self, pick: Pick = "last") -> Sheet:
        """Lay out paired differences between schemes, which need at least two seeds."""
        if self.finished.empty:
            return self._empty(PAIRED)
        numbers = per_seed(self.finished, self.rounds, pick)
        differences = paired_differences(numbers) if len(self.seeds) > 1 else []
        if not differences:
            return self._empty(PAIRED, "Needs two seeds, and two schemes on the same data set and family.")
        return self._with_notes(
            render_differences(differences, PAIRED, paired_differences(numbers, by_seed=True)), pick
        )

    def speedups(self, pick: Pick = "last", target: Target = None) -> Sheet:
        """Lay out the rounds to a target and the speed-up over Clustered-FL."""
        if self.finished.empty:
            return self._empty(REACHED)
        reached = rounds_to_target(self.finished, self.rounds, target, pick)
        if reached.empty:
            return self._empty(REACHED, f"Needs a finished run of {BASELINE}, or a target.")
        return self._with_notes(render_speedups(speedups(reached), rounds=self.rounds, target=target, pick=pick), pick)

    def sheets(self, pick: Pick = "last", target: Target = None) -> list[Sheet]:
        """Make every table that the study has rows for."""
        sheets = (self.table(pick), self.differences(pick), self.speedups(pick, target))
        return [sheet for sheet in sheets if sheet.sections]

    def _empty(self, title: str, why: str = "No cell is finished.") -> Sheet:
        return Sheet(f"{title}, {self.title}", (), (), (why,))

    def _with_notes(self, sheet: Sheet, pick: Pick) -> Sheet:
        """Add notes about settings and data, with a warning if the data are not the real ones, as in Table 1."""
        about = f"{self.title[0].upper()}{self.title[1:]}. Accuracy: {picked_rounds(self.rounds, pick)}."
        return replace(sheet, notes=(*sheet.notes, about, *data_warnings([self.data_source])))

    def curve_rows(self) -> pd.DataFrame:
        """Select the rows that figures are drawn from, with `flexifed.report.curves.drawable_rows`."""
        return drawable_rows(self.unfinished, self.finished)


def load(folder: ResultsFolder, profile: str | None = None) -> list[Study]:
    """Load the studies of a results folder.

    Args:
        folder: the folder of one experiment.
        profile: load only cells that ran under this profile; None for all.

    Raises:
        ResultsError: there are no results, or none of this profile; or a folder or file can't be read.
    """
    cells = stored_cells(folder)
    if not cells:
        raise ResultsError(no_results_message(folder))
    chosen = [cell for cell in cells if profile in (None, cell.profile)]
    if not chosen:
        profiles = ", ".join(sorted({cell.profile for cell in cells}))
        raise ResultsError(f"no results of profile {profile!r} in {folder.root}; choose one of: {profiles}")
    return _studies(folder, chosen)


def studies_of(folder: ResultsFolder, names: Sequence[str], *, profile: str, rounds: int) -> list[Study]:
    """Load the runs of one command; they make several studies if their data have different sources.

    Args:
        folder: the folder of the experiment.
        names: the names of the runs' files, without the ending.
        profile: the profile of the command; runs with the same settings may be stored under another profile.
        rounds: the number of rounds of the command; further rounds of stored runs are left out.

    Raises:
        ResultsError: a file is damaged.
    """
    cells = (stored_cell(folder.rounds_file(name)) for name in names)
    return _studies(folder, [replace(cell, profile=profile, rounds=rounds, extended_to=None) for cell in cells if cell])


def _studies(folder: ResultsFolder, cells: Sequence[StoredCell]) -> list[Study]:
    studies = [
        Study(edition, _rows(folder, edition.finished), _rows(folder, edition.unfinished))
        for edition in editions(cells)
    ]
    counts = Counter(study.slug for study in studies)
    return [replace(study, has_namesake=counts[study.slug] > 1) for study in studies]


def _rows(folder: ResultsFolder, cells: Sequence[StoredCell]) -> pd.DataFrame:
    """Read the rows of cells of one edition, up to the number of rounds that the edition has."""
    rows = folder.read([cell.name for cell in cells], COLUMNS)
    if not cells:
        return rows
    last = cells[0].rounds
    rows.loc[rows["round"] == last, "bytes_up"] = 0  # as when the run had finished: its last round was only scored
    return rows[rows["round"] <= last].reset_index(drop=True)


def load_results(results_dir: str | Path, experiment: str | None = None, profile: str | None = None) -> list[Study]:
    """Load the studies of an experiment: `load` for the folder that `results_folder` finds."""
    return load(results_folder(results_dir, experiment), profile)


def results_folder(results_dir: str | Path, experiment: str | None = None) -> ResultsFolder:
    """Find the folder of an experiment, which need not exist.

    Args:
        results_dir: the --results-dir of the runs, or the folder of one experiment.
        experiment: the name of the experiment's folder in `results_dir`. None: `results_dir` itself if its `rounds`
            holds Parquet files, otherwise the newest `table1` in it.

    Raises:
        ResultsError: a folder can't be read.
    """
    root = Path(results_dir).expanduser().absolute()
    if experiment is not None:
        return ResultsFolder(root / experiment)
    return ResultsFolder(root if rounds_files(root / "rounds") else newest_folder(root, "table1"))


def _progress_lines(title: str, cells: Sequence[StoredCell]) -> list[str]:
    more = [f"  and {len(cells) - _MAX_NAMED} more"] if len(cells) > _MAX_NAMED else []
    return [title, *(f"  {cell.progress}" for cell in cells[:_MAX_NAMED]), *more] if cells else []


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]", "_", text)


def _paper_cells() -> list[CellName]:
    return [CellName(*key) for key in paper_table().index]
