"""Estimate how long a grid takes here, from a few steps timed in this process. Starts no other process."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from heapq import heapreplace

import numpy as np
import torch

from flexifed.cells.run import CellRun
from flexifed.config import CellConfig, ModelConfig
from flexifed.data import DatasetInfo, make_pipeline, open_dataset
from flexifed.data.partition import window_length
from flexifed.federation.cell import make_workspace, participants, shard_sizes
from flexifed.orchestra.cluster import usable_cpus, usable_gpus
from flexifed.orchestra.placement import CellPlacement, Resources, how_many_fit
from flexifed.seeding import torch_generator
from flexifed.training.evaluate import evaluate
from flexifed.training.local import train
from flexifed.training.numerics import numeric_settings
from flexifed.training.streams import run_to_end

START_S = 15.0  # of Ray, and of the first processes that import torch; measured on 2 cores
_MOST_SAMPLES = 64
"""Of a timed step: at most a batch, because samples of small batches take longer, and no more than needed."""
_STEPS_ON_A_GPU = 8
"""How many steps are timed together, because a GPU is idle when the first ones reach it."""


def this_machine() -> Resources:
    """The resources of a Ray that is started on this machine."""
    return {"CPU": float(usable_cpus()), "GPU": float(usable_gpus())}


def concurrent_cells(placement: CellPlacement, nodes: Sequence[Resources]) -> int:
    """How many cells the nodes hold at a time, at least 1."""
    actors = len(placement.clients)
    needed = {"CPU": placement.cpus_per_actor * actors, "GPU": placement.gpus_per_actor * actors}
    return max(1, min(how_many_fit(amount, _total(nodes, kind)) for kind, amount in needed.items() if amount))


def grid_seconds(runs: Sequence[CellRun], placement: CellPlacement, nodes: Sequence[Resources], at_once: int) -> float:
    """Estimate how long the remaining rounds of cells take.

    Args:
        runs: the cells, all on the same kind of device.
        placement: of each.
        nodes: that compute.
        at_once: how many of the cells run at the same time.
    """
    if not runs:
        return 0.0
    config = runs[0].config
    workers = _total(nodes, "GPU") if config.device == "cuda" else _total(nodes, "CPU") / config.numerics.threads
    times = [cell_times(run, placement.clients) for run in runs]
    # Neither bound can be beaten: a round lasts as long as its busiest process, and devices do one thing at a time.
    in_turn_s = _seconds_in_turn([cell.busiest_s for cell in times], at_once)
    return max(in_turn_s, sum(cell.work_s for cell in times) / max(1.0, workers))


def _seconds_in_turn(cells_s: Sequence[float], at_once: int) -> float:
    """How long cells take if the next one begins whenever one of the `at_once` that are running has ended."""
    ends = [0.0] * at_once  # a heap
    for seconds in cells_s:
        heapreplace(ends, ends[0] + seconds)
    return max(ends)


@dataclass(frozen=True)
class CellTimes:
    """How long the remaining rounds of a cell take.

    Attributes:
        busiest_s: seconds if each process has a device to itself; in each round, those of the busiest.
        work_s: seconds if all processes take turns on one device.
    """

    busiest_s: float
    work_s: float


def cell_times(run: CellRun, hosts: Sequence[Sequence[int]]) -> CellTimes:
    """Estimate how long the remaining rounds of a cell take.

    Args:
        run: the cell.
        hosts: the clients of each process; those of one process take turns.
    """
    num_clients = run.config.partition.num_clients
    seconds = {name: _client_seconds(run, name) for name in run.config.model_names}
    train_s, eval_s = np.array([seconds[run.config.model_name(client)] for client in range(num_clients)]).T
    host_of = np.empty(num_clients, dtype=np.int64)
    for host, clients in enumerate(hosts):
        host_of[list(clients)] = host
    rounds = range(run.checkpoints().newest_round(), run.rounds)
    counts = Counter(participants(run.config, round_index) for round_index in rounds)
    counts[frozenset()] += 1  # the last round is only scored
    busiest_s = work_s = 0.0
    for taking_part, count in counts.items():
        trains = np.isin(np.arange(num_clients), list(taking_part))
        host_s = np.bincount(host_of, weights=eval_s + trains * train_s)
        busiest_s += count * host_s.max()
        work_s += count * host_s.sum()
    return CellTimes(busiest_s, work_s)


def _total(nodes: Sequence[Resources], kind: str) -> float:
    return sum(node.get(kind, 0) for node in nodes)


def _client_seconds(run: CellRun, model: str) -> tuple[float, float]:
    """Seconds in which a client with this model trains for a round, and in which it is scored."""
    config, training = run.config, run.config.training
    num_train, num_test = shard_sizes(config, run.info)
    num_train = window_length(num_train, config.partition.windows_per_shard)
    timed = CellConfig(  # only what a step's time depends on, so that cells equal in it are timed once
        dataset=config.dataset,
        family=config.family,
        scheme="standalone",
        device=config.device,
        model=ModelConfig(width=config.model.width),
        training=replace(training, local_epochs=1, batch_size=min(training.batch_size, num_train)),
        numerics=config.numerics,
    )
    train_s, eval_s = _seconds_per_sample(model, timed, run.info)
    return num_train * training.local_epochs * train_s, num_test * eval_s


@lru_cache(maxsize=64)
def _seconds_per_sample(name: str, config: CellConfig, info: DatasetInfo) -> tuple[float, float]:
    """Seconds to train on a sample, and to score one, in one process that has the device to itself."""
    on_gpu, device = config.device == "cuda", torch.device(config.device)
    data = open_dataset(info)
    pipeline = make_pipeline(data, config.family, device=device, channels_last=config.numerics.channels_last)
    batch = min(config.training.batch_size, _MOST_SAMPLES)
    timed = _STEPS_ON_A_GPU * config.training.batch_size if on_gpu else batch
    workspace = make_workspace(config, info, name)
    streams = {"batches": torch_generator(0, "batches"), "augmentation": torch_generator(0, "augmentation")}
    train_s = eval_s = 0.0
    with numeric_settings(config.numerics):
        # The first pass warms up: on a GPU, kernels are chosen and steps recorded for each size of batch.
        for count in (timed if on_gpu else min(2, batch), timed):
            samples, labels = (part.to(device) for part in data.train.take(np.arange(count) % info.num_train))
            started = time.perf_counter()
            run_to_end(train(workspace, samples, labels, pipeline=pipeline, **streams)).item()  # when it is done
            trained = time.perf_counter()
            run_to_end(evaluate(workspace, samples, labels, pipeline=pipeline))
            train_s, eval_s = (trained - started) / count, (time.perf_counter() - trained) / count
    return train_s, eval_s
