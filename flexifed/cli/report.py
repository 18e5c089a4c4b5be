"""`flexifed report`: tables and figures from results."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

_EXPERIMENT = "table1"


@dataclass(frozen=True, kw_only=True)
class Report:
    """Print the tables of an experiment from its results, and draw its figures, for each set of settings."""

    results_dir: Annotated[Path, tyro.conf.Positional] = Path("results")
    """The --results-dir of the runs, or the folder of one experiment."""
    experiment: str | None = None
    """Folder of an experiment in the results. Default: table1, or the newest that --fresh made (table1-2, ...)."""
    pick: Annotated[tuple[Literal["last", "best", "final"], ...], tyro.conf.UseAppendAction] = ()
    """Rounds that numbers are taken from. last (default): mean of the last tenth, at most 50. best: the best. final:
    the last. Given several times, it makes tables for each; figures use the first."""
    profile: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Only runs under this profile. Default: all, with a table for each."""
    format: Literal["terminal", "markdown", "latex", "csv"] = "terminal"
    """Format of the tables. csv: Table 1 only, with a line for each number. All formats have the same numbers."""
    target: float | None = None
    """Accuracy, in percent, to which rounds are counted. Default: where Clustered-FL ends under the same seed."""
    figures: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Also draw the figures, as PNG and PDF, in a subfolder for each table. Needs the extra `analysis`."""

    def run(self, console: Console) -> None:
        """Print the tables, and write the figures.

        Raises:
            ConfigError: a target that is no accuracy.
            ResultsError: no results, or damaged ones.
        """
        from flexifed.report.curves import check_target
        from flexifed.report.reports import report, report_text
        from flexifed.report.study import load, results_folder
        from flexifed.results.attempts import experiment_folders
        from flexifed.results.store import ResultsFolder

        check_target(self.target)
        picks = tuple(dict.fromkeys(self.pick)) or ("last",)
        if self.figures is not None:
            from flexifed.report.figures import drawings  # refuses before anything is read or printed
        results_dir = self.results_dir.expanduser().absolute()
        root = results_folder(results_dir, self.experiment).root
        folders = experiment_folders(results_dir, self.experiment or _EXPERIMENT)
        if others := [folder.name for folder in folders if folder != root]:
            note = f"{root}; there are also (choose with --experiment): {', '.join(others)}"
            print(note, file=sys.stdout if self.format == "terminal" else sys.stderr)
        studies = load(ResultsFolder(root), self.profile)
        if self.format == "terminal":
            for part in report(studies, picks=picks, target=self.target):
                console.print(part)
        else:
            for text in report_text(studies, self.format, picks=picks, target=self.target):
                print(text)
        if self.figures is not None:
            for study in studies:
                for drawing in drawings(study, picks[0], self.target):
                    for path in drawing.save(self.figures.expanduser() / study.slug):
                        print(path, file=sys.stderr)
