"""The process-wide settings of PyTorch that can change bits, set during a computation and restored afterwards."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch

from flexifed.config import NumericsConfig


@contextmanager
def numeric_settings(config: NumericsConfig) -> Iterator[None]:
    """Compute with `config.threads` threads and deterministic cuDNN kernels, and with TF32 if the config says so.

    PyTorch's own default on GPUs is TF32 for convolutions but not for matrix products. For bf16 see `autocast`.
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
    """Run a forward pass and its loss with products in bf16 if the config says so; weights and sums stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")


@contextmanager
def seeded_dropout(seed: int, device: torch.device) -> Iterator[None]:
    """Seed PyTorch's global generators, the only ones that `nn.Dropout` draws from, and restore them afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def device_name(device: torch.device) -> str:
    """The name of the GPU or the processor. Results agree to the bit on devices of the same name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
