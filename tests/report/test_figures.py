"""Figures show the numbers of the curves, name their data, and can be drawn from any results folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation

from flexifed.cli import main
from flexifed.config import SCHEMES, CellName
from flexifed.report.curves import bands, scheme_curves, version_curves
from flexifed.report.figures import (
    accuracy_over_bytes,
    accuracy_over_rounds,
    drawings,
    rounds_to_a_target,
    versions_over_rounds,
)
from flexifed.report.runs import Edition, StoredCell
from flexifed.report.study import Study, load_results
from flexifed.report.table import SCHEME_NAMES

EVERY_FIGURE = [
    "accuracy-over-rounds",
    *(f"versions-{scheme}" for scheme in SCHEMES),
    "accuracy-over-bytes",
    "rounds-to-target",
]


def panels(figure: Figure) -> dict[str, Axes]:
    return {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_visible()}


def lines(axes: Axes) -> dict[str, Line2D]:
    return {str(line.get_label()): line for line in axes.get_lines()}


def texts(figure: Figure) -> str:
    return " ".join(text.get_text() for text in figure.texts).replace("\n", " ")


@pytest.fixture(scope="module")
def grid(real_grid: Path) -> Study:
    [study] = load_results(real_grid)
    return study


def test_forty_cells_are_eight_panels_of_five_lines_in_the_papers_order(grid: Study) -> None:
    figure = accuracy_over_rounds(grid).figure
    assert list(panels(figure)) == [
        *("cifar10 / vgg", "cifar10 / resnet", "cinic10 / vgg", "cinic10 / resnet"),
        *("agnews / charcnn", "agnews / vdcnn", "speech_commands / vgg", "speech_commands / resnet"),
    ]
    for axes in panels(figure).values():
        drawn = lines(axes)
        assert list(drawn) == list(SCHEME_NAMES.values())
        assert len({line.get_color() for line in drawn.values()}) == 5
        assert len({line.get_marker() for line in drawn.values()}) == 5
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(SCHEME_NAMES.values())
    assert "real data" in texts(figure)
    assert "3 seeds: mean, and a band of ±1 standard deviation" in texts(figure)


def test_lines_and_bands_are_those_of_the_curves(grid: Study) -> None:
    axes = panels(accuracy_over_rounds(grid).figure)["agnews / vdcnn"]
    curves = bands(scheme_curves(version_curves(grid.finished)))
    curve = curves.query("dataset == 'agnews' and family == 'vdcnn' and scheme == 'max_common'")
    line = lines(axes)["Max-Common"]
    assert list(line.get_xdata()) == curve["round"].tolist() == list(range(21))
    assert list(line.get_ydata()) == pytest.approx(curve["accuracy"].tolist())
    band = axes.collections[SCHEMES.index("max_common")].get_paths()[0].vertices
    assert {round(float(y), 9) for _, y in band} == {round(y, 9) for y in [*curve["low"], *curve["high"]]}


def test_versions_are_lines_of_one_scheme(grid: Study) -> None:
    axes = panels(versions_over_rounds(grid, "basic_common").figure)["cifar10 / resnet"]
    assert list(lines(axes)) == ["V1", "V2", "V3", "V4"]
    curves = bands(version_curves(grid.finished))
    curve = curves.query("dataset == 'cifar10' and family == 'resnet' and scheme == 'basic_common' and version == 'v3'")
    assert list(lines(axes)["V3"].get_ydata()) == pytest.approx(curve["accuracy"].tolist())


def test_curves_over_bytes_begin_at_round_1_and_standalone_is_a_horizontal_line(grid: Study) -> None:
    axes = panels(accuracy_over_bytes(grid).figure)["cifar10 / vgg"]
    drawn = lines(axes)
    sent = grid.finished.query("scheme == 'basic_common' and round == 0")["bytes_up"].iloc[0]
    assert list(drawn["Basic-Common"].get_xdata()) == [sent * index for index in range(1, 21)]
    horizontal = drawn["Standalone"]
    assert len(set(horizontal.get_ydata())) == 1


def test_rounds_to_a_target_have_a_dot_for_each_seed(grid: Study) -> None:
    axes = panels(rounds_to_a_target(grid, target=50).figure)["cifar10 / vgg: 50.0 %"]
    dots = [line for line in axes.get_lines() if line.get_marker() == "."]
    assert [len(line.get_xdata()) for line in dots] == [3] * 5


def study_of(**rounds_by_scheme: Sequence[int | None]) -> Study:
    """Finished runs of 20 rounds, whose accuracy exceeds 50 % from a given round on for each scheme and seed."""
    rows = [
        {"dataset": "cifar10", "family": "vgg", "scheme": scheme, "data_source": "real", "seed": seed, "version": "v1",
         "round": index, "accuracy": 0.9 if at is not None and index >= at else 0.1, "bytes_up": 1}
        for scheme, seeds in rounds_by_scheme.items()
        for seed, at in enumerate(seeds)
        for index in range(21)
    ]  # fmt: skip
    cells = [
        StoredCell(
            name=f"{scheme}-{seed}", cell=CellName("cifar10", "vgg", scheme), seed=seed, last_round=20, rounds=20,
            extended_to=None, profile="authors", data_source="real", fingerprint="", settings={},
        )
        for scheme, seeds in rounds_by_scheme.items()
        for seed in range(len(seeds))
    ]  # fmt: skip
    return Study(Edition(tuple(cells)), pd.DataFrame(rows), pd.DataFrame(rows[:0], columns=list(rows[0])))


def annotations(axes: Axes) -> dict[str, str]:
    """The text beside each scheme of a panel of rounds to a target."""
    names = list(SCHEME_NAMES.values())
    texts = [child for child in axes.get_children() if isinstance(child, Annotation)]
    return {names[int(text.xy[1])]: text.get_text() for text in texts}


def test_a_speedup_over_some_of_the_seeds_names_their_number() -> None:
    study = study_of(clustered_fl=[8, None, None], max_common=[2, 3, 4], basic_common=[4, None, None])
    figure = rounds_to_a_target(study, target=50).figure
    [axes] = panels(figure).values()
    assert annotations(axes) == {
        "Clustered-FL": "1.00× (n = 1) 1 of 3",
        "Basic-Common": "2.00× (n = 1) 1 of 3",
        "Max-Common": "4.00× (n = 1)",
    }
    assert "over seeds in which both reached it" in texts(figure)


def test_a_scheme_without_a_speedup_has_the_number_of_seeds_that_reached_the_target() -> None:
    study = study_of(
        clustered_fl=[None, None], basic_common=[None, None], clustered_common=[3, None], max_common=[2, 3]
    )
    [axes] = panels(rounds_to_a_target(study, target=50).figure).values()
    assert annotations(axes) == {
        "Clustered-FL": "not reached",
        "Basic-Common": "not reached",
        "Clustered-Common": "1 of 2",
        "Max-Common": "2 of 2",
    }


def test_figures_say_what_is_unfinished_among_the_curves_that_they_draw(mixed: Path) -> None:
    """Of the real data, max_common has an unfinished seed on cifar10/vgg, and no finished one on cifar10/resnet."""
    real = load_results(mixed)[0]
    for drawing in (accuracy_over_rounds(real), versions_over_rounds(real, "max_common")):
        assert "UNFINISHED: cifar10/resnet/max_common to round 4; unfinished seeds left out" in texts(drawing.figure)
    standalone_text = texts(versions_over_rounds(real, "standalone").figure)
    assert "UNFINISHED" not in standalone_text
    assert "unfinished seeds left out" not in standalone_text


def test_every_figure_of_a_mixed_folder_says_its_data_and_what_is_unfinished(mixed: Path) -> None:
    for study in load_results(mixed):
        drawn = drawings(study)
        assert [drawing.name for drawing in drawn] == EVERY_FIGURE
        for drawing in drawn:
            text = texts(drawing.figure)
            assert f"{study.data_source} data" in text
            assert ("[SYNTHETIC DATA]" in text) == (study.data_source == "synthetic")
            assert ("[REAL-PARTIAL DATA]" in text) == (study.data_source == "real-partial")
    real = load_results(mixed)[0]
    assert "UNFINISHED: cifar10/resnet/max_common to round 4" in texts(accuracy_over_rounds(real).figure)


def test_unfinished_results_have_curves_and_no_rounds_to_a_target(
    write_grid: Callable[..., int], tmp_path: Path
) -> None:
    write_grid(tmp_path, rounds=20, seeds=(0,), cells=[("agnews", "vdcnn", "max_common")], played=3)
    [study] = load_results(tmp_path)
    names = [drawing.name for drawing in drawings(study)]
    assert names == ["accuracy-over-rounds", "versions-max_common", "accuracy-over-bytes"]
    assert "nothing to draw" in texts(rounds_to_a_target(study).figure)
    assert "nothing to draw" in texts(versions_over_rounds(study, "standalone").figure)


@pytest.mark.parametrize("played", [1, 2])
def test_a_run_that_has_just_begun_is_drawn(write_grid: Callable[..., int], tmp_path: Path, played: int) -> None:
    write_grid(tmp_path, rounds=20, seeds=(0,), cells=[("cifar10", "vgg", scheme) for scheme in SCHEMES], played=played)
    [study] = load_results(tmp_path)
    for drawing in drawings(study):
        assert drawing._repr_png_().startswith(b"\x89PNG")


def test_before_round_1_there_are_no_bytes_to_draw(write_grid: Callable[..., int], tmp_path: Path) -> None:
    write_grid(tmp_path, rounds=20, seeds=(0,), cells=[("cifar10", "vgg", scheme) for scheme in SCHEMES], played=1)
    [study] = load_results(tmp_path)
    assert "nothing to draw" in texts(accuracy_over_bytes(study).figure)
    assert "accuracy-over-bytes" not in [drawing.name for drawing in drawings(study)]


@pytest.mark.parametrize("scheme", ["standalone", "max_common"])
def test_dashed_lines_are_explained_where_they_are_drawn(
    write_grid: Callable[..., int], tmp_path: Path, scheme: str
) -> None:
    write_grid(tmp_path, rounds=20, seeds=(0,), cells=[("cifar10", "vgg", scheme)])
    [study] = load_results(tmp_path)
    figure = accuracy_over_bytes(study).figure
    [axes] = panels(figure).values()
    is_dashed = any(line.get_linestyle() == "--" for line in axes.get_lines())
    assert is_dashed == (scheme == "standalone")
    assert ("dashed: sends nothing" in texts(figure)) == is_dashed


def files_in(folder: Path) -> Sequence[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))


def test_the_command_writes_every_figure_as_png_and_pdf(
    write_grid: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_grid(tmp_path, rounds=2, seeds=(0,), cells=[("cifar10", "vgg", "max_common")])
    figures = tmp_path / "figures"
    assert main(["report", str(tmp_path), "--figures", str(figures)]) == 0
    names = ("accuracy-over-bytes", "accuracy-over-rounds", "versions-max_common")
    assert files_in(figures) == [f"authors-2-synthetic/{name}.{end}" for name in names for end in ("pdf", "png")]
    error_output = capsys.readouterr().err
    for path in figures.rglob("*.*"):
        assert path.read_bytes().startswith({".png": b"\x89PNG", ".pdf": b"%PDF"}[path.suffix])
        assert str(path) in error_output


def test_figures_that_cannot_be_written_end_with_status_2(
    write_grid: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_grid(tmp_path, rounds=2, seeds=(0,), cells=[("cifar10", "vgg", "max_common")])
    (tmp_path / "file").write_text("in the way")
    assert main(["report", str(tmp_path), "--figures", str(tmp_path / "file" / "figures")]) == 2
    assert "can't write figures to" in capsys.readouterr().err


def test_without_matplotlib_the_command_says_what_to_install_and_prints_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "flexifed.report.figures")
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    assert main(["report", str(tmp_path), "--figures", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "pip install 'flexifed[analysis]'" in captured.err
