"""The folders of an experiment: `table1`, and `table1-2`, `table1-3` ... where somebody wanted to start over.

The newest is the one that commands go on with and that reports show; the others stay as they are.
"""

from __future__ import annotations

import re
from pathlib import Path


def experiment_folders(results_dir: Path, name: str) -> list[Path]:
    """Those that are there, oldest first."""
    numbered = {1: results_dir / name} if (results_dir / name).is_dir() else {}
    for path in results_dir.glob(f"{name}-*"):
        if (match := re.fullmatch(rf"{re.escape(name)}-([1-9]\d*)", path.name)) and path.is_dir():
            numbered[int(match[1])] = path
    return [numbered[number] for number in sorted(numbered)]


def newest_folder(results_dir: Path, name: str) -> Path:
    """The one that a command goes on with; it need not be there yet."""
    return [results_dir / name, *experiment_folders(results_dir, name)][-1]


def fresh_folder(results_dir: Path, name: str) -> Path:
    """One to start over in. It is not made; where the newest holds nothing yet, that is the one."""
    newest = newest_folder(results_dir, name)
    if not any((newest / "runs").glob("*")) and not any((newest / "rounds").glob("*.parquet")):
        return newest
    number = 1 if newest.name == name else int(newest.name.removeprefix(f"{name}-"))
    return results_dir / f"{name}-{number + 1}"
