"""About how long a cell takes here, from a few steps timed in this process. Starts no other."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch

from flexifed.cells.run import CellRun
from flexifed.config import CellConfig
from flexifed.data import DatasetInfo, make_pipeline, open_dataset
from flexifed.federation.host import make_workspace
from flexifed.federation.rounds import make_shards
from flexifed.orchestra.cluster import usable_cpus
from flexifed.orchestra.placement import CellPlacement, Resources
from flexifed.seeding import torch_generator
from flexifed.training.evaluate import evaluate
from flexifed.training.local import train
from flexifed.training.numerics import numeric_settings
from flexifed.training.streams import run as run_steps

START_S = 15.0  # Ray, and the first processes that import torch; seen on 2 cores
_MOST_SAMPLES = 64
"""Of the step that is timed: a batch, which in small ones takes longer a sample, but no more."""
_STEPS_ON_A_GPU = 8
"""Are timed together: the first ones find it idle."""


def this_machine() -> Resources:
    """What a Ray that is started here would have."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0  # a driver may be too old for PyTorch
    return {"CPU": float(usable_cpus()), "GPU": float(gpus)}


def concurrent_cells(placement: CellPlacement, nodes: Sequence[Resources]) -> int:
    """How many cells the nodes hold at a time, at least 1."""
    actors = len(placement.clients)
    wanted = {"CPU": placement.cpus_per_actor * actors, "GPU": placement.gpus_per_actor * actors}
    return max(1, int(min(_total(nodes, kind) / amount for kind, amount in wanted.items() if amount) + 1e-6))


def cell_seconds(run: CellRun, placement: CellPlacement, nodes: Sequence[Resources], at_once: int) -> float:
    """Seconds of what is left of one cell with `at_once` of them running: the clients' work over what does it."""
    config = run.config
    shards = make_shards(config, run.info)[0]
    num_train, num_test = len(shards.train) // config.partition.windows_per_shard, len(shards.test)
    work = 0.0
    alike = replace(  # what the seconds of a step depend on, so that cells alike in it are timed once
        config,
        scheme="standalone",
        seed=0,
        training=replace(config.training, local_epochs=1, batch_size=min(config.training.batch_size, num_train)),
    )
    for client in range(config.partition.num_clients):
        train_s, eval_s = _seconds_per_sample(config.model_name(client), alike, run.info)
        work += num_train * config.training.local_epochs * train_s + num_test * eval_s
    if config.device == "cuda":
        workers = _total(nodes, "GPU")
    else:
        workers = min(_total(nodes, "CPU") / config.numerics.threads, len(placement.clients) * at_once)
    return (run.rounds - run.checkpoints().newest_round()) * work * at_once / max(1.0, workers)


def _total(nodes: Sequence[Resources], kind: str) -> float:
    return sum(node.get(kind, 0) for node in nodes)


@lru_cache(maxsize=64)
def _seconds_per_sample(name: str, config: CellConfig, info: DatasetInfo) -> tuple[float, float]:
    """Seconds to train on a sample, and to score one, in one process that has the device to itself."""
    on_gpu, where = config.device == "cuda", torch.device(config.device)
    data = open_dataset(info)
    pipeline = make_pipeline(data, config.family, device=where, channels_last=config.numerics.channels_last)
    batch = min(config.training.batch_size, _MOST_SAMPLES)
    timed = _STEPS_ON_A_GPU * config.training.batch_size if on_gpu else batch
    workspace = make_workspace(name, config, info)
    streams = {"batches": torch_generator(0, "batches"), "augmentation": torch_generator(0, "augmentation")}
    train_s = eval_s = 0.0
    with numeric_settings(config.numerics):
        # First to warm up: on a GPU with all sizes of batches, for each of which kernels are chosen and steps recorded.
        for count in (timed if on_gpu else min(2, batch), timed):
            samples, labels = (part.to(where) for part in data.train.take(np.arange(count) % info.num_train))
            started = time.perf_counter()
            run_steps(train(workspace, samples, labels, pipeline=pipeline, **streams)).item()  # when it is done
            trained = time.perf_counter()
            run_steps(
                evaluate(
                    workspace.model,
                    samples,
                    labels,
                    config=config.training,
                    numerics=config.numerics,
                    pipeline=pipeline,
                )
            )
            train_s, eval_s = (trained - started) / count, (time.perf_counter() - trained) / count
    return train_s, eval_s
