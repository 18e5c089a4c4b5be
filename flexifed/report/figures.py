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
# From shallow to deep: from light to dark, in equal steps of lightness.
_VERSION_STYLES = {
    "v1": {"color": "#E8A33D", "marker": "^"},
    "v2": {"color": "#4FAFA5", "marker": "D"},
    "v3": {"color": "#2F6DA8", "marker": "s"},
    "v4": {"color": "#2B1B4D", "marker": "o"},
}
_MARKERS_PER_LINE = 6
_LOG_SCALE_RATIO = 1e3  # largest to smallest number of bytes, above which the axis is logarithmic
_MAX_COLUMNS = 4
_MAX_NAMED = 4  # curves that end early and are named; of the others only the number is given
_PANEL_INCHES = (3.1, 2.3)
_ONE_PANEL_INCHES = (6.2, 3.4)
_ROUNDS_LABEL = "rounds of training"
_MEAN_OF_VERSIONS = "mean of all versions"
_DASHED_LABEL = "dashed: sends nothing; its last score"
_LEGEND_ORDER = (*SCHEME_NAMES.values(), *map(str.upper, _VERSION_STYLES))


@dataclass(frozen=True)
class Drawing:
    """A figure and the base name of its files. Its figure has no axes if there is nothing to draw.

    Notebooks display it as an image.
    """

    name: str
    figure: Figure

    def save(self, folder: Path, formats: Sequence[FileFormat] = ("png", "pdf")) -> list[Path]:
        """Write the figure in each format and return the paths.

        Raises:
            ResultsError: the files can't be written.
        """
        paths = [folder / f"{self.name}.{extension}" for extension in formats]
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
    """Draw every figure that the study has rows for."""
    candidates = [accuracy_over_rounds(study), *(versions_over_rounds(study, scheme) for scheme in SCHEMES)]
    candidates += [accuracy_over_bytes(study), rounds_to_a_target(study, pick, target)]
    return [drawing for drawing in candidates if drawing.figure.axes]


def accuracy_over_rounds(study: Study) -> Drawing:
    """Draw the paper's Figure 4: mean accuracy of all versions over rounds, a line and band per scheme."""
    curves = bands(scheme_curves(version_curves(study.curve_rows())))

    def draw(axes: Axes, panel: pd.DataFrame) -> None:
        for scheme, curve in _split(panel, "scheme", SCHEMES):
            _line(axes, curve["round"], curve, SCHEME_NAMES[scheme], _SCHEME_STYLES[scheme])
        axes.set_xlim(-0.02 * study.rounds, 1.02 * study.rounds)

    figure = _panels(
        curves, draw, _curve_captions(study, curves, "Accuracy over rounds", _ROUNDS_LABEL, _MEAN_OF_VERSIONS)
    )
    return Drawing("accuracy-over-rounds", figure)


def versions_over_rounds(study: Study, scheme: str = "max_common") -> Drawing:
    """Draw accuracy over rounds within one scheme, a line per version with a band over seeds."""
    rows = study.curve_rows()
    curves = bands(version_curves(rows[rows["scheme"] == scheme]))

    def draw(axes: Axes, panel: pd.DataFrame) -> None:
        for version, curve in _split(panel, "version", tuple(_VERSION_STYLES)):
            _line(axes, curve["round"], curve, version.upper(), _VERSION_STYLES[version])
        axes.set_xlim(-0.02 * study.rounds, 1.02 * study.rounds)

    figure = _panels(
        curves, draw, _curve_captions(study, curves, f"Accuracy by version, {SCHEME_NAMES[scheme]}", _ROUNDS_LABEL)
    )
    return Drawing(f"versions-{scheme}", figure)


def accuracy_over_bytes(study: Study) -> Drawing:
    """Draw mean accuracy of all versions against the bytes that a client has sent in the mean.

    A scheme that sends nothing is a horizontal line at its last score.
    """
    curves = bands(scheme_curves(version_curves(study.curve_rows())))
    by_cell = curves.groupby(CELL)
    curves = curves[by_cell["round"].transform("max") > 0]  # before round 1 no client has sent anything yet
    sends_nothing = by_cell["sent"].transform("max") == 0

    def draw(axes: Axes, panel: pd.DataFrame) -> None:
        sent = panel["sent"][panel["sent"] > 0]
        if sent.max() > _LOG_SCALE_RATIO * sent.min():
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(numticks=5))
            axes.xaxis.set_minor_locator(NullLocator())
        for scheme, curve in _split(panel, "scheme", SCHEMES):
            style = _SCHEME_STYLES[scheme]
            sending = curve[curve["sent"] > 0]
            if sending.empty:
                level = curve["accuracy"].iloc[-1]
                label = SCHEME_NAMES[scheme]
                axes.axhline(level, color=style["color"], linestyle=(0, (4, 3)), linewidth=1.3, label=label)
            else:
                _line(axes, sending["sent"], sending, SCHEME_NAMES[scheme], style)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _format_bytes(value)))

    dashed = [_DASHED_LABEL] if sends_nothing.loc[curves.index].any() else []
    figure = _panels(
        curves,
        draw,
        _curve_captions(
            study, curves, "Accuracy against bytes sent", "sent per client so far", _MEAN_OF_VERSIONS, *dashed
        ),
    )
    return Drawing("accuracy-over-bytes", figure)


def rounds_to_a_target(study: Study, pick: Pick = "last", target: Target = None) -> Drawing:
    """Draw the rounds until the target accuracy was reached: a dot per seed, a mark at the mean, and the speed-up."""
    reached = rounds_to_target(study.finished, study.rounds, target, pick)
    table = speedups(reached).reset_index()

    def draw(axes: Axes, panel: pd.DataFrame) -> None:
        for row, scheme in enumerate(SCHEMES):
            matching = panel[panel["scheme"] == scheme]
            if matching.empty:
                continue
            cell, style = matching.iloc[0], _SCHEME_STYLES[scheme]
            seeds = reached.merge(matching[CELL], on=CELL)["rounds"].dropna()
            axes.plot(seeds, [row] * len(seeds), ".", color=style["color"], alpha=0.6, markersize=5, zorder=2)
            axes.plot([cell["rounds"]], [row], style["marker"], color=style["color"], markersize=7, zorder=3)
            axes.annotate(_result_text(cell), (1.02, row), xycoords=("axes fraction", "data"), va="center", fontsize=8)
        axes.set_yticks(range(len(SCHEMES)), [SCHEME_NAMES[scheme] for scheme in SCHEMES])
        axes.set_ylim(len(SCHEMES) - 0.5, -0.5)
        axes.set_xlim(-0.03 * study.rounds, study.rounds * 1.03)
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", color="#DDDDDD", linewidth=0.7)
        axes.set_title(f"{_panel_name(panel)}: {shown_target(panel):.1f} %", loc="left", fontsize=10)

    definition = (
        f"target: {SCHEME_NAMES[BASELINE]}'s accuracy under the same seed ({picked_rounds(study.rounds, pick)})"
        if target is None
        else f"target: {target:g} %"
    )
    speedup = f"× the speed-up over {SCHEME_NAMES[BASELINE]}, over seeds in which both reached it"
    phrases = [definition, _MEAN_OF_VERSIONS, f"dots are seeds, the mark is their mean, {speedup}"]
    captions = _captions(study, "Rounds to a target accuracy", phrases, _ROUNDS_LABEL, "")
    figure = _panels(table, draw, captions, shared=True)
    return Drawing("rounds-to-target", figure)


@dataclass(frozen=True)
class _Captions:
    """A title, the lines below it, and the axis labels."""

    title: str
    below: tuple[str, ...]
    x: str
    y: str = "accuracy, %"


def _curve_captions(study: Study, curves: pd.DataFrame, title: str, x: str, *phrases: str) -> _Captions:
    """The captions of a figure of `curves`, from `flexifed.report.curves.bands`."""
    fewest, most = (int(curves["seeds"].min()), int(curves["seeds"].max())) if len(curves) else (0, 0)
    count = f"{most} seeds" if fewest == most else f"{fewest} to {most} seeds"
    band = f"{count}: mean, and a band of ±1 standard deviation" if most > 1 else "one seed"
    return _captions(study, title, [*phrases, band, *_unfinished(study, curves)], x)


def _captions(study: Study, title: str, phrases: Sequence[str], x: str, y: str = "accuracy, %") -> _Captions:
    below = "; ".join([study.title, *phrases])
    return _Captions(title + source_label(study.data_source), (below, *data_warnings([study.data_source])), x, y)


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
        more = f" and {len(named) - _MAX_NAMED} more" if len(named) > _MAX_NAMED else ""
        phrases.append(f"UNFINISHED: {', '.join(named[:_MAX_NAMED])}{more}")
    if any(run.cell in finished for run in unfinished):
        phrases.append("unfinished seeds left out")
    return phrases


def _panels(
    curves: pd.DataFrame,
    draw: Callable[[Axes, pd.DataFrame], None],
    captions: _Captions,
    *,
    shared: bool = False,
) -> Figure:
    """Draw a grid of panels in the paper's order, with one legend for all.

    Args:
        curves: the data of all panels; there is one panel for each data set and family.
        draw: a function that draws a panel from its part of `curves`.
        captions: the title, the lines below it, and the axis labels.
        shared: whether the panels share a y axis that names the schemes, which makes a legend unnecessary.
    """
    if curves.empty:
        return _empty_figure(captions)
    panels = [panel for _, panel in in_paper_order(curves).groupby(["dataset", "family"], sort=False)]
    columns = min(_MAX_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    wide, high = _PANEL_INCHES if len(panels) > 1 else _ONE_PANEL_INCHES
    figure = _figure_with_header(captions, max(columns * wide + shared * 1.2, _ONE_PANEL_INCHES[0]), rows * high + 0.4)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=shared)
    for index, axes in enumerate(grid.flat):
        if index >= len(panels):
            axes.set_visible(False)
            continue
        _style_axes(axes, _panel_name(panels[index]))
        draw(axes, panels[index])
        if index + columns >= len(panels):
            axes.set_xlabel(captions.x, fontsize=9)
        if index % columns == 0:
            axes.set_ylabel(captions.y, fontsize=9)
    if not shared:
        _add_shared_legend(figure)
    return figure


def _figure_with_header(captions: _Captions, width: float, height: float) -> Figure:
    """Make a figure with captions above a body of `width` by `height` inches."""
    below = [line for paragraph in captions.below for line in textwrap.wrap(paragraph, int(width * 16))]
    head = 0.4 + 0.15 * len(below)
    figure = Figure(figsize=(width, head + height), layout="constrained")
    total = figure.get_figheight()
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - head / total))  # type: ignore[union-attr, call-arg]
    figure.text(0.01, 1 - 0.07 / total, captions.title, va="top", fontsize=12, fontweight="bold")
    figure.text(0.01, 1 - 0.32 / total, "\n".join(below), va="top", fontsize=8, color="#444444", linespacing=1.3)
    return figure


def _style_axes(axes: Axes, title: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, color="#888888")
    axes.set_title(title, loc="left", fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _add_shared_legend(figure: Figure) -> None:
    """Put a legend below the panels, with every line that appears in any of them."""
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    names = sorted(handles, key=lambda label: [*_LEGEND_ORDER, label].index(label.split(" (")[0]))
    figure.legend(
        [handles[name] for name in names],
        names,
        loc="outside lower left",
        ncols=len(names) if len(names) < 5 or figure.get_figwidth() > _ONE_PANEL_INCHES[0] else 3,
        frameon=False,
        fontsize=9,
    )


def _empty_figure(captions: _Captions) -> Figure:
    """Make a figure without axes, which says that there is nothing to draw."""
    figure = Figure(figsize=(_ONE_PANEL_INCHES[0], 0.8))
    figure.text(0.01, 0.9, captions.title, va="top", fontsize=12, fontweight="bold")
    message = textwrap.fill(f"nothing to draw: {captions.below[0]}", 100)
    figure.text(0.01, 0.55, message, va="top", fontsize=8, color="#444444")
    return figure


def _line(axes: Axes, x: pd.Series[Any], curve: pd.DataFrame, label: str, style: Mapping[str, Any]) -> None:
    step = max(1, len(curve) // _MARKERS_PER_LINE)
    axes.plot(x, curve["accuracy"], label=label, linewidth=1.4, markersize=4, markevery=(step // 2, step), **style)
    if curve["low"].notna().any():
        axes.fill_between(x, curve["low"], curve["high"], color=style["color"], alpha=0.18, linewidth=0)


def _split(panel: pd.DataFrame, column: str, order: Sequence[str]) -> list[tuple[str, pd.DataFrame]]:
    """Split a panel by the values of a column, in a fixed order; sort each part by round and leave out empty ones."""
    parts = ((name, panel[panel[column] == name].sort_values("round")) for name in order)
    return [(name, part) for name, part in parts if not part.empty]


def _panel_name(panel: pd.DataFrame) -> str:
    return f"{panel['dataset'].iloc[0]} / {panel['family'].iloc[0]}"


def _result_text(cell: pd.Series[Any]) -> str:
    if not cell["reached"]:
        return "not reached"
    speedup = "" if pd.isna(cell["speedup"]) else f"{cell['speedup']:.2f}×"
    if speedup and cell["pairs"] != cell["seeds"]:
        speedup += f" (n = {cell['pairs']:g})"
    if not cell["rounds"]:
        speedup = "from the start"
    if speedup and cell["reached"] == cell["seeds"]:
        return speedup
    return f"{speedup} {cell['reached']:g} of {cell['seeds']:g}".strip()


def _format_bytes(value: float) -> str:
    """Format bytes in decimal units: `1 kB`, `100 MB`."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:g} B"
