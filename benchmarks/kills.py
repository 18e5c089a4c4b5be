"""Kill clients, drivers and the whole command at random, and compare the results with those of an undisturbed run.

python benchmarks/kills.py --kills 30 --seed 0

Runs the same small grid twice, once undisturbed and once with SIGKILLs, and prints what was killed and when. The exit
status is 1 if a number differs, a row is missing or duplicated, or a round was played again although a checkpoint had
committed it.
"""

from __future__ import annotations

import argparse
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import psutil

from flexifed.federation.checkpoint import MANIFEST
from flexifed.results.rounds_file import read_metadata
from flexifed.results.store import ResultsFolder

SCRIPT = Path(__file__).parents[1] / "experiments" / "table1.py"
PROCESS_TITLES = {
    "client": "ray::ClientActor",
    "driver": "ray::ResourceTrainable",
}  # Tune wraps CellTrial in the latter
VARYING_COLUMNS = ["train_s", "train_started", "eval_s", "round_s", "actor"]
POLL_INTERVAL_S = 0.05
MAX_FAILURES_IN_A_ROW = 3


@dataclass
class Grid:
    """A grid that is run by `table1.py`, and the rows that its checkpoints had committed before each kill.

    Attributes:
        arguments: the arguments of the command.
        results: the command's --results-dir.
        committed: (cell, its committed rows) for each cell at each kill.
    """

    arguments: Sequence[str]
    results: Path
    committed: list[tuple[str, pd.DataFrame]] = field(default_factory=list)

    @property
    def folder(self) -> ResultsFolder:
        """The results folder of its experiment."""
        return ResultsFolder(self.results / "table1")

    @property
    def cells(self) -> list[str]:
        """The names of the cells that have rows."""
        return sorted(path.stem for path in self.folder.rounds.glob("*.parquet"))

    def start(self) -> psutil.Popen:
        """Start the command."""
        line = [sys.executable, str(SCRIPT), *self.arguments, "--results-dir", str(self.results)]
        with open(self.results / "output.txt", "ab") as output:
            return psutil.Popen(line, stdout=output, stderr=subprocess.STDOUT)

    def output(self) -> str:
        """The output of the command, from all its starts."""
        return (self.results / "output.txt").read_text(errors="replace")

    def rounds_played(self) -> int:
        """The number of distinct rounds that have been played, over all cells."""
        played: set[tuple[str, str]] = set()
        for log in self.folder.root.glob("runs/*/log.txt"):
            lines = (line.split() for line in log.read_text().splitlines())
            played |= {(log.parent.name, words[3]) for words in lines if len(words) > 3 and words[2] == "round"}
        return len(played)

    def remember_committed(self) -> int:
        """Record the rows that checkpoints have committed; returns the number of their rounds."""
        rounds = 0
        for cell in self.cells:
            manifests = [*(self.folder.run_folder(cell) / "checkpoints").glob(f"round-*/{MANIFEST}")]
            next_round = max((int(path.parent.name.removeprefix("round-")) for path in manifests), default=0)
            rows = self.folder.rows_before(cell, next_round).to_pandas()
            self.committed.append((cell, rows))
            rounds += next_round
        return rounds


def main(argv: Sequence[str] | None = None) -> int:
    """Run both grids and compare their results; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Kill processes of a run at random, and compare its results with an undisturbed run's."
    )
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=50, help="rounds of each cell")
    parser.add_argument(
        "--only", action="append", help="cells to run, as in table1.py; default: all five schemes of cifar10/vgg"
    )
    parser.add_argument("--results-dir", type=Path, default=None, help="default: a new folder, deleted at the end")
    options = parser.parse_args(argv)
    arguments = ["--profile", "smoke", "--data", "synthetic", "--rounds", str(options.rounds)]
    arguments += ["--checkpoint-every", "1", "--clients-per-actor", "4", "--device", "cpu"]
    for pattern in options.only or ["cifar10/vgg/*"]:
        arguments += ["--only", pattern]
    packages = " ".join(f"{name} {version(name)}" for name in ("ray", "torch"))
    print(f"python {platform.python_version()}, {packages}, {platform.system()} {platform.machine()}")
    print(f"grid: table1.py {' '.join(arguments)}; {options.kills} kills, seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="flexifed-kills-") as scratch:
        root = options.results_dir or Path(scratch)
        undisturbed, killed = (Grid(arguments, root / name) for name in ("undisturbed", "killed"))
        for grid in (undisturbed, killed):
            grid.results.mkdir(parents=True, exist_ok=True)
        if undisturbed.start().wait() != 0:
            print(undisturbed.output())
            return 1
        say(f"undisturbed: {undisturbed.rounds_played()} rounds of {len(undisturbed.cells)} cells")
        run_and_kill(killed, options.kills, random.Random(options.seed))
        problems = differences(undisturbed, killed, options.rounds)
    for problem in problems:
        print(f"WRONG: {problem}")
    if not problems:
        print(f"equal: every row once, every metric, every final state, after {options.kills} kills")
    return bool(problems)


def run_and_kill(grid: Grid, kills: int, rng: random.Random) -> None:
    """Run a grid to its end, and kill `kills` of its processes on the way, each after a few new rounds."""
    num_killed, next_kill, failed_in_a_row = 0, rng.randint(1, 3), 0
    command = grid.start()
    try:
        while (status := command.poll()) != 0:
            if status is not None:
                failed_in_a_row = 0 if status == -signal.SIGKILL else failed_in_a_row + 1
                if failed_in_a_row == MAX_FAILURES_IN_A_ROW:
                    raise SystemExit(f"the command failed {MAX_FAILURES_IN_A_ROW} times in a row:\n{grid.output()}")
                say(f"the command ended with status {status}; starting it again")
                command = grid.start()
            elif num_killed < kills and grid.rounds_played() >= next_kill:
                time.sleep(rng.random() / 2)  # somewhere in a round
                kind = rng.choice(["client", "driver", "command"])
                if victims := processes(command, kind):
                    committed = grid.remember_committed()
                    rng.choice(victims).kill()
                    num_killed += 1
                    played = grid.rounds_played()
                    say(f"kill {num_killed}: {kind}; {played} rounds played, {committed} committed in running cells")
                    next_kill = played + rng.randint(1, 3)
            time.sleep(POLL_INTERVAL_S)
    finally:
        if command.poll() is None:
            command.kill()
    if num_killed < kills:
        raise SystemExit(f"the grid ended after {num_killed} of {kills} kills; ask for more --rounds")
    say(f"the grid has ended, after {grid.rounds_played()} rounds")


def processes(command: psutil.Popen, kind: str) -> list[psutil.Process]:
    """The processes of a command that are of one kind (client, driver or command), oldest first."""
    if kind == "command":
        return [command]
    matching = []
    try:
        for process in command.children(recursive=True):
            line = process.cmdline()
            if line and line[0].startswith(PROCESS_TITLES[kind]):
                matching.append(process)
    except psutil.NoSuchProcess:
        return []
    return sorted(matching, key=lambda process: (process.create_time(), process.pid))


def differences(undisturbed: Grid, killed: Grid, rounds: int) -> list[str]:
    """Describe every difference between the results of both grids, and every committed row that was made again."""
    problems = []
    if undisturbed.cells != killed.cells:
        return [f"the cells are {killed.cells}, not {undisturbed.cells}"]
    final: dict[str, pd.DataFrame] = {}
    for cell in undisturbed.cells:
        expected, actual = (grid.folder.read([cell]) for grid in (undisturbed, killed))
        final[cell] = actual
        if actual.duplicated(["client", "round"]).any() or set(actual["round"]) != set(range(rounds + 1)):
            problems.append(f"{cell}: rows are missing or duplicated")
        elif not actual.drop(columns=VARYING_COLUMNS).equals(expected.drop(columns=VARYING_COLUMNS)):
            problems.append(f"{cell}: numbers differ")
        digests = [read_metadata(grid.folder.rounds_file(cell))["state_sha256"] for grid in (undisturbed, killed)]
        if digests[0] != digests[1]:
            problems.append(f"{cell}: final states differ")
    for cell, rows in killed.committed:
        if not final[cell].head(len(rows)).equals(rows):
            problems.append(f"{cell}: some of {len(rows)} committed rows were made again")
    return problems


def say(message: str) -> None:
    """Print a message with the seconds since the start."""
    print(f"{time.monotonic() - STARTED:7.1f} s  {message}", flush=True)


STARTED = time.monotonic()

if __name__ == "__main__":
    sys.exit(main())
