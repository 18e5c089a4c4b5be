"""Time rounds that run in Ray actors against a plain sequential loop on the same data and device.

    uv run --extra test python benchmarks/round.py --local-epochs 1      some minutes on 2 cores
    uv run --extra test python benchmarks/round.py --device cuda         the published protocol on a GPU
    ... --device cuda --cuda-graph --streams 8                           the same in one actor, with overlapping clients

Rounds of flexifed and of the baseline, `benchmarks/sequential.py`, alternate within one run. The first round of each
warms up and does not count; on a GPU the first two, since in the second one PyTorch asks again for memory that it gave
back after recording CUDA graphs. Checkpoints are left out: they are written at intervals of time and take less than 3 %
of a run, but with rounds of the baseline in between, every round would write one.
Prints JSON:

    round_s, baseline_s     seconds of a round of flexifed and of the baseline, with scoring and averaging
    ratio                   baseline_s / round_s, round by round
    train_s, eval_s         seconds in which at least one client of the busiest process trains, or is scored
    overhead                share of a round in which the busiest process neither trains nor scores
    peak_rate               FLOP/s of a large matrix product on all cores, or on the GPU, measured in the same run
    share_of_peak           share of peak_rate that training reaches: by model, and over all; by model only where
                            the clients of a process take turns
    undisturbed             on a GPU, rounds of flexifed alone, without the baseline in between: round_s; utilization,
                            the percentage of time in which a kernel of any process ran, as the GPU's driver samples it;
                            memory_mib, in use by all processes
    in_one_process          on a GPU, a round with all clients in one process, under PyTorch's profiler: device_busy,
                            the share of the round in which the GPU executed anything; operations; seen_until, the share
                            of the round after which the profiler saw nothing; device_memory_mib, the most memory that
                            PyTorch reserved; or error, the reason why they are missing
    peak_memory_mib         of each client actor, and of this process, which runs the driver and the baseline
    device_memory_mib       GPU memory in use by all processes after the last round, with what PyTorch has reserved in
                            client actors
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import psutil
import ray
import torch
from busy import utilization, work_of
from common import machine, spread, versions
from peak import peak_rate, share_of_peak
from profiled import profile_in_one_process
from sequential import SequentialLoop

from flexifed.cells.run import CellRun
from flexifed.cells.session import CellSession, open_log
from flexifed.config import SCHEMES, CellConfig, ModelConfig, NumericsConfig, PlacementOptions, Precision
from flexifed.data import find_dataset, open_dataset
from flexifed.federation.cell import make_shards
from flexifed.federation.rounds import RoundResult
from flexifed.orchestra import cluster
from flexifed.orchestra.actors import ActorHosts
from flexifed.orchestra.lending import collect
from flexifed.orchestra.placement import CellPlacement, place_cell
from flexifed.profiles import PROFILES
from flexifed.results.store import ResultsFolder
from flexifed.training.numerics import device_name

MIB = 2**20
WARM_UP_ROUNDS = {"cpu": 1, "cuda": 2}


def peak_memory() -> dict[str, float]:
    """The peak resident memory, in MiB, of this process and of each client actor, including shared memory."""
    peak_mib = {"this process": _high_water(psutil.Process())}
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[0].startswith("ray::ClientActor"):
                peak_mib[f"client actor {process.pid}"] = _high_water(process)
        except (psutil.NoSuchProcess, IndexError):
            continue
    return peak_mib


def _high_water(process: psutil.Process) -> float:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024)


@dataclass(frozen=True)
class Measurements:
    """What was measured in alternating rounds of flexifed and of the baseline.

    Attributes:
        exchange: how flexifed's processes exchange tensors.
        results: the results of flexifed's rounds, with what its clients measured.
        round_s: seconds of each round of flexifed.
        baseline_s: seconds of each round of the baseline.
        undisturbed: figures of flexifed's rounds without the baseline, on a GPU; None on a CPU.
        peak_memory_mib: peak memory of each process.
        device_memory_mib: GPU memory in use after the last round; None on a CPU.
    """

    exchange: str
    results: Sequence[RoundResult]
    round_s: Sequence[float]
    baseline_s: Sequence[float]
    undisturbed: dict[str, object] | None
    peak_memory_mib: dict[str, float]
    device_memory_mib: int | None


def play_alternately(run: CellRun, placement: CellPlacement, repeat: int, undisturbed: int) -> Measurements:
    """Alternate rounds of flexifed and of the baseline, first some that do not count; then play flexifed's alone."""
    shards = make_shards(run.config, run.info)
    baseline = SequentialLoop(run.config, open_dataset(run.info), shards)
    group = ray.util.placement_group([bundle for bundle in placement.bundles if bundle])
    ray.get(group.ready())
    hosts = ActorHosts(group)
    log = open_log(run, str(placement))
    hosts.begin(run.config, run.info, placement, shards)
    session = CellSession(run, str(placement), hosts, shards, log)
    warm_up = WARM_UP_ROUNDS[run.config.device]
    results, round_s, baseline_s = [], [], []
    for index in range(warm_up + repeat):
        started = time.perf_counter()
        results.append(session.play_round())
        between = time.perf_counter()
        baseline.play_round(index)
        finished = time.perf_counter()
        round_s.append(between - started)
        baseline_s.append(finished - between)
        print(f"round {index}: {round_s[-1]:.2f} s, baseline {baseline_s[-1]:.2f} s", file=sys.stderr)
    device = torch.device(run.config.device)
    collect()  # what the baseline has left on the GPU
    alone = play_undisturbed(session, device, undisturbed) if undisturbed else None
    memory = peak_memory(), device_memory_mib(device)
    log.close()
    hosts.shut_down()
    return Measurements(hosts.exchange, results[warm_up:], round_s[warm_up:], baseline_s[warm_up:], alone, *memory)


def play_undisturbed(session: CellSession, device: torch.device, rounds: int) -> dict[str, object]:
    """Play rounds of flexifed alone, and sample how busy the GPU is meanwhile.

    A sample covers up to a second before it is taken, so sampling starts after a quarter of the rounds.
    """
    for _ in range(rounds // 4):
        session.play_round()
    round_s = []
    with utilization(device) as samples:
        for _ in range(rounds - rounds // 4):
            started = time.perf_counter()
            session.play_round()
            round_s.append(time.perf_counter() - started)
    print(f"undisturbed: {statistics.median(round_s):.3f} s a round", file=sys.stderr)
    return {"round_s": spread(round_s), **samples}


def device_memory_mib(device: torch.device) -> int | None:
    """The GPU memory that is in use by all processes together; None on a CPU."""
    if device.type == "cpu":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return round((total - free) / MIB)


def cell_of(options: argparse.Namespace) -> CellConfig:
    """The cell to measure: the published protocol, with the changes from the command line."""
    authors = PROFILES["authors"]
    return CellConfig(
        dataset="cifar10",
        family=options.family,
        scheme=options.scheme,
        device=options.device,
        model=ModelConfig(width=options.width),
        partition=replace(authors.partition, num_shards=options.num_shards),
        training=replace(authors.training, local_epochs=options.local_epochs),
        numerics=NumericsConfig(
            precision=options.precision,
            fused=options.fused or None,
            cuda_graph=options.cuda_graph,
            channels_last=options.channels_last,
            winograd=options.winograd,
        ),
    )


def measure(options: argparse.Namespace, results: Path) -> dict[str, Any]:
    """Alternate rounds of flexifed and of the baseline; returns the figures that are printed as JSON."""
    before = machine()
    packages = versions("flexifed", "torch", "torchvision", "ray", "numpy")
    undisturbed = options.undisturbed if options.device == "cuda" else 0
    run = make_run(options, results, WARM_UP_ROUNDS[options.device] + options.repeat + undisturbed)
    device = torch.device(options.device)
    with cluster.connected(None):
        nodes = cluster.nodes()
        placement = place_cell(run.config, PlacementOptions(streams=options.streams, cuda_ipc=options.cuda_ipc), nodes)
        rate = peak_rate(device, int(sum(node["CPU"] for node in nodes)))
        measured = play_alternately(run, placement, options.repeat, undisturbed)
    samples = samples_per_epoch(run)
    return {
        "machine": before,
        "device": device_name(device),
        "versions": packages,
        "cell": describe_cell(run, options, samples[0], placement, measured.exchange),
        **describe_seconds(measured),
        "peak_rate": rate,
        "share_of_peak": share_of_peak(
            run.config,
            run.info.num_classes,
            samples,
            measured.results,
            rate,
            len(placement.clients) if placement.streams == 1 else None,
        ),
        "undisturbed": measured.undisturbed,
        "in_one_process": (
            profile_in_one_process(run.config, run.info, options.streams, WARM_UP_ROUNDS["cuda"])
            if device.type == "cuda"
            else None
        ),
        "peak_memory_mib": measured.peak_memory_mib,
        "device_memory_mib": measured.device_memory_mib,
    }


def make_run(options: argparse.Namespace, results: Path, rounds: int) -> CellRun:
    """Make the run of the cell, which writes no checkpoint, and prepare its results folder."""
    info = find_dataset(
        "cifar10", data="real" if options.data_dir else "synthetic", data_dir=options.data_dir or Path("data")
    )
    ResultsFolder(results).prepare()
    return CellRun(
        config=cell_of(options),
        info=info,
        profile="benchmark",
        rounds=rounds,
        results=results,
        keep_final=False,
        checkpoint_every=rounds + 1,
    )


def samples_per_epoch(run: CellRun) -> list[int]:
    """The number of samples that each client trains on in an epoch."""
    windows = run.config.partition.windows_per_shard
    return [len(shards.train) // windows for shards in make_shards(run.config, run.info)]


def describe_cell(
    run: CellRun, options: argparse.Namespace, images_per_epoch: int, placement: CellPlacement, exchange: str
) -> dict[str, object]:
    """Describe the cell for the JSON: its settings, its data and where its clients run."""
    return {
        "family": options.family,
        "scheme": options.scheme,
        "width": options.width,
        "data": f"{run.info.name}, {run.info.source}",
        "clients": run.config.partition.num_clients,
        "images_in_an_epoch": images_per_epoch,
        "local_epochs": options.local_epochs,
        "precision": options.precision,
        "fused": options.fused,
        "cuda_graph": options.cuda_graph,
        "channels_last": options.channels_last,
        "winograd": options.winograd,
        "placement": str(placement),
        "exchange": exchange,
    }


def describe_seconds(measured: Measurements) -> dict[str, dict[str, float]]:
    """Describe the seconds of rounds and of their parts for the JSON: median and spread over the rounds."""
    pairs = zip(measured.round_s, measured.baseline_s, strict=True)
    busiest = [max(work_of(result).values(), key=lambda work: work.either_s) for result in measured.results]
    return {
        "round_s": spread(measured.round_s),
        "baseline_s": spread(measured.baseline_s),
        "ratio": spread([baseline_s / round_s for round_s, baseline_s in pairs]),
        "train_s": spread([work.train_s for work in busiest]),
        "eval_s": spread([work.eval_s for work in busiest]),
        "aggregate_s": spread([result.aggregate_s for result in measured.results]),
        "overhead": spread(
            [1 - work.either_s / round_s for work, round_s in zip(busiest, measured.round_s, strict=True)]
        ),
    }


def main() -> None:
    """Measure, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local-epochs", type=int, default=10, help="10 in the published program; 1 is enough on CPUs")
    parser.add_argument("--repeat", type=int, default=3, help="rounds of flexifed, and of the baseline, that count")
    parser.add_argument("--undisturbed", type=int, default=20, help="rounds of flexifed alone, on a GPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--streams", type=int, default=1, help="clients of an actor that overlap on a GPU")
    parser.add_argument(
        "--cuda-ipc",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="pass tensors between actors on one GPU without leaving it",
    )
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument(
        "--precision", choices=get_args(Precision), help="precision of flexifed; default: PyTorch's own"
    )
    parser.add_argument(
        "--fused", action="store_true", help="let flexifed take optimizer steps in one pass, on CPUs too"
    )
    parser.add_argument(
        "--cuda-graph", action="store_true", help="let flexifed record training steps as CUDA graphs and replay them"
    )
    parser.add_argument(
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="memory format of flexifed's images and weights",
    )
    parser.add_argument(
        "--winograd",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let flexifed compute wide convolutions by Winograd's algorithm, on CPUs in float32",
    )
    parser.add_argument("--scheme", choices=SCHEMES, default="max_common")
    parser.add_argument("--family", choices=("vgg", "vgg_plain", "resnet"), default="vgg")
    parser.add_argument("--num-shards", type=int, default=20, help="more shards mean fewer images for each client")
    parser.add_argument(
        "--data-dir", type=Path, help="folder with CIFAR-10; default: synthetic images of the same size"
    )
    with tempfile.TemporaryDirectory(prefix="flexifed-round-") as folder:
        measured = measure(parser.parse_args(), Path(folder))
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
