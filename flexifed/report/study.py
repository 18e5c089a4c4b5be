"""A study: results that may share a table, with their rows and every table of them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pandas as pd

from flexifed.config import SCHEMES, CellName
from flexifed.errors import ResultsError
from flexifed.profiles import PROFILES
from flexifed.report.compare import PAIRED, paired_differences, render_differences
from flexifed.report.curves import BASELINE, REACHED, Target, drawable_rows, render_speedups, rounds_to_target, speedups
from flexifed.report.runs import (
    Edition,
    StoredCell,
    changed_settings,
    editions,
    nothing_there,
    stored_cell,
    stored_cells,
)
from flexifed.report.sheet import Column, Section, Sheet, latex, markdown
from flexifed.report.table import (
    CELL,
    DIGITS,
    NUMBERS,
    SCHEME_NAMES,
    Pick,
    Summary,
    data_warnings,
    in_paper_order,
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
_NUMBERS = ["study", "profile", "rounds", "changed", "pick", *NUMBERS]
_MOST_NAMED = 8  # unfinished cells that are listed by name


TextFormat = Literal["markdown", "latex", "csv"]


@dataclass(frozen=True)
class Study:
    """The results of one edition. Its tables show the finished cells.

    Attributes:
        edition: the cells.
        finished: rows of the finished cells, with the `COLUMNS` of the rounds files.
        unfinished: rows of the unfinished cells.
    """

    edition: Edition
    finished: pd.DataFrame
    unfinished: pd.DataFrame

    @property
    def title(self) -> str:
        """Profile, rounds, data, and settings that differ from the profile's."""
        return self.edition.title

    @property
    def rounds(self) -> int:
        """The number of rounds of training."""
        return self.edition.cells[0].rounds

    @property
    def data_source(self) -> str:
        """`real`, `real-partial`, `real-other` or `synthetic`, the same for all cells."""
        return self.edition.cells[0].data_source

    @property
    def seeds(self) -> list[int]:
        """The seeds of the finished cells, or of all cells if none is finished."""
        return sorted({cell.seed for cell in self.edition.finished or self.edition.cells})

    @property
    def slug(self) -> str:
        """A name for folders: profile, rounds, data and device; with a digest if these do not tell the settings."""
        cell = self.edition.cells[0]
        words = [re.sub(r"[^\w.-]", "_", cell.profile)[:60], str(cell.rounds), cell.data_source]
        if changed_settings(cell) or cell.profile not in PROFILES or self.edition.fingerprint:
            content = json.dumps([dict(cell.settings), self.edition.fingerprint], sort_keys=True)
            words.append(hashlib.sha256(content.encode()).hexdigest()[:8])
        return "-".join([*words, *[str(cell.settings[name]) for name in ("device",) if name in cell.settings]])

    def contents(self) -> list[str]:
        """Lines that say which cells are shown, which are unfinished, and how much of the paper's table there is."""
        cells = self.edition.cells
        finished, names = self.edition.finished, {cell.cell for cell in cells}
        missing = [name for name in _paper_cells() if name not in names]
        lines = [
            f"Here: {counted(len(names), 'cell')}, {counted(len(finished), 'finished run')} of {len(cells)}"
            f" ({counted(len({cell.seed for cell in cells}), 'seed')}); {len(_paper_cells()) - len(missing)} of the "
            f"{len(_paper_cells())} cells of the paper's Table 1."
        ]
        if not finished:
            lines.append("No cell is finished.")
        extended = [cell for cell in finished if cell.extended_to]
        return [
            *lines,
            *_progress_of("Unfinished, left out of the tables:", self.edition.unfinished),
            *_progress_of(f"Being trained further; in the tables with {self.rounds} rounds:", extended),
        ]

    def summary(self, pick: Pick = "last") -> Summary:
        """The numbers of Table 1."""
        return summarise(self.finished, self.rounds, pick)

    def describe(self) -> Sheet:
        """`contents`, below the title."""
        return Sheet(self.title, (), (), tuple(self.contents()))

    def table(self, pick: Pick = "last", seeds: Sequence[int] | None = None) -> Sheet:
        """Table 1, beside the paper's numbers where the data are real.

        Args:
            pick: the rounds that each number is taken from.
            seeds: the seeds that were asked for; the notes name cells that have fewer. None: those of the study.
        """
        if self.finished.empty:
            return self._nothing("Accuracy in percent (Table 1)")
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
        """Paired differences between schemes, over several seeds."""
        if self.finished.empty:
            return self._nothing(PAIRED)
        numbers = per_seed(self.finished, self.rounds, pick)
        differences = paired_differences(numbers) if len(self.seeds) > 1 else []
        if not differences:
            return self._nothing(PAIRED, "Needs two seeds, and two schemes on the same data set and family.")
        return self._noted(render_differences(differences, PAIRED, paired_differences(numbers, by_seed=True)), pick)

    def speedups(self, pick: Pick = "last", target: Target = None) -> Sheet:
        """Rounds to a target, and the speed-up over Clustered-FL."""
        if self.finished.empty:
            return self._nothing(REACHED)
        reached = rounds_to_target(self.finished, self.rounds, target, pick)
        if reached.empty:
            return self._nothing(REACHED, f"Needs a finished run of {BASELINE}, or a target.")
        return self._noted(render_speedups(speedups(reached), rounds=self.rounds, target=target, pick=pick), pick)

    def sheets(self, pick: Pick = "last", target: Target = None) -> list[Sheet]:
        """All tables that are not empty."""
        sheets = (self.table(pick), self.differences(pick), self.speedups(pick, target))
        return [sheet for sheet in sheets if sheet.sections]

    def _nothing(self, title: str, why: str = "No cell is finished.") -> Sheet:
        return Sheet(f"{title}, {self.title}", (), (), (why,))

    def _noted(self, sheet: Sheet, pick: Pick) -> Sheet:
        """Add notes as those of Table 1: the settings, the data, and a warning if the data are not the real set."""
        about = f"{self.title[0].upper()}{self.title[1:]}. Accuracy: {picked_rounds(self.rounds, pick)}."
        return replace(sheet, notes=(*sheet.notes, about, *data_warnings([self.data_source])))

    def curve_rows(self) -> pd.DataFrame:
        """The rows that figures are drawn from; see `flexifed.report.curves.drawable_rows`."""
        return drawable_rows(self.unfinished, self.finished)


def load(folder: ResultsFolder, profile: str | None = None) -> list[Study]:
    """Load the studies of a results folder.

    Args:
        folder: the folder of an experiment.
        profile: the profile of the cells to load; None for all.

    Raises:
        ResultsError: there are no results, or none of this profile, or a file is damaged.
    """
    cells = stored_cells(folder)
    if not cells:
        raise ResultsError(nothing_there(folder))
    chosen = [cell for cell in cells if profile in (None, cell.profile)]
    if not chosen:
        profiles = ", ".join(sorted({cell.profile for cell in cells}))
        raise ResultsError(f"no results of profile {profile!r} in {folder.root}; there are some of: {profiles}")
    return _studies(folder, chosen)


def studies_of(folder: ResultsFolder, names: Sequence[str], *, profile: str, rounds: int) -> list[Study]:
    """The studies of the runs of one command: several if their data are of different sources.

    Args:
        folder: the folder of the experiment.
        names: the names of the runs' files, without the suffix.
        profile: the profile of the command; runs with the same settings may be stored under another one.
        rounds: the rounds of the command. A stored run may have more; they are left out.

    Raises:
        ResultsError: a file is damaged.
    """
    cells = (stored_cell(folder.rounds_file(name)) for name in names)
    return _studies(folder, [replace(cell, profile=profile, rounds=rounds, extended_to=None) for cell in cells if cell])


def _studies(folder: ResultsFolder, cells: Sequence[StoredCell]) -> list[Study]:
    return [
        Study(edition, *(_rows(folder, part) for part in (edition.finished, edition.unfinished)))
        for edition in editions(cells)
    ]


def _rows(folder: ResultsFolder, cells: Sequence[StoredCell]) -> pd.DataFrame:
    """Read the rows of an edition's cells, without the rounds that finished cells have been trained further."""
    rows = folder.read([cell.name for cell in cells], COLUMNS)
    if not cells:
        return rows
    last = cells[0].rounds
    rows.loc[rows["round"] == last, "bytes_up"] = 0  # as when that round was only scored
    return rows[rows["round"] <= last].reset_index(drop=True)


def load_results(results_dir: str | Path, experiment: str | None = None, profile: str | None = None) -> list[Study]:
    """Load the studies of an experiment.

    Args:
        results_dir: the `--results-dir` of the runs.
        experiment: the experiment's folder in it; `.` for `results_dir` itself. None: the newest `table1`.
        profile: see `load`.

    Raises:
        ResultsError: see `load`.
    """
    root = Path(results_dir).expanduser().absolute()
    return load(ResultsFolder(root / experiment if experiment else newest_folder(root, "table1")), profile)


def report(studies: Sequence[Study], *, pick: Pick = "last", target: Target = None) -> Iterator[Sheet | str]:
    """Yield all tables for a terminal, study by study, each after its title and contents."""
    for study in studies:
        yield ""
        yield study.title
        yield "\n".join(study.contents())
        for sheet in study.sheets(pick, target):
            yield ""
            yield sheet


def report_text(
    studies: Sequence[Study], form: TextFormat, *, pick: Pick = "last", target: Target = None
) -> Iterator[str]:
    """Yield the same for a file. CSV only has Table 1; see `numbers`."""
    if form == "csv":
        yield numbers(studies, pick).to_csv(index=False, float_format=f"%.{DIGITS}f").rstrip("\n")
        return
    for study in studies:
        if form == "markdown":
            yield f"## {study.title}\n"
            yield "\n".join(f"- {line.strip()}" for line in study.contents()) + "\n"
            yield from (markdown(sheet) + "\n" for sheet in study.sheets(pick, target))
        else:
            yield "\n".join(f"% {line}" for line in (study.title, *study.contents()))
            yield from (latex(sheet, SCHEME_NAMES) for sheet in study.sheets(pick, target))


def overview(studies: Sequence[Study]) -> Sheet:
    """Count the runs of each data set, family and scheme, and those of them that are finished."""
    sections = []
    for study in studies:
        counts: dict[tuple[str, str], dict[str, list[bool]]] = {}
        for stored in study.edition.cells:
            schemes = counts.setdefault((stored.cell.dataset, stored.cell.family), {})
            schemes.setdefault(stored.cell.scheme, []).append(stored.is_finished)
        order = in_paper_order(pd.DataFrame(list(counts), columns=["dataset", "family"]))
        rows = [
            (
                f"{dataset} / {family}",
                tuple((f"{sum(done)} of {len(done)}" if (done := schemes.get(name)) else "-",) for name in SCHEMES),
            )
            for dataset, family in order.itertuples(index=False, name=None)
            if (schemes := counts[dataset, family])
        ]
        sections.append(Section(study.title, tuple(rows)))
    return Sheet(
        "Finished runs, of all runs",
        tuple(map(Column, SCHEMES)),
        tuple(sections),
        ("A run is a cell under one seed. Runs below the same heading can be compared; tables never mix headings.",),
    )


def numbers(studies: Sequence[Study], pick: Pick = "last") -> pd.DataFrame:
    """Table 1 of all studies in one table for programs: `Summary.numbers`, with each study's name and settings."""
    frames = []
    for study in studies:
        if not study.finished.empty:
            cell = study.edition.cells[0]
            changed = " ".join(f"{name}={value}" for name, value in changed_settings(cell).items())
            named = {
                "study": study.slug,
                "profile": cell.profile,
                "rounds": study.rounds,
                "changed": changed,
                "pick": pick,
            }
            frame = study.summary(pick).numbers()
            frames.append(pd.DataFrame(named, index=frame.index).join(frame))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=_NUMBERS)


def _progress_of(title: str, cells: Sequence[StoredCell]) -> list[str]:
    more = [f"  and {len(cells) - _MOST_NAMED} more"] if len(cells) > _MOST_NAMED else []
    return [title, *(f"  {cell.progress}" for cell in cells[:_MOST_NAMED]), *more] if cells else []


def _paper_cells() -> list[CellName]:
    return [CellName(*key) for key in paper_table().index]
