"""The process-wide settings of PyTorch that can change bits, set for the length of a computation and put back."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch

from flexifed.config import NumericsConfig


@contextmanager
def numeric_settings(config: NumericsConfig) -> Iterator[None]:
    """Compute with `config.threads` threads and deterministic cuDNN kernels, and in TF32 if it is asked for.

    By PyTorch's own default convolutions on GPUs are in TF32, matrix products are not. For bf16 see `autocast`.
    """
    threads = torch.get_num_threads()
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    torch.set_num_threads(config.threads)
    cudnn.deterministic, cudnn.benchmark = True, False
    if config.precision == "tf32":
        cudnn.allow_tf32 = matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before


def autocast(config: NumericsConfig, device: torch.device) -> AbstractContextManager[object]:
    """Around a forward pass and its loss: products in bf16 where the config says so. Weights and sums stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")


@contextmanager
def seeded_dropout(seed: int, device: torch.device) -> Iterator[None]:
    """Seed PyTorch's global generators, the only ones that `nn.Dropout` draws from, and put them back afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def device_name(device: torch.device) -> str:
    """What computes: the GPU's name, or the processor's. Bits agree on one kind of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
