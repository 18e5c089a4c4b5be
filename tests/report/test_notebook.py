"""The notebook: stored without outputs, calls the package only, and runs from end to end on any results folder."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from flexifed.report.sheet import markdown
from flexifed.report.study import load_results

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "analysis" / "table1.ipynb"
NO_HEAVY_IMPORTS = "import sys; print('heavy:', sorted({'ray', 'torch'} & set(sys.modules)))"


def read_notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def executed(results: Path) -> nbformat.NotebookNode:
    """The notebook after a run in its own folder, on the given results."""
    notebook = read_notebook()
    [parameters] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert parameters.source.count('"../results"') == 1
    parameters.source = parameters.source.replace('"../results"', repr(str(results)))
    notebook.cells.append(nbformat.v4.new_code_cell(NO_HEAVY_IMPORTS))
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    return notebook


def text_and_images(notebook: nbformat.NotebookNode) -> tuple[str, int]:
    """All text of the notebook's outputs, and the number of its images."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    contents = [output.get("data", {"text/plain": output.get("text", "")}) for output in outputs]
    texts = [content.get("text/markdown") or content.get("text/plain", "") for content in contents]
    return "\n".join(texts), sum("image/png" in content for content in contents)


def test_the_notebook_is_stored_without_outputs() -> None:
    notebook = read_notebook()
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None)


def test_its_cells_import_nothing_but_the_report() -> None:
    code = "\n".join(cell.source for cell in read_notebook().cells if cell.cell_type == "code")
    imports = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert imports
    for node in imports:
        assert isinstance(node, ast.ImportFrom)
        assert (node.module or "").startswith("flexifed.report.")


def test_the_notebook_runs_on_a_mixed_folder_and_shows_the_numbers_of_the_command(mixed: Path) -> None:
    text, images = text_and_images(executed(mixed))
    studies = load_results(mixed)
    assert len(studies) == 4
    for study in studies:
        for sheet in (study.describe(), study.table(), study.differences(), study.speedups()):
            assert markdown(sheet) in text
    assert images == 4 * len(studies)
    assert "heavy: []" in text


@pytest.mark.slow
@pytest.mark.ray
def test_the_notebook_runs_on_the_rows_of_a_real_run(tmp_path: Path) -> None:
    command = [sys.executable, "experiments/table1.py", "--profile", "smoke", "--data", "synthetic"]
    command += ["--seeds", "0", "1", "--only", "cifar10/vgg/*", "--results-dir", str(tmp_path)]
    environ = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    subprocess.run(command, cwd=ROOT, env=environ, check=True, timeout=280)
    text, images = text_and_images(executed(tmp_path))
    [study] = load_results(tmp_path)
    assert (len(study.edition.finished), study.data_source) == (10, "synthetic")
    assert markdown(study.table()) in text
    assert "SYNTHETIC DATA" in text
    assert images == 4
