"""Play the same job in flexifed and in Flower's simulation engine, in turn, and compare their rounds per minute.

    uv run --extra test python benchmarks/flower.py                        thin VGGs, 8 clients, synthetic CIFAR-10
    uv run --extra test python benchmarks/flower.py --data-dir data        the same on CIFAR-10
    uv run --extra test python benchmarks/flower.py --profile thin         whole shards in every round, no augmentation

The cell is that of `round.py --local-epochs 1`, except for its width and its scheme: the published protocol with one
local epoch instead of ten.

Both sides have the same models, data, shards, local steps, seeds and scoring, and apply FedAvg within each architecture
(`flower_job.py`). Flower plays the job with three programs (`flower_app.py`): `defaults`, written like Flower's
tutorials and with its own default of two CPUs a client; `tutorial`, the same with as many clients at a time as
flexifed, one thread each; and `lean`, like `tutorial` but with flexifed's own functions for batches, steps and scoring,
so that the sides differ in the engine alone.

Flower pins another version of Ray, so it has an environment of its own. uv makes it at the first call, which takes
minutes and gigabytes.

Prints JSON. In a repetition, each side runs in a fresh process, one after another. Rounds per minute are measured in
the steady state, from the end of the first round to the end of the last; `wall_s` is the time of the whole process,
with its start. `outside_s` is the time of a round beyond an even share of training and scoring for the clients that run
at the same time: the engine, and CPUs that wait for others; `outside_share` is its share of the round. `same_numbers`
gives the largest difference between the scores of the lean program and flexifed's, over all clients and rounds: zero if
both did the same work and means are exact, as the mean of two clients is. The other programs draw other batches, so
their scores are only similar.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common import RoundObserver, machine, play_cell, spread, versions
from flower_job import CPUS_PER_CLIENT, Job

from flexifed.errors import FlexifedError
from flexifed.profiles import PROFILES

FLOWER = "1.41.0"
TIMEOUT_S = 3600.0
APP = Path(__file__).with_name("flower_app.py")

Rounds = list[dict[str, Any]]
"""For each round: when it `ended` (seconds of one clock), `accuracies` and `losses` by client, and `computing_s`, the
seconds of training and scoring over all clients."""


class FlowerError(Exception):
    """Flower's side can't be run."""


def default_environment() -> Path:
    """The folder in which Flower's environment is kept between calls."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flexifed" / "flower-env"


def requirements() -> list[str]:
    """The packages of Flower's environment: Flower, and what flexifed's models and data need, in the same versions."""
    installed = {name: version(name).split("+")[0] for name in ("torch", "torchvision", "safetensors")}
    return [f"flwr[simulation]=={FLOWER}", *(f"{name}=={number}" for name, number in installed.items())]


def prepare_environment(folder: Path) -> Path:
    """Make Flower's environment if it is missing or has other versions; returns its Python interpreter.

    Raises:
        FlowerError: the folder contains something else, or uv is not installed or fails.
    """
    python = folder / "bin" / "python"
    wanted = "\n".join(requirements())
    stamp = folder / "flexifed-requirements.txt"
    if python.exists() and stamp.is_file() and stamp.read_text() == wanted:
        return python
    if folder.exists() and not (folder / "pyvenv.cfg").is_file() and any(folder.iterdir()):
        raise FlowerError(
            f"{folder} contains something other than an environment; name another folder with --flower-env"
        )
    uv = shutil.which("uv")
    if uv is None:
        raise FlowerError(
            "Flower needs an environment of its own, and uv, which makes it, is not installed: install uv, or "
            f"name the Python of an environment with {', '.join(requirements())} with --flower-python"
        )
    print(f"making an environment for Flower in {folder}", file=sys.stderr)
    for line in (
        [uv, "venv", "--clear", "--python", sys.executable, str(folder)],
        [uv, "pip", "install", "--python", str(python), *requirements()],
    ):
        finished = subprocess.run(line, stdout=sys.stderr, check=False)
        if finished.returncode:
            raise FlowerError(f"`{' '.join(line)}` failed with status {finished.returncode}")
    stamp.write_text(wanted)
    return python


def flower_versions(python: Path) -> dict[str, str]:
    """The versions of the packages in Flower's environment.

    Raises:
        FlowerError: `python` can't be run, or does not have Flower.
    """
    program = "import json; from common import versions; print(json.dumps(versions('flwr', 'ray', 'torch', 'numpy')))"
    try:
        finished = subprocess.run(
            [str(python), "-c", program], cwd=APP.parent, capture_output=True, text=True, check=False, timeout=60
        )
    except OSError as error:
        raise FlowerError(f"can't run {python}: {error.strerror}") from error
    if finished.returncode:
        raise FlowerError(f"{python} has no Flower with its simulation engine: {_last_line(finished.stderr)}")
    return dict(json.loads(finished.stdout))


def play_flower(job: Job, program: str, python: Path) -> tuple[Rounds, float]:
    """Let Flower play the job in a process of its own; returns its rounds, and the seconds of the whole process.

    Raises:
        FlowerError: the process fails, or takes too long.
    """
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
        "PYTHONPATH": str(APP.parents[1]),
        "OMP_NUM_THREADS": str(CPUS_PER_CLIENT[program]),
        "FLWR_TELEMETRY_ENABLED": "0",  # a benchmark reports to no one
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }
    started = time.perf_counter()
    line = [str(python), str(APP), job.to_json(), program]
    try:
        finished = subprocess.run(line, env=environment, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise FlowerError(f"Flower's side did not finish within {TIMEOUT_S:g} s") from error
    wall_s = time.perf_counter() - started
    if finished.returncode:
        raise FlowerError(f"Flower's side failed:\n{finished.stderr}")
    return json.loads(finished.stdout.splitlines()[-1]), wall_s


def play_flexifed(job: Job) -> tuple[Rounds, float]:
    """Play the job in a fresh process; returns its rounds, and the seconds of the whole process."""
    started = time.perf_counter()
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as processes:
        rounds = processes.submit(_play_cell, job).result()
    return rounds, time.perf_counter() - started


def _play_cell(job: Job) -> Rounds:
    """Play the job as an experiment does."""
    clock = RoundClock()
    rows = play_cell(job.config(), job.info(), job.rounds, clock, num_cpus=job.cpus)
    return rounds_of_rows(rows.to_dict("records"), clock.ended)


class RoundClock(RoundObserver):
    """Records the time at which every round had been played."""

    def __init__(self) -> None:
        self.ended: list[float] = []

    def reported(self, report: Any) -> None:
        """Record the time."""
        self.ended.append(report.at)


def rounds_of_rows(rows: Sequence[Mapping[Any, Any]], ended: Sequence[float]) -> Rounds:
    """Convert the rows of a cell to rounds that are scored after the aggregation, as Flower scores them.

    flexifed scores clients at the start of a round, so the scores of round r are in the rows of round r + 1. The scores
    before the first training are dropped, as Flower has none.

    Args:
        rows: the rows of flexifed's results.
        ended: when each of flexifed's rounds had been played; the last round only scores.
    """
    by_round: dict[int, list[Mapping[Any, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["client"]):
        by_round.setdefault(int(row["round"]), []).append(row)
    return [
        {
            "ended": ended[index],
            "accuracies": [row["accuracy"] for row in by_round[index + 1]],
            "losses": [row["loss"] for row in by_round[index + 1]],
            "computing_s": sum(row["train_s"] + row["eval_s"] for row in by_round[index]),
        }
        for index in range(len(by_round) - 1)
    ]


def describe_rounds(rounds: Rounds, wall_s: float, at_a_time: int) -> dict[str, float]:
    """The figures of one side in one repetition; `at_a_time` of its clients train at the same time."""
    steady_s = rounds[-1]["ended"] - rounds[0]["ended"]
    computing_s = sum(entry["computing_s"] for entry in rounds[1:])
    return {
        "rounds_per_minute": 60 * (len(rounds) - 1) / steady_s,
        "round_s": steady_s / (len(rounds) - 1),
        "outside_s": (steady_s - computing_s / at_a_time) / (len(rounds) - 1),
        "outside_share": 1 - computing_s / (at_a_time * steady_s),
        "wall_s": wall_s,
        "startup_s": wall_s - steady_s * len(rounds) / (len(rounds) - 1),
        "final_accuracy": statistics.fmean(rounds[-1]["accuracies"]),
    }


def largest_difference(ours: Rounds, theirs: Rounds) -> dict[str, float]:
    """The largest difference between both sides' scores, over all clients and rounds."""
    return {
        name: max(
            abs(our_score - their_score)
            for our_round, their_round in zip(ours, theirs, strict=True)
            for our_score, their_score in zip(our_round[name], their_round[name], strict=True)
        )
        for name in ("accuracies", "losses")
    }


def describe_repetitions(repetitions: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """Median and spread of every side's figures, and of the ratio of flexifed's rounds per minute to each program's.

    Args:
        repetitions: for each repetition, the figures of each side: `flexifed` and Flower's programs.
    """
    sides = repetitions[0].keys()
    described: dict[str, Any] = {
        side: {name: spread([figures[side][name] for figures in repetitions]) for name in repetitions[0][side]}
        for side in sides
    }
    described["ratio"] = {
        side: spread(
            [figures["flexifed"]["rounds_per_minute"] / figures[side]["rounds_per_minute"] for figures in repetitions]
        )
        for side in sides
        if side != "flexifed"
    }
    return described


def measure(job: Job, repeat: int, programs: Sequence[str], python: Path) -> dict[str, Any]:
    """Play the job on all sides in turn; returns the figures that are printed as JSON."""
    before = machine()
    repetitions = []
    differences = []
    for _ in range(repeat):
        rounds, wall_s = play_flexifed(job)
        figures = {"flexifed": describe_rounds(rounds, wall_s, job.cpus)}
        for program in programs:
            theirs, wall_s = play_flower(job, program, python)
            figures[program] = describe_rounds(theirs, wall_s, job.cpus // CPUS_PER_CLIENT[program])
            if program == "lean":
                differences.append(largest_difference(rounds, theirs))
        repetitions.append(figures)
    result = {
        "what": "the same rounds in flexifed and in Flower's simulation engine: rounds a minute, steady state",
        "machine": {"before": before, "after": machine()},
        "versions": {"flexifed": versions("flexifed", "ray", "torch", "numpy"), "flower": flower_versions(python)},
        "job": json.loads(job.to_json()) | {"data_source": job.info().source},
        **describe_repetitions(repetitions),
    }
    if differences:
        largest = {name: max(difference[name] for difference in differences) for name in differences[0]}
        result["same_numbers"] = {"equal": not any(largest.values()), "largest_difference": largest}
    return round_numbers(result)


def round_numbers(value: Any) -> Any:
    """Round all floats in nested dictionaries to four significant digits."""
    if isinstance(value, dict):
        return {name: round_numbers(entry) for name, entry in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) and math.isfinite(value) else value


def parse(arguments: Sequence[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--profile",
        choices=PROFILES,
        default=Job.profile,
        help="profile that decides shards, batches, steps and augmentation",
    )
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10, help="rounds of training; the first is not timed")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--width", type=float, default=Job.width, help="width of the VGGs")
    parser.add_argument("--local-epochs", type=int, default=Job.local_epochs)
    parser.add_argument("--max-train", type=int, help="most training samples of a client; default: its whole shard")
    parser.add_argument("--max-test", type=int, help="most test samples of a client; default: its whole shard")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--cpus",
        type=int,
        default=os.cpu_count(),
        help="number of clients that train at the same time; half of it in `defaults`",
    )
    parser.add_argument("--data-dir", help="folder with CIFAR-10; default: its synthetic stand-in")
    parser.add_argument(
        "--program",
        choices=CPUS_PER_CLIENT,
        action="append",
        help="program of Flower; default: all that have enough CPUs",
    )
    environment = parser.add_mutually_exclusive_group()
    environment.add_argument("--flower-python", type=Path, help="Python of an environment that has Flower")
    environment.add_argument(
        "--flower-env",
        type=Path,
        default=default_environment(),
        help="folder of Flower's environment, which is made if it is missing",
    )
    options = parser.parse_args(arguments)
    for name, least in (("rounds", 2), ("repeat", 1), ("cpus", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name} is {getattr(options, name)}; it must be at least {least}")
    options.program = options.program or [name for name, cpus in CPUS_PER_CLIENT.items() if cpus <= options.cpus]
    for program in options.program:
        if CPUS_PER_CLIENT[program] > options.cpus:
            parser.error(f"--cpus is {options.cpus}; {program} has {CPUS_PER_CLIENT[program]} for each client")
    return parser, options


def main() -> int:
    """Measure, and print the results."""
    parser, options = parse()
    try:
        settings = {field.name: getattr(options, field.name) for field in fields(Job)}
        data_dir = options.data_dir and str(Path(options.data_dir).expanduser().absolute())
        job = Job(**settings | {"data_dir": data_dir})
        job.config()
        job.info()
        python = options.flower_python or prepare_environment(options.flower_env.expanduser().absolute())
        flower_versions(python)
    except (FlexifedError, FlowerError) as error:
        parser.error(str(error))
    try:
        print(json.dumps(measure(job, options.repeat, options.program, python), indent=1))
    except FlowerError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1]


if __name__ == "__main__":
    sys.exit(main())
