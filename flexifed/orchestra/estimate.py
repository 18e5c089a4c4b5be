"""About how long a cell takes here, from a few steps timed in this process. Starts no other."""

from __future__ import annotations

import os
import time
from functools import lru_cache

import torch

from flexifed.config import CellConfig
from flexifed.data.augment import ImagePipeline
from flexifed.models import build_model
from flexifed.orchestra.cell import CellRun
from flexifed.orchestra.placement import CellPlacement, Resources
from flexifed.seeding import torch_generator
from flexifed.training.evaluate import evaluate
from flexifed.training.local import train
from flexifed.training.numerics import numeric_settings

_SAMPLES = 16


def this_machine() -> Resources:
    """CPUs that this process may use, and GPUs, as Ray would count them."""
    return {"CPU": float(len(os.sched_getaffinity(0))), "GPU": float(torch.cuda.device_count())}


def concurrent_cells(placement: CellPlacement, machine: Resources) -> int:
    """How many cells the machine holds at a time, at least 1."""
    actors = len(placement.clients)
    wanted = {"CPU": placement.cpus_per_actor * actors, "GPU": placement.gpus_per_actor * actors}
    return max(1, int(min(machine.get(kind, 0) / amount for kind, amount in wanted.items() if amount) + 1e-6))


def cell_seconds(run: CellRun, placement: CellPlacement, machine: Resources, at_once: int) -> float:
    """Seconds of one cell with `at_once` of them running: the clients' work over the CPUs or GPUs that do it."""
    config = run.config
    num_train = run.info.num_train // config.partition.num_shards // config.partition.windows_per_shard
    num_test = run.info.num_test // config.partition.num_shards
    work = 0.0
    for client in range(config.partition.num_clients):
        train_s, eval_s = _seconds_per_sample(config.model_name(client), config, run.info.num_classes)
        work += num_train * config.training.local_epochs * train_s + num_test * eval_s
    if config.device == "cuda":
        workers = machine.get("GPU", 1)
    else:
        workers = min(machine["CPU"] / config.numerics.threads, len(placement.clients) * at_once)
    return run.rounds * work * at_once / max(1.0, workers)


@lru_cache(maxsize=64)
def _seconds_per_sample(name: str, config: CellConfig, num_classes: int) -> tuple[float, float]:
    """Seconds to train on a sample, and to score one, on one process that has the device to itself."""
    device = torch.device(config.device)
    model = build_model(name, num_classes=num_classes, width=config.model.width, device=device)
    pipeline = ImagePipeline((0.5,) * 3, (0.25,) * 3, device, config.numerics.channels_last)
    count = _SAMPLES if device.type == "cpu" else config.training.batch_size
    images = torch.zeros(count, 3, 32, 32, dtype=torch.uint8, device=device)
    labels = torch.zeros(count, dtype=torch.int64, device=device)
    one_epoch = type(config.training)(batch_size=count)
    with numeric_settings(config.numerics):
        seconds = []
        for _ in range(2):  # the first pass warms up
            started = time.perf_counter()
            train(
                model,
                images,
                labels,
                config=one_epoch,
                pipeline=pipeline,
                batches=torch_generator(0, "batches"),
                augmentation=torch_generator(0, "augmentation"),
            )
            trained = time.perf_counter()
            evaluate(model, images, labels, config=one_epoch, pipeline=pipeline)
            seconds.append(((trained - started) / one_epoch.local_epochs, time.perf_counter() - trained))
    train_s, eval_s = seconds[-1]
    return train_s / count, eval_s / count
