"""Time the sharing plan and the aggregation as the number of clients grows, and compare with pairwise matching.

    uv run --extra test python benchmarks/aggregate.py            up to 10,000 clients, about a minute on 2 cores

The clients have thin versions of the four VGGs in turn; the scheme is Max-Common. Prints JSON:

    plan_s, aggregate_s     seconds for each number of clients, median and spread; each client has a state of its own
    exponent                slope of log seconds over log clients, from --fit-from clients upwards; 1 is linear
    pairwise_plan_s         seconds to find the same groups by comparing every client with every other, up to --pairwise
                            clients
    speedup                 pairwise_plan_s / plan_s

The exit status is 1 if an exponent exceeds --limit.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from common import machine, spread, versions

from flexifed import aggregate, build_model, sharing_plan
from flexifed.config import FAMILIES
from flexifed.core.signature import ModelSignature, signature

NUM_CLASSES = 10


def pairwise_groups(signatures: Sequence[ModelSignature]) -> set[tuple[int, frozenset[int]]]:
    """Find Max-Common's groups pairwise: for each layer of each client, all clients whose models agree up to it.

    Returns:
        (layer index, clients) for each group of at least two clients.
    """
    groups = set()
    for model in signatures:
        common = [_num_common_layers(model, other) for other in signatures]
        for layer in range(len(model.layers)):
            members = frozenset(client for client, count in enumerate(common) if count > layer)
            if len(members) > 1:
                groups.add((layer, members))
    return groups


def _num_common_layers(first: ModelSignature, second: ModelSignature) -> int:
    count = 0
    for layer, other in zip(first.layers, second.layers, strict=False):
        if layer != other:
            break
        count += 1
    return count


def time_calls(function: Callable[[], object], repeat: int) -> dict[str, float]:
    """Time `repeat` calls, after one that warms up; returns median and spread of their seconds."""
    seconds = []
    for _ in range(repeat + 1):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return spread(seconds[1:])


def exponent(counts: Sequence[int], seconds: Sequence[float]) -> float:
    """Fit seconds ~ count ** exponent on a logarithmic scale."""
    return round(float(np.polyfit(np.log(counts), np.log(seconds), 1)[0]), 3)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Time the plan and the aggregation for each number of clients."""
    torch.set_num_threads(1)
    names = FAMILIES["vgg"]
    models = [build_model(name, num_classes=NUM_CLASSES, width=options.width) for name in names]
    distinct = [signature(model) for model in models]
    sizes: dict[str, dict[str, Any]] = {}
    for count in options.clients:
        signatures = [distinct[client % len(distinct)] for client in range(count)]
        plan = sharing_plan(signatures, "max_common")
        states = [
            {key: tensor.clone() for key, tensor in models[client % len(models)].state_dict().items()}
            for client in range(count)
        ]
        size: dict[str, Any] = {
            "plan_s": time_calls(partial(sharing_plan, signatures, "max_common"), options.repeat),
            "aggregate_s": time_calls(partial(aggregate, plan, states), options.repeat),
        }
        if count <= options.pairwise:
            size["pairwise_plan_s"] = time_calls(partial(pairwise_groups, signatures), options.repeat)
            size["speedup"] = round(size["pairwise_plan_s"]["median"] / size["plan_s"]["median"], 1)
        sizes[str(count)] = size
        print(f"{count} clients: {json.dumps(size)}", file=sys.stderr)
    fitted = [count for count in options.clients if count >= options.fit_from]
    return {
        "machine": machine(),
        "versions": versions("flexifed", "torch", "numpy"),
        "models": {"names": names, "width": options.width, "scheme": "max_common"},
        "clients": sizes,
        "exponent": {
            step: exponent(fitted, [sizes[str(count)][step]["median"] for count in fitted])
            for step in ("plan_s", "aggregate_s")
        },
    }


def main() -> int:
    """Measure, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[8, 40, 200, 1000, 5000, 10_000])
    parser.add_argument(
        "--pairwise", type=int, default=1000, help="match clients pairwise up to this number of clients"
    )
    parser.add_argument("--width", type=float, default=0.03125)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument(
        "--fit-from",
        type=int,
        default=200,
        help="fit the exponent from this number of clients upwards; below it, the fixed cost of a call dominates",
    )
    parser.add_argument("--limit", type=float, default=1.1, help="exponent that is still allowed")
    options = parser.parse_args()
    if sum(count >= options.fit_from for count in options.clients) < 2:
        parser.error("at least two of --clients must reach --fit-from, or there is no slope")
    measured = measure(options)
    print(json.dumps(measured, indent=1))
    return int(max(measured["exponent"].values()) > options.limit)


if __name__ == "__main__":
    sys.exit(main())
