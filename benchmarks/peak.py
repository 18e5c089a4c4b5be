"""The peak rate at which a machine computes, and the share of it that training reaches."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence

import torch
from busy import work_of

from flexifed.config import CellConfig
from flexifed.federation.rounds import RoundResult
from flexifed.models.cost import model_multiply_adds

TRAINING_PASSES = 3  # forward, and backward with respect to inputs and to weights: products of the same size
FLOPS = 2  # of a multiply-add


def peak_rate(device: torch.device, cores: int, repeat: int = 6) -> float:
    """Measure the FLOP/s of a product of two large square float32 matrices; returns the best of `repeat` runs.

    On a GPU, products are in TF32, PyTorch's default for convolutions, and a run is many of them in a row: a GPU takes
    a while to reach its full clock rate, and a single product ends too soon to be timed.

    Args:
        device: where to multiply.
        cores: the number of threads on a CPU.
        repeat: the number of runs.
    """
    on_gpu = device.type == "cuda"
    size, products_per_run = (8192, 30) if on_gpu else (4096, 1)
    left, right = torch.rand(2, size, size, device=device)
    threads = torch.get_num_threads()
    torch.set_num_threads(cores)
    torch.backends.cuda.matmul.allow_tf32, before = True, torch.backends.cuda.matmul.allow_tf32
    seconds = []
    for _ in range(repeat):
        started = time.perf_counter()
        for _ in range(products_per_run):
            torch.mm(left, right)
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds.append((time.perf_counter() - started) / products_per_run)
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = before
    del left, right
    if on_gpu:
        torch.cuda.empty_cache()  # so that the memory which is measured afterwards is without theirs
    return FLOPS * size**3 / min(seconds)


def share_of_peak(
    config: CellConfig,
    num_classes: int,
    samples: Sequence[int],
    results: Sequence[RoundResult],
    rate: float,
    sharing: int | None,
) -> dict[str, float]:
    """The share of the peak rate that training reached, by model, and over all processes as `all`.

    A client that trains beside others is compared with its share of the peak. Where clients of a process overlap, a
    client's time contains others' work, so there is only `all`.

    Args:
        config: the cell.
        num_classes: the number of classes of its data set.
        samples: the number of samples that each client trains on in an epoch.
        results: rounds of training.
        rate: the peak rate in FLOP/s.
        sharing: the number of clients that train at the same time, one in each process; None if clients of a process
            overlap.
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
    shares = {}
    if sharing is not None:
        shares = {name: rates[name] * sharing / rate for name in rates if isinstance(name, str)}
    shares["all"] = sum(rates[host] for host in rates if isinstance(host, int)) / rate
    return {name: round(share, 3) for name, share in shares.items()}
