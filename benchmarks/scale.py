"""Measure the seconds and the memory that a client costs, and the memory of the driver, for 8 to 1,000 clients.

    uv run --extra test python benchmarks/scale.py                           some minutes and 10 GB on 2 cores
    uv run --extra test python benchmarks/scale.py --clients 8 40

The clients have thin versions of the four VGGs in turn, each with synthetic images of its own; the scheme is
Max-Common. Prints JSON, for each number of clients:

    round_s, s_per_client       seconds of a round; the same divided by the number of clients
    clients_mib, mib_per_client peak memory of all client actors that they share with no other process (USS); the same
                                divided by the number of clients
    driver_mib, command_mib     peak USS of the driver and of this process
    store_mib                   peak use of Ray's shared memory at the end of a round

and `driver_growth`, the driver's memory with the most clients relative to that with the fewest, minus one. The exit
status is 1 if it exceeds --limit.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from common import RoundObserver, machine, play_cell, spread, versions
from memory import object_store, uss_by_process

from flexifed.config import CellConfig, ModelConfig, PartitionConfig, SharingConfig, TrainingConfig
from flexifed.data import find_dataset
from flexifed.orchestra.ledger import CellReport

NUM_BLOCKS = 8
"""Each process sums blocks of consecutive clients, so that the driver gets this many sums for any number of clients."""


class Sampler(RoundObserver):
    """Samples the memory of all processes after every round."""

    def __init__(self) -> None:
        self.memory: list[dict[str, float]] = []

    def reported(self, report: CellReport) -> None:
        """Add up the memory, in MiB, of the processes of each kind."""
        mib_by_kind = {"client actor": 0.0, "driver": 0.0, "command": 0.0, "store": object_store()["store_mib"]}
        for name, mib in uss_by_process().items():
            mib_by_kind[name.rstrip(" 0123456789")] += mib
        self.memory.append(mib_by_kind)


def measure_cell(num_clients: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run one cell with this number of clients."""
    config = CellConfig(
        dataset="cifar10",
        family="vgg",
        scheme="max_common",
        model=ModelConfig(width=options.width),
        partition=PartitionConfig(
            num_clients=num_clients,
            num_shards=max(num_clients, options.num_shards),
            windows_per_shard=1,
            max_train=options.images,
            max_test=options.images,
        ),
        training=TrainingConfig(local_epochs=1),
        sharing=SharingConfig(reduce_block=-(-num_clients // NUM_BLOCKS)),
    )
    info = find_dataset("cifar10", data="synthetic", data_dir=Path("data"))
    sampler = Sampler()
    rows = play_cell(config, info, options.rounds, sampler, keep_final=False)
    round_s = rows[rows["client"] == 0].sort_values("round")["round_s"].tolist()[1:-1]
    peak = {kind: round(max(sample[kind] for sample in sampler.memory), 1) for kind in sampler.memory[0]}
    return {
        "round_s": spread(round_s),
        "s_per_client": spread([seconds / num_clients for seconds in round_s]),
        "clients_mib": peak["client actor"],
        "mib_per_client": round(peak["client actor"] / num_clients, 2),
        "driver_mib": peak["driver"],
        "command_mib": peak["command"],
        "store_mib": peak["store"],
    }


def main() -> int:
    """Measure, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[8, 40, 200, 1000])
    parser.add_argument(
        "--rounds", type=int, default=4, help="rounds of training; the first, which warms up, does not count"
    )
    parser.add_argument("--width", type=float, default=0.125)
    parser.add_argument(
        "--images", type=int, default=10, help="images that a client trains on, and images that it is scored on"
    )
    parser.add_argument("--num-shards", type=int, default=1000)
    parser.add_argument("--limit", type=float, default=0.25, help="largest growth of the driver that is allowed")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds must be at least 2, as the first does not count")
    sizes: dict[str, dict[str, Any]] = {}
    for num_clients in sorted(options.clients):
        sizes[str(num_clients)] = measure_cell(num_clients, options)
        print(f"{num_clients} clients: {json.dumps(sizes[str(num_clients)])}", file=sys.stderr)
    fewest_mib, most_mib = (sizes[str(extreme(options.clients))]["driver_mib"] for extreme in (min, max))
    print(
        json.dumps(
            {
                "machine": machine(),
                "versions": versions("flexifed", "torch", "ray", "pyarrow"),
                "cell": {
                    "width": options.width,
                    "images": options.images,
                    "blocks": NUM_BLOCKS,
                    "scheme": "max_common",
                },
                "clients": sizes,
                "driver_growth": round(most_mib / fewest_mib - 1, 3),
            },
            indent=1,
        )
    )
    return int(most_mib / fewest_mib - 1 > options.limit)


if __name__ == "__main__":
    sys.exit(main())
