"""The folders of an experiment: `table1`, and `table1-2`, `table1-3` and so on from starting over.

Commands continue in the newest folder, and reports show it; the others are left alone.
"""

from __future__ import annotations

import re
from pathlib import Path

from flexifed.errors import ResultsError


def experiment_folders(results_dir: Path, name: str) -> list[Path]:
    """The existing folders, oldest first.

    Raises:
        ResultsError: the results folder can't be read.
    """
    try:
        folders = [path for path in (results_dir / name, *results_dir.glob(f"{name}-*")) if path.is_dir()]
    except OSError as error:
        raise ResultsError(
            f"can't look for results in {results_dir}: {error.strerror or error}; choose another --results-dir"
        ) from error
    numbered = {}
    for path in folders:
        if path.name == name:
            numbered[1] = path
        elif match := re.fullmatch(rf"{re.escape(name)}-([1-9]\d*)", path.name):
            numbered[int(match[1])] = path
    return [numbered[number] for number in sorted(numbered)]


def newest_folder(results_dir: Path, name: str) -> Path:
    """The folder in which a command continues; it need not exist yet."""
    return [results_dir / name, *experiment_folders(results_dir, name)][-1]


def fresh_folder(results_dir: Path, name: str) -> Path:
    """A folder in which to start over: the newest one if it is still empty, otherwise the next. It is not created."""
    newest = newest_folder(results_dir, name)
    if not any((newest / "runs").glob("*")) and not any((newest / "rounds").glob("*.parquet")):
        return newest
    number = 1 if newest.name == name else int(newest.name.removeprefix(f"{name}-"))
    return results_dir / f"{name}-{number + 1}"
