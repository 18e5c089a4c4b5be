"""The process-wide settings of PyTorch that can change bits, set for the length of a computation and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from flexifed.config import NumericsConfig


@contextmanager
def numeric_settings(config: NumericsConfig) -> Iterator[None]:
    """Compute with `config.threads` threads and with deterministic cuDNN kernels."""
    threads = torch.get_num_threads()
    cudnn = torch.backends.cudnn
    deterministic, benchmark = cudnn.deterministic, cudnn.benchmark
    torch.set_num_threads(config.threads)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        cudnn.deterministic, cudnn.benchmark = deterministic, benchmark


@contextmanager
def seeded_dropout(seed: int, device: torch.device) -> Iterator[None]:
    """Seed PyTorch's global generators, the only ones that `nn.Dropout` draws from, and put them back afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
