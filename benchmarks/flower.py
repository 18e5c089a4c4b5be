"""The same job in Flower's simulation engine and in flexifed, timed in turn: rounds a minute of both.

    uv run --extra test python benchmarks/flower.py                        thin VGGs, 8 clients, synthetic CIFAR-10
    uv run --extra test python benchmarks/flower.py --data-dir data        the same on CIFAR-10
    uv run --extra test python benchmarks/flower.py --profile thin         whole shards in every round, unvaried

The cell is the one that `round.py --local-epochs 1` plays, but for its width and its scheme: the published protocol
with one local epoch instead of ten.

Same models, data, shards, local steps, seeds and scoring, FedAvg within each architecture (`flower_job.py`). Flower
plays it three times (`flower_app.py`): `defaults`, as its tutorials are written and with its own default of two CPUs a
client; `tutorial`, with as many clients at a time as flexifed, one thread each; and `lean`, which is that with
flexifed's own functions for batches, steps and scoring, so that what differs is the engine alone.

Flower pins another Ray, so it has an environment of its own, which uv makes at the first call (minutes and gigabytes).

Prints JSON. A repetition is a fresh process for each side, one after another. Rounds a minute are of the steady state,
from the end of the first round to the end of the last; `wall_s` is the whole process, start-up included.
`outside_s` is what a round takes beyond an even share of training and scoring for each client at a time: the engine,
and CPUs that wait for others; `outside_share` is its part of the round. `same_numbers` says how far the lean program's
scores are from flexifed's, over all clients and rounds: nothing, where both did the same work and means are exact, as
those of two clients are. The other programs draw other batches: their scores are only alike.
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
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common import RoundObserver, machine, spread, versions
from flower_job import CPUS_PER_CLIENT, Job

from flexifed.errors import FlexifedError
from flexifed.profiles import PROFILES

FLOWER = "1.41.0"
TIMEOUT_S = 3600.0
APP = Path(__file__).with_name("flower_app.py")

Rounds = list[dict[str, Any]]
"""Of each round when it `ended` (seconds of one clock), `accuracies` and `losses` by client, and `computing_s`: seconds
of training and scoring, over all clients."""


class FlowerError(Exception):
    """Flower's side can't be run."""


def default_environment() -> Path:
    """Where Flower's environment is kept between calls."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flexifed" / "flower-env"


def requirements() -> list[str]:
    """What Flower's environment holds: Flower, and what flexifed's models and data need, in the versions used here."""
    here = {name: version(name).split("+")[0] for name in ("torch", "torchvision", "safetensors")}
    return [f"flwr[simulation]=={FLOWER}", *(f"{name}=={number}" for name, number in here.items())]


def made_environment(folder: Path) -> Path:
    """The interpreter of Flower's environment, which is made if it is missing or holds other versions.

    Raises:
        FlowerError: the folder holds something else, there is no uv, or it fails.
    """
    python = folder / "bin" / "python"
    wanted = "\n".join(requirements())
    made = folder / "flexifed-requirements.txt"
    if python.exists() and made.is_file() and made.read_text() == wanted:
        return python
    if folder.exists() and not (folder / "pyvenv.cfg").is_file() and any(folder.iterdir()):
        raise FlowerError(f"{folder} holds something else than an environment; name another folder by --flower-env")
    uv = shutil.which("uv")
    if uv is None:
        raise FlowerError(
            "Flower needs an environment of its own, and uv, which would make it, is not installed: install uv, or "
            f"name the Python of an environment with {', '.join(requirements())} by --flower-python"
        )
    print(f"making an environment for Flower in {folder}", file=sys.stderr)
    for line in (
        [uv, "venv", "--clear", "--python", sys.executable, str(folder)],
        [uv, "pip", "install", "--python", str(python), *requirements()],
    ):
        done = subprocess.run(line, stdout=sys.stderr, check=False)
        if done.returncode:
            raise FlowerError(f"`{' '.join(line)}` failed with status {done.returncode}")
    made.write_text(wanted)
    return python


def flower_versions(python: Path) -> dict[str, str]:
    """The versions in Flower's environment.

    Raises:
        FlowerError: it is no Python with Flower.
    """
    program = "import json; from common import versions; print(json.dumps(versions('flwr', 'ray', 'torch', 'numpy')))"
    try:
        done = subprocess.run(
            [str(python), "-c", program], cwd=APP.parent, capture_output=True, text=True, check=False, timeout=60
        )
    except OSError as error:
        raise FlowerError(f"can't run {python}: {error.strerror}") from error
    if done.returncode:
        raise FlowerError(f"{python} has no Flower with its simulation engine: {_last_line(done.stderr)}")
    return dict(json.loads(done.stdout))


def play_flower(job: Job, program: str, python: Path) -> tuple[Rounds, float]:
    """Let Flower play the job in a process of its own; returns its rounds, and the seconds of the whole process.

    Raises:
        FlowerError: it fails.
    """
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
        "PYTHONPATH": str(APP.parents[1]),
        "OMP_NUM_THREADS": str(CPUS_PER_CLIENT[program]),
        "FLWR_TELEMETRY_ENABLED": "0",  # nothing of a benchmark goes anywhere
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }
    started = time.perf_counter()
    line = [str(python), str(APP), job.to_json(), program]
    try:
        done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise FlowerError(f"Flower's side was not done after {TIMEOUT_S:g} s") from error
    wall_s = time.perf_counter() - started
    if done.returncode:
        raise FlowerError(f"Flower's side failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1]), wall_s


def play_flexifed(job: Job) -> tuple[Rounds, float]:
    """Play the job in a fresh process; returns its rounds, and the seconds of the whole process."""
    started = time.perf_counter()
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as processes:
        rounds = processes.submit(_play_cell, job).result()
    return rounds, time.perf_counter() - started


def _play_cell(job: Job) -> Rounds:
    """Play the job as the command does: as a grid of one cell, with its files."""
    from flexifed.cells.run import CellRun
    from flexifed.orchestra import cluster
    from flexifed.orchestra.placement import PlacementOptions, place_cell
    from flexifed.orchestra.sweep import run_grid
    from flexifed.orchestra.trial import PlacedRun
    from flexifed.results.store import ResultsFolder

    config, info = job.config(), job.info()
    clock = Clock()
    with tempfile.TemporaryDirectory(prefix="flexifed-flower-") as folder:
        run = CellRun(config=config, info=info, profile=job.profile, rounds=job.rounds, results=Path(folder))
        results = ResultsFolder(run.results)
        results.prepare()
        with cluster.connected(None, num_cpus=job.cpus, num_gpus=0):
            options = PlacementOptions()
            placed = PlacedRun(run, place_cell(config, options, cluster.nodes()))
            failures = run_grid([placed], clock, place=lambda run, nodes: place_cell(run.config, options, nodes))
        if failures:
            raise FlowerError(f"flexifed's side failed: {failures}")
        rows = results.read([run.name], ["round", "client", "accuracy", "loss", "train_s", "eval_s"])
    return rounds_of_rows(rows.to_dict("records"), clock.ended)


class Clock(RoundObserver):
    """Notes the time of every round."""

    def __init__(self) -> None:
        self.ended: list[float] = []

    def reported(self, report: Any) -> None:
        """Note the time."""
        self.ended.append(time.perf_counter())


def rounds_of_rows(rows: Sequence[Mapping[Any, Any]], ended: Sequence[float]) -> Rounds:
    """What flexifed wrote of a cell, as rounds of training that are scored after the aggregation.

    Its own rounds are scored at their start, so the scores of round r are those of round r + 1 there; what it scored
    before the first training, Flower does not.

    Args:
        rows: of the results.
        ended: when each of its rounds was heard of; the last one only scores.
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


def measured(rounds: Rounds, wall_s: float, at_a_time: int) -> dict[str, float]:
    """The figures of one side in one repetition, which trains so many clients at a time."""
    steady_s = rounds[-1]["ended"] - rounds[0]["ended"]
    computing_s = sum(one["computing_s"] for one in rounds[1:])
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
    """The largest difference of any client's scores in any round."""
    return {
        name: max(
            abs(mine - other)
            for one, another in zip(ours, theirs, strict=True)
            for mine, other in zip(one[name], another[name], strict=True)
        )
        for name in ("accuracies", "losses")
    }


def summary(repetitions: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """Medians and spreads of every side's figures, and of flexifed's rounds a minute over the other's.

    Args:
        repetitions: for each, by side (`flexifed`, and Flower's programs), its figures.
    """
    sides = repetitions[0].keys()
    described: dict[str, Any] = {
        side: {name: spread([one[side][name] for one in repetitions]) for name in repetitions[0][side]}
        for side in sides
    }
    described["ratio"] = {
        side: spread([one["flexifed"]["rounds_per_minute"] / one[side]["rounds_per_minute"] for one in repetitions])
        for side in sides
        if side != "flexifed"
    }
    return described


def measure(job: Job, repeat: int, programs: Sequence[str], python: Path) -> dict[str, Any]:
    """Play the job on all sides, in turn."""
    before = machine()
    repetitions = []
    differences = []
    for _ in range(repeat):
        rounds, wall_s = play_flexifed(job)
        figures = {"flexifed": measured(rounds, wall_s, job.cpus)}
        for program in programs:
            theirs, wall_s = play_flower(job, program, python)
            figures[program] = measured(theirs, wall_s, job.cpus // CPUS_PER_CLIENT[program])
            if program == "lean":
                differences.append(largest_difference(rounds, theirs))
        repetitions.append(figures)
    result = {
        "what": "the same rounds in flexifed and in Flower's simulation engine: rounds a minute, steady state",
        "machine": {"before": before, "after": machine()},
        "versions": {"flexifed": versions("flexifed", "ray", "torch", "numpy"), "flower": flower_versions(python)},
        "job": json.loads(job.to_json()) | {"data_source": job.info().source},
        **summary(repetitions),
    }
    if differences:
        largest = {name: max(one[name] for one in differences) for name in differences[0]}
        result["same_numbers"] = {"equal": not any(largest.values()), "largest_difference": largest}
    return rounded(result)


def rounded(value: Any) -> Any:
    """The same with four significant digits."""
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) and math.isfinite(value) else value


def parse(arguments: Sequence[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--profile", choices=PROFILES, default=Job.profile, help="of shards, batches, steps and augmentation"
    )
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10, help="the first is not timed")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--width", type=float, default=Job.width, help="of the VGGs")
    parser.add_argument("--local-epochs", type=int, default=Job.local_epochs)
    parser.add_argument("--max-train", type=int, help="training samples of a client; default: its whole shard")
    parser.add_argument("--max-test", type=int, help="test samples of a client; default: its whole shard")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--cpus", type=int, default=os.cpu_count(), help="so many clients train at a time; in `defaults` half as many"
    )
    parser.add_argument("--data-dir", help="a folder with CIFAR-10; default: its synthetic stand-in")
    parser.add_argument(
        "--program", choices=CPUS_PER_CLIENT, action="append", help="of Flower; default: all with enough CPUs"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--flower-python", type=Path, help="the Python of an environment that has Flower")
    where.add_argument("--flower-env", type=Path, default=default_environment(), help="made if it is missing")
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
    """Measure, and print it."""
    parser, options = parse()
    try:
        told = {field.name: getattr(options, field.name) for field in fields(Job)}
        data_dir = options.data_dir and str(Path(options.data_dir).expanduser().absolute())
        job = Job(**told | {"data_dir": data_dir})
        job.config()
        job.info()
        python = options.flower_python or made_environment(options.flower_env.expanduser().absolute())
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
