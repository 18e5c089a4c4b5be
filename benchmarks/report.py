"""Time `flexifed report` on the rows of the whole grid: `python benchmarks/report.py` prints JSON.

The rows are generated: every cell of the paper's table, 502 rounds, 8 clients, 3 seeds, with accuracies that rise to
about the paper's. They are labelled as synthetic.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import machine, spread, versions
from generate import write_grid


def main() -> None:
    """Generate the rows, run the command on them in fresh processes, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=502)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = write_grid(Path(folder), rounds=options.rounds, seeds=range(options.seeds))
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.parquet"))
        plain = [_seconds(_READ_ALL, folder) for _ in range(options.repeats)]
        table = [_seconds(_REPORT, folder) for _ in range(options.repeats)]
    result = {
        "what": "a process that prints the whole grid's tables, from its start to its end",
        "rows": rows,
        "files": 40 * options.seeds,
        "bytes": size,
        "seconds": spread(table),
        "compare": {"what": "a process that only reads all rows with pandas.read_parquet", **spread(plain)},
        "machine": machine(),
        "versions": versions("pandas", "pyarrow"),
    }
    print(json.dumps(result, indent=2))


_REPORT = "import sys; from flexifed.cli import main; sys.exit(main(['report', sys.argv[1]]))"
_READ_ALL = "import sys, pandas; pandas.read_parquet(sys.argv[1] + '/table1/rounds')"


def _seconds(program: str, folder: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", program, folder], check=True, stdout=subprocess.DEVNULL)
    return round(time.perf_counter() - started, 2)


if __name__ == "__main__":
    main()
