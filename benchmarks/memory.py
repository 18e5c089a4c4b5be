"""Check that a long run does not grow: memory of each process, object store and seconds of a round, over many rounds.

    uv run --extra test python benchmarks/memory.py                  1,000 rounds of one cell, some minutes on 2 cores
    uv run --extra test python benchmarks/memory.py --rounds 200

Prints JSON. `uss_mib` is the memory that a process shares with no other process (USS, by psutil); `growth` compares the
last sample with the one at `--base-round`. The exit status is 1 if a process has grown by more than `--limit`, or the
object store by more than 1 MiB.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import psutil
from common import RoundObserver, machine, play_cell, versions

from flexifed.config import CellConfig, ModelConfig, PartitionConfig, PlacementOptions, TrainingConfig
from flexifed.data import find_dataset
from flexifed.orchestra.ledger import CellReport

MIB = 2**20
TITLES = {"ray::ClientActor": "client actor", "ray::ResourceTrainable": "driver", "ray::CellTrial": "driver"}


class Sampler(RoundObserver):
    """Records the time of every round, and samples the memory of all processes after some rounds."""

    def __init__(self, rounds: int, base_round: int) -> None:
        self.sampled_rounds = {base_round, rounds, *range(base_round, rounds, max(1, rounds // 20))}
        self.samples: list[dict[str, Any]] = []
        self.played_at: list[float] = []

    def reported(self, report: CellReport) -> None:
        """Record the time, and take a sample if one is due."""
        self.played_at.append(report.at)
        if report.round_index in self.sampled_rounds:
            self.samples.append({"round": report.round_index, "uss_mib": uss_by_process(), **object_store()})


def uss_by_process() -> dict[str, float]:
    """The USS, in MiB, of this process, of the driver and of each client actor."""
    uss_mib = {"command": psutil.Process().memory_full_info().uss / MIB}
    for process in psutil.Process().children(recursive=True):
        try:
            title = process.cmdline()[0].split(".")[0]
            if title in TITLES:
                uss_mib[f"{TITLES[title]} {process.pid}"] = process.memory_full_info().uss / MIB
        except (psutil.NoSuchProcess, IndexError):
            continue
    return {name: round(value, 2) for name, value in uss_mib.items()}


def object_store() -> dict[str, float]:
    """The contents of Ray's object store: MiB in use, objects, MiB spilled to disk."""
    import ray
    from ray._private import internal_api  # without a dashboard there is no public API for this

    state = internal_api.get_state_from_address(ray.get_runtime_context().gcs_address)
    stats = internal_api.get_memory_info_reply(state).store_stats
    return {
        "store_mib": round(stats.object_store_bytes_used / MIB, 2),
        "store_objects": stats.num_local_objects,
        "spilled_mib": round(stats.spilled_bytes_total / MIB, 2),
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run one small cell; returns the memory of its processes and the seconds of its rounds, as printed in JSON."""
    config = CellConfig(
        dataset="cifar10",
        family="vgg",
        scheme="max_common",
        model=ModelConfig(width=options.width),
        partition=PartitionConfig(num_clients=4, num_shards=options.num_shards, windows_per_shard=1),
        training=TrainingConfig(local_epochs=1),
    )
    info = find_dataset("cifar10", data="synthetic", data_dir=Path("data"))
    sampler = Sampler(options.rounds, options.base_round)
    rows = play_cell(config, info, options.rounds, sampler, options=PlacementOptions(clients_per_actor=2), num_cpus=2)
    base = next(sample for sample in sampler.samples if sample["round"] == options.base_round)
    last = sampler.samples[-1]
    growth = {name: last["uss_mib"][name] / before - 1 for name, before in base["uss_mib"].items()}
    between = [later - earlier for earlier, later in zip(sampler.played_at, sampler.played_at[1:], strict=False)]
    window = max(1, options.rounds // 10)
    round_s = rows[rows["client"] == 0].sort_values("round")["round_s"].tolist()[:-1]

    def early_and_late(seconds: list[float]) -> dict[str, float]:
        early = statistics.median(seconds[options.base_round : options.base_round + window])
        return {"early": round(early, 4), "late": round(statistics.median(seconds[-window:]), 4)}

    return {
        "machine": machine(),
        "versions": versions("flexifed", "torch", "ray", "pyarrow"),
        "cell": {"rounds": options.rounds, "clients": 4, "actors": 2, "width": options.width},
        "base_round": options.base_round,
        "growth": {name: round(value, 4) for name, value in growth.items()},
        "store_grown_mib": round(last["store_mib"] - base["store_mib"], 2),
        "median_round_s": early_and_late(round_s),
        "median_between_reports_s": early_and_late(between[:-1]),
        "samples": sampler.samples,
    }


def main() -> int:
    """Measure, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--base-round", type=int, default=100, help="the round that the last one is compared with")
    parser.add_argument(
        "--width", type=float, default=0.0625, help="width of the VGGs, whose tensors pass through the object store"
    )
    parser.add_argument("--num-shards", type=int, default=10_000, help="more shards mean fewer samples in a round")
    parser.add_argument("--limit", type=float, default=0.02, help="largest growth of a process that is allowed")
    options = parser.parse_args()
    if not 0 < options.base_round < options.rounds:
        parser.error("--base-round must lie between 0 and --rounds")
    measured = measure(options)
    print(json.dumps(measured, indent=1))
    grown = [name for name, value in measured["growth"].items() if name != "command" and value > options.limit]
    return int(bool(grown) or measured["store_grown_mib"] > 1)


if __name__ == "__main__":
    sys.exit(main())
