"""Figures of a study, one panel for each data set and family. Needs matplotlib (the extra `analysis`)."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from flexifed.config import SCHEMES, CellName
from flexifed.errors import ConfigError, ResultsError
from flexifed.report.curves import (
    BASELINE,
    Target,
    bands,
    rounds_to_target,
    scheme_curves,
    shown_target,
    speedups,
    version_curves,
)
from flexifed.report.study import Study
from flexifed.report.table import CELL, SCHEME_NAMES, Pick, data_warnings, in_paper_order, picked_rounds, source_label

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
except ImportError as error:
    raise ConfigError("figures need matplotlib; install it with: pip install 'flexifed[analysis]'") from error

FileFormat = Literal["png", "pdf", "svg"]

# Okabe and Ito's colours, which all kinds of colour vision tell apart; markers do so in grey print.
_SCHEME_STYLES = {
    "standalone": {"color": "#767676", "marker": "x"},
    "clustered_fl": {"color": "#0072B2", "marker": "s"},
    "basic_common": {"color": "#E69F00", "marker": "^"},
    "clustered_common": {"color": "#009E73", "marker": "D"},
    "max_common": {"color": "#D55E00", "marker": "o"},
}
# From shallow to deep: light to dark, even in lightness.
_VERSION_STYLES = {
    "v1": {"color": "#E8A33D", "marker": "^"},
    "v2": {"color": "#4FAFA5", "marker": "D"},
    "v3": {"color": "#2F6DA8", "marker": "s"},
    "v4": {"color": "#2B1B4D", "marker": "o"},
}
_MARKERS = 6  # on a line
_DECADES = 1e3  # of bytes, from which their axis is logarithmic
_MOST_COLUMNS = 4
_NAMED = 4  # curves that end early, before only their number is given
_PANEL_INCHES = (3.1, 2.3)
_ONE_PANEL_INCHES = (6.2, 3.4)
_ROUNDS = "rounds of training"
_ALL = "mean of all versions"
_DASHED = "dashed: sends nothing; its last score"
_ORDER = (*SCHEME_NAMES.values(), *map(str.upper, _VERSION_STYLES))


@dataclass(frozen=True)
class Drawing:
    """A figure and the name of its files; no axes: nothing to draw. A notebook shows it as an image."""

    name: str
    figure: Figure

    def save(self, folder: Path, formats: Sequence[FileFormat] = ("png", "pdf")) -> list[Path]:
        """Write it, once in each format, and return the paths.

        Raises:
            ResultsError: the folder can't be written.
        """
        paths = [folder / f"{self.name}.{one}" for one in formats]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path in paths:
                self.figure.savefig(path, dpi=200)
        except OSError as error:
            raise ResultsError(
                f"can't write figures to {folder}: {error.strerror or error}; choose another folder"
            ) from error
        return paths

    def _repr_png_(self) -> bytes:
        image = io.BytesIO()
        self.figure.savefig(image, format="png", dpi=110)
        return image.getvalue()


def drawings(study: Study, pick: Pick = "last", target: Target = None) -> list[Drawing]:
    """Every figure that the study has rows for."""
    found = [accuracy_over_rounds(study), *(versions_over_rounds(study, scheme) for scheme in SCHEMES)]
    found += [accuracy_over_bytes(study), rounds_to_a_target(study, pick, target)]
    return [drawing for drawing in found if drawing.figure.axes]


def accuracy_over_rounds(study: Study) -> Drawing:
    """The paper's Figure 4: mean accuracy of all versions over rounds, a line for each scheme, a band over seeds."""
    curves = bands(scheme_curves(version_curves(study.curve_rows())))

    def draw(axes: Axes, panel: pd.DataFrame) -> None:
        for scheme, curve in _by(panel, "scheme", SCHEMES):
            _line(axes, curve["round"], curve, SCHEME_NAMES[scheme], _SCHEME_STYLES[scheme])
        axes.set_xlim(-0.02 * study.rounds, 1.02 * study.rounds)

    figure = _panels(curves, draw, _curves_text(study, curves, "Accuracy over rounds", _ROUNDS, _ALL))
    return Drawing("accuracy-over-rounds", figure)


def versions_over_rounds(study: Study, scheme: str = "max_common") -> Drawing:
    """Accuracy over rounds within one scheme, a line for each version, a band over seeds."""
    rows = study.curve_rows()
    curves = bands(version_curves(rows[rows["scheme"] == scheme]))

    def draw(axes: Axes, panel: pd.DataFrame) -> None:
        for version, curve in _by(panel, "version", tuple(_VERSION_STYLES)):
            _line(axes, curve["round"], curve, version.upper(), _VERSION_STYLES[version])
        axes.set_xlim(-0.02 * study.rounds, 1.02 * study.rounds)

    figure = _panels(curves, draw, _curves_text(study, curves, f"Accuracy by version, {SCHEME_NAMES[scheme]}", _ROUNDS))
    return Drawing(f"versions-{scheme}", figure)


def accuracy_over_bytes(study: Study) -> Drawing:
    """Mean accuracy of all versions against the bytes that a client has sent; schemes that send nothing are a level."""
    curves = bands(scheme_curves(version_curves(study.curve_rows())))
    by_cell = curves.groupby(CELL)
    curves = curves[by_cell["round"].transform("max") > 0]  # before round 1 no client has had a chance to send
    sends_nothing = by_cell["sent"].transform("max") == 0

    def draw(axes: Axes, panel: pd.DataFrame) -> None:
        """Accuracy over bytes sent, a line for each scheme."""
        sent = panel["sent"][panel["sent"] > 0]
        if sent.max() > _DECADES * sent.min():
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(numticks=5))
            axes.xaxis.set_minor_locator(NullLocator())
        for scheme, curve in _by(panel, "scheme", SCHEMES):
            style = _SCHEME_STYLES[scheme]
            sending = curve[curve["sent"] > 0]
            if sending.empty:
                level = curve["accuracy"].iloc[-1]
                label = SCHEME_NAMES[scheme]
                axes.axhline(level, color=style["color"], linestyle=(0, (4, 3)), linewidth=1.3, label=label)
            else:
                _line(axes, sending["sent"], sending, SCHEME_NAMES[scheme], style)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _bytes(value)))

    dashed = [_DASHED] if sends_nothing.loc[curves.index].any() else []
    figure = _panels(
        curves,
        draw,
        _curves_text(study, curves, "Accuracy against bytes sent", "sent by one client so far", _ALL, *dashed),
    )
    return Drawing("accuracy-over-bytes", figure)


def rounds_to_a_target(study: Study, pick: Pick = "last", target: Target = None) -> Drawing:
    """Rounds until the target accuracy was reached, a dot for each seed and a mark at the mean, and the speed-up."""
    reached = rounds_to_target(study.finished, study.rounds, target, pick)
    table = speedups(reached).reset_index()

    def draw(axes: Axes, panel: pd.DataFrame) -> None:
        """A row for each scheme: rounds of each seed, their mean, and the speed-up."""
        for row, scheme in enumerate(SCHEMES):
            cell = panel[panel["scheme"] == scheme]
            if cell.empty:
                continue
            one, style = cell.iloc[0], _SCHEME_STYLES[scheme]
            seeds = reached.merge(cell[CELL], on=CELL)["rounds"].dropna()
            axes.plot(seeds, [row] * len(seeds), ".", color=style["color"], alpha=0.6, markersize=5, zorder=2)
            axes.plot([one["rounds"]], [row], style["marker"], color=style["color"], markersize=7, zorder=3)
            axes.annotate(_reached_text(one), (1.02, row), xycoords=("axes fraction", "data"), va="center", fontsize=8)
        axes.set_yticks(range(len(SCHEMES)), [SCHEME_NAMES[scheme] for scheme in SCHEMES])
        axes.set_ylim(len(SCHEMES) - 0.5, -0.5)
        axes.set_xlim(-0.03 * study.rounds, study.rounds * 1.03)
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", color="#DDDDDD", linewidth=0.7)
        axes.set_title(f"{_name(panel)}: {shown_target(panel):.1f} %", loc="left", fontsize=10)

    which = (
        f"target: {SCHEME_NAMES[BASELINE]}'s accuracy under the same seed ({picked_rounds(study.rounds, pick)})"
        if target is None
        else f"target: {target:g} %"
    )
    speedup = f"× the speed-up over {SCHEME_NAMES[BASELINE]}, over seeds in which both reached it"
    said = [which, _ALL, f"dots are seeds, the mark is their mean, {speedup}"]
    text = _text(study, "Rounds to a target accuracy", said, _ROUNDS, "")
    figure = _panels(table, draw, text, shared=True)
    return Drawing("rounds-to-target", figure)


@dataclass(frozen=True)
class _Text:
    """A title, lines below it, and what the axes are."""

    title: str
    below: tuple[str, ...]
    x: str
    y: str = "accuracy, %"


def _curves_text(study: Study, curves: pd.DataFrame, title: str, x: str, *what: str) -> _Text:
    """The text of a figure with bands: of `curves`, from `flexifed.report.curves.bands`."""
    fewest, most = (int(curves["seeds"].min()), int(curves["seeds"].max())) if len(curves) else (0, 0)
    count = f"{most} seeds" if fewest == most else f"{fewest} to {most} seeds"
    band = f"{count}: mean, and a band of ±1 standard deviation" if most > 1 else "one seed"
    return _text(study, title, [*what, band, *_unfinished(study, curves)], x)


def _text(study: Study, title: str, said: Sequence[str], x: str, y: str = "accuracy, %") -> _Text:
    below = "; ".join([study.title, *said])
    return _Text(title + source_label(study.data_source), (below, *data_warnings([study.data_source])), x, y)


def _unfinished(study: Study, curves: pd.DataFrame) -> list[str]:
    """Say which of the drawn curves end early, and whether unfinished seeds of drawn cells were left out."""
    drawn = {CellName(*key) for key in curves[CELL].drop_duplicates().itertuples(index=False, name=None)}
    finished = {run.cell for run in study.edition.finished}
    unfinished = [run for run in study.edition.unfinished if run.cell in drawn]
    last_rounds: dict[CellName, int] = {}
    for run in unfinished:
        if run.cell not in finished:
            last_rounds[run.cell] = min(run.last_round, last_rounds.get(run.cell, run.last_round))
    phrases = []
    if last_rounds:
        named = [f"{cell} to round {last}" for cell, last in sorted(last_rounds.items(), key=lambda item: str(item[0]))]
        more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
        phrases.append(f"UNFINISHED: {', '.join(named[:_NAMED])}{more}")
    if any(run.cell in finished for run in unfinished):
        phrases.append("unfinished seeds left out")
    return phrases


def _panels(
    curves: pd.DataFrame,
    draw: Callable[[Axes, pd.DataFrame], None],
    text: _Text,
    *,
    shared: bool = False,
) -> Figure:
    """A grid of panels in the paper's order, with one legend for all.

    Args:
        curves: a panel for each data set and family in it.
        draw: fills a panel from its part of `curves`.
        text: above the panels.
        shared: whether panels have one y axis that names the lines, so that there is no legend.
    """
    if curves.empty:
        return _nothing(text)
    panels = [panel for _, panel in in_paper_order(curves).groupby(["dataset", "family"], sort=False)]
    columns = min(_MOST_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    wide, high = _PANEL_INCHES if len(panels) > 1 else _ONE_PANEL_INCHES
    figure = _headed(text, max(columns * wide + shared * 1.2, _ONE_PANEL_INCHES[0]), rows * high + 0.4)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=shared)
    for index, axes in enumerate(grid.flat):
        if index >= len(panels):
            axes.set_visible(False)
            continue
        _style(axes, _name(panels[index]))
        draw(axes, panels[index])
        if index + columns >= len(panels):
            axes.set_xlabel(text.x, fontsize=9)
        if index % columns == 0:
            axes.set_ylabel(text.y, fontsize=9)
    if not shared:
        _one_legend(figure)
    return figure


def _headed(text: _Text, width: float, height: float) -> Figure:
    """A figure with words above a body of so many inches."""
    below = [line for text_line in text.below for line in textwrap.wrap(text_line, int(width * 16))]
    head = 0.4 + 0.15 * len(below)
    figure = Figure(figsize=(width, head + height), layout="constrained")
    total = figure.get_figheight()
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - head / total))  # type: ignore[union-attr, call-arg]
    figure.text(0.01, 1 - 0.07 / total, text.title, va="top", fontsize=12, fontweight="bold")
    figure.text(0.01, 1 - 0.32 / total, "\n".join(below), va="top", fontsize=8, color="#444444", linespacing=1.3)
    return figure


def _style(axes: Axes, title: str) -> None:
    """What all panels look like."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, color="#888888")
    axes.set_title(title, loc="left", fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _one_legend(figure: Figure) -> None:
    """Under all panels, what is drawn in any of them."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        found |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    names = sorted(found, key=lambda label: [*_ORDER, label].index(label.split(" (")[0]))
    figure.legend(
        [found[name] for name in names],
        names,
        loc="outside lower left",
        ncols=len(names) if len(names) < 5 or figure.get_figwidth() > _ONE_PANEL_INCHES[0] else 3,
        frameon=False,
        fontsize=9,
    )


def _nothing(text: _Text) -> Figure:
    """Where there are no rows to draw."""
    figure = Figure(figsize=(_ONE_PANEL_INCHES[0], 0.8))
    figure.text(0.01, 0.9, text.title, va="top", fontsize=12, fontweight="bold")
    said = textwrap.fill(f"nothing to draw: {text.below[0]}", 100)
    figure.text(0.01, 0.55, said, va="top", fontsize=8, color="#444444")
    return figure


def _line(axes: Axes, x: pd.Series[Any], curve: pd.DataFrame, label: str, style: Mapping[str, Any]) -> None:
    step = max(1, len(curve) // _MARKERS)
    axes.plot(x, curve["accuracy"], label=label, linewidth=1.4, markersize=4, markevery=(step // 2, step), **style)
    if curve["low"].notna().any():
        axes.fill_between(x, curve["low"], curve["high"], color=style["color"], alpha=0.18, linewidth=0)


def _by(panel: pd.DataFrame, column: str, order: Sequence[str]) -> list[tuple[str, pd.DataFrame]]:
    """The parts of a panel in a fixed order, each sorted by round; those that are not there are left out."""
    parts = ((name, panel[panel[column] == name].sort_values("round")) for name in order)
    return [(name, part) for name, part in parts if not part.empty]


def _name(panel: pd.DataFrame) -> str:
    return f"{panel['dataset'].iloc[0]} / {panel['family'].iloc[0]}"


def _reached_text(one: pd.Series[Any]) -> str:
    if not one["reached"]:
        return "not reached"
    speedup = "" if pd.isna(one["speedup"]) else f"{one['speedup']:.2f}×"
    if speedup and one["pairs"] != one["seeds"]:
        speedup += f" (n = {one['pairs']:g})"
    if not one["rounds"]:
        speedup = "from the start"
    if speedup and one["reached"] == one["seeds"]:
        return speedup
    return f"{speedup} {one['reached']:g} of {one['seeds']:g}".strip()


def _bytes(value: float) -> str:
    """In decimal units: `1 kB`, `100 MB`."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:g} B"
