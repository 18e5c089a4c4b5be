"""The documentation: its Python code runs, its commands can be parsed, and its links lead to existing targets."""

from __future__ import annotations

import re
import runpy
import shlex
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

import flexifed
from flexifed import cli
from flexifed.cells.run import CellRun
from flexifed.cells.session import CellSession, open_log
from flexifed.config import CellConfig
from flexifed.data import find_dataset
from flexifed.federation.cell import make_shards
from flexifed.federation.rounds import LocalHosts
from flexifed.grid import make_cells, parse_options, select_cells
from flexifed.profiles import PROFILES
from flexifed.results.schema import SCHEMA
from flexifed.results.store import ResultsFolder

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, *DOCS]
MODELS = ROOT / "docs" / "models.md"
RECORDS = ROOT / "records" / "README.md"
FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)]+)\)")
ENDS_A_COMMAND = {"|", "||", "&&", ";", ">", ">>", "<"}
SHELL_VALUES = {"$n": "4", "$PWD/": "/folder/"}


def blocks(page: Path, language: str | None = None) -> list[str]:
    """The fenced blocks of a page, of one language or of all."""
    return [body for _, kind, body in FENCED.findall(page.read_text()) if language in (None, kind)]


def python_blocks(page: Path) -> list[Any]:
    return [pytest.param(code, id=f"{page.stem}-{index}") for index, code in enumerate(blocks(page, "python"))]


def commands(page: Path, name: str) -> Iterator[list[str]]:
    """The arguments of each call of the program `name` in a page's blocks and inline code."""
    lines = [line for block in blocks(page) for line in block.replace("\\\n", " ").splitlines()]
    lines += [" ".join(code.split()) for code in INLINE.findall(FENCED.sub("", page.read_text()))]
    for line in lines:
        if name not in line or line.startswith(("import ", "from ")):
            continue
        for expression, value in SHELL_VALUES.items():
            line = line.replace(expression, value)
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # the first line of a program in quotes
            continue
        for start, word in enumerate(words):
            if word == name or word.endswith(f"/{name}"):
                following = words[start + 1 :]
                ends = (index for index, word in enumerate(following) if word in ENDS_A_COMMAND)
                yield following[: next(ends, len(following))]


def commands_of(pages: Sequence[Path], name: str) -> list[Any]:
    """Test parameters: the arguments of each call of a program, once per page."""
    calls = {(page.stem, " ".join(arguments)): arguments for page in pages for arguments in commands(page, name)}
    return [pytest.param(arguments, id=f"{stem}: {text}") for (stem, text), arguments in calls.items()]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `results/`, as thin runs on real data would leave it."""
    folder = tmp_path_factory.mktemp("readme")
    write_grid: Callable[..., int] = runpy.run_path(str(ROOT / "benchmarks" / "generate.py"))["write_grid"]
    cells = [("cifar10", family, scheme) for family in ("vgg", "resnet") for scheme in ("clustered_fl", "max_common")]
    write_grid(folder / "results", rounds=3, seeds=(0, 1), cells=cells, source="real", profile="thin")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the `results/` of a smoke run, played in this process, and its `models/`."""
    folder = tmp_path_factory.mktemp("models")
    root = folder / "results" / "table1"
    profile = PROFILES["smoke"]
    config = CellConfig(
        dataset="cifar10",
        family="vgg",
        scheme="max_common",
        model=profile.model,
        partition=profile.partition,
        training=profile.training,
    )
    info = find_dataset("cifar10", data="synthetic", data_dir=Path("nowhere"))
    run, shards = CellRun(config=config, info=info, profile="smoke", rounds=1, results=root), make_shards(config, info)
    with closing(open_log(run, "in process")) as log:
        session = CellSession(run, "in process", LocalHosts(config, info, shards), shards, log)
        while session.play_round().round_index < run.rounds:
            pass
    flexifed.load_clients(ResultsFolder(root).run_folder(run.name)).export(folder / "models")
    return folder


def run(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    return names


# Python


@pytest.mark.parametrize("code", [block for page in PAGES if page != MODELS for block in python_blocks(page)])
def test_python_of_the_pages_runs(code: str, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(results)
    run(code)


@pytest.mark.parametrize("code", python_blocks(MODELS))
def test_python_of_the_page_on_trained_models_runs(
    code: str, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    run(code)
    if "accuracies" in code:
        _, measured, written = capsys.readouterr().out.splitlines()[-1].split()
        assert float(measured) == pytest.approx(float(written)), "as the page says"


def test_the_readmes_means_are_of_one_cell_and_version_each(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(results)
    means = [names["accuracy"] for names in map(run, blocks(README, "python")) if "accuracy" in names]
    assert len(means) == 2
    for accuracy in means:
        assert isinstance(accuracy, pd.Series)
        assert accuracy.index.names == ["dataset", "family", "scheme", "version", "round"]
        assert len(accuracy) == 4 * 4 * 4, "cells, versions, scores"


@pytest.mark.parametrize("column", ["version", "accuracy", "profile"])
def test_code_that_reads_a_missing_column_fails(column: str, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(results)
    [code] = [block for block in blocks(README, "python") if "read_parquet" in block]
    assert f'"{column}"' in code
    with pytest.raises(KeyError, match="no_such_column"):
        run(code.replace(f'"{column}"', '"no_such_column"'))


def test_own_models_share_what_the_readme_says(capsys: pytest.CaptureFixture[str]) -> None:
    [code] = [block for block in blocks(README, "python") if "sharing_plan" in block]
    run(code)
    assert f"  # {capsys.readouterr().out.strip()}: " in code


def test_public_names_are_listed_and_exist() -> None:
    listed = dir(flexifed)
    assert {"DeclaredLayer", "SharingPlan", "aggregate", "build_model", "sharing_plan", "signature"} <= {*listed}
    assert {*flexifed.__all__, "__version__"} <= {*listed}
    for name in flexifed.__all__:
        assert getattr(flexifed, name).__name__ == name


# Commands


def exit_after_help(arguments: Sequence[str]) -> AbstractContextManager[object]:
    """A command line that asks for help exits with status 0; any other is parsed without an exit."""
    return pytest.raises(SystemExit, match=r"^0$") if "--help" in arguments else nullcontext()


@pytest.mark.parametrize("arguments", commands_of(PAGES, "experiments/table1.py"))
def test_every_command_line_of_the_experiment_can_be_parsed(arguments: list[str]) -> None:
    rows = runpy.run_path(str(ROOT / "experiments" / "table1.py"))["ROWS"]
    with exit_after_help(arguments):
        options = parse_options(arguments, prog="table1.py", description="", environ={"RAY_ADDRESS": "auto"})
        assert select_cells(make_cells(rows), options.only)


@pytest.mark.parametrize("arguments", [command for command in commands_of(PAGES, "flexifed") if command.values[0]])
def test_every_command_line_of_flexifed_can_be_parsed(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if len(arguments) == 1:  # the text only names a subcommand
        arguments = [*arguments, "--help"]
    monkeypatch.setattr(cli, "guarded", lambda action: 0)  # the command is parsed and not run
    with exit_after_help(arguments):
        cli.main(arguments)


def test_commands_are_found_on_the_pages() -> None:
    assert len(commands_of([README], "experiments/table1.py")) >= 5
    assert len(commands_of([README], "flexifed")) >= 4
    assert len(commands_of(DOCS, "experiments/table1.py")) >= 10
    assert len(commands_of(DOCS, "flexifed")) >= 8


# Tables and links


def test_the_table_of_columns_is_the_schema() -> None:
    page = (ROOT / "docs" / "report.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (string|int\d+|float\d+)(, null[^|]*)? \|", page, re.MULTILINE)
    types = {"double": "float64"}
    assert [(name, kind, bool(null)) for name, kind, null in rows] == [
        (field.name, types.get(str(field.type), str(field.type)), field.nullable) for field in SCHEMA
    ]


@pytest.mark.parametrize("page", [*PAGES, RECORDS, ROOT / "CHANGELOG.md"], ids=lambda page: page.stem)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in LINK.findall(FENCED.sub("", page.read_text())):
        if link.startswith(("https:", "http:")):
            continue
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not heading or heading in headings(target), link


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub forms them."""
    titles = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


def test_files_that_the_page_on_extending_names_exist() -> None:
    code = INLINE.findall((ROOT / "docs" / "extending.md").read_text())
    paths = [text for text in code if text.endswith((".py", ".md"))]
    missing = [path for path in paths if "/" in path and "NAME" not in path and not (ROOT / path).exists()]
    assert len(paths) > 20
    assert not missing


def test_every_record_is_listed() -> None:
    folders = {folder.name for folder in RECORDS.parent.iterdir() if (folder / "README.md").exists()}
    assert folders == set(re.findall(r"^\| \[([\w-]+)\]", RECORDS.read_text(), re.MULTILINE))


def test_citation_names_the_version_and_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["version"] == project["version"] == flexifed.__version__
    assert citation["license"] == project["license"]
    [paper] = citation["references"]
    assert project["urls"]["Paper"].endswith(paper["doi"])
    assert paper["doi"] in README.read_text()
