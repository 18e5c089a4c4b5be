"""Reports of results folders: one cell, forty, unfinished ones, real and synthetic data; the same in every format."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from flexifed.cli import main
from flexifed.config import SCHEMES
from flexifed.errors import ResultsError
from flexifed.profiles import PROFILES
from flexifed.report.reports import numbers, overview, report_text
from flexifed.report.runs import Edition, editions, stored_cells
from flexifed.report.study import Study, load_results, studies_of
from flexifed.report.table import PICKS, SCHEME_NAMES, paper_table
from flexifed.results.rounds_file import read_metadata
from flexifed.results.store import ResultsFolder
from flexifed.results.tables import write_table

NUMBER = r"[+-]?\d+\.\d"
NumbersByRow = dict[tuple[str, str, str], list[str]]
"""(data set, family, scheme) -> for each version in turn: mean, spread, the paper's number and the difference."""


def report_output(capsys: pytest.CaptureFixture[str], results: Path, *options: str) -> str:
    assert main(["report", str(results), *options]) == 0
    return capsys.readouterr().out


def table_of(text: str) -> str:
    """The part of a report that holds Table 1."""
    return text.split("Accuracy in percent (Table 1)")[1].split("Paired differences")[0]


def numbers_by_row(text: str, heading: str, schemes: dict[str, str]) -> NumbersByRow:
    """Read a table in which a heading with data set and family precedes the rows of its schemes."""
    numbers_of: NumbersByRow = {}
    dataset_and_family = ("", "")
    for line in text.replace("\\_", "_").splitlines():
        if match := re.search(heading, line):
            dataset_and_family = (match[1], match[2])
        for scheme, name in schemes.items():
            if re.match(rf"\W*(\*\*.*\*\* \| )?{name}\b", line):
                numbers_of.setdefault((*dataset_and_family, scheme), []).extend(re.findall(NUMBER, line))
                break
        else:
            if numbers_of and re.match(r" +\d", line):  # what stands below the numbers, in a narrow terminal
                numbers_of[list(numbers_of)[-1]].extend(re.findall(NUMBER, line))
    return numbers_of


def from_csv(text: str) -> NumbersByRow:
    numbers_of: NumbersByRow = {}
    for row in csv.DictReader(io.StringIO(text)):
        columns = [row["mean"], row["spread"], row["paper"], row["difference"] and f"{float(row['difference']):+.1f}"]
        numbers_of.setdefault((row["dataset"], row["family"], row["scheme"]), []).extend(
            number for number in columns if number
        )
    return numbers_of


@pytest.mark.parametrize("pick", PICKS)
def test_terminal_markdown_latex_and_csv_have_the_same_numbers(
    real_grid: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, pick: str
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    own_names = {scheme: scheme for scheme in SCHEMES}
    options = ("--pick", pick)
    terminal = numbers_by_row(table_of(report_output(capsys, real_grid, *options)), r"^(\w+) / (\w+)$", own_names)
    markdown_table = table_of(report_output(capsys, real_grid, *options, "--format", "markdown"))
    markdown = numbers_by_row(markdown_table, r"\*\*(\w+) / (\w+)\*\*", own_names)
    latex_table = table_of(report_output(capsys, real_grid, *options, "--format", "latex"))
    latex = numbers_by_row(latex_table.replace("$", ""), r"\\textbf\{(\w+) / (\w+)\}", dict(SCHEME_NAMES))
    csv_numbers = from_csv(report_output(capsys, real_grid, *options, "--format", "csv"))

    assert len(csv_numbers) == 40
    assert {len(row) for row in csv_numbers.values()} == {16}
    assert terminal == csv_numbers
    assert markdown == csv_numbers
    assert latex == csv_numbers


def test_the_papers_numbers_and_the_differences_are_those_of_its_table(real_grid: Path) -> None:
    table = numbers(load_results(real_grid)).set_index(["dataset", "family", "scheme", "version"])
    paper = paper_table().stack(future_stack=True)
    assert table["paper"].to_dict() == pytest.approx(paper.to_dict())
    assert (table["mean"] - table["paper"]).to_dict() == pytest.approx(table["difference"].to_dict(), abs=1e-9)


def test_forty_cells_are_one_table_that_fits_100_columns(
    real_grid: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = report_output(capsys, real_grid)
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("Accuracy in percent") == 1
    table = table_of(text).splitlines()
    assert len([line for line in table if re.match(rf"({'|'.join(SCHEMES)}) ", line)]) == 40
    headings = [line for line in table if re.fullmatch(r"\w+ / \w+", line)]
    order = dict.fromkeys(f"{dataset} / {family}" for dataset, family, _ in paper_table().index)
    assert headings == list(order)
    assert "Here: 40 cells, 120 finished runs of 120 (3 seeds); 40 of the 40 cells of the paper's Table 1." in text


def test_paired_differences_fit_80_columns(
    real_grid: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    table = report_output(capsys, real_grid).split("Paired differences")[1].split("Rounds to a target")[0]
    rows = [line for line in table.splitlines() if re.match(r"\w+ - \w+", line)]
    assert len(rows) == 8 * 4
    assert max(map(len, rows)) < 80
    for row in rows:
        assert re.fullmatch(r"\w+ - \w+ +\S+  +\S+ to \S+  +12  +\S+ to \S+  +3", row)


def test_a_mixed_folder_has_a_part_for_each_kind_of_data_that_names_it(
    mixed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = report_output(capsys, mixed)
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


def test_no_number_mixes_two_kinds_of_data(mixed: Path) -> None:
    """Each number is what a plain mean over the rows of one source gives."""
    rows = pd.read_parquet(mixed / "table1" / "rounds")
    rows = rows[rows["round"] > 20 - 2]  # of the last two scores; unfinished cells have none
    plain = rows.groupby(["data_source", "dataset", "family", "scheme", "version"])["accuracy"].mean().mul(100)
    table = numbers(load_results(mixed)).set_index(list(plain.index.names))["mean"]
    assert set(table.index) == set(plain.index)
    assert table.to_dict() == pytest.approx(plain.to_dict(), abs=0.0501)


def test_the_papers_numbers_stand_beside_complete_real_data_only(mixed: Path) -> None:
    table = numbers(load_results(mixed))
    assert set(table.loc[table["paper"].notna(), "data_source"]) == {"real"}
    assert table.loc[table["data_source"] == "real", "paper"].notna().all()
    assert table.loc[table["paper"].isna(), "difference"].isna().all()


def test_unfinished_results_are_named_and_make_no_number(
    write_grid: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_grid(tmp_path, rounds=20, seeds=(0,), cells=[("agnews", "vdcnn", "max_common")], played=3)
    for form in ("terminal", "markdown", "latex"):
        text = report_output(capsys, tmp_path, "--format", form)
        assert "No cell is finished." in text
        assert "agnews/vdcnn/max_common seed 0: round 2 of 20" in text
        assert "Accuracy in percent" not in text
    assert report_output(capsys, tmp_path, "--format", "csv").splitlines() == [",".join(numbers([]).columns)]


def test_a_run_that_lacks_only_the_last_score_is_unfinished(write_grid: Callable[..., int], tmp_path: Path) -> None:
    write_grid(tmp_path, rounds=20, seeds=(0,), cells=[("agnews", "vdcnn", "max_common")], played=20)
    [study] = load_results(tmp_path)
    assert "No cell is finished." in study.contents()
    assert "  agnews/vdcnn/max_common seed 0: round 19 of 20" in study.contents()
    assert study.finished.empty


def test_many_unfinished_cells_are_counted_and_not_all_named(write_grid: Callable[..., int], tmp_path: Path) -> None:
    cells = [key for key in paper_table().index if key[1] == "vgg"]
    write_grid(tmp_path, rounds=20, seeds=(0,), cells=cells, played=1)
    [study] = load_results(tmp_path)
    assert study.contents()[-1] == f"  and {len(cells) - 8} more"


def test_one_cell(write_grid: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_grid(tmp_path, rounds=2, seeds=(0,), cells=[("speech_commands", "resnet", "max_common")], clients=4)
    text = report_output(capsys, tmp_path)
    assert "Here: 1 cell, 1 finished run of 1 (1 seed); 1 of the 40 cells" in text
    assert "Paired differences" not in text
    assert "Rounds to a target" not in text
    assert "max_common" in report_output(capsys, tmp_path, "--target", "50").split("Rounds to a target")[1]


def test_every_table_of_a_file_says_which_data_it_is_of(mixed: Path) -> None:
    """A table that is copied out of a report still says so."""
    for study in load_results(mixed):
        sheets = study.sheets()
        assert len(sheets) == (3 if study.data_source == "real" else 2)  # one seed has no paired differences
        for sheet in sheets:
            notes = " ".join(sheet.notes)
            assert study.data_source in notes
            assert ("SYNTHETIC data are a stand-in" in notes) == (study.data_source == "synthetic")


def test_rows_that_the_paper_does_not_have_are_another_experiment(
    write_grid: Callable[..., int], tmp_path: Path
) -> None:
    others = [("speech_commands_12", "vgg", scheme) for scheme in SCHEMES]
    write_grid(tmp_path, rounds=20, seeds=(0,), cells=others, source="real")
    (study,) = load_results(tmp_path)
    assert "another experiment than the paper's Table 1" in study.contents()[0]
    assert study.table().title == "Accuracy in percent"
    none_finished = replace(study, finished=study.finished.iloc[:0])
    assert none_finished.table().title.startswith("Accuracy in percent, ")
    write_grid(tmp_path, rounds=20, seeds=(0,), cells=[("cifar10", "vgg", "max_common")], source="real")
    (study,) = load_results(tmp_path)
    assert "1 of the 40 cells of the paper's Table 1" in study.contents()[0]
    assert study.table().title == "Accuracy in percent (Table 1)"


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


@pytest.mark.parametrize("profile", ["../../elsewhere", "/tmp/elsewhere", "a" * 300, "..", "a\0b"])
def test_the_name_of_a_profile_leads_no_slug_out_of_its_folder(mixed: Path, profile: str) -> None:
    cells = stored_cells(ResultsFolder(mixed / "table1"))[:1]
    named = [replace(cells[0], profile=name) for name in (profile, profile + "!", "plain")]
    slugs = [Study(Edition((cell,)), pd.DataFrame(), pd.DataFrame()).slug for cell in named]
    assert len(set(slugs)) == 3
    for slug in slugs:
        assert re.fullmatch(r"[\w.-]{1,120}", slug)
        assert (Path("figures") / slug).name == slug


def test_settings_that_one_file_lacks_do_not_give_two_studies_one_slug(
    write_grid: Callable[..., int], tmp_path: Path
) -> None:
    """As from another version of flexifed: neither file differs from its profile's defaults."""
    write_grid(tmp_path, rounds=2, seeds=(0, 1), cells=[("cifar10", "vgg", "max_common")])
    path = sorted((tmp_path / "table1" / "rounds").glob("*.parquet"))[1]
    metadata = read_metadata(path) | {"config": {"training": {"batch_size": PROFILES["authors"].training.batch_size}}}
    write_table(path, pq.read_table(path).replace_schema_metadata({"flexifed": json.dumps(metadata)}))
    first, second = load_results(tmp_path)
    assert first.title == second.title
    assert first.slug != second.slug
    for study in (first, second):
        assert re.fullmatch("authors-2-synthetic-[0-9a-f]{8}", study.slug)


def test_report_text_of_latex_holds_whole_tables(mixed: Path) -> None:
    studies: list[Study] = load_results(mixed)
    text = "\n".join(report_text(studies, "latex"))
    assert text.count(r"\begin{table*}") == text.count(r"\end{table*}") == 9
    assert text.count("{") - text.count("}") == text.count(r"\{") - text.count(r"\}")


def test_a_bad_target_ends_with_status_2(real_grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(real_grid), "--target", "0"]) == 2
    assert "target is 0; it must be an accuracy in percent" in capsys.readouterr().err


def test_a_setting_that_is_none_does_not_separate_runs(write_grid: Callable[..., int], tmp_path: Path) -> None:
    """A file written before the setting existed lacks it; its run has the same id."""
    write_grid(tmp_path, rounds=2, seeds=(0, 1), cells=[("cifar10", "vgg", "max_common")])
    old, new = stored_cells(ResultsFolder(tmp_path / "table1"))
    assert len(editions([old, replace(new, settings={"partition.max_train": None})])) == 1
    assert len(editions([old, replace(new, settings={"partition.max_train": 50})])) == 2


def test_a_folder_that_cannot_be_read_is_named(
    write_grid: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Simulated, as permissions do not hold for root."""
    write_grid(tmp_path, rounds=2, seeds=(0,), cells=[("cifar10", "vgg", "max_common")])
    (tmp_path / "other" / "rounds").mkdir(parents=True)
    forbidden = tmp_path / "table1" / "rounds"
    listdir, scandir = os.listdir, os.scandir

    def check(path: str | Path) -> str | Path:
        if Path(path) == forbidden:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return path

    monkeypatch.setattr(os, "listdir", lambda path=".": listdir(check(path)))
    monkeypatch.setattr(os, "scandir", lambda path=".": scandir(check(path)))
    assert main(["report", str(tmp_path)]) == 2
    assert f"can't look for results in {forbidden}: Permission denied" in capsys.readouterr().err
    with pytest.raises(ResultsError, match=r"no results in .*other/rounds; give the --results-dir"):
        load_results(tmp_path, "other")


def test_a_file_that_lost_its_metadata_is_refused(write_grid: Callable[..., int], tmp_path: Path) -> None:
    """Without them nothing says whether the run is finished."""
    write_grid(tmp_path, rounds=20, seeds=(0,), cells=[("cifar10", "vgg", "max_common")], played=5)
    [path] = (tmp_path / "table1" / "rounds").glob("*.parquet")
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata(None), path)
    with pytest.raises(ResultsError, match=rf"{path} does not say how many rounds .* move it away"):
        load_results(tmp_path)


def test_the_folder_of_an_experiment_can_be_given_itself(
    write_grid: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_grid(tmp_path, rounds=2, seeds=(0,), cells=[("cifar10", "vgg", "max_common")])
    [study] = load_results(tmp_path / "table1")
    assert study.edition == load_results(tmp_path)[0].edition
    assert report_output(capsys, tmp_path / "table1") == report_output(capsys, tmp_path)


def test_the_records_of_the_repository_can_be_loaded() -> None:
    studies = load_results(Path(__file__).parents[2] / "records" / "thin-cifar10-vgg")
    assert {(study.data_source, study.rounds) for study in studies} == {("real", 60)}
    assert {seed for study in studies for seed in study.seeds} == set(range(9))


def test_the_newest_folder_is_shown_and_others_are_named_apart_from_the_table(
    write_grid: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_grid(tmp_path, rounds=2, seeds=(0,), cells=[("cifar10", "vgg", "max_common")])
    (tmp_path / "table1").rename(tmp_path / "table1-2")
    write_grid(tmp_path, rounds=2, seeds=(0,), cells=[("cifar10", "vgg", "standalone")])
    assert [str(run.cell) for run in load_results(tmp_path)[0].edition.cells] == ["cifar10/vgg/max_common"]
    assert [str(run.cell) for run in load_results(tmp_path, "table1")[0].edition.cells] == ["cifar10/vgg/standalone"]
    assert main(["report", str(tmp_path), "--format", "csv"]) == 0
    captured = capsys.readouterr()
    assert "there are also (choose with --experiment): table1" in captured.err
    assert captured.out.startswith("study,profile,")


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
