"""Folders are floors: checks the import contracts in pyproject.toml."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
PACKAGE = PYPROJECT.parent / "flexifed"


def test_imports_point_down_only(capsys: pytest.CaptureFixture[str]) -> None:
    broken = lint_imports(config_filename=str(PYPROJECT), no_cache=True, no_logo=True)
    report = capsys.readouterr().out
    assert not broken, report


def test_experiments_leave_ray_to_the_package() -> None:
    scripts = sorted((PYPROJECT.parent / "experiments").glob("*.py"))
    assert scripts
    for script in scripts:
        assert not {"ray", "torch"} & imported_packages(script), script


def test_every_folder_and_module_must_be_on_a_floor() -> None:
    """The contracts ignore folders without `__init__.py`; `exhaustive` rejects modules that are on no floor."""
    contracts = tomllib.loads(PYPROJECT.read_text())["tool"]["importlinter"]["contracts"]
    assert [contract["exhaustive"] for contract in contracts if contract["type"] == "layers"] == [True]
    for folder in {path.parent for path in PACKAGE.rglob("*.py")}:
        assert (folder / "__init__.py").exists(), folder


def imported_packages(script: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names
