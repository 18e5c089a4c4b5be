"""How plan and aggregation grow with the number of clients, and against matching clients in pairs.

    uv run --extra test python benchmarks/aggregate.py            to 10,000 clients, about a minute on 2 cores

Clients hold the four VGGs in turn, thin, under Max-Common. Prints JSON:

    plan_s, aggregate_s     seconds for each number of clients, median of some; the states are the clients' own
    exponent                slope of log seconds over log clients, from --fit-from clients on; 1 is linear
    pairwise_plan_s         the same groups found by comparing each client with each other, as far as --pairwise clients
    speedup                 pairwise_plan_s / plan_s

Exit status 1 if an exponent is above --limit.
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
    """Max-Common's groups, client by client: for each layer of each, all others whose models agree up to it.

    Returns:
        (number of the layer, its clients), for all layers that at least two clients share.
    """
    groups = set()
    for mine in signatures:
        common = [_common_layers(mine, other) for other in signatures]
        for layer in range(len(mine.layers)):
            members = frozenset(client for client, count in enumerate(common) if count > layer)
            if len(members) > 1:
                groups.add((layer, members))
    return groups


def _common_layers(one: ModelSignature, other: ModelSignature) -> int:
    count = 0
    for mine, theirs in zip(one.layers, other.layers, strict=False):
        if mine != theirs:
            break
        count += 1
    return count


def timed(work: Callable[[], object], repeat: int) -> dict[str, float]:
    """Seconds of some calls; the first, which warms up, is left out."""
    seconds = []
    for _ in range(repeat + 1):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return spread(seconds[1:])


def exponent(counts: Sequence[int], seconds: Sequence[float]) -> float:
    """The power of the count that seconds grow with, fitted on a logarithmic scale."""
    return round(float(np.polyfit(np.log(counts), np.log(seconds), 1)[0]), 3)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Time each number of clients."""
    torch.set_num_threads(1)
    names = FAMILIES["vgg"]
    models = [build_model(name, num_classes=NUM_CLASSES, width=options.width) for name in names]
    kinds = [signature(model) for model in models]
    sizes: dict[str, dict[str, Any]] = {}
    for count in options.clients:
        signatures = [kinds[client % len(kinds)] for client in range(count)]
        plan = sharing_plan(signatures, "max_common")
        states = [
            {key: tensor.clone() for key, tensor in models[client % len(models)].state_dict().items()}
            for client in range(count)
        ]
        size: dict[str, Any] = {
            "plan_s": timed(partial(sharing_plan, signatures, "max_common"), options.repeat),
            "aggregate_s": timed(partial(aggregate, plan, states), options.repeat),
        }
        if count <= options.pairwise:
            size["pairwise_plan_s"] = timed(partial(pairwise_groups, signatures), options.repeat)
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
            what: exponent(fitted, [sizes[str(count)][what]["median"] for count in fitted])
            for what in ("plan_s", "aggregate_s")
        },
    }


def main() -> int:
    """Measure, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[8, 40, 200, 1000, 5000, 10_000])
    parser.add_argument("--pairwise", type=int, default=1000, help="compare in pairs up to so many clients")
    parser.add_argument("--width", type=float, default=0.03125)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--fit-from", type=int, default=200, help="fewer clients cost what a call costs")
    parser.add_argument("--limit", type=float, default=1.1, help="exponent that is still allowed")
    options = parser.parse_args()
    if sum(count >= options.fit_from for count in options.clients) < 2:
        parser.error("at least two of --clients must reach --fit-from, or there is no slope")
    measured = measure(options)
    print(json.dumps(measured, indent=1))
    return int(max(measured["exponent"].values()) > options.limit)


if __name__ == "__main__":
    sys.exit(main())
