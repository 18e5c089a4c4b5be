"""The rate at which a machine can compute at best, and how much of it training reaches."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence

import torch
from busy import work_of

from flexifed.config import CellConfig
from flexifed.federation.rounds import RoundResult
from flexifed.models.cost import model_multiply_adds

TRAINING_PASSES = 3  # forward, and backward to inputs and to weights: products of the same size
FLOPS = 2  # a multiply-add is two


def peak_rate(device: torch.device, cores: int, repeat: int = 6) -> float:
    """FLOP/s of a product of two large square float32 matrices, the best of some.

    On a GPU in TF32, as PyTorch's convolutions are by default, and many at a time: it needs a while to speed up, and
    one alone is over too soon to be timed.
    """
    on_gpu = device.type == "cuda"
    size, at_a_time = (8192, 30) if on_gpu else (4096, 1)
    one, other = torch.rand(2, size, size, device=device)
    threads = torch.get_num_threads()
    torch.set_num_threads(cores)
    torch.backends.cuda.matmul.allow_tf32, before = True, torch.backends.cuda.matmul.allow_tf32
    seconds = []
    for _ in range(repeat):
        started = time.perf_counter()
        for _ in range(at_a_time):
            torch.mm(one, other)
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds.append((time.perf_counter() - started) / at_a_time)
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = before
    return FLOPS * size**3 / min(seconds)


def share_of_peak(
    config: CellConfig,
    num_classes: int,
    samples: Sequence[int],
    results: Sequence[RoundResult],
    rate: float,
    sharing: int,
) -> dict[str, float]:
    """Which part of the peak rate training reached, by model and over all processes together.

    A client that trains beside others is held against its share of the peak.

    Args:
        samples: that each client trains on in an epoch.
        results: rounds of training.
        sharing: clients that train at a time.
    """
    flops: dict[str | int, float] = defaultdict(float)  # by model, and by process
    seconds: dict[str | int, float] = defaultdict(float)
    for result in results:
        for host, client in zip(result.host_of, result.clients, strict=True):
            name = config.model_name(client.client)
            multiply_adds = model_multiply_adds(name, num_classes=num_classes, width=config.model.width)
            count = samples[client.client] * config.training.local_epochs
            for key in (name, host):
                flops[key] += FLOPS * TRAINING_PASSES * multiply_adds * count
            seconds[name] += client.train_s or 0.0
        for host, work in work_of(result).items():
            seconds[host] += work.train_s
    rates = {key: flops[key] / seconds[key] for key in flops}
    shares = {name: rates[name] * sharing / rate for name in rates if isinstance(name, str)}
    shares["all"] = sum(rates[host] for host in rates if isinstance(host, int)) / rate
    return {name: round(share, 3) for name, share in shares.items()}
