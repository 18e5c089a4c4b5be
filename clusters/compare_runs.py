"""Check whether two runs of an experiment gave the same numbers, bit for bit, wherever each of them ran.

python clusters/compare_runs.py results-here/table1 results-there/table1

Compares all columns of the rows except times and processes, and the SHA-256 of every client's final state. Exit status
0 if everything is the same, 1 if not, 2 if there is nothing to compare or a file can't be read.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from flexifed.errors import FlexifedError
from flexifed.results.rounds_file import read_metadata
from flexifed.results.store import ResultsFolder

RUN_COLUMNS = ("train_s", "train_started", "eval_s", "round_s", "actor")
"""Columns with times and processes, which differ from run to run."""


def differences(left: Path, right: Path, cell: str) -> list[str]:
    """The differences between two runs of a cell, one phrase each; empty if they are the same."""
    files = [ResultsFolder(root).rounds_file(cell) for root in (left, right)]
    if missing := [str(file) for file in files if not file.exists()]:
        return [f"missing: {', '.join(missing)}"]
    first, second = (
        ResultsFolder(root)
        .read([cell])
        .drop(columns=list(RUN_COLUMNS))
        .sort_values(["round", "client"], ignore_index=True)
        for root in (left, right)
    )
    phrases = [f"column {name}" for name in first if not first[name].equals(second[name])]
    if len(first) != len(second):
        phrases = [f"{len(first)} rows and {len(second)} rows"]
    digests = [read_metadata(file).get("state_sha256") for file in files]
    if digests[0] is None or digests[0] != digests[1]:
        phrases.append("state_sha256")
    return phrases


def main(argv: Sequence[str]) -> int:
    """Compare two folders cell by cell, and print a line for each."""
    if len(argv) != 2:
        print("usage: compare_runs.py RESULTS/EXPERIMENT OTHER_RESULTS/EXPERIMENT", file=sys.stderr)
        return 2
    left, right = (Path(name).expanduser().resolve() for name in argv)
    cells = sorted({file.stem for root in (left, right) for file in ResultsFolder(root).rounds.glob("*.parquet")})
    if not cells:
        print(f"error: no results in {left / 'rounds'} and {right / 'rounds'}", file=sys.stderr)
        return 2
    try:
        return _compare(left, right, cells)
    except FlexifedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _compare(left: Path, right: Path, cells: Sequence[str]) -> int:
    status = 0
    for cell in cells:
        if phrases := differences(left, right, cell):
            status = 1
            print(f"{cell}: DIFFERENT: {'; '.join(phrases)}")
            continue
        metadata = [read_metadata(ResultsFolder(root).rounds_file(cell)) for root in (left, right)]
        rows = len(ResultsFolder(left).read([cell], ["round"]))
        print(f"{cell}: the same {rows} rows, the same {len(_strings(metadata[0]['state_sha256']))} final states")
        for run in metadata:
            print(f"    {run['placement']}; {'; '.join(_strings(run.get('computed_on', [run['machine']])))}")
    return status


def _strings(value: object) -> list[str]:
    assert isinstance(value, list)
    return value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
