"""What a results folder shows: one cell, forty, unfinished ones, real and synthetic ones; in every format alike."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from flexifed.cli import main
from flexifed.config import SCHEMES
from flexifed.errors import ResultsError
from flexifed.report.runs import editions, stored_cells
from flexifed.report.sheet import terminal_lines
from flexifed.report.study import Study, load_results, numbers, overview, report_text, studies_of
from flexifed.report.table import PICKS, SCHEME_NAMES, paper_table
from flexifed.results.store import ResultsFolder

NUMBER = r"[+-]?\d+\.\d"
Shown = dict[tuple[str, str, str], list[str]]
"""(data set, family, scheme) -> the numbers that stand there, in order: mean, spread, paper, difference, by version."""


def said(capsys: pytest.CaptureFixture[str], results: Path, *options: str) -> str:
    assert main(["report", str(results), *options]) == 0
    return capsys.readouterr().out


def table_of(text: str) -> str:
    """The part of a text that holds Table 1."""
    return text.split("Accuracy in percent (Table 1)")[1].split("Paired differences")[0]


def numbers_by_row(text: str, heading: str, schemes: dict[str, str]) -> Shown:
    """Read a table in which headings with a data set and family go before the rows of their schemes."""
    found: Shown = {}
    where = ("", "")
    for line in text.replace("\\_", "_").splitlines():
        if named := re.search(heading, line):
            where = (named[1], named[2])
        for scheme, name in schemes.items():
            if re.match(rf"\W*(\*\*.*\*\* \| )?{name}\b", line):
                found.setdefault((*where, scheme), []).extend(re.findall(NUMBER, line))
                break
        else:
            if found and re.match(r" +\d", line):  # what stands below the numbers, in a narrow terminal
                found[list(found)[-1]].extend(re.findall(NUMBER, line))
    return found


def from_csv(text: str) -> Shown:
    found: Shown = {}
    for row in csv.DictReader(io.StringIO(text)):
        shown = [row["mean"], row["spread"], row["paper"], row["difference"] and f"{float(row['difference']):+.1f}"]
        found.setdefault((row["dataset"], row["family"], row["scheme"]), []).extend(one for one in shown if one)
    return found


@pytest.mark.parametrize("pick", PICKS)
def test_terminal_markdown_latex_and_csv_have_the_same_numbers(
    real_grid: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, pick: str
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    plain = {scheme: scheme for scheme in SCHEMES}
    options = ("--pick", pick)
    terminal = numbers_by_row(table_of(said(capsys, real_grid, *options)), r"^(\w+) / (\w+)$", plain)
    written = table_of(said(capsys, real_grid, *options, "--format", "markdown"))
    markdown = numbers_by_row(written, r"\*\*(\w+) / (\w+)\*\*", plain)
    printed = table_of(said(capsys, real_grid, *options, "--format", "latex"))
    printed = printed.replace("$", "")
    latex = numbers_by_row(printed, r"\\textbf\{(\w+) / (\w+)\}", dict(SCHEME_NAMES))
    machine = from_csv(said(capsys, real_grid, *options, "--format", "csv"))

    assert len(machine) == 40
    assert {len(shown) for shown in machine.values()} == {16}
    assert terminal == machine
    assert markdown == machine
    assert latex == machine


def test_the_papers_numbers_and_the_differences_are_those_of_its_table(real_grid: Path) -> None:
    table = numbers(load_results(real_grid)).set_index(["dataset", "family", "scheme", "version"])
    paper = paper_table().stack(future_stack=True)
    assert table["paper"].to_dict() == pytest.approx(paper.to_dict())
    assert (table["mean"] - table["paper"]).to_dict() == pytest.approx(table["difference"].to_dict(), abs=1e-9)


def test_forty_cells_are_one_table_that_fits_100_columns(
    real_grid: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = said(capsys, real_grid)
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("Accuracy in percent") == 1
    table = table_of(text).splitlines()
    assert len([line for line in table if re.match(rf"({'|'.join(SCHEMES)}) ", line)]) == 40
    headings = [line for line in table if re.fullmatch(r"\w+ / \w+", line)]
    order = dict.fromkeys(f"{dataset} / {family}" for dataset, family, _ in paper_table().index)
    assert headings == list(order)
    assert "Here: 40 cells, 120 finished runs of 120 (3 seeds); 40 of the 40 cells of the paper's Table 1." in text


def test_a_mixed_folder_is_shown_apart_and_each_part_says_what_it_is(
    mixed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = said(capsys, mixed)
    parts = dict(
        zip(("real", "real-other", "real-partial", "synthetic"), re.split(r"(?m)^profile ", text)[1:], strict=True)
    )
    for source, part in parts.items():
        assert part.startswith(f"authors, 20 rounds, {source} data")
        assert f"Data: {source}." in part
        assert ("[SYNTHETIC DATA]" in part) == (source == "synthetic")
        assert ("SYNTHETIC data are a stand-in" in part) == (source == "synthetic")
        assert ("[REAL-PARTIAL DATA]" in part) == (source == "real-partial")
        assert ("REAL-OTHER data are another release" in part) == (source == "real-other")
        assert ("the paper's Table 1, from its full protocol" in part) == (source == "real")
    assert "6 cells, 10 finished runs of 12 (3 seeds); 6 of the 40" in parts["real"]
    assert "cifar10/vgg/max_common seed 2: round 6 of 20" in parts["real"]
    assert "cifar10/resnet/max_common seed 0: round 4 of 20" in parts["real"]
    assert "cifar10 / resnet" not in table_of(parts["real"])


def test_no_number_is_of_two_kinds_of_data(mixed: Path) -> None:
    """Each number is what a plain mean over the rows of one source gives."""
    rows = pd.read_parquet(mixed / "table1" / "rounds")
    rows = rows[rows["round"] > 20 - 2]  # of the last two scores; unfinished cells have none
    plain = rows.groupby(["data_source", "dataset", "family", "scheme", "version"])["accuracy"].mean().mul(100)
    table = numbers(load_results(mixed)).set_index(list(plain.index.names))["mean"]
    assert set(table.index) == set(plain.index)
    assert table.to_dict() == pytest.approx(plain.to_dict(), abs=0.0501)


def test_the_paper_stands_beside_the_whole_real_data_only(mixed: Path) -> None:
    table = numbers(load_results(mixed))
    assert set(table.loc[table["paper"].notna(), "data_source"]) == {"real"}
    assert table.loc[table["data_source"] == "real", "paper"].notna().all()
    assert table.loc[table["paper"].isna(), "difference"].isna().all()


def test_unfinished_results_are_named_and_make_no_number(
    write_grid: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_grid(tmp_path, rounds=20, seeds=(0,), cells=[("agnews", "vdcnn", "max_common")], played=3)
    for form in ("terminal", "markdown", "latex"):
        text = said(capsys, tmp_path, "--format", form)
        assert "No cell is finished." in text
        assert "agnews/vdcnn/max_common seed 0: round 2 of 20" in text
        assert "Accuracy in percent" not in text
    assert said(capsys, tmp_path, "--format", "csv").splitlines() == [",".join(numbers([]).columns)]


def test_many_unfinished_cells_are_counted_and_not_all_named(write_grid: Callable[..., int], tmp_path: Path) -> None:
    cells = [key for key in paper_table().index if key[1] == "vgg"]
    write_grid(tmp_path, rounds=20, seeds=(0,), cells=cells, played=1)
    [study] = load_results(tmp_path)
    assert study.contents()[-1] == f"  and {len(cells) - 8} more"


def test_one_cell(write_grid: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_grid(tmp_path, rounds=2, seeds=(0,), cells=[("speech_commands", "resnet", "max_common")], clients=4)
    text = said(capsys, tmp_path)
    assert "Here: 1 cell, 1 finished run of 1 (1 seed); 1 of the 40 cells" in text
    assert "Paired differences" not in text
    assert "Rounds to a target" not in text
    assert "max_common" in said(capsys, tmp_path, "--target", "50").split("Rounds to a target")[1]


def test_every_table_of_a_file_says_which_data_it_is_of(mixed: Path) -> None:
    """A table that is copied out of a report still says so."""
    for study in load_results(mixed):
        sheets = study.sheets()
        assert len(sheets) == (3 if study.data_source == "real" else 2)  # one seed has no paired differences
        for sheet in sheets:
            notes = " ".join(sheet.notes)
            assert study.data_source in notes
            assert ("SYNTHETIC data are a stand-in" in notes) == (study.data_source == "synthetic")


def test_overview_counts_runs_by_row_and_scheme(mixed: Path) -> None:
    studies = load_results(mixed)
    real = overview(studies).sections[0]
    assert real.heading == studies[0].title
    rows = {label: [cell[0] for cell in cells] for label, cells in real.rows}
    assert rows["cifar10 / vgg"] == ["2 of 2", "2 of 2", "2 of 2", "2 of 2", "2 of 3"]
    assert rows["cifar10 / resnet"] == ["-", "-", "-", "-", "0 of 1"]


def test_slugs_tell_studies_apart(mixed: Path, real_grid: Path) -> None:
    slugs = [study.slug for study in load_results(mixed)]
    assert slugs == ["authors-20-real", "authors-20-real-other", "authors-20-real-partial", "authors-20-synthetic"]
    assert [study.slug for study in load_results(real_grid)] == ["authors-20-real"]


def test_a_profiles_name_leads_no_figures_elsewhere(write_grid: Callable[..., int], tmp_path: Path) -> None:
    cells = [("cifar10", "vgg", "max_common")]
    write_grid(tmp_path, rounds=2, seeds=(0,), cells=cells, profile="../../elsewhere" + "x" * 300)
    [study] = load_results(tmp_path)
    assert study.slug.startswith(".._.._elsewherexxx")
    assert len(study.slug) < 100


def test_a_run_whose_last_score_is_missing_is_not_finished(write_grid: Callable[..., int], tmp_path: Path) -> None:
    write_grid(tmp_path, rounds=20, seeds=(0,), cells=[("cifar10", "vgg", "max_common")], played=20)
    [study] = load_results(tmp_path)
    assert study.edition.cells[0].last_round == 19
    assert study.finished.empty
    assert "No cell is finished." in study.contents()


def test_rows_without_their_metadata_are_not_taken_for_a_finished_run(
    write_grid: Callable[..., int], tmp_path: Path
) -> None:
    write_grid(tmp_path, rounds=20, seeds=(0,), cells=[("cifar10", "vgg", "max_common")], played=7)
    [path] = (tmp_path / "table1" / "rounds").iterdir()
    pd.read_parquet(path).to_parquet(path)
    with pytest.raises(ResultsError, match=f"{path} does not say under which settings its rows were made"):
        load_results(tmp_path)


def test_results_that_may_not_be_listed_are_not_called_missing(
    real_grid: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path) -> list[str]:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr("flexifed.report.runs.os.listdir", refuse)
    with pytest.raises(ResultsError, match=r"can't look for results in .*rounds: Permission denied; choose another"):
        load_results(real_grid)


def test_an_experiments_own_folder_is_told_from_the_folder_of_results(real_grid: Path) -> None:
    with pytest.raises(ResultsError, match=r"itself has some \(choose them with --experiment \.\)"):
        load_results(real_grid / "table1")
    assert len(load_results(real_grid / "table1", ".")) == 1


def test_paired_differences_fit_80_columns(real_grid: Path) -> None:
    [study] = load_results(real_grid)
    sheet = study.differences()
    text = [line for line, _ in terminal_lines(replace(sheet, title="", notes=()), 80)]
    assert max(map(len, text)) <= 80


def test_report_text_of_latex_holds_whole_tables(mixed: Path) -> None:
    studies: list[Study] = load_results(mixed)
    text = "\n".join(report_text(studies, "latex"))
    assert text.count(r"\begin{table*}") == text.count(r"\end{table*}") == 9
    assert text.count("{") - text.count("}") == text.count(r"\{") - text.count(r"\}")


def test_a_bad_target_ends_with_status_2(real_grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(real_grid), "--target", "0"]) == 2
    assert "target is 0; it must be an accuracy in percent" in capsys.readouterr().err


def test_a_setting_that_is_none_tells_no_runs_apart(write_grid: Callable[..., int], tmp_path: Path) -> None:
    """A file from before the setting was thought of has not got it; its run's id is the same."""
    write_grid(tmp_path, rounds=2, seeds=(0, 1), cells=[("cifar10", "vgg", "max_common")])
    old, new = stored_cells(ResultsFolder(tmp_path / "table1"))
    assert len(editions([old, replace(new, settings={"partition.max_train": None})])) == 1
    assert len(editions([old, replace(new, settings={"partition.max_train": 50})])) == 2


def test_the_newest_folder_is_shown_and_others_are_named_apart_from_the_table(
    write_grid: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_grid(tmp_path, rounds=2, seeds=(0,), cells=[("cifar10", "vgg", "max_common")])
    (tmp_path / "table1").rename(tmp_path / "table1-2")
    write_grid(tmp_path, rounds=2, seeds=(0,), cells=[("cifar10", "vgg", "standalone")])
    assert [str(one.cell) for one in load_results(tmp_path)[0].edition.cells] == ["cifar10/vgg/max_common"]
    assert [str(one.cell) for one in load_results(tmp_path, "table1")[0].edition.cells] == ["cifar10/vgg/standalone"]
    assert main(["report", str(tmp_path), "--format", "csv"]) == 0
    told = capsys.readouterr()
    assert "there are also (choose with --experiment): table1" in told.err
    assert told.out.startswith("study,profile,")


def test_runs_of_one_command_are_cut_at_its_rounds_and_name_its_seeds_and_profile(real_grid: Path) -> None:
    """Stored runs may have more rounds, and may have been run under another profile with the same settings."""
    folder = ResultsFolder(real_grid / "table1")
    names = [cell.name for cell in stored_cells(folder) if str(cell.cell) == "cifar10/vgg/max_common"]
    [study] = studies_of(folder, names, profile="paper", rounds=12)
    assert study.finished["round"].max() == 12
    assert study.finished["seed"].nunique() == 3
    notes = " ".join(study.table(seeds=range(4)).notes)
    assert "Profile: paper. Rounds: 12. Seeds: 0 1 2 3." in notes
    assert "Fewer seeds: cifar10/vgg/max_common 3 of 4." in notes


def test_each_data_source_among_the_runs_of_one_command_has_a_table_of_its_own(mixed: Path) -> None:
    folder = ResultsFolder(mixed / "table1")
    names = [cell.name for cell in stored_cells(folder) if cell.is_finished and cell.seed == 0]
    studies = studies_of(folder, names, profile="authors", rounds=20)
    assert [study.data_source for study in studies] == ["real", "real-other", "real-partial", "synthetic"]
    for study in studies:
        assert f"Data: {study.data_source}." in " ".join(study.table().notes)
