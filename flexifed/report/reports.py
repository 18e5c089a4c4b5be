"""Reports: all tables of several studies, for a terminal, as text or as a DataFrame."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import pandas as pd

from flexifed.config import SCHEMES
from flexifed.report.curves import Target
from flexifed.report.runs import changed_settings
from flexifed.report.sheet import Column, Section, Sheet, latex, markdown
from flexifed.report.study import Study
from flexifed.report.table import DIGITS, NUMBERS, SCHEME_NAMES, Pick, in_paper_order

TextFormat = Literal["markdown", "latex", "csv"]
_NUMBERS = ["study", "profile", "rounds", "changed", "pick", *NUMBERS]


def report(
    studies: Sequence[Study], *, picks: Sequence[Pick] = ("last",), target: Target = None
) -> Iterator[Sheet | str]:
    """Yield all tables for a terminal: for each study its title, its contents, and its tables by each pick."""
    for study in studies:
        yield ""
        yield study.title
        yield "\n".join(study.contents())
        for sheet in _sheets(study, picks, target):
            yield ""
            yield sheet


def report_text(
    studies: Sequence[Study], form: TextFormat, *, picks: Sequence[Pick] = ("last",), target: Target = None
) -> Iterator[str]:
    """Yield all tables as text in a file format. CSV has Table 1 only: see `numbers`."""
    if form == "csv":
        table = pd.concat([numbers(studies, pick) for pick in picks], ignore_index=True)
        yield table.to_csv(index=False, float_format=f"%.{DIGITS}f").rstrip("\n")
        return
    for study in studies:
        if form == "markdown":
            yield f"## {study.title}\n"
            yield "\n".join(f"- {line.strip()}" for line in study.contents()) + "\n"
            yield from (markdown(sheet) + "\n" for sheet in _sheets(study, picks, target))
        else:
            yield "\n".join(f"% {line}" for line in (study.title, *study.contents()))
            yield from (latex(sheet, SCHEME_NAMES) for sheet in _sheets(study, picks, target))


def overview(studies: Sequence[Study]) -> Sheet:
    """Lay out the progress of all runs: for each data set and family, how many seeds of each scheme are finished."""
    sections = []
    for study in studies:
        counts: dict[tuple[str, str], dict[str, list[bool]]] = {}
        for cell in study.edition.cells:
            schemes = counts.setdefault((cell.cell.dataset, cell.cell.family), {})
            schemes.setdefault(cell.cell.scheme, []).append(cell.is_finished)
        order = in_paper_order(pd.DataFrame(list(counts), columns=["dataset", "family"]))
        rows = [
            (
                f"{dataset} / {family}",
                tuple((f"{sum(runs)} of {len(runs)}" if (runs := schemes.get(name)) else "-",) for name in SCHEMES),
            )
            for dataset, family in order.itertuples(index=False, name=None)
            if (schemes := counts[dataset, family])
        ]
        sections.append(Section(study.title, tuple(rows)))
    return Sheet(
        "Finished runs, of all runs with results",
        tuple(map(Column, SCHEMES)),
        tuple(sections),
        ("A run is a cell under one seed. Runs under one heading may be compared; tables never mix headings.",),
    )


def numbers(studies: Sequence[Study], pick: Pick = "last") -> pd.DataFrame:
    """Combine Table 1 of all studies in one DataFrame: `Summary.numbers`, with the study's name and settings."""
    frames = []
    for study in studies:
        if not study.finished.empty:
            cell = study.edition.cells[0]
            changed = " ".join(f"{name}={value}" for name, value in changed_settings(cell).items())
            columns = {
                "study": study.slug,
                "profile": cell.profile,
                "rounds": study.rounds,
                "changed": changed,
                "pick": pick,
            }
            frame = study.summary(pick).numbers()
            frames.append(pd.DataFrame(columns, index=frame.index).join(frame))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=_NUMBERS)


def _sheets(study: Study, picks: Sequence[Pick], target: Target) -> list[Sheet]:
    """All tables of a study by each pick."""
    return [sheet for pick in picks for sheet in study.sheets(pick, target)]
