"""SIGKILL clients, drivers and the whole command at random, and hold the results to those of an undisturbed run.

python benchmarks/kills.py --kills 30 --seed 0

Runs the same small grid twice, prints what was killed and when, and ends with status 1 if a number differs, a row is
missing or there twice, or a round that a checkpoint had committed was played again.
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
from flexifed.results.store import ResultsFolder, read_metadata

SCRIPT = Path(__file__).parents[1] / "experiments" / "table1.py"
TITLES = {"client": "ray::ClientActor", "driver": "ray::ResourceTrainable"}  # what Tune makes of CellTrial
MEASURED_ANEW = ["train_s", "train_started", "eval_s", "round_s", "actor"]
LOOK_EVERY_S = 0.05
PATIENCE = 3


@dataclass
class Grid:
    """The command, the folder it writes to, and what was seen of its results."""

    line: Sequence[str]
    results: Path
    committed: list[tuple[str, pd.DataFrame]] = field(default_factory=list)

    @property
    def folder(self) -> ResultsFolder:
        """Where its results are."""
        return ResultsFolder(self.results / "table1")

    @property
    def cells(self) -> list[str]:
        """The names of the cells that have rows."""
        return sorted(path.stem for path in self.folder.rounds.glob("*.parquet"))

    def start(self) -> psutil.Popen:
        """Type the command."""
        line = [sys.executable, str(SCRIPT), *self.line, "--results-dir", str(self.results)]
        with open(self.results / "output.txt", "ab") as output:
            return psutil.Popen(line, stdout=output, stderr=subprocess.STDOUT)

    def output(self) -> str:
        """What the command has said, every time that it was typed."""
        return (self.results / "output.txt").read_text(errors="replace")

    def rounds_played(self) -> int:
        """Over all cells, the distinct rounds that have been played."""
        played: set[tuple[str, str]] = set()
        for log in self.folder.root.glob("runs/*/log.txt"):
            words = (line.split() for line in log.read_text().splitlines())
            played |= {(log.parent.name, word[3]) for word in words if len(word) > 3 and word[2] == "round"}
        return len(played)

    def remember_committed(self) -> int:
        """Keep the rows that checkpoints have committed; returns how many rounds that is."""
        rounds = 0
        for cell in self.cells:
            manifests = [*(self.folder.run_folder(cell) / "checkpoints").glob(f"round-*/{MANIFEST}")]
            next_round = max((int(path.parent.name.removeprefix("round-")) for path in manifests), default=0)
            rows = self.folder.rows_before(cell, next_round).to_pandas()
            self.committed.append((cell, rows))
            rounds += next_round
        return rounds


def main(argv: Sequence[str] | None = None) -> int:
    """Run both grids and compare; returns the exit status."""
    parser = argparse.ArgumentParser(description="Kill a run at random and compare it with an undisturbed one.")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=50, help="of each cell")
    parser.add_argument("--only", action="append", help="cells, as in table1.py; default: all five schemes")
    parser.add_argument("--results-dir", type=Path, default=None, help="default: a new folder, deleted at the end")
    options = parser.parse_args(argv)
    line = ["--profile", "smoke", "--data", "synthetic", "--rounds", str(options.rounds), "--checkpoint-every", "1"]
    line += ["--clients-per-actor", "4", "--device", "cpu"]
    for pattern in options.only or ["cifar10/vgg/*"]:
        line += ["--only", pattern]
    packages = " ".join(f"{name} {version(name)}" for name in ("ray", "torch"))
    print(f"python {platform.python_version()}, {packages}, {platform.system()} {platform.machine()}")
    print(f"grid: table1.py {' '.join(line)}; {options.kills} kills, seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="flexifed-kills-") as scratch:
        root = options.results_dir or Path(scratch)
        undisturbed, killed = (Grid(line, root / name) for name in ("undisturbed", "killed"))
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


def run_and_kill(grid: Grid, kills: int, chance: random.Random) -> None:
    """Run a grid to its end, and kill so many of its processes on the way, each after a few new rounds."""
    done, next_kill, failed_in_a_row = 0, chance.randint(1, 3), 0
    command = grid.start()
    try:
        while (status := command.poll()) != 0:
            if status is not None:
                failed_in_a_row = 0 if status == -signal.SIGKILL else failed_in_a_row + 1
                if failed_in_a_row == PATIENCE:
                    raise SystemExit(f"the command failed {PATIENCE} times in a row:\n{grid.output()}")
                say(f"the command ended with status {status}; it is typed again")
                command = grid.start()
            elif done < kills and grid.rounds_played() >= next_kill:
                time.sleep(chance.random() / 2)  # somewhere in a round
                what = chance.choice(["client", "driver", "command"])
                if victims := processes(command, what):
                    committed = grid.remember_committed()
                    chance.choice(victims).kill()
                    done += 1
                    played = grid.rounds_played()
                    say(f"kill {done}: {what}; {played} rounds played, {committed} committed in cells that run")
                    next_kill = played + chance.randint(1, 3)
            time.sleep(LOOK_EVERY_S)
    finally:
        if command.poll() is None:
            command.kill()
    if done < kills:
        raise SystemExit(f"the grid ended after {done} of {kills} kills; ask for more --rounds")
    say(f"the grid has ended, after {grid.rounds_played()} rounds")


def processes(command: psutil.Popen, what: str) -> list[psutil.Process]:
    """A command's processes of one kind, oldest first."""
    if what == "command":
        return [command]
    found = []
    try:
        for process in command.children(recursive=True):
            title = process.cmdline()
            if title and title[0].startswith(TITLES[what]):
                found.append(process)
    except psutil.NoSuchProcess:
        return []
    return sorted(found, key=lambda process: (process.create_time(), process.pid))


def differences(undisturbed: Grid, killed: Grid, rounds: int) -> list[str]:
    """What is not as it would be had nothing been killed."""
    problems = []
    if undisturbed.cells != killed.cells:
        return [f"the cells are {killed.cells}, not {undisturbed.cells}"]
    final: dict[str, pd.DataFrame] = {}
    for cell in undisturbed.cells:
        expected, found = (grid.folder.read([cell]) for grid in (undisturbed, killed))
        final[cell] = found
        if found.duplicated(["client", "round"]).any() or set(found["round"]) != set(range(rounds + 1)):
            problems.append(f"{cell}: rows are missing, or there twice")
        elif not found.drop(columns=MEASURED_ANEW).equals(expected.drop(columns=MEASURED_ANEW)):
            problems.append(f"{cell}: numbers differ")
        digests = [read_metadata(grid.folder.rounds_file(cell))["state_sha256"] for grid in (undisturbed, killed)]
        if digests[0] != digests[1]:
            problems.append(f"{cell}: final states differ")
    for cell, rows in killed.committed:
        if not final[cell].head(len(rows)).equals(rows):
            problems.append(f"{cell}: of {len(rows)} rows that were committed, some were made again")
    return problems


def say(what: str) -> None:
    """Print it with the seconds since the start."""
    print(f"{time.monotonic() - STARTED:7.1f} s  {what}", flush=True)


STARTED = time.monotonic()

if __name__ == "__main__":
    sys.exit(main())
